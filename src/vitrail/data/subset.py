"""Some classes of a data set, as a data set of its own: to train without classes that are met later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from vitrail.data.index import Index
from vitrail.errors import InputError, unknown


class ClassSubset(Index):
    """The images of some classes of an index, in the same splits and rows; classes are numbered anew.

    Args:
        index: with one label per image.
        classes: two names or more.

    Raises:
        InputError: several labels per image, fewer than two classes, or a name that is none of the index's.
    """

    def __init__(self, index: Index, classes: Iterable[str]) -> None:
        if index.multilabel:
            raise InputError("classes cannot be held out of images with several labels: give one label per image")
        chosen = tuple(sorted(set(classes)))
        for name in chosen:
            if name not in index.classes:
                raise unknown("class", name, index.classes)
        if len(chosen) < 2:
            raise InputError(f"a subset of {len(chosen)} classes is no task: give two or more of {len(index.classes)}")
        super().__init__(index.path, index.source)
        self.classes = chosen

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of a split that show these classes: int64, rising."""
        rows = super().rows(split)
        return rows[self.targets(rows) >= 0]

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """Return class numbers (N,) int64 among these classes; -1 for the others."""
        return self._numbers[super().targets(rows)]

    def counts(self, split: str) -> np.ndarray:
        """Return the images of each class in a split: (C,) int64."""
        return np.bincount(self.targets(self.rows(split)), minlength=len(self.classes))

    def table(self) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Yield (key, labels, split) of every row of these classes."""
        whole = Index(self.path, self.source)
        return (line for line in whole.table() if line[1][0] in self.classes)

    @cached_property
    def _numbers(self) -> np.ndarray:
        every: Any = self._facts["classes"]
        return np.array([self.classes.index(name) if name in self.classes else -1 for name in every], np.int64)
