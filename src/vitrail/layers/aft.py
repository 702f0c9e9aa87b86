"""Attention-free layers: keys weigh values channel by channel, with learnt biases between positions.

Zhai et al., "An Attention Free Transformer" (2021), arXiv 2105.14103, sections 3.1 and 3.2. At position t

    y_t = sigmoid(q_t) * sum_s exp(k_s + w_ts) v_s / sum_s exp(k_s + w_ts)

with sums over all positions s, or over those up to t. AFT-full learns w_ts = u_t . v_s; AFT-local the same, and 0 where
|t - s| reaches its window; AFT-simple has w = 0; in AFT-conv w depends on the way from t to s alone, and a head of
channels shares one key and one window of biases.

exp(k) overflows for keys that training may well reach, and a sum of everything less a part cancels. Here all sums are
of positive terms, scaled by the largest key that each of them sees, so that keys of +-1e4 give the right answer. Memory
is proportional to T C: the (T, T) biases are computed in blocks of rows, and again in the backward pass.

Shapes: B sequences of T positions with C channels, in h heads of d. Keys (B, h, T, k) have k = 1 where a head shares
one, else k = d; values are (B, h, T, d).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.errors import InputError
from vitrail.layers.large_kernel import convolved

CHUNK = 256
"""Positions whose biases are computed at a time."""
SPREAD = 30.0
"""Keys of a chunk that differ by less are summed in one go, up to each position: e^-30 is far from underflow."""

Grid = tuple[int, int]
Block = Callable[[slice, slice], Tensor]
"""Gives the biases (h, R, S), or (1, R, S) for all heads, of R positions to S positions."""

# ---- weighted means --------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """What some positions contribute: e^shift times ``total`` and ``weight``, for each position that asks, or for all.

    Attributes:
        total: sum of exp(key + bias) value, (B, h, R or 1, d).
        weight: sum of exp(key + bias), (B, h, R or 1, k).
        shift: (B, h, R or 1, k); a constant, of which no mean depends.
    """

    total: Tensor
    weight: Tensor
    shift: Tensor

    def mean(self) -> Tensor:
        """Return the weighted mean of the values, (B, h, R or 1, d)."""
        return self.total / self.weight

    def spread(self, rows: int) -> Sums:
        """Return the same with so many rows, where what is the same for all has one."""
        return Sums(*(part.expand(-1, -1, rows, -1) for part in self))


def join(one: Sums, other: Sums) -> Sums:
    """Return the sums over the positions of both."""
    shift = torch.maximum(one.shift, other.shift)
    first, second = (one.shift - shift).exp(), (other.shift - shift).exp()
    return Sums(one.total * first + other.total * second, one.weight * first + other.weight * second, shift)


def sums(keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Sums:
    """Return the sums over all S positions, for R that ask; without biases they are the same for all.

    Args:
        keys: (B, h, S, k).
        values: (B, h, S, d).
        bias: (h or 1, R, S); -inf leaves a position out, never all of a row.
    """
    weights, shift = _lowered(keys)
    if bias is None:
        return Sums((weights * values).sum(2, keepdim=True), weights.sum(2, keepdim=True), shift)
    # Whole numbers: a fraction would be lost beside a shift of 1e4.
    top = bias.detach().amax(-1, keepdim=True).ceil()  # (h, R, 1)
    bias = (bias - top).exp_()
    return Sums(_product(bias, weights * values), _product(bias, weights), shift + top)


def sums_so_far(keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Sums:
    """Return for each of T positions the sums over those up to it, itself included.

    Where keys lie so far apart that those of the first positions vanish beside later ones, halves are summed apart.

    Args:
        keys, values: as of ``sums``.
        bias: (h or 1, T, T).
    """
    length = keys.shape[2]
    if length == 1 or _range(keys) < SPREAD:
        if bias is not None:
            later = torch.ones(length, length, dtype=torch.bool, device=keys.device).triu(1)
            return sums(keys, values, bias.masked_fill(later, -torch.inf))
        weights, shift = _lowered(keys)
        return Sums((weights * values).cumsum(2), weights.cumsum(2), shift)
    half = length // 2
    first, second = slice(half), slice(half, length)
    early = sums_so_far(keys[:, :, first], values[:, :, first], None if bias is None else bias[:, first, first])
    late = sums_so_far(keys[:, :, second], values[:, :, second], None if bias is None else bias[:, second, second])
    across = sums(keys[:, :, first], values[:, :, first], None if bias is None else bias[:, second, first])
    parts = [
        Sums(*(part.expand(-1, -1, one.total.shape[2], -1) for part in one)) for one in (early, join(late, across))
    ]
    return Sums(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True)))


def _range(keys: Tensor) -> float:
    """Return how far keys of a channel lie apart."""
    keys = keys.detach()
    return float((keys.amax(2) - keys.amin(2)).max())


def _lowered(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(key - shift), at most one, and the shift (B, h, 1, k)."""
    shift = keys.detach().amax(2, keepdim=True)
    return (keys - shift).exp_(), shift


def _product(weights: Tensor, x: Tensor) -> Tensor:
    """Return (h or 1, R, S) times (B, h, S, d)."""
    # A product of matrices would write the weights of several heads once for every image.
    return weights @ x if len(weights) == 1 else torch.einsum("hrs,bhsd->bhrd", weights, x)


def weighted_mean(
    keys: Tensor, values: Tensor, block: Block | None = None, *, reach: int = 0, causal: bool = False
) -> Tensor:
    """Return the mean of the values weighed by exp(key + bias) at every position, in memory proportional to T C.

    Args:
        keys: (B, h, T, k).
        values: (B, h, T, d).
        block: gives biases; None is no bias.
        reach: positions this far apart and farther have the bias 0.
        causal: whether a position sees itself and those before it alone.

    Returns:
        (B, h, T, d), or (B, h, 1, d) where all positions see the same.
    """
    length = keys.shape[2]
    if block is None and not causal:
        return sums(keys, values).mean()
    chunks = [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
    # Chunks that a bias reaches from a chunk, on either side; what lies beyond counts as a whole.
    near = (reach - 2) // CHUNK + 1 if block and reach > 1 else 0
    wholes = [sums(keys[:, :, chunk], values[:, :, chunk]) for chunk in chunks] if len(chunks) > near + 1 else []
    before = [None, *accumulate(wholes, join)]
    after = [*reversed(list(accumulate(reversed(wholes), join))), None]

    def mean_of(number: int) -> Tensor:
        rows = chunks[number]
        first = chunks[max(number - near, 0)]
        last = rows if causal else chunks[min(number + near, len(chunks) - 1)]
        parts = []
        if causal:
            own = block(rows, rows) if block else None
            parts.append(sums_so_far(keys[:, :, rows], values[:, :, rows], own))
            seen = slice(first.start, rows.start)
        else:
            seen = slice(first.start, last.stop)
        if block and seen.start < seen.stop:
            parts.append(sums(keys[:, :, seen], values[:, :, seen], block(rows, seen)))
        beyond = [before[first.start // CHUNK]] if wholes else []
        if wholes and not causal:
            beyond.append(after[(last.stop - 1) // CHUNK + 1])
        return reduce(join, [*parts, *(part for part in beyond if part is not None)]).mean()

    if len(chunks) == 1:
        return mean_of(0)
    numbers = range(len(chunks))
    if torch.is_grad_enabled():
        means = [checkpoint(mean_of, number, use_reentrant=False, preserve_rng_state=False) for number in numbers]
    else:
        means = [mean_of(number) for number in numbers]
    return torch.cat(means, 2)


# ---- biases ----------------------------------------------------------------------------------------------------------


class PairBias(nn.Module):
    """Learnt biases between positions, w_ts = u_t . v_s, 0 where |t - s| reaches the window.

    Args:
        length: positions T.
        rank: of the factors; None learns all T x T biases.
        window: None reaches everywhere.
    """

    def __init__(self, length: int, rank: int | None, window: int | None = None) -> None:
        super().__init__()
        self.length, self.rank, self.window = length, rank, window
        std = 0.01
        if rank is None:
            self.weight = nn.Parameter(torch.randn(length, length) * std)
        else:
            self.u = nn.Parameter(torch.randn(length, rank) * std)
            self.v = nn.Parameter(torch.randn(length, rank) * std)

    def block(self, resampled: Callable[[Tensor], Tensor] | None = None) -> Block:
        """Return what gives the biases.

        Args:
            resampled: brings factors (T, rank) to other positions.
        """
        if self.rank is None:
            return lambda rows, columns: self._within(self.weight[rows, columns], rows, columns)[None]
        u, v = (self.u, self.v) if resampled is None else (resampled(self.u), resampled(self.v))
        return lambda rows, columns: self._within(u[rows] @ v[columns].T, rows, columns)[None]

    def _within(self, bias: Tensor, rows: slice, columns: slice) -> Tensor:
        if self.window is None:
            return bias
        return bias.masked_fill(_apart(rows, columns, bias.device).abs() >= self.window, 0)


class WindowBias(nn.Module):
    """Windows of biases on a plane, one for each head, with a learnt mean and standard deviation.

    w = gain (weight - its mean) / (its standard deviation) + shift, where gain and shift start at 0.

    Args:
        heads: h.
        kernel_size: height and width of the window, odd.
        causal: whether only what comes earlier in a raster, and the centre, have a bias.
    """

    def __init__(self, heads: int, kernel_size: Grid, *, causal: bool) -> None:
        super().__init__()
        self.kernel_size, self.radius = kernel_size, (kernel_size[0] // 2, kernel_size[1] // 2)
        taps = kernel_size[0] * kernel_size[1]
        self.weight = nn.Parameter(torch.randn(heads, taps // 2 + 1 if causal else taps) * 0.02)
        self.gain = nn.Parameter(torch.zeros(heads))
        self.shift = nn.Parameter(torch.zeros(heads))

    def taps(self) -> Tensor:
        """Return the biases (h, taps) from the first row of the window on, to its centre where it is causal."""
        centred = self.weight - self.weight.mean(1, keepdim=True)
        # A window of one tap has no deviation.
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-12).sqrt()
        return self.gain[:, None] * scaled + self.shift[:, None]

    def block(self, columns_of_plane: int) -> Block:
        """Return what gives the biases of a raster with this many columns."""
        taps = F.pad(self.taps(), (0, 1))  # behind the last tap, the bias of what the window does not reach
        (_, width), (down, right) = self.kernel_size, self.radius

        def block(rows: slice, columns: slice) -> Tensor:
            t, s = _places(rows, taps.device)[:, None], _places(columns, taps.device)[None]
            below = s // columns_of_plane - t // columns_of_plane
            beside = s % columns_of_plane - t % columns_of_plane
            index = (below + down) * width + beside + right
            inside = (below.abs() <= down) & (beside.abs() <= right) & (index < taps.shape[1])
            return taps[:, torch.where(inside, index, taps.shape[1] - 1)]

        return block


def _places(part: slice, device: torch.device) -> Tensor:
    return torch.arange(part.start, part.stop, device=device)


def _apart(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Return t - s, (R, S)."""
    return _places(rows, device)[:, None] - _places(columns, device)[None]


# ---- the layers ------------------------------------------------------------------------------------------------------


def _uncast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast: exponentials are summed in float32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class State(NamedTuple):
    """What a causal layer keeps of the positions so far.

    Attributes:
        keys, values: of the last positions that a bias reaches, (B, h, n, k) and (B, h, n, d).
        beyond: sums over all before these; None before there are any.
        time: positions so far.
    """

    keys: Tensor
    values: Tensor
    beyond: Sums | None
    time: int


class AFT(nn.Module):
    """What the layers share, in the place of multi-head attention; without biases of its own.

    Args:
        dim: C.
        heads: h, each with one key for all its channels; None is a key for each channel.
        causal: whether a position sees itself and those before it alone.
    """

    def __init__(self, dim: int, heads: int | None = None, *, causal: bool = False) -> None:
        super().__init__()
        if heads is not None and (heads < 1 or dim % heads):
            raise InputError(f"heads = {heads} does not divide a width of {dim}: give a divisor")
        self.heads, self.causal = heads or 1, causal
        self.parts = [dim, heads or dim, dim]
        self.qkv = nn.Linear(dim, sum(self.parts))
        self.proj = nn.Linear(dim, dim)

    def reach(self, grid: Grid) -> int:
        """Return the distance from which on positions have no bias."""
        return 0

    def block(self, grid: Grid) -> Block | None:
        """Return what gives the biases of a plane of positions in a raster, or of a sequence (1, T)."""
        return None

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Return (B, T, C) of (B, T, C).

        Args:
            x: (B, T, C).
            grid: rows and columns of the positions; None is one row.
        """
        query, keys, values = self._projected(x)
        with _uncast(x):
            mean = self.mixed(keys, values, grid or (1, x.shape[1]))
        return self._answered(query, mean)

    def mixed(self, keys: Tensor, values: Tensor, grid: Grid) -> Tensor:
        """Return the weighted means (B, h, T or 1, d)."""
        return weighted_mean(keys, values, self.block(grid), reach=self.reach(grid), causal=self.causal)

    def step(self, x: Tensor, state: State | None, grid: Grid) -> tuple[Tensor, State]:
        """Return the output at one more position of a causal layer, and what to keep.

        Args:
            x: (B, C).
            state: of the step before; None at the first.
            grid: rows and columns of the whole sequence.

        Raises:
            InputError: the layer is not causal.
        """
        if not self.causal:
            raise InputError("a layer that is not causal sees what is to come: build it with causal = True")
        query, keys, values = self._projected(x[:, None])
        with _uncast(x):
            time, beyond = (state.time, state.beyond) if state else (0, None)
            if state:
                keys, values = torch.cat([state.keys, keys], 2), torch.cat([state.values, values], 2)
            block, kept = self.block(grid), keys.shape[2]
            bias = block(slice(time, time + 1), slice(time + 1 - kept, time + 1)) if block else None
            found = sums(keys, values, bias)
            mean = (join(found, beyond) if beyond else found).mean()
            if kept >= self.reach(grid):
                oldest = sums(keys[:, :, :1], values[:, :, :1])
                beyond = join(beyond, oldest) if beyond else oldest
                keys, values = keys[:, :, 1:], values[:, :, 1:]
        return self._answered(query, mean)[:, 0], State(keys, values, beyond, time + 1)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, C), and keys and values as the sums take them, in float32 at least."""
        query, keys, values = self.qkv(x).split(self.parts, -1)
        kind = torch.promote_types(x.dtype, torch.float32)
        keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(kind) for part in (keys, values))
        return query, keys, values

    def _answered(self, query: Tensor, mean: Tensor) -> Tensor:
        return self.proj(query.sigmoid() * mean.transpose(1, 2).flatten(2).to(query.dtype))


class AFTSimple(AFT):
    """AFT without biases: a mean of all values, or of all so far, which each position takes its share of.

    Args:
        dim: C.
        causal: whether a position sees itself and those before it alone.
    """

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__(dim, causal=causal)


class AFTFull(AFT):
    """AFT with learnt biases between all positions; with a window it is AFT-local.

    Args:
        dim: C.
        length: positions T, or rows and columns of positions: their factors are interpolated for another plane.
        rank: of the factors; None learns T x T biases.
        window: biases are of positions less than this apart; None is all.
        prefix: positions before those of a plane, such as a class token.
        causal: whether a position sees itself and those before it alone.
    """

    def __init__(
        self,
        dim: int,
        length: int | Grid,
        *,
        rank: int | None = 128,
        window: int | None = None,
        prefix: int = 0,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.grid = (1, length) if isinstance(length, int) else length
        self.prefix = prefix
        for name, value in (("length", self.grid[0] * self.grid[1]), ("rank", rank), ("window", window)):
            if value is not None and value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        self.bias = PairBias(prefix + self.grid[0] * self.grid[1], rank, window)

    def reach(self, grid: Grid) -> int:
        """Return the window, or all positions."""
        length = self.prefix + grid[0] * grid[1]
        return length if self.bias.window is None else min(self.bias.window, length)

    def block(self, grid: Grid) -> Block:
        """Return what gives the biases; factors are interpolated for a plane of another size, and not for a row.

        Raises:
            InputError: more positions than there are biases for, where these are not those of a plane.
        """
        if grid == self.grid:
            return self.bias.block()
        if self.grid[0] == 1:
            if grid[0] * grid[1] > self.grid[1]:
                raise InputError(
                    f"a sequence of {grid[0] * grid[1]} positions is too long: there are biases for {self.grid[1]}"
                )
            return self.bias.block()
        if self.bias.rank is None:
            raise InputError(f"biases that are not factorised are for {self.grid} places alone, and these are {grid}")
        return self.bias.block(lambda factors: self._resampled(factors, grid))

    def _resampled(self, factors: Tensor, grid: Grid) -> Tensor:
        plane = factors[self.prefix :].T.unflatten(1, self.grid)[None]
        plane = F.interpolate(plane, grid, mode="bicubic", align_corners=False)
        return torch.cat([factors[: self.prefix], plane[0].flatten(1).T])


class AFTLocal(AFTFull):
    """AFT with learnt biases between positions less than a window apart; farther ones count all the same.

    Args:
        dim, length, rank, causal: as of ``AFTFull``; 64 is the published rank for images as sequences.
        window: in positions.
    """

    def __init__(
        self, dim: int, length: int | Grid, *, window: int, rank: int | None = 64, causal: bool = False
    ) -> None:
        super().__init__(dim, length, rank=rank, window=window, causal=causal)


class AFTConv(AFT):
    """AFT whose biases depend on the way between positions alone: a convolution that sees everything.

    Args:
        dim: C.
        heads: h; each has one key and one window of biases.
        kernel_size: side of a square window on a plane, or its height and width, odd; (1, s) for a sequence.
        causal: whether a position sees itself and those before it in the raster alone.
    """

    def __init__(self, dim: int, heads: int, kernel_size: int | Grid, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if len(sides) != 2 or any(side < 1 or side % 2 == 0 for side in sides):
            raise InputError(
                f"kernel_size = {kernel_size} is not allowed: give an odd side of 1 or more, or two of them"
            )
        self.bias = WindowBias(heads, sides, causal=causal)

    def reach(self, grid: Grid) -> int:
        """Return the distance in a raster from which on the window does not reach."""
        down, right = (min(radius, side - 1) for radius, side in zip(self.bias.radius, grid, strict=True))
        return down * grid[1] + right + 1

    def block(self, grid: Grid) -> Block:
        """Return what gives the biases of a plane."""
        return self.bias.block(grid[1])

    def mixed(self, keys: Tensor, values: Tensor, grid: Grid) -> Tensor:
        """Return the weighted means (B, h, T, d)."""
        if self.causal:
            return super().mixed(keys, values, grid)
        heads, dim = values.shape[1], values.shape[3]
        weights, _ = _lowered(keys)
        planes = torch.cat([(weights * values).transpose(2, 3).flatten(1, 2), weights[..., 0]], 1).unflatten(2, grid)
        taps = self.bias.taps()
        top = taps.detach().amax(1).clamp(min=0)  # so that no weight is above one
        windows = (taps - top[:, None]).exp().view(heads, 1, *self.bias.kernel_size)
        found = _convolved(planes, torch.cat([windows.repeat_interleave(dim, 0), windows]))
        down, right = self.bias.radius
        if down < grid[0] - 1 or right < grid[1] - 1:
            share = torch.cat([(-top).exp().repeat_interleave(dim), (-top).exp()])
            found = found + share[:, None, None] * _outside(planes, self.bias.radius)
        total, weight = found.flatten(2).split([heads * dim, heads], 1)
        return (total.unflatten(1, (heads, dim)) / weight[:, :, None]).transpose(2, 3)


def _convolved(planes: Tensor, windows: Tensor) -> Tensor:
    if planes.device.type != "cpu" or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        sides = (windows.shape[2] // 2, windows.shape[3] // 2)
        return F.conv2d(planes, windows, padding=sides, groups=len(windows))
    return convolved(planes, windows)


def _outside(planes: Tensor, radius: Grid) -> Tensor:
    """Return at each place the sum over what a window around it does not reach, of which no part is subtracted."""
    far_rows, far_columns = (_far(side, reach, planes) for side, reach in zip(planes.shape[2:], radius, strict=True))
    return far_rows @ planes.sum(3, keepdim=True) + (1 - far_rows) @ (planes @ far_columns)


def _far(side: int, reach: int, like: Tensor) -> Tensor:
    """Return 1 where two of so many places are farther apart than ``reach``, else 0."""
    places = torch.arange(side, device=like.device)
    return ((places[:, None] - places[None]).abs() > reach).to(like.dtype)
