"""The selective scan by the CUDA kernels of the package mamba_ssm, of the authors of Mamba, where a user has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitrail.errors import InputError, MissingExtra

MOST_STATES = 256
"""N that the kernels are built for."""


def selective_scan_mamba_ssm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as ``selective_scan_reference`` from a state of zero, which these kernels begin with.

    ``state`` is not read: ``selective_scan`` refuses one for this form. The last state has no gradient.

    Raises:
        InputError: a complex A or one in float64; in the backward pass, a gradient of the last state.
        MissingExtra: mamba_ssm is not installed, or was built for another torch or CUDA.
    """
    if A.dtype != torch.float32:
        raise InputError(
            f"selective_scan: form = mamba_ssm takes a real A in float32, not {A.dtype}: choose another form"
        )
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise MissingExtra(
            f"form = mamba_ssm needs the package mamba_ssm, which cannot be imported ({error}): run  pip install "
            "mamba_ssm  on a machine with CUDA, or choose another form"
        ) from error
    y, last = selective_scan_fn(u, delta, A.contiguous(), B, C, return_last_state=True)
    return y, _WithoutGradient.apply(last)


class _WithoutGradient(torch.autograd.Function):
    """The identity, through which no gradient may come: the kernels would take it for zero without a word."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise InputError(
            "selective_scan: form = mamba_ssm has no gradient of the last state: detach it, or choose another form"
        )
