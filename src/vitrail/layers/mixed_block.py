"""A block of Swin with something else in the place of its window attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class MixedSwinBlock(nn.Module):
    """A block of Swin with its own norms and feed-forward layer, in which ``mix`` takes the place of attention.

    Args:
        block: of timm's Swin.
        mix: takes and returns maps (B, H, W, C).
    """

    def __init__(self, block: Any, mix: nn.Module) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.mix = mix
        self.drop_path1 = block.drop_path1
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.drop_path2 = block.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = x + self.drop_path1(self.mix(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def set_input_size(self, *sizes: Any, **named: Any) -> None:
        """Do nothing: there are no windows to fit to the size of images."""
