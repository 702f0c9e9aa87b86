"""Classes that a model was never trained on: enrolled from examples, and told apart from each other and from the old.

Pereira, Joly, Valduriez and Porto, "Hyperspherical embedding for novel class classification" (2021), arXiv 2102.03243,
as in the authors' code (R-S-P-MODELS/pyopenset). The vector of a new class is the mean of its examples' embeddings, all
of one length, brought to length one. In the disjoint scenario the new classes are the only answers, in the joint one
they stand beside those of training.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.batches import Batches
from vitrail.edits.unit_sphere_classes import UnitSphereHead
from vitrail.errors import InputError
from vitrail.evaluate.suite import evaluating
from vitrail.layers.embedding import embed

Embedded = tuple[Tensor, Tensor]
"""Embeddings (N, E) and their class numbers (N,)."""


def embedded(model: nn.Module, data: Batches) -> Embedded:
    """Return the embeddings of a stream of images with one label each, and their classes, in evaluation mode.

    Raises:
        InputError: the model has no embeddings, or the stream no images.
    """
    with evaluating(model):
        found = [(embed(model, images).float(), targets) for images, targets in data()]
    if not found:
        raise InputError("there are no images to embed: give a stream with one or more")
    return torch.cat([embedding for embedding, _ in found]), torch.cat([targets for _, targets in found])


def prototypes(examples: Embedded) -> Tensor:
    """Return a vector of length one for each class (K, E): the direction of its examples' mean, each of length one.

    Raises:
        InputError: a class from 0 to the largest has no example.
    """
    embeddings, targets = examples
    counts = targets.bincount()
    if not counts.all():
        missing = counts.eq(0).nonzero().flatten().tolist()
        raise InputError(f"the classes {missing[:5]} have no example: give each of {len(counts)} one or more")
    sums = torch.zeros(len(counts), embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)
    return F.normalize(sums.index_add(0, targets, F.normalize(embeddings, dim=1)), dim=1)


def nearest(embeddings: Tensor, vectors: Tensor) -> Tensor:
    """Return the class (N,) whose vector (K, E) has the largest cosine with each embedding (N, E)."""
    return (F.normalize(embeddings, dim=1) @ F.normalize(vectors, dim=1).T).argmax(1)


@dataclass(frozen=True)
class NovelAccuracy:
    """Shares of images that are answered rightly.

    Attributes:
        disjoint: images of new classes, among the new classes.
        joint: images of all classes, among all classes.
        joint_novel, joint_trained: images of the new, and of the trained classes, among all classes.
    """

    disjoint: float
    joint: float
    joint_novel: float
    joint_trained: float


def novel_accuracy(examples: Embedded, queries: Embedded, vectors: Tensor, trained_queries: Embedded) -> NovelAccuracy:
    """Enrol new classes from their examples, and measure in both scenarios.

    Args:
        examples: of the new classes, which are numbered from 0.
        queries: other images of these.
        vectors: of the trained classes (K, E): what the classifier learned, or ``prototypes`` of training images.
        trained_queries: images of the trained classes, numbered from 0.

    Raises:
        InputError: a new class has no example.
    """
    new = prototypes(examples)
    every = torch.cat([vectors, new])
    alone = nearest(queries[0], new) == queries[1]
    novel = nearest(queries[0], every) == queries[1] + len(vectors)
    trained = nearest(trained_queries[0], every) == trained_queries[1]
    shares = (float(each.double().mean()) for each in (alone, torch.cat([novel, trained]), novel, trained))
    return NovelAccuracy(*shares)


def enrol(model: nn.Module, data: Batches, *, joint: bool = True) -> nn.Module:
    """Return a copy of a model that knows new classes from examples, without training.

    Args:
        model: with the edit ``hyperspherical``.
        data: images of the new classes, numbered from 0.
        joint: the new classes come after those of the model; else in their place.

    Raises:
        InputError: the model has another classifier, or a class has no example.

    Example:
        >>> model = enrol(model, batches_of(index, rows, preprocess))          # doctest: +SKIP
    """
    surface: Any = model
    head = surface.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(head, UnitSphereHead):
        raise InputError(
            f"new classes need a classifier of unit vectors, and that of {type(model).__name__} is "
            f"{type(head).__name__}: train with the edit hyperspherical"
        )
    vectors = prototypes(embedded(model, data)).to(head.weight)
    grown: Any = copy.deepcopy(model)
    head = grown.get_classifier()
    head.weight = nn.Parameter(torch.cat([head.weight.detach(), vectors]) if joint else vectors)
    head.out_features = grown.num_classes = len(head.weight)
    return grown
