"""Nested embeddings without labels: two views of an image find each other by every leading part of what embeds them.

Kusupati et al., "Matryoshka Representation Learning" (NeurIPS 2022), arXiv 2205.13147, section 3 and appendix C: for
contrastive training the embeddings are cut to each dimension, scaled to length one, and contrasted by themselves, as
the paper does for ALIGN's images and texts. ``nested_loss`` does so for any loss; ``info_nce`` is ALIGN's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.nested import linear_classifier, nested_dims, nested_loss, nested_weights, with_embedding
from vitrail.methods.method import Batch, Method
from vitrail.methods.supervised.supervised import supervised_loss


def info_nce(first: Tensor, second: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """Return the loss of finding each embedding's partner among those of the batch, in both directions.

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018), as ALIGN and CLIP have it
    for images and texts: the mean of two cross-entropies over the cosines of all pairs, divided by the temperature.

    Args:
        first, second: (B, d), of length one; row i of one is the partner of row i of the other.
        temperature: above 0; may be learned.

    Returns:
        A scalar, float32 at least.
    """
    cosines = first @ second.T / temperature
    partner = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(cosines, partner) + F.cross_entropy(cosines.T, partner)) / 2


class MatryoshkaContrastive(Method):
    """Train the representation of ``model`` so that two views of an image find each other at every dimension.

    What the classifier sees is the embedding. The classifier itself, if there are labels, is trained as a probe of it,
    and sends it no gradient. The other images of a process's batch are what an image is told apart from.

    Args:
        model: with one linear classifier, as by timm's surface.
        dims: growing, from 1 to the width of the representation; None: the powers of two from 8 to it.
        weights: of the dimensions' losses, from 0; None: 1 each.
        temperature: of the cosines, above 0.
        multilabel: of the probe: several labels per image.

    Raises:
        InputError: an argument out of range, or a model with another kind of classifier; in ``loss``, one image alone.
    """

    views: ClassVar[Mapping[str, str]] = {"image": "train", "partner": "train"}

    def __init__(
        self,
        model: nn.Module,
        *,
        dims: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        temperature: float = 0.1,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model)
        if not (isinstance(temperature, int | float) and 0 < temperature < float("inf")):
            raise InputError(f"method.options.temperature = {temperature!r} is not allowed: give a number above 0")
        self.dims = nested_dims(self._classifier().in_features, dims)
        self.weights = nested_weights(self.dims, weights)
        self.temperature, self.multilabel = temperature, multilabel

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` for ``image`` and ``partner`` (B, 3, H, W), and its terms ``contrast`` and ``probe``."""
        if len(batch["image"]) < 2:
            raise InputError("MatryoshkaContrastive tells images of a batch apart, and got one: give 2 or more")
        layer = self._classifier()
        _, embedding = with_embedding(self.model, layer, torch.cat((batch["image"], batch["partner"])))
        with torch.autocast(embedding.device.type, enabled=False):
            contrast = nested_loss(
                lambda first, second: info_nce(first, second, self.temperature),
                *embedding.float().chunk(2),
                dims=self.dims,
                weights=self.weights,
            )
        probe = self._probe(layer, embedding.detach(), torch.cat([batch["target"]] * 2))
        return {"loss": contrast + probe, "contrast": contrast.detach(), "probe": probe.detach()}

    def _probe(self, layer: nn.Linear, embedding: Tensor, target: Tensor) -> Tensor:
        """Return the loss of the classifier, of all its dimensions where it is nested."""
        of: Any = getattr(layer, "logits", None)
        answers = [of(embedding, dim) for dim in layer.dims] if of else [layer(embedding)]  # type: ignore[union-attr]
        terms = [supervised_loss(logits, target, multilabel=self.multilabel) for logits in answers]
        return sum(terms[1:], terms[0])

    def _classifier(self) -> nn.Linear:
        found = linear_classifier(self.model)
        if found is None:
            raise InputError(
                f"MatryoshkaContrastive needs a model with one linear classifier, and {type(self.model).__name__} has "
                "none, or several: choose another model"
            )
        return found
