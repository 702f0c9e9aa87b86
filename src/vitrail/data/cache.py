"""Decoded pixels on disk, so that the second epoch need not decode.

One file holds a header, a flag and a place per row of the index, and then pixels up to a bound. Every process that
opens it shares what the others wrote. It is read and written through the file, not mapped: a full disk is then an error
instead of a crash, and what was read does not count as memory of the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vitrail.errors import InputError
from vitrail.runs import atomic_path

HEADER = 64
"""Bytes: the fingerprint (32), then the pixels' bytes in use (8, little-endian)."""
PLACE = struct.Struct("<QII")
"""Offset in the file, height, width."""
EMPTY, CLAIMED, READY = b"\0", b"\1", b"\2"


class PixelCache:
    """A bounded cache of decoded images; holds no image in memory and is cheap to pickle.

    What cannot be stored (the bound is reached, the disk is full) is simply not cached. A row's flag is set after its
    bytes are written, so a process that is killed leaves no half-written image behind, and the file is started afresh
    after the machine went down, as the disk may then have kept the flag and lost the bytes.

    Args:
        path: of the file; its folder is created.
        bound_mb: most megabytes (2**20) of pixels.
        rows: number of rows of the index.
        fingerprint: stands for the images and how they are decoded; with another one the file is started afresh.

    Raises:
        InputError: for a bound below 1, or a path that cannot be written.
    """

    def __init__(self, path: str | Path, bound_mb: int, *, rows: int, fingerprint: str) -> None:
        if bound_mb < 1:
            raise InputError(f"train.cache_mb = {bound_mb} makes no cache: give at least 1, or pass no cache")
        self.path = Path(path)
        self.rows = rows
        self.bound = bound_mb * 2**20
        identity = f"vitrail pixels 1\n{fingerprint}\n{rows}\n{self.bound}\n{_boot()}"
        self._fingerprint = hashlib.sha256(identity.encode()).digest()
        self._places = HEADER + rows
        self._pixels = self._places + rows * PLACE.size
        self._file = -1
        self._opened_by = -1
        try:
            self._create()
        except OSError as error:
            raise InputError(
                f"cannot write the cache {self.path}: {error.strerror}; choose another folder or set train.cache_mb=0"
            ) from None

    def get(self, row: int) -> np.ndarray | None:
        """Return the pixels of a row, uint8 (H, W, 3), or None if they are not cached."""
        file = self._descriptor()
        if os.pread(file, 1, HEADER + row) != READY:
            return None
        offset, height, width = PLACE.unpack(os.pread(file, PLACE.size, self._places + row * PLACE.size))
        pixels = np.empty((height, width, 3), np.uint8)
        return pixels if os.preadv(file, [pixels.data.cast("B")], offset) == pixels.nbytes else None

    def put(self, row: int, pixels: np.ndarray) -> bool:
        """Store the pixels of a row, uint8 (H, W, 3); return whether they are stored by this call."""
        try:
            return self._put(row, pixels)
        except OSError:  # the disk is full: training goes on without
            return False

    def used(self) -> int:
        """Return the bytes of pixels in use."""
        return int.from_bytes(os.pread(self._descriptor(), 8, 32), "little")

    def _put(self, row: int, pixels: np.ndarray) -> bool:
        file = self._descriptor()
        with _locked(self.path):
            used = self.used()
            if used + pixels.nbytes > self.bound or os.pread(file, 1, HEADER + row) != EMPTY:
                return False
            os.pwrite(file, (used + pixels.nbytes).to_bytes(8, "little"), 32)
            os.pwrite(file, CLAIMED, HEADER + row)
        offset = self._pixels + used
        data = np.ascontiguousarray(pixels).data.cast("B")
        if os.pwrite(file, data, offset) != len(data):  # a file system may stop half-way when it fills up
            return False
        os.pwrite(file, PLACE.pack(offset, *pixels.shape[:2]), self._places + row * PLACE.size)
        os.pwrite(file, READY, HEADER + row)
        return True

    def _create(self) -> None:
        """Make the file unless it is there and fits."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
                if file.read(32) == self._fingerprint and os.fstat(file.fileno()).st_size >= self._pixels:
                    return
            # A new file is put in its place: a process that still uses the old one keeps it.
            with atomic_path(self.path) as temporary, temporary.open("wb") as file:
                file.write(self._fingerprint)
                file.truncate(self._pixels)

    def _descriptor(self) -> int:
        # Opened anew in each process.
        if self._opened_by != os.getpid():
            self._file = os.open(self.path, os.O_RDWR)
            self._opened_by = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": -1, "_opened_by": -1}

    def __del__(self) -> None:
        if getattr(self, "_opened_by", -1) == os.getpid():
            os.close(self._file)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside ``path`` against every other thread and process."""
    # Opened for each use: locks of one open file do not exclude threads or forked processes that share it.
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _boot() -> str:
    """Return what names the time since the machine was started, "" where it cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        return ""
