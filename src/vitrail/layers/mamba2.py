"""Mamba-2's mixer: a scan with one decay a head, between a causal convolution and a gated norm.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality"
(2024), arXiv 2405.21060, section 7.1. Parameters are named and laid out as in the published code
(state-spaces/mamba), so that its checkpoints load.

Shapes: B sequences of L places with C channels, D = expand C inside, in H heads of P channels; G groups of N states.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.mamba import Memory, initial_steps, rates
from vitrail.layers.scan import dual_scan, dual_step

RATES = (1.0, 16.0)
"""Between which the published code draws the first rates of decay."""


class GatedRMSNorm(nn.Module):
    """Multiply by SiLU of a gate, then divide each group of channels by its root mean square.

    Args:
        channels: D.
        groups: that divide D.
        eps: added to the mean square.
    """

    def __init__(self, channels: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return (..., D) in the dtype of ``x``; computed in float32 at least."""
        kind = torch.promote_types(x.dtype, torch.float32)
        gated = x.to(kind) * F.silu(gate.to(kind))
        parts = gated.unflatten(-1, (self.groups, -1))
        parts = parts * (parts.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (parts.flatten(-2) * self.weight).to(x.dtype)


class Mamba2(nn.Module):
    """Mamba-2's mixer: one linear layer gives gate, x, B, C and step sizes; x, B and C are convolved and scanned.

    Args:
        dim: C.
        states: N.
        width: places that the convolution sees, the present one and those before it.
        expand: D over C.
        head_dim: P, a divisor of D.
        groups: G, a divisor of H; the heads of a group share B and C.
        step_limits: smallest and largest step size, clamped to after softplus.
        chunk: places that one product of matrices covers; changes the time that it takes, and not the result.

    Raises:
        InputError: sizes below 1 or that do not divide, or limits that leave no step sizes.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 128,
        width: int = 4,
        expand: float = 2.0,
        head_dim: int = 64,
        groups: int = 1,
        step_limits: tuple[float, float] = (0.0, math.inf),
        chunk: int = 64,
    ) -> None:
        super().__init__()
        sizes = {"states": states, "width": width, "head_dim": head_dim, "groups": groups, "chunk": chunk}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        channels = int(expand * dim)
        if channels < 1 or channels % head_dim:
            raise InputError(f"head_dim = {head_dim} does not divide {channels} = expand x dim: give a divisor of it")
        heads = channels // head_dim
        if heads % groups:
            raise InputError(f"groups = {groups} does not divide {heads} heads: give a divisor")
        if not 0 <= step_limits[0] < step_limits[1]:
            raise InputError(f"step_limits = {step_limits} is not allowed: give two numbers from 0, the smaller first")
        self.channels, self.states, self.groups, self.head_dim = channels, states, groups, head_dim
        self.step_limits, self.chunk = step_limits, chunk
        convolved = channels + 2 * groups * states
        self.in_proj = nn.Linear(dim, channels + convolved + heads, bias=False)
        self.conv1d = nn.Conv1d(convolved, convolved, width, groups=convolved, padding=width - 1)
        self.dt_bias = nn.Parameter(initial_steps(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*RATES).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(channels, groups)
        self.out_proj = nn.Linear(channels, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, C)."""
        return self.stream(x)[0]

    def stream(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Return (B, L, C) and the memory to go on with: L places at a time, one or many, give the same.

        Args:
            x: (B, L, C).
            memory: what the call before returned: the places that the convolution will see again, (B, D + 2 G N,
                width - 1), and the state (B, H, P, N), whatever the number of places read. None is the beginning.
        """
        heads = len(self.A_log)
        gate, inside, delta = self.in_proj(x).split((self.channels, self.conv1d.in_channels, heads), -1)
        inside = inside.transpose(1, 2)
        kept = self.conv1d.kernel_size[0] - 1
        before = inside.new_zeros(*inside.shape[:2], kept) if memory is None else memory.places.to(inside.dtype)
        seen = torch.cat((before, inside), 2)
        inside = F.silu(F.conv1d(seen, self.conv1d.weight, self.conv1d.bias, groups=self.conv1d.groups))
        shared = self.groups * self.states
        values, enter, leave = inside.transpose(1, 2).split((self.channels, shared, shared), -1)
        kind = torch.promote_types(self.dt_bias.dtype, torch.float32)
        steps = F.softplus(delta.to(kind) + self.dt_bias.to(kind)).clamp(*self.step_limits)
        y, state = self._scanned(
            values.unflatten(-1, (heads, self.head_dim)),
            steps,
            enter.unflatten(-1, (self.groups, self.states)),
            leave.unflatten(-1, (self.groups, self.states)),
            None if memory is None else memory.state,
        )
        y = self.norm(y.flatten(2), gate)
        return self.out_proj(y), Memory(seen[..., seen.shape[2] - kept :], state)

    def _scanned(
        self, x: Tensor, steps: Tensor, enter: Tensor, leave: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (B, L, H, P) and the last state."""
        length, decay = x.shape[1], rates(self.A_log)
        if length > 1 or state is None:
            return dual_scan(x, steps, decay, enter, leave, self.D, state=state, chunk=min(self.chunk, length))
        y, state = dual_step(x[:, 0], steps[:, 0], decay, enter[:, 0], leave[:, 0], self.D, state=state)
        return y.unsqueeze(1), state
