"""Attention on a GPU: the correctness tests there, and only then times against torch's forms and flash-attn.

`python kernels/bench/attention.py [--json] [--problems TEXT]`. Without a GPU it says so and exits 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _sides import Problem, Side, sides
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools" / "bench"))
from _common import circumstances  # noqa: E402

NAME = "attention on a GPU"
TOKENS = 16_384  # in a batch
LIMIT = (
    0.02  # largest difference between two sides, over the largest value: two roundings to bfloat16 and a sum's order
)
PEAKS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "MI300X": 1307}  # dense bf16 TFLOP/s


def problems() -> list[Problem]:
    """The presets' shapes: text of 77 tokens, pictures of 197 to 4,096, and pictures of their own sizes (NaFlex)."""
    found = []
    for tokens in (77, 197, 256, 576, 1024, 4096):
        for width, heads in ((64, 12), (72, 16), (128, 12)):
            lengths = [tokens] * (TOKENS // tokens)
            found.append(Problem(f"{tokens} tokens, {heads} × {width}", lengths, heads, width, causal=tokens == 77))
    draw = random.Random(0)
    for width, heads in ((64, 12), (72, 16)):
        mix = [draw.choice((64, 128, 256, 576, 1024)) - draw.randrange(16) for _ in range(40)]
        captions = [min(77, 3 + int(draw.expovariate(1 / 11))) for _ in range(1024)]
        found.append(Problem(f"NaFlex mix, {heads} × {width}", mix, heads, width))
        found.append(Problem(f"captions, {heads} × {width}", captions, heads, width, causal=True))
    return found


def correct() -> None:
    """Run the kernels' tests on the GPU; leaves with their last lines where they fail: no times of wrong results."""
    environment = {**os.environ, "MM_KERNEL_TESTS_ON": "cuda"}
    environment.pop("TRITON_INTERPRET", None)
    tests = ROOT / "tests" / "kernels" / "interpreted"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(
            f"the kernels' tests fail on this GPU, so nothing is timed:\n{(run.stdout + run.stderr)[-4000:]}"
        )
    print(run.stdout.strip().splitlines()[-1])


def measure(problem: Problem, side: Side, reference: Tensor | None) -> tuple[dict[str, Any], Tensor]:
    """One row, and the result as tokens; raises RuntimeError or ValueError where the side cannot, or differs."""
    from triton.testing import do_bench

    inputs, call, unpack = side.prepare(problem)
    out = call(*inputs)
    gradient = torch.randn_like(out)
    tokens = unpack(out.detach()).clone()
    if reference is not None:
        difference = ((tokens - reference).abs().max() / reference.abs().max()).item()
        if not difference < LIMIT:
            raise ValueError(f"differs from ours by {difference:.2g}")

    def backward() -> None:
        torch.autograd.grad(out, inputs, gradient, retain_graph=True)

    def both() -> None:
        torch.autograd.grad(call(*inputs), inputs, gradient)

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    memory = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward_only = do_bench(lambda: call(*inputs), return_mode="median")
    milliseconds = {
        "forward": forward_only,
        "backward": do_bench(backward, return_mode="median"),
        "both": do_bench(both, return_mode="median"),
    }
    work = {"forward": problem.flop, "backward": 2.5 * problem.flop, "both": 3.5 * problem.flop}
    row = {
        "milliseconds": milliseconds,
        "tflops": {pass_: work[pass_] / milliseconds[pass_] / 1e9 for pass_ in work},
        "memory_mb": memory / 1e6,
    }
    return row, tokens


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The keys that every benchmark has: over the problems, median TFLOP/s of ours and of the best other side."""
    timed = [row for row in rows if "tflops" in row]
    by_problem = {row["problem"]: row["tflops"]["both"] for row in timed if row["side"] == "mm"}
    others = [
        max((row["tflops"]["both"] for row in timed if row["side"] != "mm" and row["problem"] == problem), default=None)
        for problem in by_problem
    ]
    pairs = [(ours, best) for ours, best in zip(by_problem.values(), others, strict=True) if best]
    ours, peer, ratio = (
        (median(a for a, _ in pairs), median(b for _, b in pairs), median(a / b for a, b in pairs))
        if pairs
        else (None, None, None)
    )
    told = {"ours": ours, "peer": peer, "ratio": ratio, "unit": "TFLOP/s", "mark": 1.0, "better": "higher"}
    return {"name": NAME, **told, "rounds": len(pairs)}


def peak() -> float | None:
    """The GPU's matrix rate in TFLOP/s; None where it is not one of those that are listed."""
    name = torch.cuda.get_device_name()
    return next((float(value) for part, value in PEAKS.items() if all(word in name for word in part.split())), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--problems", default="", metavar="TEXT", help="only problems whose name has TEXT in it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        reason = "no GPU here: nothing is timed"
        print(f"{NAME}: {reason}")
        if args.json:
            print(json.dumps(compared([]) | {"skipped": reason} | circumstances(("mm", "torch", "triton"))))
        return

    correct()
    most, rows = peak(), []
    print(f"{torch.cuda.get_device_name()}, peak {most or 'not known'} TFLOP/s, bfloat16")
    heading = ("ms forward", "backward", "both", "TFLOP/s", "backward", "both", "of peak", "MB")
    for problem in (each for each in problems() if args.problems in each.name):
        print(f"\n{problem.name}, {len(problem.lengths)} samples\n{'':18}" + "".join(f"{word:>11}" for word in heading))
        reference = None
        for side in (each for each in sides() if each.suits(problem)):
            told: dict[str, Any] = {"problem": problem.name, "side": side.name}
            try:
                figures, tokens = measure(problem, side, reference)
            except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
                if side.name == "mm":
                    raise
                told["unavailable"] = " ".join(str(error).split())[:160]
                print(f"{side.name:18}{told['unavailable']}")
            else:
                reference = tokens if reference is None else reference
                told |= figures | {"share_of_peak": most and figures["tflops"]["both"] / most}
                numbers = [*figures["milliseconds"].values(), *figures["tflops"].values()]
                share = f"{told['share_of_peak']:11.1%}" if most else f"{'?':>11}"
                print(
                    f"{side.name:18}" + "".join(f"{x:11.3f}" for x in numbers) + share + f"{figures['memory_mb']:11.0f}"
                )
            rows.append(told)
            torch.cuda.empty_cache()
    result = compared(rows) | {"gpu": torch.cuda.get_device_name(), "peak_tflops": most, "rows": rows}
    result |= circumstances(("mm", "torch", "triton"))
    print(f"\n{result['date']}, commit {result['commit']}, {result['versions']}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
