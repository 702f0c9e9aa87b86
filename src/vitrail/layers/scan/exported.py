"""The selective scan in an ONNX file: one operator, ``Scan``, however long the sequence.

What ``torch.onnx.export`` finds in a model it must know how to write; a context tells it, and the models meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_TO_ONNX = ContextVar("_TO_ONNX", default=False)


@contextmanager
def scans_as_operators() -> Iterator[dict[Callable[..., Any], Callable[..., Any]]]:
    """Within, an export meets a selective scan as one operator; yields how ONNX writes it.

    The value is for the argument ``custom_translation_table`` of ``torch.onnx.export``. An export outside of this
    context holds torch's operators alone, a number that grows with the root of the length, and any runtime reads it.
    """
    before = _TO_ONNX.set(True)
    try:
        yield _translations()
    finally:
        _TO_ONNX.reset(before)


def writing_operators() -> bool:
    """Return whether ``scans_as_operators`` is entered."""
    return _TO_ONNX.get()


def selective_scan_onnx(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as ``selective_scan_reference``, through the operator that becomes ONNX's ``Scan``.

    The operator is given all in the order in which a step reads it, with channels last: ONNX Runtime then takes half
    the time, or less, that it takes with states last, as it works along the last axis, and states are few. A step
    computes its decays itself: to have them all beforehand saves next to no time and takes N times the memory of the
    inputs. Nor do chunks side by side, as in the portable form: they save steps and cost passes over all states.
    """
    groups = B.shape[1]
    width, size = A.shape[0] // groups, A.shape[1]

    def ordered(value: Tensor) -> Tensor:  # (B, D, L) to (L, B, G, 1, D / G)
        return value.unflatten(1, (groups, 1, width)).permute(4, 0, 1, 2, 3)

    # ONNX has no complex numbers, and its exporter few operators on them: their parts are ordered.
    parts = _real_and_imaginary if A.is_complex() else _real
    given = [
        *(value.view(groups, width, size).transpose(1, 2) for value in parts(A)),  # (G, N, D / G)
        *(value.permute(3, 0, 1, 2).unsqueeze(-1) for value in parts(B)),  # (L, B, G, N, 1)
        *(value.permute(3, 0, 1, 2).unsqueeze(-2) for value in parts(C)),  # (L, B, G, 1, N)
        *(value.unflatten(1, (groups, width)).transpose(2, 3) for value in parts(state)),  # (B, G, N, D / G)
    ]
    operator = _complex_steps if A.is_complex() else _steps
    y, *last = operator(ordered(delta), ordered(delta * u), *given)
    last = [value.transpose(2, 3).flatten(1, 2) for value in last]
    return y.squeeze(3).permute(1, 2, 3, 0).flatten(1, 2), torch.complex(*last) if A.is_complex() else last[0]


def _real(value: Tensor) -> tuple[Tensor, ...]:
    return (value,)


def _real_and_imaginary(value: Tensor) -> tuple[Tensor, ...]:
    return (value.real, value.imag) if value.is_complex() else (value, torch.zeros_like(value))


# ---- what torch sees: the operators, which run as well as can be exported


@torch.library.custom_op("vitrail::scan_steps", mutates_args=())
def _steps(now: Tensor, value: Tensor, A: Tensor, enter: Tensor, leave: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return y (L, B, G, 1, D / G) and the last state (B, G, N, D / G)."""
    outputs = []
    for step in range(len(now)):
        state = (now[step] * A).exp() * state + value[step] * enter[step]
        outputs.append(leave[step] @ state)
    return torch.stack(outputs), state


@_steps.register_fake
def _(now: Tensor, value: Tensor, A: Tensor, enter: Tensor, leave: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return now.new_empty(now.shape), state.new_empty(state.shape)


@torch.library.custom_op("vitrail::complex_scan_steps", mutates_args=())
def _complex_steps(
    now: Tensor,
    value: Tensor,
    A: Tensor,
    A_i: Tensor,
    enter: Tensor,
    enter_i: Tensor,
    leave: Tensor,
    leave_i: Tensor,
    state: Tensor,
    state_i: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the parts of the last state, of complex numbers in two parts each: ONNX has none."""
    A, enter, leave, state = (
        torch.complex(*parts) for parts in ((A, A_i), (enter, enter_i), (leave, leave_i), (state, state_i))
    )
    outputs = []
    for step in range(len(now)):
        state = (now[step] * A).exp() * state + value[step] * enter[step]
        outputs.append(2 * (leave[step] @ state).real)
    return torch.stack(outputs), state.real.clone(), state.imag.clone()


@_complex_steps.register_fake
def _(now: Tensor, value: Tensor, A: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    state = rest[-1]
    return now.new_empty(now.shape), state.new_empty(state.shape), state.new_empty(state.shape)


# ---- what ONNX sees


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    # Read when an export begins: onnxscript takes a second to import.
    from vitrail.layers.scan import plane_exported  # noqa: F401 - it makes its operator known to torch
    from vitrail.layers.scan.onnx_steps import complex_steps, plane_steps, steps

    return {
        torch.ops.vitrail.scan_steps.default: steps,
        torch.ops.vitrail.complex_scan_steps.default: complex_steps,
        torch.ops.vitrail.plane_steps.default: plane_steps,
    }
