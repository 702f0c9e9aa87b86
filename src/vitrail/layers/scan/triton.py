"""The selective scan for GPUs, forward and backward, in Triton, which comes with torch for CUDA.

Checked in Triton's interpreter, against the reference, and compiled for NVIDIA's architecture 90; never run or
measured on a GPU. States before each chunk are kept, and the backward pass computes those inside again, so that memory
grows with the length as inputs and outputs do. Gradients of B and C are added up in no fixed order: they differ in the
last digits from run to run.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import InputError, MissingExtra

STEPS = 32
"""Steps of a chunk, a power of two."""
TILE = 1024
"""Elements of a tile (channels, steps, states); with twice as many the backward pass fills the registers there are."""


def selective_scan_triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as ``selective_scan_reference``, for real float32 on a GPU, or in Triton's interpreter.

    Raises:
        InputError: a complex A or one in float64.
        MissingExtra: Triton is not installed.
    """
    if A.dtype != torch.float32:
        raise InputError(f"selective_scan: form = triton takes a real A in float32, not {A.dtype}: choose another form")
    y, last, _ = _scan(*(x.contiguous() for x in (u, delta, A, B, C, state)))
    return y, last


@torch.library.custom_op("vitrail::selective_scan_triton", mutates_args=())
def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, D, L), the last state (B, D, N), and the states before each chunk (B, L / STEPS, D, N)."""
    y, last, before = _outputs(u, A, state)
    _launch("forward", B, (u, delta, A, B, C, state, y, last, before), before)
    return y, last, before


@_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(u, A, state)


def _outputs(u: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (u.shape[2] + STEPS - 1) // STEPS
    return torch.empty_like(u), torch.empty_like(state), u.new_empty(u.shape[0], chunks, *A.shape)


@torch.library.custom_op("vitrail::selective_scan_triton_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, delta, A, B, C and of the first state."""
    du, ddelta, dstate = torch.empty_like(u), torch.empty_like(u), torch.empty_like(dlast)
    dA, dB, dC = torch.empty_like(dlast), torch.zeros_like(B), torch.zeros_like(C)
    _launch("backward", B, (dy, dlast, u, delta, A, B, C, before, du, ddelta, dA, dB, dC, dstate), before)
    return du, ddelta, dA.sum(0), dB, dC, dstate


@_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, before: Tensor) -> Any:
    return tuple(torch.empty_like(x) for x in (u, delta, A, B, C, dlast))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, _ = inputs
    ctx.save_for_backward(u, delta, A, B, C, output[2])


def _gradient(ctx: Any, dy: Tensor, dlast: Tensor, dbefore: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _scan_backward(dy.contiguous(), dlast.contiguous(), *ctx.saved_tensors)
    return found


_scan.register_autograd(_gradient, setup_context=_keep)


def _launch(name: str, B: Tensor, tensors: tuple[Tensor, ...], before: Tensor) -> None:
    batch, groups, size, length = B.shape
    chunks, channels = before.shape[1:3]
    rows = 1 << (size - 1).bit_length()
    width = min(max(1, TILE // (STEPS * rows)), 1 << (channels // groups - 1).bit_length())
    grid = (batch, -(-channels // groups // width), groups)
    with torch.cuda.device_of(B):  # nothing, on a CPU
        getattr(_kernels(), name)[grid](
            *tensors, channels, groups, length, size, chunks, WIDTH=width, STEPS=STEPS, SIZE=rows
        )


@cache
def _kernels() -> ModuleType:
    """Import the kernels, and Triton, which takes a second; the interpreter has to be asked for before."""
    try:
        return importlib.import_module("vitrail.layers.scan.triton_kernels")
    except ImportError as error:
        raise MissingExtra(
            f"form = triton needs the package triton, which cannot be imported ({error}): it comes with torch "
            "for CUDA; install that, or choose another form"
        ) from error
