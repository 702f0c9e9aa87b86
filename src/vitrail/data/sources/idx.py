"""IDX files, the format of MNIST: a header of big-endian sizes, then the bytes."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from vitrail.data.sources.base import Record, Split, file_stamp
from vitrail.errors import DataError, InputError
from vitrail.runs import atomic_path

NAME = re.compile(
    r"^(?:(?P<set>.+)[-_])?(?P<part>train|t10k|test|val)-(?P<what>images|labels)[-.]idx\d-ubyte(?P<gz>\.gz)?$",
    re.IGNORECASE,
)
SPLITS: dict[str, Split] = {"train": "train", "val": "val", "t10k": "test", "test": "test"}
CHUNK = 1 << 20


class IdxSource:
    """Images and labels of an IDX folder, memory-mapped; compressed files are unpacked once into ``cache``.

    Class names are the label numbers as text. ``t10k`` or ``test`` is the official test split.

    Args:
        folder: holds ``train-images-idx3-ubyte`` and its like, plain or ``.gz``.
        cache: folder for unpacked files.
    """

    kind = "idx"
    multilabel = False

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = Path(folder).resolve()
        self.uri = str(self.folder)
        self._files = {
            part: (_plain(images, cache), _plain(labels, cache))
            for part, (images, labels) in _pairs(self.folder).items()
        }
        self._stamps = {part: file_stamp(images) for part, (images, _) in self._files.items()}
        for images, labels in self._parts.values():
            if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
                raise DataError(
                    f"the images in {self.uri} have shape {images.shape}; needed is (N, H, W) or (N, H, W, 3)"
                )
            if labels.ndim != 1 or len(labels) != len(images):
                raise DataError(
                    f"{self.uri} has {len(images)} images but labels of shape {labels.shape}: the files do not belong "
                    "together; download both again"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_parts"}

    def records(self) -> Iterator[Record]:
        """Yield the images of each file in order: train, val, test."""
        for part, (_, labels) in self._parts.items():
            # One file alone prescribes no split.
            split = SPLITS[part] if len(self._parts) > 1 else None
            for start in range(0, len(labels), 4096):
                for number, label in enumerate(labels[start : start + 4096].tolist(), start):
                    name = f"{part}/{number}"
                    yield Record(name, name, (str(label),), split=split)

    def read(self, locator: str) -> np.ndarray:
        """Return the pixels of one image: (H, W) or (H, W, 3), uint8."""
        part, number = locator.split("/")
        return self._parts[part][0][int(number)]

    def stamp(self, locator: str) -> str:
        """Return size and time of the file that holds the image."""
        return self._stamps[locator.partition("/")[0]]

    @cached_property
    def _parts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {part: (_map(images), _map(labels)) for part, (images, labels) in self._files.items()}


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds at least one IDX file of images."""
    return any(match["what"].lower() == "images" for match, _ in _matches(folder))


def _matches(folder: Path) -> Iterator[tuple[re.Match[str], Path]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            match = NAME.match(entry.name)
            if match and entry.is_file():
                yield match, Path(entry.path)


def _pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the files of images and labels by part: train first, then val, then test."""
    found: dict[tuple[str, str], Path] = {}
    sets = set()
    for match, path in _matches(folder):
        sets.add(match["set"] or "")
        place = (match["part"].lower(), match["what"].lower())
        if place not in found or not match["gz"]:  # a plain file beside its compressed one is the cheaper to read
            found[place] = path
    if len(sets) > 1:
        raise InputError(
            f"{folder} holds several IDX sets ({', '.join(sorted(sets))}): move one of them to its own folder"
        )
    parts = [part for part in SPLITS if (part, "images") in found]
    for part in parts:
        if (part, "labels") not in found:
            raise InputError(
                f"{found[part, 'images']} has no file of labels beside it: put {part}-labels-idx1-ubyte there"
            )
    if {"t10k", "test"} <= set(parts):
        raise InputError(f"{folder} has both t10k and test files: keep one of them")
    return {part: (found[part, "images"], found[part, "labels"]) for part in parts}


def _header(file: IO[bytes], path: Path) -> tuple[int, tuple[int, ...]]:
    """Return the length of the header in bytes, and the shape."""
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or not 1 <= start[3] <= 4:
        raise DataError(f"{path} is not an IDX file (it starts with {start.hex() or 'nothing'}); download it again")
    if start[2] != 0x08:
        raise DataError(f"{path} holds IDX values of type 0x{start[2]:02x}; only bytes (0x08) are images or labels")
    sizes = file.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise DataError(f"{path} is cut off within its header; download it again")
    return 4 + len(sizes), tuple(int(size) for size in np.frombuffer(sizes, ">u4"))


def _map(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            offset, shape = _header(file, path)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if size != offset + math.prod(shape):
        raise DataError(
            f"{path} announces {' x '.join(map(str, shape))} bytes after a header of {offset}, but has {size} bytes in "
            "all: it is damaged; download it again"
        )
    if math.prod(shape) == 0:
        return np.zeros(shape, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r", offset, shape))  # a plain view of the map slices quicker


def _plain(path: Path, cache: Path) -> Path:
    """Return an uncompressed file: ``path`` itself, or its content unpacked in ``cache``."""
    if path.suffix.lower() != ".gz":
        return path
    name = hashlib.sha256(f"{path}:{file_stamp(path)}".encode()).hexdigest()[:24]
    target = cache / f"{name}.idx"
    if target.is_file():
        return target
    try:
        with gzip.open(path, "rb") as packed, atomic_path(target) as temporary, temporary.open("wb") as file:
            offset, shape = _header(cast(IO[bytes], packed), path)
            size = offset + math.prod(shape)
            # A small file can announce and unpack to anything: it may fill what is announced, where there is room.
            free = shutil.disk_usage(target.parent).free
            if size > free:
                raise DataError(f"{path} announces {size} bytes unpacked, and {target.parent} has {free} bytes free")
            packed.seek(0)
            written = 0
            while chunk := packed.read(CHUNK):
                written += len(chunk)
                if written > size:
                    break
                file.write(chunk)
            if written != size:
                more = "more" if written > size else f"only {written}"
                raise DataError(
                    f"{path} announces {size} bytes but unpacks to {more}: it is damaged; download it again"
                )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}): it is damaged; download it again") from None
    except OSError as error:
        raise InputError(f"cannot unpack {path} to {target}: {error.strerror or error}") from None
    return target
