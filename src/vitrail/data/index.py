"""The images that a run uses, in one memory-mapped Arrow file: a row per image with its labels and its split."""

from __future__ import annotations

import csv
import hashlib
import json
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from PIL import Image
from scipy.sparse import csr_array

from vitrail.data.audit import Audit, AuditRow, short_list
from vitrail.data.decode import decode
from vitrail.data.duplicates import find, unite
from vitrail.data.sources import Source
from vitrail.data.split import NONE, SPLITS, TEST, TRAIN, VAL, assign_splits, rank
from vitrail.errors import DataError, RunError, unknown
from vitrail.runs import atomic_path

if TYPE_CHECKING:
    from vitrail.training.recipe import DataConfig

VERSION = 2
BATCH = 4_096
"""Rows of each part of the file."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("locator", pa.string()),
        ("labels", pa.list_(pa.int32())),
        ("split", pa.int8()),
        ("group", pa.int64()),
    ]
)


class Index:
    """Rows of images with their targets and splits. Cheap to pickle: a worker maps the same file again.

    In memory stand 5 to 13 bytes per image (splits and labels, once asked for); the rest is read from the mapped file.

    Args:
        path: the file that ``build_index`` wrote.
        source: where the images are read from.

    Attributes:
        classes: class names, sorted; the number of a class is its place here.
        multilabel: whether an image may have none or several classes.
        fingerprint: of the audit that it was built from.

    Raises:
        RunError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path, source: Source) -> None:
        self.path = Path(path)
        self.source = source
        facts = self._facts
        self.classes: tuple[str, ...] = tuple(facts["classes"])
        self.multilabel: bool = facts["multilabel"]
        self.fingerprint: str = facts["fingerprint"]

    @classmethod
    def open(cls, path: str | Path, source: Source) -> Self:
        """Open the file that ``build_index`` wrote."""
        return cls(path, source)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "source", "classes", "multilabel", "fingerprint")
        return {name: self.__dict__[name] for name in kept}

    def __len__(self) -> int:
        """Return the number of images."""
        return self._table.num_rows

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of ``"train"``, ``"val"`` or ``"test"``: int64, rising."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return np.flatnonzero(self._splits == SPLITS.index(split))

    def key(self, row: int) -> str:
        """Return the image's name for the user."""
        return self._value("key", row)

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """Return class numbers (N,) int64, or multi-hot (N, C) float32."""
        starts, labels = self._labels
        rows = np.asarray(rows, np.int64)
        if not self.multilabel:
            return labels[starts[rows]].astype(np.int64)
        hot = np.zeros((len(rows), len(self.classes)), np.float32)
        for place, row in enumerate(rows):
            hot[place, labels[starts[row] : starts[row + 1]]] = 1
        return hot

    def counts(self, split: str) -> np.ndarray:
        """Return the images of each class in a split: (C,) int64."""
        starts, labels = self._labels
        rows = self.rows(split)
        wanted = np.zeros(len(self), bool)
        wanted[rows] = True
        return np.bincount(labels[np.repeat(wanted, np.diff(starts))], minlength=len(self.classes))

    def groups(self, rows: np.ndarray) -> np.ndarray:
        """Return a number per row that is the same for images that must stay together: (N,) int64."""
        return np.concatenate([c.to_numpy() for c in self._table.column("group").chunks] or [np.zeros(0, int)])[rows]

    def read(self, row: int) -> bytes | np.ndarray:
        """Return the encoded file, or uint8 pixels; raises ``UnreadableImage`` or ``OSError``."""
        return self.source.read(self._value("locator", row))

    def load(self, row: int) -> Image.Image:
        """Return the decoded image, RGB; raises ``UnreadableImage`` or ``OSError``."""
        facts = self._facts
        return decode(self.read(row), background=tuple(facts["background"]), max_pixels=facts["max_pixels"])

    def summary(self) -> dict[str, Any]:
        """Return what was decided, as plain values for JSON: splits, and what was left out and why."""
        splits = {name: len(self.rows(name)) for name in SPLITS}
        hidden = ("version", "classes", "background", "max_pixels", "fingerprint")
        return {
            "images": len(self),
            "classes": {
                name: {split: int(count) for split, count in zip(SPLITS, counts, strict=True)}
                for name, counts in zip(self.classes, np.stack([self.counts(s) for s in SPLITS], 1), strict=True)
            },
            "splits": splits,
            **{name: value for name, value in self._facts.items() if name not in hidden},
        }

    def table(self) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Yield (key, labels, split) of every row."""
        for batch in self._table.to_batches():
            columns = (batch.column(name).to_pylist() for name in ("key", "labels", "split"))
            for key, labels, split in zip(*columns, strict=True):
                yield key, tuple(self.classes[label] for label in labels), SPLITS[split]

    def _value(self, column: str, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)} images")
        return self._table.column(column).chunk(row // BATCH)[row % BATCH].as_py()

    @cached_property
    def _table(self) -> pa.Table:
        try:
            return pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        except (OSError, pa.ArrowException) as error:
            cause = " ".join(str(error).split())[:100]
            raise RunError(f"cannot read the index {self.path} ({cause}): delete it and run again") from None

    @cached_property
    def _facts(self) -> dict[str, Any]:
        try:
            facts = json.loads((self._table.schema.metadata or {})[b"vitrail"])
        except (KeyError, ValueError):
            facts = {}
        if facts.get("version") != VERSION:
            raise RunError(f"{self.path} is no index of this version of Vitrail: delete it and run again")
        return facts

    @cached_property
    def _splits(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int8)] + [c.to_numpy() for c in self._table.column("split").chunks])

    @cached_property
    def _labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where the labels of each row start (N + 1,), and all labels one after another."""
        lengths, values = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
        for chunk in self._table.column("labels").chunks:
            lengths.append(np.diff(chunk.offsets.to_numpy()))
            values.append(chunk.flatten().to_numpy())
        return np.cumsum(np.concatenate(lengths)), np.concatenate(values)


def build_index(source: Source, audit: Audit, config: DataConfig, path: str | Path) -> Index:
    """Decide which images are used and in which split, and write the index.

    Classes with fewer than ``config.min_per_class`` distinct images to train on are left out. Near duplicates, and the
    images of a user's group, stay on one side of every split that is drawn here; where a split that the data prescribes
    cuts through them, it is kept, and ``Index.summary`` counts the images. With ``near_duplicates = "drop"`` one image
    of each group is kept: the one of the data's test split, else of its validation split, else the first; of the images
    of a given test split none is dropped.

    Memory: some 80 bytes per image in numpy arrays while the split is drawn.

    Raises:
        DataError: fewer than two classes are left, a split is empty, or a given split has classes that train lacks.
    """
    _check_given(audit)
    columns = _Columns(audit, config)
    keep = _without_duplicates(columns) if config.near_duplicates == "drop" else np.ones(len(columns.near), bool)
    duplicates = int((~keep).sum())
    small = columns.drop_small_classes(keep, config.min_per_class)
    classes = sorted(name for name in columns.numbers if name not in small)
    if len(classes) < (1 if source.multilabel else 2):
        raise DataError(_too_few(source, classes, small, config))
    groups = columns.groups(config.near_duplicates == "group")
    splits = np.full(len(keep), NONE, np.int8)
    used = np.flatnonzero(keep)
    splits[used] = assign_splits(
        columns.targets()[used],
        groups[used],
        columns.ranks[used],
        columns.given[used],
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
    )
    for split, name in ((TRAIN, "train"), (VAL, "val")):
        if not (splits[used] == split).any():
            raise DataError(
                f"no image of {source.uri} is left for {name}: {len(used)} images in {len(classes)} classes, all in "
                "groups that must stay together; add images, or set data.near_duplicates = 'ignore'"
            )
    facts = {
        "version": VERSION,
        "classes": classes,
        "multilabel": source.multilabel,
        "fingerprint": audit.fingerprint,
        "background": config.background,
        "max_pixels": config.max_pixels,
        "source": source.uri,
        "seed": config.seed,
        "dropped_classes": small,
        "dropped_images": int((~keep).sum()) - duplicates,
        "dropped_duplicates": duplicates,
        "leaking_images": _leaking(groups[used], splits[used]),
    }
    _write(Path(path), audit, facts, keep, groups, splits)
    return Index.open(path, source)


def write_split_csv(index: Index, path: str | Path) -> None:
    """Write key, labels (joined by ``|``) and split of every image, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("key", "label", "split"))
        writer.writerows((key, "|".join(labels), split) for key, labels, split in index.table())


class _Columns:
    """What the split is drawn from, a few bytes per image: one entry per readable image, in the order of the source."""

    def __init__(self, audit: Audit, config: DataConfig) -> None:
        self.numbers: dict[str, int] = {}
        columns = {name: array("q") for name in ("exact", "near", "user", "ranks")}
        given, starts, labels = array("b"), array("q", [0]), array("i")
        for row in audit.rows():
            columns["exact"].append(row.exact)
            columns["near"].append(row.near)
            columns["user"].append(_group_number(row))
            columns["ranks"].append(rank(row.key, config.seed))
            given.append(NONE if row.split is None else SPLITS.index(row.split))
            labels.extend(self.numbers.setdefault(label, len(self.numbers)) for label in row.labels)
            starts.append(len(labels))
        self.exact, self.near, self.user, self.ranks = (np.frombuffer(c, np.int64) for c in columns.values())
        self.given = np.frombuffer(given, np.int8)
        self._starts, self._labels = np.frombuffer(starts, np.int64), np.frombuffer(labels, np.int32)
        self._kept = np.ones(len(self._labels), bool)

    def drop_small_classes(self, keep: np.ndarray, least: int) -> dict[str, int]:
        """Return the classes with fewer distinct images to train on, and how many; clear ``keep`` of their images."""
        owner = np.repeat(np.arange(len(keep)), np.diff(self._starts))
        trained = keep[owner] & (self.given[owner] <= TRAIN)
        labels, exact = self._labels[trained], self.exact[owner[trained]]
        order = np.lexsort((exact, labels))
        labels, exact = labels[order], exact[order]
        is_new = np.ones(len(labels), bool)
        is_new[1:] = (labels[1:] != labels[:-1]) | (exact[1:] != exact[:-1])
        counts = np.bincount(labels[is_new], minlength=len(self.numbers))
        small = {name: int(counts[number]) for name, number in sorted(self.numbers.items()) if counts[number] < least}
        self._kept = ~np.isin(self._labels, [self.numbers[name] for name in small])
        # An image goes with its last label; one that never had any stays, where several labels are allowed.
        remaining = np.bincount(owner[self._kept], minlength=len(keep))
        keep &= (remaining > 0) | (np.diff(self._starts) == 0)
        return small

    def targets(self) -> csr_array:
        """Return (N, C) with ones where an image has a class that is kept."""
        owner = np.repeat(np.arange(len(self.near)), np.diff(self._starts))[self._kept]
        ones = np.ones(len(owner), np.int8)
        return csr_array((ones, (owner, self._labels[self._kept])), shape=(len(self.near), len(self.numbers)))

    def groups(self, near: bool) -> np.ndarray:
        """Return a number per image, the same for images of one user's group or, with ``near``, of near duplicates."""
        parent = np.arange(len(self.near))
        for same, joined in ((self.near, near), (self.user, True)):
            if joined:
                _, first, inverse = np.unique(same, return_index=True, return_inverse=True)
                named = np.flatnonzero(same != 0)
                unite(parent, named, first[inverse[named]])
        return find(parent, np.arange(len(parent)))


def _group_number(row: AuditRow) -> int:
    """Return a number for a user's group, 0 for none; 63 bits of a hash, so that no table of names is kept."""
    if row.group is None:
        return 0
    digest = hashlib.blake2b(row.group.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


def _without_duplicates(columns: _Columns) -> np.ndarray:
    """Return which images stay when near duplicates are dropped."""
    order = np.lexsort((np.arange(len(columns.near)), -columns.given, columns.near))
    near = columns.near[order]
    keep = np.ones(len(order), bool)
    keep[order[1:][near[1:] == near[:-1]]] = False
    return keep | (columns.given == TEST)


def _leaking(groups: np.ndarray, splits: np.ndarray) -> int:
    """Return how many images belong to a group with images in several splits, which only given splits can cut."""
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    if not len(starts):
        return 0
    ordered = splits[order]
    cut = np.maximum.reduceat(ordered, starts) != np.minimum.reduceat(ordered, starts)
    return int(sizes[cut].sum())


def _check_given(audit: Audit) -> None:
    by_split = audit.classes_by_split()
    train = by_split.get("train", set()) | by_split.get(None, set())
    for split in ("val", "test"):
        missing = by_split.get(split, set()) - train
        if missing:
            raise DataError(
                f"the labels differ between splits: {split} has {short_list(missing)}, train has {short_list(train)}; "
                f"labels are matched by name: rename them, or leave those images out of {split}"
            )


def _too_few(source: Source, classes: list[str], small: dict[str, int], config: DataConfig) -> str:
    left = f"only the class {classes[0]!r}" if classes else "no class"
    dropped = (
        f" ({len(small)} left out with fewer images than data.min_per_class = {config.min_per_class})" if small else ""
    )
    return (
        f"{left} of {source.uri} can be trained on{dropped}, and training needs two: add images, or see what "
        "`vitrail audit` says of the data"
    )


def _write(
    path: Path, audit: Audit, facts: dict[str, Any], keep: np.ndarray, groups: np.ndarray, splits: np.ndarray
) -> None:
    numbers = {name: number for number, name in enumerate(facts["classes"])}
    schema = SCHEMA.with_metadata({b"vitrail": json.dumps(facts).encode()})
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        batch: list[dict[str, Any]] = []
        for place, row in enumerate(audit.rows()):
            if not keep[place]:
                continue
            batch.append(
                {
                    "key": row.key,
                    "locator": row.locator,
                    "labels": [numbers[label] for label in row.labels if label in numbers],
                    "split": int(splits[place]),
                    "group": int(groups[place]),
                }
            )
            if len(batch) == BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
