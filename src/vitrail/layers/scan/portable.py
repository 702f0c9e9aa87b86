"""The selective scan in torch operators alone: any device, any dtype, complex states, bounded memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SEGMENT = 1024
"""Steps whose states are in memory at a time; a backward pass computes them again."""


def selective_scan_portable(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as ``selective_scan_reference``.

    A sequence is cut into segments, which follow each other, and a segment into chunks: all its chunks take their steps
    side by side from a state of zero, then each adds what the state before it has become by its time. That takes about
    ``2 sqrt(L)`` steps of Python instead of L.
    """
    outputs = []
    for start in range(0, u.shape[2], SEGMENT):
        part = slice(start, start + SEGMENT)
        inputs = (u[..., part], delta[..., part], A, B[..., part], C[..., part], state)
        if torch.is_grad_enabled() and u.shape[2] > SEGMENT:
            y, state = checkpoint(_segment, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _segment(*inputs)
        outputs.append(y)
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], state


def _segment(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, length = u.shape
    groups, size = B.shape[1], A.shape[1]
    steps = max(1, math.isqrt(length))
    chunks = -(-length // steps)
    # A step of delta 0 changes no state: the last chunk is filled with such.
    u, delta, B, C = (F.pad(x, (0, chunks * steps - length)) for x in (u, delta, B, C))
    shape = (batch, groups, channels // groups, chunks, steps)
    u, delta = u.reshape(shape), delta.reshape(shape)
    # (B, G, 1, chunks, steps, N)
    B, C = (x.reshape(batch, groups, size, chunks, steps).permute(0, 1, 3, 4, 2).unsqueeze(2) for x in (B, C))
    A = A.view(groups, channels // groups, 1, size)
    entering = ((delta * u).unsqueeze(-1) * B).unbind(-2)
    kept = (delta.unsqueeze(-1) * A.unsqueeze(-2)).exp().unbind(-2)
    states = [entering[0]]
    for step in range(1, steps):
        states.append(torch.addcmul(entering[step], kept[step], states[-1]))
    # What is left at each step of the state before the chunk.
    left = (delta.cumsum(-1).unsqueeze(-1) * A.unsqueeze(-2)).exp()
    before = [state.view(batch, groups, channels // groups, size)]
    for chunk in range(chunks):
        before.append(torch.addcmul(states[-1][..., chunk, :], left[..., chunk, -1, :], before[-1]))
    inside = torch.addcmul(torch.stack(states, -2), left, torch.stack(before[:-1], -2).unsqueeze(-2))
    y = (inside * C).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    return y.reshape(batch, channels, chunks * steps)[..., :length], before[-1].reshape(batch, channels, size)
