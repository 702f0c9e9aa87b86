"""E2GC: group convolutions whose groups have the same size in all layers, and the size that balances their costs.

Jha, Saini, Nag, Mittal, "E2GC: Energy-efficient Group Convolution in Deep Neural Networks" (VLSI Design 2020). With a
fixed number of groups g a layer of M channels has groups of M / g, which grow with the depth of a net; with a fixed
size G it has M / G groups. Small groups compute little but use each value that they fetch seldom, large ones compute
much: where both cost the same lies the optimum.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError
from vitrail.evaluate.energy import JOULES_PER_BYTE, JOULES_PER_MAC

BYTES = 4
"""Of a value in float32."""


def layer_costs(
    size: float,
    channels: tuple[int, int],
    places: tuple[int, int],
    taps: int,
    *,
    per_mac: float = JOULES_PER_MAC,
    per_byte: float = JOULES_PER_BYTE,
) -> tuple[float, float]:
    """Return what a group convolution costs to compute and in data moved, for one image.

    It computes k^2 N G P' multiply-adds, and moves M P inputs, N P' outputs and k^2 N G weights, each once.

    Args:
        size: channels of a group, G.
        channels: in and out, M and N.
        places: of the map in and out, P and P'.
        taps: of the window, k^2.
        per_mac, per_byte: costs of a multiply-add and of a byte, in one unit: joules, or seconds.
    """
    weights = taps * channels[1] * size
    values = channels[0] * places[0] + channels[1] * places[1]
    return per_mac * weights * places[1], per_byte * BYTES * (values + weights)


def optimum_size(
    channels: tuple[int, int],
    places: tuple[int, int],
    taps: int,
    *,
    per_mac: float = JOULES_PER_MAC,
    per_byte: float = JOULES_PER_BYTE,
) -> float:
    """Return the size G of groups at which computing costs what moving data does, at most M.

    Below it a larger group reuses data for less than it costs to move them; beyond it computing dominates. The
    arguments are those of ``layer_costs``. Where weights cost more to move than to use, on maps of few places, it is M.
    """
    computed, moved = layer_costs(1, channels, places, taps, per_mac=per_mac, per_byte=per_byte)
    of_values = layer_costs(0, channels, places, taps, per_mac=per_mac, per_byte=per_byte)[1]
    slope = computed - (moved - of_values)  # of the difference of both costs
    return min(float(channels[0]), of_values / slope) if slope > 0 else float(channels[0])


def model_optimum(model: nn.Module, side: int = 224, **costs: float) -> int:
    """Return the one size for all grouped layers of a model: the power of two next to their optima's geometric mean.

    Args:
        model: with grouped convolutions.
        side: of its images, in pixels.
        **costs: ``per_mac`` and ``per_byte``, as of ``layer_costs``.

    Raises:
        InputError: there is no grouped convolution.
    """
    optima: list[float] = []

    def note(conv: Any, inputs: Any, output: Any) -> None:
        places = inputs[0].shape[2] * inputs[0].shape[3], output.shape[2] * output.shape[3]
        channels = conv.in_channels, conv.out_channels
        optima.append(optimum_size(channels, places, math.prod(conv.kernel_size), **costs))

    layers = [module for module in model.modules() if _is_grouped(module)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no grouped convolution: give size=, or a model that has some")
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    modes = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_hook(note) for layer in layers]
    state = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    try:
        # Shapes alone are followed: on the meta device nothing is computed.
        with torch.no_grad():
            image = torch.zeros(1, first.in_channels, side, side, device="meta")
            torch.func.functional_call(model.eval(), state, image)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return int(2 ** round(sum(math.log2(max(1.0, each)) for each in optima) / len(optima)))


def group_convolution(
    *, size: int | None = None, groups: int | None = None, side: int = 224, modules: str | None = None
) -> Edit:
    """Return the edit that gives all grouped convolutions groups of one size, and new weights.

    Depthwise layers, as of MobileNets, and grouped ones, as of ResNeXt, are grouped convolutions. In a layer whose
    channels cannot be divided so, the size is the next smaller one that divides them, or the least that does.

    Args:
        size: channels of a group, G; 1 is depthwise. None takes ``model_optimum``.
        groups: number of groups instead, which is what the paper compares with.
        side: of the images for which the optimum is found, in pixels.
        modules: regular expression; only layers whose whole dotted name matches, grouped until now or not.

    Raises:
        InputError: an argument out of range; or, from the edit, a model without a layer that would change.

    Example:
        >>> model = group_convolution(size=16)(timm.create_model("mobilenetv1_100"))         # doctest: +SKIP
        >>> model = group_convolution()(timm.create_model("resnext50_32x4d"))                # doctest: +SKIP
    """
    for name, value in (("size", size), ("groups", groups), ("side", side)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"group_convolution: {name} = {value!r} is not allowed: give a whole number, at least 1")
    if size is not None and groups is not None:
        raise InputError(f"group_convolution: size = {size} with groups = {groups} is not allowed: give one of them")
    try:
        pattern = None if modules is None else re.compile(modules)
    except (re.error, TypeError) as error:
        raise InputError(
            f"group_convolution: modules = {modules!r} is no regular expression ({error}): "
            r"give one that matches whole names of layers, such as 'layer[34]\..*conv2'"
        ) from None

    def edit(model: nn.Module) -> nn.Module:
        def chosen(name: str, module: nn.Module) -> bool:
            plain = type(module) is nn.Conv2d
            return plain and (pattern.fullmatch(name) is not None if pattern else _is_grouped(module))

        found = any(chosen(name, module) for name, module in model.named_modules())
        wanted = model_optimum(model, side) if found and size is None and groups is None else size

        def number(conv: Any) -> int:
            if groups is not None:
                return _divisor(conv, groups)
            sizes = [
                each
                for each in range(1, conv.in_channels + 1)
                if conv.in_channels % each == 0 and conv.out_channels % (conv.in_channels // each) == 0
            ]
            return conv.in_channels // max((each for each in sizes if each <= (wanted or 1)), default=sizes[0])

        def matches(name: str, module: nn.Module) -> bool:
            return chosen(name, module) and number(module) != getattr(module, "groups", None)

        what = f"grouped convolution whose groups would become {f'of size {wanted}' if groups is None else groups}"
        return replace_modules(model, matches, lambda conv: _regrouped(conv, number(conv)), what=what)

    return edit


def _is_grouped(module: Any) -> bool:
    return type(module) is nn.Conv2d and module.groups > 1


def _divisor(conv: Any, most: int) -> int:
    """Return the greatest number of groups, at most ``most``, that divides both widths."""
    both = math.gcd(conv.in_channels, conv.out_channels)
    return max(each for each in range(1, min(most, both) + 1) if both % each == 0)


def _regrouped(conv: Any, groups: int) -> nn.Conv2d:
    new = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        groups,
        conv.bias is not None,
        conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    # As timm draws the grouped convolutions of MobileNets: by how many outputs each input has.
    fan_out = new.weight.shape[2] * new.weight.shape[3] * new.out_channels // groups
    nn.init.normal_(new.weight, 0.0, math.sqrt(2 / fan_out))
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new
