"""The locally bidirectional scan: a selective scan that inside short windows also looks ahead.

Zhang et al., "LBMamba: Locally Bi-directional Mamba" (TMLR 2025), arXiv 2506.15976, and the derivation beside the
authors' kernels (cvlab-stonybrook/LBMamba). A second scan of the whole sequence from its other end costs as much as the
first; one that ends with each window costs little, as the decays are at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import InputError, unknown
from vitrail.layers.scan.local_compiled import MOST_WINDOW, local_scan_compiled
from vitrail.layers.scan.selective import scan_form, selective_scan

LocalForm = Callable[..., tuple[Tensor, Tensor]]


def local_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    state: Tensor | None = None,
    window: int | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the locally bidirectional scan of ``u`` and the last state.

    With delta' = softplus(delta + delta_bias), from the first place hL_l = exp(delta'_l A) hL_(l-1) + delta'_l B_l u_l,
    and from the last place of each window, where it begins at zero, hR_l = exp(delta'_l A) hR_(l+1) + delta'_l B_l u_l;
    h_l = hL_l + hR_l - delta'_l B_l u_l, so that a place counts once, and y_l = (C_l h_l + D u_l) silu(z_l).

    Args:
        u, delta, A, B, C, D, z, delta_bias, softplus, state: as for ``selective_scan``.
        window: places of a window, counted from the first; None is as published, of which ``published_window`` tells.
        form: a name of ``LOCAL_FORMS``; by default the fastest that can be had.

    Returns:
        y (B, D, L) in the dtype of ``u``, and hL after the last step (B, D, N).

    Raises:
        InputError: shapes that do not go together, a window below 1, or a form that there is not or that cannot have
            these inputs.
        MissingExtra: ``form = "compiled"`` without numba.
    """
    window = published_window(u.shape[-1]) if window is None else window
    if window < 1:
        raise InputError(f"local_scan: window = {window} is not allowed: give 1 place, which is no window, or more")
    B, C = (x.unsqueeze(1) if x.ndim == 3 else x for x in (B, C))
    name = form
    if name is None:
        compiled = window <= MOST_WINDOW and scan_form(u, A, state) == "compiled"
        name = "compiled" if compiled else "portable"
    if name not in LOCAL_FORMS:
        raise unknown("form of the scan", name, LOCAL_FORMS, f"there are {', '.join(LOCAL_FORMS)}")
    if name == "compiled" and window > MOST_WINDOW:
        raise InputError(f"local_scan: form = compiled takes windows of {MOST_WINDOW} at most: leave out form")

    run = partial(LOCAL_FORMS[name], window=window)
    return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, softplus=softplus, state=state, form=run)


def published_window(length: int) -> int:
    """Return the window of the published kernels: the places that one of their threads holds."""
    return 4 if length <= 128 else 8 if length <= 256 else 16


def local_scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Return y and the last state place by place, as ``local_scan`` defines them. Arguments as those of the forms."""
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))  # (B, D, N, L)
    length = u.shape[2]
    enter = [(delta[:, :, place] * u[:, :, place])[..., None] * B[..., place] for place in range(length)]
    kept = [(delta[:, :, place, None] * A).exp() for place in range(length)]
    there = []
    for place in range(length):
        state = kept[place] * state + enter[place]
        there.append(state)
    back: dict[int, Tensor] = {}
    for place in reversed(range(length)):
        last = place == length - 1 or (place + 1) % window == 0
        back[place] = enter[place] if last else kept[place] * back[place + 1] + enter[place]
    y = [((there[place] + back[place] - enter[place]) * C[..., place]).sum(-1) for place in range(length)]
    found = torch.stack(y, 2)
    return 2 * found.real if A.is_complex() else found, state


def local_scan_portable(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Return the same by selective scans: one as ever, and one of all windows side by side, from their ends."""
    y, last = selective_scan(u, delta, A, B, C, state=state)
    if window == 1:
        return y, last
    batch, channels, length = u.shape
    count = -(-length // window)
    # Places of step size 0 behind the last one bring nothing in.
    u_, delta_, B_, C_ = (F.pad(x, (0, count * window - length)) for x in (u, delta, B, C))
    u_, delta_ = (x.unflatten(2, (count, window)).flip(3).transpose(1, 2).flatten(0, 1) for x in (u_, delta_))
    B_, C_ = (x.unflatten(3, (count, window)).flip(4).movedim(3, 1).flatten(0, 1) for x in (B_, C_))
    back, _ = selective_scan(u_, delta_, A, B_, C_)
    back = back.unflatten(0, (batch, count)).transpose(1, 2).flip(3).flatten(2)[..., :length]
    # What a place brings in itself is in both scans.
    both = (B * C).sum(2)  # (B, G, L)
    both = 2 * both.real if A.is_complex() else both
    return y + back - both.repeat_interleave(channels // B.shape[1], 1) * delta * u, last


LOCAL_FORMS: dict[str, LocalForm] = {
    "compiled": local_scan_compiled,
    "portable": local_scan_portable,
    "reference": local_scan_reference,
}
"""Forms of one scan, which agree: ``compiled``, machine code for CPUs, for a real A in float32, both scans in one pass;
``portable``, two calls of ``selective_scan``, for what that takes; ``reference``, a slow loop."""
