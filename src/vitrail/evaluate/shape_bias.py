"""Shape or texture: which of the two a model follows where they disagree.

Geirhos et al., "ImageNet-trained CNNs are biased towards texture" (2019), as used by Zhang et al., "Scaling Up Your
Kernels" (TPAMI 2025), arXiv 2410.08049, for whom large kernels look more at shapes. They show images whose textures
were exchanged by style transfer. Here, without a trained transfer, a cue conflict is made of the user's own labelled
images: the silhouette of one, filled with a patch of another, repeated like a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.batches import Batches
from vitrail.errors import InputError
from vitrail.evaluate.suite import Result

LEVELS = 48
"""Thresholds of brightness that are tried for a silhouette."""


def silhouettes(images: Tensor) -> Tensor:
    """Return which pixels (B, H, W) are of the object: those on the other side of Otsu's threshold than the border.

    Args:
        images: (B, C, H, W).
    """
    grey = images.mean(1)
    flat = grey.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    best, chosen = torch.full_like(low, -1.0), low.clone()
    for level in range(1, LEVELS):
        cut = low + (high - low) * level / LEVELS
        above = (flat > cut).to(flat)
        share = above.mean(1, keepdim=True)
        gap = (above * flat).mean(1, keepdim=True) - share * flat.mean(1, keepdim=True)
        between = gap.square() / (share * (1 - share)).clamp_min(1e-12)  # variance between the two sides
        chosen, best = torch.where(between > best, cut, chosen), torch.maximum(between, best)
    mask = grey > chosen[:, :, None]
    edge = torch.cat((mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]), 1).float().mean(1)
    return mask ^ (edge > 0.5)[:, None, None]


def cue_conflict(shapes: Tensor, textures: Tensor) -> Tensor:
    """Return images (B, C, H, W) with the silhouettes of some and the textures of others.

    Of each texture image, the square of a quarter of the shorter side that holds most of its object fills the
    silhouette, repeated; around it lies the median colour of the shape image's border.

    Args:
        shapes, textures: (B, C, H, W), H and W of 4 or more.

    Raises:
        InputError: images of different shapes, or too small ones.
    """
    if shapes.shape != textures.shape or shapes.ndim != 4 or min(shapes.shape[2:]) < 4:
        raise InputError(
            f"shapes {tuple(shapes.shape)} and textures {tuple(textures.shape)} do not go together: "
            "give two batches (B, C, H, W) of one shape, of 4 x 4 pixels or more"
        )
    height, width = shapes.shape[2:]
    size = min(height, width) // 4
    held = F.avg_pool2d(silhouettes(textures).float()[:, None], size, 1).flatten(1)
    corner = held.argmax(1)
    top, left = corner // (width - size + 1), corner % (width - size + 1)
    row = top[:, None] + torch.arange(height, device=top.device) % size
    column = left[:, None] + torch.arange(width, device=top.device) % size
    batch = torch.arange(len(shapes), device=top.device)[:, None, None]
    tiled = textures.permute(0, 2, 3, 1)[batch, row[:, :, None], column[:, None]].permute(0, 3, 1, 2)
    border = torch.cat((shapes[:, :, 0], shapes[:, :, -1], shapes[..., 0], shapes[..., -1]), 2)
    around = border.median(2).values[:, :, None, None]
    return torch.where(silhouettes(shapes)[:, None], tiled, around)


def run(model: nn.Module, data: Batches) -> Result:
    """Measure a model's shape bias: of its answers that follow shape or texture, the share that follow the shape.

    Each image lends its shape, and the next image of another class in its batch its texture. As in the papers, pairs
    count where the model answers rightly on both images as they are.

    Args:
        model: returns logits (B, C).
        data: labelled images; of several labels the first counts.

    Returns:
        A row per class of shape, and one for all: ``shape_of`` (class number, or ``"all"``), ``pairs``, ``shape``,
        ``texture`` and ``other`` answers, and ``shape_bias`` in [0, 1], None where no answer followed either.

    Raises:
        InputError: no images, or no batch with two classes.
    """
    place = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    answers: dict[int, list[int]] = {}
    offered = 0
    try:
        with torch.no_grad():
            for images, targets in data():
                kinds = targets if targets.ndim == 1 else targets.argmax(1)
                partner = _partners(kinds)
                offered += int((partner >= 0).sum())
                shown = images.to(place.device, place.dtype)
                right = model(shown).argmax(1).cpu() == kinds
                kept = [i for i, other in enumerate(partner.tolist()) if other >= 0 and right[i] and right[other]]
                if not kept:
                    continue
                others = partner[kept]
                said = model(cue_conflict(shown[kept], shown[others])).argmax(1).cpu()
                for shape, texture, answer in zip(kinds[kept].tolist(), kinds[others].tolist(), said.tolist()):
                    tally = answers.setdefault(shape, [0, 0, 0])
                    tally[0 if answer == shape else 1 if answer == texture else 2] += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not offered:
        raise InputError("shape bias needs batches with images of two classes or more: give labelled, mixed images")
    total = [sum(tally[i] for tally in answers.values()) for i in range(3)]
    table = [_row(kind, answers[kind]) for kind in sorted(answers)] + [_row("all", total)]
    notes = [
        f"{sum(total)} of {offered} pairs, those whose two images the model knows. The silhouette of one image is "
        "filled with a patch of another, repeated: no style transfer, so figures do not compare with published ones."
    ]
    return Result("Shape bias", table, notes=notes)


def _partners(kinds: Tensor) -> Tensor:
    """Return for each image the number of the next one of another class, or -1."""
    count = len(kinds)
    found = torch.full((count,), -1)
    for step in range(count - 1, 0, -1):
        other = (torch.arange(count) + step) % count
        found = torch.where(kinds[other] != kinds, other, found)
    return found


def _row(kind: int | str, tally: list[int]) -> dict[str, Any]:
    shape, texture, other = tally
    bias = shape / (shape + texture) if shape + texture else None
    return {
        "shape_of": kind,
        "pairs": sum(tally),
        "shape": shape,
        "texture": texture,
        "other": other,
        "shape_bias": bias,
    }
