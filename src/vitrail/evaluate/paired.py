"""Is one model better than another, over seeds and on the same images: paired differences, their spread, and Holm.

Two things vary: which images happen to be held out, and the seed of the training. The bootstrap draws both anew. Images
that belong together (near duplicates, one patient) are drawn together. What the seeds add beyond the chance of single
images is widened as Student's t asks, because a few values understate their own spread: an interval from three seeds
should cover as often as it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from vitrail.errors import InputError

RESAMPLES = 4000
CHUNK = 2_000_000
"""Numbers drawn at a time."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, its 95 % interval, and a two-sided p-value for no difference."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray | None = None) -> Difference:
    """Compare two arms on the same held-out images and the same seeds.

    Args:
        ours, theirs: scores (S, N) of S seeds on N images, higher is better: right or wrong, or a number.
        groups: a number per image (N,), the same for images that are drawn together; each by itself by default.

    Raises:
        InputError: the arrays differ in shape, or are empty.
    """
    ours, theirs = (np.atleast_2d(np.asarray(scores, np.float64)) for scores in (ours, theirs))
    if ours.shape != theirs.shape or not ours.size:
        raise InputError(
            f"cannot compare scores of shapes {ours.shape} and {theirs.shape}: give the same seeds, images"
        )
    seeds = len(ours)
    _, owner = np.unique(np.arange(ours.shape[1]) if groups is None else groups, return_inverse=True)
    sizes = np.bincount(owner).astype(np.float64)
    # Sums of the differences per seed and group of images.
    sums = np.stack([np.bincount(owner, weights=row, minlength=len(sizes)) for row in ours - theirs])
    widening = _widening(sums, sizes)
    rng = np.random.default_rng(0)
    found = []
    for count in _chunks(len(sizes)):
        images = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=count)
        means = (images @ sums.T) / (images @ sizes)[:, None]  # (count, seeds)
        drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
        found.append(means.mean(1) + widening * ((drawn - 1 / seeds) * means).sum(1))
    values = np.concatenate(found)
    low, high = np.quantile(values, (0.025, 0.975))
    tail = min((values <= 0).mean(), (values >= 0).mean())
    p = min(1.0, 2 * max(float(tail), 1 / len(values)))
    return Difference(float((ours - theirs).mean()), float(low), float(high), p)


def holm(p_values: list[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm, 1979), in the given order."""
    order = np.argsort(p_values)
    corrected = [0.0] * len(p_values)
    running = 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = running
    return corrected


def _widening(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Return the factor of the resampled seeds' deviations: their own spread, as wide as few values ask."""
    seeds = len(sums)
    means = sums.sum(1) / sizes.sum()
    if seeds == 1 or not means.var():
        return 0.0
    # What is left of a seed and a group without the effects of both is chance that the drawing of images accounts for.
    rest = sums - np.outer(means, sizes) - (sums.mean(0) - means.mean() * sizes)
    chance = np.square(rest).sum() / (seeds - 1) / sizes.sum() ** 2
    own = max(0.0, 1 - chance / means.var(ddof=1))
    return math.sqrt(own * seeds / (seeds - 1)) * float(stats.t.ppf(0.975, seeds - 1) / stats.norm.ppf(0.975))


def _chunks(width: int) -> list[int]:
    size = max(1, CHUNK // width)
    whole, rest = divmod(RESAMPLES, size)
    return [size] * whole + ([rest] if rest else [])
