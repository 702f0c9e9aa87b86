"""How far a model's confidence can be believed, and temperature scaling.

Guo et al., "On Calibration of Modern Neural Networks" (2017). In a multi-label task each decision (image, class) counts
as one prediction: its confidence is the probability of the class, and it is right when the image has the class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from vitrail.evaluate.scores import check, nll, probabilities, slices

BINS = 15
TEMPERATURES = (0.05, 20.0)
_FIT_ELEMENTS = 1 << 22


def reliability(
    logits: np.ndarray, targets: np.ndarray, *, temperature: float | np.ndarray = 1.0, bins: int = BINS
) -> dict[str, Any]:
    """Return the reliability diagram: ``edges`` (bins + 1), and per bin ``count``, ``confidence`` and ``accuracy``.

    Bins have equal width and hold confidences in (lower, upper]; means of empty bins are None.

    Args:
        logits: (N, C).
        targets: class numbers (N,), or zeros and ones (N, C).
        temperature: divides the logits; one number, or one per image (N,).
    """
    multilabel = check(logits, targets)
    each = np.broadcast_to(np.asarray(temperature, np.float32), len(logits))
    count, confidence, right = np.zeros(bins, np.int64), np.zeros(bins), np.zeros(bins)
    for part in slices(*logits.shape):
        probs = probabilities(logits[part] / each[part, None], multilabel=multilabel)
        if multilabel:
            sure, correct = probs.ravel(), targets[part].ravel().astype(np.float64)
        else:
            sure, correct = probs.max(axis=1), (logits[part].argmax(axis=1) == targets[part]).astype(np.float64)
        place = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
        count += np.bincount(place, minlength=bins)
        confidence += np.bincount(place, sure, minlength=bins)
        right += np.bincount(place, correct, minlength=bins)
    means = [[None if not n else float(value / n) for value, n in zip(total, count)] for total in (confidence, right)]
    edges = [i / bins for i in range(bins + 1)]
    return {"edges": edges, "count": count.tolist(), "confidence": means[0], "accuracy": means[1]}


def gaps(diagram: dict[str, Any]) -> tuple[float, float]:
    """Return the expected and the maximum calibration error, in [0, 1], of a ``reliability`` diagram."""
    filled = [(n, abs(c - a)) for n, c, a in zip(diagram["count"], diagram["confidence"], diagram["accuracy"]) if n]
    return sum(n * gap for n, gap in filled) / sum(n for n, _ in filled), max(gap for _, gap in filled)


def expected_calibration_error(
    logits: np.ndarray, targets: np.ndarray, *, temperature: float | np.ndarray = 1.0, bins: int = BINS
) -> float:
    """Return the mean distance of confidence and accuracy over equal-width bins, weighted by count, in [0, 1]."""
    return gaps(reliability(logits, targets, temperature=temperature, bins=bins))[0]


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature in [0.05, 20] that makes held-out data most likely.

    A unit normal prior on its logarithm, worth less than one image, keeps it sensible where every image is right, and
    does not show otherwise. Large arrays are fitted on an evenly spaced part of their rows.

    Args:
        logits: (N, C) on images that were not trained on.
        targets: class numbers (N,), or zeros and ones (N, C).
    """
    check(logits, targets)
    return _fit(logits, targets, np.arange(len(logits)))


def _fit(logits: np.ndarray, targets: np.ndarray, members: np.ndarray) -> float:
    members = members[:: -(-len(members) * logits.shape[1] // _FIT_ELEMENTS)]
    logits, targets = logits[members], targets[members]

    def loss(log_temperature: float) -> float:
        total = float(nll(logits, targets, np.exp(log_temperature)).sum(dtype=np.float64))
        return total + log_temperature**2 / 2

    # The likelihood is concave in 1/T, so it has one peak in log T.
    bounds = (np.log(TEMPERATURES[0]), np.log(TEMPERATURES[1]))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x))


def calibrate(logits: np.ndarray, targets: np.ndarray, *, folds: int = 5, seed: int = 0) -> dict[str, Any]:
    """Fit the temperature on all images, and measure its benefit without reusing an image.

    Errors measured on the images that a temperature was fitted on are too good. For the figures reported here each
    fold gets the temperature that was fitted on the other folds.

    Returns:
        ``temperature`` (fitted on all), ``ece``, ``mce``, ``nll`` before, ``ece_calibrated``, ``mce_calibrated``,
        ``nll_calibrated`` after (cross-fitted), and the ``reliability`` diagrams ``before`` and ``after``.
    """
    check(logits, targets)
    folds = min(folds, len(logits))
    fold = np.random.default_rng(seed).permutation(len(logits)) % folds
    each = np.ones(len(logits), np.float32)
    if folds > 1:
        for k in range(folds):
            each[fold == k] = _fit(logits, targets, np.flatnonzero(fold != k))
    result: dict[str, Any] = {"temperature": fit_temperature(logits, targets)}
    for suffix, name, temperature in (("", "before", np.ones_like(each)), ("_calibrated", "after", each)):
        diagram = reliability(logits, targets, temperature=temperature)
        result[f"ece{suffix}"], result[f"mce{suffix}"] = gaps(diagram)
        parts = [
            nll(logits[part] / temperature[part, None], targets[part]).sum(dtype=np.float64)
            for part in slices(*logits.shape)
        ]
        result[f"nll{suffix}"] = float(sum(parts)) / len(logits)
        result[name] = diagram
    return result
