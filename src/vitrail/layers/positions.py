"""Embedded positions on another grid than they were learned for."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resampled(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return embedded positions (1, H, W, C) for another grid, by bicubic interpolation; themselves for their own."""
    if (positions.shape[1], positions.shape[2]) == grid:
        return positions
    return F.interpolate(positions.movedim(3, 1).float(), grid, mode="bicubic").movedim(1, 3).to(positions.dtype)
