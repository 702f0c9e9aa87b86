"""The contract of an evaluation suite: ``run(model, data: Batches, **options) -> Result``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Result:
    """What a suite found.

    Attributes:
        title: what was looked at, a line.
        table: rows of plain values, the same keys in each.
        figures: name -> SVG text that needs nothing else, as the functions of ``vitrail.report.plots`` return it.
        notes: what a reader has to know of how it was measured.
    """

    title: str
    table: list[dict[str, Any]]
    figures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode and without gradients for a while, and then put every part's mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
