"""Accuracy and its kin on held-out data, from logits alone.

A class without a held-out image says nothing about the model: it is listed under ``empty_classes``, its recall, F1 and
average precision are None, and means over classes leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from vitrail.errors import InputError
from vitrail.evaluate.calibration import gaps, reliability
from vitrail.evaluate.scores import check, log_softmax, nll, probabilities, slices

_RESAMPLES = 500


def evaluate(
    logits: np.ndarray, targets: np.ndarray, classes: Sequence[str], *, temperature: float = 1.0
) -> dict[str, Any]:
    """Return the figures of a classifier as plain values for JSON.

    Both tasks: ``n``, ``n_classes``, ``multilabel``, ``macro_f1``, ``ece``, ``mce``, ``brier``, ``nll``,
    ``temperature``, ``empty_classes``, and ``per_class`` (name, support, precision, recall, f1, average_precision).
    One label per image: ``top1``, ``top1_interval`` (95 %, Wilson), ``top5`` (top C when there are fewer classes),
    ``balanced_accuracy`` (mean recall), ``confusion`` (non-zero cells as [true, predicted, count]); ``brier`` sums the
    squared errors over classes. Several labels: ``map``, ``micro_f1``, ``micro_f1_interval`` (95 %, bootstrap over
    images) at the threshold 0.5; ``brier`` is the mean squared error of a decision.

    Args:
        logits: (N, C); may be memory-mapped.
        targets: class numbers (N,), or zeros and ones (N, C).
        classes: C names.
        temperature: divides the logits where probabilities are looked at.

    Raises:
        InputError, DataError: arrays that do not fit, no image, or logits that are not finite.
    """
    multilabel = check(logits, targets, len(classes))
    n, width = logits.shape
    ece, mce = gaps(reliability(logits, targets, temperature=temperature))
    log_loss, squares = 0.0, 0.0
    own: dict[str, Any] = {}
    if multilabel:
        hits, wrong, missed = (np.zeros(width, np.int64) for _ in range(3))
        per_image = np.zeros((n, 3), np.int64)
        for part in slices(n, width):
            said, true = logits[part] > 0, targets[part] > 0.5
            log_loss += nll(logits[part], targets[part], temperature).sum(dtype=np.float64)
            squares += np.square(probabilities(logits[part], temperature, multilabel=True) - true).sum(dtype=np.float64)
            for place, cells in enumerate((said & true, said & ~true, ~said & true)):
                (hits, wrong, missed)[place][:] += cells.sum(axis=0)
                per_image[part, place] = cells.sum(axis=1)
        support = hits + missed
        squares /= width
    else:
        predicted, rank = np.zeros(n, np.int64), np.zeros(n, np.int64)
        columns = np.arange(width)
        for part in slices(n, width):
            values, true = logits[part], targets[part]
            own_value = values[np.arange(len(true)), true][:, None]
            predicted[part] = values.argmax(axis=1)
            # Equal logits count in the order of the classes, as argmax does.
            ahead = (values > own_value) | ((values == own_value) & (columns < true[:, None]))
            rank[part] = ahead.sum(axis=1)
            probs = np.exp(log_softmax(values, temperature))
            log_loss += nll(values, true, temperature).sum(dtype=np.float64)
            squares += np.square(probs).sum(dtype=np.float64) + len(true)
            squares -= 2 * probs[np.arange(len(true)), true].sum(dtype=np.float64)
        confusion = sparse.coo_array((np.ones(n, np.int64), (targets, predicted)), (width, width))
        confusion.sum_duplicates()
        support = np.bincount(targets, minlength=width)
        hits = np.bincount(targets[targets == predicted], minlength=width)
        wrong, missed = np.bincount(predicted, minlength=width) - hits, support - hits
    seen = support > 0
    recall = np.divide(hits, support, out=np.full(width, np.nan), where=seen)
    precision = np.divide(hits, hits + wrong, out=np.full(width, np.nan), where=hits + wrong > 0)
    f1 = np.divide(2 * hits, 2 * hits + wrong + missed, out=np.full(width, np.nan), where=seen)
    ap = _average_precision(logits, targets, multilabel)
    if multilabel:
        own["map"] = _mean(ap)
        own["micro_f1"], own["micro_f1_interval"] = _micro_f1(per_image)
    else:
        right = int(hits.sum())
        own["top1"] = right / n
        own["top1_interval"] = wilson(right, n)
        own["top5"] = float((rank < 5).mean())
        own["balanced_accuracy"] = _mean(recall)
        own["confusion"] = sorted(zip(*(axis.tolist() for axis in (*confusion.coords, confusion.data))))
        own["confusion"] = [list(cell) for cell in own["confusion"]]
    return {
        "n": n,
        "n_classes": width,
        "multilabel": multilabel,
        **own,
        "macro_f1": _mean(f1),
        "ece": ece,
        "mce": mce,
        "brier": float(squares / n),
        "nll": float(log_loss / n),
        "temperature": float(temperature),
        "empty_classes": [str(name) for name, there in zip(classes, seen) if not there],
        "per_class": [
            {
                "name": str(name),
                "support": int(support[i]),
                "precision": _plain(precision[i]),
                "recall": _plain(recall[i]),
                "f1": _plain(f1[i]),
                "average_precision": _plain(ap[i]),
            }
            for i, name in enumerate(classes)
        ],
    }


def wilson(right: int, n: int) -> list[float]:
    """Return Wilson's 95 % interval [low, high] of a proportion; sound for few images and for shares near 0 or 1."""
    # Written out: importing scipy.stats for it takes a second of every run.
    z = 1.959963984540054
    centre, spread = right / n + z * z / (2 * n), z * math.sqrt(right * (n - right) / n**3 + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)]


def most_confused(confusion: Sequence[Sequence[int]], classes: Sequence[str], k: int = 10) -> list[dict[str, Any]]:
    """Return the k most frequent errors: ``true``, ``predicted`` (class numbers), their names, ``count``, ``share``.

    Args:
        confusion: cells [true, predicted, count] as in ``evaluate``.
        classes: names of the classes.
        k: errors wanted; ``share`` is the part of the images of the true class.
    """
    support: dict[int, int] = {}
    for true, _, count in confusion:
        support[true] = support.get(true, 0) + count
    errors = sorted((cell for cell in confusion if cell[0] != cell[1]), key=lambda c: (-c[2], -c[2] / support[c[0]], c))
    return [
        {
            "true": true,
            "predicted": predicted,
            "true_name": str(classes[true]),
            "predicted_name": str(classes[predicted]),
            "count": count,
            "share": count / support[true],
        }
        for true, predicted, count in (tuple(cell) for cell in errors[:k])
    ]


def confused_rows(
    logits: np.ndarray, targets: np.ndarray, rows: np.ndarray, true: int, predicted: int, k: int = 3
) -> list[int]:
    """Return up to k rows of images of class ``true`` that were taken for ``predicted``, the clearest first."""
    members = np.flatnonzero(targets == true)
    values = logits[members]
    taken = values.argmax(axis=1) == predicted
    lead = values[taken, predicted] - values[taken, true]
    return [int(row) for row in rows[members[taken][np.argsort(-lead, kind="stable")[:k]]]]


def worst_errors(
    logits: np.ndarray, targets: np.ndarray, rows: np.ndarray, k: int = 24, *, temperature: float = 1.0
) -> list[dict[str, Any]]:
    """Return the k most confident mistakes: ``row``, ``true``, ``predicted`` (lists of class numbers), ``confidence``.

    With several labels an image counts once, by its most confident wrong decision: ``confidence`` is the probability
    given to the wrong side, and ``predicted`` lists all classes above 0.5.

    Args:
        logits: (N, C).
        targets: class numbers (N,), or zeros and ones (N, C).
        rows: the images' rows in the index (N,).
        k: mistakes wanted.
        temperature: divides the logits.
    """
    multilabel = check(logits, targets)
    if len(rows) != len(logits):
        raise InputError(f"{len(rows)} rows for {len(logits)} images: give one row per image")
    doubt = np.zeros(len(logits), np.float32)  # confidence in what is wrong; 0 where all is right
    for part in slices(*logits.shape):
        probs = probabilities(logits[part], temperature, multilabel=multilabel)
        if multilabel:
            against = np.where(targets[part] > 0.5, 1 - probs, probs)
            doubt[part] = np.where((logits[part] > 0) != (targets[part] > 0.5), against, 0).max(axis=1)
        else:
            doubt[part] = np.where(logits[part].argmax(axis=1) == targets[part], 0, probs.max(axis=1))
    order = np.argsort(-doubt, kind="stable")[:k]
    return [
        {
            "row": int(rows[i]),
            "true": np.flatnonzero(targets[i] > 0.5).tolist() if multilabel else [int(targets[i])],
            "predicted": np.flatnonzero(logits[i] > 0).tolist() if multilabel else [int(logits[i].argmax())],
            "confidence": float(doubt[i]),
        }
        for i in order
        if doubt[i] > 0
    ]


def _average_precision(logits: np.ndarray, targets: np.ndarray, multilabel: bool) -> np.ndarray:
    """Return each class's average precision (C,), NaN where no image has the class.

    It is the mean, over the class's images, of the precision at that image's score: only those images need a search in
    the sorted scores. Softmax probabilities are comparable between images, raw logits are not, hence the normaliser.
    """
    n, width = logits.shape
    shift = np.zeros(n, np.float32)
    if not multilabel:
        for part in slices(n, width):
            top = logits[part].max(axis=1).astype(np.float32)
            shift[part] = top + np.log(np.exp(logits[part].astype(np.float32) - top[:, None]).sum(axis=1))
    result = np.full(width, np.nan)
    for block in slices(width, n):  # columns
        scores = np.ascontiguousarray((logits[:, block].astype(np.float32) - shift[:, None]).T)  # (c, N)
        for column, values in enumerate(scores, start=block.start):
            mine = np.sort(values[(targets[:, column] > 0.5) if multilabel else (targets == column)])
            if len(mine) == 0:
                continue
            values.sort()
            reached = n - np.searchsorted(values, mine, side="left")
            reached_mine = len(mine) - np.searchsorted(mine, mine, side="left")
            result[column] = float((reached_mine / reached).mean())
    return result


def _micro_f1(cells: np.ndarray) -> tuple[float, list[float]]:
    """Return micro F1 and its 95 % bootstrap interval from per-image counts (N, 3) of hits, false and missed labels."""

    def f1(total: np.ndarray) -> float:
        hits, wrong, missed = (int(value) for value in total)
        return 2 * hits / max(1, 2 * hits + wrong + missed)

    rng = np.random.default_rng(0)
    draws = [f1(cells[rng.integers(len(cells), size=len(cells))].sum(axis=0)) for _ in range(_RESAMPLES)]
    return f1(cells.sum(axis=0)), [float(value) for value in np.quantile(draws, (0.025, 0.975))]


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
