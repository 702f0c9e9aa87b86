"""Mix-shift: groups of channels look at regions that are the farther away the larger they are.

Zheng et al., "Mixing and Shifting: Exploiting Global and Local Dependencies in Vision MLPs" (2022), arXiv 2202.06510,
and the authors' code (JegZheng/MS-MLP).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrail.errors import InputError

SHIFTS = (-2, -1, 0, 1, 2)
"""Places by which the groups move, as published."""
MIX_SIZES = ((1, 1, 3, 5, 7), (1, 3, 3, 5, 7), (1, 5, 5, 5, 7), (1, 7, 7, 7, 7))
"""Sides of the regions of the groups, in four stages, as published: the first group is the query, which the others
have moved away from by 1, 2, 3 and 4 places."""


class MixShift(nn.Module):
    """Move groups of channels along rows, and along columns, mix each depth-wise, and add the two.

    What a row or a column pushes out at one end comes in at the other; beyond it, the mixing sees zeros.

    Args:
        dim: C, cut into runs of ceil(C / groups) channels, of which the last may be shorter.
        mix_sizes: side of the region of each group, odd.
        shifts: places by which each group moves, to the right and down; as many.

    Raises:
        InputError: lists of different length, a width that cannot be cut into so many groups, an even region.
    """

    def __init__(self, dim: int, mix_sizes: Sequence[int] = MIX_SIZES[0], shifts: Sequence[int] = SHIFTS) -> None:
        super().__init__()
        count = len(mix_sizes)
        if count != len(shifts) or not count:
            raise InputError(
                f"mix_sizes = {tuple(mix_sizes)} and shifts = {tuple(shifts)} are for {count} and {len(shifts)} "
                "groups: give one of each for every group"
            )
        run = -(-dim // count)
        self.groups = [min(run, dim - run * i) for i in range(count)]
        if self.groups[-1] < 1:
            raise InputError(
                f"{dim} channels cannot be cut into {count} groups of {run}: give a width that can, such as "
                f"{count * run}"
            )
        for size in mix_sizes:
            if size < 1 or size % 2 == 0:
                raise InputError(f"mix_sizes = {size} is not allowed: give odd sides of regions, such as 1, 3, 5 or 7")
        self.shifts = tuple(shifts)

        def mixers() -> nn.ModuleList:
            return nn.ModuleList(
                nn.Conv2d(width, width, size, padding=size // 2, groups=width)
                for width, size in zip(self.groups, mix_sizes)
            )

        self.across, self.down = mixers(), mixers()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C) of (B, H, W, C)."""
        mixed = []
        for group, shift, across, down in zip(x.split(self.groups, dim=-1), self.shifts, self.across, self.down):
            along_rows, along_columns = (group.roll(shift, axis).permute(0, 3, 1, 2) for axis in (2, 1))
            mixed.append(across(along_rows) + down(along_columns))
        return torch.cat(mixed, dim=1).permute(0, 2, 3, 1)
