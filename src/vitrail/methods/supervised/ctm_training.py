"""The training of Continuous Thought Machines: of all ticks, the best one and the surest one learn.

Darlow, Regan, Risi, Seely and Jones, "Continuous Thought Machines" (2025), arXiv 2505.05522, and the authors' code
(SakanaAI/continuous-thought-machines). No tick is told to answer: an input's loss is the mean of its least and of the
one at its most certain tick, so that thought takes as long as it helps. The net is ``vitrail.models.ctm``.

Shapes: B inputs, T ticks, P positions of an answer with K classes each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.method import Batch, Method
from vitrail.models.ctm import Synchronisation

OBJECTIVES = ("answer", "route", "sequence")
CHOICES = ("certain", "last")


def tick_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy at each tick and position, (B, T, P).

    Args:
        logits: (B, T, P, K), any floating type; the loss is computed in float32 at least.
        target: class numbers (B, P), or (B,) for one position; or probabilities (B, P K).

    Raises:
        InputError: shapes that do not go together.
    """
    batch, ticks, positions, classes = logits.shape
    shapes: list[tuple[int, ...]] = [(batch, positions)] + [(batch,)] * (positions == 1)
    if target.is_floating_point():
        shapes = [(batch, positions * classes)]
    if tuple(target.shape) not in shapes:
        raise InputError(
            f"targets {tuple(target.shape)} of {target.dtype} do not fit answers of {batch} x {positions} "
            f"positions with {classes} classes: give a class number for each position, or probabilities for each class "
            "of each"
        )
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    if target.is_floating_point():
        return -(target.to(log_p).view(batch, 1, positions, classes) * log_p).sum(-1)
    wanted = target.view(batch, 1, positions, 1).expand(-1, ticks, -1, -1)
    return -log_p.gather(-1, wanted).squeeze(-1)


def thought_loss(losses: Tensor, certainty: Tensor, choice: str = "certain") -> Tensor:
    """Return the mean of the least loss over ticks and of the one at the most certain tick, a mean over inputs.

    Args:
        losses: of each tick, (B, T).
        certainty: of each tick, (B, T); where it is greatest, no gradient asks.
        choice: ``"certain"``, or ``"last"`` for the last tick in its place.

    Returns:
        A scalar.
    """
    chosen = losses[:, -1] if choice == "last" else losses.gather(1, certainty.argmax(1, keepdim=True)).squeeze(1)
    return (losses.min(1).values + chosen).mean() / 2


def curriculum(logits: Tensor, target: Tensor, lookahead: int) -> Tensor:
    """Return which positions of a route are asked for, (B, P): those that some tick has right from the first on.

    And ``lookahead`` - 1 after the last of these, as published; where none is right, the first counts as if it were.

    Args:
        logits: (B, T, P, K).
        target: class numbers (B, P).
        lookahead: 1 or more.
    """
    right = logits.argmax(-1) == target.unsqueeze(1)  # (B, T, P)
    reached = right.cumprod(-1).sum(-1).amax(1).clamp(min=1)  # (B,)
    places = torch.arange(target.shape[1], device=target.device)
    return places < (reached - 1 + lookahead).unsqueeze(1)


def sequence_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the CTC loss of ticks that each say one class or the last, the blank.

    Args:
        logits: (B, T, K).
        target: what is to be said, class numbers (B, N) below K - 1, N at most T.

    Returns:
        A scalar: of each input divided by N, a mean over inputs.

    Raises:
        InputError: targets that are no sequences, or longer than there are ticks.
    """
    batch, ticks, classes = logits.shape
    if target.ndim != 2 or len(target) != batch or target.is_floating_point() or target.shape[1] > ticks:
        raise InputError(
            f"targets {tuple(target.shape)} of {target.dtype} cannot be said in {ticks} ticks: give class numbers "
            f"({batch}, N), N at most {ticks}"
        )
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).transpose(0, 1)
    lengths = [torch.full((batch,), length) for length in (ticks, target.shape[1])]
    return F.ctc_loss(log_p, target, lengths[0], lengths[1], blank=classes - 1)


class CTMTraining(Method):
    """Train a Continuous Thought Machine, or another net that answers at ticks.

    Args:
        model: with ``forward_ticks``, ``certainty`` and ``positions``, as ``vitrail.models.ctm`` has them.
        objective: ``"answer"``, for images and parity; ``"route"``, for mazes, which asks for moves up to a little
            beyond those that are right from the first on; ``"sequence"``, for sorting, in which a tick says one class.
        lookahead: of a route, how far beyond; published: 5.
        choice: which tick learns beside the best: ``"certain"`` or ``"last"``, which the published baselines have.
        multilabel: refused, as the loss is of one class per position.

    Raises:
        InputError: a model without ticks, or an option out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: str = "answer",
        lookahead: int = 5,
        choice: str = "certain",
        multilabel: bool = False,
    ) -> None:
        super().__init__(model)
        if not hasattr(model, "forward_ticks"):
            raise InputError(
                f"this training needs a model that answers at ticks, and {type(model).__name__} has no forward_ticks: "
                "set model.name to ctm_nano or another ctm_*"
            )
        if multilabel:
            raise InputError(
                "the training of ticks is for one label per image, and these data have several: use "
                "method.name='supervised'"
            )
        for name, value, allowed in (("objective", objective, OBJECTIVES), ("choice", choice, CHOICES)):
            if value not in allowed:
                raise InputError(f"method.options.{name} = {value!r} is not allowed: give one of {', '.join(allowed)}")
        if lookahead < 1:
            raise InputError(f"method.options.lookahead = {lookahead} is not allowed: give 1 or more")
        self.objective, self.lookahead, self.choice = objective, lookahead, choice

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` for ``image``, what the model takes, and ``target``: class numbers, routes or sequences."""
        model: Any = self.model
        flat, target = model.forward_ticks(batch["image"]), batch["target"]
        if self.objective == "sequence":
            return {"loss": sequence_loss(flat, target)}
        logits = flat.unflatten(-1, (model.positions, -1))
        losses = tick_losses(logits, target)
        if self.objective == "route":
            if target.ndim != 2 or target.is_floating_point():
                raise InputError(f"targets {tuple(target.shape)} are no routes: give a move for each position, (B, P)")
            asked = curriculum(logits.detach(), target, self.lookahead).unsqueeze(1).to(losses)
            losses = (losses * asked).sum(-1) / asked.sum(-1)
        else:
            losses = losses.mean(-1)
        return {"loss": thought_loss(losses, model.certainty(flat).detach(), self.choice)}

    def after_step(self) -> None:
        """Hold what is learnt within bounds, as published: decays that went beyond would have to come back first."""
        for module in self.model.modules():
            if isinstance(module, Synchronisation):
                module.hold()
