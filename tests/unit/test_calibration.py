"""Calibration error against a plain loop, and the temperature against a search over many."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.evaluation.calibration import expected_calibration_error, fit_temperature, negative_log_likelihood


def plain_error(probabilities: np.ndarray, truth: np.ndarray, bins: int) -> float:
    """Guo et al.'s equation 3, a bin at a time."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    total = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def plain_nll(logits: Tensor, truth: Tensor, kind: str) -> float:
    if kind == "softmax":
        return float(torch.nn.functional.cross_entropy(logits.double(), truth))
    target = torch.nn.functional.one_hot(truth, logits.shape[1]).double()
    pairs = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), target, reduction="none")
    return float(pairs.sum(1).mean())


def drawn(images: int, labels: int, temperature: float, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are `temperature` times too far apart, and labels drawn by what they should be."""
    rng = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(images, labels, generator=rng) - (1.0 if kind == "sigmoid" else 0.0)
    truth = torch.multinomial(honest.softmax(1), 1, generator=rng)[:, 0]
    return temperature * honest, truth


@pytest.mark.parametrize(("images", "labels", "bins"), [(1, 2, 15), (333, 7, 15), (1000, 3, 10), (57, 41, 1)])
def test_the_error_is_that_of_a_plain_loop(images: int, labels: int, bins: int) -> None:
    logits, truth = drawn(images, labels, 2.5, "softmax")
    probabilities = logits.softmax(1)
    expected = plain_error(probabilities.double().numpy(), truth.numpy(), bins)
    assert expected_calibration_error(probabilities, truth, bins) == pytest.approx(expected, abs=1e-9)


def test_known_errors() -> None:
    sure = torch.eye(4)
    assert expected_calibration_error(sure, torch.arange(4)) == 0.0
    assert expected_calibration_error(sure, torch.tensor([1, 2, 3, 0])) == 1.0
    half = torch.tensor([[0.75, 0.25]]).repeat(4, 1)
    assert expected_calibration_error(half, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.0)
    edge = torch.tensor([[0.25, 0.1], [0.3, 0.1]])  # a bin ends with its upper bound: these two are in different ones
    assert expected_calibration_error(edge, torch.tensor([0, 1]), 4) == pytest.approx((0.75 + 0.3) / 2)
    each_by_itself = torch.tensor([[0.1, 0.05], [0.0, 0.0]])  # of a sigmoid model: the top label's probability
    assert expected_calibration_error(each_by_itself, torch.tensor([0, 1])) == pytest.approx(0.45)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_the_temperature_has_the_least_negative_log_likelihood(kind: str, temperature: float) -> None:
    logits, truth = drawn(1500, 9, temperature, kind)
    found = fit_temperature(logits, truth, kind)
    assert negative_log_likelihood(logits, truth, kind) == pytest.approx(plain_nll(logits, truth, kind), rel=1e-9)
    least = plain_nll(logits / found, truth, kind)
    for factor in (0.5, 0.98, 0.999, 1.001, 1.02, 2.0):
        assert plain_nll(logits / (found * factor), truth, kind) > least
    if kind == "softmax":  # the labels were drawn with this one
        assert found == pytest.approx(temperature, rel=0.1)


def test_many_rows_are_as_few() -> None:
    logits, truth = drawn(1030, 5, 3.0, "softmax")  # over one piece
    doubled = fit_temperature(logits.repeat(3, 1), truth.repeat(3))
    assert doubled == pytest.approx(fit_temperature(logits, truth), rel=1e-9)


@pytest.mark.parametrize(
    ("logits", "truth", "words"),
    [
        ([[9.0, 0.0], [0.0, 9.0]], [0, 1], "every one of 2 images has its right label at the top"),
        ([[9.0, 0.0], [0.0, 9.0]], [1, 0], "no likelier than the others"),
        ([[1.0, 1.0]], [0], "no temperature is best"),
        ([[5.0]], [0], "no temperature is best"),
        ([[1.0, 0.0]], [2], "from 0 to 1"),
        ([[1.0, 0.0]], [-1], "from 0 to 1"),
        ([[1.0, 0.0]], [0, 1], "2 labels for 1 images"),
        ([[1.0, 0.0]], [0.0], "must be integers"),
        (torch.zeros(0, 2).tolist(), [], "must be integers"),
    ],
)
def test_what_has_no_best_temperature_says_so(logits: list[list[float]], truth: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_temperature(torch.tensor(logits), torch.tensor(truth))


def test_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        expected_calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="bins = 0"):
        expected_calibration_error(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), bins=0)
    assert not math.isnan(expected_calibration_error(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)))
