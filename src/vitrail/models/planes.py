"""What RMT and RAVLT share: stages of transformer blocks that keep their places in a plane.

Both nets are by the same authors (qhfan/RMT, qhfan/RALA) and differ in their attention and in what it is told of the
places. Blocks work on (B, H, W, C), which for a channels-last image is the same memory as its (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from vitrail.models.staged import through_blocks


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of ``x`` (..., d) by the angles of its place; keeps the type.

    Args:
        x: (..., d), d even.
        cos, sin: of the angles, each twice in a row, broadcastable to ``x``.
    """
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class SizeTables(nn.Module):
    """Tables of one stage. They are kept for the last size seen, so that a run at one size computes them once.

    There are no buffers: casting a model to bfloat16 would otherwise round angles of many radians.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[tuple[int, int, torch.device], Any] | None = None

    def forward(self, height: int, width: int, device: torch.device) -> Any:
        """Return the tables for H x W places."""
        key = (height, width, device)
        if torch.compiler.is_compiling():  # a traced tensor must not outlive its trace
            return self._compute(*key)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # so that training can go on from them
                self._kept = (key, self._compute(*key))
        return self._kept[1]

    def _compute(self, height: int, width: int, device: torch.device) -> Any:
        raise NotImplementedError


class DepthwiseConv(nn.Conv2d):
    """Depth-wise convolution of (B, H, W, C)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FeedForward(nn.Module):
    """Two linear layers with a residual 3x3 depth-wise convolution between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    """Convolutional position encoding, attention, feed-forward, each added to what came in.

    Args:
        dim: C.
        attention: builds what takes (B, H, W, C) and the tables of its stage.
        mlp_ratio: hidden width of the feed-forward layer over C.
        drop_path: probability that a branch is left out in training.
        layer_scale: initial factor of each branch; 0 is none.
    """

    def __init__(
        self, dim: int, attention: Callable[[], nn.Module], mlp_ratio: float, *, drop_path: float, layer_scale: float
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return LayerScale(dim, layer_scale) if layer_scale else nn.Identity()

        self.pos = DepthwiseConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention()
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, tables: Any) -> Tensor:
        """Return (B, H, W, C)."""
        x = x + self.pos(x)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), tables)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """A downsampling (none in the first stage), then blocks that share their tables."""

    def __init__(self, dim_in: int | None, dim: int, prior: SizeTables, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if dim_in is not None:
            self.downsample = nn.Sequential(nn.Conv2d(dim_in, dim, 3, 2, 1), nn.BatchNorm2d(dim))
        self.prior = prior
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        tables = self.prior(x.shape[1], x.shape[2], x.device)
        x = through_blocks(self, x, tables)
        return x.permute(0, 3, 1, 2)
