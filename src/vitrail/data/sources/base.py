"""What every source of images has in common."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from vitrail.data.decode import UnreadableImage

Split = Literal["train", "val", "test"]

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

# Images all the same, but not for Pillow: a folder of these must not look empty.
_UNSUPPORTED = "heic heif jxl svg eps psd xcf dng cr2 cr3 nef arw orf rw2 raw"
UNSUPPORTED_EXTENSIONS = frozenset(f".{name}" for name in _UNSUPPORTED.split())

MAX_BYTES = 1 << 29
"""Largest encoded file that is read, in bytes; a larger one is reported as unreadable."""


class Record(NamedTuple):
    """One image of a source.

    Args:
        key: names the image to the user; stable from run to run.
        locator: what ``Source.read`` needs.
        labels: class names, none or several only for multi-label data.
        group: images of one group stay on one side of the split.
        split: the split that the data itself prescribes.
        problem: why this image is left out whatever its pixels are (no label, a link out of the folder), or None.
    """

    key: str
    locator: str
    labels: tuple[str, ...] = ()
    group: str | None = None
    split: Split | None = None
    problem: str | None = None


class Source(Protocol):
    """A stream of records, and access to each one's encoded file or pixels. Cheap to pickle; safe to read from threads.

    Attributes:
        uri: what the user gave, resolved.
        kind: ``folder``, ``manifest``, ``idx``, ``hf``, ``shards`` or ``digits``.
        multilabel: whether an image may have none or several labels.
    """

    uri: str
    kind: str
    multilabel: bool

    def records(self) -> Iterator[Record]:
        """Yield all records in a fixed order, those with a problem included."""
        ...

    def read(self, locator: str) -> bytes | np.ndarray:
        """Return the encoded file, or uint8 pixels (H, W) or (H, W, 3); raises ``UnreadableImage`` or ``OSError``."""
        ...

    def stamp(self, locator: str) -> str:
        """Return what changes when the image changes (size and time, say), cheaply; "" when that is not known."""
        ...


def clean_label(text: str) -> str:
    """Return a class name as it is compared: Unicode composed (NFC), no space around.

    Archives made on a Mac hold decomposed names, so that the same word would be two classes.
    """
    return unicodedata.normalize("NFC", text).strip()


def label_text(value: Any) -> str:
    """Return the class name for a value of a table or JSON: 3.0, as tables with gaps hold integers, is ``"3"``."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return clean_label(str(value))


def split_name(text: str) -> Split | None:
    """Return the split that a folder or a cell names, or None."""
    return SPLIT_NAMES.get(text.strip().lower())


def printable(name: str) -> str:
    """Return a file name with bytes that are no UTF-8 escaped, so that it can be stored and printed."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_utf8(name: str) -> bool:
    """Whether a file name as the system gives it is valid UTF-8."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_file(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file; a device, a pipe or a file beyond ``limit`` is an ``UnreadableImage``."""
    # Opening a pipe for reading would wait for a writer, so it is opened without blocking and looked at first.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("not a regular file")
        if status.st_size > limit:
            raise UnreadableImage(f"the file has {status.st_size} bytes, more than the {limit} that are read")
        return file.read()


def file_stamp(path: str | Path) -> str:
    """Return size and modification time of a file, or "" when it cannot be looked at."""
    try:
        status = os.stat(path)  # noqa: PTH116 - called once per image; a Path costs several times the call
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"
