"""How much memory a computation takes at its peak, counted and not sampled: the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, from then until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs), count=False)  # what was there before is not counted, nor are views of it
        out = func(*args, **(kwargs or {}))
        self.note(out, count=True)
        return out

    def note(self, values: Any, *, count: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and id(storage := value.untyped_storage()) not in self.known:
                size = storage.nbytes() if count else 0
                self.known.add(id(storage))
                weakref.finalize(storage, self.freed, id(storage), size)
                self.now += size
                self.peak = max(self.peak, self.now)

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors that ``run`` has at a time, beyond those it begins with.

    What an operator takes for itself while it runs is not seen.

    Args:
        run: what is measured, such as ``lambda: model(images).sum().backward()``.
    """
    with _Live() as live:
        run()
    return live.peak


def training_peak(module: torch.nn.Module, x: Tensor) -> int:
    """Return the peak of a forward and a backward pass of ``module`` on ``x``, with the gradients, in bytes."""

    def run() -> None:
        module(x).square().mean().backward()

    try:
        return peak_bytes(run)
    finally:
        module.zero_grad(set_to_none=True)
