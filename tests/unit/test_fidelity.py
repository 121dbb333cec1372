"""Distances between sets of pictures, against plain loops, closed forms and what must be so."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.evaluation import fidelity
from mm.evaluation.fidelity import compared, diversity, frechet, kid, kid_subsets, manifolds, nearest, values, vendi

SHAPES = [(37, 23, 5), (19, 40, 31), (60, 60, 8)]  # drawn, real, width: unequal, fewer than features, alike


def features(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, width)) + shift)


def with_moments(n: int, mean: list[float], deviations: list[float], seed: int) -> Tensor:
    """Features whose sample mean and covariance are exactly these."""
    raw = np.random.default_rng(seed).normal(size=(n, len(mean)))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T)).T)
    return torch.from_numpy(white * deviations + mean)


@pytest.mark.parametrize(("n", "m", "width"), SHAPES)
def test_fid_is_what_the_eigenvalues_of_the_product_give(n: int, m: int, width: int) -> None:
    drawn, real = features(n, width, 0, 0.3), features(m, width, 1) * 1.5
    a, b = np.cov(drawn.numpy().T), np.cov(real.numpy().T)
    shared = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = ((drawn.mean(0) - real.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * shared
    assert frechet(drawn, real) == pytest.approx(expected, rel=1e-6)
    assert frechet(real, drawn) == pytest.approx(expected, rel=1e-6)


def test_fid_of_two_gaussians_is_the_closed_form() -> None:
    a = with_moments(50, [0, 0, 1], [1, 2, 3], 0)
    b = with_moments(80, [0, 3, 1], [2, 2, 0.5], 1)
    assert frechet(a, b) == pytest.approx(9 + 1 + 0 + 2.5**2, rel=1e-9)
    turn = torch.linalg.qr(features(3, 3, 2)).Q
    assert frechet(a @ turn, b @ turn) == pytest.approx(16.25, rel=1e-9), "no matter how features are turned"


def test_a_set_is_no_distance_from_itself_even_with_fewer_pictures_than_features() -> None:
    for n, width in ((40, 6), (20, 64)):
        rows = features(n, width, 0)
        assert abs(frechet(rows, rows.flip(0))) < 1e-9
        found = manifolds(rows, rows).metrics()
        assert found["precision"].value == found["recall"].value == found["coverage"].value == 1
        assert found["density"].value > 0.9
        assert kid(rows, rows).value < 0, "unbiased: pairs of a picture with itself count across, not within"


def test_sets_far_apart_share_nothing() -> None:
    found = manifolds(features(30, 4, 0), features(40, 4, 1, shift=100)).metrics()
    assert {metric.value for metric in found.values()} == {0.0}
    assert (found["precision"].n, found["recall"].n) == (30, 40)


def kernel(x: Tensor, y: Tensor) -> float:
    return float((x @ y) / len(x) + 1) ** 3


def naive_kid(drawn: Tensor, real: Tensor) -> float:
    def within(rows: Tensor) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(x, y) for x in drawn for y in real]
    return within(drawn) + within(real) - 2 * sum(across) / len(across)


def without(rows: Tensor, place: int) -> Tensor:
    return torch.cat([rows[:place], rows[place + 1 :]])


def test_kid_and_its_jackknife_agree_with_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "BLOCK", 5)
    drawn, real = features(9, 7, 0, 0.5), features(12, 7, 1)
    found = kid(drawn, real)
    assert found.value == pytest.approx(naive_kid(drawn, real), rel=1e-10)
    variance = 0.0
    for leave in (
        [naive_kid(without(drawn, i), real) for i in range(9)],
        [kid(drawn, without(real, i)).value for i in range(12)],
    ):
        variance += (len(leave) - 1) * float(np.var(leave))
    assert found.error == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_the_error_of_kid_is_how_much_it_varies_from_sample_to_sample() -> None:
    found = [kid(features(40, 4, 2 * s, 0.5), features(60, 4, 2 * s + 1)) for s in range(80)]
    spread = np.std([one.value for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.3)


def test_kid_of_subsets_takes_the_rows_that_torch_fidelity_takes() -> None:
    drawn, real = features(20, 3, 0, 0.5), features(30, 3, 1)
    rng, expected = np.random.RandomState(2020), []
    for _ in range(3):
        ours, theirs = rng.choice(20, 6, replace=False), rng.choice(30, 6, replace=False)
        expected.append(naive_kid(drawn[ours], real[theirs]))
    assert kid_subsets(drawn, real, 6, 3) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "width"), SHAPES)
def test_manifolds_agree_with_loops(n: int, m: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "BLOCK", 7)
    drawn, real = features(n, width, 0, 0.2), 1.2 * features(m, width, 1)

    def radius(rows: Tensor, i: int) -> float:
        return sorted(float((rows[i] - other).norm()) for other in without(rows, i))[2]

    ours, theirs = [radius(drawn, i) for i in range(n)], [radius(real, i) for i in range(m)]
    apart = [[float((x - y).norm()) for y in real] for x in drawn]
    found = manifolds(drawn, real)
    assert found.precision.tolist() == [any(apart[i][j] <= theirs[j] for j in range(m)) for i in range(n)]
    assert found.recall.tolist() == [any(apart[i][j] <= ours[i] for i in range(n)) for j in range(m)]
    assert found.density.tolist() == pytest.approx(
        [sum(apart[i][j] <= theirs[j] for j in range(m)) / 3 for i in range(n)]
    )
    assert found.coverage.tolist() == [min(apart[i][j] for i in range(n)) <= theirs[j] for j in range(m)]
    assert found.precision.mean() > 0 and 0 < found.recall.mean() < 1, "the case tells nothing apart"


def test_pictures_that_stand_many_times_are_no_distance_from_each_other() -> None:
    rows = (1000 * features(6, 50, 0)).repeat(5, 1)  # radius 0: rounding would leave them outside their own balls
    found = manifolds(rows.float(), rows[:12].repeat(2, 1).float()).metrics()
    assert found["precision"].value == 1 and found["recall"].value == 1
    assert nearest(rows[:6].float(), rows.float())[0].tolist() == [0.0] * 6


def test_the_nearest_is_the_first_of_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "BLOCK", 4)
    queries, bank = features(11, 6, 0), features(9, 6, 1)
    distances, places = nearest(queries, torch.cat([bank, bank]))
    apart = (queries[:, None] - bank[None]).square().mean(-1).sqrt()
    assert places.tolist() == apart.argmin(1).tolist()
    torch.testing.assert_close(distances, apart.amin(1), rtol=1e-9, atol=0)


def test_diversity_is_the_mean_distance_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "BLOCK", 3)
    rows = features(8, 5, 0)

    def mean(rows: Tensor) -> float:
        apart = [float((x - y).square().mean().sqrt()) for i, x in enumerate(rows) for y in rows[:i]]
        return sum(apart) / len(apart)

    found = diversity(rows)
    leave = [mean(without(rows, i)) for i in range(8)]
    assert found.value == pytest.approx(mean(rows)) and found.error == pytest.approx(math.sqrt(7 * np.var(leave)))
    assert math.isnan(diversity(rows[:1]).value) and diversity(rows[:1].repeat(3, 1)).value == 0


def test_the_vendi_score_counts_what_differs() -> None:
    assert vendi(torch.eye(7)) == pytest.approx(7) and vendi(torch.ones(5, 9)) == pytest.approx(1)
    assert vendi(torch.eye(4, 6).repeat(10, 1)) == pytest.approx(4), "copies add nothing, with more rows than features"
    rows = features(12, 5, 0)
    kernel = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
    eigenvalues = np.linalg.eigvalsh(kernel.numpy() / 12).clip(1e-300)
    assert vendi(rows) == pytest.approx(math.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def test_few_pictures_for_many_features_are_warned_of_and_errors_are_there() -> None:
    drawn, real = features(30, 40, 0, 0.2).float(), features(50, 40, 1).float()
    metrics, each, detail = compared(drawn, real)
    assert "FID is too high" in detail["fid_warning"] and "fid_warning" not in compared(drawn[:, :4], real[:, :4])[2]
    assert all(metric.error > 0 for name, metric in metrics.items() if name not in ("precision", "recall"))
    assert each["density"].mean() == metrics["density"].value and detail["kid_subsets_x1000"]["size"] == 15
    assert values(drawn, real) == {"n": 30.0, **{name: metric.value for name, metric in metrics.items()}}


def test_features_that_cannot_be_compared_are_refused() -> None:
    good = features(10, 3, 0)
    with pytest.raises(ValueError, match=r"real: features of shape \[1, 3\]; must be \[N, D\] with N at least 2"):
        frechet(good, good[:1])
    with pytest.raises(ValueError, match="drawn: .* at least 4"):
        manifolds(good[:3], good)
    with pytest.raises(ValueError, match="drawn: .* at least 11"):
        kid_subsets(good, good, 11)
    with pytest.raises(ValueError, match="2 subsets of 1"):
        kid_subsets(good, good, 1, 2)
    with pytest.raises(ValueError, match="no finite number"):
        kid(good, torch.full((10, 3), float("nan")))
