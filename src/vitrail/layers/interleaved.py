"""Interleaved window attention: the places of a window stand evenly apart over the whole map, or over a whole clip.

Huo and Li, "Iwin Transformer: Hierarchical Vision Transformer using Interleaved Windows" (2025), arXiv 2507.18405. The
paper reaches its windows by reshaping, transposing and reshaping each axis, and then cutting windows of neighbours;
here both are one reordering. A depthwise convolution beside the attention connects neighbours, and tells positions.

Shapes: B images or clips, a grid of places such as (H, W) or (T, H, W), C channels, n heads of d channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError

Window = int | Sequence[int | None]


def sides(window: Window, grid: Sequence[int]) -> tuple[int, ...]:
    """Return the places of a window along each axis of a grid: never more than there are.

    Args:
        window: places along each axis, None for all; or one number, for the last two axes, with all of those before.
        grid: places along each axis.

    Raises:
        InputError: sides of another number than the axes, or of less than one place.
    """
    given = [*[None] * (len(grid) - 2), window, window] if isinstance(window, int) else list(window)
    if len(given) != len(grid) or any(side is not None and side < 1 for side in given):
        raise InputError(
            f"a window of {window} does not suit a grid of {tuple(grid)}: give one number from 1, or for each of its "
            f"{len(grid)} axes one, None for all places"
        )
    return tuple(size if side is None else min(side, size) for side, size in zip(given, grid))


def to_interleaved(x: Tensor, window: Window) -> Tensor:
    """Cut a grid into interleaved windows: along an axis of G windows, window g has the places g, g + G, g + 2 G, ...

    A grid that the windows do not divide is filled up with zeros behind its last places.

    Args:
        x: (B, ..., C), two axes or more between.
        window: as in ``sides``.

    Returns:
        (B windows, places of a window, C).
    """
    grid = x.shape[1:-1]
    window = sides(window, grid)
    groups = [math.ceil(size / side) for size, side in zip(grid, window)]
    missing = [side * group - size for side, group, size in zip(window, groups, grid)]
    if any(missing):
        x = F.pad(x, (0, 0, *(value for behind in reversed(missing) for value in (0, behind))))
    axes = len(grid)
    x = x.reshape(x.shape[0], *(value for pair in zip(window, groups) for value in pair), x.shape[-1])
    x = x.permute(0, *range(2, 2 * axes + 1, 2), *range(1, 2 * axes, 2), 2 * axes + 1)
    return x.reshape(-1, math.prod(window), x.shape[-1])


def from_interleaved(windows: Tensor, grid: Sequence[int], window: Window) -> Tensor:
    """Put the windows of ``to_interleaved`` together again and cut off what it filled up.

    Args:
        windows: (B windows, places of a window, C).
        grid: places along each axis.
        window: as in ``sides``.

    Returns:
        (B, ..., C).
    """
    window = sides(window, grid)
    groups = [math.ceil(size / side) for size, side in zip(grid, window)]
    axes = len(grid)
    x = windows.reshape(-1, *groups, *window, windows.shape[-1])
    x = x.permute(0, *(axis for i in range(axes) for axis in (1 + axes + i, 1 + i)), 2 * axes + 1)
    x = x.reshape(x.shape[0], *(side * group for side, group in zip(window, groups)), x.shape[-1])
    return x[(slice(None), *(slice(size) for size in grid))]


class InterleavedAttention(nn.Module):
    """Self-attention inside interleaved windows, and beside it a depthwise convolution of neighbours; their sum.

    It takes maps (B, H, W, C), clips (B, T, H, W, C), each frame of which is convolved by itself, or their tokens
    (B, N, C), as blocks of transformers hand them on. Tokens that stand at no place, such as a class token, attend to
    all, are attended to in every window, and are not convolved.

    Args:
        dim: C.
        num_heads: n, a divisor of it.
        window: places of a window along each axis, None for all; or one number, for the last two axes, height and
            width, with all of those before.
        conv: whether there is a convolution; without it nothing says where places are.
        grid: the places of tokens along each axis; None takes them for a square map.
        prefix: tokens before the places.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop, proj_drop: dropout of the attention's weights and of its output, in [0, 1).

    Raises:
        InputError: heads that do not divide the width, or a window of no place.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Window = 7,
        *,
        conv: bool = True,
        grid: Sequence[int] | None = None,
        prefix: int = 0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"num_heads = {num_heads} does not divide a width of {dim}: give a divisor of it")
        if grid is not None:
            sides(window, grid)
        elif isinstance(window, int):
            sides(window, (1, 1))
        self.num_heads, self.window, self.grid, self.prefix = num_heads, window, grid, prefix
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if conv else None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return what was given in form: a grid (B, ..., C), or tokens (B, N, C).

        Raises:
            InputError: a mask, which makes no sense between windows, or tokens that do not fit the grid.
        """
        if attn_mask is not None or is_causal:
            raise InputError("interleaved attention takes no attention mask: leave attn_mask and is_causal out")
        prefix = self.prefix if x.ndim == 3 else 0
        places = x[:, prefix:].unflatten(1, self._grid(x.shape[1])) if x.ndim == 3 else x
        grid = places.shape[1:-1]
        query, key, value = self._heads(to_interleaved(places, self.window))  # (B windows, n, places, d)
        before = []
        if prefix:
            own, keys, values = self._heads(x[:, :prefix])
            batch = x.shape[0]  # len() would fix the number in an exported file
            windows = query.shape[0] // batch
            every = [part.unflatten(0, (batch, windows)).transpose(1, 2).flatten(2, 3) for part in (key, value)]
            before = [self._attended(own, torch.cat((keys, every[0]), 2), torch.cat((values, every[1]), 2))]
            key = torch.cat((keys.repeat_interleave(windows, 0), key), 2)
            value = torch.cat((values.repeat_interleave(windows, 0), value), 2)
        y = from_interleaved(self._attended(query, key, value), grid, self.window)
        if self.conv is not None:
            frames = places.flatten(0, -4).permute(0, 3, 1, 2)  # (B T, C, H, W)
            y = y + self.conv(frames).permute(0, 2, 3, 1).reshape(y.shape)
        return torch.cat((*before, y.flatten(1, -2)), 1) if x.ndim == 3 else y

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of (B, L, C), each (B, n, L, d)."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(query), self.k_norm(key), value

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return (B, L, C)."""
        drop = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
        return self.proj_drop(self.proj(self.norm(y.transpose(1, 2).flatten(2))))

    def _grid(self, tokens: int) -> Sequence[int]:
        places = tokens - self.prefix
        side = math.isqrt(max(places, 0))
        grid = (side, side) if self.grid is None else self.grid
        if places < 1 or math.prod(grid) != places:
            wanted = "a square" if self.grid is None else f"{tuple(grid)}"
            raise InputError(
                f"{tokens} tokens came to interleaved attention for {self.prefix} + {wanted} of them: give images of "
                "the size that the model had when it was edited, or name the grid of its tokens"
            )
        return grid
