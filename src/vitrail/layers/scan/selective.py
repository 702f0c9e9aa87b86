"""The selective scan of Mamba (S6): one operator, several forms.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), https://arxiv.org/abs/2312.00752.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import InputError, unknown
from vitrail.layers.scan.compiled import selective_scan_compiled
from vitrail.layers.scan.exported import selective_scan_onnx, writing_operators
from vitrail.layers.scan.mamba_ssm import MOST_STATES, selective_scan_mamba_ssm
from vitrail.layers.scan.portable import selective_scan_portable
from vitrail.layers.scan.reference import selective_scan_reference
from vitrail.layers.scan.triton import selective_scan_triton

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

SCAN_FORMS: dict[str, Form] = {
    "compiled": selective_scan_compiled,
    "portable": selective_scan_portable,
    "reference": selective_scan_reference,
    "onnx": selective_scan_onnx,
    "triton": selective_scan_triton,
    "mamba_ssm": selective_scan_mamba_ssm,
}
"""Forms of one scan. All agree with the reference in float32, values and gradients, to 5e-5 of the largest in each.

``compiled``: machine code for CPUs, by numba (the extra ``fast``), for a real A in float32. ``portable``: torch
operators alone. ``reference``: a slow loop. ``onnx``: what becomes one operator of an ONNX file; it has no gradient.
``triton``: for GPUs, a real A in float32. ``mamba_ssm``: the CUDA kernels of that package, a real A in float32, no
first state, and no gradient of the last; its authors' tests say how exact it is. Over many thousand steps roundings add
up: 2e-4 of the largest over 16,384.
"""


def selective_scan(
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
    form: str | Form | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the selective scan of ``u`` and the last state.

    With delta' = softplus(delta + delta_bias): h_l = exp(delta'_l A) h_(l-1) + delta'_l B_l u_l, and
    y_l = (C_l h_l + D u_l) silu(z_l); for a complex A, 2 Re(C_l h_l) in the place of C_l h_l. States are float32, or
    float64 if ``A`` is.

    Args:
        u: (B, D, L), of any floating dtype.
        delta: step sizes, (B, D, L).
        A: (D, N), real or complex; its real part is below zero in all published networks.
        B, C: (B, N, L), or (B, G, N, L) for G groups of channels; G divides D.
        D: (D,), or None for none.
        z: gate, (B, D, L), or None for none.
        delta_bias: (D,), or None for none.
        softplus: whether delta goes through softplus, after the bias.
        state: before the first step, (B, D, N); zero by default.
        form: a name of ``SCAN_FORMS``, or a function such as these; by default the fastest that can be had, which
            ``scan_form`` names.

    Returns:
        y (B, D, L) in the dtype of ``u``, and the state after the last step (B, D, N).

    Raises:
        InputError: shapes that do not go together; a form that there is not, or that cannot have these inputs.
        MissingExtra: ``form`` names one whose package is not installed.
    """
    B, C = (x.unsqueeze(1) if x.ndim == 3 else x for x in (B, C))
    _check(u, delta, A, B, C, state)
    kind = torch.float64 if A.dtype in (torch.float64, torch.complex128) else torch.float32
    name = scan_form(u, A, state) if form is None else form
    if not callable(name) and name not in SCAN_FORMS:
        raise unknown("form of the scan", name, SCAN_FORMS, f"there are {', '.join(SCAN_FORMS)}")
    if name == "mamba_ssm" and state is not None:
        raise InputError("selective_scan: form = mamba_ssm begins at a state of zero: leave out state, or form")
    inner = A.dtype if A.is_complex() else kind
    if state is None:
        state = torch.zeros(u.shape[0], *A.shape, dtype=kind, device=u.device)
        state = torch.complex(state, state) if A.is_complex() else state  # ONNX has no zero of a complex type
    B, C = (value if value.is_complex() else value.to(kind) for value in (B, C))
    D, delta_bias = (None if value is None else value.to(kind) for value in (D, delta_bias))
    given = (u.to(kind), delta.to(kind), A.to(inner), B, C, state.to(inner), D, delta_bias, softplus)
    if name == "compiled":  # which does all of it in one pass
        y, last = selective_scan_compiled(*given)
    else:
        y, last = _around(name if callable(name) else SCAN_FORMS[name], *given)
    if z is not None:
        y = y * F.silu(z.to(kind))
    return y.to(u.dtype), last


def _around(
    form: Form,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return the scan by ``form``, which takes step sizes as they are and leaves out D u."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if softplus:
        delta = F.softplus(delta)
    y, last = form(u, delta, A, B, C, state)
    return y if D is None else torch.addcmul(y, u, D[:, None]), last


def selective_step(
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
) -> tuple[Tensor, Tensor]:
    """Return y (B, D) and the next state (B, D, N) of one step of ``selective_scan``: a stream in constant memory.

    Args:
        u, delta, z: (B, D).
        A: (D, N), real or complex.
        B, C: (B, N), or (B, G, N) for G groups of channels.
        D, delta_bias, softplus, state: as for ``selective_scan``.

    Raises:
        InputError: shapes that do not go together.
    """
    if u.ndim != 2 or delta.shape != u.shape:
        raise InputError(f"selective_step: u {tuple(u.shape)} and delta {tuple(delta.shape)} must be (B, D), one step")
    u, delta, B, C = (value.unsqueeze(-1) for value in (u, delta, B, C))
    z = None if z is None else z.unsqueeze(-1)
    y, last = selective_scan(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias, softplus=softplus, state=state, form="reference"
    )
    return y.squeeze(-1), last


def scan_form(u: Tensor, A: Tensor, state: Tensor | None = None) -> str:
    """Return the name of the form that ``selective_scan`` takes for such inputs on this machine.

    While a model is exported it is ``onnx`` within ``scans_as_operators`` and else ``portable``: a file for another
    runtime cannot hold our machine code.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return "onnx" if writing_operators() else "portable"
    if A.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "portable"
    if u.device.type == "cuda" and state is None and A.shape[1] <= MOST_STATES and _has_mamba_ssm():
        return "mamba_ssm"
    if u.device.type == "cuda" and _has_triton():
        return "triton"
    return "compiled" if u.device.type == "cpu" and _has_numba() else "portable"


# torch.compile takes these answers as they are, and does not look inside.
@torch.compiler.assume_constant_result
def _has_numba() -> bool:
    return _installed("numba")


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return _installed("triton")


@torch.compiler.assume_constant_result
def _has_mamba_ssm() -> bool:
    return _installed("mamba_ssm")


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> None:
    if u.ndim != 3 or delta.shape != u.shape or u.shape[2] == 0:
        raise InputError(
            f"selective_scan: u {tuple(u.shape)} and delta {tuple(delta.shape)} must be (B, D, L), L at least 1"
        )
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise InputError(f"selective_scan: A {tuple(A.shape)} must be (D, N) with D = {channels} as in u")
    for name, value in (("B", B), ("C", C)):
        fits = value.ndim == 4 and (value.shape[0], *value.shape[2:]) == (batch, A.shape[1], length)
        if not fits or channels % value.shape[1] or value.shape != B.shape:
            raise InputError(
                f"selective_scan: {name} {tuple(value.shape)} must be ({batch}, G, {A.shape[1]}, {length}), where the "
                f"number of groups G divides {channels} and is the same for B and C"
            )
    if state is not None and state.shape != (batch, *A.shape):
        raise InputError(f"selective_scan: state {tuple(state.shape)} must be {(batch, *A.shape)}")
