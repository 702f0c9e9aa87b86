"""Convolutions whose channels choose among spaces of activations, in the place of a net's own (S-ConvKAN).

Yang et al., "Activation Space Selectable Kolmogorov-Arnold Networks" (2024), arXiv 2408.08338; the layer is
``vitrail.layers.selectable_kan.SelectableKAN``, and ``SelectiveTraining`` lets channels choose in the middle of
training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError
from vitrail.layers.selectable_kan import DEFAULT, SelectableKAN, check_spaces


def skan(*, spaces: Sequence[str] = DEFAULT, size: int = 4, modules: str | None = None) -> Edit:
    """Return the edit that makes 2-D convolutions of a net choose among spaces of activations.

    All of its plain convolutions change, depthwise and 1x1 ones too; normalisations and activations stay.

    Args:
        spaces: different ones of "spline", "radial", "chebyshev", "legendre", "wavelet" and "fourier".
        size: functions of each space, 2 to 12.
        modules: regular expression; only layers whose whole dotted name matches change.

    Raises:
        InputError: an argument out of range; or, from the edit, a net without such a convolution (the text lists what
            it has).
        UnknownName: another space.

    Example:
        >>> model = skan(spaces=("spline", "fourier"))(timm.create_model("resnet18"))          # doctest: +SKIP
    """
    check_spaces(spaces, size)
    try:
        pattern = None if modules is None else re.compile(modules)
    except (re.error, TypeError) as error:
        raise InputError(
            f"skan: modules = {modules!r} is no regular expression ({error}): "
            r"give one that matches whole names of layers, such as 'layer\d\.\d\.conv1'"
        ) from None

    def edit(model: nn.Module) -> nn.Module:
        inside = {part for found in model.modules() if isinstance(found, SelectableKAN) for part in found.modules()}

        def matches(name: str, module: nn.Module) -> bool:
            plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and module not in inside
            return plain and (pattern is None or bool(pattern.fullmatch(name)))

        def build(conv: Any) -> nn.Module:
            where = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            own: dict[str, Any] = {"spaces": spaces, "size": size, "bias": conv.bias is not None}
            return SelectableKAN(conv.in_channels, conv.out_channels, *where, **own).to(conv.weight.dtype)

        named = "" if pattern is None else f" whose whole name matches {modules!r}"
        return replace_modules(model, matches, build, what=f"plain 2-D convolution{named}")

    return edit
