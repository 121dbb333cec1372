"""Two sets of pictures compared by their features: how near the drawn ones are to the real ones, and how various.

Letters: n drawn, N real, D features. Features are `[n, D]` and `[N, D]` of any float type; everything is computed in
float64, and never more than a block of the n x N distances or kernels is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.evaluation.outcome import Metric

BLOCK = 1024  # rows of a distance or kernel matrix at once
NEIGHBOURS = 3  # k of the manifolds, as the paper and torch-fidelity take it
RESAMPLES, WIDEST = 50, 1024  # how often FID is resampled for its error, where features are at most so wide
SUBSET = 1000  # rows of KID's subsets, as is usual; half of what there is where that is less
PEER_SEED = 2020  # torch-fidelity's: the same subsets are drawn
_SAME = 1e-12  # squared distance, relative to the squared lengths: below it two points are one


def frechet(drawn: Tensor, real: Tensor) -> float:
    """FID: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of the means and covariances (arXiv 1706.08500, equation 6).

    0 for equal sets; biased upwards where n or N is small against D. Raises ValueError for fewer than two rows.
    """
    return frechet_from(real)(drawn)


def frechet_from(real: Tensor) -> Callable[[Tensor], float]:
    """`frechet` to the same real features, whose covariance is taken once."""
    real = _checked("real", real, 2)
    mean, factor = real.mean(0), _factor(real)

    def distance(drawn: Tensor) -> float:
        drawn = _checked("drawn", drawn, 2)
        ours = _factor(drawn)
        # With S = A' A, tr (S1 S2)^(1/2) is the sum of the singular values of A1 A2'. As eigenvalues of S1 S2 they'd
        # be squared, and what rounding leaves of a zero would come out of the square root 10^8 times as large.
        with _one_thread():
            shared = torch.linalg.svdvals(factor @ ours.T).sum()
        spread = factor.square().sum() + ours.square().sum()
        return float((mean - drawn.mean(0)).square().sum() + spread - 2 * shared)

    return distance


def _factor(rows: Tensor) -> Tensor:
    """A `[r, D]` with as few rows as may be, at most D, whose A' A is the covariance of `[n, D]` rows (over n - 1)."""
    centred = (rows - rows.mean(0)) / math.sqrt(len(rows) - 1)
    if len(rows) <= rows.shape[1]:
        return centred
    with _one_thread():
        return torch.linalg.qr(centred, mode="r").R


def kid(drawn: Tensor, real: Tensor) -> Metric:
    """KID: the unbiased squared MMD under the kernel (x.y / D + 1)^3 over all pairs (arXiv 1801.01401, section 4).

    It may be below 0 for sets that are alike. The error is the jackknife's over both sets. Not multiplied by 1,000.
    Raises ValueError for fewer than two rows.
    """
    drawn, real = _checked("drawn", drawn, 2), _checked("real", real, 2)
    n, m = len(drawn), len(real)
    ours, theirs = _row_sums(drawn, drawn, own=False), _row_sums(real, real, own=False)
    to_real, to_drawn = _row_sums(drawn, real), _row_sums(real, drawn)
    across = to_real.sum() / (n * m)
    one, other = ours.sum() / (n * (n - 1)), theirs.sum() / (m * (m - 1))
    value = float(one + other - 2 * across)
    if min(n, m) < 3:
        return Metric(value, math.nan, n)
    without_drawn = (ours.sum() - 2 * ours) / ((n - 1) * (n - 2)) - 2 * (to_real.sum() - to_real) / ((n - 1) * m)
    without_real = (theirs.sum() - 2 * theirs) / ((m - 1) * (m - 2)) - 2 * (to_drawn.sum() - to_drawn) / (n * (m - 1))
    return Metric(value, math.sqrt(_jackknife(without_drawn) + _jackknife(without_real)), n)


def kid_subsets(drawn: Tensor, real: Tensor, size: int, subsets: int = 100, seed: int = PEER_SEED) -> np.ndarray:
    """`[subsets]`: KID of `size` rows of either set, as torch-fidelity draws them: its mean and std are theirs.

    Raises ValueError where a set has fewer than `size` rows, or `size` is below 2.
    """
    drawn, real = _checked("drawn", drawn, size), _checked("real", real, size)
    if size < 2 or subsets < 1:
        raise ValueError(f"kid: {subsets} subsets of {size}; give at least one subset of at least 2")
    rng = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        rows = [torch.from_numpy(rng.choice(len(which), size, replace=False)) for which in (drawn, real)]
        found.append(kid(drawn[rows[0].to(drawn.device)], real[rows[1].to(real.device)]).value)
    return np.asarray(found)


def _row_sums(rows: Tensor, columns: Tensor, own: bool = True) -> Tensor:
    """float64 `[n]`: each row's kernel summed over all columns; without `own`, not with the row itself."""
    width, found = rows.shape[1], []
    for start in range(0, len(rows), BLOCK):
        kernel = (rows[start : start + BLOCK] @ columns.T / width + 1) ** 3
        if not own:
            kernel.diagonal(start).zero_()
        found.append(kernel.sum(1))
    return torch.cat(found)


def _jackknife(values: Tensor) -> float:
    """Variance of a statistic from its values without one row each (Efron and Stein, 1981)."""
    return float((values - values.mean()).square().sum() * (len(values) - 1) / len(values))


@dataclass
class Manifolds:
    """What the balls round real and drawn pictures say, one number a picture; each metric is a mean of them.

    A ball round a picture reaches to its k-th nearest neighbour in its own set.
    """

    precision: np.ndarray  # [n] 1 where a drawing lies in the ball of some real picture (arXiv 1904.06991)
    recall: np.ndarray  # [N] 1 where a real picture lies in the ball of some drawing
    density: np.ndarray  # [n] in how many real balls a drawing lies, over k (arXiv 2002.09797)
    coverage: np.ndarray  # [N] 1 where a drawing lies in a real picture's own ball

    def metrics(self) -> dict[str, Metric]:
        return {name: Metric.mean(values) for name, values in vars(self).items()}


def manifolds(drawn: Tensor, real: Tensor, k: int = NEIGHBOURS) -> Manifolds:
    """Precision, recall, density and coverage, picture by picture.

    Raises ValueError where a set has not more than `k` rows.
    """
    drawn, real = _checked("drawn", drawn, k + 1), _checked("real", real, k + 1)
    ours, theirs = _radii(drawn, k), _radii(real, k)
    inside, recalled, covered = [], torch.zeros(len(real), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for start, squared in _squared(drawn, real):
        balls = squared <= theirs
        inside.append(balls.sum(1).cpu())
        covered |= balls.any(0).cpu()
        recalled |= (squared <= ours[start : start + len(squared), None]).any(0).cpu()
    count = torch.cat(inside).double()
    return Manifolds(
        (count > 0).double().numpy(), recalled.double().numpy(), (count / k).numpy(), covered.double().numpy()
    )


def _radii(rows: Tensor, k: int) -> Tensor:
    """`[n]`: squared distance of each row to its k-th nearest other one."""
    return torch.cat([squared.kthvalue(k + 1).values for _, squared in _squared(rows, rows)])  # itself is the first


def nearest(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Distance `[n]` to the nearest row of `bank`, and its place; among equals the first.

    A distance is divided by √D: of unit-norm features times √D it is that of the unit-norm ones, of pixels the root
    of their mean squared difference.
    """
    queries, bank = _checked("queries", queries, 1), _checked("bank", bank, 1)
    longest, found = bank.square().sum(1).max(), []
    for start, squared in _squared(queries, bank):
        rounding = _SAME * (queries[start : start + len(squared)].square().sum(1) + longest)
        found.append((squared <= (squared.amin(1) + rounding)[:, None]).int().argmax(1))
    places = torch.cat(found)
    return (queries - bank[places]).square().mean(1).sqrt().cpu(), places.cpu()


def diversity(rows: Tensor) -> Metric:
    """Mean distance (as in `nearest`) between two different rows, with the jackknife's error; NaN for one row."""
    rows = _checked("features", rows, 1)
    n = len(rows)
    sums = torch.cat([(squared / rows.shape[1]).sqrt().sum(1) for _, squared in _squared(rows, rows)])
    if n < 2:
        return Metric(math.nan, math.nan, n)
    value = float(sums.sum() / (n * (n - 1)))
    if n < 3:
        return Metric(value, math.nan, n)
    return Metric(value, math.sqrt(_jackknife((sums.sum() - 2 * sums) / ((n - 1) * (n - 2)))), n)


def vendi(rows: Tensor) -> float:
    """The Vendi score: e to the entropy of the eigenvalues of the cosine kernel over n (arXiv 2210.02410).

    From 1 (all alike) to n (all at right angles): how many different pictures there are, as it were.
    """
    rows = torch.nn.functional.normalize(_checked("features", rows, 1), dim=1)
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows  # both have the same eigenvalues but for 0
    with _one_thread():
        values = torch.linalg.eigvalsh(gram / len(rows))
    values = values[values > 0]
    return float((-(values * values.log()).sum()).exp())


def compared(
    drawn: Tensor, real: Tensor, seed: int = 0
) -> tuple[dict[str, Metric], dict[str, np.ndarray], dict[str, Any]]:
    """fid, kid_x1000, precision, recall, density and coverage with their errors; precision and density `[n]` of each
    drawing; and what they are of.

    FID's error is that of resampled drawings, by `seed`; the real pictures stay.
    """
    distance, width = frechet_from(real), drawn.shape[1]
    resamples = RESAMPLES if width <= WIDEST else 0
    fid = Metric(distance(drawn), n=len(drawn))
    if resamples:
        fid = Metric.bootstrap(lambda rows: distance(drawn[rows]), len(drawn), seed=seed, resamples=resamples)
    whole, size = kid(drawn, real), min(SUBSET, len(drawn) // 2, len(real) // 2)
    subsets = 1000 * kid_subsets(drawn, real, size)
    detail: dict[str, Any] = {
        "drawings": len(drawn),
        "real": len(real),
        "fid_resamples": resamples,
        "kid_subsets_x1000": {"size": size, "mean": float(subsets.mean()), "std": float(subsets.std())},
        "neighbours": NEIGHBOURS,
    }
    if min(len(drawn), len(real)) < width:
        detail["fid_warning"] = (
            f"{len(drawn)} drawings and {len(real)} real pictures for {width} features: FID is too high, and only "
            "comparable at equal numbers; KID is not biased"
        )
    kid_x1000 = Metric(1000 * whole.value, 1000 * whole.error, whole.n)
    found = manifolds(drawn, real)
    each = {"precision": found.precision, "density": found.density}
    return {"fid": fid, "kid_x1000": kid_x1000, **found.metrics()}, each, detail


def values(drawn: Tensor, real: Tensor) -> dict[str, float]:
    """The metrics of `compared` without errors, and `n`: for what drawings are seen against."""
    found = {"n": float(len(drawn)), "fid": frechet(drawn, real), "kid_x1000": 1000 * kid(drawn, real).value}
    return found | {name: metric.value for name, metric in manifolds(drawn, real).metrics().items()}


def _squared(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, squared distances `[b, m]`) a block of rows; rows that are equal but for rounding are 0 apart."""
    lengths = columns.square().sum(1)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        both = block.square().sum(1, keepdim=True) + lengths
        squared = both - 2 * block @ columns.T
        yield start, torch.where(squared > _SAME * both, squared, 0.0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For a decomposition: several threads gain little, and on a busy machine wait for each other a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked(name: str, rows: Tensor, least: int) -> Tensor:
    if rows.ndim != 2 or len(rows) < least or not rows.shape[1]:
        raise ValueError(f"{name}: features of shape {list(rows.shape)}; must be [N, D] with N at least {least}")
    rows = rows.double()
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name}: features hold what is no finite number; look at the model that made them")
    return rows
