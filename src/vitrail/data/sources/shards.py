"""WebDataset shards: tar files in which the members of one sample share a name and differ in extension."""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from vitrail.data.decode import IMAGE_EXTENSIONS, UnreadableImage
from vitrail.data.sources.base import (
    MAX_BYTES,
    Record,
    Split,
    clean_label,
    file_stamp,
    is_utf8,
    label_text,
    printable,
    split_name,
)
from vitrail.errors import InputError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 1_000_000
MAX_LABEL_BYTES = 1 << 16


class ShardSource:
    """Samples of tar files, read in place by their offset; nothing is unpacked.

    The label comes from the member ``.cls``, else ``.json`` (its ``"label"``), else ``.txt``. Shards whose names begin
    with train, val or test prescribe that split when there are train shards.

    Args:
        uri: what the user gave.
        paths: the tar files, in order.
    """

    kind = "shards"

    def __init__(self, uri: str, paths: list[Path]) -> None:
        self.uri = uri
        self.folder = os.path.commonpath([path.resolve().parent for path in paths])
        self.shards = [os.path.relpath(path.resolve(), self.folder) for path in paths]
        named = [split_name(re.split(r"[-_.]", Path(shard).name)[0]) for shard in self.shards]
        use_names = "train" in named and len(set(named)) > 1
        self._splits: list[Split | None] = named if use_names else [None] * len(named)
        self.multilabel = False
        for record, several in itertools.islice(self._samples(), 100):
            if record.problem is None:
                self.multilabel = several
                break

    def records(self) -> Iterator[Record]:
        """Yield the samples, shard by shard, in the order of the members."""
        for record, _ in self._samples():
            if not record.problem and len(record.labels) != 1 and not self.multilabel:
                what = "several labels, and the first sample has one" if record.labels else "no label"
                record = record._replace(problem=f"the sample has {what}")
            yield record

    def read(self, locator: str) -> bytes:
        """Return the bytes of an image member."""
        shard, offset, size = locator.rsplit(":", 2)
        if int(size) > MAX_BYTES:
            raise UnreadableImage(f"the member has {size} bytes, more than the {MAX_BYTES} that are read")
        with open(f"{self.folder}/{shard}", "rb") as file:  # noqa: PTH123 - once per image
            file.seek(int(offset))
            blob = file.read(int(size))
        if len(blob) < int(size):
            raise UnreadableImage("the shard is cut off within this member")
        return blob

    def stamp(self, locator: str) -> str:
        """Return size and time of the shard that holds the image."""
        return file_stamp(f"{self.folder}/{locator.rsplit(':', 2)[0]}")

    def _samples(self) -> Iterator[tuple[Record, bool]]:
        """Yield (record, whether its label is a list)."""
        for shard, split in zip(self.shards, self._splits, strict=True):
            try:
                with tarfile.open(f"{self.folder}/{shard}", "r:") as tar:
                    members = _members(tar)
                    for name, group in itertools.groupby(members, key=lambda item: item[0]):
                        yield self._sample(tar, shard, split, name, [(ext, info) for _, ext, info in group])
            except (tarfile.TarError, OSError, EOFError) as error:
                cause = getattr(error, "strerror", None) or str(error)
                yield Record(shard, shard, problem=f"the shard is damaged from here on: {cause}"), False

    def _sample(
        self,
        tar: tarfile.TarFile,
        shard: str,
        split: Split | None,
        name: str,
        members: list[tuple[str, tarfile.TarInfo]],
    ) -> tuple[Record, bool]:
        key = f"{shard}/{printable(name)}"
        by_extension = dict(members)
        image = next((info for extension, info in members if f".{extension}" in IMAGE_EXTENSIONS), None)
        if image is None:
            return Record(key, key, problem=f"no image among its members ({', '.join(by_extension)})"), False
        locator = f"{shard}:{image.offset_data}:{image.size}"
        if not is_utf8(name):
            return Record(key, locator, problem="the name is not UTF-8"), False
        try:
            labels, several = _label(tar, by_extension)
        except ValueError as error:
            return Record(key, locator, problem=f"its label cannot be read: {error}"), False
        return Record(key, locator, labels, None, split), several


def expand_braces(pattern: str) -> list[str]:
    """Return the names that ``shard-{000..012}.tar`` stands for; several ranges combine."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match[1], match[2]
    count = int(last) - int(first) + 1
    if not 0 < count <= MAX_SHARDS:
        raise InputError(
            f"the range {match[0]} in {pattern!r} has {count} numbers: give {{first..last}} in rising order"
        )
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [
        name for number in numbers for name in expand_braces(pattern[: match.start()] + number + pattern[match.end() :])
    ]


def shard_paths(pattern: str) -> list[Path]:
    """Return the files of a brace pattern; raises ``InputError`` naming the first that is missing."""
    paths = [Path(name).expanduser() for name in expand_braces(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(paths)} shards of {pattern!r} are missing, the first is {missing[0]}")
    return paths


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (sample name, extension, member) of the regular members."""
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member, which would grow with the shard
        if not info.isreg():
            continue
        folder, slash, base = info.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if stem and dot and stem != "__MACOSX":
            yield folder + slash + stem, extension.lower(), info


def _label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> tuple[tuple[str, ...], bool]:
    """Return the labels of a sample, and whether they came as a list."""
    for extension in ("cls", "json", "txt"):
        info = members.get(extension)
        if info is None:
            continue
        if info.size > MAX_LABEL_BYTES:
            raise ValueError(f".{extension} has {info.size} bytes")
        file = tar.extractfile(info)
        text = file.read().decode("utf-8") if file else ""
        value = json.loads(text).get("label") if extension == "json" else text
        if value is None:
            continue
        if isinstance(value, list):
            names = (label_text(item) for item in value)
            return tuple(dict.fromkeys(name for name in names if name)), True
        name = clean_label(str(value)) if not isinstance(value, float) else label_text(value)
        return ((name,) if name else ()), False
    return (), False
