"""Depthwise convolutions with large or dilated windows, without the cliffs that they have on CPUs.

oneDNN 3, as of torch 2.15, has direct kernels for the forward pass alone, and those only for float32 and for at most
six zeros at each edge; everything else falls to general kernels, ten to fifty times slower at 13 x 13. So on a CPU

- taps that no place of the plane meets are left out, more zeros than six are put at the edges beforehand, and a low
  precision is computed in float32;
- the gradient of the input is the convolution of that of the output with the window turned round;
- the gradient of the window is the convolution of the input with that of the output, every image and channel a channel
  of its own, at the stride of the dilation.

All of it is differentiable again. Elsewhere, and where a graph is recorded, it is torch's own convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIRECT_ZEROS = 6
LOW = (torch.bfloat16, torch.float16)


class LargeKernelConv2d(nn.Conv2d):
    """A depthwise convolution of stride 1 that keeps the size of the plane.

    Args:
        dim: channels.
        kernel_size: side of the window, odd.
        dilation: distance of its taps.
        bias: whether to add one.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int = 1, *, bias: bool = False) -> None:
        zeros = dilation * (kernel_size // 2)
        super().__init__(dim, dim, kernel_size, padding=zeros, dilation=dilation, groups=dim, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, C, H, W) of (B, C, H, W)."""
        return large_kernel_conv2d(input, self.weight, self.bias, self.dilation[0])


def large_kernel_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Return what ``LargeKernelConv2d`` does of x (B, C, H, W), with a weight (C, 1, k, k), k odd, from elsewhere."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return F.conv2d(x, weight, bias, 1, _zeros(weight, dilation), dilation, weight.shape[0])
    kept = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    work = torch.float32 if kept in LOW else kept
    bias = None if bias is None else bias.to(work)
    with torch.autocast("cpu", enabled=False):
        return convolved(x.to(work), weight.to(work), bias, dilation).to(kept)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Return x (B, C, H, W) convolved with a window (C, 1, k, k), k odd, on a plane of the same size."""
    weight = weight[_reach(weight.shape, x.shape, dilation)]
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in (x, weight, bias)):
        out: Tensor = _Convolution.apply(x, weight, bias, dilation)
        return out
    return _forward(x, weight, bias, dilation)


def _reach(window: torch.Size, plane: torch.Size, dilation: int) -> tuple[Any, ...]:
    """Return the part of a window that meets the plane at all."""
    parts = []
    for taps, size in zip(window[2:], plane[2:]):
        near = min(taps // 2, (size - 1) // dilation)
        parts.append(slice(taps // 2 - near, taps // 2 + near + 1))
    return (..., *parts)


def _zeros(weight: Tensor, dilation: int) -> tuple[int, int]:
    """Return the rows and the columns of zeros at each edge."""
    return dilation * (weight.shape[-2] // 2), dilation * (weight.shape[-1] // 2)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    rows, columns = _zeros(weight, dilation)
    if max(rows, columns) > DIRECT_ZEROS:
        x, rows, columns = F.pad(x, (columns, columns, rows, rows)), 0, 0
    return F.conv2d(x, weight, bias, 1, (rows, columns), dilation, weight.shape[0])


def _window_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    batch, channels = x.shape[:2]
    rows, columns = _zeros(weight, dilation)
    seen = F.pad(x, (columns, columns, rows, rows)).flatten(0, 1)[None]
    taps = F.conv2d(seen, grad.flatten(0, 1)[:, None], None, dilation, groups=batch * channels)
    return taps.view(batch, *weight.shape).sum(0)


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        return _forward(x, weight, bias, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            convolved(grad, weight.flip(2, 3), None, ctx.dilation) if needs_x else None,
            _window_gradient(grad, x, weight, ctx.dilation) if needs_weight else None,
            grad.sum((0, 2, 3)) if needs_bias else None,
            None,
        )
