"""Fold batch normalisation into the layer before it, in any network, by what a forward pass shows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.compress.quantize.layers import KINDS, replace
from vitrail.errors import InputError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(model: nn.Module, images: Tensor) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """Return a copy without the batch norms that follow a layer directly, and what they scaled and shifted it to.

    A batch norm whose input is the very tensor that one layer returned is folded: its scale and shift go into weight
    and bias. A normalisation that also activates (timm's) leaves its activation behind. Should the copy compute
    something else, because a network uses a layer's output twice, say, nothing is folded.

    Args:
        model: in evaluation mode; not changed.
        images: (B, 3, H, W), to find what follows what and to compare the copy with the model.

    Returns:
        The copy, and for each folded layer (|gamma|, beta): standard deviation and mean, per channel, of what it puts
        out on the training data.

    Raises:
        InputError: the model's answers are not finite.
    """
    folded = copy.deepcopy(model)
    statistics: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        expected = model(images)
        if not expected.isfinite().all():
            raise InputError(
                "on the calibration images the network answers with numbers that are not finite: check the images' "
                "normalisation and the network's weights"
            )
        for layer_name, norm_name in _pairs(folded, images):
            layer, norm = folded.get_submodule(layer_name), folded.get_submodule(norm_name)
            statistics[layer_name] = _fold(layer, norm)
            # timm's normalisations with an activation; all others leave nothing.
            rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
            replace(folded, norm_name, nn.Sequential(*rest) if rest else nn.Identity())
        got = folded(images)
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        return copy.deepcopy(model), {}
    return folded, statistics


def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Return (layer, batch norm) for each batch norm whose input is what a layer returned, and goes nowhere else."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    taken: dict[str, list[str]] = {}
    calls: dict[str, int] = {}
    handles = []

    def before(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            # A container passes on to a child, and an identity to whoever comes next.
            last = isinstance(module, NORMS) or not (any(module.children()) or isinstance(module, nn.Identity))
            if last and inputs and id(inputs[0]) in made:
                taken.setdefault(made[id(inputs[0])][0], []).append(name)

        return note

    def after(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                made[id(output)] = (name, output)

        return note

    modules = dict(model.named_modules())
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(before(name)))
        if isinstance(module, KINDS):
            handles.append(module.register_forward_hook(after(name)))
    model(images)
    for handle in handles:
        handle.remove()
    return [
        (layer, names[0])
        for layer, names in taken.items()
        if len(names) == calls[names[0]] == calls[layer] == 1
        and isinstance(modules[names[0]], NORMS)
        and getattr(modules[names[0]], "running_var", None) is not None
    ]


def _fold(layer: nn.Module, norm: Any) -> tuple[Tensor, Tensor]:
    weight: Any = layer.weight
    ones = torch.ones_like(norm.running_var)
    gamma = ones if norm.weight is None else norm.weight
    beta = torch.zeros_like(ones) if norm.bias is None else norm.bias
    bias: Any = layer.bias
    factor = gamma / (norm.running_var + norm.eps).sqrt()
    weight.mul_(factor.view(-1, *[1] * (weight.ndim - 1)))
    layer.bias = nn.Parameter(((0 if bias is None else bias) - norm.running_mean) * factor + beta)
    return gamma.abs().clone(), beta.clone()
