"""Images as a compressor or an evaluation suite takes them: streams of normalised batches that can be started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from vitrail.data.index import Index
from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import build_views
from vitrail.training.recipe import AugmentConfig, DataConfig

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Starts a stream of (images (B, 3, H, W) as the model takes them, float32; targets: class numbers (B,), or multi-hot
(B, C)). Every start yields the same."""


def batches_of(index: Index, rows: np.ndarray, preprocess: Preprocess, *, batch_size: int = 32) -> Batches:
    """Return the stream of ``rows`` as they are seen in evaluation; images that cannot be read are left out."""
    views = build_views({"image": "eval"}, preprocess, AugmentConfig(policy="none", flip=0.0), DataConfig())
    mean = torch.tensor(preprocess.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocess.std).view(1, 3, 1, 1)

    def start() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in make_loader(index, rows, views, batch_size=batch_size, shuffle=False):
            if len(batch["row"]):
                yield (batch["image"].float() / 255 - mean) / std, batch["target"]

    return start
