"""What focal modulation looks at in an image: the size of the modulator at each place, and the gate of each level.

Yang et al., "Focal Modulation Networks" (NeurIPS 2022), arXiv 2203.11926, figures 4 and 5, and the authors' notebook
(microsoft/FocalNet, visualize.ipynb): the norm of the modulator over its channels, and the gates as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.evaluate.suite import evaluating
from vitrail.report.plots import MUTED, WIDTH, svg_plot


@dataclass(frozen=True)
class Modulation:
    """What one layer of focal modulation gave for an image.

    Attributes:
        layer: its name in the model.
        modulator: float32 (H, W), the norm of the modulator at each place.
        gates: float32 (L + 1, H, W): of each level, the last of the mean of all places.
    """

    layer: str
    modulator: np.ndarray
    gates: np.ndarray


def modulations(model: nn.Module, pixels: Tensor) -> list[Modulation]:
    """Return what every layer of focal modulation gives for an image, from the first to the last.

    Args:
        model: a FocalNet, or any model after the edit ``focal_modulation``; it is left as it was.
        pixels: the image as the model takes it, (1, C, H, W).

    Raises:
        InputError: more than one image, or a model without focal modulation.
    """
    if pixels.ndim != 4 or len(pixels) != 1:
        raise InputError(f"modulations are of one image, and {tuple(pixels.shape)} was given: give (1, C, H, W)")
    layers: dict[str, Any] = {name: part for name, part in model.named_modules() if hasattr(part, "focal_layers")}
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no focal modulation: give a focalnet_* model, or one after the edit "
            "focal_modulation"
        )
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    hooks = []
    for name, layer in layers.items():
        for part in ("f", "h"):

            def keep(_: nn.Module, given: Any, found: Tensor, kept: Any = seen[name], part: str = part) -> None:
                kept[part] = found.detach().float().cpu()

            hooks.append(getattr(layer, part).register_forward_hook(keep))
    try:
        with evaluating(model):
            place = next(model.parameters())
            model(pixels.to(place.device, place.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, kept in seen.items():
        if kept:  # some layers may be idle
            modulator, levels = kept["h"][0], len(layers[name].focal_layers) + 1
            places, whole = modulator.shape[1:], kept["f"][0]
            # timm has maps (C, H, W); the edit has tokens (N, C), the places last, or maps (H, W, C) as such.
            gates = whole[-levels:] if whole.ndim == 3 else whole[-places.numel() :, -levels:].T.unflatten(1, places)
            found.append(Modulation(name, modulator.norm(dim=0).numpy(), gates.numpy()))
    return found


def modulation_picture(
    model: nn.Module, pixels: Tensor, photo: np.ndarray | None = None, layers: Sequence[str] | None = None
) -> str:
    """Draw the modulator's size and the gates of an image as SVG, a row for each layer.

    Each map has colours of its own, from its smallest to its largest value.

    Args:
        model: as for ``modulations``.
        pixels: as for ``modulations``.
        photo: the image as it is to be seen, (H, W, 3), uint8 or floats in [0, 1].
        layers: names; None is the last layer at each size of map.

    Raises:
        InputError: as ``modulations``, or a layer that is none of focal modulation.

    Example:
        >>> Path("maps.svg").write_text(standalone(modulation_picture(model, pixels)))        # doctest: +SKIP
    """
    found = {one.layer: one for one in modulations(model, pixels)}
    if layers is None:
        layers = list({one.modulator.shape: name for name, one in found.items()}.values())
    for name in layers:
        if name not in found:
            raise unknown("layer of focal modulation", name, found)
    return _picture([found[name] for name in layers], photo)


@svg_plot
def _picture(rows: Sequence[Modulation], photo: np.ndarray | None) -> tuple[str, Figure] | None:
    if not rows:
        return None
    shift = int(photo is not None)
    columns = shift + 1 + max(len(row.gates) for row in rows)
    figure = Figure(figsize=(WIDTH, WIDTH / columns * len(rows) * 1.15 + 0.2), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for number, (row, axes) in enumerate(zip(rows, grid)):
        for place in axes:
            place.axis("off")
        if photo is not None and not number:
            axes[0].imshow(photo)
        titles = ["modulator", *(f"level {level + 1}" for level in range(len(row.gates) - 1)), "whole image"]
        for place, values, title in zip(axes[shift:], (row.modulator, *row.gates), titles):
            place.imshow(values, cmap="viridis", interpolation="bilinear")
            place.set_title(title, fontsize=6)
        axes[shift].text(0, -0.04, row.layer, transform=axes[shift].transAxes, va="top", fontsize=5, color=MUTED)
    return "Focal modulation", figure
