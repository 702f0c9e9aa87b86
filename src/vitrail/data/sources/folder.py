"""A tree with one folder per class, or with train, val and test folders above the classes."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from pathlib import Path

from vitrail.data.decode import IMAGE_EXTENSIONS
from vitrail.data.sources.base import (
    UNSUPPORTED_EXTENSIONS,
    Record,
    Split,
    clean_label,
    file_stamp,
    is_utf8,
    printable,
    read_file,
    split_name,
)
from vitrail.errors import DataError

HIDDEN = frozenset({"__MACOSX", "__pycache__", "@eaDir", "lost+found"})
LISTING = 50_000
"""Names of one folder that are held in memory at a time."""


class FolderSource:
    """Images of a folder tree; the class is the path of the folders above an image.

    A link to a file inside the tree is an image like any other; a link that leads out of the tree, or to a folder, is
    reported and not followed, so that neither a loop nor a foreign file can get in.

    Args:
        root: the folder.
        level: how many leading folders, at most, name the class; None for all of them.
    """

    kind = "folder"
    multilabel = False

    def __init__(self, root: Path, level: int | None = None) -> None:
        self.root = os.path.realpath(root)
        self.uri = self.root
        self.level = level
        self.has_splits = _has_splits(self.root)

    def records(self) -> Iterator[Record]:
        """Yield the images in the order of their paths, folder by folder."""
        # A stack, because a tree may be deeper than Python's recursion.
        stack = [self._entries(())]
        while stack:
            found = next(stack[-1], None)
            if found is None:
                stack.pop()
            elif isinstance(found, Record):
                yield found
            else:
                stack.append(self._entries(found))

    def read(self, locator: str) -> bytes:
        """Return the bytes of an image file."""
        return read_file(f"{self.root}/{locator}")

    def stamp(self, locator: str) -> str:
        """Return size and time of an image file."""
        return file_stamp(f"{self.root}/{locator}")

    def _entries(self, parts: tuple[str, ...]) -> Iterator[Record | tuple[str, ...]]:
        """Yield what one folder holds: records, and the parts of the folders to go into."""
        folder = "/".join((self.root, *parts))
        try:
            for entry in _in_order(folder):
                if entry.name.startswith(".") or entry.name in HIDDEN:
                    continue
                inner = (*parts, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    yield inner
                elif record := self._record(entry, parts, "/".join(inner)):
                    yield record
        except OSError as error:
            key = printable("/".join(parts)) + "/"
            yield Record(key, key, problem=f"the folder cannot be listed: {error.strerror}")

    def _record(self, entry: os.DirEntry[str], parts: tuple[str, ...], locator: str) -> Record | None:
        extension = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - once per file
        link = entry.is_symlink()
        if link and os.path.isdir(entry.path):  # noqa: PTH112 - unlike entry.is_dir, it takes a link to itself
            return Record(printable(locator) + "/", printable(locator), problem="a link to a folder is not followed")
        if extension in UNSUPPORTED_EXTENSIONS:
            problem = f"{extension} files cannot be decoded; convert them to JPEG or PNG"
            return Record(printable(locator), printable(locator), problem=problem)
        if extension not in IMAGE_EXTENSIONS:
            return None
        if not is_utf8(locator):
            return Record(printable(locator), printable(locator), problem="the name is not UTF-8; rename the file")
        if link and (astray := self._link_problem(entry.path)):
            return Record(locator, locator, problem=astray)
        split: Split | None = None
        if self.has_splits:
            split = split_name(parts[0]) if parts else None
            if split is None:
                return Record(locator, locator, problem="lies outside of the train, val and test folders")
            parts = parts[1:]
        if not parts:
            return Record(locator, locator, split=split, problem="lies in no class folder")
        return Record(locator, locator, (clean_label("/".join(parts[: self.level])),), split=split)

    def _link_problem(self, path: str) -> str | None:
        target = os.path.realpath(path)
        if not os.path.exists(target):  # noqa: PTH110
            return "the link leads nowhere"
        if os.path.commonpath((self.root, target)) != self.root:
            return "the link leads out of the folder; copy the file, or list it in a manifest"
        return None


def _in_order(folder: str) -> Iterator[os.DirEntry[str]]:
    """Yield a folder's entries by name, holding ``LISTING`` of them at a time however many there are."""
    last = ""
    while True:
        with os.scandir(folder) as entries:
            chunk = heapq.nsmallest(LISTING, (entry for entry in entries if entry.name > last), key=lambda e: e.name)
        yield from chunk
        if len(chunk) < LISTING:
            return
        last = chunk[-1].name


def _has_splits(root: str) -> bool:
    """Whether the top folders are train, val and test rather than classes."""
    names = [entry.name for entry in _in_order(root) if entry.is_dir() and not entry.name.startswith(".")]
    splits = {split_name(name) for name in names if name not in HIDDEN} - {None}
    others = [name for name in names if name not in HIDDEN and split_name(name) is None]
    if "train" in splits and (len(splits) > 1 or not others):
        return True
    if len(splits) > 1 and not others:
        raise DataError(
            f"{root} has the folders {', '.join(names)} but no train folder: add one, or give one of them as the path"
        )
    return False
