"""The wall clock of a run, over all its starts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from vitrail.errors import RunError
from vitrail.runs import read_json, write_json


class Clock:
    """Counts the active seconds of a run per stage and keeps them on disk, so that a killed run's budget goes on.

    Args:
        path: JSON file that holds the seconds spent by earlier starts.
        seconds: budget of the whole run, or None.
        started: ``time.monotonic()`` when this process began.
    """

    def __init__(self, path: Path, seconds: float | None, started: float) -> None:
        self.path = path
        self.seconds = seconds
        self.stages: dict[str, float] = {}
        if path.exists():
            with contextlib.suppress(RunError):  # a damaged clock costs the count, not the run
                self.stages = {str(name): float(spent) for name, spent in read_json(path).items()}
        self._stage = "start"
        self._since = self._saved = started

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Attribute the time within to ``name``, and the time since the last stage to ``start``."""
        self._settle()
        self._stage = name
        try:
            yield
        finally:
            self._settle()
            self._stage = "start"
            self.save()

    def tick(self) -> None:
        """Save now and then; called at every event."""
        if time.monotonic() - self._saved > 5:
            self._settle()
            self.save()

    def save(self) -> None:
        """Write the seconds spent so far."""
        self._saved = time.monotonic()
        write_json(self.path, {name: round(spent, 3) for name, spent in self.stages.items()})

    @property
    def spent(self) -> float:
        """Seconds spent by all starts of the run."""
        return sum(self.stages.values()) + time.monotonic() - self._since

    @property
    def deadline(self) -> float | None:
        """``time.monotonic()`` at which the budget ends."""
        return None if self.seconds is None else time.monotonic() + self.seconds - self.spent

    def _settle(self) -> None:
        now = time.monotonic()
        self.stages[self._stage] = self.stages.get(self._stage, 0.0) + now - self._since
        self._since = now
