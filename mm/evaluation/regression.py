"""Logistic regression on frozen features, its regularisation found without the test pictures (arXiv 2103.00020, A.3).

Letters: N training pictures, M test pictures, F features, K classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np

from mm.config import ConfigError

Array = np.ndarray
COARSE = 2  # decades between the first strengths, 10^-6 to 10^6
HALVINGS = 4  # of the distance around the best: to eight strengths a decade
MOST_ITERATIONS = 1000


@dataclass
class Fit:
    """Scores of test pictures, and how they came about."""

    scores: Array  # [M, K]
    c: float  # 1 / λ: what the summed losses of the pictures are weighed with against half the squared weights
    curve: dict[float, float] = field(default_factory=dict)  # c -> share right of the held-out training pictures
    validation: int = 0  # how many those are
    iterations: int = 0
    converged: bool = True


def linear_probe(
    train: Array,
    classes: Array,
    test: Array,
    *,
    c: float | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    most: int = MOST_ITERATIONS,
) -> Fit:
    """Class scores of `test` `[M, F]` by logistic regression on `train` `[N, F]` with `classes` 0 ... K - 1, int `[N]`.

    Features are standardised with the mean and deviation of those that are fitted. `c` is chosen by `choose` unless it
    is given, from training pictures alone; then all of them are fitted. Raises ConfigError where there is nothing to
    tell apart, or where scikit-learn is missing.
    """
    if len(np.unique(classes)) < 2:
        raise ConfigError(f"label: all {len(classes)} training pictures are of one class; there is nothing to learn")
    curve, validation = dict[float, float](), 0
    if c is None:
        c, curve, validation = choose(train, classes, held_out=held_out, seed=seed, most=most)
    scores, iterations = _fit(train, classes, test, c, most)
    return Fit(scores, c, curve, validation, iterations, iterations < most)


def choose(
    features: Array, classes: Array, *, held_out: float = 0.2, seed: int = 0, most: int = MOST_ITERATIONS
) -> tuple[float, dict[float, float], int]:
    """The strength that is best on a held-out part; what share is right there with each that was tried; its pictures.

    First 10^-6, 10^-4, ... 10^6, then twice as finely around the best, four times, as CLIP's paper does. Of those with
    equally many right the one with the smallest cross-entropy: few pictures, or easy ones, leave many equal. Raises
    ConfigError where no class has two pictures.
    """
    away = part(classes, held_out, seed)
    if not away.any():
        raise ConfigError("shots: no class has two training pictures, one to choose the regularisation with; give c")
    known, mapped = np.unique(classes[~away], return_inverse=True)
    truth = np.searchsorted(known, classes[away])  # every class has a picture that is not away
    reached: dict[float, tuple[float, float]] = {}  # exponent -> share right, mean log-likelihood
    exponents, step = [float(power) for power in range(-6, 7, COARSE)], float(COARSE)
    for _ in range(HALVINGS + 1):
        for exponent in exponents:
            if exponent not in reached:
                scores, _ = _fit(features[~away], mapped, features[away], 10.0**exponent, most)
                right = float((scores.argmax(1) == truth).mean())
                reached[exponent] = right, float(_log_softmax(scores)[np.arange(len(truth)), truth].mean())
        best = max(sorted(reached), key=lambda exponent: reached[exponent])
        step /= 2
        exponents = [power for power in (best - step, best + step) if abs(power) <= 6]
    return 10.0**best, {10.0**exponent: reached[exponent][0] for exponent in sorted(reached)}, int(away.sum())


def _log_softmax(scores: Array) -> Array:
    scores = scores - scores.max(1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def part(classes: Array, share: float, seed: int) -> Array:
    """bool `[N]`: about that share of each class at random, at least one where it has two, and never all of it."""
    chosen, rng = np.zeros(len(classes), bool), np.random.default_rng(seed)
    for one in np.unique(classes):
        places = np.flatnonzero(classes == one)
        count = min(max(1, round(len(places) * share)), len(places) - 1)
        chosen[rng.permutation(places)[:count]] = True
    return chosen


def few(classes: Array, shots: int, seed: int) -> Array:
    """int `[n]`, ascending: the places of `shots` of each class at random, or of all that it has where it has fewer."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(classes == one))[:shots] for one in np.unique(classes)]
    return np.sort(np.concatenate(chosen))


def _fit(train: Array, classes: Array, test: Array, c: float, most: int) -> tuple[Array, int]:
    """Scores `[M, K]` and the iterations of L-BFGS."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError('probe: needs scikit-learn; pip install "mm[evaluation]"') from error
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    deviation[deviation < 1e-12] = 1  # a feature that is always the same
    model = LogisticRegression(C=c, max_iter=most)  # L-BFGS on the cross-entropy over all classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by the number of iterations
        model.fit((train - mean) / deviation, classes)
    scores = model.decision_function((test - mean) / deviation)
    if scores.ndim == 1:  # of two classes: how much more the second
        scores = np.stack([np.zeros_like(scores), scores], axis=1)
    return scores, int(model.n_iter_.max())
