"""The selective scan in machine code for CPUs, forward and backward, compiled by numba at the first call.

Threads share out batches and channels. A task goes through its sequences in chunks, so that B and C of a chunk stay in
the first cache for all its channels; states before each chunk are kept, and the backward pass computes those inside
again, so that memory grows with the length as inputs and outputs do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.errors import require

SERIAL_WORK = 1 << 17
"""Updates of one element of a state (some 50 microseconds) below which a second thread costs more than it saves."""


def selective_scan_compiled(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the same as ``selective_scan_reference``, for real float32 on a CPU, and with what else is given.

    ``y`` lies in memory as ``delta`` does: none of u, delta and their gradients is copied to be in another order.

    Raises:
        MissingExtra: numba is not installed.
    """
    none = A.new_zeros(A.shape[0])
    own = torch.stack((none if D is None else D, none if delta_bias is None else delta_bias), 1)
    y, last, _ = _scan(u, delta, *(x.contiguous() for x in (A, B, C, state)), own, softplus)
    return y, last


# ---- what torch sees: an operator with a gradient


@torch.library.custom_op("vitrail::selective_scan", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, own: Tensor, softplus: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, D, L), the last state (B, D, N), and the states before each chunk (B, D, L / CHUNK, N).

    ``own`` are D and the bias of delta, (D, 2).
    """
    batch, channels, length = u.shape
    y, last = torch.empty_like(delta), state.clone()
    before = u.new_empty(batch, channels, -(-length // _kernels().CHUNK), A.shape[1])
    arrays = [x.detach().numpy() for x in (u, delta, A, B, C, own, last, y, before)]
    _share(_kernels().forward, _tasks(batch, channels, B.shape[1]), [softplus, *arrays], length * A.shape[1])
    return y, last, before


@_scan.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, own: Tensor, softplus: bool
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (u.shape[2] + _kernels().CHUNK - 1) // _kernels().CHUNK
    return torch.empty_like(delta), torch.empty_like(state), u.new_empty(u.shape[0], u.shape[1], chunks, A.shape[1])


@torch.library.custom_op("vitrail::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    own: Tensor,
    before: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, delta, A, B, C, the first state and ``own``."""
    batch, channels, length = u.shape
    tasks = _tasks(batch, channels, B.shape[1])
    # Channels of one group that are in different tasks add up their gradients of B and C apart.
    parts = max(task.part for task in tasks) + 1
    du, ddelta, dstate = torch.empty_like(u), torch.empty_like(delta), dlast.clone()
    dA, down = u.new_empty(batch, *A.shape), u.new_empty(batch, *own.shape)
    dB, dC = (u.new_zeros(parts, *B.shape) for _ in range(2))
    tensors = (u, delta, A, B, C, own, dy, before, du, ddelta, dA, dB, dC, down, dstate)
    arrays = [softplus, *(x.detach().numpy() for x in tensors)]
    _share(_kernels().backward, tasks, arrays, 3 * length * A.shape[1])
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dstate, down.sum(0)


@_scan_backward.register_fake
def _(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    own: Tensor,
    before: Tensor,
    softplus: bool,
) -> Any:
    return tuple(torch.empty_like(x) for x in (u, delta, A, B, C, dlast, own))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, _, own, ctx.softplus = inputs
    ctx.save_for_backward(u, delta, A, B, C, own, output[2])


def _gradient(ctx: Any, dy: Tensor, dlast: Tensor, dbefore: Tensor) -> tuple[Tensor | None, ...]:
    return (*_scan_backward(dy, dlast.contiguous(), *ctx.saved_tensors, ctx.softplus), None)


_scan.register_autograd(_gradient, setup_context=_keep)


@cache
def _kernels() -> ModuleType:
    """Import the machine code, which takes a second, and some ten the first time on a machine."""
    require("numba", "fast")
    from vitrail.layers.scan import kernels

    return kernels


# ---- threads


class _Task(NamedTuple):
    image: int
    first: int
    last: int
    """Channels, of one group."""
    part: int


def _tasks(batch: int, channels: int, groups: int) -> list[_Task]:
    """Return tasks, at least as many as threads where there are channels enough."""
    size = channels // groups
    parts = min(size, -(-torch.get_num_threads() // (batch * groups)))
    edges = [size * part // parts for part in range(parts + 1)]
    return [
        _Task(image, group * size + edges[part], group * size + edges[part + 1], part)
        for image in range(batch)
        for group in range(groups)
        for part in range(parts)
    ]


def _share(kernel: Callable[..., None], tasks: list[_Task], arrays: Sequence[Any], work: int) -> None:
    """Call ``kernel(*task, *arrays)`` for all tasks; ``work`` is that of one channel, for which see ``SERIAL_WORK``."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads == 1 or work * sum(task.last - task.first for task in tasks) < SERIAL_WORK:
        for task in tasks:
            kernel(*task, *arrays)
        return
    for done in [_pool(threads).submit(kernel, *task, *arrays) for task in tasks]:
        done.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "vitrail-scan")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads
