"""The embedded default: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from vitrail.data.sources.base import Record


class DigitsSource:
    """The digits, grey values 0 to 16 scaled to 0 to 255."""

    kind = "digits"
    multilabel = False
    uri = "digits"

    def records(self) -> Iterator[Record]:
        """Yield the digits in the order of the data set."""
        for number, label in enumerate(_digits()[1]):
            name = f"digits/{number:04d}"
            yield Record(name, str(number), (str(label),))

    def read(self, locator: str) -> np.ndarray:
        """Return the pixels: (8, 8), uint8."""
        return _digits()[0][int(locator)]

    def stamp(self, locator: str) -> str:
        """Return a constant: the digits never change."""
        return "digits"


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target
