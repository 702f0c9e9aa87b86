"""Normalised softmax: features on a sphere, classes as points on it, and new classes by the mean of some examples.

Pereira, Joly, Valduriez and Porto, "Hyperspherical embedding for novel class classification" (2021), arXiv 2102.03243,
as in the authors' code (R-S-P-MODELS/pyopenset); the loss is of Wang, Xiang, Cheng and Yuille, "NormFace" (2017).

A linear layer embeds the features; an embedding is brought to length s, and its logits are products with one vector of
length one per class, without bias. After each step of the optimiser the vectors are brought back to length one. So
embeddings of a class gather around its vector, with no pairs of images compared, and the mean of the embeddings of a
class that was never trained serves as its vector: ``evaluate/novel_classes.py``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.edits.classifier import replace_classifiers
from vitrail.edits.surgery import Edit
from vitrail.errors import InputError


class UnitSphereHead(nn.Module):
    """A classifier by cosine.

    Args:
        in_features: D.
        num_classes: K.
        embed_dim: E, dimensions of the embedding, 1 or more; 0 takes the features as they are, E = D.
        scale: s, the length that embeddings get, above 0; published: 10, and 20.
        axis: of the input, that holds the features.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        embed_dim: int = 60,
        scale: float = 10.0,
        axis: int = -1,
    ) -> None:
        super().__init__()
        if not isinstance(embed_dim, int) or embed_dim < 0:
            raise InputError(
                f"unit_sphere_classes: embed_dim = {embed_dim!r} is not allowed: give 1 or more, or 0 for none"
            )
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise InputError(f"unit_sphere_classes: scale = {scale!r} is not allowed: give a number above 0")
        self.in_features, self.out_features, self.scale, self.axis = in_features, num_classes, scale, axis
        self.embedding = nn.Linear(in_features, embed_dim) if embed_dim else nn.Identity()
        self.weight = nn.Parameter(torch.empty(num_classes, embed_dim or in_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw class vectors, all directions being equally likely, and the embedding as Keras does."""
        self.weight.copy_(F.normalize(torch.randn_like(self.weight), dim=1))
        if isinstance(self.embedding, nn.Linear):
            nn.init.xavier_uniform_(self.embedding.weight)
            nn.init.zeros_(self.embedding.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Return the embeddings (..., E) of features (..., D), of any length."""
        return self.embedding(x)

    def classify(self, embedding: Tensor) -> Tensor:
        """Return logits (..., K) of embeddings (..., E): -s to s, in float32 or better."""
        kind = embedding.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.classify(embedding.float())
        wide = torch.promote_types(embedding.dtype, torch.float32)
        return F.linear(self.scale * F.normalize(embedding.to(wide), dim=-1), self.weight.to(wide))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (..., K) of (..., D), or of what has D at ``axis``."""
        return self.classify(self.embed(x.movedim(self.axis, -1))).movedim(-1, self.axis)

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring the class vectors to length one."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{self.in_features}, {self.out_features}, scale={self.scale}"


def unit_sphere_classes(*, embed_dim: int = 60, scale: float = 10.0) -> Edit:
    """Return the edit that replaces a model's linear classifier by one of unit vectors on a sphere of embeddings.

    Trained by any method that trains classifiers; with ``Supervised``, which is the default, and no label smoothing it
    is the paper's normalised softmax loss. New classes are added by ``vitrail.evaluate.novel_classes.enrol``.

    Args:
        embed_dim: dimensions of the embedding, 1 or more; published: 60. 0 takes the features as they are.
        scale: the length of embeddings, above 0, which is the largest logit; published: 10, and 20.

    Raises:
        InputError: a number out of range; or, from the edit, a model without a linear classifier (the text lists what
            it has).

    Example:
        >>> model = unit_sphere_classes(scale=10)(timm.create_model("resnet18"))          # doctest: +SKIP
    """
    UnitSphereHead(1, 1, embed_dim=embed_dim, scale=scale)  # refuse a wrong number now, not when the edit is applied

    def edit(model: nn.Module) -> nn.Module:
        def build(features: int, classes: int, axis: int) -> nn.Module:
            return UnitSphereHead(features, classes, embed_dim=embed_dim, scale=scale, axis=axis)

        return replace_classifiers(model, build)

    return edit
