"""Machine code of the selective scan. Importing this needs numba; ``compiled`` is how to use it.

All arrays are float32: u, delta, y (B, D, L), in any order in memory, and contiguous A (D, N), B, C (B, G, N, L),
states (B, D, N), those before each chunk of ``CHUNK`` steps (B, D, chunks, N), and ``own``, each channel's D and the
bias of its delta, (D, 2). If ``soft``, delta goes through softplus. A call does the channels ``first`` to ``last`` of
one image, all of one group. In tiles a row is a step, or one of the N elements of a state, and the lanes are channels.
A chunk's tiles stay in the first cache while each element of the state goes through its steps in a register.
"""

from __future__ import annotations

import numba
from numba.core import types

from vitrail.layers.scan.lanes import FLAGS as FLAGS
from vitrail.layers.scan.lanes import (
    IN_ORDER,
    LANES,
    LOG2_E,
    add_sums,
    at,
    clear,
    exp2,
    load,
    muladd,
    room,
    sigmoid,
    softplus,
    store,
)
from vitrail.layers.scan.lanes import _exp2 as _exp2
from vitrail.layers.scan.lanes import _stack as _stack

CHUNK = 64
"""Steps between two states that are kept."""
# Signatures are given so that no order in memory needs machine code of its own.
ANY = types.Array(types.float32, 3, "A")
MATRIX, CUBE, STATES, PARTS = (types.Array(types.float32, axes, "C") for axes in (2, 3, 4, 5))
TASK = (*(types.intp,) * 4, types.boolean)
INPUTS = (ANY, ANY, MATRIX, STATES, STATES, MATRIX)


@numba.njit(types.void(*TASK, *INPUTS, CUBE, ANY, STATES), cache=True, **IN_ORDER)
def forward(b, first, last, part, soft, u, delta, A, B, C, own, state, y, before):  # type: ignore[no-untyped-def]
    """Write y, the states before each chunk, and the last state into that before the first step."""
    length, size = u.shape[2], A.shape[1]
    g = first // (u.shape[1] // B.shape[1])
    now, x, total = room(CHUNK), room(CHUNK), room(CHUNK)
    rate, states, ends = room(size), room(size), room(2)
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        load(rate, A, d, width, 0, size)
        load(ends, own, d, width, 0, 2)
        load(states, state[b], d, width, 0, size)
        for chunk in range(before.shape[2]):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            store(states, before[b, :, chunk], d, width, 0, size)
            load(now, delta[b], d, width, start, steps)
            load(x, u[b], d, width, start, steps)
            for t in range(steps):
                step = now[t] + ends[1]
                now[t] = softplus(step) if soft else step
                total[t], x[t] = x[t] * ends[0], x[t] * now[t]
            for n in range(size):
                enter, leave = B[b, g, n, start : start + steps], C[b, g, n, start : start + steps]
                r, h = rate[n] * LOG2_E, states[n]
                for t in range(steps):
                    h = muladd(exp2(now[t] * r), h, x[t] * at(enter, t))
                    total[t] = muladd(h, at(leave, t), total[t])
                states[n] = h
            store(total, y[b], d, width, start, steps)
        store(states, state[b], d, width, 0, size)


@numba.njit(types.void(*TASK, *INPUTS, ANY, STATES, ANY, ANY, CUBE, PARTS, PARTS, CUBE, CUBE), cache=True, **IN_ORDER)
def backward(  # type: ignore[no-untyped-def]
    b, first, last, part, soft, u, delta, A, B, C, own, dy, before, du, ddelta, dA, dB, dC, down, dstate
):
    """Write or add up all gradients; that of the last state becomes that of the first."""
    length, size = u.shape[2], A.shape[1]
    g = first // (u.shape[1] // B.shape[1])
    now, x, slope, dx, dnow = room(CHUNK), room(CHUNK), room(CHUNK), room(CHUNK), room(CHUNK)
    kept, earlier = room(CHUNK), room(CHUNK)
    rate, drate, states, dstates, ends, dends = room(size), room(size), room(size), room(size), room(2), room(2)
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        load(rate, A, d, width, 0, size)
        load(ends, own, d, width, 0, 2)
        load(dstates, dstate[b], d, width, 0, size)
        clear(drate, size)
        clear(dends, 2)
        for chunk in range(before.shape[2] - 1, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            load(states, before[b, :, chunk], d, width, 0, size)
            load(now, delta[b], d, width, start, steps)
            load(x, u[b], d, width, start, steps)
            load(slope, dy[b], d, width, start, steps)
            for t in range(steps):
                step = now[t] + ends[1]
                now[t] = softplus(step) if soft else step
                dends[0] = muladd(slope[t], x[t], dends[0])
                x[t] = x[t] * now[t]
            clear(dx, steps)
            clear(dnow, steps)
            for n in range(size):
                enter, leave = B[b, g, n, start : start + steps], C[b, g, n, start : start + steps]
                r, h = rate[n] * LOG2_E, states[n]
                for t in range(steps):
                    kept[t], earlier[t] = exp2(now[t] * r), h
                    h = muladd(kept[t], h, x[t] * at(enter, t))
                r, dr, dh = rate[n], drate[n], dstates[n]
                for t in range(steps - 1, -1, -1):
                    dh = muladd(slope[t], at(leave, t), dh)
                    dx[t] = muladd(dh, at(enter, t), dx[t])
                    denter, dleave = dh * x[t], h * slope[t]
                    h, dh = earlier[t], dh * kept[t]
                    through = dh * h
                    dnow[t] = muladd(through, r, dnow[t])
                    dr = muladd(through, now[t], dr)
                    kept[t], earlier[t] = denter, dleave  # in the place of what is not needed any more
                drate[n], dstates[n] = dr, dh
                add_sums(dB[part, b, g, n], start, kept, steps)
                add_sums(dC[part, b, g, n], start, earlier, steps)
            # Again, as tiles of their own all the while would not fit in the first cache.
            load(kept, delta[b], d, width, start, steps)
            load(earlier, u[b], d, width, start, steps)
            for t in range(steps):
                dnow[t] = muladd(dx[t], earlier[t], dnow[t])
                if soft:
                    dnow[t] = dnow[t] * sigmoid(kept[t] + ends[1])
                dends[1] = dends[1] + dnow[t]
                dx[t] = muladd(dx[t], now[t], slope[t] * ends[0])
            store(dx, du[b], d, width, start, steps)
            store(dnow, ddelta[b], d, width, start, steps)
        store(dstates, dstate[b], d, width, 0, size)
        store(drate, dA[b], d, width, 0, size)
        store(dends, down[b], d, width, 0, 2)
