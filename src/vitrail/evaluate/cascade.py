"""Adaptive classification: use as few numbers of a representation as an image needs.

Kusupati et al., "Matryoshka Representation Learning" (NeurIPS 2022), section 4.2.1 and appendix D, and the authors'
notebook: from the smallest dimension upwards, the first whose confidence is above its threshold answers. A threshold is
that of the most accurate cascade of a dimension and the next, on images held out for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.evaluate.suite import evaluating
from vitrail.layers.nested import its_nested_classifier, truncated, with_embedding

GRID = np.linspace(0.1, 1, 100)
"""Thresholds that are tried, as published."""


@dataclass(frozen=True)
class Cascade:
    """The dimensions of a nested representation, and when to go on to the next.

    Attributes:
        dims: growing.
        thresholds: one per dimension but the last.
    """

    dims: tuple[int, ...]
    thresholds: tuple[float, ...]

    def levels(self, confidence: np.ndarray, most: int | None = None) -> np.ndarray:
        """Return the number of the dimension that answers for each image, (N,).

        Args:
            confidence: of each dimension, (G, N).
            most: dimensions that are used, from 1; None: all.
        """
        used = len(self.dims) if most is None else most
        sure = confidence[: used - 1] > np.array(self.thresholds[: used - 1])[:, None]
        return np.where(sure.any(0), sure.argmax(0), used - 1) if used > 1 else np.zeros(confidence.shape[1], np.int64)

    def expected_dim(self, levels: np.ndarray) -> float:
        """Return the mean dimension over images."""
        return float(np.array(self.dims)[levels].mean())

    @torch.no_grad()
    def classify(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes (B,) of images (B, 3, H, W), and the dimension that each took, (B,).

        A classifier is asked only about the images of which those before it were not sure.
        """
        head = its_nested_classifier(model)
        with evaluating(model):
            embedding = with_embedding(model, head, images)[1]
        answers, dims = (torch.zeros(len(images), dtype=torch.long, device=images.device) for _ in range(2))
        rest = torch.arange(len(images), device=images.device)
        for dim, threshold in zip(self.dims, (*self.thresholds, -1.0)):
            confidence, said = head.logits(embedding[rest], dim).float().softmax(-1).max(-1)
            sure = confidence > threshold
            answers[rest[sure]], dims[rest[sure]] = said[sure], dim
            rest = rest[~sure]
        return answers, dims


def fit_cascade(dims: Sequence[int], confidence: np.ndarray, right: np.ndarray) -> Cascade:
    """Return the cascade whose thresholds are learned from held-out images.

    Args:
        dims: G, growing.
        confidence: largest probability at each dimension, (G, N).
        right: whether the class of that probability is the true one, (G, N).

    Raises:
        InputError: shapes that differ, or no image.
    """
    confidence, right = np.asarray(confidence), np.asarray(right, bool)
    if confidence.ndim != 2 or confidence.shape != right.shape or confidence.shape[0] != len(dims) or not right.size:
        raise InputError(
            f"a cascade of {len(dims)} dimensions got confidences {confidence.shape} and answers {right.shape}: give "
            "both as (dimensions, images), with one image or more"
        )
    thresholds = []
    for level in range(len(dims) - 1):
        rightly = [np.where(confidence[level] > t, right[level], right[level + 1]).sum() for t in GRID]
        thresholds.append(float(GRID[int(np.argmax(rightly))]))  # the first of the best, which is the smallest
    return Cascade(tuple(dims), tuple(thresholds))


@torch.no_grad()
def nested_answers(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return confidence and rightness of each dimension, (G, N) each, embeddings (N, D) and targets, of a nested model.

    Args:
        model: after the edit ``mrl:nested_head``.
        batches: images (B, 3, H, W) as the model takes them, and targets (B,), or multi-hot (B, C), of which any may be
            the answer.
    """
    head = its_nested_classifier(model)
    place = head.weight.device
    parts: list[tuple[np.ndarray, ...]] = []
    with evaluating(model):
        for images, target in batches:
            embedding = with_embedding(model, head, images.to(place))[1]
            logits = torch.stack([head.logits(embedding, dim) for dim in head.dims]).float().cpu()  # (G, B, C)
            confidence, said = logits.softmax(-1).max(-1)
            right = said == target if target.ndim == 1 else target.gt(0.5)[torch.arange(len(target)), said]
            parts.append((confidence.numpy(), right.numpy(), embedding.float().cpu().numpy(), target.numpy()))
    if not parts:
        raise InputError("no image was given to a nested model: give one or more")
    confidences, rights, embeddings, targets = zip(*parts)
    return (
        np.concatenate(confidences, 1),
        np.concatenate(rights, 1),
        np.concatenate(embeddings),
        np.concatenate(targets),
    )


def nearest_right(dim: int, queries: np.ndarray, truth: np.ndarray, database: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of queries whose nearest neighbour, by the cosine of ``dim`` numbers, is of their class.

    Args:
        dim: leading numbers of embeddings (N, D) and (M, D) that are used.
        queries, database: embeddings.
        truth, labels: their classes (N,) and (M,), or multi-hot: a shared one makes a match.
    """
    keys = truncated(torch.from_numpy(database), dim)
    parts = torch.from_numpy(queries).split(256)
    found = torch.cat([(truncated(part, dim) @ keys.T).argmax(1) for part in parts]).numpy()
    if truth.ndim == 1:
        return float((truth == labels[found]).mean())
    return float((truth * labels[found]).any(1).mean())
