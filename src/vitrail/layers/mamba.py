"""Mamba's mixer and those made of it: over a sequence, over both its directions, and over a plane in several orders.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), arXiv 2312.00752; Zhu et al.,
"Vision Mamba" (2024), arXiv 2401.09417; Liu et al., "VMamba" (2024), arXiv 2401.10166. Parameters are named as in the
published code of each.

Shapes: B sequences of L places with C channels, D = expand C inside, N states, R the rank of the step sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.scan import selective_scan
from vitrail.layers.scan.orders import Order, cross, cross_merge, cross_scan

Scan = Callable[..., tuple[Tensor, Tensor]]
"""A function with the arguments and the result of ``selective_scan``."""


def initial_rates(channels: int, states: int) -> Tensor:
    """Return the logarithms of Mamba's first rates of decay, 1 to N for each channel, (D, N)."""
    return torch.arange(1, states + 1, dtype=torch.float32).log().repeat(channels, 1)


def initial_steps(*shape: int, smallest: float = 1e-3, largest: float = 0.1, floor: float = 1e-4) -> Tensor:
    """Return biases of which softplus gives step sizes spread evenly in their logarithm from smallest to largest."""
    low, high = math.log(smallest), math.log(largest)
    steps = (torch.rand(*shape) * (high - low) + low).exp().clamp(min=floor)
    return steps + (-torch.expm1(-steps)).log()


class Memory(NamedTuple):
    """What a mixer keeps of the places it has read, whatever their number."""

    places: Tensor
    """The last ones, which the convolution will see again, (B, D, width - 1)."""
    state: Tensor
    """(B, D, N)."""


class ScanPath(nn.Module):
    """A causal convolution, SiLU, and a selective scan whose step sizes, B and C come of what is scanned.

    Args:
        channels: D.
        rank: R.
        states: N.
        width: places that the convolution sees, the present one and those before it.
    """

    scan: Scan = staticmethod(selective_scan)
    """Another with its arguments may be set in its place."""

    def __init__(self, channels: int, rank: int, *, states: int = 16, width: int = 4) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("rank", rank), ("states", states), ("width", width)):
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        self.rank, self.states = rank, states
        self.conv1d = nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1)
        self.x_proj = nn.Linear(channels, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        self.A_log = nn.Parameter(initial_rates(channels, states))
        self.D = nn.Parameter(torch.ones(channels))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_steps(channels))

    def along(self, x: Tensor, z: Tensor | None, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Return y (B, D, L) and the memory after the last place.

        Args:
            x: (B, D, L).
            z: gate, (B, D, L), or None for none.
            memory: of the places before; None is the beginning.
        """
        before = self.conv1d.kernel_size[0] - 1
        if memory is None:
            places = x.new_zeros(x.shape[0], before, x.shape[1]).transpose(1, 2)
        else:
            places = memory.places.to(x.dtype)
        # As a plane of one row: torch convolves planes, but no sequences, also where channels lie side by side.
        seen = torch.cat((places.unsqueeze(2), x.unsqueeze(2)), 3)
        kernel = self.conv1d.weight.unsqueeze(2)
        x = F.silu(F.conv2d(seen, kernel, self.conv1d.bias, groups=self.conv1d.groups)).squeeze(2)
        delta, enter, leave = self.x_proj(x.transpose(1, 2)).split((self.rank, self.states, self.states), -1)
        y, state = self.scan(
            x,
            F.linear(delta, self.dt_proj.weight).transpose(1, 2),
            rates(self.A_log),
            enter.transpose(1, 2),
            leave.transpose(1, 2),
            self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            softplus=True,
            state=None if memory is None else memory.state,
        )
        return y, Memory(seen[:, :, 0, seen.shape[3] - before :], state)


def rates(logs: Tensor) -> Tensor:
    """Return A of its logarithms, at least float32: in low precision rates would be rounded, and long memories lost."""
    return -logs.to(torch.promote_types(logs.dtype, torch.float32)).exp()


class Mamba(ScanPath):
    """Mamba's mixer: a linear layer to two branches, a scan of one, gated by the other, and a linear layer back.

    Args:
        dim: C.
        states: N.
        width: places that the convolution sees.
        expand: D over C.
        rank: R; None is a sixteenth of C, rounded up.
    """

    def __init__(
        self, dim: int, *, states: int = 16, width: int = 4, expand: float = 2.0, rank: int | None = None
    ) -> None:
        channels = int(expand * dim)
        super().__init__(channels, math.ceil(dim / 16) if rank is None else rank, states=states, width=width)
        self.in_proj = nn.Linear(dim, 2 * channels, bias=False)
        self.out_proj = nn.Linear(channels, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, C)."""
        return self.stream(x)[0]

    def stream(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Return (B, L, C) and the memory to go on with: L places at a time, one or many, give the same.

        Args:
            x: (B, L, C).
            memory: what the call before returned; None is the beginning.
        """
        inside, gate = (part.transpose(1, 2) for part in self.in_proj(x).chunk(2, 2))
        y, memory = self.along(inside, gate, memory)
        return self.out_proj(y.transpose(1, 2)), memory


class BidirectionalMamba(Mamba):
    """Vim's mixer: the mean of a scan from the first place and one from the last, each with its own parameters.

    Args: as ``Mamba``.
    """

    def __init__(
        self, dim: int, *, states: int = 16, width: int = 4, expand: float = 2.0, rank: int | None = None
    ) -> None:
        super().__init__(dim, states=states, width=width, expand=expand, rank=rank)
        self.back = ScanPath(int(expand * dim), self.rank, states=states, width=width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, C)."""
        inside, gate = (part.transpose(1, 2) for part in self.in_proj(x).chunk(2, 2))
        there, _ = self.along(inside, gate)
        back, _ = self.back.along(inside.flip(2), gate.flip(2))
        return self.out_proj(((there + back.flip(2)) / 2).transpose(1, 2))

    def stream(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Raise InputError: who scans from the last place cannot go on."""
        raise InputError("a bidirectional mixer needs the whole sequence: call it, or stream with Mamba")


def bidirectional_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Vim's published parameters under our names: those of the way back are in a module of their own."""
    found = {}
    for key, value in state.items():
        for old, new in (("A_b_log", "back.A_log"), ("D_b", "back.D")):
            if key.endswith(f".{old}"):
                key = key.removesuffix(old) + new
        for part in ("conv1d", "x_proj", "dt_proj"):
            key = key.replace(f".{part}_b.", f".back.{part}.")
        found[key] = value
    return found


class ScanPaths(nn.Module):
    """K selective scans side by side, with parameters of their own: step sizes, B and C come of what is scanned.

    Args:
        count: K.
        channels: D of each.
        rank: R.
        states: N.
    """

    scan: Scan = staticmethod(selective_scan)
    """Another with its arguments may be set in its place."""

    def __init__(self, count: int, channels: int, rank: int, *, states: int = 16) -> None:
        super().__init__()
        self.rank, self.states = rank, states
        self.x_proj_weight = nn.Parameter(torch.empty(count, rank + 2 * states, channels))
        self.dt_projs_weight = nn.Parameter(torch.empty(count, channels, rank))
        self.dt_projs_bias = nn.Parameter(initial_steps(count, channels))
        self.A_logs = nn.Parameter(initial_rates(count * channels, states))
        self.Ds = nn.Parameter(torch.ones(count * channels))
        nn.init.uniform_(self.x_proj_weight, -(channels**-0.5), channels**-0.5)  # as a linear layer
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)

    def along(self, xs: Tensor) -> Tensor:
        """Return (B, K, L, D) of K sequences of that shape."""
        parts = torch.einsum("bkld,kcd->bklc", xs, self.x_proj_weight)
        delta, enter, leave = parts.split((self.rank, self.states, self.states), -1)
        delta = torch.einsum("bklr,kdr->bkdl", delta, self.dt_projs_weight)
        y, _ = self.scan(
            xs.transpose(2, 3).flatten(1, 2),
            delta.flatten(1, 2),
            rates(self.A_logs),
            enter.transpose(2, 3),
            leave.transpose(2, 3),
            self.Ds,
            delta_bias=self.dt_projs_bias.flatten(),
            softplus=True,
        )
        return y.unflatten(1, (xs.shape[1], -1)).transpose(2, 3)


class SS2D(ScanPaths):
    """VMamba's mixer: a plane is scanned in several orders, with parameters of their own, and the results added up.

    Args:
        dim: C.
        states: N.
        expand: D over C.
        rank: R; None is a sixteenth of C, rounded up.
        width: side of the depthwise convolution before the scans, odd.
        orders: from the plane's sides (H, W) to the K orders; the four directions by default.
        gate: whether a second branch, through SiLU, multiplies the result.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        expand: float = 2.0,
        rank: int | None = None,
        width: int = 3,
        orders: Callable[[tuple[int, int]], Sequence[Order]] = cross,
        gate: bool = True,
    ) -> None:
        if width < 1 or width % 2 == 0:
            raise InputError(f"width = {width} of the convolution is not allowed: give an odd number")
        channels = int(expand * dim)
        super().__init__(len(orders((2, 2))), channels, math.ceil(dim / 16) if rank is None else rank, states=states)
        self.gate, self.orders = gate, orders
        self.in_proj = nn.Linear(dim, 2 * channels if gate else channels, bias=False)
        self.conv2d = nn.Conv2d(channels, channels, width, padding=width // 2, groups=channels)
        self.out_norm = nn.LayerNorm(channels)
        self.out_proj = nn.Linear(channels, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        inside = self.in_proj(x)
        if self.gate:
            inside, gate = inside.chunk(2, -1)
        inside = F.silu(self.conv2d(inside.permute(0, 3, 1, 2)))
        orders = self.orders((x.shape[1], x.shape[2]))
        y = cross_merge(self.along(cross_scan(inside.flatten(2).transpose(1, 2), orders)), orders)
        y = self.out_norm(y).unflatten(1, x.shape[1:3]).to(x.dtype)
        return self.out_proj(y * F.silu(gate) if self.gate else y)


class MambaBlock(nn.Module):
    """A norm and a mixer, added to what came in.

    Args:
        mixer: from (B, L, C) to (B, L, C).
        norm: of channels.
        drop_path: rate of stochastic depth, in [0, 1).
    """

    def __init__(self, mixer: nn.Module, norm: nn.Module, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return what came in, and more, in its shape."""
        return x + self.drop_path(self.mixer(self.norm(x)))
