"""The locally bidirectional scan in machine code for CPUs, both its scans in one pass over the states.

Threads, chunks, and what is kept for the backward pass are those of ``compiled``; no window lies in two chunks.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import require
from vitrail.layers.scan.compiled import _share, _tasks

MOST_WINDOW = 64
"""Places of the longest window: that of a chunk."""


def local_scan_compiled(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Return the same as ``local_scan_reference``, for real float32 on a CPU and windows to ``MOST_WINDOW``.

    Raises:
        MissingExtra: numba is not installed.
    """
    y, last, _ = _scan(*(x.contiguous() for x in (u, delta, A, B, C, state)), window)
    return y, last


def _chunk(window: int) -> int:
    """Return the steps of a chunk, whole windows."""
    return MOST_WINDOW // window * window


@torch.library.custom_op("vitrail::local_scan", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, D, L), the last state (B, D, N), and the states before each chunk (B, D, chunks, N)."""
    batch, channels, length = u.shape
    y, last = torch.empty_like(u), state.clone()
    before = u.new_empty(batch, channels, -(-length // _chunk(window)), A.shape[1])
    arrays = [x.detach().numpy() for x in (u, delta, A, B, C, last, y, before)]
    kernel, chunk = _kernels().forward, _chunk(window)

    def run(*arguments: Any) -> None:
        kernel(*arguments, window, chunk)

    _share(run, _tasks(batch, channels, B.shape[1]), arrays, length * A.shape[1])
    return y, last, before


@_scan.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (u.shape[2] + _chunk(window) - 1) // _chunk(window)
    return torch.empty_like(u), torch.empty_like(state), u.new_empty(u.shape[0], u.shape[1], chunks, A.shape[1])


@torch.library.custom_op("vitrail::local_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, before: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, delta, A, B, C and of the first state."""
    batch, channels, length = u.shape
    tasks = _tasks(batch, channels, B.shape[1])
    # Channels of one group that are in different tasks add up their gradients of B and C apart.
    parts = max(task.part for task in tasks) + 1
    du, ddelta, dstate = torch.empty_like(u), torch.empty_like(u), dlast.clone()
    dA = u.new_zeros(batch, *A.shape)
    dB, dC = (u.new_zeros(parts, *B.shape) for _ in range(2))
    tensors = (dy, u, delta, A, B, C, before, du, ddelta, dA, dB, dC, dstate)
    kernel, chunk = _kernels().backward, _chunk(window)

    def run(*arguments: Any) -> None:
        kernel(*arguments, window, chunk)

    _share(run, tasks, [x.detach().numpy() for x in tensors], 3 * length * A.shape[1])
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dstate


@_scan_backward.register_fake
def _(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, before: Tensor, window: int
) -> Any:
    return tuple(torch.empty_like(x) for x in (u, delta, A, B, C, dlast))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, _, ctx.window = inputs
    ctx.save_for_backward(u, delta, A, B, C, output[2])


def _gradient(ctx: Any, dy: Tensor, dlast: Tensor, dbefore: Tensor) -> tuple[Any, ...]:
    return (*_scan_backward(dy.contiguous(), dlast.contiguous(), *ctx.saved_tensors, ctx.window), None)


_scan.register_autograd(_gradient, setup_context=_keep)


@cache
def _kernels() -> ModuleType:
    """Import the machine code, which takes a second, and some ten the first time on a machine."""
    require("numba", "fast")
    from vitrail.layers.scan import local_kernels

    return local_kernels
