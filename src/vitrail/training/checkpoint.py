"""Checkpoints: written whole or not at all, checked when read, the last two kept."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from vitrail.errors import RunError
from vitrail.runs import atomic_path

KEEP = 2


class Checkpoints:
    """The checkpoints of one run, one file per step: ``step-00000120.pt``.

    ``torch.save`` writes a zip file, which holds a checksum (CRC-32) of every tensor; reading verifies all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Return the file of ``step``."""
        return self.folder / f"step-{step:08d}.pt"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, the newest first."""
        found = (re.fullmatch(r"step-(\d+)\.pt", path.name) for path in self.folder.glob("step-*.pt"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def save(self, step: int, state: dict[str, Any], also: Iterable[int] = ()) -> None:
        """Write ``state``, then delete all but the newest two and the steps ``also``.

        Raises:
            RunError: it could not be written; the checkpoints before it are intact.
        """
        try:
            with atomic_path(self.path(step)) as temporary, temporary.open("wb") as file:
                _write(state, file)
        except OSError as error:
            raise RunError(
                f"cannot write the checkpoint {self.path(step)}: {error.strerror or error}; mend this and run the same "
                "command again (the earlier checkpoints are intact)"
            ) from error
        for old in set(self.steps()[KEEP:]) - {step, *also}:
            self.path(old).unlink(missing_ok=True)

    def load(self, step: int) -> dict[str, Any]:
        """Read and verify one checkpoint; a ``RunError`` says that it is damaged."""
        path = self.path(step)
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is None:
                return torch.load(path, map_location="cpu", weights_only=True)
            reason = f"{damaged} does not match its checksum"
        except Exception as error:  # noqa: BLE001 - a damaged archive fails in many ways, in zipfile and in torch
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"the checkpoint {path} is damaged: {reason}")

    def latest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the newest undamaged checkpoint, None if there is none at all; damaged ones are told to ``warn``.

        Raises:
            RunError: there are checkpoints and all are damaged.
        """
        for leftover in self.folder.glob(".step-*.part"):
            leftover.unlink(missing_ok=True)
        steps = self.steps()
        for step in steps:
            try:
                return self.load(step)
            except RunError as error:
                warn(f"{error}; going on from the one before")
        if steps:
            raise RunError(
                f"all checkpoints in {self.folder} are damaged; put a copy back, or delete that folder to train from "
                "the start"
            )
        return None


def _write(state: dict[str, Any], file: Any) -> None:
    try:
        torch.save(state, file)
        file.flush()
    except RuntimeError as error:
        # torch reports a failed write as an inconsistent position; what the system said is underneath.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                raise cause from None
            cause = cause.__context__
        raise
