"""What every source of images promises: the same records and pixels at every call, in every process."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitrail.data.decode import decode
from vitrail.data.sources.base import Record, Source

MOST = 40
"""Records that are looked at: a source may be endless."""
PICKLED_BYTES = 100_000


@dataclass(frozen=True)
class Images:
    """A source by the function that opens it."""

    name: str
    open: Callable[[], Source]
    traits: frozenset[str] = field(default_factory=frozenset)

    def records(self, source: Source) -> list[Record]:
        return list(itertools.islice(source.records(), MOST))


def it_says_what_it_is(subject: Images) -> None:
    source = subject.open()
    for name, kind in (("uri", str), ("kind", str), ("multilabel", bool)):
        assert isinstance(getattr(source, name, None), kind), f"its {name} is no {kind.__name__}"


def its_records_are_sound(subject: Images) -> None:
    records = subject.records(subject.open())
    assert records, "it has no records"
    keys = [record.key for record in records]
    assert len(set(keys)) == len(keys), f"two images have the key {max(keys, key=keys.count)!r}"
    for record in records:
        assert all(isinstance(text, str) and text for text in (record.key, record.locator)), f"{record} has no key"
        assert isinstance(record.labels, tuple), f"the labels of {record.key} are no tuple"
        assert all(isinstance(label, str) and label for label in record.labels), (
            f"{record.key} has a label without name"
        )
        assert record.labels or record.problem or subject.open().multilabel, f"{record.key} has no label"
        assert record.split in (None, "train", "val", "test"), f"{record.key} is of the split {record.split!r}"


def its_records_are_the_same_every_time(subject: Images) -> None:
    source = subject.open()
    first = subject.records(source)
    assert subject.records(source) == first, "the records come differently the second time"
    assert subject.records(subject.open()) == first, "the source, opened again, has other records"


def its_images_are_the_same_every_time(subject: Images) -> None:
    source, again = subject.open(), subject.open()
    records = [record for record in subject.records(source) if record.problem is None][:8]
    first = {record.locator: source.read(record.locator) for record in records}
    for record in reversed(records):
        for other in (source, again):
            assert _same(other.read(record.locator), first[record.locator]), (
                f"{record.key} has other pixels when it is read in another order, or by another instance"
            )
        assert source.stamp(record.locator) == again.stamp(record.locator), f"the stamp of {record.key} changes"
        assert isinstance(source.stamp(record.locator), str), f"the stamp of {record.key} is no text"


def its_images_can_be_decoded(subject: Images) -> None:
    source = subject.open()
    for record in [record for record in subject.records(source) if record.problem is None][:8]:
        image = source.read(record.locator)
        if isinstance(image, np.ndarray):
            assert image.dtype == np.uint8, f"{record.key} is of {image.dtype} in place of uint8"
            assert image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3), (
                f"{record.key} has the shape {image.shape} in place of (H, W) or (H, W, 3)"
            )
            assert image.size, f"{record.key} is empty"
        else:
            decode(image, background=(255, 255, 255), max_pixels=10**8)


def it_goes_to_other_processes(subject: Images) -> None:
    source = subject.open()
    records = subject.records(source)
    locator = next(record.locator for record in records if record.problem is None)
    pixels = source.read(locator)
    packed = pickle.dumps(source)
    assert len(packed) < PICKLED_BYTES, f"pickled it takes {len(packed)} bytes: open files and indexes on first use"
    twin = pickle.loads(packed)
    assert subject.records(twin) == records, "its twin in another process has other records"
    assert _same(twin.read(locator), pixels), "its twin in another process has other pixels"


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(
        np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
    )
