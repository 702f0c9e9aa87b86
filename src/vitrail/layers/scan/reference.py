"""The scans as the papers define them, one step at a time: slow, and what everything else is measured against."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y (B, D, L) and the last state (B, D, N) of the selective scan (Gu and Dao, 2023, algorithm 2).

    h_l = exp(delta_l A) h_(l-1) + delta_l B_l u_l and y_l = C_l h_l; for a complex A, 2 Re(C_l h_l).

    Args:
        u, delta: (B, D, L), real.
        A: (D, N), real or complex.
        B, C: (B, G, N, L); channel d is of group d // (D / G).
        state: h before the first step, (B, D, N).
    """
    channels, groups = u.shape[1], B.shape[1]
    B, C = (x.repeat_interleave(channels // groups, dim=1) for x in (B, C))  # (B, D, N, L)
    outputs = []
    # Unbound, as the gradient of an index is as large as what is indexed.
    for now, value, enter, leave in zip(
        *(x.unbind(-1) for x in (delta.unsqueeze(2), u.unsqueeze(2), B, C)), strict=True
    ):
        state = (now * A).exp() * state + now * enter * value
        y = (state * leave).sum(-1)
        outputs.append(2 * y.real if y.is_complex() else y)
    return torch.stack(outputs, 2), state


def plane_scan_reference(
    u: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
) -> Tensor:
    """Return y (B, H, W, D) of the selective scan of a plane (Baty et al., 2024), place by place.

    A state is the mean of two updates, h = exp(delta A) h' + delta B u: of the state above it and of that to its left.
    Where there is but one of these, it is that update alone; the first state is delta_left B_left u.

    Args:
        u, delta_top, delta_left: (B, H, W, D), real.
        A_top, A_left: (D, N), real.
        B_top, B_left, C: (B, H, W, N).
    """
    states: dict[tuple[int, int], Tensor] = {}
    rows = []
    for i in range(u.shape[1]):
        row = []
        for j in range(u.shape[2]):
            updates = []
            if i:
                now, enter = delta_top[:, i, j, :, None], B_top[:, i, j, None]  # (B, D, 1), (B, 1, N)
                updates.append((now * A_top).exp() * states[i - 1, j] + now * enter * u[:, i, j, :, None])
            if j or not i:
                now, enter = delta_left[:, i, j, :, None], B_left[:, i, j, None]
                entering = now * enter * u[:, i, j, :, None]
                updates.append((now * A_left).exp() * states[i, j - 1] + entering if j else entering)
            states[i, j] = sum(updates[1:], updates[0]) / len(updates)
            row.append((states[i, j] * C[:, i, j, None]).sum(-1))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)
