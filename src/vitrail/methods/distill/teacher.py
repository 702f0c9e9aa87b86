"""What objectives with a teacher share: how it is kept, and out of what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.method import Method


class TaughtMethod(Method):
    """An objective with a teacher that sees the same images.

    The teacher is frozen and put into evaluation mode, follows the method to its device, and is no part of its
    parameters or state: it is neither trained, saved nor shipped.

    Args:
        model: the student.
        teacher: returns logits (B, C) of the same classes.
        otherwise: what to use without a teacher, for the message.

    Raises:
        InputError: no teacher, or the student as its own.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, *, otherwise: str) -> None:
        super().__init__(model)
        name = type(self).__name__
        if teacher is model:
            raise InputError(f"{name}: the teacher is the student itself, which would be frozen: give another network")
        if not isinstance(teacher, nn.Module):
            raise InputError(
                f"{name} needs a teacher and got {teacher!r}: set method.options.teacher to the folder of a finished "
                f"run of the same classes, or use {otherwise}, which needs none"
            )
        # In a tuple, a module is hidden from parameters(), state_dict() and train().
        self._teacher = (teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> nn.Module:
        """The frozen network."""
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.teacher._apply(fn)
        super()._apply(fn, recurse)
        return self
