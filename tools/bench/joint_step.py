"""Both objectives in one step of mm, against two models trained apart: an open_clip step and a step of diffusers' DiT.

ViT-S-32-alt's towers and a denoiser of DiT-S's width and depth on 224-px pictures in 32-px patches, the same 64 samples
with real captions, bf16 autocast, AdamW, from memory. The peers run eager and compiled; the faster pair counts. Losses
of the first step must agree: the same weights for the towers, and a denoiser whose last layer is zero on both sides.
mm's denoiser is told the caption's tokens and trains the text encoder through them; the DiT is told a class alone.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from _clip import open_clip_model
from _clip_models import batch_in_memory, captions, same_in_mm
from _common import arguments, fastest, report, rounds_of
from torch import Tensor, nn
from train_step import ADAM, Ours, Peer, flops

from mm.config import DenoiserConfig, DiffusionConfig
from mm.diffusion.noise import normal
from mm.diffusion.schedule import Schedule
from mm.objectives.diffusion import LEVEL, NOISE
from mm.training.metrics import matrix_rate

NAME, SIZE, MARK = "ViT-S-32-alt", 224, 1.5
WIDTH, DEPTH, HEADS = 384, 12, 6
TOLERANCE = 5e-3


class DiT:
    """A class-conditional transformer of diffusers, trained on the same noisy pictures for the same velocity."""

    def __init__(self, patch: int, compile: bool) -> None:
        from diffusers import DiTTransformer2DModel

        torch.manual_seed(0)
        self.model = DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            in_channels=3,
            out_channels=3,
            num_layers=DEPTH,
            sample_size=SIZE,
            patch_size=patch,
        ).train()
        for block in self.model.transformer_blocks:  # adaLN-zero, as its paper begins and diffusers' class does not
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
        nn.init.zeros_(self.model.proj_out_2.weight)
        nn.init.zeros_(self.model.proj_out_2.bias)
        self.run = torch.compile(self.model) if compile else self.model
        self.schedule = Schedule.from_config(DiffusionConfig())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAM)

    def step(self, pixels: Tensor, seeds: Tensor, first: bool = False) -> float:
        """`first`: with mm's noise, else with torch's."""
        self.optimizer.zero_grad()
        x = pixels.float() / 127.5 - 1
        noise = normal(seeds, (1, *x.shape[1:]), NOISE).flatten(0, 1) if first else torch.randn_like(x)
        level = normal(seeds, (1,), LEVEL).flatten() if first else torch.randn(len(x))
        sigma = self.schedule.training_sigma(level)
        z = self.schedule.add_noise(x, noise, sigma)
        classes = seeds % 1000
        with torch.autocast("cpu", torch.bfloat16):
            raw = self.run(z, timestep=sigma * 1000, class_labels=classes).sample
        loss = self.schedule.velocity(x, raw.float(), sigma).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def compare(patch: int, size: int, rounds: int, kinds: list[str]) -> dict[str, Any]:
    batch, images, ids = batch_in_memory(captions(size))
    clips = {kind: Peer(open_clip_model(NAME), compile=kind == "compiled") for kind in kinds}
    dits = {kind: DiT(patch, compile=kind == "compiled") for kind in kinds}
    denoiser = DenoiserConfig(patch=patch, width=WIDTH, depth=DEPTH, heads=HEADS)
    step = same_in_mm(NAME, clips[kinds[0]].model, DiffusionConfig(), denoiser=denoiser)
    work = flops(step, batch)
    parameters = {
        "ours": sum(p.numel() for p in step.parameters()),
        "open_clip": sum(p.numel() for p in clips[kinds[0]].model.parameters()),
        "diffusers": sum(p.numel() for p in dits[kinds[0]].model.parameters()),
    }
    found: list[dict[str, float]] = []
    sides: dict[str, dict[str, Any]] = {"open_clip": {}, "diffusers": {}}
    for kind in kinds:  # compiled before mm changes torch's settings for itself
        found.append({"contrastive": clips[kind].step(images, ids)})
        found[-1]["diffusion"] = dits[kind].step(batch.inputs["image"], batch.seeds, first=True)
        sides["open_clip"][kind] = lambda clip=clips[kind]: clip.step(images, ids)
        sides["diffusers"][kind] = lambda dit=dits[kind]: dit.step(batch.inputs["image"], batch.seeds)
    best = {peer: fastest(of_peer) for peer, of_peer in sides.items()}
    ours = Ours(step)
    found.append(ours.losses(batch))
    for name in ("contrastive", "diffusion"):
        values = [losses[name] for losses in found]
        assert max(values) - min(values) < TOLERANCE * max(values), f"first {name} losses differ: {values}"
    seconds = rounds_of(
        {"ours": lambda: ours.step(batch), **{peer: sides[peer][kind] for peer, kind in best.items()}},
        rounds,
        warm=0,  # all have been called
    )
    both = [a + b for a, b in zip(seconds["open_clip"], seconds["diffusers"], strict=True)]
    rate = matrix_rate(torch.device("cpu"), torch.bfloat16)
    return {
        "ours": [size / s for s in seconds["ours"]],
        "peer": [size / s for s in both],
        "best": [f"{peer}, {kind}" for peer, kind in best.items()],
        "step_seconds": {side: median(s) for side, s in seconds.items()},
        "first_losses": found,
        "parameters": parameters,
        "gflop": work / 1e9,
        "mfu": work / median(seconds["ours"]) / rate,
        "matrix_gflops": rate / 1e9,
    }


def main() -> None:
    args = arguments("joint training step", rounds=5, batch=64, patch=32, peers="eager,compiled")
    found = compare(args.patch, args.batch, args.rounds, args.peers.split(","))
    ours, peer = found.pop("ours"), found.pop("peer")
    print(f"measured: {found}")
    report(
        f"joint training step, {NAME} and a DiT of width {WIDTH}, depth {DEPTH}, {(SIZE // args.patch) ** 2} patches",
        ours,
        peer,
        unit="samples/s",
        mark=MARK,
        better="higher",
        packages=("open_clip_torch", "diffusers", "torch"),
        args=args,
        what="joint step, both objectives",
        against=" + ".join(found["best"]),
        **found,
    )


if __name__ == "__main__":
    main()
