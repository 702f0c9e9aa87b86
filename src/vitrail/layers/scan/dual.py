"""The scan of Mamba-2, whose decay is one number per head: as products of matrices, and one step at a time.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality"
(2024), https://arxiv.org/abs/2405.21060. Within a chunk the scan is attention under a mask of decays; between chunks
only states pass (section 6).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import InputError


def dual_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return the scan of Mamba-2 and its last state.

    For each head, whose state h is (P, N): h_l = exp(delta_l A) h_(l-1) + delta_l x_l B_l^T and y_l = h_l C_l + D x_l.
    States and decays are float32, or float64 if ``A`` is.

    Args:
        x: (B, L, H, P), H heads of P channels, of any floating dtype.
        delta: step sizes, (B, L, H), zero or above.
        A: (H,), below zero in all published networks.
        B, C: (B, L, G, N); head h is of group h // (H / G).
        D: (H,), or None for none.
        state: before the first step, (B, H, P, N); zero by default.
        chunk: steps that one product of matrices covers.

    Returns:
        y (B, L, H, P) in the dtype of ``x``, and the state after the last step (B, H, P, N).

    Raises:
        InputError: shapes that do not go together, or a chunk below 1.
    """
    _check(x, delta, A, B, C, state)
    if chunk < 1:
        raise InputError(f"dual_scan: chunk = {chunk} is not allowed: give 1 or more")
    kind = torch.promote_types(A.dtype, torch.float32)
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunks = -(-length // chunk)
    pad = chunks * chunk - length  # steps of size 0, which change nothing
    entering = F.pad(x.to(kind) * delta.to(kind).unsqueeze(-1), (0, 0, 0, 0, 0, pad))
    logs = F.pad(delta.to(kind) * A.to(kind), (0, 0, 0, pad))
    B, C = (F.pad(value.to(kind), (0, 0, 0, 0, 0, pad)) for value in (B, C))
    # b batch, c chunk, l and s steps, g group, r heads of a group, p channels, n states
    entering = entering.view(batch, chunks, chunk, groups, heads // groups, width)
    B, C = (value.view(batch, chunks, chunk, groups, size) for value in (B, C))
    sums = logs.view(batch, chunks, chunk, groups, heads // groups).cumsum(2)

    # The mask is exp of differences of sums, none above zero where it holds: never a quotient of small numbers.
    differences = sums.unsqueeze(3) - sums.unsqueeze(2)  # (b, c, l, s, g, r)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()[..., None, None]
    mask = differences.masked_fill(~later, -torch.inf).exp()
    scores = torch.einsum("bclgn,bcsgn->bclsg", C, B).unsqueeze(-1) * mask
    y = torch.einsum("bclsgr,bcsgrp->bclgrp", scores, entering)

    left = (sums[:, :, -1:] - sums).exp()  # of a step, at the end of its chunk
    made = torch.einsum("bcsgn,bcsgrp->bcgrpn", B, entering * left.unsqueeze(-1))
    if state is None:
        state = x.new_zeros(batch, heads, width, size, dtype=kind)
    now = state.to(kind).view(batch, groups, heads // groups, width, size)
    before = []
    for index in range(chunks):
        before.append(now)
        now = now * sums[:, index, -1].exp()[..., None, None] + made[:, index]
    y = y + torch.einsum("bclgn,bcgrpn,bclgr->bclgrp", C, torch.stack(before, 1), sums.exp())
    y = y.reshape(batch, chunks * chunk, heads, width)[:, :length]
    if D is not None:
        y = y + x.to(kind) * D.to(kind).unsqueeze(-1)
    return y.to(x.dtype), now.reshape(batch, heads, width, size)


def dual_step(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y (B, H, P) and the next state of one step of ``dual_scan``: for a stream, in constant memory.

    Args:
        x: (B, H, P).
        delta: (B, H).
        A: (H,).
        B, C: (B, G, N).
        D: (H,), or None for none.
        state: (B, H, P, N).

    Raises:
        InputError: shapes that do not go together.
    """
    _check(x.unsqueeze(1), delta.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1), state)
    kind = torch.promote_types(A.dtype, torch.float32)
    value, step = x.to(kind), delta.to(kind)
    B, C = (part.to(kind).repeat_interleave(x.shape[1] // part.shape[1], 1) for part in (B, C))  # (B, H, N)
    kept = (step * A.to(kind)).exp()[..., None, None]
    state = kept * state.to(kind) + (step.unsqueeze(-1) * value).unsqueeze(-1) * B.unsqueeze(2)
    y = (state * C.unsqueeze(2)).sum(-1)
    if D is not None:
        y = y + value * D.to(kind).unsqueeze(-1)
    return y.to(x.dtype), state


def _check(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> None:
    if x.ndim != 4 or x.shape[1] == 0 or delta.shape != x.shape[:3]:
        raise InputError(
            f"dual_scan: x {tuple(x.shape)} must be (B, L, H, P), L at least 1, and delta {tuple(delta.shape)} "
            "(B, L, H)"
        )
    batch, length, heads, width = x.shape
    if A.shape != (heads,):
        raise InputError(f"dual_scan: A {tuple(A.shape)} must be (H,) with H = {heads} as in x")
    if B.ndim != 4 or B.shape != C.shape or B.shape[:2] != (batch, length) or heads % B.shape[2]:
        raise InputError(
            f"dual_scan: B {tuple(B.shape)} and C {tuple(C.shape)} must be ({batch}, {length}, G, N), where the "
            f"number of groups G divides {heads}"
        )
    if state is not None and state.shape != (batch, heads, width, B.shape[3]):
        raise InputError(f"dual_scan: state {tuple(state.shape)} must be {(batch, heads, width, B.shape[3])}")
