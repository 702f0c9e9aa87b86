"""Machine code of the selective scan. Importing this needs numba; ``compiled`` is how to use it.

All arrays are contiguous float32: u, delta, y (B, D, L), A (D, N), B, C (B, G, L, N), states (B, D, N), those before
each chunk of ``chunk_steps`` steps (B, D, chunks, N). A call does the channels ``first`` to ``last`` of one image, all
of one group.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic as untyped_intrinsic

LANES = 16
"""Channels side by side in vectors."""
FLAGS: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy", "boundscheck": False}
intrinsic: Any = untyped_intrinsic  # typed as if it were called with its context
LOG2_E = np.float32(np.log2(np.e))


@intrinsic
def _float_of_bits(context: Any, bits: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _stack(context: Any, count: Any) -> Any:
    """Return room for ``count`` floats on the stack: the compiler sees that it overlaps with nothing else."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        room = builder.alloca(ir.FloatType(), arguments[0])
        room.align = 64
        return room

    return types.CPointer(types.float32)(types.intp), generate


# 2^f for f from -1/2 to 1/2 as a polynomial of degree 6, to 1e-8: its values at Chebyshev's points, fitted exactly.
_POINTS = np.cos(np.pi * (np.arange(7) + 0.5) / 7) / 2
_SERIES = np.polynomial.polynomial.polyfit(_POINTS, 2.0**_POINTS, 6)
C0, C1, C2, C3, C4, C5, C6 = (np.float32(value) for value in _SERIES)
LOW, HIGH, ROUNDING, BIAS = np.float32(-126), np.float32(126), np.float32(127.5), np.int32(127)


@numba.njit(inline="always", **FLAGS)
def _exp2(x: Any) -> Any:
    """Return 2^x, without a branch or a call, so that a loop of it becomes vector code."""
    x = min(max(x, LOW), HIGH)
    whole = np.int32(x + ROUNDING)  # x + 127, rounded: the exponent's bits
    f = x - np.float32(np.int32(whole - BIAS))  # integers, as the compiler may reorder floats and lose bits
    series = C0 + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    return _float_of_bits(np.int32(whole << np.int32(23))) * series


@numba.njit(cache=True, **FLAGS)
def forward(b, first, last, part, u, delta, A, B, C, state, y, before, chunk_steps):  # type: ignore[no-untyped-def]
    """Write y, the states before each chunk, and the last state into that before the first step."""
    length, size = u.shape[2], A.shape[1]
    g = first // (u.shape[1] // B.shape[1])
    now = numba.carray(_stack(chunk_steps * LANES), (chunk_steps, LANES))
    x = numba.carray(_stack(chunk_steps * LANES), (chunk_steps, LANES))
    total = numba.carray(_stack(chunk_steps * LANES), (chunk_steps, LANES))
    rate = numba.carray(_stack(size * LANES), (size, LANES))
    h = numba.carray(_stack(size * LANES), (size, LANES))
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        rate[:], h[:], now[:], x[:] = 0, 0, 0, 0
        for k in range(width):
            for n in range(size):
                rate[n, k] = A[d + k, n] * LOG2_E
                h[n, k] = state[b, d + k, n]
        for chunk in range(before.shape[2]):
            start = chunk * chunk_steps
            steps = min(chunk_steps, length - start)
            for k in range(width):
                for n in range(size):
                    before[b, d + k, chunk, n] = h[n, k]
                for t in range(steps):
                    now[t, k] = delta[b, d + k, start + t]
                    x[t, k] = delta[b, d + k, start + t] * u[b, d + k, start + t]
            for t in range(steps):
                for k in range(LANES):
                    total[t, k] = 0
                for n in range(size):
                    enter, leave = B[b, g, start + t, n], C[b, g, start + t, n]
                    for k in range(LANES):
                        value = _exp2(now[t, k] * rate[n, k]) * h[n, k] + x[t, k] * enter
                        h[n, k] = value
                        total[t, k] += value * leave
            for k in range(width):
                for t in range(steps):
                    y[b, d + k, start + t] = total[t, k]
        for k in range(width):
            for n in range(size):
                state[b, d + k, n] = h[n, k]


@numba.njit(cache=True, **FLAGS)
def backward(  # type: ignore[no-untyped-def]
    b, first, last, part, dy, u, delta, A, B, C, before, du, ddelta, dA, dB, dC, dstate, chunk_steps
):
    """Write or add up all gradients; that of the last state becomes that of the first."""
    length, size = u.shape[2], A.shape[1]
    g = first // (u.shape[1] // B.shape[1])
    now = numba.carray(_stack(chunk_steps * LANES), (chunk_steps, LANES))
    x = numba.carray(_stack(chunk_steps * LANES), (chunk_steps, LANES))
    slope = numba.carray(_stack(chunk_steps * LANES), (chunk_steps, LANES))
    dx = numba.carray(_stack(chunk_steps * LANES), (chunk_steps, LANES))
    dnow = numba.carray(_stack(chunk_steps * LANES), (chunk_steps, LANES))
    rate = numba.carray(_stack(size * LANES), (size, LANES))
    drate = numba.carray(_stack(size * LANES), (size, LANES))
    dh = numba.carray(_stack(size * LANES), (size, LANES))
    kept = numba.carray(_stack(chunk_steps * size * LANES), (chunk_steps, size, LANES))
    states = numba.carray(_stack((chunk_steps + 1) * size * LANES), (chunk_steps + 1, size, LANES))
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        rate[:], drate[:], dh[:], now[:], x[:], slope[:], states[:] = 0, 0, 0, 0, 0, 0, 0
        for k in range(width):
            for n in range(size):
                rate[n, k] = A[d + k, n] * LOG2_E
                dh[n, k] = dstate[b, d + k, n]
        for chunk in range(before.shape[2] - 1, -1, -1):
            start = chunk * chunk_steps
            steps = min(chunk_steps, length - start)
            for k in range(width):
                for n in range(size):
                    states[0, n, k] = before[b, d + k, chunk, n]
                for t in range(steps):
                    now[t, k] = delta[b, d + k, start + t]
                    x[t, k] = delta[b, d + k, start + t] * u[b, d + k, start + t]
                    slope[t, k] = dy[b, d + k, start + t]
            for t in range(steps):
                for n in range(size):
                    enter = B[b, g, start + t, n]
                    for k in range(LANES):
                        a = _exp2(now[t, k] * rate[n, k])
                        kept[t, n, k] = a
                        states[t + 1, n, k] = a * states[t, n, k] + x[t, k] * enter
            for t in range(steps - 1, -1, -1):
                for k in range(LANES):
                    dx[t, k] = 0
                    dnow[t, k] = 0
                for n in range(size):
                    enter, leave = B[b, g, start + t, n], C[b, g, start + t, n]
                    denter, dleave = np.float32(0), np.float32(0)
                    for k in range(LANES):
                        grad = dh[n, k] + leave * slope[t, k]
                        dleave += states[t + 1, n, k] * slope[t, k]
                        denter += grad * x[t, k]
                        dx[t, k] += grad * enter
                        grad *= kept[t, n, k]
                        through = grad * states[t, n, k]
                        dnow[t, k] += through * rate[n, k]
                        drate[n, k] += through * now[t, k]
                        dh[n, k] = grad
                    dB[part, b, g, start + t, n] += denter
                    dC[part, b, g, start + t, n] += dleave
            for k in range(width):
                for t in range(steps):
                    step, value = delta[b, d + k, start + t], u[b, d + k, start + t]
                    du[b, d + k, start + t] = dx[t, k] * step
                    ddelta[b, d + k, start + t] = dx[t, k] * value + dnow[t, k] / LOG2_E
        for k in range(width):
            for n in range(size):
                dstate[b, d + k, n] = dh[n, k]
                dA[b, d + k, n] = drate[n, k]
