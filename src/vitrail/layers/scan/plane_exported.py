"""The selective scan of a plane in an ONNX file: one operator, ``Scan``, whose steps are antidiagonals."""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_steps(planes: list[Tensor], rates: list[Tensor], state: Tensor) -> Tensor:
    """Go along all antidiagonals through the operator that becomes ONNX's ``Scan``; y is (B, H, K, D).

    Args:
        planes: u, C, and of either side delta, B and its share, each (B, H, K, D or N or 1) for K antidiagonals.
        rates: A of either side, (D, N).
        state: before the first antidiagonal, (B, H, D, N).
    """
    u, C, delta_above, B_above, share_above, delta_beside, B_beside, share_beside = (
        x.permute(2, 0, 1, 3).unsqueeze(-2) for x in planes
    )  # (K, B, H, 1, D or N or 1): channels last, as a runtime works along the last axis
    above, beside = (A.t().contiguous() for A in rates)
    sides = []
    for delta, B, share in ((delta_above, B_above, share_above), (delta_beside, B_beside, share_beside)):
        sides += [delta, share * delta * u, B.transpose(-1, -2), share]
    y: Tensor = _plane_steps(*sides, C, above, beside, state.transpose(2, 3))
    return y.squeeze(-2).permute(1, 2, 0, 3)


@torch.library.custom_op("vitrail::plane_steps", mutates_args=())
def _plane_steps(
    now_above: Tensor,
    x_above: Tensor,
    enter_above: Tensor,
    share_above: Tensor,
    now_beside: Tensor,
    x_beside: Tensor,
    enter_beside: Tensor,
    share_beside: Tensor,
    leave: Tensor,
    A_above: Tensor,
    A_beside: Tensor,
    state: Tensor,
) -> Tensor:
    """Return y (K, B, H, 1, D); the state is (B, H, N, D)."""
    outputs = []
    for k in range(len(now_above)):
        above = torch.nn.functional.pad(state, (0, 0, 0, 0, 1, -1))
        kept = share_above[k] * (now_above[k] * A_above).exp() * above
        kept = kept + share_beside[k] * (now_beside[k] * A_beside).exp() * state
        state = kept + x_above[k] * enter_above[k] + x_beside[k] * enter_beside[k]
        outputs.append(leave[k] @ state)
    return torch.stack(outputs)


@_plane_steps.register_fake
def _(now_above: Tensor, *rest: Tensor) -> Tensor:
    return now_above.new_empty(now_above.shape)
