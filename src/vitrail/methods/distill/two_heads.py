"""Distillation to a second head: one classifier learns from the labels, the other from a teacher's answers.

Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021), arXiv 2012.12877;
GroupMamba (arXiv 2407.13772) trains state-space networks with it, of which the large ones are unstable without.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.distill.teacher import TaughtMethod
from vitrail.methods.method import Batch


class TwoHeadDistillation(TaughtMethod):
    """Train the first head of ``model`` by cross-entropy, and its second to name the class that a teacher names.

    The loss is (1 - alpha) CE(first, target) + alpha CE(second, argmax of the teacher's logits). In evaluation such a
    model gives the mean of both heads.

    Args:
        model: the student, with timm's ``set_distilled_training``: timm's ``deit_*_distilled_*``, ``levit_*`` and
            others, and GroupMamba with ``distilled=True``.
        teacher: returns logits (B, C) of the same classes; in a recipe, the path of its run folder.
        alpha: weight of what the teacher says, in [0, 1]; published: 0.5.
        smoothing: label smoothing of the first head's cross-entropy, in [0, 1); published: 0.1 without mixed images.
        multilabel: refused, as the loss is of one label per image.

    Raises:
        InputError: an argument out of range, several labels per image, no teacher, or a model with one head.

    Example:
        vitrail fit --set model.name=groupmamba_nano --set model.options.distilled=true
        --set method.name=groupmamba:TwoHeadDistillation --set method.options.teacher=runs/teacher
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 0.5,
        smoothing: float = 0.0,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model, teacher, otherwise="supervised")
        if multilabel:
            raise InputError(
                "TwoHeadDistillation is for one label per image, and these data have several: use "
                "method.name='supervised'"
            )
        if not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
            raise InputError(f"method.options.alpha = {alpha!r} is not allowed: give a number in [0, 1]")
        if not (isinstance(smoothing, int | float) and 0 <= smoothing < 1):
            raise InputError(f"method.options.smoothing = {smoothing!r} is not allowed: give a number in [0, 1)")
        if not hasattr(model, "set_distilled_training"):
            raise InputError(
                f"TwoHeadDistillation needs a model with a second head, and {type(model).__name__} has one: use "
                "groupmamba_* with model.options.distilled=true, deit_*_distilled_* or levit_*, or the method "
                "nkd_uskd:NKD, which needs no second head"
            )
        self._both(True)  # refuse a model that could have two heads, and has one, now
        self._both(False)
        self.alpha, self.smoothing = alpha, smoothing

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``supervised`` and ``distilled`` for ``image`` (B, 3, H, W) and ``target``."""
        images, target = batch["image"], batch["target"]
        with torch.no_grad():
            answers = self.teacher(images).argmax(1)
        self._both(True)  # in here alone: all others find a model of one output
        try:
            outputs = self.model(images)
        finally:
            self._both(False)
        if isinstance(outputs, Tensor):
            raise InputError("TwoHeadDistillation: in evaluation mode the model gives one output: call train() first")
        first, second = (logits.float() for logits in outputs)
        wanted = target if target.ndim == 1 else target.to(first)
        supervised = F.cross_entropy(first, wanted, label_smoothing=self.smoothing)
        distilled = F.cross_entropy(second, answers)
        loss = (1 - self.alpha) * supervised + self.alpha * distilled
        return {"loss": loss, "supervised": supervised.detach(), "distilled": distilled.detach()}

    def _both(self, enable: bool) -> None:
        surface: Any = self.model
        surface.set_distilled_training(enable)
