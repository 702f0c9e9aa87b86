"""A data set in memory, a tiny net and a short recipe, for the tests of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitrail.data.preprocess import Preprocess
from vitrail.methods.supervised.supervised import Supervised
from vitrail.runs import RunFolder
from vitrail.training.recipe import Recipe

PREPROCESS = Preprocess(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.3, 0.25, 0.2))


class MemoryIndex:
    """The interface of ``data.index.Index`` over arrays; class c is brighter in channel c."""

    def __init__(self, train: int, val: int, classes: int = 3, multilabel: bool = False, size: int = 8) -> None:
        rng = np.random.default_rng(0)
        self.classes = tuple(f"class{number}" for number in range(classes))
        self.multilabel = multilabel
        self._split = {"train": np.arange(train), "val": np.arange(train, train + val)}
        numbers = rng.integers(0, classes, train + val)
        self._targets = numbers
        if multilabel:
            self._targets = (rng.random((train + val, classes)) < 0.4).astype(np.float32)
        hot = self._targets if multilabel else np.eye(classes)[numbers]
        noise = rng.integers(0, 200, (train + val, size, size, 3))
        self._pixels = (noise + 55 * hot[:, None, None, :3]).astype(np.uint8)
        self.broken: set[int] = set()

    def __len__(self) -> int:
        return len(self._pixels)

    def rows(self, split: str) -> np.ndarray:
        return self._split[split]

    def key(self, row: int) -> str:
        return f"image{row}"

    def targets(self, rows: np.ndarray) -> np.ndarray:
        return self._targets[rows]

    def counts(self, split: str) -> np.ndarray:
        targets = self._targets[self._split[split]]
        return targets.sum(0) if self.multilabel else np.bincount(targets, minlength=len(self.classes))

    def read(self, row: int) -> bytes | np.ndarray:
        return b"" if row in self.broken else self._pixels[row]

    def readable(self, row: int) -> bool:
        return row not in self.broken


class TinyNet(nn.Module):
    """Two convolutions with batch normalisation and dropout, on demand."""

    def __init__(self, classes: int = 3, norm: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.num_classes = classes
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv1(x)).relu()
        return self.head(self.drop(self.conv2(x).relu().mean((2, 3))))


def recipe(**overrides: Any) -> Recipe:
    """Return a resolved recipe; ``train__epochs=2`` sets ``train.epochs``."""
    values: dict[str, Any] = {
        "augment": {"policy": "shift", "flip": 0.5},
        "optim": {"lr": 0.01},
        "train": {
            "epochs": 2,
            "batch_size": 16,
            "precision": "fp32",
            "channels_last": False,
            "ema": 0.0,
            "workers": 0,
            "head_start": 0.0,
            "cache_mb": 0,
        },
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return Recipe.from_dict(values)


def method(seed: int = 0, **options: Any) -> Supervised:
    torch.manual_seed(seed)
    multilabel = options.pop("multilabel", False)
    return Supervised(TinyNet(**options), smoothing=0.1, multilabel=multilabel)


def folder(path: Path) -> RunFolder:
    run = RunFolder(path)
    run.create()
    return run
