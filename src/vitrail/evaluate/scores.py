"""What all measures on logits share: checks, and passes in slices so that large arrays are never copied whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vitrail.errors import DataError, InputError

_SLICE = 1 << 21
"""Elements of the logits handled at once."""


def check(logits: np.ndarray, targets: np.ndarray, classes: int | None = None) -> bool:
    """Return whether the task is multi-label, after checking that logits (N, C) and targets (N,) or (N, C) agree.

    Raises:
        InputError: shapes that do not fit each other.
        DataError: no image, a class number out of range, or logits that are not finite.
    """
    if logits.ndim != 2 or targets.ndim not in (1, 2) or targets.shape not in (logits.shape[:1], logits.shape):
        raise InputError(
            f"logits of shape {logits.shape} and targets of shape {targets.shape} do not fit: "
            "give (N, C) and (N,) class numbers, or (N, C) and (N, C) zeros and ones"
        )
    if classes is not None and classes != logits.shape[1]:
        raise InputError(f"{logits.shape[1]} logits per image but {classes} class names: give one name per logit")
    if len(logits) == 0:
        raise DataError("there is no held-out image to evaluate on: raise data.val_fraction or add images")
    if targets.ndim == 1 and (targets.min() < 0 or targets.max() >= logits.shape[1]):
        raise DataError(
            f"targets range from {targets.min()} to {targets.max()}, but the model has {logits.shape[1]} classes: "
            "evaluate with the class map that the model was trained with"
        )
    for part in slices(*logits.shape):
        finite = np.isfinite(logits[part]).all(axis=1)
        if not finite.all():
            raise DataError(
                f"the model's output for image {part.start + int(finite.argmin())} is not finite: "
                "train again with a lower learning rate or in fp32"
            )
    return targets.ndim == 2


def slices(rows: int, columns: int) -> Iterator[slice]:
    """Yield consecutive slices of the rows, each of a bounded number of elements."""
    step = max(1, _SLICE // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return log-probabilities (n, C), float32."""
    scaled = logits.astype(np.float32) / np.float32(temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return scaled


def probabilities(logits: np.ndarray, temperature: float = 1.0, *, multilabel: bool = False) -> np.ndarray:
    """Return probabilities (n, C), float32: a softmax, or one sigmoid per class."""
    if multilabel:
        # The tanh form does not overflow.
        return 0.5 * (1 + np.tanh(logits.astype(np.float32) / np.float32(2 * temperature)))
    return np.exp(log_softmax(logits, temperature))


def nll(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the negative log-likelihood of each image (n,): cross-entropy, or its sum over classes if multi-label."""
    if targets.ndim == 1:
        scaled = logits.astype(np.float32) / np.float32(temperature)
        top = scaled.max(axis=1)
        own = scaled[np.arange(len(targets)), targets]
        return np.log(np.exp(scaled - top[:, None]).sum(axis=1)) + top - own
    signed = logits.astype(np.float32) * (1 - 2 * targets.astype(np.float32)) / np.float32(temperature)
    return np.logaddexp(np.float32(0), signed).sum(axis=1)


def per_image(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return a score in [0, 1] per image (N,), float32: right or wrong, or of several labels the ranking precision.

    That is the mean, over an image's classes, of the share of its classes among all that rank as high; 1 for an image
    without classes.
    """
    multilabel = check(logits, targets)
    if not multilabel:
        return (logits.argmax(axis=1) == targets).astype(np.float32)
    found = np.empty(len(logits), np.float32)
    for part in slices(*logits.shape):
        order = np.argsort(-logits[part], axis=1, kind="stable")
        ranked = np.take_along_axis(targets[part] > 0.5, order, axis=1)
        precision = ranked.cumsum(axis=1) / np.arange(1, ranked.shape[1] + 1)
        count = ranked.sum(axis=1)
        found[part] = np.where(count > 0, (precision * ranked).sum(axis=1) / np.maximum(count, 1), 1.0)
    return found
