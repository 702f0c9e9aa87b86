"""Mix-shift in the blocks of a Swin transformer, in the place of attention in windows.

Zheng et al., "Mixing and Shifting: Exploiting Global and Local Dependencies in Vision MLPs" (2022), arXiv 2202.06510.
The paper's code has no such net: here the regions of a stage are those of MS-MLP's, and all else is Swin's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError
from vitrail.layers.mix_shift import MIX_SIZES, SHIFTS, MixShift
from vitrail.layers.mixed_block import MixedSwinBlock


def swin_mix_shift(*, mix_sizes: Sequence[Sequence[int]] = MIX_SIZES, shifts: Sequence[int] = SHIFTS) -> Edit:
    """Return the edit that replaces the window attention of timm's ``swin_*`` nets by mix-shift.

    Args:
        mix_sizes: per stage, the side of the region of each group of channels, odd; stages beyond the last entry have
            the last.
        shifts: places by which each group moves.

    Raises:
        InputError: an argument out of range; or, from the edit, a model without blocks of Swin (the text lists what it
            has), or whose widths the groups cannot cut.

    Example:
        >>> model = swin_mix_shift()(timm.create_model("swin_base_patch4_window7_224"))          # doctest: +SKIP
    """
    if not mix_sizes:
        raise InputError("swin_mix_shift: mix_sizes = () is not allowed: give the sides of regions for each stage")
    for sizes in mix_sizes:
        MixShift(len(sizes), sizes, shifts)  # refuse wrong regions now, not when the edit is applied

    def edit(model: nn.Module) -> nn.Module:
        stages = {
            block: min(number, len(mix_sizes) - 1)
            for number, stage in enumerate(getattr(model, "layers", ()))
            for block in stage.modules()
            if isinstance(block, SwinTransformerBlock)
        }

        def build(block: Any) -> nn.Module:
            stage = stages[block]
            return MixedSwinBlock(block, MixShift(block.dim, mix_sizes[stage], shifts))

        return replace_modules(model, lambda _, module: module in stages, build, what="block of Swin with attention")

    return edit
