"""Supervised training of nets with experts, with a loss that keeps tokens from going to the same few.

Xue et al., "Go Wider Instead of Deeper" (AAAI 2022), arXiv 2107.11817; the balance loss is that of Fedus et al.,
"Switch Transformers" (2021), and is ``vitrail.layers.experts.balance_loss``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.method import Batch
from vitrail.methods.supervised.supervised import Supervised, supervised_loss


class BalancedExperts(Supervised):
    """Train ``model`` on labelled images, and its router to use all experts alike.

    The loss is that of supervised training plus ``balance`` times the sum of the balance losses of all layers with
    experts. These are of the whole batch, and no mean over images.

    Args:
        model: with ``forward_balanced``, as ``vitrail.models.widenet`` has it.
        balance: weight of the balance losses, 0 or more; published: 0.01.
        smoothing: label smoothing, in [0, 1).
        class_weights: one factor per class, or None.
        multilabel: several labels per image.

    Raises:
        InputError: a model without experts, or an option out of range.

    Example:
        vitrail fit --set model.name=widenet_nano --set method.name=widenet:BalancedExperts
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        balance: float = 0.01,
        smoothing: float = 0.1,
        class_weights: Sequence[float] | Tensor | None = None,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model, smoothing=smoothing, class_weights=class_weights, multilabel=multilabel)
        if not balance >= 0:
            raise InputError(f"method.options.balance = {balance} is not allowed: give 0 or more, such as 0.01")
        if not hasattr(model, "forward_balanced"):
            raise InputError(
                f"this training needs a model with experts, and {type(model).__name__} has none: set model.name to "
                "widenet_nano or another widenet_*, or use method.name='supervised'"
            )
        self.balance = balance

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``supervised`` and ``unbalanced`` for ``image`` (B, 3, H, W) and ``target``.

        ``unbalanced`` is the sum of the balance losses, as many as there are layers where all experts are used alike.
        """
        model: Any = self.model
        logits, unbalanced = model.forward_balanced(batch["image"])
        supervised = supervised_loss(
            logits,
            batch["target"],
            smoothing=self.smoothing,
            class_weights=self.class_weights,
            multilabel=self.multilabel,
        )
        loss = supervised + self.balance * unbalanced
        return {"loss": loss, "supervised": supervised.detach(), "unbalanced": unbalanced.detach()}
