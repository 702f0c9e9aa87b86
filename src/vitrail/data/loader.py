"""Batches of pixels in an order, and with random numbers, that depend on nothing but the seed.

A worker builds whole batches. Nothing here grows with the data set but the order of the epoch, eight bytes an image.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitrail.data.cache import PixelCache
from vitrail.data.decode import decode_array
from vitrail.data.views import View
from vitrail.errors import InputError, RunError, VitrailError

START_METHOD = "forkserver"
PRELOADED = ["vitrail.data.loader", "torchvision.transforms.v2"]
"""Imported once by the fork server, instead of by each worker of each epoch."""
GROUP_BYTES = 2**20
"""Small images of one size go through a view together, up to this size; photos go one by one."""


class Images(Protocol):
    """What the loader needs of an index; ``vitrail.data.index.Index`` is one."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """Return the image's name for the user."""
        ...

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """Return int64 (N,), or float32 multi-hot (N, C)."""
        ...

    def read(self, row: int) -> bytes | np.ndarray:
        """Return an encoded file, or uint8 pixels."""
        ...


class Loader:
    """The batches of one epoch from ``first_batch`` on; can be iterated more than once. Built by ``make_loader``."""

    def __init__(self, batches: _Batches, first_batch: int, workers: int) -> None:
        self._batches = batches
        self._numbers = range(first_batch, len(batches))
        self._workers = workers

    def __len__(self) -> int:
        """Return the number of batches that an iteration yields."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._workers == 0:
            for number in self._numbers:
                yield self._batches[number]
            return
        context = torch.multiprocessing.get_context(START_METHOD)
        context.set_forkserver_preload(PRELOADED)
        batches = iter(
            DataLoader(
                self._batches,
                batch_size=None,
                sampler=self._numbers,
                num_workers=self._workers,
                collate_fn=_unchanged,
                worker_init_fn=_end_with_parent,
                multiprocessing_context=context,
                generator=torch.Generator(),  # else the global generator would be drawn from
            )
        )
        for number in self._numbers:
            try:
                batch = next(batches)
            except (RuntimeError, ConnectionError, EOFError) as error:
                # The last two are of a worker that died after it announced a batch and before this process fetched it.
                if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                    raise
                cause = str(error).split("\n")[0] or type(error).__name__
                raise RunError(
                    f"a loader worker died at batch {number} ({cause}); most often the memory or "
                    "/dev/shm is full: run again with fewer workers (train.workers), 0 for none"
                ) from error
            yield batch


def _end_with_parent(_: int) -> None:
    """Start a thread that ends this worker when the process that reads from it has ended, however it did.

    torch's workers watch the process that forked them, which here is the fork server; it waits for them in turn, so
    that a killed run would leave both behind.
    """
    reader = multiprocessing.parent_process()
    if reader is None:  # not in a worker
        return

    def watch() -> None:
        reader.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_loader(
    index: Images,
    rows: np.ndarray,
    views: Mapping[str, View],
    *,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    first_batch: int = 0,
    shuffle: bool,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    cache: PixelCache | None = None,
    weights: np.ndarray | None = None,
    drop_last: bool = False,
) -> Loader:
    """Return the batches of one epoch, of one process.

    A batch is ``{"image": uint8 (B, 3, H, W), "target": int64 (B,) or float32 (B, C), "row": int64 (B,), "failed":
    list[str]}`` with one entry of pixels per view; their memory is channels-last. Joint batch b is a function of
    (seed, epoch, b), and rank r takes its samples r, r + world, r + 2 world ... The random numbers of a view are a
    function of (seed, epoch, row, name of the view). So pixels and order are the same for any number of workers.

    An image that cannot be read is left out of its batch and its key listed under ``failed``. A batch may so be empty
    (B = 0), as may the last one of a process; it is yielded all the same, for all processes to count alike.

    Workers are started by a fork server, which imports the libraries once for all epochs. A script that uses workers
    needs the usual ``if __name__ == "__main__":``.

    Args:
        index: the images.
        rows: rows of the index that make up the epoch, int64 (N,).
        views: what is done to an image, by entry of the batch; all must decode alike.
        batch_size: images of a joint batch, over all processes.
        seed: any integer.
        epoch: 0 or more.
        first_batch: joint batches to skip, without decoding anything.
        shuffle: permute the rows; otherwise they come as they are.
        rank, world: this process and the number of processes.
        workers: processes that decode; 0 is none.
        cache: decoded pixels of ``index``; never changes what is seen.
        weights: of the rows, not negative (N,); N rows are then drawn with replacement. Needs ``shuffle``.
        drop_last: leave out a last joint batch that is not full.

    Raises:
        InputError: for arguments out of their range.
    """
    rows = np.asarray(rows, np.int64)
    _check(index, rows, views, batch_size, epoch, rank, world, workers, cache, weights, shuffle)
    order = rows[_order(len(rows), seed, epoch, weights)] if shuffle else rows
    if drop_last:
        order = order[: len(order) // batch_size * batch_size]
    batches = _Batches(index, order, dict(views), batch_size, seed, epoch, rank, world, cache)
    if not 0 <= first_batch <= len(batches):
        raise InputError(f"first_batch = {first_batch} is not in 0 to {len(batches)}, the batches of this epoch")
    return Loader(batches, first_batch, workers)


class _Batches(Dataset[dict[str, Any]]):
    """Joint batches of an epoch by number, in the part that falls to one process."""

    def __init__(
        self,
        index: Images,
        order: np.ndarray,
        views: dict[str, View],
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int,
        world: int,
        cache: PixelCache | None,
    ) -> None:
        self.index, self.order, self.views, self.batch_size, self.cache = index, order, views, batch_size, cache
        self.rank, self.world = rank, world
        self.randoms = {name: _RowRandom(seed, epoch, name) for name in views}

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        start = number * self.batch_size
        rows = self.order[start : start + self.batch_size][self.rank :: self.world]
        pixels = {name: np.empty((len(rows), *view.preprocess.size, 3), np.uint8) for name, view in self.views.items()}
        kept: list[int] = []
        failed: list[str] = []
        group: list[np.ndarray] = []

        def view_group() -> None:
            done = slice(len(kept) - len(group), len(kept))
            for name, view in self.views.items():
                pixels[name][done] = view.batch(group, map(self.randoms[name], kept[done]))
            group.clear()

        for row in rows.tolist():
            try:
                image = self._pixels(row)
            except (VitrailError, OSError):
                failed.append(self.index.key(row))
                continue
            if group and (image.shape != group[0].shape or len(group) * image.nbytes >= GROUP_BYTES):
                view_group()
            kept.append(row)
            group.append(image)
        if group:
            view_group()
        batch: dict[str, Any] = {
            name: torch.from_numpy(array[: len(kept)]).permute(0, 3, 1, 2) for name, array in pixels.items()
        }
        found = np.asarray(kept, np.int64)
        batch["target"] = torch.from_numpy(np.array(self.index.targets(found)))
        batch["row"] = torch.from_numpy(found)
        batch["failed"] = failed
        return batch

    def _pixels(self, row: int) -> np.ndarray:
        """Decode once for all views, or not at all."""
        if self.cache is not None:
            cached = self.cache.get(row)
            if cached is not None:
                return cached
        blob = self.index.read(row)
        view = next(iter(self.views.values()))
        pixels = decode_array(blob, background=view.background, max_pixels=view.max_pixels)
        if self.cache is not None and isinstance(blob, bytes):
            self.cache.put(row, pixels)
        return pixels


class _RowRandom:
    """Gives each row its own stretch of one counter-based random stream.

    Philox computes its numbers from a key (seed, epoch, view) and a counter (row), so that setting the counter takes
    the place of seeding a generator for each image, which takes as long as decoding a small one. The generator
    returned is good until the next call.
    """

    def __init__(self, seed: int, epoch: int, name: str) -> None:
        self._key = np.array([seed % 2**64, epoch << 32 | zlib.crc32(name.encode())], np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=self._key))

    def __call__(self, row: int) -> np.random.Generator:
        self._generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": np.array([0, 0, row, 0], np.uint64), "key": self._key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


def _order(count: int, seed: int, epoch: int, weights: np.ndarray | None) -> np.ndarray:
    """Return the places in the order of this epoch: a permutation, or draws with replacement."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])))
    if weights is None:
        return rng.permutation(count)
    chances = np.asarray(weights, np.float64)
    return rng.choice(count, count, p=chances / chances.sum())


def _check(
    index: Images,
    rows: np.ndarray,
    views: Mapping[str, View],
    batch_size: int,
    epoch: int,
    rank: int,
    world: int,
    workers: int,
    cache: PixelCache | None,
    weights: np.ndarray | None,
    shuffle: bool,
) -> None:
    if rows.ndim != 1 or (len(rows) and (rows.min() < 0 or rows.max() >= len(index))):
        raise InputError(f"rows must be a list of numbers from 0 to {len(index) - 1}, the rows of this index")
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size} is not allowed: give at least 1")
    if not 0 <= rank < world:
        raise InputError(f"rank = {rank} of world = {world} is not allowed: give a rank from 0 to world - 1")
    if workers < 0:
        raise InputError(f"train.workers = {workers} is not allowed: give 0 (none) or more")
    if not 0 <= epoch < 2**32:
        raise InputError(f"epoch = {epoch} is not allowed: give 0 or more")
    taken = {"target", "row", "failed"} & set(views)
    if not views or taken:
        raise InputError(f"views {sorted(views)} are not allowed: give at least one, none named target, row or failed")
    if len({(view.background, view.max_pixels) for view in views.values()}) > 1:
        raise InputError("the views differ in background or max_pixels: build them together with build_views")
    if cache is not None and cache.rows != len(index):
        raise InputError(
            f"the cache is for {cache.rows} images, the index has {len(index)}: make a cache for this index"
        )
    if weights is None:
        return
    if not shuffle:
        raise InputError("weights need shuffle=True, as the rows are drawn at random")
    weights = np.asarray(weights)
    if weights.shape != rows.shape or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
        raise InputError(f"weights must be {len(rows)} numbers, one per row, not negative and not all zero")


def _unchanged(batch: Any) -> Any:
    return batch
