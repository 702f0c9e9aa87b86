"""The selective scan in torch operators alone: any device, any dtype, complex states, bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SEGMENT = 1 << 19
"""Elements of a tensor of states, a few of which are in memory, and best in a cache, at a time."""
WIDTH = 1 << 14
"""Elements worth an operator's call: where a step has less, chunks of the sequence take theirs side by side."""
EXPORTED = 1024
"""Steps of a segment in an exported program, which is written out step by step and may leave the batch's size open."""


def selective_scan_portable(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as ``selective_scan_reference``; gradients have no gradient themselves.

    A sequence is cut into segments, which follow each other, and a segment into chunks, which take their steps side by
    side: once from a state of zero, to find what each adds to the state before it, and again from that. Between forward
    and backward the state before each segment is kept.
    """
    if A.is_complex():  # what enters is added up in place
        B, C = B.to(A.dtype), C.to(A.dtype)
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        y, last, _ = _scan(u, delta, A, B, C, state, exporting=True)
    else:
        y, last, _ = _Scan.apply(u, delta, A, B, C, state)
    return y, last


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _scan(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:5], output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return _scan_backward(dy, dlast, *ctx.saved_tensors)


# Within a segment tensors are (steps, chunks, B, G, N, D / G): a step is one block, and a row of channels is long.


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, exporting: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and the states before each segment."""
    groups = B.shape[1]
    rates, now = _channels_last(A, groups), _channels_last(state, groups)
    before, outputs = [], []
    for part, chunks in _segments(u, A, exporting):
        before.append(now)
        step, value = (_channel_rows(x[..., part], groups, chunks) for x in (delta, u))
        enter, leave = (_state_columns(x[..., part], chunks) for x in (B, C))
        kept, states = (step * rates).exp_(), step * value * enter
        h = _starts(kept, states, step, rates, now)
        if exporting:  # a program cannot write into a part of a tensor without copying the whole
            found = []
            for a, entering in zip(kept.unbind(), states.unbind(), strict=True):
                h = torch.addcmul(entering, a, h)
                found.append(h)
            states = torch.stack(found)
        else:
            _take_steps(kept, states, h)
        now = states[-1, -1].clone()  # for this alone all others would stay in memory
        y = (leave * states).sum(-2)
        outputs.append(_in_a_row(2 * y.real if y.is_complex() else y, part))
    y = torch.cat(outputs, -1).reshape(u.shape)
    return y, now.transpose(-1, -2).reshape(state.shape), torch.stack(before)


def _scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, before: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C and the first state: the same scan from the end."""
    groups = B.shape[1]
    rates, dnow = _channels_last(A, groups), _channels_last(dlast, groups)
    du, ddelta = (u.new_empty(u.shape[0], groups, u.shape[1] // groups, u.shape[2]) for _ in range(2))
    dA, dB, dC = (x.new_empty(x.shape) for x in (rates, B, C))
    dA.zero_()
    for index, (part, chunks) in reversed(list(enumerate(_segments(u, A)))):
        step, value, slope = (_channel_rows(x[..., part], groups, chunks) for x in (delta, u, dy))
        enter, leave = (_state_columns(x[..., part], chunks) for x in (B, C))
        slope = 2 * slope if A.is_complex() else slope
        x, kept = step * value, (step * rates).exp_()
        states = x * enter
        starts = _starts(kept, states, step, rates, before[index])
        _take_steps(kept, states, starts)
        dC[..., part] = _in_a_row((states * slope).sum(-1).conj(), part)

        kept, dstates = kept.conj().resolve_conj(), slope * leave.conj()
        _take_steps_back(kept, dstates, _starts(kept, dstates, step, rates.conj(), dnow, from_the_end=True))
        dearlier = kept  # of the state before each step
        dnow = dearlier[0, 0].clone()
        dB[..., part] = _in_a_row((dstates * x).sum(-1), part)
        dx = _real((dstates * enter.conj()).sum(-2, keepdim=True))
        through = dearlier
        through[1:] *= states[:-1].conj()
        through[0] *= starts.conj()
        dA += (through * step).sum((0, 1, 2))
        dstep = _real(through.mul_(rates.conj()).sum(-2, keepdim=True))
        du[..., part] = _in_a_row((dx * step).squeeze(-2), part)
        ddelta[..., part] = _in_a_row((dx * value + dstep).squeeze(-2), part)
    dA, dstate = dA.transpose(-1, -2).reshape(A.shape), dnow.transpose(-1, -2).reshape(dlast.shape)
    return du.view(u.shape), ddelta.view(u.shape), dA, dB, dC, dstate


def _starts(
    kept: Tensor, entering: Tensor, step: Tensor, rates: Tensor, now: Tensor, *, from_the_end: bool = False
) -> Tensor:
    """Return what there is before the first step of each chunk; from the end, its gradient after the last."""
    if kept.shape[1] == 1:
        return now.unsqueeze(0)
    steps = list(zip(kept.unbind(), entering.unbind(), strict=True))
    if from_the_end:
        steps = [(a, a * e) for a, e in reversed(steps)]
    made = steps[0][1]
    for a, e in steps[1:]:
        made = torch.addcmul(e, a, made)
    left = (step.sum(0) * rates).exp()
    found = []
    for chunk in reversed(range(len(left))) if from_the_end else range(len(left)):
        found.append(now)
        now = torch.addcmul(made[chunk], left[chunk], now)
    return torch.stack(found[::-1] if from_the_end else found)


def _take_steps(kept: Tensor, states: Tensor, h: Tensor) -> None:
    """Turn what enters at each step into the states after it."""
    if kept.is_meta:  # has no values: each step would be a call for nothing
        return
    for a, state in zip(kept.unbind(), states.unbind(), strict=True):
        h = state.addcmul_(a, h)


def _take_steps_back(kept: Tensor, dstates: Tensor, dlater: Tensor) -> None:
    """Turn gradients by way of outputs alone into those of states, and ``kept`` into those of the states before."""
    if kept.is_meta:
        return
    for a, dstate in reversed(list(zip(kept.unbind(), dstates.unbind(), strict=True))):
        dlater = a.mul_(dstate.add_(dlater))


def _segments(u: Tensor, A: Tensor, exporting: bool = False) -> Iterator[tuple[slice, int]]:
    """Give the segments of a sequence, each with the number of its chunks."""
    length = u.shape[2]
    if u.is_meta:  # takes no memory
        steps, chunks = length, 1
    elif exporting:
        steps = min(length, EXPORTED)
        chunks = math.isqrt(steps)
    else:
        width = max(1, u.shape[0] * A.numel())
        steps = min(length, max(SEGMENT // width, 8))
        chunks = max(1, min(WIDTH // width, math.isqrt(steps)))
    for start in range(0, length, steps):
        yield slice(start, min(start + steps, length)), chunks


def _channels_last(x: Tensor, groups: int) -> Tensor:
    """Turn (..., D, N) into (..., G, N, D / G)."""
    return x.unflatten(-2, (groups, -1)).transpose(-1, -2).contiguous()


def _channel_rows(x: Tensor, groups: int, chunks: int) -> Tensor:
    """Turn (B, D, L) into (steps, chunks, B, G, 1, D / G)."""
    return _in_chunks(x.unflatten(1, (groups, -1)), chunks).unsqueeze(-2)


def _state_columns(x: Tensor, chunks: int) -> Tensor:
    """Turn (B, G, N, L) into (steps, chunks, B, G, N, 1)."""
    return _in_chunks(x, chunks).unsqueeze(-1)


def _in_chunks(x: Tensor, chunks: int) -> Tensor:
    steps = -(-x.shape[-1] // chunks)
    x = F.pad(x, (0, chunks * steps - x.shape[-1]))  # with steps of size 0, which change no state
    return x.unflatten(-1, (chunks, steps)).permute(4, 3, 0, 1, 2).contiguous()


def _in_a_row(x: Tensor, part: slice) -> Tensor:
    """Undo ``_in_chunks``."""
    return x.permute(2, 3, 4, 1, 0).flatten(-2)[..., : part.stop - part.start]


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x
