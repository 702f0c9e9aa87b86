"""Multi-instance prediction: which of many classes are in an image, when few are.

Anderson and Farrell, "Improving Fractal Pre-training" (WACV 2022), https://arxiv.org/abs/2110.03091, section 4.2. The
weight of the positive terms balances a handful of positives against a thousand classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.method import Batch, Method


def multi_instance_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return binary cross-entropy, the positive terms of an image weighted by C over the number of its positives.

    Args:
        logits: (B, C), any floating type; the loss is computed in float32.
        target: multi-hot (B, C).

    Returns:
        A scalar: the mean over images and classes.

    Raises:
        InputError: the shapes differ.
    """
    if logits.ndim != 2 or logits.shape != target.shape:
        raise InputError(
            f"multi-instance prediction compares logits {tuple(logits.shape)} with targets {tuple(target.shape)}: give "
            "both as (images, classes)"
        )
    logits, target = logits.float(), target.float()
    positives = target.sum(1, keepdim=True).clamp(min=1)
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=logits.shape[1] / positives)


class MultiInstance(Method):
    """Train ``model`` on images with several labels each, as fractals with ``instances`` above 1 have.

    Args:
        model: returns logits (B, C).
        multilabel: whether the data have several labels per image, which they need to have.
    """

    def __init__(self, model: nn.Module, *, multilabel: bool = True) -> None:
        super().__init__(model)
        if not multilabel:
            raise InputError(
                "multi-instance prediction needs data with several labels per image: give fractals with instances "
                "above 1, or set method.name = 'supervised'"
            )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` for ``image`` (B, 3, H, W) and the multi-hot ``target`` (B, C)."""
        return {"loss": multi_instance_loss(self.model(batch["image"]), batch["target"])}
