"""Windows: a map cut into rectangles, and put together again.

A map is (B, H, W, C). One of (B, C, H, W) is given as ``x.permute(0, 2, 3, 1)``, a view: cutting copies once, or not at
all where a window is as wide as the map. ``timm.layers.RelPosBias`` has relative positions for the places of a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import InputError

Size = int | tuple[int, int]


def to_windows(x: Tensor, window: Size) -> Tensor:
    """Cut a map into windows; one that they do not divide is filled up with zeros at its right and lower edges.

    Args:
        x: (B, H, W, C).
        window: height and width (h, w) in places, 1 or more, or one number for both.

    Returns:
        (B n, h, w, C), the n = ceil(H / h) ceil(W / w) windows of a map in reading order.

    Raises:
        InputError: a window of less than one place.
    """
    tall, wide = _sides(window)
    below, right = -x.shape[1] % tall, -x.shape[2] % wide
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // tall, tall, width // wide, wide, channels)
    return x.transpose(2, 3).reshape(-1, tall, wide, channels)


def from_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """Put the windows of ``to_windows`` together again and cut off what it filled up.

    Args:
        windows: (B n, h, w, C).
        height, width: H and W of the map.

    Returns:
        (B, H, W, C).
    """
    tall, wide, channels = windows.shape[1:]
    rows, columns = -(-height // tall), -(-width // wide)
    x = windows.reshape(-1, rows, columns, tall, wide, channels).transpose(2, 3)
    return x.reshape(-1, rows * tall, columns * wide, channels)[:, :height, :width]


def real_places(height: int, width: int, window: Size, device: torch.device | None = None) -> Tensor | None:
    """Return which places of each window are of the map, (n, h w) booleans; None where all are.

    For attention that must not see what was filled up: ``mask.repeat(B, 1)[:, None, None]`` masks the keys. No window
    is without a place of the map.

    Args:
        height, width: H and W of the map.
        window: as in ``to_windows``.
        device: of the result.

    Raises:
        InputError: a window of less than one place.
    """
    tall, wide = _sides(window)
    if height % tall == 0 and width % wide == 0:
        return None
    return to_windows(torch.ones(1, height, width, 1, dtype=torch.bool, device=device), window).flatten(1)


def _sides(window: Size) -> tuple[int, int]:
    tall, wide = (window, window) if isinstance(window, int) else window
    if tall < 1 or wide < 1:
        raise InputError(f"a window of {tall} x {wide} places is not allowed: give 1 or more for both")
    return tall, wide
