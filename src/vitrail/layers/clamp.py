"""Clamping (ReLU6 and its kin) that keeps its output for the backward.

torch's ``hardtanh_`` keeps a copy of its input, made on every call; whether an element was clamped can as well be read
off the output, which the next layer keeps anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def clamp(x: Tensor, low: float, high: float, *, inplace: bool = False) -> Tensor:
    """Return x, of any shape, limited to [low, high]; the gradient passes strictly between, as in ``hardtanh``."""
    out: Tensor = _Clamp.apply(x, low, high, inplace)
    return out


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        out = x.clamp_(low, high) if inplace else x.clamp(low, high)
        if inplace:
            ctx.mark_dirty(x)
        ctx.limits = low, high
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, out, *ctx.limits), None, None, None
