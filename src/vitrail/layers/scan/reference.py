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
