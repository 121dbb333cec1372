"""What adapting a part of CLIP ViT-B/32 costs, and how exactly LoRA merges into it, at random weights.

Seconds of a step with the image tower locked (LiT) against one with everything training: contrastive alone, float32,
one thread. Before that, LoRA in both towers is trained for three steps, and merged weights are compared with peft's,
features with and without merging, and the base with what is merged and unmerged.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _common import alternate, arguments, report

from mm.adaptation import apply, lora
from mm.adapters.text import ClipTokenizer
from mm.config import AdaptConfig, TrainConfig
from mm.models.presets import vit_b32
from mm.objectives.step import TrainStep, build_step
from mm.plan.simulate import simulate
from mm.training.optim import Optimizers
from mm.types import Batch

TOLERANCE = 1e-6
MODES = ("all", "locked", "first:6", "last", "bias", "lora")
PLANNED = 1024  # samples of the step that is planned for one GPU


def config_of(**adapt: str) -> TrainConfig:
    config = TrainConfig(model=vit_b32(), adapt=AdaptConfig(**adapt))
    config.model.denoiser = config.objectives.diffusion = None
    config.data.batch_size = PLANNED
    return config


def build(config: TrainConfig) -> TrainStep:
    torch.manual_seed(0)
    step = build_step(config, ClipTokenizer())
    apply(step, config.adapt)
    return step


def batch_of(step: TrainStep, size: int) -> Batch:
    pixels = torch.randint(0, 256, (size, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = step.model.processors(train=False)["text"]
    words = [f"a picture of number {index}" for index in range(size)]
    ids, lengths = processor.collate([processor.prepare(text, train=False) for text in words])
    assert lengths is not None
    return Batch({"image": pixels, "text": ids}, {"text": lengths}, torch.arange(size), words)


def trainer(config: TrainConfig, size: int) -> tuple[TrainStep, Batch, Optimizers]:
    step = build(config)
    return step, batch_of(step, size), Optimizers(step, config.optim, 100)


def train(step: TrainStep, batch: Batch, optimizers: Optimizers) -> None:
    step.backward(batch)
    optimizers.clip()
    optimizers.step(50)


def merging(size: int) -> dict[str, float]:
    """The largest differences, and the size of the adapter."""
    from peft.tuners.lora import LoraLayer

    config = config_of(image="lora", text="lora")
    step, batch, optimizers = trainer(config, size)
    for _ in range(3):
        train(step, batch, optimizers)
    base, factors = lora.split({name: tensor.clone() for name, tensor in step.state_dict().items()})
    scale = config.adapt.lora_alpha / config.adapt.lora_rank
    merged = lora.merge(base, factors, scale)
    undone = lora.merge(merged, factors, -scale)
    plain = build(config_of()).eval()
    plain.load_state_dict(merged)
    apart, together = step.eval().features(batch), plain.features(batch)
    with tempfile.TemporaryDirectory() as folder:
        lora.save(folder, step.model.state_dict(), config.adapt, {})
        bytes_of = (Path(folder) / lora.WEIGHTS).stat().st_size
    for module in step.modules():
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[attr-defined]
    theirs, _ = lora.split(step.state_dict())
    found = {
        "features_merged_against_not": max((apart[name] - together[name]).abs().max().item() for name in apart),
        "weights_against_peft": max((theirs[name] - merged[name]).abs().max().item() for name in merged),
        "base_against_unmerged": max((undone[name] - base[name]).abs().max().item() for name in base),
    }
    moved = max((merged[name] - base[name]).abs().max().item() for name in base)
    assert all(value <= TOLERANCE for value in found.values()) and moved > 1e-4, (found, moved)
    return found | {"largest_change_of_a_weight": moved, "adapter_bytes": bytes_of}


def planned(mode: str) -> dict[str, float]:
    """Of a step on one GPU with the image tower in this mode: parameters that train, bytes at the peak, FLOPs."""
    step = simulate(config_of(image=mode), caption_tokens=16)
    return {"trained": step.trained, "peak_bytes": step.peak, "flops": step.forward + step.backward}


def main() -> None:
    args = arguments("adapting CLIP ViT-B/32", rounds=5, size=16)
    torch.set_num_threads(1)
    found = merging(4)
    print("  ".join(f"{name} {value:.3g}" for name, value in found.items()))
    plans = {mode: planned(mode) for mode in MODES}
    locked, whole = trainer(config_of(image="locked"), args.size), trainer(config_of(), args.size)
    ours, peer = alternate(lambda: train(*locked), lambda: train(*whole), args.rounds)
    report(
        "a step with the image tower locked against one with everything training",
        ours,
        peer,
        unit="s",
        mark=1.0,
        better="lower",
        packages=("mm", "torch", "peft"),
        args=args,
        lora=found,
        image_tower=plans,
        planned_batch=PLANNED,
        size=args.size,
    )


if __name__ == "__main__":
    main()
