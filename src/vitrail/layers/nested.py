"""Nested representations: of an embedding every leading part, 8, 16, 32 ... numbers long, is an embedding by itself.

Kusupati et al., "Matryoshka Representation Learning" (NeurIPS 2022), arXiv 2205.13147, and the authors' code
(RAIVNLab/MRL). The same loss is asked of the first d numbers for every d of a list, and summed: by a classifier for
each d (MRL), by one whose weights they share (MRL-E), or by what compares embeddings, of images or of images and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError

SMALLEST = 8
"""Least of the published dimensions."""


def nested_dims(width: int, dims: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the dimensions of an embedding's nested parts, of which the whole is the last.

    Args:
        width: of the whole embedding.
        dims: growing, each from 1 to ``width``, which is added where it is missing; None: the powers of two from 8, as
            published.

    Raises:
        InputError: numbers that are not so.
    """
    if dims is None:
        dims = [SMALLEST * 2**n for n in range(width.bit_length()) if SMALLEST * 2**n < width]
    whole = all(isinstance(dim, int) for dim in dims)
    if not whole or list(dims) != sorted(set(dims)) or any(not 1 <= dim <= width for dim in dims):
        raise InputError(
            f"dims = {list(dims)!r} is not allowed: give growing whole numbers from 1 to the width, {width}"
        )
    return (*(dim for dim in dims if dim < width), width)


def nested_weights(dims: Sequence[int], weights: Sequence[float] | None) -> tuple[float, ...]:
    """Return the weight of each dimension's loss: as given, or 1, as published.

    Raises:
        InputError: another number of weights than of dimensions, or none above 0, or one below.
    """
    if weights is None:
        return (1.0,) * len(dims)
    numbers = all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in weights)
    if not numbers or len(weights) != len(dims) or not any(weights):
        raise InputError(
            f"weights = {list(weights)!r} is not allowed: give one number from 0 for each of the dimensions "
            f"{', '.join(map(str, dims))}, and one of them above 0"
        )
    return tuple(map(float, weights))


def truncated(embeddings: Tensor, dim: int) -> Tensor:
    """Return the first ``dim`` numbers of embeddings (..., D), scaled to length one, in float32 at least."""
    part = embeddings[..., :dim]
    return F.normalize(part if part.dtype.itemsize >= 4 else part.float(), dim=-1)


def nested_loss(
    loss: Callable[..., Tensor],
    *embeddings: Tensor,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Return the weighted sum, over dimensions, of a loss of embeddings that are cut short and scaled to length one.

    Args:
        loss: takes as many embeddings (B, d) and returns a scalar; for images and texts, their contrastive loss.
        embeddings: (B, D) each, of images, of their other views, of their texts.
        dims: as of ``nested_dims``, for D.
        weights: one per dimension, from 0; None: 1 each.

    Raises:
        InputError: embeddings of different widths, or dimensions or weights that do not fit.
    """
    widths = {embedding.shape[-1] for embedding in embeddings}
    if len(widths) != 1:
        raise InputError(f"embeddings of the widths {sorted(widths)} are not allowed: give one or more of one width")
    chosen = nested_dims(widths.pop(), dims)
    terms = [
        weight * loss(*(truncated(embedding, dim) for embedding in embeddings))
        for dim, weight in zip(chosen, nested_weights(chosen, weights))
        if weight
    ]
    return sum(terms[1:], terms[0])


class NestedLinear(nn.Linear):
    """A linear classifier that can also answer from the first numbers of its input alone.

    To all that asks for no dimension it is the linear layer of the whole width.

    Args:
        in_features: D.
        out_features: classes.
        dims: as of ``nested_dims``.
        independent: have a layer for each dimension (MRL); else the columns of one serve them all (MRL-E).
        bias, device, dtype: as of ``nn.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dims: Sequence[int] | None = None,
        independent: bool = False,
        bias: bool = True,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **place)
        self.dims = nested_dims(in_features, dims)
        few = self.dims[:-1] if independent else ()
        self.smaller = nn.ModuleList(nn.Linear(dim, out_features, bias, **place) for dim in few)

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., classes) of the whole (..., D)."""
        logits = super().forward(input)
        if self.training and len(self.smaller):
            # A gradient of zero in place of none, which is an error among several processes.
            logits = logits + 0 * sum(value.sum() for value in self.smaller.parameters())
        return logits

    def logits(self, x: Tensor, dim: int) -> Tensor:
        """Return the logits (..., classes) that the first ``dim`` numbers of (..., D) give, ``dim`` one of ``dims``.

        Raises:
            InputError: another dimension.
        """
        self.check(dim)
        if len(self.smaller) and dim < self.in_features:
            found: Tensor = self.smaller[self.dims.index(dim)](x[..., :dim])
            return found
        return leading_logits(self, x, dim)

    def check(self, dim: int) -> None:
        """Raise an ``InputError`` unless ``dim`` is one of ``dims``."""
        if dim not in self.dims:
            raise InputError(f"dim = {dim!r} is not allowed: this net is nested in {', '.join(map(str, self.dims))}")

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{super().extra_repr()}, dims={self.dims}"


def leading_logits(layer: nn.Linear, x: Tensor, dim: int) -> Tensor:
    """Return what a linear layer's first ``dim`` columns make of the first ``dim`` numbers of (..., D)."""
    return F.linear(x[..., :dim], layer.weight[:, :dim], layer.bias)


def nested_classifier(model: nn.Module) -> NestedLinear | None:
    """Return the nested classifier that a model has, or None."""
    return next((module for module in model.modules() if isinstance(module, NestedLinear)), None)


def its_nested_classifier(model: nn.Module) -> NestedLinear:
    """Return the nested classifier that a model has.

    Raises:
        InputError: it has none.
    """
    found = nested_classifier(model)
    if found is None:
        raise InputError(f"{type(model).__name__} is not nested: add the edit mrl, as model.edits=[{{name='mrl'}}]")
    return found


def linear_classifier(model: Any) -> nn.Linear | None:
    """Return the one linear layer that classifies, by timm's surface, or None where there is another number of them."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    layers = (
        [layer for layer in found.modules() if isinstance(layer, nn.Linear)] if isinstance(found, nn.Module) else []
    )
    own = [layer for layer in layers if isinstance(layer, NestedLinear)] or layers
    return own[0] if len(own) == 1 else None


def with_embedding(model: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (B, classes) of a model, and what its classifier ``layer`` saw, (B, D)."""
    seen: list[Tensor] = []
    # The hook lives for this call only, so that copies of the model do not carry it.
    hook = layer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    try:
        logits = model(images)
    finally:
        hook.remove()
    return logits, seen[0]
