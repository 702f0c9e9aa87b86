"""How far a model sees: its effective receptive field, and the area that holds a given share of it.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks" (2016); measured as in
Ding et al., "Scaling Up Your Kernels to 31x31" (2022), and Zhang et al., "Scaling Up Your Kernels" (TPAMI 2025), arXiv
2410.08049: how much each pixel contributes to the middle of the last feature map, and the smallest square about the
middle that holds 20, 30, 50 and 99 % of all contributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from vitrail.data.batches import Batches
from vitrail.errors import InputError
from vitrail.evaluate.suite import Result
from vitrail.report.plots import BLUE, new_figure, svg_plot

CELLS = 32
"""Rows and columns of the picture."""


def contributions(model: Any, images: Tensor) -> Tensor:
    """Return what each pixel adds to the middle of the last feature map, (H, W), summed over images and channels.

    That is the positive part of the gradient of the sum of the middle's positive features.

    Args:
        model: with ``forward_features``, in evaluation mode.
        images: (B, C, H, W).

    Raises:
        InputError: features that are no map.
    """
    seen = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        features = model.forward_features(seen) if hasattr(model, "forward_features") else None
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise InputError(
                f"{type(model).__name__} has no features (B, C, h, w) behind its last stage: "
                "a receptive field is measured of convolutional nets, or of others by their features_only model"
            )
        middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        (slope,) = torch.autograd.grad(F.relu(middle).sum(), seen)
    return F.relu(slope).sum((0, 1)).double()


def square_with(field: np.ndarray, share: float) -> int:
    """Return the side in pixels of the smallest square about the middle that holds that share of a field (H, W).

    Beyond the shorter edge of a field that is no square, the square is cut.
    """
    height, width = field.shape
    total = field.sum()
    for half in range(max(height, width)):
        rows = slice(max(height // 2 - half, 0), height // 2 + half + 1)
        columns = slice(max(width // 2 - half, 0), width // 2 + half + 1)
        if field[rows, columns].sum() >= share * total:
            return min(2 * half + 1, max(height, width))
    return max(height, width)


def run(
    model: nn.Module,
    data: Batches,
    *,
    thresholds: Sequence[float] = (0.2, 0.3, 0.5, 0.99),
    side: int | None = None,
) -> Result:
    """Measure a model's effective receptive field.

    Args:
        model: with ``forward_features`` that gives (B, C, h, w).
        data: images; targets are not used. The papers take a thousand.
        thresholds: shares of all contributions, in (0, 1].
        side: size in pixels to which the images are brought, 1024 in the papers; None leaves them.

    Returns:
        A row per threshold: ``share``, ``side`` of the square in pixels, ``area`` of it as a share of the image.

    Raises:
        InputError: no images, a threshold out of range, or a model without a feature map.
    """
    if not thresholds or not all(0 < share <= 1 for share in thresholds):
        raise InputError(f"thresholds = {tuple(thresholds)} are not allowed: give shares in (0, 1]")
    place = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    total, count = None, 0
    try:
        for images, _ in data():
            batch = images.to(place.device, place.dtype)
            if side is not None:
                batch = F.interpolate(batch, size=(side, side), mode="bilinear", align_corners=False)
            found = contributions(model, batch).cpu()
            total, count = found if total is None else total + found, count + len(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if total is None:
        raise InputError("an effective receptive field got no images: give at least one")
    field = total.numpy() / count
    table: list[dict[str, Any]] = []
    for share in thresholds:
        edge = square_with(field, share)
        covered = min(edge, field.shape[0]) * min(edge, field.shape[1])
        table.append({"share": float(share), "side": edge, "area": covered / field.size})
    notes = [f"{count} images of {field.shape[0]} x {field.shape[1]} pixels."]
    return Result("Effective receptive field", table, {"Effective receptive field": field_plot(field)}, notes)


@svg_plot
def field_plot(field: np.ndarray) -> tuple[str, Figure] | None:
    """Draw what pixels contribute, as a map of shades: the logarithm of 1 + contribution, as a share of the largest.

    Args:
        field: contributions (H, W).
    """
    if not field.max() > 0:
        return None
    cells = torch.from_numpy(np.log10(1 + field / field.max() * 1e3))[None, None]
    size = (min(CELLS, field.shape[0]), min(CELLS, field.shape[1]))
    shades = F.adaptive_avg_pool2d(cells, size)[0, 0].numpy()
    figure, axes = new_figure(0.6 + 3.4 * size[0] / size[1])
    axes.grid(False)
    boxes = [Rectangle((x, y), 1, 1) for y in range(size[0]) for x in range(size[1])]
    axes.add_collection(PatchCollection(boxes, facecolor=BLUE, alpha=shades.ravel() / shades.max(), linewidth=0))
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0), xticks=[], yticks=[], aspect="equal")
    axes.set_title("What pixels add to the middle of the last map (log)")
    return "Effective receptive field", figure
