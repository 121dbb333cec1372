"""Does it help to ask the generator? Held-out emoji classified by contrast, by drawing, and by both.

    mm demo --out runs/demo && python tools/bench/hybrid.py --run runs/demo --json

The weights of the fusion are fitted on the dev split, everything else is counted on val, the same images on both sides.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _common import report
from torch import Tensor

import mm
from mm.evaluation.by_drawing import ByDrawing, classifier
from mm.evaluation.fusion import fit
from mm.evaluation.inference import Inference
from mm.evaluation.job import BATCH, Job
from mm.evaluation.samples import around
from mm.evaluation.zero_shot import Classifier

SETS = ("held-out names", "all names")
MARK = 1.0


def main() -> None:
    args = _arguments()
    model = mm.load(args.run)
    inference = model.inference
    inference.bf16 = True  # as `mm evaluate` does
    splits = {name: _Split(inference, args.run, name, args.limit) for name in ("dev", "val")}
    budgets = [int(number) for number in args.budgets.split(",")]
    middle, most = sorted(budgets)[len(budgets) // 2], max(budgets)
    found: dict[str, Any] = {}
    for names in SETS:
        dev, val = splits["dev"], splits["val"]
        base = model.classifier(dev.labels(names))
        judge = classifier(base, inference, mode="hybrid", k=args.k, levels=middle, progress=True)
        places, prior, scores = judge.opinions(dev.images)
        own = places == _truth(judge, dev)[:, None]
        told = own.any(1)
        fitted = fit(prior[told], scores[told], own[told].int().argmax(1))
        print(f"\n{names}, dev, {middle} levels: {fitted}")
        base = model.classifier(val.labels(names))
        truth = torch.tensor([base.labels.index(caption) for caption in val.captions])
        plain = _contrastive(base, inference, val.images) == truth
        rows: dict[str, Any] = {"contrastive": _share(plain), "candidates": 0.0}
        print(
            f"{names}, val: {len(base.labels)} labels, {len(truth)} pictures; contrastive {100 * _share(plain):.1f} %"
        )
        for levels in budgets:
            started = time.perf_counter()
            judge = classifier(base, inference, mode="hybrid", k=args.k, levels=levels, progress=True)
            places, prior, scores = judge.opinions(val.images)
            seconds = (time.perf_counter() - started) / len(truth)
            rows["candidates"] = _share((places == truth[:, None]).any(1))
            for title, alpha, beta in (
                ("fitted", fitted.alpha, fitted.beta),
                ("default", judge.options.alpha, judge.options.beta),
                ("drawing alone", 0.0, 1.0),
            ):
                best = (alpha * prior + beta * scores).argmax(1, keepdim=True)
                rows[f"{title}, {levels}"] = _paired(places.gather(1, best)[:, 0] == truth, plain) | {
                    "alpha": alpha,
                    "beta": beta,
                    "forwards": levels * places.shape[1],
                    "seconds_an_image": round(seconds, 3),
                }
        found[names] = rows | {"dev": asdict(fitted)}
        _print(rows)
    found["diffusion, held-out names"] = _diffusion(inference, splits["val"], args)
    rows = found[SETS[0]]
    report(
        f"top-1 of held-out emoji among their names: hybrid, {most} levels of {args.k} candidates, against contrastive",
        [rows[f"fitted, {most}"]["top1"]],
        [rows["contrastive"]],
        unit="share of pictures",
        mark=MARK,
        better="higher",
        packages=("mm", "torch"),
        args=args,
        pictures=len(splits["val"].captions),
        tables=found,
    )


class _Split:
    """Pictures and captions of a split, and the names that they are told from."""

    def __init__(self, inference: Inference, run: str, name: str, limit: int) -> None:
        held_out, reference = around(str(Path(run) / "shards" / f"{name}-*.tar"), None)
        self.job = Job(inference, files=held_out, reference=reference, progress=True)
        places = self.job.held_out[: limit or None]
        self.images, self.captions = self.job.samples.images[places], self.job.captions(places)

    def labels(self, names: str) -> list[str]:
        job = self.job
        others = [*job.captions(job.candidates), *job.left_out] if names == "all names" else []
        return list(dict.fromkeys([*job.captions(job.held_out), *others]))


def _truth(judge: ByDrawing, split: _Split) -> Tensor:
    return torch.tensor([judge.labels.index(caption) for caption in split.captions])


def _contrastive(base: Classifier, inference: Inference, images: Tensor) -> Tensor:
    return base.probabilities(inference.embed("image", (images,), micro_batch=BATCH["image"])).argmax(1)


def _diffusion(inference: Inference, split: _Split, args: argparse.Namespace) -> dict[str, Any]:
    """The denoiser by itself among all held-out names; labels are dropped in four rounds."""
    labels = split.labels(SETS[0])
    started = time.perf_counter()
    judge = classifier(None, inference, mode="diffusion", labels=labels, levels=args.levels, progress=True)
    right = judge.scores_of_images(split.images).argmax(1) == _truth(judge, split)
    seconds = (time.perf_counter() - started) / len(right)
    print(f"\ndiffusion alone among {len(labels)} held-out names, {args.levels} levels: {100 * _share(right):.1f} %")
    return {"top1": _share(right), "levels": args.levels, "seconds_an_image": round(seconds, 3)}


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _paired(ours: Tensor, peer: Tensor) -> dict[str, Any]:
    """Top-1, its difference with the standard error of paired outcomes, and McNemar's exact p."""
    won, lost = int((ours & ~peer).sum()), int((~ours & peer).sum())
    n, gain = len(ours), (won - lost) / len(ours)
    return {
        "top1": _share(ours),
        "gain": gain,
        "error": math.sqrt(max(0.0, (won + lost) / n - gain**2) / n),
        "won": won,
        "lost": lost,
        "p": mcnemar(won, lost),
    }


def mcnemar(won: int, lost: int) -> float:
    """Two-sided exact p of so many pairs that differ one way and the other, were both ways as likely."""
    n = won + lost
    tail = sum(math.comb(n, at) for at in range(min(won, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _print(rows: dict[str, Any]) -> None:
    print(f"right label among the candidates {100 * rows['candidates']:.1f} %")
    print(f"{'weights, levels':<20} {'top-1':>7} {'gain':>7} {'±':>5} {'won':>4} {'lost':>4} {'p':>5} {'s/image':>8}")
    for title, row in rows.items():
        if isinstance(row, dict):
            print(
                f"{title:<20} {100 * row['top1']:6.1f} % {100 * row['gain']:+6.1f} {100 * row['error']:5.1f} "
                f"{row['won']:4} {row['lost']:4} {row['p']:5.2f} {row['seconds_an_image']:8.3f}"
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="runs/demo", help="a run folder with shards/ in it (default: runs/demo)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--k", type=int, default=10, help="candidates an image (default: 10)")
    parser.add_argument("--budgets", default="4,16,64", help="noise levels a candidate (default: 4,16,64)")
    parser.add_argument("--levels", type=int, default=16, help="of diffusion alone (default: 16)")
    parser.add_argument("--limit", type=int, default=0, help="pictures of each split (default: 0, all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
