"""What goes into layers and comes out of them on the calibration images, a few layers at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.compress.quantize.layers import LayerFacts
from vitrail.data.batches import Batches
from vitrail.errors import InputError


class _Enough(Exception):
    """Ends a forward pass when the last layer that is looked at has been called."""


def capture(model: nn.Module, names: Sequence[str], batches: Batches, *, outputs: bool = False) -> dict[str, Tensor]:
    """Return what goes into each layer, or comes out of it, on all images: {name: (N, ...)}.

    A pass ends with the last of the layers, so that early ones cost little.

    Args:
        model: in evaluation mode.
        names: layers that a pass calls once each.
        batches: the calibration images.
        outputs: what comes out instead.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    waiting: set[str] = set()

    def hook(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name].append((output if outputs else inputs[0]).detach())
            waiting.discard(name)
            if not waiting:
                raise _Enough

        return note

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    place = next(model.parameters()).device
    try:
        with torch.no_grad():
            for images, _ in batches():
                waiting.update(names)
                with contextlib.suppress(_Enough):
                    model(images.to(place))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def within(layers: Sequence[LayerFacts], images: int, most_bytes: float) -> Iterator[list[LayerFacts]]:
    """Yield the layers in groups, in order, whose float32 inputs on ``images`` images take ``most_bytes`` together.

    A single layer that takes more is a group of its own.
    """
    group: list[LayerFacts] = []
    taken = 0
    for layer in layers:
        size = 4 * images * layer.inputs
        if group and taken + size > most_bytes:
            yield group
            group, taken = [], 0
        group.append(layer)
        taken += size
    if group:
        yield group


def mean_ranges(model: nn.Module, names: Sequence[str], batches: Batches) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return the range of each layer's input: least and largest value of an image, averaged over all images.

    Nothing is kept but two numbers per layer.

    Raises:
        InputError: a layer is given numbers that are not finite.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in names}

    def hook(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].detach().flatten(1)
            sums[name] += torch.stack([flat.amin(1).sum(), flat.amax(1).sum()]).double().cpu()

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    place, count = next(model.parameters()).device, 0
    try:
        with torch.no_grad():
            for images, _ in batches():
                model(images.to(place))
                count += len(images)
    finally:
        for handle in handles:
            handle.remove()
    for name, both in sums.items():
        if not both.isfinite().all():
            raise InputError(
                f"on the calibration images the layer {name} is given numbers that are not finite: check the images' "
                "normalisation and the network's weights"
            )
    return {name: (both[0] / count, both[1] / count) for name, both in sums.items()}
