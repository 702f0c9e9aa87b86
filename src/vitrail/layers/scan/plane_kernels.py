"""Machine code of the selective scan of a plane. Importing this needs numba; ``plane_compiled`` is how to use it.

All arrays are contiguous float32: u, the step sizes and y (B, H, W, D), A (D, N), B and C (B, H, W, N); the states of
the row before each strip of ``strip`` rows (B, strips, W, N, D). A call does the channels ``first`` to ``last`` of one
image. Vectors go over channels: the two states that a place needs are then at hand, whatever the order of places.

Loops read into rooms on the stack, and write from there: the compiler sees that these overlap with nothing.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from vitrail.layers.scan.kernels import FLAGS, LANES, LOG2_E, _exp2, _stack

NONE, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


@numba.njit(inline="always", **FLAGS)
def _weight_of_top(i: Any, j: Any) -> Any:
    """Return the share of the update from above; the rest is of that from the left."""
    return NONE if i == 0 else (ONE if j == 0 else HALF)


@numba.njit(cache=True, **FLAGS)
def forward(  # type: ignore[no-untyped-def]
    b, first, last, u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, y, before, strip
):
    """Write y and the states of the row before each strip."""
    height, width, size = u.shape[1], u.shape[2], A_top.shape[1]
    rate_top = numba.carray(_stack(size * LANES), (size, LANES))
    rate_left = numba.carray(_stack(size * LANES), (size, LANES))
    left = numba.carray(_stack(size * LANES), (size, LANES))
    now_top = numba.carray(_stack(LANES), (LANES,))
    now_left = numba.carray(_stack(LANES), (LANES,))
    x_top = numba.carray(_stack(LANES), (LANES,))
    x_left = numba.carray(_stack(LANES), (LANES,))
    total = numba.carray(_stack(LANES), (LANES,))
    row = np.empty((width, size, LANES), np.float32)
    for d in range(first, last, LANES):
        lanes = min(LANES, last - d)
        rate_top[:], rate_left[:], row[:] = 0, 0, 0
        now_top[:], now_left[:], x_top[:], x_left[:] = 0, 0, 0, 0
        for k in range(lanes):
            for n in range(size):
                rate_top[n, k] = A_top[d + k, n] * LOG2_E
                rate_left[n, k] = A_left[d + k, n] * LOG2_E
        for i in range(height):
            if i % strip == 0:
                for j in range(width):
                    for n in range(size):
                        for k in range(lanes):
                            before[b, i // strip, j, n, d + k] = row[j, n, k]
            left[:] = 0
            for j in range(width):
                top_share = _weight_of_top(i, j)
                left_share = ONE - top_share
                for k in range(lanes):
                    now_top[k] = delta_top[b, i, j, d + k]
                    now_left[k] = delta_left[b, i, j, d + k]
                    x_top[k] = top_share * now_top[k] * u[b, i, j, d + k]
                    x_left[k] = left_share * now_left[k] * u[b, i, j, d + k]
                for k in range(LANES):
                    total[k] = 0
                for n in range(size):
                    enter_top, enter_left, leave = B_top[b, i, j, n], B_left[b, i, j, n], C[b, i, j, n]
                    for k in range(LANES):
                        value = top_share * _exp2(now_top[k] * rate_top[n, k]) * row[j, n, k] + x_top[k] * enter_top
                        value += left_share * _exp2(now_left[k] * rate_left[n, k]) * left[n, k] + x_left[k] * enter_left
                        left[n, k] = value
                        total[k] += value * leave
                    for k in range(LANES):
                        row[j, n, k] = left[n, k]
                for k in range(lanes):
                    y[b, i, j, d + k] = total[k]


@numba.njit(cache=True, **FLAGS)
def backward(  # type: ignore[no-untyped-def]
    b, first, last, part, dy, u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, before,
    du, ddelta_top, ddelta_left, dA_top, dA_left, dB_top, dB_left, dC, strip
):  # fmt: skip
    """Write or add up all gradients."""
    height, width, size = u.shape[1], u.shape[2], A_top.shape[1]
    rate_top = numba.carray(_stack(size * LANES), (size, LANES))
    rate_left = numba.carray(_stack(size * LANES), (size, LANES))
    drate_top = numba.carray(_stack(size * LANES), (size, LANES))
    drate_left = numba.carray(_stack(size * LANES), (size, LANES))
    left = numba.carray(_stack(size * LANES), (size, LANES))
    right = numba.carray(_stack(size * LANES), (size, LANES))  # the gradient that comes from the place to the right
    here = numba.carray(_stack(LANES), (LANES,))
    above = numba.carray(_stack(LANES), (LANES,))
    grad = numba.carray(_stack(LANES), (LANES,))
    x = numba.carray(_stack(LANES), (LANES,))
    now_top = numba.carray(_stack(LANES), (LANES,))
    now_left = numba.carray(_stack(LANES), (LANES,))
    slope = numba.carray(_stack(LANES), (LANES,))
    dx_top = numba.carray(_stack(LANES), (LANES,))
    dx_left = numba.carray(_stack(LANES), (LANES,))
    dnow_top = numba.carray(_stack(LANES), (LANES,))
    dnow_left = numba.carray(_stack(LANES), (LANES,))
    states = np.empty((strip + 1, width + 1, size, LANES), np.float32)  # from the row above, and the column to the left
    below = np.empty((width, size, LANES), np.float32)
    for d in range(first, last, LANES):
        lanes = min(LANES, last - d)
        rate_top[:], rate_left[:], drate_top[:], drate_left[:], states[:], below[:] = 0, 0, 0, 0, 0, 0
        x[:], now_top[:], now_left[:], slope[:] = 0, 0, 0, 0
        for k in range(lanes):
            for n in range(size):
                rate_top[n, k] = A_top[d + k, n] * LOG2_E
                rate_left[n, k] = A_left[d + k, n] * LOG2_E
        for number in range(before.shape[1] - 1, -1, -1):
            start = number * strip
            rows = min(strip, height - start)
            for j in range(width):
                for n in range(size):
                    for k in range(lanes):
                        states[0, j + 1, n, k] = before[b, number, j, n, d + k]
            for r in range(rows):
                i = start + r
                left[:] = 0
                for j in range(width):
                    top_share = _weight_of_top(i, j)
                    left_share = ONE - top_share
                    for k in range(lanes):
                        x[k] = u[b, i, j, d + k]
                        now_top[k] = delta_top[b, i, j, d + k]
                        now_left[k] = delta_left[b, i, j, d + k]
                    for n in range(size):
                        enter_top, enter_left = top_share * B_top[b, i, j, n], left_share * B_left[b, i, j, n]
                        for k in range(LANES):
                            above[k] = states[r, j + 1, n, k]
                        for k in range(LANES):
                            value = top_share * _exp2(now_top[k] * rate_top[n, k]) * above[k]
                            value += left_share * _exp2(now_left[k] * rate_left[n, k]) * left[n, k]
                            left[n, k] = value + x[k] * (now_top[k] * enter_top + now_left[k] * enter_left)
                        for k in range(LANES):
                            states[r + 1, j + 1, n, k] = left[n, k]
            for r in range(rows - 1, -1, -1):
                i = start + r
                right[:] = 0
                for j in range(width - 1, -1, -1):
                    top_share = _weight_of_top(i, j)
                    left_share = ONE - top_share
                    for k in range(lanes):
                        x[k] = u[b, i, j, d + k]
                        now_top[k] = delta_top[b, i, j, d + k]
                        now_left[k] = delta_left[b, i, j, d + k]
                        slope[k] = dy[b, i, j, d + k]
                    for k in range(LANES):
                        dx_top[k], dx_left[k], dnow_top[k], dnow_left[k] = 0, 0, 0, 0
                    for n in range(size):
                        enter_top, enter_left, leave = B_top[b, i, j, n], B_left[b, i, j, n], C[b, i, j, n]
                        denter_top, denter_left, dleave = NONE, NONE, NONE
                        for k in range(LANES):
                            here[k] = states[r + 1, j + 1, n, k]
                            above[k] = states[r, j + 1, n, k]
                            left[n, k] = states[r + 1, j, n, k]
                            grad[k] = below[j, n, k]
                        for k in range(LANES):
                            whole = grad[k] + right[n, k] + leave * slope[k]
                            dleave += here[k] * slope[k]
                            share = top_share * whole
                            dx_top[k] += share * enter_top
                            denter_top += share * now_top[k] * x[k]
                            share *= _exp2(now_top[k] * rate_top[n, k])
                            grad[k] = share
                            share *= above[k]
                            dnow_top[k] += share * rate_top[n, k]
                            drate_top[n, k] += share * now_top[k]
                            share = left_share * whole
                            dx_left[k] += share * enter_left
                            denter_left += share * now_left[k] * x[k]
                            share *= _exp2(now_left[k] * rate_left[n, k])
                            right[n, k] = share
                            share *= left[n, k]
                            dnow_left[k] += share * rate_left[n, k]
                            drate_left[n, k] += share * now_left[k]
                        for k in range(LANES):
                            below[j, n, k] = grad[k]
                        dB_top[part, b, i, j, n] += denter_top
                        dB_left[part, b, i, j, n] += denter_left
                        dC[part, b, i, j, n] += dleave
                    for k in range(lanes):
                        du[b, i, j, d + k] = dx_top[k] * now_top[k] + dx_left[k] * now_left[k]
                        ddelta_top[b, i, j, d + k] = dx_top[k] * x[k] + dnow_top[k] / LOG2_E
                        ddelta_left[b, i, j, d + k] = dx_left[k] * x[k] + dnow_left[k] / LOG2_E
        for k in range(lanes):
            for n in range(size):
                dA_top[b, d + k, n] = drate_top[n, k]
                dA_left[b, d + k, n] = drate_left[n, k]
