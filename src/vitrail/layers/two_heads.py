"""One classifier, or two of which the second learns from a teacher: the end of nets trained by distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitrail.errors import InputError


class TwoHeaded(nn.Module):
    """A net that ends with ``head`` and, where it is ``distilled``, with ``head_dist``, as timm's distilled nets do.

    Args:
        distilled: whether there are two; a prediction is the mean of both.
    """

    head: nn.Module
    head_dist: nn.Module

    def __init__(self, *, distilled: bool) -> None:
        super().__init__()
        self.distilled = distilled
        self.distilled_training = False

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let ``forward`` in training mode return the logits of both classifiers, as timm's distilled models do.

        Raises:
            InputError: there is one classifier.
        """
        if enable and not self.distilled:
            raise InputError(f"this {type(self).__name__} has one classifier: build it with distilled=True")
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier of the pooled features, or a list of both."""
        return nn.ModuleList((self.head, self.head_dist)) if self.distilled else self.head

    def put_heads(self, width: int, num_classes: int, like: Tensor) -> None:
        """Make new classifiers; 0 classes leave the features as they are.

        Args:
            width: of the features.
            num_classes: outputs.
            like: a weight on whose device and of whose type they are to be.
        """
        for name in ("head", "head_dist") if self.distilled else ("head",):
            head: nn.Module = nn.Identity()
            if num_classes:
                head = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)
                trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)
            setattr(self, name, head)

    def logits(self, features: Tensor) -> Any:
        """Return logits (B, classes) of features (B, width), or a pair after ``set_distilled_training``."""
        if not self.distilled:
            return self.head(features)
        both = self.head(features), self.head_dist(features)
        return both if self.distilled_training and self.training else (both[0] + both[1]) / 2


def fitting_heads(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights of two classifiers for a model of two, or for one: their mean, which predicts the same."""
    found = dict(state)
    if not getattr(model, "distilled", False):
        for kind in ("weight", "bias"):
            second = found.pop(f"head_dist.{kind}", None)
            if second is not None:
                found[f"head.{kind}"] = torch.lerp(found[f"head.{kind}"], second, 0.5)
    return found
