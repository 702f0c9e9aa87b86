"""The contract of a training objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
"""``image`` (or one entry per name in ``Method.views``): normalised floats (B, 3, H, W). ``target``: class numbers
(B,), or probabilities / multi-hot (B, C). ``row``: the samples' rows in the index (B,)."""


class Method(nn.Module):
    """A training objective: plain torch, no engine inside.

    A subclass holds what it trains (at least ``self.model``, the network that ships) and implements ``loss``.
    ``forward`` is ``loss``, so that data-parallel wrappers see the call.

    Attributes:
        views: the view of a training image that each entry of a batch holds: ``"train"`` (the recipe's augmentation),
            ``"weak"`` (crop or shift and flip only), ``"eval"`` (as in evaluation), or one of DINO's crops,
            ``"global_1"``, ``"global_2"`` and ``"local"``.
    """

    views: ClassVar[Mapping[str, str]] = {"image": "train"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``"loss"``, the scalar to minimise (a mean over the batch), and named terms to log."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Call ``loss``."""
        return self.loss(batch)

    def param_groups(self) -> Iterable[dict[str, Any]] | None:
        """Return optimiser groups for parameters beyond the model's, or None for the recipe's defaults."""
        return None

    def after_step(self) -> None:
        """Run after each optimiser step, for teachers and queues."""

    def schedule(self, progress: float) -> None:
        """Adapt to the progress of training, a number from 0 to 1."""


def one_hot_targets(target: Tensor, num_classes: int) -> Tensor:
    """Return targets as probabilities (B, C): class numbers become one-hot, probabilities pass through."""
    if target.ndim == 1:
        return torch.nn.functional.one_hot(target, num_classes).to(torch.float32)
    return target
