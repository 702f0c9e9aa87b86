"""How fast a run is, and what length of its plan the deadline allows."""

from __future__ import annotations

import math
import time
from collections import deque


class Pace:
    """Durations as measured by this process.

    Args:
        deadline: value of ``time.monotonic()`` at which everything is to be over, or None.
        eval_steps: steps between validations.
        val_share: validation images per training image of a step.
    """

    def __init__(self, deadline: float | None, eval_steps: int, val_share: float) -> None:
        self.deadline, self.eval_steps, self.val_share = deadline, eval_steps, val_share
        self.started = self.mark = time.monotonic()
        self.steps: deque[float] = deque(maxlen=50)
        self.validation: float | None = None
        self.checkpoint = 0.0
        self.replanned_at = -math.inf

    def step_done(self) -> float:
        """Book and return the seconds since the last step, or since what came between."""
        now = time.monotonic()
        seconds = now - self.mark
        self.steps.append(seconds)
        self.mark = now
        return seconds

    def aside(self) -> float:
        """Return the seconds since ``mark`` of something that is no step, and begin anew."""
        now = time.monotonic()
        seconds = now - self.mark
        self.mark = now
        return seconds

    def step(self) -> float:
        """Return the mean seconds of the last steps; 0 before the first."""
        return sum(self.steps) / len(self.steps) if self.steps else 0.0

    def last(self) -> float:
        """Return the seconds that the final validation and checkpoint will take, with a margin."""
        # Until a validation was measured: a forward pass takes at most half of a training step.
        validation = self.step() * self.val_share / 2 if self.validation is None else self.validation
        return 1.2 * (validation + 2 * self.checkpoint)

    def remaining(self, steps: int) -> float:
        """Return the seconds that ``steps`` more steps will take, validations included."""
        return steps * (self.step() + ((self.validation or 0.0) + self.checkpoint) / self.eval_steps) + self.last()

    def allowed(self, step: int, total: int, planned: int) -> int:
        """Return the number of steps after which a run that is at ``step`` has to end.

        It is ``total``, the present one, unless another fits the deadline clearly better; never more than ``planned``.
        """
        if self.deadline is None:
            return total
        now = time.monotonic()
        left = self.deadline - now - self.last()
        if left <= self.step():
            return step
        # The first steps of a process are slow, and a length that changes at every step helps nobody.
        if len(self.steps) < 5 or now - self.replanned_at < min(5.0, (self.deadline - self.started) / 50):
            return total
        self.replanned_at = now
        per_step = (self.remaining(total - step) - self.last()) / (total - step)
        fitting = min(step + max(int(0.95 * left / per_step), 1), planned)
        return total if abs(fitting - total) <= 0.04 * (total - step) else fitting
