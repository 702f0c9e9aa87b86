"""Answers to class imbalance: weights of the loss, or of the sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vitrail.data.index import Index


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Return a loss weight per class, float32 (C,): inverse to its images, with mean 1 over all images.

    A class without images, which has no terms, gets 1.
    """
    counts = np.asarray(counts, dtype=np.float64)
    present = counts > 0
    weights = np.ones(len(counts), dtype=np.float32)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


def image_weights(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return a sampling weight per row: inverse to the images of its class, of its rarest class if it has several."""
    rarity = 1 / np.maximum(index.counts("train"), 1)
    weights = np.empty(len(rows))
    for start in range(0, len(rows), 4096):
        targets = index.targets(rows[start : start + 4096])
        weights[start : start + 4096] = rarity[targets] if targets.ndim == 1 else (targets * rarity).max(1)
    return weights
