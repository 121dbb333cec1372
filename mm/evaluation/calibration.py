"""Whether a probability means what it says: expected calibration error, and the temperature that makes it so.

Both are Guo et al.'s (arXiv 1706.04599). Letters: N images, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
COLDEST, HOTTEST = 1e-3, 1e3  # temperatures that are looked at
_ROWS = 1024  # images at a time, in float64
_MOST_STEPS = 200


@dataclass(frozen=True)
class Calibration:
    """What `Classifier.calibrate` found on `n` images: the temperature, and both errors without it and with it.

    `ece`: expected calibration error, 15 bins. `nll`: mean negative log likelihood in nats an image; of a sigmoid
    model, summed over the labels.
    """

    temperature: float
    n: int
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float

    def __str__(self) -> str:
        return (
            f"temperature {self.temperature:.4g} from {self.n:,} images: calibration error "
            f"{100 * self.ece_before:.2f} % -> {100 * self.ece_after:.2f} %, "
            f"negative log likelihood {self.nll_before:.4f} -> {self.nll_after:.4f}"
        )


def expected_calibration_error(probabilities: Tensor, truth: Tensor, bins: int = BINS) -> float:
    """The mean of |accuracy - confidence| over `bins` equal parts of (0, 1], each weighted by its share of the images.

    `probabilities` `[N, L]`, `truth` int64 `[N]`: the right label of each. The confidence is the top label's
    probability, of a sigmoid model too. In [0, 1]. Raises ValueError for shapes that do not fit, or no image.
    """
    truth = check_truth(truth, len(probabilities), probabilities.shape[-1])
    if bins < 1:
        raise ValueError(f"bins = {bins}: must be at least 1")
    confidence, guess = probabilities.max(1)
    confidence = confidence.double().cpu()
    right = (guess.cpu() == truth).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # (0, 1/bins] is the first
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return float(gap.abs().sum() / len(truth))


def fit_temperature(logits: Tensor, truth: Tensor, kind: str = "softmax") -> float:
    """The T > 0 whose `logits / T` `[N, L]` give the `truth` `[N]` the highest likelihood.

    `kind` "softmax": of one label an image; "sigmoid": of each label by itself. The likelihood is concave in 1 / T, so
    there is one best: Newton's method within a bracket finds it. Raises ValueError where it lies at 0 or infinity.
    """
    truth = check_truth(truth, len(logits), logits.shape[-1])
    low, high = 1 / HOTTEST, 1 / COLDEST
    if slope(logits, truth, kind, high)[0] <= 0:
        raise ValueError(
            f"calibrate: every one of {len(truth)} images has its right label at the top, so that no temperature is "
            "best; give more images, or harder ones"
        )
    if slope(logits, truth, kind, low)[0] >= 0:
        raise ValueError("calibrate: the given labels are no likelier than the others; check that they fit the images")
    inverse = 1.0
    for _ in range(_MOST_STEPS):
        first, second = slope(logits, truth, kind, inverse)
        low, high = (low, inverse) if first > 0 else (inverse, high)
        step = inverse - first / second if second > 0 else 0.0
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - inverse) <= 1e-12 * inverse:
            break
        inverse = following
    return 1 / inverse


def slope(logits: Tensor, truth: Tensor, kind: str, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log likelihood by the inverse temperature, in float64."""
    first = second = 0.0
    for z, own in _pieces(logits, truth):
        if kind == "sigmoid":
            p = (inverse * z).sigmoid()
            first += float((p * z).sum()) - float(z.gather(1, own).sum())
            second += float((p * (1 - p) * z * z).sum())
        else:
            p = (inverse * z).softmax(1)
            mean = (p * z).sum(1, keepdim=True)
            first += float((mean - z.gather(1, own)).sum())
            second += float((p * (z - mean) ** 2).sum())
    return first / len(truth), second / len(truth)


def negative_log_likelihood(logits: Tensor, truth: Tensor, kind: str = "softmax") -> float:
    """Mean over the images, in nats; of sigmoid, summed over the labels of an image."""
    total = 0.0
    for z, own in _pieces(logits, truth):
        if kind == "sigmoid":  # -log σ(z) of its own label, -log σ(-z) of the others
            total += -float(F.logsigmoid(-z).sum() + z.gather(1, own).sum())
        else:
            total += float((z.logsumexp(1, keepdim=True) - z.gather(1, own)).sum())
    return total / len(truth)


def check_truth(truth: Tensor, images: int, labels: int) -> Tensor:
    """`truth` as int64 `[N]` on the CPU. Raises ValueError where it does not fit so many images and labels."""
    if truth.ndim != 1 or truth.is_floating_point() or truth.dtype == torch.bool:
        raise ValueError(f"truth: is {truth.dtype} of shape {list(truth.shape)}; must be integers, one an image")
    if len(truth) != images:
        raise ValueError(f"truth: {len(truth)} labels for {images} images; give one for each")
    if not images:
        raise ValueError("truth: holds nothing; give at least one image with its label")
    if not 0 <= int(truth.min()) <= int(truth.max()) < labels:
        raise ValueError(f"truth: from {truth.min()} to {truth.max()}; must be from 0 to {labels - 1}")
    return truth.long().cpu()


def _pieces(logits: Tensor, truth: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, in float64, with the place of each one's own label `[n, 1]`."""
    for start in range(0, len(truth), _ROWS):
        yield logits[start : start + _ROWS].double(), truth[start : start + _ROWS, None]
