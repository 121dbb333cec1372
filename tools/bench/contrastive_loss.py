"""The contrastive loss of large batches on a CPU, forward and backward: time and extra peak memory against open_clip.

Times of both alternate in one process, but for one round in fresh ones, which the memory is of: less what they had
before. The gradients of the first round must agree. `--quick 1` measures the larger size only.
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _common import arguments, report
from torch import Tensor

TIME, MEMORY = 1 / 0.6, 10.0  # how much faster and smaller ours is to be
LEAST = 4096  # pairs; half as many are measured too, but for --quick 1
SCALE = 14.3  # 1 / 0.07, where CLIP starts


def batch(pairs: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    image = F.normalize(torch.randn(pairs, width), dim=-1)
    text = F.normalize(image + torch.randn(pairs, width) * 2 / width**0.5, dim=-1)
    return [x.requires_grad_() for x in (image, text, torch.tensor([SCALE]))]


def losses() -> dict[str, Callable[..., Tensor]]:
    from open_clip.loss import ClipLoss

    from mm_kernels import contrastive_loss

    return {"ours": contrastive_loss, "open_clip": ClipLoss()}


def step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*inputs), inputs)


def seconds_of(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak() -> int:
    """Bytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def measure_memory(side: str, pairs: int, width: int) -> None:
    """Print the bytes that a step takes beyond what there was before it, and its seconds.

    A small step has loaded the libraries.
    """
    loss = losses()[side]
    step(loss, batch(1280, width))  # above the size up to which ours takes all logits at once
    inputs = batch(pairs, width)
    ballast = torch.ones(max(0, peak() - resident()) // 4)  # a peak of before must not hide a part of the step's
    before, start = resident(), time.perf_counter()
    step(loss, inputs)
    seconds = time.perf_counter() - start
    print(json.dumps({"bytes": peak() - before, "seconds": seconds, "ballast": ballast.numel()}))


def resident() -> int:
    """Bytes that this process has now."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1]) << 10


def memory(side: str, pairs: int, width: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", side, str(pairs), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(pairs: int, width: int, rounds: int) -> dict[str, Any]:
    inputs, sides = batch(pairs, width), losses()
    found: dict[str, tuple[Tensor, ...]] = {}

    def call(side: str) -> None:
        found[side] = step(sides[side], inputs)

    turns = [functools.partial(call, side) for side in sides]
    for loss in sides.values():
        step(loss, batch(1280, width))  # threads and code are there; a whole step more would take long and tell nothing
    first = [seconds_of(turn) for turn in turns]
    pairs_of = zip(found["ours"], found["open_clip"], strict=True)
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs_of)
    assert difference < 1e-4, f"the gradients of the two sides differ by {difference}"
    found.clear()
    fresh = [memory(side, pairs, width) for side in sides]
    seconds = [[once, one["seconds"]] for once, one in zip(first, fresh, strict=True)]
    for _ in range(rounds - 2):
        for index, turn in enumerate(turns):
            seconds[index].append(seconds_of(turn))
    extra = [one["bytes"] for one in fresh]
    return {
        "pairs": pairs,
        "seconds": seconds,
        "time_ratio": median(seconds[0]) / median(seconds[1]),
        "extra_bytes": extra,
        "memory_ratio": extra[0] / extra[1],
        "largest_difference": difference,
    }


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure_memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    args = arguments("the contrastive loss of a large batch", pairs=16384, width=512, rounds=5, quick=0)
    if args.pairs < LEAST:
        raise SystemExit(f"--pairs {args.pairs}: at least {LEAST:,}; small batches are not cut into tiles")
    sizes = (args.pairs,) if args.quick else (args.pairs // 2, args.pairs)
    found = [compare(pairs, args.width, args.rounds) for pairs in sizes]
    for row in found:
        mega = [round(extra / 1e6) for extra in row["extra_bytes"]]
        print(
            f"N = {row['pairs']}: time {row['time_ratio']:.2f} of open_clip's (mark 0.6), "
            f"extra memory {mega[0]} MB, {row['memory_ratio']:.3f} of its {mega[1]} MB (mark 0.1)"
        )
    largest = found[-1]
    report(
        f"contrastive loss, {largest['pairs']} pairs, width {args.width}, forward and backward, CPU",
        *largest["seconds"],
        unit="s",
        mark=TIME,
        better="lower",
        packages=("mm", "torch", "open_clip_torch"),
        args=args,
        what=f"contrastive loss of {largest['pairs']:,} pairs, width {args.width}: time",
        against="open_clip's ClipLoss, float32, eager",
        memory_mark=MEMORY,
        sizes=found,
        threads=torch.get_num_threads(),
    )
    report(
        f"contrastive loss, {largest['pairs']} pairs, width {args.width}, extra peak memory, CPU",
        *([extra / 1e6] for extra in largest["extra_bytes"]),
        unit="MB",
        mark=MEMORY,
        better="lower",
        packages=("mm", "torch", "open_clip_torch"),
        args=args,
        what=f"contrastive loss of {largest['pairs']:,} pairs, width {args.width}: peak memory",
        against="open_clip's ClipLoss, float32, eager",
    )


if __name__ == "__main__":
    main()
