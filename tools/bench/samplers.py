"""What the solvers cost and give, with a trained model: how they converge, how good few steps are, and whether a
picture is the same alone and in a batch.

    python tools/bench/samplers.py --run runs/demo --json

About 5 minutes on two cores with the demo model. Prompts are held-out captions (RUN/shards/val-*.tar, or --data).
Levels are of 255. At equal network evaluations, Heun at half of Euler's steps is compared picture by picture: 100 times
the cosine of picture and prompt by the model's own encoders, and the share of pictures whose own prompt is the nearest
of all.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from _common import circumstances
from torch import Tensor

import mm
from mm.data.shards import expand
from mm.diffusion.sampler import SOLVERS
from mm.evaluation.inference import Inference
from mm.evaluation.retrieval import ranks
from mm.evaluation.samples import evenly, read_samples

TOLERANCE = 0.5  # levels: mean difference of any two solvers at the most steps
PAIRS = (("euler", 25), ("heun", 13), ("dpmpp_2m", 25))  # 25 network evaluations each: Heun takes 2 n - 1
BATCH = 16


def converge(inference: Inference, prompts: list[str], steps: list[int], guidance: float) -> dict[str, Any]:
    """Mean and largest difference from Heun at the most steps, of each solver at each number of steps."""

    def draw(solver: str, count: int) -> Tensor:
        found = inference.generate(prompts, steps=count, guidance=guidance, solver=solver)  # type: ignore[arg-type]
        return found.float()

    most = steps[-1]
    last = {solver: draw(solver, most) for solver in SOLVERS}
    table: dict[str, Any] = {}
    for solver in SOLVERS:
        for count in steps:
            apart = ((last[solver] if count == most else draw(solver, count)) - last["heun"]).abs()
            table[f"{solver} {count}"] = {"mean": apart.mean().item(), "max": apart.max().item()}
    between = [
        (last[a] - last[b]).abs() for place, a in enumerate(SOLVERS) for b in SOLVERS[place + 1 :]
    ]  # any two of them
    widest = {"mean": max(x.mean().item() for x in between), "max": max(x.max().item() for x in between)}
    widest["share of values over 5 levels"] = max((x > 5).float().mean().item() for x in between)
    return {"from heun": table, "any two at the most steps": widest}


def score(inference: Inference, prompts: list[str], texts: Tensor, solver: str, steps: int) -> tuple[Tensor, Tensor]:
    """Per picture: 100 times its cosine with its prompt, and 1.0 where that prompt is the nearest."""
    pixels = inference.generate(prompts, steps=steps, solver=solver)  # type: ignore[arg-type]
    images = inference.embed("image", (pixels,))
    return 100 * (images * texts).sum(1), (ranks(images, texts) < 1).float()


def paired(one: Tensor, other: Tensor) -> dict[str, float]:
    """one - other: its mean and the standard error of that."""
    difference = one - other
    return {"difference": difference.mean().item(), "error": difference.std().item() / math.sqrt(len(difference))}


def quality(inference: Inference, prompts: list[str]) -> dict[str, Any]:
    texts = inference.encode("text", prompts)
    found: dict[str, Any] = {}
    base: tuple[Tensor, Tensor] | None = None
    for solver, steps in PAIRS:
        start = time.perf_counter()
        cosine, right = score(inference, prompts, texts, solver, steps)
        row: dict[str, Any] = {"score": cosine.mean().item(), "accuracy": right.mean().item()}
        row["seconds"] = round(time.perf_counter() - start, 1)
        if base is None:
            base = cosine, right
        else:
            row |= {"score against euler": paired(cosine, base[0]), "accuracy against euler": paired(right, base[1])}
        found[f"{solver} {steps}"] = row
    return found


def unequal(inference: Inference, prompts: list[str]) -> dict[str, int]:
    """Of each solver: pictures that differ in a bit when drawn alone, or in another order, of a batch."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    seeds, count = [1000 + place for place in range(len(prompts))], {}
    for solver in SOLVERS:
        options: dict[str, Any] = {"steps": 8, "guidance": 3.0, "solver": solver, "interval": (0.1, 0.9)}
        together = inference.generate(prompts, seeds=seeds, **options)
        turned = inference.generate([prompts[i] for i in order], seeds=[seeds[i] for i in order], **options)
        alone = [
            inference.generate([prompt], seeds=[seed], **options)[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        count[solver] = sum(not torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        count[solver] += sum(not torch.equal(turned[place], together[i]) for place, i in enumerate(order))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="solvers: convergence, quality at equal cost, batch invariance")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--run", default="runs/demo", help="a trained run (default: runs/demo)")
    parser.add_argument("--data", help="shards with held-out captions (default: RUN/shards/val-*.tar)")
    parser.add_argument("--prompts", type=int, default=213, help="captions to score on (default: 213)")
    parser.add_argument("--few", type=int, default=8, help="of them to converge on (default: 8, a micro-batch)")
    parser.add_argument("--most", type=int, default=400, help="steps to converge at (default: 400)")
    args = parser.parse_args()
    inference = mm.load(args.run).inference
    inference.bf16 = False
    files = expand(args.data or str(Path(args.run, "shards", "val-*.tar")))
    captions = read_samples(files, inference.processor("image")).captions
    prompts = [captions[place] for place in evenly(list(range(len(captions))), args.prompts)]

    def some(count: int) -> list[str]:
        return [prompts[place] for place in evenly(list(range(len(prompts))), count)]

    found = unequal(inference, some(BATCH))
    print("pictures that differ alone or in another order:", ", ".join(f"{k} {v}" for k, v in found.items()))
    good = quality(inference, prompts)
    for name, row in good.items():
        against = row.get("score against euler")
        more = f", {against['difference']:+.2f} ± {against['error']:.2f} against euler" if against else ""
        print(f"{name}: score {row['score']:.2f}{more}, accuracy {row['accuracy']:.3f}, {row['seconds']} s")
    steps = [args.most // part for part in (16, 8, 4, 2, 1)]
    converged = {}
    for guidance in (1.0, 3.0):
        converged[f"guidance {guidance:g}"] = table = converge(inference, some(args.few), steps, guidance)
        for name, row in table["from heun"].items():
            print(f"guidance {guidance:g}, {name}: mean {row['mean']:.3f}, max {row['max']:.0f} levels from heun")
    widest = max(table["any two at the most steps"]["mean"] for table in converged.values())
    worse = -good["heun 13"]["score against euler"]["difference"]
    print(
        f"any two solvers at {args.most} steps: mean {widest:.3f} levels apart (tolerance {TOLERANCE}); "
        f"Heun scores {-worse:+.2f} against Euler at equal cost"
    )
    result = {
        "name": "solvers of the sampler",
        "ours": widest,
        "peer": TOLERANCE,
        "ratio": TOLERANCE / widest,
        "unit": f"levels of 255 between any two at {args.most} steps, mean",
        "mark": 1.0,
        "better": "lower",
        "rounds": 1,
        "prompts": len(prompts),
        "prompts_to_converge_on": args.few,
        "converged": converged,
        "at_25_evaluations": good,
        "unequal_pictures": found,
        **circumstances(("mm", "torch")),
    }
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
