"""The contract of a compressor: ``compress(model, calibration: Batches, budget: Budget, **options) -> Compressed``.

The model that is given is not changed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from torch import nn

from vitrail.errors import InputError


@dataclass(frozen=True)
class Budget:
    """What the compressed model may take; None is no bound. At least one is given.

    Attributes:
        bytes: of all weights as they are stored.
        flops: multiply-adds of one image.
        bitops: multiply-adds, each times the bits of its weight and of its activation.
        latency_ms: of one image on this machine.
        drop: of the accuracy on the calibration images, 0.01 being one percentage point.
    """

    bytes: float | None = None
    flops: float | None = None
    bitops: float | None = None
    latency_ms: float | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        if all(value is None for value in given.values()):
            raise InputError(f"a budget needs at least one bound: give one of {', '.join(given)}")
        for name, value in given.items():
            if value is not None and not (isinstance(value, Real) and 0 <= float(value) < float("inf")):
                raise InputError(f"budget {name} = {value!r} is not allowed: give a finite number from 0")


@dataclass(frozen=True)
class Compressed:
    """A model that computes what its runtime will compute, and how it came about.

    Attributes:
        model: plain torch; exports to ONNX.
        report: plain values for JSON: at least ``bytes``, ``bytes_before`` and ``layers`` (one entry per layer with its
            ``name`` and what was decided for it).
    """

    model: nn.Module
    report: dict[str, Any]
