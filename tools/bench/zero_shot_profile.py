"""Where the time of classifying pictures in memory goes, on either side of `zero_shot.py`: written to benchmarks/.

FLOPs of an image by torch's counter, seconds of each side in alternation, the rate of both and of a large bf16 matrix
product of the machine, and by torch's profiler the share of a side's time in matrix products, attention and the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _clip import NAME, clip_weights
from _common import ROOT, arguments, circumstances, rounds_of
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from zero_shot import PACKAGES, Peer

import mm
from mm.training.metrics import matrix_rate

OUT = Path(ROOT) / "benchmarks" / "zero_shot_profile.json"
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mm::packed_linear", "mkldnn::", "aten::mkldnn"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product", "aten::_softmax"),
}


def shares(side: Callable[[], object]) -> dict[str, Any]:
    """Of the operators' own time: by kind, and the ten that take most."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        side()
    own = {event.key: event.self_cpu_time_total for event in run.key_averages()}
    total = sum(own.values())
    found: dict[str, float] = {
        kind: sum(time for key, time in own.items() if key.startswith(names)) / total for kind, names in KINDS.items()
    }
    most = sorted(own, key=lambda key: -own[key])[:10]
    return {**found, "rest": 1 - sum(found.values()), "operators": {key: round(own[key] / total, 4) for key in most}}


def main() -> None:
    args = arguments("profile of zero-shot images a second", images=64, rounds=5)
    model = mm.load(f"open_clip:{NAME}@{clip_weights()}", device="cpu")
    pixels = torch.randint(0, 256, (args.images, 3, 224, 224), dtype=torch.uint8)
    floats = (pixels / 255 - 0.5) / 0.25
    peer = Peer("bf16 weights")
    weights = torch.nn.functional.normalize(torch.randn(model.config.model.embed_dim, 100), dim=0)
    sides: dict[str, Callable[[], object]] = {
        "mm": lambda: model.inference.embed("image", (pixels,)),
        "open_clip, bf16 weights, eager": lambda: peer.probabilities(floats, weights),
    }
    with FlopCounterMode(display=False) as counter:  # of mm in float32: the counter knows none of what is faster
        model.inference.embed("image", (pixels,))
    flops = counter.get_total_flops() / args.images
    model.inference.bf16 = True
    rate = matrix_rate(torch.device("cpu"), torch.bfloat16)
    seconds = {name: median(times) for name, times in rounds_of(sides, args.rounds).items()}
    found = {
        "name": "where the time of zero-shot images goes",
        "gflop_an_image": flops / 1e9,
        "matrix_gflops": rate / 1e9,
        "images_per_second": {name: args.images / took for name, took in seconds.items()},
        "share_of_matrix_rate": {name: flops * args.images / took / rate for name, took in seconds.items()},
        "at_most_times_the_peer": rate / flops / (args.images / seconds["open_clip, bf16 weights, eager"]),
        "shares": {name: shares(side) for name, side in sides.items()},
        **circumstances(PACKAGES),
    }
    print(json.dumps(found, indent=1))
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
