"""Training a classifier whose answer can be had from the first numbers of its representation.

Kusupati et al., "Matryoshka Representation Learning" (NeurIPS 2022), arXiv 2205.13147, equation 1: the sum over
dimensions of the weighted cross-entropies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.nested import (
    NestedLinear,
    leading_logits,
    linear_classifier,
    nested_classifier,
    nested_dims,
    nested_weights,
    with_embedding,
)
from vitrail.methods.method import Batch, Method
from vitrail.methods.supervised.supervised import supervised_loss


class MatryoshkaTraining(Method):
    """Train ``model`` to classify by every leading part of its representation.

    Args:
        model: after the edit ``mrl:nested_head``; or any with one linear classifier, whose columns then serve all
            dimensions (MRL-E).
        dims: as of the edit; None: those of the model's nested head, else the powers of two from 8 to the width.
        weights: of the dimensions' losses, from 0; None: 1 each, as published.
        smoothing: label smoothing, in [0, 1); published: 0.1.
        class_weights: one factor per class, or None.
        multilabel: several labels per image.

    Raises:
        InputError: an argument out of range, a model with another kind of classifier, or other dimensions than it is
            nested in.

    Example:
        vitrail fit --matryoshka
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        dims: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        smoothing: float = 0.1,
        class_weights: Sequence[float] | Tensor | None = None,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model)
        if not (isinstance(smoothing, int | float) and 0 <= smoothing < 1):
            raise InputError(f"method.options.smoothing = {smoothing!r} is not allowed: give a number in [0, 1)")
        layer = self._classifier()
        own = layer.dims if isinstance(layer, NestedLinear) else None
        self.dims = nested_dims(layer.in_features, own if dims is None else dims)
        if own is not None and self.dims != own:
            raise InputError(
                f"method.options.dims = {list(self.dims)} is not allowed: the model is nested in {list(own)}; leave it "
                "out, or give the edit these"
            )
        self.weights = nested_weights(self.dims, weights)
        self.smoothing, self.multilabel = smoothing, multilabel
        factors = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", factors, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` for ``image`` (B, 3, H, W) and ``target``, and each dimension's own, ``dim_8`` and so on."""
        layer = self._classifier()
        logits, embedding = with_embedding(self.model, layer, batch["image"])
        of = layer.logits if isinstance(layer, NestedLinear) else lambda x, dim: leading_logits(layer, x, dim)
        terms = {
            dim: supervised_loss(
                logits if dim == self.dims[-1] else of(embedding, dim),
                batch["target"],
                smoothing=self.smoothing,
                class_weights=self.class_weights,
                multilabel=self.multilabel,
            )
            for dim in self.dims
        }
        loss = sum(weight * term for weight, term in zip(self.weights, terms.values()))
        return {"loss": loss, **{f"dim_{dim}": term.detach() for dim, term in terms.items()}}  # type: ignore[dict-item]

    def _classifier(self) -> nn.Linear:
        found = nested_classifier(self.model) or linear_classifier(self.model)
        if found is None:
            raise InputError(
                f"MatryoshkaTraining needs a model with one linear classifier, and {type(self.model).__name__} has "
                "none, or several: choose another model, or leave out the edit that replaced it"
            )
        return found
