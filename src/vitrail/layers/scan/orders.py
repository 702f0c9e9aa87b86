"""Scan orders: how the places of a grid become a sequence, as permutations.

An order is an array of L place numbers, the first to be read first. Places of a grid of any number of axes are numbered
as in memory, the last axis fastest. Orders are arrays of numpy, which are made once for each shape and may be kept;
``order[::-1]`` is the same way backwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import InputError

Order = np.ndarray[Any, np.dtype[np.int64]]

# ---- the orders ------------------------------------------------------------------------------------------------------


@cache
def raster(shape: tuple[int, ...], axes: tuple[int, ...] | None = None) -> Order:
    """Return line after line, each from its start.

    Args:
        shape: sides of the grid, such as (H, W) or (T, H, W).
        axes: the axes from the slowest to the fastest; ``(1, 0)`` reads columns. None is the order in memory.

    Raises:
        InputError: an empty grid, or axes that are no permutation of those that there are.
    """
    return _frozen(_turned(shape, axes).ravel())


@cache
def snake(shape: tuple[int, ...], axes: tuple[int, ...] | None = None) -> Order:
    """Return line after line, each from where the last one ended, so that neighbours follow each other.

    Args, Raises: as ``raster``.
    """
    grid = _turned(shape, axes).copy()
    for axis in range(1, grid.ndim):
        # A line turns back where its place along the axes before it, each already in its own turn, is odd.
        lines = grid.reshape(-1, *grid.shape[axis:])
        lines[1::2] = np.flip(lines[1::2], 1)
    return _frozen(grid.ravel())


@cache
def windows(shape: tuple[int, ...], window: tuple[int, ...], axes: tuple[int, ...] | None = None) -> Order:
    """Return window after window, and line after line inside each; those at the far edges may be smaller.

    Args:
        shape: sides of the grid.
        window: sides of a window, as many.
        axes: as for ``raster``, of windows and of places inside them.

    Raises:
        InputError: as ``raster``, or a window of another number of axes or with an empty side.
    """
    grid = _turned(shape, axes)
    if len(window) != len(shape) or min(window) < 1:
        raise InputError(f"window = {window} does not fit a grid of {shape}: give {len(shape)} sides of 1 or more")
    sides = [window[axis] for axis in (axes or range(len(shape)))]
    places = np.indices(grid.shape).reshape(grid.ndim, -1)
    outer = [place // side for place, side in zip(places, sides, strict=True)]
    inner = [place % side for place, side in zip(places, sides, strict=True)]
    return _frozen(grid.ravel()[np.lexsort((*reversed(inner), *reversed(outer)))])


@cache
def cross(shape: tuple[int, ...]) -> tuple[Order, ...]:
    """Return rasters with each axis as the fastest, from the last, then all of them backwards.

    On a plane: rows, columns, rows backwards, columns backwards, the four directions of VMamba.
    """
    count = len(shape)
    # Each axis comes to be the fastest; the others keep their turn.
    turns = [(*range(fast), *range(fast + 1, count), fast) for fast in reversed(range(count))]
    ways = [raster(shape, turn) for turn in turns]
    return (*ways, *(_frozen(way[::-1]) for way in ways))


def inverse(order: Order) -> Order:
    """Return the order that undoes ``order``: the step at which each place is read."""
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return back


def _turned(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> np.ndarray:
    """Return the place numbers of a grid, with its axes in their turn."""
    if not shape or min(shape) < 1:
        raise InputError(f"a grid of {shape} has no places: give sides of 1 or more")
    axes = tuple(range(len(shape))) if axes is None else axes
    if sorted(axes) != list(range(len(shape))):
        raise InputError(f"axes = {axes} must name each of the {len(shape)} axes of a grid of {shape} once")
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape).transpose(axes)


def _frozen(order: np.ndarray) -> Order:
    order = order.copy()
    order.flags.writeable = False
    return order


# ---- reading and putting back ----------------------------------------------------------------------------------------


def rearrange(x: Tensor, order: Order) -> Tensor:
    """Return the places of ``x`` (B, L, C) in that order.

    Rows of channels move as a whole: the same on (B, C, L) takes ten times as long.

    Raises:
        InputError: an order of another length.
    """
    if x.ndim != 3 or x.shape[1] != len(order):
        raise InputError(
            f"rearrange: x {tuple(x.shape)} must be (B, L, C) with L = {len(order)}, the places of the order"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        moved: Tensor = _Rearrange.apply(x, order)
        return moved
    return x.index_select(1, _places(order, x))


def _places(order: Order, x: Tensor) -> Tensor:
    return torch.tensor(order.copy(), device=x.device)  # copied, as a tensor cannot run backwards


class _Rearrange(torch.autograd.Function):
    """The gradient of a permutation reads it backwards; torch would add up places one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return x.index_select(1, _places(order, x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return rearrange(grad, inverse(ctx.order)), None


def cross_scan(x: Tensor, orders: Sequence[Order]) -> Tensor:
    """Return the places of ``x`` (B, L, C) in each of K orders, (B, K, L, C)."""
    return torch.stack([rearrange(x, order) for order in orders], 1)


def cross_merge(x: Tensor, orders: Sequence[Order]) -> Tensor:
    """Put what was read in K orders, (B, K, L, C), back to its places and add it up, (B, L, C)."""
    first, *rest = (rearrange(part, inverse(order)) for part, order in zip(x.unbind(1), orders, strict=True))
    for part in rest:
        first = first + part
    return first
