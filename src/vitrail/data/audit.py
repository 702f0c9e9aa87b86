"""One pass over a data set, kept in SQLite: what cannot be read, what is there twice, what is labelled two ways.

The file has a row per listed image and a row of measurements per content. Measurements are used again as long as an
image's stamp (size and time), or the digest of its bytes, stays the same: a pass that was killed, or data that grew,
costs only what is new. Memory: some 60 bytes per image while near duplicates are sought, in numpy arrays; nothing else
grows with the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import sqlite3
import tempfile
import threading
import time
import unicodedata
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard, TypeVar

import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

from vitrail.data import duplicates
from vitrail.data.decode import UnreadableImage, decode_array
from vitrail.data.duplicates import Look
from vitrail.data.sources import Record, Source, Split
from vitrail.errors import InputError, RunError

if TYPE_CHECKING:
    from vitrail.training.recipe import DataConfig

T = TypeVar("T")
Progress = Callable[[int, int | None], None]
Embed = Callable[[list[Image.Image]], np.ndarray]
Twice = Literal["exact", "near"]

VERSION = "2"
EMBEDDING_SIMILARITY = 0.95
"""Least cosine between the embeddings of near duplicates. Measured with EfficientNet-Lite0: photos cropped by 3 % reach
0.953 and more, different photos 0.38 at most; of 79,800 pairs of different clip art 9 lie above."""
EXAMPLES = 20
"""Entries at most in each list of a summary; the full lists are streamed by the methods of ``Audit``."""
CHUNK = 64
"""Images that a thread measures in one go."""
LARGE = 25_000_000
"""Pixels beyond which images are decoded one at a time, to bound the memory of all threads together."""

COMMIT_SECONDS = 2.0
"""Work that a kill can cost."""
SMALL = 1 << 16
"""Pixels up to which grey arrays are measured in batches."""

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE images (
    id INTEGER PRIMARY KEY, key TEXT, locator TEXT, stamp TEXT, labels TEXT, grp TEXT, split TEXT, problem TEXT,
    content INTEGER,
    exact INTEGER, near INTEGER  -- the first image of the group of duplicates; NULL outside of any
);
CREATE INDEX images_locator ON images (locator);
CREATE INDEX images_exact ON images (exact) WHERE exact IS NOT NULL;
CREATE INDEX images_near ON images (near) WHERE near IS NOT NULL;
CREATE TABLE content (
    number INTEGER PRIMARY KEY, locator TEXT UNIQUE, stamp TEXT, sha256 BLOB, bytes INTEGER,
    width INTEGER, height INTEGER, mode TEXT, pixels BLOB, hash INTEGER, signature BLOB, blank INTEGER, error TEXT
);
CREATE INDEX content_pixels ON content (pixels) WHERE pixels IS NOT NULL;
CREATE VIEW readable AS
    SELECT images.*, bytes, width, height, mode, pixels, hash, signature, blank
    FROM images JOIN content ON number = content WHERE problem IS NULL AND error IS NULL;
CREATE VIEW unreadable AS
    SELECT id, key, error FROM images JOIN content ON number = content WHERE problem IS NULL AND error IS NOT NULL;
"""
FAST = "PRAGMA mmap_size = 1073741824"
PUT = f"INSERT OR REPLACE INTO content VALUES (NULL{', ?' * 12})"


class AuditRow(NamedTuple):
    """A readable image: its record, and the first image of its exact and of its near duplicates (or its own id)."""

    id: int
    key: str
    locator: str
    labels: tuple[str, ...]
    group: str | None
    split: Split | None
    exact: int
    near: int


class Audit:
    """The findings of a finished pass, read from its SQLite file.

    Args:
        path: the file that ``audit`` wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def rows(self) -> Iterator[AuditRow]:
        """Yield the readable images in the order of the source."""
        query = (
            "SELECT id, key, locator, labels, grp, split, coalesce(exact, id), coalesce(near, id) "
            "FROM readable ORDER BY id"
        )
        for number, key, locator, labels, *rest in self._query(query):
            yield AuditRow(number, key, locator, _labels(labels), *rest)

    def unreadable(self) -> Iterator[tuple[str, str]]:
        """Yield (key, reason) of the images that cannot be decoded."""
        yield from self._query("SELECT key, error FROM unreadable ORDER BY id")

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Yield (key, reason) of the entries that are left out whatever their pixels are."""
        yield from self._query("SELECT key, problem FROM images WHERE problem IS NOT NULL ORDER BY id")

    def blank(self) -> Iterator[str]:
        """Yield the keys of images of one colour."""
        for (key,) in self._query("SELECT key FROM readable WHERE blank ORDER BY id"):
            yield key

    def groups(self, kind: Twice = "near", having: str = "count(*) > 1") -> Iterator[list[dict[str, Any]]]:
        """Yield groups of duplicates, each a list of ``{"key", "labels", "split"}``.

        Args:
            kind: ``"exact"`` (the same pixels) or ``"near"``, which includes them.
            having: SQL condition on a group.
        """
        for (first,) in self._query(_groups(kind, having)):
            members = self._query(f"SELECT key, labels, split FROM readable WHERE {kind} = ? ORDER BY id", (first,))
            yield [{"key": key, "labels": list(_labels(labels)), "split": split} for key, labels, split in members]

    def leaks(self, kind: Twice = "near") -> Iterator[list[dict[str, Any]]]:
        """Yield the groups of duplicates with images in several of the given splits."""
        yield from self.groups(kind, LEAK)

    def conflicts(self, kind: Twice = "exact") -> Iterator[list[dict[str, Any]]]:
        """Yield the groups of duplicates whose labels differ."""
        yield from self.groups(kind, CONFLICT)

    def locators(self, keys: Iterable[str]) -> dict[str, str]:
        """Return what ``Source.read`` needs for each of a few keys, as far as they are known."""
        wanted = list(keys)
        marks = ", ".join("?" * len(wanted))
        return dict(self._query(f"SELECT key, locator FROM images WHERE key IN ({marks})", tuple(wanted)))

    def class_counts(self) -> dict[str, int]:
        """Return the readable images per class, by name."""
        return dict(
            self._query("SELECT value, count(*) FROM readable, json_each(labels) GROUP BY value ORDER BY value")
        )

    def classes_by_split(self) -> dict[Split | None, set[str]]:
        """Return the classes of each given split; labels of unreadable images count."""
        found: dict[Split | None, set[str]] = defaultdict(set)
        query = "SELECT DISTINCT split, value FROM images, json_each(labels) WHERE problem IS NULL"
        for split, name in self._query(query):
            found[split].add(name)
        return dict(found)

    @property
    def fingerprint(self) -> str:
        """A digest of the images, by content and label: another one after any change that a run would see."""
        return str(self._one("SELECT value FROM meta WHERE name = 'fingerprint'")[0])

    def summary(self) -> dict[str, Any]:
        """Return the findings as plain values for JSON; lists of examples hold ``EXAMPLES`` entries at most."""
        meta = dict(self._query("SELECT name, value FROM meta"))
        images, readable, size, unlabelled = self._one(
            "SELECT (SELECT count(*) FROM images), count(*), coalesce(sum(bytes), 0), coalesce(sum(labels = '[]'), 0) "
            "FROM readable"
        )
        counts = self.class_counts()
        return {
            "source": meta["uri"],
            "kind": meta["kind"],
            "images": images,
            "readable": readable,
            "bytes": size,
            "unlabelled": unlabelled,
            "classes": counts,
            "splits": dict(
                self._query("SELECT split, count(*) FROM readable WHERE split NOT NULL GROUP BY split ORDER BY split")
            ),
            "sizes": self._sizes(),
            "modes": dict(self._query("SELECT mode, count(*) FROM readable GROUP BY mode ORDER BY count(*) DESC")),
            "unreadable": self._reasons(self.unreadable(), "SELECT count(*) FROM unreadable"),
            "left_out": self._reasons(self.left_out(), "SELECT count(*) FROM images WHERE problem NOT NULL"),
            "blank": {
                "count": self._one("SELECT count(*) FROM readable WHERE blank")[0],
                "examples": list(islice(self.blank(), EXAMPLES)),
            },
            "exact_duplicates": self._twice("exact"),
            "near_duplicates": {"method": meta["method"], **self._twice("near")},
            "leakage": {"exact": self._twice("exact", LEAK), "near": self._twice("near", LEAK)},
            "conflicts": {"exact": self._twice("exact", CONFLICT), "near": self._twice("near", CONFLICT)},
            "suspicious_names": suspicious_names(counts),
            "problems": self._problems(counts),
            "seconds": float(meta["seconds"]),
            "measured": int(meta["measured"]),
            "cache": meta["cache"],
        }

    def _sizes(self) -> dict[str, Any]:
        """Return least, median and largest sides, and how many shorter sides lie between powers of two."""
        total = self._one("SELECT count(*) FROM readable")[0]
        sizes: dict[str, Any] = {}
        histogram: dict[str, int] = defaultdict(int)
        for name, value in {"width": "width", "height": "height", "shorter_side": "min(width, height)"}.items():
            seen = 0
            for side, count in self._query(f"SELECT {value} AS v, count(*) FROM readable GROUP BY v ORDER BY v"):
                place = sizes.setdefault(name, {"min": side, "median": side, "max": side})
                place["max"] = side
                if seen <= total // 2:
                    place["median"] = side
                seen += count
                if name == "shorter_side":
                    low = 1 << (side.bit_length() - 1)
                    histogram[f"{low}-{2 * low - 1}"] += count
        return {**sizes, "histogram": dict(histogram)}

    def _reasons(self, entries: Iterator[tuple[str, str]], count: str) -> dict[str, Any]:
        examples = [{"key": key, "reason": reason} for key, reason in islice(entries, EXAMPLES)]
        return {"count": self._one(count)[0], "examples": examples}

    def _twice(self, kind: Twice, having: str = "count(*) > 1") -> dict[str, Any]:
        groups, images, largest = self._one(
            f"SELECT count(*), coalesce(sum(n), 0), coalesce(max(n), 0) "
            f"FROM (SELECT count(*) AS n FROM readable WHERE {kind} NOT NULL GROUP BY {kind} HAVING {having})"
        )
        examples = [group[:EXAMPLES] for group in islice(self.groups(kind, having), EXAMPLES)]
        return {"groups": groups, "images": images, "largest": largest, "examples": examples}

    def _problems(self, counts: dict[str, int]) -> list[str]:
        """Return what a user should know before training, a line each."""
        problems = []
        if len(counts) < 2:
            problems.append(f"{len(counts)} class with readable images; training needs two")
        by_split = self.classes_by_split()
        train = by_split.get("train", set())
        for split in ("val", "test"):
            classes = by_split.get(split, set())
            if classes - train and train:
                problems.append(f"classes of {split} that train lacks: {short_list(classes - train)}")
            if classes and train - classes:
                problems.append(f"classes of train that {split} lacks: {short_list(train - classes)}")
        return problems

    def _one(self, query: str, values: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        return next(self._query(query, values))

    def _query(self, query: str, values: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if not self.path.is_file():
            raise RunError(f"there is no audit at {self.path}: run `vitrail audit` or `vitrail fit` again")
        address = f"{self.path.resolve().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=60)) as database:
            try:
                database.execute(FAST)
                yield from database.execute(query, values)
            except sqlite3.DatabaseError as error:
                raise RunError(f"the audit {self.path} is damaged ({error}): delete it and run again") from None


LEAK = "count(DISTINCT split) > 1"
CONFLICT = "count(DISTINCT labels) > 1"


def _groups(kind: Twice, having: str) -> str:
    return f"SELECT {kind} FROM readable WHERE {kind} NOT NULL GROUP BY {kind} HAVING {having} ORDER BY {kind}"


def audit(
    source: Source,
    config: DataConfig,
    cache: Path,
    progress: Progress | None = None,
    embed: Embed | None = None,
) -> Audit:
    """Look at every image of a source once, and find what is there twice.

    Args:
        source: the images.
        config: background, size limit, and whether embeddings are compared as well.
        cache: SQLite file to write or to go on with; one that is damaged, or of other data, is begun anew.
        progress: called with the images done and their number.
        embed: RGB images -> (B, D) vectors, for ``config.embedding_duplicates``.

    Raises:
        InputError: embeddings are asked for and ``embed`` is missing; or the source finds fault with its data.
        RunError: the cache cannot be written.
    """
    if config.embedding_duplicates and embed is None:
        raise InputError(
            "data.embedding_duplicates = true needs a model for the embeddings: pass audit(..., embed=...)"
        )
    started = time.monotonic()
    cache = Path(cache)
    cache.parent.mkdir(parents=True, exist_ok=True)
    identity = json.dumps([VERSION, source.uri, source.kind, config.background, config.max_pixels])
    try:
        # The matrices here are tiny, and threads of the linear algebra would only wait for each other.
        with threadpool_limits(1, "blas"), contextlib.closing(_open(cache, identity)) as database:
            listing = _digest(source)
            method = _method(config)
            if _meta(database, "finished") == f"{listing} {method}":
                # Nothing is written, so that several processes can look at a finished audit at once.
                if progress:
                    total = database.execute("SELECT count(*) FROM images").fetchone()[0]
                    progress(total, total)
                return Audit(cache)
            _set_meta(database, finished="")
            _list(database, source)
            measured = _measure_all(database, source, config, progress)
            _join(database)
            _find_exact(database)
            _find_near(database, source, config, cache.parent, embed)
            _set_meta(
                database,
                uri=source.uri,
                kind=source.kind,
                method=method,
                measured=str(measured),
                seconds=f"{time.monotonic() - started:.2f}",
                fingerprint=_fingerprint(database),
                finished=f"{listing} {method}",
            )
            database.execute("PRAGMA optimize")
    except sqlite3.Error as error:
        raise RunError(
            f"cannot write the audit {cache}: {error}; check the space and rights of {cache.parent} and run again"
        ) from None
    return Audit(cache)


# ---- the file


def _open(path: Path, identity: str) -> sqlite3.Connection:
    """Open the file, begun anew if it is damaged or of other data."""
    note = "new"
    if path.exists() and path.stat().st_size:
        database = sqlite3.connect(path, timeout=60)
        try:
            _set_up(database)
            if database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
                if _meta(database, "identity") == identity:
                    return database
                note = "begun anew: it was of other data or settings"
            else:
                note = "begun anew: it was damaged"
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorname in ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_READONLY", "SQLITE_CANTOPEN"):
                database.close()
                raise
            note = "begun anew: it was damaged"
        database.close()
    for name in (path.name, f"{path.name}-journal"):
        (path.parent / name).unlink(missing_ok=True)
    database = sqlite3.connect(path, timeout=60)
    _set_up(database)
    database.executescript(SCHEMA)
    _set_meta(database, identity=identity, cache=note)
    return database


def _set_up(database: sqlite3.Connection) -> None:
    # Every commit leaves a consistent file behind, whenever the process is killed.
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute(FAST)


def _meta(database: sqlite3.Connection, name: str) -> str | None:
    row = database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return row[0] if row else None


def _set_meta(database: sqlite3.Connection, **values: str) -> None:
    with database:
        database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())


# ---- listing


def _stamped(source: Source) -> Iterator[tuple[Record, str]]:
    for record in source.records():
        yield record, "" if record.problem else source.stamp(record.locator)


def _digest(source: Source) -> str:
    """Return a digest of everything that the source lists; "" never matches, for images without a stamp."""
    digest = hashlib.blake2b(digest_size=16)
    certain = True
    for record, stamp in _stamped(source):
        certain &= bool(stamp or record.problem)
        digest.update(repr((record, stamp)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest() if certain else f"uncertain {time.time_ns()}"


def _list(database: sqlite3.Connection, source: Source) -> None:
    """Fill the table of images."""
    with database:
        database.execute("DELETE FROM images")
        database.executemany(
            "INSERT INTO images (key, locator, stamp, labels, grp, split, problem) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (r.key, r.locator, stamp, json.dumps(r.labels, ensure_ascii=False), r.group, r.split, r.problem)
                for r, stamp in _stamped(source)
            ),
        )


def _join(database: sqlite3.Connection) -> None:
    """Point the images to their measurements, and forget those of images that are gone."""
    with database:
        database.execute("UPDATE images SET content = number FROM content WHERE content.locator = images.locator")
        database.execute("DELETE FROM content WHERE locator NOT IN (SELECT locator FROM images)")


@lru_cache(maxsize=4096)
def _labels(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _fingerprint(database: sqlite3.Connection) -> str:
    digest = hashlib.blake2b(digest_size=16)
    query = (
        "SELECT key, images.locator, labels, grp, split, problem, sha256, error FROM images "
        "LEFT JOIN content ON number = content ORDER BY id"
    )
    for row in database.execute(query):
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


# ---- measuring


class _Task(NamedTuple):
    locator: str
    stamp: str
    sha256: bytes | None  # of the bytes that are known under this locator


def _measure_all(database: sqlite3.Connection, source: Source, config: DataConfig, progress: Progress | None) -> int:
    """Measure what is new or changed; return how many images were decoded."""
    condition = "problem IS NULL AND (content.stamp IS NULL OR content.stamp != images.stamp OR images.stamp = '')"
    joined = "images LEFT JOIN content USING (locator)"
    total = database.execute("SELECT count(*) FROM images").fetchone()[0]
    waiting = database.execute(f"SELECT count(*) FROM {joined} WHERE {condition}").fetchone()[0]
    done, decoded = total - waiting, 0
    if progress:
        progress(done, total)
    lock = threading.Lock()

    def measure(tasks: list[_Task]) -> list[tuple[Any, ...]]:
        return _measure(source, tasks, config, lock)

    def tasks() -> Iterator[list[_Task]]:
        last = 0
        while True:
            # By pages, because a query must not be open on a table that is being written.
            page = database.execute(
                f"SELECT id, locator, images.stamp, sha256 FROM {joined} "
                f"WHERE id > ? AND {condition} ORDER BY id LIMIT ?",
                (last, 16 * CHUNK),
            ).fetchall()
            if not page:
                return
            last = page[-1][0]
            yield from _chunks((_Task(*row[1:]) for row in page), CHUNK)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        try:
            committed = time.monotonic()
            for count, rows in _in_threads(measure, tasks()):
                for row in rows:
                    if len(row) == 2:
                        database.execute("UPDATE content SET stamp = ? WHERE locator = ?", row)
                    else:
                        database.execute(PUT, row)
                        decoded += 1
                done += count
                if time.monotonic() - committed > COMMIT_SECONDS:  # each commit waits for the disk
                    database.commit()
                    committed = time.monotonic()
                if progress:
                    progress(done, total)
        finally:  # what was measured is kept when the pass is interrupted
            database.commit()
    return decoded


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _in_threads(
    work: Callable[[list[_Task]], list[tuple[Any, ...]]], tasks: Iterator[list[_Task]]
) -> Iterator[tuple[int, list[tuple[Any, ...]]]]:
    """Yield (tasks, results) in order, with a few chunks in flight. Pillow decodes outside of Python's lock."""
    threads = min(8, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    flying: deque[tuple[int, Future[list[tuple[Any, ...]]]]] = deque()
    try:
        for chunk in tasks:
            flying.append((len(chunk), pool.submit(work, chunk)))
            if len(flying) > 2 * threads:
                count, future = flying.popleft()
                yield count, future.result()
        while flying:
            count, future = flying.popleft()
            yield count, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _measure(source: Source, tasks: list[_Task], config: DataConfig, lock: threading.Lock) -> list[tuple[Any, ...]]:
    """Return a row of the table of contents for each task, or (stamp, locator) where the bytes are as before."""
    rows: list[tuple[Any, ...]] = []
    seen: list[tuple[_Task, bytes, int, tuple[Any, ...]]] = []
    looks: list[Look] = []
    greys: dict[tuple[int, ...], list[tuple[_Task, bytes, np.ndarray]]] = defaultdict(list)
    for task in tasks:
        digest, size = None, None
        try:
            blob = source.read(task.locator)
            digest, size = _sha256(blob), len(blob) if isinstance(blob, bytes) else blob.nbytes
            if digest == task.sha256:
                rows.append((task.stamp, task.locator))
            elif _is_grey(blob) and 0 < blob.size <= min(config.max_pixels, SMALL):
                greys[blob.shape].append((task, digest, blob))
            else:
                what, look = _look(blob, config, lock)
                seen.append((task, digest, size, what))
                looks.append(look)
        except Exception as error:  # noqa: BLE001 - nothing that a file contains may stop the pass
            rows.append((task.locator, task.stamp, digest, size, *[None] * 7, _reason(error)))
    for (height, width), images in greys.items():
        looks += duplicates.look_at_grey(np.stack([pixels for _, _, pixels in images]))
        # The digest of the bytes is one of the pixels and their shape already.
        seen += [(task, digest, pixels.size, (width, height, "L", digest[:16])) for task, digest, pixels in images]
    if looks:
        hashes = duplicates.perceptual_hash(np.stack([look.grey for look in looks]))
        for (task, digest, size, what), look, value in zip(seen, looks, hashes.view(np.int64).tolist(), strict=True):
            rows.append((task.locator, task.stamp, digest, size, *what, value, look.signature, look.blank, None))
    return rows


def _is_grey(blob: bytes | np.ndarray) -> TypeGuard[np.ndarray]:
    return isinstance(blob, np.ndarray) and blob.ndim == 2 and blob.dtype == np.uint8


def _sha256(blob: bytes | np.ndarray) -> bytes:
    if isinstance(blob, bytes):
        return hashlib.sha256(blob).digest()
    digest = hashlib.sha256(repr(blob.shape).encode())
    digest.update(np.ascontiguousarray(blob).data)
    return digest.digest()


def _look(blob: bytes | np.ndarray, config: DataConfig, lock: threading.Lock) -> tuple[tuple[Any, ...], Look]:
    """Return (width, height, mode, digest of the pixels) of an image, and its look."""
    mode, pixels = _header(blob)
    with lock if pixels > LARGE else contextlib.nullcontext():
        array = decode_array(blob, background=config.background, max_pixels=config.max_pixels)
        height, width = array.shape[:2]
        digest = hashlib.blake2b(array.data, digest_size=16, person=f"{width}x{height}".encode()[:16]).digest()
        image = Image.fromarray(array)
        return (width, height, mode, digest), duplicates.look(image)


def _header(blob: bytes | np.ndarray) -> tuple[str, int]:
    """Return Pillow's mode, and the number of pixels; ("", 0) of a damaged file, as decoding will say why."""
    if isinstance(blob, np.ndarray):
        return ("L" if blob.ndim == 2 else "RGB"), blob.shape[0] * blob.shape[1]
    try:
        with Image.open(io.BytesIO(blob)) as image:
            return image.mode, image.width * image.height
    except Exception:  # noqa: BLE001
        return "", 0


def _reason(error: Exception) -> str:
    if isinstance(error, UnreadableImage):
        return error.reason
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:100]})"


# ---- duplicates


def _method(config: DataConfig) -> str:
    text = (
        f"perceptual hash within {duplicates.HASH_DISTANCE} of 64 bits, "
        f"confirmed by a correlation of {duplicates.CORRELATION} at 16 x 16 pixels"
    )
    return text + (f"; or cosine of embeddings from {EMBEDDING_SIMILARITY}" if config.embedding_duplicates else "")


def _find_exact(database: sqlite3.Connection) -> None:
    """Group the images whose pixels are the same, which those with the same bytes are."""
    with database:
        database.execute("UPDATE images SET exact = NULL, near = NULL")
        database.execute("DROP TABLE IF EXISTS temp.firsts")
        database.execute(
            "CREATE TEMP TABLE firsts AS SELECT pixels AS p, min(id) AS first FROM readable GROUP BY pixels "
            "HAVING count(*) > 1"
        )
        database.execute("CREATE INDEX temp.firsts_p ON firsts (p)")
        database.execute(
            "UPDATE images SET exact = first, near = first FROM content JOIN temp.firsts ON p = pixels "
            "WHERE number = images.content AND problem IS NULL"
        )


def _find_near(
    database: sqlite3.Connection, source: Source, config: DataConfig, folder: Path, embed: Embed | None
) -> None:
    """Join images that look the same; one stands for its exact duplicates, and blank ones are left alone."""
    which = "FROM readable WHERE NOT blank AND coalesce(exact, id) = id"
    count = database.execute(f"SELECT count(*) {which}").fetchone()[0]
    if count < 2:
        return
    ids, hashes = np.empty(count, np.int64), np.empty(count, np.int64)
    aspects = np.empty(count, np.float32)
    parent = np.arange(count)
    with tempfile.TemporaryFile(dir=folder) as file:
        cursor = database.execute(f"SELECT id, hash, signature, width, height {which} ORDER BY id")
        for place, (number, value, signature, width, height) in enumerate(cursor):
            ids[place], hashes[place], aspects[place] = number, value, math.log(width / height)
            file.write(signature)
        file.flush()
        signatures = np.memmap(file, np.uint8, "r", shape=(count, duplicates.SIGNATURE_BYTES))
        duplicates.near_duplicates(hashes.view(np.uint64), signatures, aspects, parent)
        del signatures
    if config.embedding_duplicates and embed is not None:
        with tempfile.TemporaryFile(dir=folder) as file:
            vectors = _embeddings(database, source, config, ids, embed, file)
            duplicates.embedding_duplicates(vectors, parent, EMBEDDING_SIMILARITY)
            del vectors
    roots = duplicates.find(parent, np.arange(count))
    members = np.bincount(roots, minlength=count)[roots] > 1
    pairs = zip(ids[roots[members]].tolist(), ids[members].tolist(), strict=True)
    with database:
        database.executemany("UPDATE images SET near = ?1 WHERE id = ?2 OR exact = ?2", pairs)


def _embeddings(
    database: sqlite3.Connection, source: Source, config: DataConfig, ids: np.ndarray, embed: Embed, file: Any
) -> np.ndarray:
    """Return the embeddings (N, D) of the images ``ids``, of length one, memory-mapped from ``file``."""
    dimension = 0
    for chunk in _chunks(ids.tolist(), CHUNK):
        images = []
        for number in chunk:
            locator = database.execute("SELECT locator FROM images WHERE id = ?", (number,)).fetchone()[0]
            pixels = decode_array(source.read(locator), background=config.background, max_pixels=config.max_pixels)
            images.append(Image.fromarray(pixels))
        vectors = np.asarray(embed(images), np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        dimension = vectors.shape[1]
        file.write(vectors.tobytes())
    file.flush()
    return np.memmap(file, np.float32, "r", shape=(len(ids), dimension))


# ---- names


def suspicious_names(names: Iterable[str]) -> list[list[str]]:
    """Return class names that differ only in case, spaces, hyphens or the form of their letters, in groups."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folded = re.sub(r"[\s_\-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
        groups[folded].append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def short_list(names: Iterable[str], most: int = 5) -> str:
    """Return names for a message: the first few, and how many there are."""
    ordered = sorted(names)
    shown = ", ".join(repr(name) for name in ordered[:most])
    return shown + (f", ... ({len(ordered)} in all)" if len(ordered) > most else "")
