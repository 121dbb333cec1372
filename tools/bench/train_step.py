"""One contrastive training step on a CPU, from a batch in memory: mm against open_clip, the same weights and captions.

Batch 64, bf16 autocast, AdamW. open_clip runs eager and compiled as its trainer would; the faster one is the peer. The
loss of the first step must agree. MFU: FLOPs of real tokens (forward and backward, open_clip's formula without its
padding) a second, over the rate of a large bf16 matrix product measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from _clip import open_clip_model
from _clip_models import batch_in_memory, captions, same_in_mm
from _common import arguments, fastest, figure, report, rounds_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mm.config import OptimConfig, ParallelConfig
from mm.distributed.device import pick_device
from mm.distributed.parallelize import parallelize
from mm.distributed.world import World
from mm.objectives.step import TrainStep
from mm.training.metrics import matrix_rate
from mm.training.optim import Optimizers
from mm.types import Batch

MARKS = {"ViT-S-32-alt": (1.7, 0.52), "ViT-B-32": (1.5, 0.62)}  # times as fast, share of the machine's own rate
ADAM: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.98), "weight_decay": 0.2}  # open_clip's, at a small rate
TOLERANCE = 3e-3  # of the losses: both round to bf16, in other places


class Peer:
    """The step of open_clip's trainer: no clipping, no average of weights."""

    def __init__(self, model: nn.Module, compile: bool) -> None:
        from open_clip.loss import ClipLoss

        self.model, self.loss = model, ClipLoss()
        self.run = torch.compile(model) if compile else model
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        rest = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, fused=True, **ADAM)

    def step(self, images: Tensor, ids: Tensor) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(*self.run(images, ids))
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
        return loss.item()


class Ours:
    """mm's step: forward, backward and optimizer."""

    def __init__(self, step: TrainStep) -> None:
        self.module, self.config = step, ParallelConfig(device="cpu")
        self.parallel = parallelize(step, self.config, World(), pick_device(self.config), unused=False)
        self.optimizers = Optimizers(step, OptimConfig(**ADAM), steps=10**9)

    def step(self, batch: Batch) -> float:
        return self.losses(batch)["contrastive"]

    def losses(self, batch: Batch) -> dict[str, float]:
        """Each objective's, from before the step that this takes."""
        metrics = self.module.backward(
            batch, 1, lambda: torch.autocast("cpu", torch.bfloat16), self.parallel.forward, self.parallel.sync
        )
        self.optimizers.step(0, 1.0)
        self.module.after_step()
        return {name.removeprefix("loss/"): metrics[name].item() for name in metrics if name.startswith("loss/")}


def flops(step: TrainStep, batch: Batch) -> int:
    """Of forward and backward over real tokens."""
    with FlopCounterMode(display=False) as counter:
        step.backward(batch)
    step.zero_grad()
    return counter.get_total_flops()


def compare(name: str, size: int, rounds: int, kinds: list[str]) -> dict[str, Any]:
    texts = captions(size)
    batch, images, ids = batch_in_memory(texts)
    peers = {kind: Peer(open_clip_model(name), compile=kind == "compiled") for kind in kinds}
    ours = same_in_mm(name, peers[kinds[0]].model)
    work = flops(ours, batch)
    sides: dict[str, Callable[[], float]] = {}
    sides |= {key: lambda peer=peer: peer.step(images, ids) for key, peer in peers.items()}
    losses = {key: side() for key, side in sides.items()}  # compiled before mm changes torch's settings for itself
    best = fastest(sides)
    us = Ours(ours)
    losses["ours"] = us.step(batch)
    assert max(losses.values()) - min(losses.values()) < TOLERANCE, f"losses of the first step differ: {losses}"
    rate = matrix_rate(torch.device("cpu"), torch.bfloat16)
    seconds = rounds_of({"ours": lambda: us.step(batch), best: sides[best]}, rounds, warm=0)  # both have been called
    rate = max(rate, matrix_rate(torch.device("cpu"), torch.bfloat16))
    share = work / median(seconds["ours"]) / rate
    return {
        "ours": [size / s for s in seconds["ours"]],
        "peer": [size / s for s in seconds[best]],
        "best": best,
        "step_images_per_second": {key: size / median(s) for key, s in seconds.items()},
        "loss": losses,
        "tokens": float(batch.lengths["text"].float().mean()),
        "gflop": work / 1e9,
        "matrix_gflops": rate / 1e9,
        "mfu": share,
    }


def main() -> None:
    args = arguments(
        "training step against open_clip", rounds=5, batch=64, models=",".join(MARKS), peers="eager,compiled"
    )
    for name in args.models.split(","):
        found = compare(name, args.batch, args.rounds, args.peers.split(","))
        ours, peer, (mark, mfu_mark) = found.pop("ours"), found.pop("peer"), MARKS[name]
        about = f"{name}, batch {args.batch}, captions of {found['tokens']:.1f} tokens"
        print(f"{about}: {found}")
        report(
            f"contrastive training step, {about}",
            ours,
            peer,
            unit="images/s",
            mark=mark,
            better="higher",
            packages=("open_clip_torch", "torch"),
            args=args,
            what=f"contrastive training step, {name}",
            against=f"open_clip, {found['best']}",
            **found,
        )
        figure(
            f"share of the machine's matrix rate, {about}",
            found["mfu"],
            unit=f"of {found['matrix_gflops']:.0f} GFLOP/s",
            mark=mfu_mark,
            better="higher",
            json_too=args.json,
            packages=("torch",),
            what=f"… share of the machine's bf16 matrix rate, {name}",
        )


if __name__ == "__main__":
    main()
