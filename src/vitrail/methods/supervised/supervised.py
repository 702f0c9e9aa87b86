"""Plain supervised training: cross-entropy for one label per image, binary cross-entropy for several or on request.

Binary cross-entropy of one label per image follows Wightman, Touvron and Jégou, "ResNet strikes back" (2021), and DeiT
III: each class is asked for by itself, and an image mixed of two shows both. Label smoothing follows Szegedy et al.,
"Rethinking the Inception Architecture for Computer Vision" (2016), section 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.method import Batch, Method, one_hot_targets


def supervised_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    multilabel: bool = False,
) -> Tensor:
    """Return the mean loss of a batch.

    Unlike ``torch.nn.CrossEntropyLoss`` the weighted loss divides by the number of images and not by the sum of their
    weights: a mean over images is what data-parallel processes and accumulated parts average correctly.

    Args:
        logits: (B, C), any floating type; the loss is computed in float32.
        target: class numbers (B,) or probabilities (B, C); with ``multilabel`` multi-hot (B, C).
        smoothing: share of the target that is spread evenly over all classes, in [0, 1).
        class_weights: (C,), factor of each class's terms, mean about 1.
        multilabel: independent binary cross-entropy per class, summed over classes and divided by C.

    Returns:
        A scalar, float32.
    """
    logits = logits.float()
    target = one_hot_targets(target, logits.shape[-1]).to(logits)
    if multilabel:
        target = target * (1 - smoothing) + smoothing / 2
        terms = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (terms if class_weights is None else terms * class_weights).mean()
    target = target * (1 - smoothing) + smoothing / logits.shape[-1]
    if class_weights is not None:
        target = target * class_weights
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


class Supervised(Method):
    """Train ``model`` on labelled images.

    Args:
        model: returns logits (B, C).
        smoothing: label smoothing, in [0, 1).
        class_weights: one factor per class, or None.
        multilabel: several labels per image.
        binary: binary cross-entropy for one label per image, too; every class of an image that mixup or cutmix mixed
            then counts fully, whatever its share.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        smoothing: float = 0.1,
        class_weights: Sequence[float] | Tensor | None = None,
        multilabel: bool = False,
        binary: bool = False,
    ) -> None:
        super().__init__(model)
        if not 0 <= smoothing < 1:
            raise InputError(f"method.options.smoothing = {smoothing} is not allowed: give a number in [0, 1)")
        self.smoothing = smoothing
        self.multilabel = multilabel
        self.binary = binary
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` for ``image`` (B, 3, H, W) and ``target``."""
        logits, target = self.model(batch["image"]), batch["target"]
        if self.binary:
            target = one_hot_targets(target, logits.shape[-1]).gt(0)
        loss = supervised_loss(
            logits,
            target,
            smoothing=self.smoothing,
            class_weights=self.class_weights,
            multilabel=self.multilabel or self.binary,
        )
        return {"loss": loss}
