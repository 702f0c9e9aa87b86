"""Metric learning by pairs and triplets of a batch, on embeddings of length one.

Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping" (2006): images of a class are
drawn together, others are pushed a margin apart. Schroff, Kalenichenko and Philbin, "FaceNet" (2015): an image is to be
nearer to others of its class than to those of other classes, by a margin, which asks nothing of distances as such.

The embedding is what a model has before it classifies. The classifier learns beside, from embeddings through which no
gradient flows, so that what ships can also name the classes it was trained on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.embedding import classify, embed, embedding_head
from vitrail.methods.method import Batch, Method
from vitrail.methods.supervised.supervised import supervised_loss


def squared_distances(embedding: Tensor) -> Tensor:
    """Return the squared distances (B, B), 0 to 4, of embeddings (B, E) brought to length one; float32 at least."""
    wide = torch.promote_types(embedding.dtype, torch.float32)
    with torch.autocast(embedding.device.type, enabled=False):
        unit = F.normalize(embedding.to(wide), dim=1)
        # Through a distance of zero flows no gradient, so that its root may be taken.
        return (2 - 2 * unit @ unit.T).clamp_min(0)


def contrastive_loss(embedding: Tensor, target: Tensor, *, margin: float = 1.0) -> Tensor:
    """Return the contrastive loss of all pairs of a batch; pairs of one class and of two weigh the same together.

    Half the squared distance for a pair of one class, half the square of what is missing from the margin for others.

    Args:
        embedding: (B, E), of any length.
        target: class numbers (B,).
        margin: distance to keep, above 0 and up to 2, the diameter.

    Returns:
        A scalar; 0 for a batch without pairs.
    """
    squares = squared_distances(embedding)
    first, second = torch.triu_indices(len(target), len(target), 1, device=target.device)
    squares, same = squares[first, second], target[first] == target[second]
    apart = (margin - squares.sqrt()).clamp_min(0).square()
    return _mean(squares / 2, same) + _mean(apart / 2, ~same)


def triplet_loss(embedding: Tensor, target: Tensor, *, margin: float = 0.2) -> Tensor:
    """Return the mean loss of all pairs of one class, each with a semi-hard negative of the batch.

    That is the nearest to the first image among those of other classes that are farther from it than the second; where
    there is none, the farthest. The loss is by how much its squared distance fails to exceed that of the pair by the
    margin.

    Args:
        embedding: (B, E), of any length.
        target: class numbers (B,).
        margin: between squared distances, above 0 and up to 4.

    Returns:
        A scalar; 0 for a batch without triplets.
    """
    squares = squared_distances(embedding)
    same = target[:, None] == target
    others, count = squares.masked_fill(same, torch.inf).sort(1)[0], (~same).sum(1, keepdim=True)
    place = torch.searchsorted(others.detach(), squares.detach().contiguous(), right=True)
    negative = others.gather(1, torch.minimum(place, count - 1).clamp_min(0))
    pairs = same & ~torch.eye(len(target), dtype=torch.bool, device=target.device)
    # An image without a negative has one at an infinite distance, and no loss.
    return _mean((squares - negative + margin).clamp_min(0), pairs)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen values, 0 of none, with a gradient in any case."""
    return values.where(chosen, 0).sum() / chosen.sum().clamp_min(1)


class _MetricTraining(Method):
    """Train embeddings by ``metric``, and the classifier on what they are.

    Args:
        model: with a linear classifier, or the edit ``hyperspherical``.
        margin: of the metric.
        most: the largest margin that there can be.
        multilabel: several labels per image, which is refused.
    """

    def __init__(self, model: nn.Module, margin: float, most: float, multilabel: bool) -> None:
        super().__init__(model)
        if not isinstance(margin, int | float) or not 0 < margin <= most or math.isnan(margin):
            raise InputError(f"method.options.margin = {margin!r} is not allowed: give a number above 0, up to {most}")
        if multilabel:
            raise InputError("pairs of images are of one class or of two: give data with one label per image")
        embedding_head(model)  # refuse a model without embeddings now
        self.margin = margin

    def metric(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Return the loss of embeddings (B, E) and class numbers (B,)."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss``, its parts ``metric`` and ``supervised``, for ``image`` (B, 3, H, W) and ``target`` (B,)."""
        target = batch["target"]
        if target.ndim > 1:
            raise InputError("pairs of mixed images are of no one class: set augment.mixup = 0 and augment.cutmix = 0")
        embedding = embed(self.model, batch["image"])
        metric = self.metric(embedding, target)
        supervised = supervised_loss(classify(self.model, embedding.detach()), target)
        return {"loss": metric + supervised, "metric": metric.detach(), "supervised": supervised.detach()}


class TripletTraining(_MetricTraining):
    """Train embeddings by triplets of a batch, as FaceNet, and the classifier beside.

    Args:
        model: with a linear classifier, or the edit ``hyperspherical``.
        margin: between squared distances on the sphere of radius one, above 0 and up to 4; published: 0.2.
        multilabel: several labels per image, which is refused.

    Raises:
        InputError: a margin out of range, several labels, mixed images, or a model without embeddings.

    Example:
        vitrail fit --set method.name=hyperspherical:TripletTraining
    """

    def __init__(self, model: nn.Module, *, margin: float = 0.2, multilabel: bool = False) -> None:
        super().__init__(model, margin, 4, multilabel)

    def metric(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Return ``triplet_loss``."""
        return triplet_loss(embedding, target, margin=self.margin)


class ContrastiveTraining(_MetricTraining):
    """Train embeddings by pairs of a batch, and the classifier beside.

    Args:
        model: with a linear classifier, or the edit ``hyperspherical``.
        margin: distance on the sphere of radius one, above 0 and up to 2; usual: 1.
        multilabel: several labels per image, which is refused.

    Raises:
        InputError: a margin out of range, several labels, mixed images, or a model without embeddings.

    Example:
        vitrail fit --set method.name=hyperspherical:ContrastiveTraining
    """

    def __init__(self, model: nn.Module, *, margin: float = 1.0, multilabel: bool = False) -> None:
        super().__init__(model, margin, 2, multilabel)

    def metric(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Return ``contrastive_loss``."""
        return contrastive_loss(embedding, target, margin=self.margin)
