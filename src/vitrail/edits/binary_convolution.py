"""XNOR-Net's two forms of any convolutional network: Binary-Weight-Networks and XNOR-Networks.

Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks"
(ECCV 2016). The convolutions between the first and the last layer become ``layers.binary.BinaryConv2d``, where the
mathematics is; the first and the last layer stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError
from vitrail.layers.binary import BinaryConv2d, PackedConv2d


def binary_convolution(
    *, inputs: bool = True, scaled: bool = True, modules: str | None = None, packed: bool = False
) -> Edit:
    """Return the edit that makes convolutions binary.

    Those are plain ``nn.Conv2d`` with more than one channel in each filter, but for the first and the last layer of
    the network (of all that convolve or are linear). In an XNOR-Network each brings the normalisation of its inputs.

    Args:
        inputs: take the signs of inputs as well as of weights: an XNOR-Network; else a Binary-Weight-Network.
        scaled: scale outputs by the magnitudes of inputs (K), as the paper; the published code does not.
        modules: regular expression; only layers whose whole dotted name matches, the first and the last among them.
        packed: make the layers as bits at once, for weights of a packed model; they cannot be trained.

    Raises:
        InputError: an argument of another kind; or, from the edit, a network without such layers.

    Example:
        >>> model = binary_convolution()(timm.create_model("resnet18"))                      # doctest: +SKIP
        >>> model = binary_convolution(inputs=False)(timm.create_model("resnet18"))          # doctest: +SKIP
    """
    for name, value in (("inputs", inputs), ("scaled", scaled), ("packed", packed)):
        if not isinstance(value, bool):
            raise InputError(f"binary_convolution: {name} = {value!r} is not allowed: give true or false")
    try:
        pattern = None if modules is None else re.compile(modules)
    except (re.error, TypeError) as error:
        raise InputError(
            f"binary_convolution: modules = {modules!r} is no regular expression ({error}): "
            r"give one that matches whole names of layers, such as 'layer[234]\..*conv\d'"
        ) from None

    def build(conv: Any) -> nn.Module:
        binary = BinaryConv2d.of(conv, inputs=inputs, scaled=scaled)
        return PackedConv2d(binary) if packed else binary

    def edit(model: nn.Module) -> nn.Module:
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear | PackedConv2d)]
        ends = {*layers[:1], *layers[-1:]} if pattern is None else set()

        def matches(name: str, module: nn.Module) -> bool:
            chosen = pattern.fullmatch(name) is not None if pattern else module not in ends
            return chosen and _can_be_binary(module)

        between = "between the first and the last layer" if pattern is None else f"whose whole name matches {modules!r}"
        return replace_modules(model, matches, build, what=f"plain convolution of several channels {between}")

    return edit


def _can_be_binary(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    return module.in_channels > module.groups  # a filter of one channel has nothing to be centred over
