"""Distillation to a second head: one classifier learns from the labels, the other from a teacher's answers.

Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021), arXiv 2012.12877;
GroupMamba (arXiv 2407.13772) and VCMamba (arXiv 2509.04669) train state-space networks with it, the first with hard
answers, the second with soft ones.
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
    """Train the first head of ``model`` by cross-entropy, and its second to answer as a teacher does.

    The loss is (1 - alpha) CE(first, target) + alpha d, where d is CE(second, argmax of the teacher's logits) or, for
    soft answers, temperature^2 / C KL(teacher || second), both softened by the temperature. In evaluation such a model
    gives the mean of both heads.

    Args:
        model: the student, with timm's ``set_distilled_training``: timm's ``deit_*_distilled_*``, ``levit_*`` and
            others, and GroupMamba and VCMamba with ``distilled=True``.
        teacher: returns logits (B, C) of the same classes; in a recipe, the path of its run folder.
        alpha: weight of what the teacher says, in [0, 1]; published: 0.5.
        temperature: of soft answers, above 0; published: 1. None takes hard ones.
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
        temperature: float | None = None,
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
        if temperature is not None and not (isinstance(temperature, int | float) and 0 < temperature < float("inf")):
            raise InputError(
                f"method.options.temperature = {temperature!r} is not allowed: give a number above 0, or none for hard "
                "answers"
            )
        if not (isinstance(smoothing, int | float) and 0 <= smoothing < 1):
            raise InputError(f"method.options.smoothing = {smoothing!r} is not allowed: give a number in [0, 1)")
        if not hasattr(model, "set_distilled_training"):
            raise InputError(
                f"TwoHeadDistillation needs a model with a second head, and {type(model).__name__} has one: use "
                "groupmamba_* or vcmamba_* with model.options.distilled=true, deit_*_distilled_* or levit_*, or the "
                "method nkd_uskd:NKD, which needs no second head"
            )
        self._both(True)  # refuse a model that could have two heads, and has one, now
        self._both(False)
        self.alpha, self.temperature, self.smoothing = alpha, temperature, smoothing

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``supervised`` and ``distilled`` for ``image`` (B, 3, H, W) and ``target``."""
        images, target = batch["image"], batch["target"]
        with torch.no_grad():
            answers = self.teacher(images).float()
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
        if self.temperature is None:
            distilled = F.cross_entropy(second, answers.argmax(1))
        else:
            said, wanted = ((logits / self.temperature).log_softmax(1) for logits in (second, answers))
            apart = F.kl_div(said, wanted, reduction="sum", log_target=True)
            distilled = self.temperature**2 * apart / said.numel()  # by the number of classes too, as published
        loss = (1 - self.alpha) * supervised + self.alpha * distilled
        return {"loss": loss, "supervised": supervised.detach(), "distilled": distilled.detach()}

    def _both(self, enable: bool) -> None:
        surface: Any = self.model
        surface.set_distilled_training(enable)
