"""Machine code of the selective scan. Importing this needs numba; ``compiled`` is how to use it.

All arrays are contiguous float32: u, delta, y (B, D, L), A (D, N), B, C (B, G, N, L), states (B, D, N), those before
each chunk of ``CHUNK`` steps (B, D, chunks, N). A call does the channels ``first`` to ``last`` of one image, all of one
group. In tiles a row is a step, or one of the N elements of a state, and the lanes are channels. A chunk's tiles stay
in the first cache while each element of the state goes through its steps in a register.
"""

from __future__ import annotations

import numba

from vitrail.layers.scan.lanes import FLAGS as FLAGS
from vitrail.layers.scan.lanes import IN_ORDER, LANES, LOG2_E, add_sums, at, clear, exp2, load, muladd, room, store
from vitrail.layers.scan.lanes import _exp2 as _exp2
from vitrail.layers.scan.lanes import _stack as _stack

CHUNK = 64
"""Steps between two states that are kept."""


@numba.njit(cache=True, **IN_ORDER)
def forward(b, first, last, part, u, delta, A, B, C, state, y, before):  # type: ignore[no-untyped-def]
    """Write y, the states before each chunk, and the last state into that before the first step."""
    length, size = u.shape[2], A.shape[1]
    g = first // (u.shape[1] // B.shape[1])
    now, x, total = room(CHUNK), room(CHUNK), room(CHUNK)
    rate, states = room(size), room(size)
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        load(rate, A, d, width, 0, size)
        load(states, state[b], d, width, 0, size)
        for chunk in range(before.shape[2]):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            store(states, before[b, :, chunk], d, width, 0, size)
            load(now, delta[b], d, width, start, steps)
            load(x, u[b], d, width, start, steps)
            for t in range(steps):
                x[t] = x[t] * now[t]
            clear(total, steps)
            for n in range(size):
                enter, leave = B[b, g, n, start : start + steps], C[b, g, n, start : start + steps]
                r, h = rate[n] * LOG2_E, states[n]
                for t in range(steps):
                    h = muladd(exp2(now[t] * r), h, x[t] * at(enter, t))
                    total[t] = muladd(h, at(leave, t), total[t])
                states[n] = h
            store(total, y[b], d, width, start, steps)
        store(states, state[b], d, width, 0, size)


@numba.njit(cache=True, **IN_ORDER)
def backward(  # type: ignore[no-untyped-def]
    b, first, last, part, dy, u, delta, A, B, C, before, du, ddelta, dA, dB, dC, dstate
):
    """Write or add up all gradients; that of the last state becomes that of the first."""
    length, size = u.shape[2], A.shape[1]
    g = first // (u.shape[1] // B.shape[1])
    now, value, x, slope = room(CHUNK), room(CHUNK), room(CHUNK), room(CHUNK)
    dx, dnow, kept, earlier = room(CHUNK), room(CHUNK), room(CHUNK), room(CHUNK)
    rate, drate, states, dstates = room(size), room(size), room(size), room(size)
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        load(rate, A, d, width, 0, size)
        load(dstates, dstate[b], d, width, 0, size)
        clear(drate, size)
        for chunk in range(before.shape[2] - 1, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            load(states, before[b, :, chunk], d, width, 0, size)
            load(now, delta[b], d, width, start, steps)
            load(value, u[b], d, width, start, steps)
            load(slope, dy[b], d, width, start, steps)
            for t in range(steps):
                x[t] = value[t] * now[t]
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
            for t in range(steps):
                dnow[t] = muladd(dx[t], value[t], dnow[t])
                dx[t] = dx[t] * now[t]
            store(dx, du[b], d, width, start, steps)
            store(dnow, ddelta[b], d, width, start, steps)
        store(dstates, dstate[b], d, width, 0, size)
        store(drate, dA[b], d, width, 0, size)
