"""Which parameters of a train step move, and which modules stay as at inference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mm.adaptation import lora
from mm.config import ConfigError

if TYPE_CHECKING:
    from mm.config import AdaptConfig
    from mm.models.model import Model
    from mm.objectives.step import TrainStep

STACKS = ("blocks", "resblocks", "layers", "layer", "block")  # what towers call their list of blocks


def apply(step: TrainStep, config: AdaptConfig) -> None:
    """Let only that train which `config` names; called once, when all weights that the run starts from are in place.

    What does not train is out of the optimizer and the average, builds no graph where nothing before it trains, and
    stays in evaluation mode: no dropout, and statistics of batch norms that do not move. Draws the initial LoRA
    matrices from torch's global generator. Raises ConfigError for what a tower does not have.
    """
    parts = _parts(step.model)
    asked = {"image": config.image, "text": config.text, "denoiser": config.denoiser}
    modes = {name: asked[name] for name in parts if asked.get(name, "all") != "all"}
    if adapted := [name for name, mode in modes.items() if mode == "lora"]:
        found = {name: lora.linears(stack(parts[name]) or parts[name]) for name in adapted}
        lora.inject(step.model, {name: lora.called(step.model, name, some) for name, some in found.items()}, config)
    for name, mode in modes.items():
        moving = _moving(name, mode, parts[name])
        for module in parts[name]:
            for parameter in module.parameters():
                parameter.requires_grad_(parameter in moving)
    step.still = [module for name in modes for part in parts[name] for module in _still(part)]
    step.train()
    step.changed()


def stack(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of a tower, of ours or of another library, in order; none where it is no stack of blocks."""
    found: list[nn.Module] = []
    for module in modules:
        for name, child in module.named_children():
            if name in STACKS and isinstance(child, nn.ModuleList | nn.Sequential):
                found += list(child)
            else:
                found += stack([child])
    return found


def _parts(model: Model) -> dict[str, list[nn.Module]]:
    """What can be adapted, by the name of its field: a modality's tower is its adapter and its encoder."""
    parts: dict[str, list[nn.Module]] = {
        name: [model.adapters[name], model.encoders[name]] for name in model.adapters if name in model.encoders
    }
    return parts | ({} if model.denoiser is None else {"denoiser": [model.denoiser]})


def _moving(name: str, mode: str, modules: list[nn.Module]) -> set[nn.Parameter]:
    """The parameters that train in a mode other than `all`."""
    named = [pair for module in modules for pair in module.named_parameters()]
    if mode == "locked":
        return set()
    if mode == "lora":
        moving = {p for key, p in named if lora.is_factor(key)}
    elif mode == "bias":
        moving = {p for key, p in named if key.endswith("bias")}
    else:
        moving = _from_block(name, mode, modules)
    if not moving:
        raise ConfigError(
            f"adapt.{name} = {mode}: nothing of it would train; set adapt.{name} = locked if that is meant"
        )
    return moving


def _from_block(name: str, mode: str, modules: list[nn.Module]) -> set[nn.Parameter]:
    """Parameters from a block on, in the order in which a tower registers them, which is that of its forward."""
    blocks = stack(modules)
    head = getattr(modules[-1], "proj", None)
    if not blocks and mode == "last" and isinstance(head, nn.Linear):  # a ResNet behind mm's projection
        return set(head.parameters())
    if not blocks:
        raise ConfigError(f"adapt.{name} = {mode}: this tower is no stack of blocks; use all, locked, bias or lora")
    first = len(blocks) - 1 if mode == "last" else int(mode.partition(":")[2])
    if first > len(blocks):
        raise ConfigError(
            f"adapt.{name} = {mode}: there are only {len(blocks)} blocks; use first:{len(blocks)} or less"
        )
    order = {p: place for place, p in enumerate(p for module in modules for p in module.parameters())}
    if first < len(blocks):
        begin = min(order[p] for p in blocks[first].parameters())
    else:
        begin = 1 + max(order[p] for p in blocks[-1].parameters())
    # a module's bare parameters come before those of its children, and CLIP's last projection is one
    owners = [module for part in modules for module in part.modules() if stack([module])]
    ends = {p for owner in owners for key, p in owner.named_parameters(recurse=False) if "proj" in key}
    return {p for p, place in order.items() if place >= begin} | ends


def _still(module: nn.Module) -> list[nn.Module]:
    """The largest parts of a module that have tensors of which none trains; and batch norms that train in part."""
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and not any(tensor.requires_grad for tensor in tensors):
        return [module]
    if isinstance(module, _BatchNorm) and not all(p.requires_grad for p in module.parameters()):
        return [module]
    return [found for child in module.children() for found in _still(child)]
