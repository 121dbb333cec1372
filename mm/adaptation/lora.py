"""LoRA (arXiv 2106.09685) through `peft`: W + (alpha / rank) B A, of which only A and B train.

A run trains with peft's layers in place. What it exports are the merged weights under their plain names, which need no
peft, and beside them the factors in peft's own files, which `peft` and `mm.load(base, adapter=...)` both read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mm.config import ConfigError
from mm.models.wrapped import Wrapped
from mm.types import Batch

if TYPE_CHECKING:
    from mm.config import AdaptConfig
    from mm.models.model import Model

FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
LONGEST = 16 * 2**20  # bytes of a config that is read
_PREFIX = "base_model.model."  # peft's, before the names of the model that it was given
# what peft can do beside plain LoRA, each with the value that says it was not done
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": (None, []),
}


def linears(modules: list[nn.Module]) -> list[nn.Linear]:
    """The matrices that LoRA is put beside. Not those that torch's own attention reads without calling them."""
    found = [child for module in modules for child in module.modules() if isinstance(child, nn.Linear)]
    return [child for child in found if not isinstance(child, NonDynamicallyQuantizableLinear)]


@torch.no_grad()
def called(model: Model, name: str, found: list[nn.Linear]) -> list[nn.Linear]:
    """Those of another library's tower that it calls: some read the weights of a layer, and LoRA would not be seen.

    Found by encoding one example, in evaluation mode. Without data (on the meta device) all are taken.
    """
    if name not in model.encoders or not isinstance(model.encoders[name], Wrapped) or model.device.type == "meta":
        return found
    processor = model.processors(train=False)[name]
    examples = {"image": Image.new("RGB", (64, 64)), "text": "a"}
    tensor, lengths = processor.collate([processor.prepare(examples[name], train=False)] * 2)
    batch = Batch({name: tensor}, {} if lengths is None else {name: lengths}).to(model.device)
    seen: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: seen.add(module)) for module in found]
    training = model.training
    try:
        model.eval().encode(batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [module for module in found if module in seen]


def is_factor(name: str) -> bool:
    """Whether a parameter is an A or a B."""
    return ".lora_A." in name or ".lora_B." in name


def inject(model: Model, targets: Mapping[str, list[nn.Linear]], config: AdaptConfig) -> None:
    """Put A (random) and B (zero) beside the target matrices of the towers; no `requires_grad` of others changes.

    Raises ConfigError where peft is missing, and for a tower without a matrix.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        name = next(iter(targets))
        raise ConfigError(f"adapt.{name} = lora: needs the package peft; pip install 'mm[interop]'") from error
    for name, found in targets.items():
        if not found:
            raise ConfigError(f"adapt.{name} = lora: it has no linear layer that LoRA could be put beside; use bias")
    wanted = {id(module) for found in targets.values() for module in found}
    names = [name for name, module in model.named_modules() if id(module) in wanted]
    before = {p: p.requires_grad for p in model.parameters()}
    # no dropout: peft's draws from the global generator, and a resumed run could not repeat it
    plain = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=names)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that are not from transformers
        inject_adapter_in_model(plain, model)
    for parameter, trained in before.items():
        parameter.requires_grad_(trained)


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state with LoRA in it as that of the base under plain names, and the factors: `x.lora_A`, `x.lora_B`."""
    base, factors = {}, {}
    for name, tensor in state.items():
        if is_factor(name):
            factors[name.replace(".default.weight", "")] = tensor
        else:
            base[name.replace(".base_layer.", ".")] = tensor
    return base, factors


@torch.no_grad()
def merge(state: Mapping[str, Tensor], factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`state` with W + scale B A for every matrix that has factors; with -scale the inverse, to float32's rounding."""
    merged = dict(state)
    for name, a in factors.items():
        if name.endswith(".lora_A"):
            place = name.removesuffix(".lora_A")
            weight = merged[f"{place}.weight"]
            update = factors[f"{place}.lora_B"].float() @ a.float() * scale
            merged[f"{place}.weight"] = (weight.float() + update).to(weight.dtype)
    return merged


def fingerprint(state: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> str:
    """sha256 of the matrices that the factors belong to: which base an adapter was trained on."""
    digest = hashlib.sha256()
    for place in sorted(name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")):
        digest.update(state[f"{place}.weight"].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(
    folder: str | os.PathLike[str], state: Mapping[str, Tensor], config: AdaptConfig, note: dict[str, str]
) -> None:
    """Write the factors that a model's state holds as peft's two files, over what was there.

    `note` and the fingerprint of the base go into the safetensors metadata.
    """
    from safetensors.torch import save_file

    base, factors = split(state)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PREFIX}{name}.weight": tensor.contiguous() for name, tensor in factors.items()}
    places = sorted(name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A"))
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": places,
        "peft_version": importlib.metadata.version("peft"),
    }
    note = note | {"base": fingerprint(base, factors)}
    metadata = {"mm": json.dumps(note, sort_keys=True)}  # one entry: several are written in no fixed order
    save_file(tensors, folder / f".{WEIGHTS}.tmp", metadata=metadata)
    (folder / f".{CONFIG}.tmp").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for name in (CONFIG, WEIGHTS):
        with open(folder / f".{name}.tmp", "rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / f".{name}.tmp", folder / name)


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], float, dict[str, Any]]:
    """The factors by the model's names, what their product is multiplied with, and the note.

    Raises ConfigError for what is no folder of plain LoRA.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        hint = f"; give {folder / FOLDER}" if (folder / FOLDER / CONFIG).is_file() else "; is it a folder made by peft?"
        raise ConfigError(f"{folder}: not a LoRA adapter: no {', '.join(missing)}{hint}")
    try:
        if (folder / CONFIG).stat().st_size > LONGEST:
            raise ConfigError(f"{folder / CONFIG}: more than {LONGEST >> 20} MB: not a LoRA adapter's config")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        scale = _scale(folder, config)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("mm", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder}: damaged: {error}") from error
    factors = {name.removeprefix(_PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    pairs = {"lora_A": "lora_B", "lora_B": "lora_A"}
    odd = []
    for name in factors:
        place, _, kind = name.rpartition(".")
        if kind not in pairs or f"{place}.{pairs[kind]}" not in factors:
            odd.append(name)
    if odd or not factors:
        raise ConfigError(f"{folder / WEIGHTS}: not pairs of lora_A and lora_B: {_some(odd) or 'it is empty'}")
    return factors, scale, note


def _scale(folder: Path, config: Any) -> float:
    """alpha / rank. Raises ConfigError for anything but plain LoRA."""
    kind = config.get("peft_type") if isinstance(config, dict) else config
    if kind != "LORA":
        raise ConfigError(f"{folder / CONFIG}: peft_type = {kind}: mm composes LORA only; merge it with peft first")
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise ConfigError(
                f"{folder / CONFIG}: {key} = {config[key]}: mm composes plain LoRA; merge it with peft first"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise ConfigError(f"{folder / CONFIG}: r = {rank}, lora_alpha = {alpha}: must be an int above 0 and a number")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def compose(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Merge an adapter into the model that it was trained on, in place.

    Raises ConfigError where it is of another architecture, or was trained beside other weights than the model's.
    """
    factors, scale, note = read(folder)
    state = model.state_dict()
    odd = []
    for name in factors:
        if name.endswith(".lora_A"):
            place = name.removesuffix(".lora_A")
            a, b, weight = factors[name], factors[f"{place}.lora_B"], state.get(f"{place}.weight")
            if weight is None or (b.shape[0], *a.shape[1:]) != tuple(weight.shape) or a.shape[0] != b.shape[-1]:
                odd.append(place)
    if odd:
        raise ConfigError(
            f"{folder}: is of another architecture: {_some(odd)} of it do not fit; give the base it is of"
        )
    then, now = note.get("base", ""), fingerprint(state, factors)
    if then and then != now:
        raise ConfigError(
            f"{folder}: was trained beside other weights (sha256 {then[:12]} then, {now[:12]} here); give the base "
            "that its run started from (an export of its own run has it merged already)"
        )
    model.load_state_dict(merge(state, factors, scale))


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
