"""FID, KID, precision and recall of mm against torch-fidelity and torchmetrics, on the same features.

    python tools/bench/generation_metrics.py --json

Features are drawn here, in several shapes: more features than pictures, unequal numbers, unit norm, heavy tails, and
sets that are equal in part. The peers get them in double precision and do the rest themselves. `ours` and `peer` are
the largest relative difference of any number, and the mark of 1e-3; about half a minute on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import ROOT, arguments, circumstances, peer_python

MARK = 1e-3  # largest relative difference
PEERS = ("torch-fidelity==0.4.0", "torchmetrics==1.9.0")
SHAPES = {  # real, drawn, width
    "wide": (300, 300, 512),
    "narrow": (2000, 2000, 64),
    "unequal": (1500, 400, 128),
    "unit_norm": (600, 500, 96),
    "heavy_tails": (700, 900, 48),
    "half_equal": (500, 500, 32),
}
SUBSETS, SIZE = 20, 200  # of KID
MANIFOLDS = ("precision", "recall")


def features(name: str, seed: int) -> tuple[Any, Any]:
    """Real and drawn float64 features of one shape."""
    import numpy as np

    count, drawn, width = SHAPES[name]
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) / width**0.5
    real, made = rng.normal(size=(count, width)) @ mix, 0.8 * rng.normal(size=(drawn, width)) @ mix + 0.1
    if name == "unit_norm":
        real, made = (x / np.linalg.norm(x, axis=1, keepdims=True) * width**0.5 for x in (real, made))
    if name == "heavy_tails":
        real, made = (x * rng.standard_t(4, size=(len(x), 1)) for x in (real, made))
    if name == "half_equal":
        made[: drawn // 2] = real[: drawn // 2]
    return real, made


def ours(real: Any, drawn: Any) -> dict[str, float]:
    import torch

    from mm.evaluation.fidelity import frechet, kid, kid_subsets, manifolds

    a, b = torch.from_numpy(real), torch.from_numpy(drawn)
    subsets = kid_subsets(b, a, SIZE, SUBSETS)
    found = {"fid": frechet(b, a), "kid_mean": float(subsets.mean()), "kid_std": float(subsets.std())}
    least = min(len(a), len(b))
    found["kid_all"] = kid(b[:least], a[:least]).value
    return found | {key: metric.value for key, metric in manifolds(b, a).metrics().items() if key in MANIFOLDS}


THEIRS = """
import json, sys
import numpy as np, torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from importlib.metadata import version

class Same(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.num_features = width
    def forward(self, x):
        return x.flatten(1)

found, subsets, size = {}, int(sys.argv[2]), int(sys.argv[3])
for name, path in json.loads(sys.argv[1]).items():
    with np.load(path, allow_pickle=False) as file:
        real, drawn = torch.from_numpy(file["real"]), torch.from_numpy(file["drawn"])
    fid = fid_statistics_to_metric(fid_features_to_statistics(drawn), fid_features_to_statistics(real), False)
    kid = kid_features_to_metric(drawn, real, kid_subsets=subsets, kid_subset_size=size, rng_seed=2020, verbose=False)
    prc = prc_features_to_metric(drawn, real, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False,
                                 verbose=False)
    least = min(len(real), len(drawn))
    found[name] = {
        "torch-fidelity": {
            "fid": fid["frechet_inception_distance"],
            "kid_mean": kid["kernel_inception_distance_mean"], "kid_std": kid["kernel_inception_distance_std"],
            "precision": prc["precision"], "recall": prc["recall"],
        },
        "torchmetrics": {},
    }
    same = Same(real.shape[1])
    for key, metric, rows in (
        ("fid", FrechetInceptionDistance(feature=same), None),
        ("kid_all", KernelInceptionDistance(feature=same, subsets=1, subset_size=least), least),
    ):
        metric.update(real[:rows], real=True)
        metric.update(drawn[:rows], real=False)
        value = metric.compute()
        found[name]["torchmetrics"][key] = float(value[0] if isinstance(value, tuple) else value)
print(json.dumps({"found": found, "versions": {k: version(k) for k in ("torch-fidelity", "torchmetrics")}}))
"""


def main() -> None:
    args = arguments(__doc__.split("\n")[0], seed=0)
    sys.path.insert(0, ROOT)
    import numpy as np

    peer = peer_python("generation-metrics", *PEERS)
    mine, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SHAPES:
            real, drawn = features(name, args.seed)
            mine[name] = ours(real, drawn)
            files[name] = str(Path(folder, f"{name}.npz"))
            np.savez(files[name], real=real, drawn=drawn)
        command = [peer, "-c", THEIRS, json.dumps(files), str(SUBSETS), str(SIZE)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    if run.returncode:
        raise RuntimeError(" ".join(run.stderr.split())[-600:])
    answer = json.loads(run.stdout.strip().split("\n")[-1])
    rows: list[dict[str, Any]] = []
    for name, peers in answer["found"].items():
        for library, numbers in peers.items():
            for metric, theirs in numbers.items():
                value = mine[name][metric]
                apart = abs(value - theirs) / max(abs(theirs), 1e-12) if value != theirs else 0.0
                row = {"shape": name, "metric": metric, "library": library, "ours": value, "theirs": theirs}
                rows.append(row | {"difference": apart})
                print(f"{name:12} {metric:10} {library:15} {value:14.8g} {theirs:14.8g}  {apart:.1e}")
    worst = max(row["difference"] for row in rows)
    print(f"generation metrics: at most {worst:.1e} apart, mark {MARK:g}")
    if args.json:
        about = circumstances(("torch", "numpy"))
        about["versions"] |= answer["versions"]
        result = {"name": "generation_metrics", "ours": worst, "peer": MARK, "ratio": MARK / max(worst, 1e-16)}
        result |= {"unit": "relative difference", "mark": 1.0, "better": "lower", "rounds": 1}
        print(json.dumps({**result, **about, "cases": rows}))
    if worst > MARK:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
