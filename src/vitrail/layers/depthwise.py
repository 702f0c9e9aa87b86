"""Depthwise convolution whose backward can be computed in other, equal ways, for training on CPUs.

The direct kernel that oneDNN has for the weight gradient of a depthwise convolution takes windows of at most three
columns; wider ones fall to a general kernel that is several times slower (oneDNN 3, as of torch 2.15). The gradient of
a 5 x 5 window is therefore computed as those of a 5 x 3 and a 5 x 2 window on shifted inputs: the same sums. In
bfloat16 some processors compute the gradients faster after a cast to float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

DIRECT_COLUMNS = 3


@dataclass(frozen=True)
class DepthwiseForm:
    """How the two gradients are computed; the default is torch's own way.

    Args:
        split: compute the weight gradient in groups of at most three columns of the window.
        weight_fp32: cast to float32 for the weight gradient.
        input_fp32: cast to float32 for the input gradient.
    """

    split: bool = False
    weight_fp32: bool = False
    input_fp32: bool = False


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    *,
    form: DepthwiseForm | None = None,
) -> Tensor:
    """Return ``torch.conv2d`` of one window per channel, with gradients computed as ``form`` says.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, kernel height, kernel width), in the type of ``x``.
        bias: (C,).
        stride: rows and columns.
        padding: rows and columns of zeros on each side.
        form: None is torch's own way.

    Returns:
        (B, C, H', W').
    """
    out: Tensor = _Depthwise.apply(x, weight, bias, stride, padding, form or DepthwiseForm())
    return out


def input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], fp32: bool = False
) -> Tensor:
    """Return the gradient of x (B, C, H, W), in its type, from that of the output."""
    if fp32:
        return input_gradient(grad.float(), x.float(), weight.float(), stride, padding).to(x.dtype)
    return _backward(grad, x, weight, stride, padding, [True, False, False])[0]


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    split: bool = False,
    fp32: bool = False,
) -> Tensor:
    """Return the gradient of the weight (C, 1, kh, kw), in its type, from that of the output."""
    if fp32:
        return weight_gradient(grad.float(), x.float(), weight.float(), stride, padding, split).to(weight.dtype)
    rows, columns = weight.shape[-2:]
    if not split or columns <= DIRECT_COLUMNS:
        return _backward(grad, x, weight, stride, padding, [False, True, False])[1]
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    parts = []
    for first in range(0, columns, DIRECT_COLUMNS):
        width = min(DIRECT_COLUMNS, columns - first)
        # Column j of the window meets the input columns j - padding, j - padding + stride, ...
        start = first - padding[1]
        end = start + (grad.shape[-1] - 1) * stride[1] + width
        seen = x[..., max(start, 0) : max(min(end, x.shape[-1]), 0)]
        # Of a plane narrower than the window, some of its columns meet the padding alone.
        beyond = (min(max(side, 0), end - start) for side in (-start, end - x.shape[-1]))
        seen = F.pad(seen, tuple(beyond)).contiguous(memory_format=layout)
        window = weight.new_empty(weight.shape[0], 1, rows, width)
        parts.append(_backward(grad, seen, window, stride, (padding[0], 0), [False, True, False])[1])
    return torch.cat(parts, -1)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), weight.shape[0], mask
    )
    return result


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        form: DepthwiseForm,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding, form
        return torch.conv2d(x, weight, bias, stride, padding, 1, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, form = ctx.how
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            input_gradient(grad, x, weight, stride, padding, form.input_fp32) if needs_x else None,
            weight_gradient(grad, x, weight, stride, padding, form.split, form.weight_fp32) if needs_weight else None,
            grad.sum((0, 2, 3)) if needs_bias else None,
            None,
            None,
            None,
        )
