"""What `mm plan` says of a training step's memory, against what the same step takes: the peak of torch's allocator.

Each measurement is a process of its own that builds the step, makes two of them on a CPU, eager, with captions that
fill the context, and reads off the highest sum of what torch's CPU allocator had handed out (torch.profiler), by which
the mark is judged, and the high-water mark of the process (VmHWM) above what it was before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _common import ROOT, arguments, circumstances

MARK = 0.10  # largest difference from the measured peak, as a share of it
CASES = [
    {"precision": "fp32", "activation_checkpointing": "none"},
    {"precision": "bf16", "activation_checkpointing": "none"},
    {"precision": "fp32", "activation_checkpointing": "full"},
]


def config(case: dict[str, str], batch: int, width: int, depth: int) -> Any:
    """Both objectives on 64-px pictures, towers of one width and depth."""
    from mm.config import (
        DataConfig,
        DenoiserConfig,
        ImageConfig,
        ModelConfig,
        ParallelConfig,
        RunConfig,
        TextConfig,
        TrainConfig,
    )

    heads = width // 64
    return TrainConfig(
        run=RunConfig(steps=10),
        data=DataConfig(batch_size=batch),
        model=ModelConfig(
            embed_dim=width,
            image=ImageConfig(size=64, patch=8, width=width, depth=depth, heads=heads),
            text=TextConfig(vocab_size=4096, context_length=32, width=width, depth=depth, heads=heads),
            denoiser=DenoiserConfig(patch=8, width=width, depth=depth, heads=heads, context_depth=depth - 1),
        ),
        parallel=ParallelConfig(device="cpu", compile=False, **case),  # type: ignore[arg-type]
    )


def planned(setting: Any) -> dict[str, int]:
    """Bytes by kind at the planned peak."""
    from mm.plan.simulate import simulate

    return simulate(setting, kernels=False).memory


def measure(setting: Any) -> dict[str, int]:
    """Runs two real steps; bytes of the allocator's peak and of the process' high-water mark above its start."""
    import types

    import torch
    from torch.profiler import ProfilerActivity, profile

    from mm.distributed.device import autocast
    from mm.distributed.parallelize import recompute
    from mm.objectives.step import build_step
    from mm.training.ema import Ema
    from mm.training.optim import Optimizers
    from mm.types import Batch

    torch.manual_seed(0)
    warm = torch.randn(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        vocabulary: Any = types.SimpleNamespace(vocab_size=setting.model.text.vocab_size)
        step = build_step(setting, vocabulary)
        if setting.parallel.activation_checkpointing != "none":
            recompute(step, setting.parallel.activation_checkpointing)
        optimizers, ema = Optimizers(step, setting.optim, setting.run.steps), Ema(step, setting.optim.ema)
        size, side, length = setting.data.batch_size, setting.model.image.size, setting.model.text.context_length
        for number in range(2):
            pictures = {
                name: torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8) for name in ("image", "target")
            }
            words = torch.randint(1, setting.model.text.vocab_size, (size, length))
            batch = Batch(pictures | {"text": words}, {"text": torch.full((size,), length)}, torch.arange(size))
            metrics = step.backward(
                batch, setting.optim.accumulate, lambda: autocast(setting.parallel, torch.device("cpu"))
            )
            del batch, pictures, words
            optimizers.clip()
            optimizers.step(number)
            ema.update(number)
            del metrics
    process = resident("VmHWM") - before
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    total = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return {"allocator": peak, "process": process}


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def in_a_process(arguments: dict[str, Any]) -> dict[str, int]:
    """`measure`, in a fresh interpreter whose malloc gives large blocks back at once."""
    command = [sys.executable, os.path.abspath(__file__), "--measure", json.dumps(arguments)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(config(**json.loads(sys.argv[2])))))
        return
    args: argparse.Namespace = arguments("planned memory", batch=32, width=256, depth=6)
    worst, rows = 0.0, []
    for case in CASES:
        setting = {"case": case, "batch": args.batch, "width": args.width, "depth": args.depth}
        plan, real = planned(config(**setting)), in_a_process(setting)
        ours = sum(plan.values())
        off = ours / real["allocator"] - 1
        worst = max(worst, abs(off))
        rows.append({**case, "planned": plan, "planned_peak": ours, **real, "off": off})
        kinds = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in plan.items() if size)
        print(
            f"{case['precision']}, checkpointing {case['activation_checkpointing']}: planned {ours / 1e6:.1f} MB "
            f"({kinds}); allocator {real['allocator'] / 1e6:.1f} MB ({100 * off:+.1f} %), process "
            f"{real['process'] / 1e6:.1f} MB"
        )
    print(f"furthest off: {100 * worst:.1f} % (mark {100 * MARK:.0f} %)")
    if args.json:
        first = rows[0]
        result = {
            "name": "memory that mm plan says, against the peak of torch's CPU allocator",
            "ours": first["planned_peak"],
            "peer": first["allocator"],
            "ratio": 1 + worst,
            "unit": "bytes",
            "mark": 1 + MARK,
            "better": "lower",
            "rounds": 1,
            "cases": rows,
        }
        print(json.dumps(result | circumstances(("mm", "torch"))))


if __name__ == "__main__":
    main()
