"""A convolution that fills images up to whole places, so that a net of patches takes images of any size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PaddedConv2d(nn.Conv2d):
    """A convolution that fills images with zeros, below and to the right, to a multiple of ``multiple`` pixels."""

    multiple: int = 1

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, H', W')."""
        height, width = (-(-side // self.multiple) * self.multiple - side for side in x.shape[-2:])
        return super().forward(F.pad(x, (0, width, 0, height)) if height or width else x)
