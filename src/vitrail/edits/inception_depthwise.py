"""Inception depthwise convolution: a large depthwise convolution on a few channels at a time, in four branches.

Yu, Zhou, Yan, Wang, "InceptionNeXt: When Inception Meets ConvNeXt" (CVPR 2024). An eighth of the channels see a small
square, an eighth a row, an eighth a column, and the others nothing. What it saves is mostly memory traffic.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError


class InceptionDepthwise(nn.Module):
    """Pass most channels on, and convolve three shares of them with a square, a row and a column, each by itself.

    With stride 1 its tensors and results are those of ``timm.models.inception_next.InceptionDWConv2d``.

    Args:
        channels: of input and output.
        square_kernel: side of the square, odd.
        band_kernel: length of the row and of the column, odd.
        branch_ratio: share of the channels in each of the three branches, in (0, 1/3].
        stride: 1 or more; the channels that are passed on are sampled at the same places.
        dilation: of the square, and of the bands along their length.
        bias: have one in each branch.

    Raises:
        InputError: an argument out of range, or a share of less than one channel.
    """

    def __init__(
        self,
        channels: int,
        square_kernel: int = 3,
        band_kernel: int = 11,
        branch_ratio: float = 0.125,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _refuse(square_kernel, band_kernel, branch_ratio)
        share = int(channels * branch_ratio)
        if not share:
            raise InputError(
                f"inception_depthwise: branch_ratio = {branch_ratio} of {channels} channels is less than one channel: "
                f"give {1 / channels:.3g} or more, or name other layers with modules='a pattern of their names'"
            )

        def branch(rows: int, columns: int) -> nn.Conv2d:
            padding = (rows // 2 * dilation, columns // 2 * dilation)
            conv = nn.Conv2d(share, share, (rows, columns), stride, padding, dilation, groups=share, bias=bias)
            trunc_normal_(conv.weight, std=0.02)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            return conv

        self.dwconv_hw = branch(square_kernel, square_kernel)
        self.dwconv_w = branch(1, band_kernel)
        self.dwconv_h = branch(band_kernel, 1)
        self.stride, self.split = stride, (channels - 3 * share, share, share, share)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(H / stride), ceil(W / stride))."""
        same, square, row, column = x.split(self.split, dim=1)
        if self.stride > 1:
            same = same[..., :: self.stride, :: self.stride]
        return torch.cat((same, self.dwconv_hw(square), self.dwconv_w(row), self.dwconv_h(column)), dim=1)


def inception_depthwise(
    *,
    square_kernel: int = 3,
    band_kernel: int = 11,
    branch_ratio: float = 0.125,
    min_kernel: int = 5,
    modules: str | None = None,
) -> Edit:
    """Return the edit that puts Inception depthwise convolutions in the place of large depthwise convolutions.

    It replaces depthwise convolutions that keep the number of channels and, but for their stride, the size: of any odd
    kernel from ``min_kernel`` on, stride and dilation. New weights begin as published.

    Args:
        square_kernel: side of the square, odd.
        band_kernel: length of the bands, odd; 11 is published, 9 for the smallest net.
        branch_ratio: share of the channels in each branch, in (0, 1/3]; 1/8 is published, 1/4 for the smallest net.
        min_kernel: smallest side of a convolution that is replaced, 2 or more.
        modules: regular expression; only layers whose whole dotted name matches are replaced.

    Raises:
        InputError: an argument out of range; or, from the edit, a model without such convolutions.

    Example:
        >>> model = inception_depthwise()(timm.create_model("convnext_tiny"))    # doctest: +SKIP
    """
    _refuse(square_kernel, band_kernel, branch_ratio)
    if not isinstance(min_kernel, int) or min_kernel < 2:
        raise InputError(f"inception_depthwise: min_kernel = {min_kernel!r} is not allowed: give a whole number from 2")
    try:
        pattern = re.compile(".*" if modules is None else modules)
    except (re.error, TypeError) as error:
        raise InputError(
            f"inception_depthwise: modules = {modules!r} is no regular expression ({error}): "
            r"give one that matches whole names of layers, such as 'stages\.0\..*'"
        ) from None

    def matches(name: str, module: nn.Module) -> bool:
        return pattern.fullmatch(name) is not None and _is_large_depthwise(module, min_kernel)

    def build(layer: Any) -> nn.Module:
        return InceptionDepthwise(
            layer.in_channels,
            square_kernel,
            band_kernel,
            branch_ratio,
            layer.stride[0],
            layer.dilation[0],
            layer.bias is not None,
        ).to(layer.weight.dtype)

    what = f"depthwise convolution of {min_kernel} x {min_kernel} or more that keeps its size"
    what += "" if modules is None else f" and whose whole name matches {modules!r}"
    return lambda model: replace_modules(model, matches, build, what=what)


def _is_large_depthwise(layer: nn.Module, min_kernel: int) -> bool:
    if not isinstance(layer, nn.Conv2d) or not 1 < layer.groups == layer.in_channels == layer.out_channels:
        return False
    alike = all(len(set(pair)) == 1 for pair in (layer.stride, layer.dilation))
    sides = layer.kernel_size
    kept = isinstance(layer, Conv2dSame) or layer.padding in (
        "same",
        tuple(side // 2 * layer.dilation[0] for side in sides),
    )
    return alike and kept and min(sides) >= min_kernel and all(side % 2 for side in sides)


def _refuse(square_kernel: int, band_kernel: int, branch_ratio: float) -> None:
    for name, value in (("square_kernel", square_kernel), ("band_kernel", band_kernel)):
        if not isinstance(value, int) or value < 1 or value % 2 == 0:
            raise InputError(f"inception_depthwise: {name} = {value!r} is not allowed: give an odd number from 1")
    if not 0 < branch_ratio <= 1 / 3:
        raise InputError(
            f"inception_depthwise: branch_ratio = {branch_ratio!r} is not allowed: give more than 0, up to 1/3"
        )
