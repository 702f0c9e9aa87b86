"""What a model makes of an image before it classifies, and what its classifier makes of that."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitrail.errors import InputError


def embedding_head(model: nn.Module) -> Any:
    """Return the classifier of a model that gives embeddings: linear, or one with ``embed`` and ``classify``.

    Raises:
        InputError: the model has another classifier, or none.
    """
    surface: Any = model
    head = surface.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(head, nn.Linear) or (callable(getattr(head, "embed", None)) and hasattr(head, "classify")):
        return head
    raise InputError(
        f"embeddings are taken before a linear classifier, and that of {type(model).__name__} is "
        f"{type(head).__name__}: choose a model with one, or add the edit hyperspherical"
    )


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Return the embeddings (B, E) of images (B, 3, H, W): features before the classifier, or what it makes of them.

    Raises:
        InputError: as ``embedding_head``.
    """
    surface: Any = model
    head = embedding_head(model)
    features = surface.forward_head(surface.forward_features(images), pre_logits=True).flatten(1)
    return features if isinstance(head, nn.Linear) else head.embed(features)


def classify(model: nn.Module, embedding: Tensor) -> Tensor:
    """Return the logits (B, K) that a model's classifier gives embeddings (B, E)."""
    head = embedding_head(model)
    return head(embedding) if isinstance(head, nn.Linear) else head.classify(embedding)
