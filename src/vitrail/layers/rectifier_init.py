"""The initialisation for rectifiers of any slope.

He, Zhang, Ren, Sun, "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification" (ICCV
2015), section 2.2. With y = W x + b and x = f(y of the layer before), f(y) = max(0, y) + a min(0, y), and y symmetric
about zero, E[x^2] is (1 + a^2) / 2 of the variance of y: variances stay through the layers if those of the weights are
2 / ((1 + a^2) n). Forward, n is the number of inputs of an output; backward, of gradients, that of outputs of an input.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from vitrail.errors import InputError

Direction = Literal["forward", "backward"]


def rectifier_std(layer: nn.Module, slope: float = 0.0, direction: Direction = "forward") -> float:
    """Return the standard deviation of a layer's weights at which variances stay.

    Args:
        layer: linear, or a convolution of any dimensions, in groups or transposed.
        slope: of the activations for negative values, a: 0 for ReLU, 0.25 for a PReLU at its start, 1 for none.
        direction: ``forward`` for the variance of activations, ``backward`` for that of gradients.

    Raises:
        InputError: another kind of layer or of direction.
    """
    if direction not in ("forward", "backward"):
        raise InputError(f"rectifier_std: direction = {direction!r} is not allowed: give 'forward' or 'backward'")
    if isinstance(layer, nn.Linear):
        inputs, outputs = float(layer.in_features), float(layer.out_features)
    elif isinstance(layer, _ConvNd):
        places = math.prod(layer.kernel_size) / layer.groups
        inputs, outputs = places * layer.in_channels, places * layer.out_channels
        if isinstance(layer, _ConvTransposeNd):
            inputs /= math.prod(layer.stride)  # of the kernel's places, an output sees one in a stride
    else:
        raise InputError(f"rectifier_std is for linear layers and convolutions, and this is a {type(layer).__name__}")
    return math.sqrt(2 / ((1 + slope**2) * (inputs if direction == "forward" else outputs)))


@torch.no_grad()
def rectifier_init_(model: nn.Module, slope: float = 0.0, direction: Direction = "forward") -> nn.Module:
    """Begin all linear layers and convolutions of a model so that variances stay; biases begin at zero.

    Args:
        model: any; changed in place, and returned. Norms and other parameters stay as they are.
        slope: as for ``rectifier_std``.
        direction: as for ``rectifier_std``.

    Raises:
        InputError: a model without such layers, or a direction that does not exist.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | _ConvNd)]
    if not layers:
        raise InputError(f"rectifier_init_ found no linear layer and no convolution in {type(model).__name__}")
    for layer in layers:
        nn.init.normal_(layer.weight, std=rectifier_std(layer, slope, direction))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model
