"""Dense prediction window by window: a net for small images, planes or volumes, applied to large ones.

The windows, their weights and their overlap are those of MONAI's ``sliding_window_inference``, so that results agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError, unknown

BLENDS = ("gaussian", "constant")
LEAST_WEIGHT = 1e-3
"""Of a place of a window: where no window counts, there would be nothing to divide by."""


@torch.no_grad()
def sliding_window(
    model: nn.Module,
    images: Tensor,
    window: Sequence[int],
    *,
    overlap: float = 0.25,
    blend: str = "gaussian",
    sigma: float = 0.125,
    batch_size: int = 4,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return what a model says of each place of large images: the weighted mean over the windows that see it.

    In memory are the images, one batch of windows, the sum of the outputs and that of the weights. The model is left in
    the mode in which it came: call ``model.eval()`` first.

    Args:
        model: from (N, C, *window) to (N, K, *window).
        images: (B, C, S1, ...), with as many sides as ``window``; smaller ones are filled up with zeros on both sides.
        window: sides of a window.
        overlap: share of a window's sides that the next one sees again, in [0, 1).
        blend: ``gaussian``, the middle of a window counts most, or ``constant``.
        sigma: standard deviation of the gaussian over the window's sides, above 0.
        batch_size: windows at a time, 1 or more.
        device: where windows go through the model; by default where the images are, which is where outputs are.

    Returns:
        (B, K, S1, ...).

    Raises:
        InputError: sides, an overlap, a sigma or a batch that are not allowed; a model that changes the sides.
        UnknownName: another blend.

    Example:
        >>> sliding_window(net.eval(), volume, (64, 64, 64), overlap=0.5)  # doctest: +SKIP
    """
    window = tuple(window)
    axes = len(window)
    if axes == 0 or min(window) < 1 or images.ndim != axes + 2 or images.numel() == 0:
        raise InputError(
            f"sliding_window: images {tuple(images.shape)} and window = {window} do not fit: give (B, C, S1, ...) and "
            "one side of 1 or more for each S"
        )
    if not 0 <= overlap < 1 or sigma <= 0 or batch_size < 1:
        raise InputError(
            f"sliding_window: overlap = {overlap}, sigma = {sigma} and batch_size = {batch_size} are not allowed: "
            "give 0 <= overlap < 1, sigma above 0 and 1 window or more"
        )
    if blend not in BLENDS:
        raise unknown("blend", blend, BLENDS, "there are gaussian and constant")
    given = images.shape[2:]
    missing = [max(side - size, 0) for side, size in zip(window, given, strict=True)]
    before = [many // 2 for many in missing]
    padding = [part for many, low in zip(missing, before, strict=True) for part in (many - low, low)]
    images = F.pad(images, padding[::-1])
    weights = window_weights(window, blend, sigma).to(images.device)
    total = images.new_zeros(1, 1, *images.shape[2:], dtype=torch.float32)
    starts = window_starts(images.shape[2:], window, overlap)
    for start in starts:
        total[_part(start, window)] += weights
    output = images.new_empty(0)
    tasks = [(image, start) for image in range(len(images)) for start in starts]
    for first in range(0, len(tasks), batch_size):
        chosen = tasks[first : first + batch_size]
        given_windows = torch.cat([images[image : image + 1][_part(start, window)] for image, start in chosen])
        found = model(given_windows if device is None else given_windows.to(device)).to(images.device)
        if found.ndim != axes + 2 or tuple(found.shape[2:]) != window:
            raise InputError(
                f"sliding_window: the model makes {tuple(found.shape)} of windows {tuple(given_windows.shape)}: its "
                "outputs must have the sides of its inputs"
            )
        if not first:
            kind = torch.promote_types(found.dtype, torch.float32)
            output = found.new_zeros(len(images), found.shape[1], *images.shape[2:], dtype=kind)
        for (image, start), values in zip(chosen, found, strict=True):
            output[image : image + 1][_part(start, window)] += values * weights
    output /= total
    return output[_part(before, given)]


def window_starts(sides: Sequence[int], window: Sequence[int], overlap: float) -> list[tuple[int, ...]]:
    """Return the first places of all windows; the last ones of an axis are moved back to end with it.

    Args:
        sides: of the image, none below that of the window.
        window: sides of a window.
        overlap: share of a side that two neighbours have in common, in [0, 1).
    """
    along = []
    for side, size in zip(sides, window, strict=True):
        step = max(1, int(size * (1 - overlap)))
        count = -(-(side - size) // step) + 1
        along.append([min(number * step, side - size) for number in range(count)])
    return list(itertools.product(*along))


def window_weights(window: Sequence[int], blend: str, sigma: float = 0.125) -> Tensor:
    """Return how much each place of a window counts, above 0, of the window's shape.

    Args:
        window: sides.
        blend: of ``BLENDS``.
        sigma: standard deviation of the gaussian over the sides.
    """
    weights = torch.ones(tuple(window))
    if blend == "gaussian":
        for axis, side in enumerate(window):
            distance = torch.arange(side) - (side - 1) / 2
            bell = (-(distance**2) / (2 * (sigma * side) ** 2)).exp()
            weights = weights * bell.view([-1 if k == axis else 1 for k in range(len(window))])
    return weights.clamp(min=max(LEAST_WEIGHT, float(weights.min())))


def _part(start: Sequence[int], sides: Sequence[int]) -> tuple[slice, ...]:
    return (slice(None), slice(None), *(slice(low, low + side) for low, side in zip(start, sides, strict=True)))
