"""The selective scan of a plane in machine code for CPUs, forward and backward, compiled by numba at the first call.

Threads share out images and channels; a task goes row by row. The states of one row in each strip are kept, and the
backward pass computes those inside again, so that memory grows with the plane as inputs and outputs do.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import require
from vitrail.layers.scan.compiled import _share, _tasks

STRIP = 16
"""Rows between two whose states are kept."""


def plane_scan_compiled(
    u: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
) -> Tensor:
    """Return the same as ``plane_scan_reference``, for float32 on a CPU.

    Raises:
        MissingExtra: numba is not installed.
    """
    y: Tensor = _scan(*(x.contiguous() for x in (u, delta_top, delta_left, A_top, A_left, B_top, B_left, C)))[0]
    return y


@torch.library.custom_op("vitrail::plane_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return y (B, H, W, D), and the states of the row before each strip (B, H / STRIP, W, N, D)."""
    batch, height, width, channels = u.shape
    size = A_top.shape[1]
    y, before = torch.empty_like(u), u.new_empty(batch, -(-height // STRIP), width, size, channels)
    tensors = (u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, y, before)
    arrays, kernel = [x.detach().numpy() for x in tensors], _kernels().forward

    def run(image: int, first: int, last: int, *_: Any) -> None:
        kernel(image, first, last, *arrays, STRIP)

    _share(run, _tasks(batch, channels, 1), [], 2 * height * width * size)
    return y, before


@_scan.register_fake
def _(u: Tensor, delta_top: Tensor, delta_left: Tensor, A_top: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    strips = (u.shape[1] + STRIP - 1) // STRIP
    return torch.empty_like(u), u.new_empty(u.shape[0], strips, u.shape[2], A_top.shape[1], u.shape[3])


@torch.library.custom_op("vitrail::plane_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    u: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of all inputs of ``_scan``."""
    batch, height, width, channels = u.shape
    tasks = _tasks(batch, channels, 1)
    # Channels that are in different tasks add up their gradients of B and C apart.
    parts = max(task.part for task in tasks) + 1
    du, ddelta_top, ddelta_left = (torch.empty_like(u) for _ in range(3))
    dA_top, dA_left = (u.new_empty(batch, *A_top.shape) for _ in range(2))
    dB_top, dB_left, dC = (u.new_zeros(parts, *C.shape) for _ in range(3))
    given = (dy, u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, before)
    found = (du, ddelta_top, ddelta_left, dA_top, dA_left, dB_top, dB_left, dC)
    arrays, kernel = [x.detach().numpy() for x in (*given, *found)], _kernels().backward

    def run(image: int, first: int, last: int, part: int, *_: Any) -> None:
        kernel(image, first, last, part, *arrays, STRIP)

    _share(run, tasks, [], 6 * height * width * A_top.shape[1])
    return du, ddelta_top, ddelta_left, dA_top.sum(0), dA_left.sum(0), dB_top.sum(0), dB_left.sum(0), dC.sum(0)


@_scan_backward.register_fake
def _(dy: Tensor, *inputs: Tensor) -> Any:
    return tuple(torch.empty_like(x) for x in inputs[:-1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradient(ctx: Any, dy: Tensor, dbefore: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _scan_backward(dy.contiguous(), *ctx.saved_tensors)
    return found


_scan.register_autograd(_gradient, setup_context=_keep)


@cache
def _kernels() -> ModuleType:
    """Import the machine code, which takes a second, and some ten the first time on a machine."""
    require("numba", "fast")
    from vitrail.layers.scan import plane_kernels

    return plane_kernels
