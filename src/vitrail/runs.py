"""What every command needs of its surroundings: the run folder with fixed names, atomic writes, offline mode.

A file is written beside its place, flushed to the disk and renamed, so that a reader, or a run that is killed and
started again, sees the old file or the new one and never a part.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitrail.errors import RunError


def offline() -> bool:
    """Whether the user asked for no network access."""
    names = ("VITRAIL_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in {"1", "true", "yes", "on"} for name in names)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if error.errno in (28, 122):  # no space left, quota exceeded
            raise RunError(
                f"cannot write {path}: the disk is full; free some space and run the same command again "
                "(everything written before is intact)"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Write JSON atomically; a value that is not finite is an error rather than invalid JSON."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or damaged file is a ``RunError`` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RunError(f"cannot read {path}: {reason}; is this a run folder of `vitrail fit`?") from None
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged ({error}); delete it and run the same fit command again") from None


class RunFolder:
    """The files of one run. Nothing is created before ``create`` is called."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    recipe = property(lambda self: self.path / "recipe.toml")
    data = property(lambda self: self.path / "data.json")
    split = property(lambda self: self.path / "split.csv")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    summary = property(lambda self: self.path / "summary.json")
    checkpoints = property(lambda self: self.path / "checkpoints")
    weights = property(lambda self: self.path / "model.safetensors")
    artefact = property(lambda self: self.path / "artefact.json")
    onnx = property(lambda self: self.path / "model.onnx")
    onnx_int8 = property(lambda self: self.path / "model.int8.onnx")
    report = property(lambda self: self.path / "report.html")
    environment = property(lambda self: self.path / "environment.json")
    model_card = property(lambda self: self.path / "MODEL_CARD.md")
    cache = property(lambda self: self.path / "cache")

    def create(self) -> None:
        """Create the folder, or explain why it cannot be used."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise RunError(
                f"cannot write to the run folder {self.path}: {error.strerror}; choose another folder with --out"
            ) from None
