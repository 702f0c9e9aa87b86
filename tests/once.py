"""What is dear to make and good for all parallel workers is made by the first that asks."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock

from vitrail.checks.check import Context, Verdict


def made_once(name: str, make: Callable[[Path], None], factory: pytest.TempPathFactory) -> Path:
    """Return a folder of this call of pytest that ``make`` has filled; the other workers wait for it."""
    own = factory.getbasetemp()
    return _filled((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name, make)


def quick_run(check: ModuleType) -> tuple[Verdict, Path]:
    """Return the verdict of a check in quick mode, with one seed, and the folder where it drew.

    It is run once in all calls of pytest by ``make.py test``, which names a folder for that, else once in a process.
    """

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        (folder / "drawn").mkdir(exist_ok=True)
        verdict = check.run(Context(quick=True, seeds=(0,), folder=folder / "drawn"))
        (folder / "verdict").write_bytes(pickle.dumps(verdict))

    shared = os.environ.get("VITRAIL_TESTS_SHARED")
    folder = _filled((Path(shared) if shared else Path(_own().name)) / check.__name__, make)
    return pickle.loads((folder / "verdict").read_bytes()), folder / "drawn"


def _filled(folder: Path, make: Callable[[Path], None]) -> Path:
    done = folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder


@cache
def _own() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory()
