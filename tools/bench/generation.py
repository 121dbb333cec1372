"""How fast pictures are drawn, against diffusers: the same work, and the same quality.

    python tools/bench/generation.py --json [--run runs/demo]

About 5 minutes on two cores, once there is a trained model: without --run, runs/demo is taken, or a demo trained for
2 minutes, once, into the cache.

Same work: a joint-attention denoiser of DiT-B's size on 256 image tokens and 17 of text, random weights, guidance at
every step, bf16. The peer is diffusers' StableDiffusion3Pipeline with its own transformer (MMDiT) of that size, eager
and compiled block by block. mm's block has SwiGLU where theirs has GELU, of equal weights, and rotary positions; the
same text encoder is in both times. Checked first: both samplers make one picture of one stand-in for
the network, FLOPs are equal within 1 %, what mm draws with lies as close to float32 as autocast does, and each of
eight pictures is bitwise the one that is drawn alone. Figures are of 20 steps, of which 6 are timed at batch 1 and
2 at batch 8: what mm makes once for up to 16 steps is then made for those, which makes it look slower.

Same quality: a trained model against its own export, which diffusers loads as a pipeline, on 256 held-out captions.
The pipeline takes its default of 25 Euler steps with guidance at all of them; mm takes fewer second-order steps with
guidance at some (chosen on training captions). The score is 100 times the cosine of picture and caption by the model's
own encoders.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import ROOT, cache_folder, report, rounds_of
from _generation import GUIDANCE, WORDS, Peer, big_model, closeness, flops, noise, same_sampler
from torch import Tensor

import mm
from mm.api import LoadedModel
from mm.data.shards import expand
from mm.evaluation.inference import Inference
from mm.evaluation.samples import evenly, read_samples
from mm.training.metrics import matrix_rate

PACKAGES = ("torch", "diffusers")
STEPS = 20
TIMED_STEPS = {1: 6, 8: 2}  # by batch
MARKS = {"eager": 1.15, "compiled": 1.05}
QUALITY_MARK = 1.8
FAST: dict[str, Any] = {"steps": 10, "guidance": 2.5, "solver": "dpmpp_2m", "interval": (0.05, 0.95)}
PLAIN_STEPS = 25
TIMED = 32  # captions drawn in each timed round; the score is of all


def main() -> None:
    parser = argparse.ArgumentParser(description="images a second, against diffusers: same work, and same quality")
    parser.add_argument("--json", action="store_true", help="print a JSON object a comparison")
    parser.add_argument(
        "--run", help="a trained run with its shards (default: runs/demo, or a demo trained once for 2 minutes)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--prompts", type=int, default=256, help="held-out captions to score on (default: 256)")
    args = parser.parse_args()
    same_work(args)
    same_quality(args)


def same_work(args: argparse.Namespace) -> None:
    inference = big_model().inference
    inference.bf16 = inference.compiled = True
    peers = {"eager": Peer(inference), "compiled": Peer(inference)}
    peers["compiled"].compile()
    checked = check(inference, peers["eager"])
    for batch, steps in TIMED_STEPS.items():
        prompts = WORDS[:batch]

        def ours(prompts: list[str] = prompts, steps: int = steps) -> Tensor:
            return inference.generate(prompts, steps=steps, guidance=GUIDANCE)

        def theirs(peer: Peer, prompts: list[str] = prompts, steps: int = steps) -> Tensor:
            return peer.draw(prompts, noise(len(prompts)), steps)

        sides = {"ours": ours, **{name: lambda peer=peer: theirs(peer) for name, peer in peers.items()}}
        rates = [matrix_rate(torch.device("cpu"), torch.bfloat16)]
        seconds = rounds_of(sides, args.rounds)
        rates.append(matrix_rate(torch.device("cpu"), torch.bfloat16))
        work = {"ours": checked["flops"][0], **dict.fromkeys(peers, checked["flops"][1])}
        share = {
            name: batch * steps * work[name] / median(times) / max(rates) for name, times in seconds.items()
        }  # of the rate of a large product
        for name in peers:
            report(
                f"drawing, DiT-B, batch {batch}, against diffusers {name}",
                [batch * steps / STEPS / time for time in seconds["ours"]],
                [batch * steps / STEPS / time for time in seconds[name]],
                unit=f"images/s of {STEPS} steps with guidance",
                mark=MARKS[name],
                better="higher",
                packages=PACKAGES,
                args=args,
                what=f"drawing with a DiT-B-sized denoiser, batch {batch}, against {name}",
                against=f"diffusers StableDiffusion3Pipeline, its transformer of that size, bf16, {name}",
                steps_timed=steps,
                share_of_matrix_rate=share,
                matrix_rate=max(rates),
                **checked,
            )


def check(inference: Inference, peer: Peer) -> dict[str, Any]:
    """Raises RuntimeError where the two sides do not do the same."""
    apart = same_sampler(peer, STEPS)
    ours, theirs = flops(peer)
    near = closeness(inference)
    together = inference.generate(WORDS, steps=1, guidance=GUIDANCE)
    alone = [inference.generate([word], seeds=[seed], steps=1, guidance=GUIDANCE) for seed, word in enumerate(WORDS)]
    unequal = sum(not torch.equal(one[0], other) for one, other in zip(alone, together, strict=True))
    found = {
        "sampler_difference": apart,
        "flops": [ours, theirs],
        "error_against_fp32": near,
        "unequal_in_a_batch": unequal,
    }
    if apart > 1e-4 or abs(ours / theirs - 1) > 0.01 or near["prepared"] > 1.2 * near["autocast"] or unequal:
        raise RuntimeError(f"the two sides do not do the same work: {found}")
    print(
        f"same sampler (apart by {apart:.1e}); {ours / 1e9:.1f} and {theirs / 1e9:.1f} GFLOP a guided evaluation; error"
        f" against float32 {near['prepared']:.4f}, of autocast {near['autocast']:.4f}; alike alone and in a batch",
        flush=True,
    )
    return found


def same_quality(args: argparse.Namespace) -> None:
    from diffusers import DiffusionPipeline

    from mm.interop.diffusers import export

    run = Path(args.run) if args.run else trained()
    model = mm.load(str(run))
    prompts = held_out(model, run, args.prompts)
    inference = model.inference
    inference.bf16 = inference.compiled = True
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder, "out"), check=False)
        eager, compiled = (
            DiffusionPipeline.from_pretrained(str(Path(folder, "out")), trust_remote_code=True, dtype=torch.bfloat16)
            for _ in range(2)
        )
        for block in compiled.transformer.denoiser.blocks:
            block.compile(dynamic=False)

        def theirs(pipe: Any, count: int) -> Tensor:
            pipe.set_progress_bar_config(disable=True)
            drawn: Tensor = pipe(
                prompts[:count], num_inference_steps=PLAIN_STEPS, seeds=range(count), output_type="pt"
            ).images
            return (drawn * 255).round().to(torch.uint8)

        some = min(TIMED, len(prompts))
        sides = {
            "ours": lambda: inference.generate(prompts[:some], **FAST),
            "eager": lambda: theirs(eager, some),
            "compiled": lambda: theirs(compiled, some),
        }
        seconds = rounds_of(sides, args.rounds)
        texts = inference.encode("text", prompts)
        best = min(("eager", "compiled"), key=lambda name: median(seconds[name]))
        ours = score(inference, inference.generate(prompts, **FAST), texts)
        peer = score(inference, theirs(compiled if best == "compiled" else eager, len(prompts)), texts)
    difference, error = (ours - peer).mean().item(), ((ours - peer).std() / math.sqrt(len(prompts))).item()
    verdict = "no worse" if difference >= -error else "WORSE"
    print(f"score {ours.mean():.2f} against {peer.mean():.2f}: {difference:+.2f} ± {error:.2f}, {verdict}")
    report(
        "drawing at equal quality",
        [some / time for time in seconds["ours"]],
        [some / time for time in seconds[best]],
        unit="images/s",
        mark=QUALITY_MARK if difference >= -error else math.inf,  # speed at a lower score meets no mark
        better="higher",
        packages=PACKAGES,
        args=args,
        what="drawing at equal quality: fewer second-order steps, guidance at some",
        against=f"diffusers pipeline of the same weights, {PLAIN_STEPS} Euler steps with guidance, bf16, {best}",
        score={"ours": ours.mean().item(), "peer": peer.mean().item(), "difference": difference, "error": error},
        prompts=len(prompts),
        settings={key: list(value) if isinstance(value, tuple) else value for key, value in FAST.items()},
        seconds={name: median(times) for name, times in seconds.items()},
    )


def trained() -> Path:
    """What `make demo` left in this clone; else the demo, trained for 2 minutes, in the cache."""
    run = Path(ROOT, "runs", "demo")
    if (run / "grid.png").is_file():
        return run
    run = cache_folder("bench", "generation-demo")
    if not (run / "grid.png").is_file():
        print(f"training a model to draw with, once: {run}", flush=True)
        command = [sys.executable, "-m", "mm.cli", "demo", "--minutes", "2", "--out", str(run)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return run


def held_out(model: LoadedModel, run: Path, count: int) -> list[str]:
    """Captions of val, and of dev where these are too few."""
    files = [name for split in ("val", "dev") for name in expand(str(run / "shards" / f"{split}-*.tar"))]
    captions = read_samples(files, model.inference.processor("image")).captions
    return [captions[place] for place in evenly(list(range(len(captions))), count)]


def score(inference: Inference, pixels: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of each of `[N, 3, H, W]` with its own caption."""
    return 100 * (inference.embed("image", (pixels,)) * texts).sum(1)


if __name__ == "__main__":
    main()
