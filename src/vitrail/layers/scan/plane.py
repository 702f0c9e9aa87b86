"""The selective scan of a plane: a state depends on the state above it and on that to its left.

Baty et al., "Mamba2D: A Natively Multi-Dimensional State-Space Model for Vision Tasks" (2024), arXiv 2412.16146.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitrail.errors import InputError, unknown
from vitrail.layers.scan.exported import writing_operators
from vitrail.layers.scan.plane_compiled import plane_scan_compiled
from vitrail.layers.scan.plane_exported import diagonal_steps
from vitrail.layers.scan.reference import plane_scan_reference
from vitrail.layers.scan.selective import _has_numba

DIAGONALS = 16
"""Antidiagonals whose states the portable form has in memory at a time; a backward pass computes them again."""


def plane_scan(
    u: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    form: str | None = None,
) -> Tensor:
    """Return the selective scan of a plane, which begins in its upper left corner.

    At row i and column j, y_ij = C_ij h_ij + D u_ij, where h_ij is the mean of the two updates
    exp(delta_top A_top) h_(i-1)j + delta_top B_top u and exp(delta_left A_left) h_i(j-1) + delta_left B_left u, all at
    ij. In the first row it is the second of them alone, in the rest of the first column the first alone; the state
    before the corner is zero. States are float32, or float64 if ``A_top`` is.

    Args:
        u: (B, H, W, D), of any floating dtype.
        delta_top, delta_left: step sizes down and to the right, (B, H, W, D), 0 or more.
        A_top, A_left: (D, N), real; below zero in the published networks.
        B_top, B_left, C: (B, H, W, N).
        D: (D,), or None for none.
        form: a name of ``PLANE_SCAN_FORMS``; by default the fastest that can be had, which ``plane_scan_form`` names.

    Returns:
        y (B, H, W, D) in the dtype of ``u``.

    Raises:
        InputError: shapes that do not go together, or no such form.
        MissingExtra: ``form = "compiled"`` without numba.
    """
    inputs = {"delta_top": delta_top, "delta_left": delta_left, "A_top": A_top, "A_left": A_left}
    inputs |= {"B_top": B_top, "B_left": B_left, "C": C}
    _check(u, inputs, D)
    name = plane_scan_form(u, A_top) if form is None else form
    if name not in PLANE_SCAN_FORMS:
        raise unknown("form of the scan", name, PLANE_SCAN_FORMS, f"there are {', '.join(PLANE_SCAN_FORMS)}")
    kind = torch.float64 if A_top.dtype == torch.float64 else torch.float32
    x = u.to(kind)
    y = PLANE_SCAN_FORMS[name](x, *(value.to(kind) for value in inputs.values()))
    if D is not None:
        y = torch.addcmul(y, x, D.to(kind))
    return y.to(u.dtype)


def plane_scan_form(u: Tensor, A: Tensor) -> str:
    """Return the name of the form that ``plane_scan`` takes for such inputs on this machine.

    While a model is exported it is ``portable``: a file for another runtime cannot hold our machine code. Within
    ``scans_as_operators`` its antidiagonals are then the steps of one operator of an ONNX file.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return "portable"
    return "compiled" if u.device.type == "cpu" and A.dtype != torch.float64 and _has_numba() else "portable"


# ---- along antidiagonals, in torch operators alone: any device, float32 or float64, bounded memory


def plane_scan_portable(
    u: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
) -> Tensor:
    """Return the same as ``plane_scan_reference``, in H + W - 1 steps.

    The places of an antidiagonal do not depend on each other, and all that they need is on the one before: they are
    done at once. Rows are moved so that antidiagonals stand upright, the i-th by i places.
    """
    height, width = u.shape[1:3]
    row, column = (torch.arange(side, device=u.device) for side in (height, width))
    # Of the update from above, (1, H, W, 1). Outside of the plane, which has corners when moved, there is neither.
    share = torch.where(column == 0, 1.0, 0.5).expand(height, width).where(row[:, None] > 0, 0.0)
    share = share.to(u.dtype)[None, :, :, None]
    above, beside = (delta_top, B_top, share), (delta_left, B_left, 1 - share)
    planes, rates = [u, C, *above, *beside], [A_top, A_left]
    turned = height > width
    if turned:  # as the corners grow with the number of rows
        planes, rates = [x.transpose(1, 2) for x in (u, C, *beside, *above)], [A_left, A_top]
    state = u.new_zeros(u.shape[0], min(height, width), u.shape[3], A_top.shape[1])
    columns = [_upright(x) for x in planes]
    if torch.onnx.is_in_onnx_export() and writing_operators():
        y = diagonal_steps(columns, rates, state)
    else:
        y = _in_segments(columns, rates, state)
    y = _back(y, max(height, width))
    return y.transpose(1, 2) if turned else y


def _in_segments(columns: list[Tensor], rates: list[Tensor], state: Tensor) -> Tensor:
    """Go along all antidiagonals, ``DIAGONALS`` at a time."""
    frugal = torch.is_grad_enabled() and columns[0].shape[2] > DIAGONALS
    outputs = []
    for part in zip(*(x.split(DIAGONALS, 2) for x in columns), strict=True):
        given = (*part, *rates, state)
        if frugal:
            y, state = checkpoint(_diagonals, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _diagonals(*given)
        outputs.append(y)
    return torch.cat(outputs, 2)


def _diagonals(
    u: Tensor,
    C: Tensor,
    delta_above: Tensor,
    B_above: Tensor,
    share_above: Tensor,
    delta_beside: Tensor,
    B_beside: Tensor,
    share_beside: Tensor,
    A_above: Tensor,
    A_beside: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Go along some antidiagonals, all (B, H, K, D or N), from the state (B, H, D, N) on the one before."""
    entering = (share_above * delta_above * u).unsqueeze(-1) * B_above.unsqueeze(-2)  # (B, H, K, D, N)
    entering = torch.addcmul(entering, (share_beside * delta_beside * u).unsqueeze(-1), B_beside.unsqueeze(-2))
    kept_above = share_above.unsqueeze(-1) * (delta_above.unsqueeze(-1) * A_above).exp()
    kept_beside = share_beside.unsqueeze(-1) * (delta_beside.unsqueeze(-1) * A_beside).exp()
    states = []
    for enter, keep_above, keep_beside in zip(*(x.unbind(2) for x in (entering, kept_above, kept_beside)), strict=True):
        above = F.pad(state, (0, 0, 0, 0, 1, -1))
        state = torch.addcmul(torch.addcmul(enter, keep_above, above), keep_beside, state)
        states.append(state)
    return (torch.stack(states, 2) * C.unsqueeze(-2)).sum(-1), state


def _upright(x: Tensor) -> Tensor:
    """Move row i of (B, H, W, X) by i places: column k of the result, (B, H, H + W - 1, X), is antidiagonal k."""
    height, width = x.shape[1:3]
    # A row of one place less than it takes begins one place further on.
    flat = F.pad(x, (0, 0, 0, height)).flatten(1, 2)[:, : height * (height + width - 1)]
    return flat.unflatten(1, (height, height + width - 1))


def _back(x: Tensor, width: int) -> Tensor:
    """Undo ``_upright``."""
    height, length = x.shape[1:3]
    return F.pad(x.flatten(1, 2), (0, 0, 0, height)).unflatten(1, (height, length + 1))[:, :, :width]


PLANE_SCAN_FORMS: dict[str, Callable[..., Tensor]] = {
    "compiled": plane_scan_compiled,
    "portable": plane_scan_portable,
    "reference": plane_scan_reference,
}
"""``compiled``: machine code for CPUs, by numba (the extra ``fast``); ``portable``: torch operators alone, an
antidiagonal at a time; ``reference``: a slow loop over places."""


def _check(u: Tensor, inputs: dict[str, Tensor], D: Tensor | None) -> None:
    if u.ndim != 4 or 0 in u.shape:
        raise InputError(f"plane_scan: u {tuple(u.shape)} must be (B, H, W, D), each at least 1")
    channels, rates = u.shape[3], inputs["A_top"]
    if rates.ndim != 2 or len(rates) != channels or rates.is_complex():
        raise InputError(f"plane_scan: A_top {tuple(rates.shape)} must be real, (D, N) with D = {channels} as in u")
    few = (*u.shape[:3], rates.shape[1])
    wanted = {"delta": tuple(u.shape), "A": tuple(rates.shape), "B": few, "C": few}
    for name, value in inputs.items():
        shape = wanted[name.partition("_")[0]]
        if tuple(value.shape) != shape:
            raise InputError(f"plane_scan: {name} {tuple(value.shape)} must be {shape} beside u and A_top")
    if D is not None and D.shape != (channels,):
        raise InputError(f"plane_scan: D {tuple(D.shape)} must be ({channels},), one for each channel of u")
