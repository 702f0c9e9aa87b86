"""Machine code of the locally bidirectional scan. Importing this needs numba; ``local_compiled`` is how to use it.

Arrays, tiles and arguments are those of ``kernels``; then come the places of a window, and the steps of a chunk, which
are whole windows and at most ``ROWS``. Of a window's own scan r is what later places leave at a place, without what the
place itself brings in, which the forward scan has.
"""

from __future__ import annotations

import numba
import numpy as np

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
    store,
    vector,
)

ROWS = 64


@numba.njit(cache=True, **IN_ORDER)
def forward(b, first, last, part, u, delta, A, B, C, state, y, before, window, chunk_steps):  # type: ignore[no-untyped-def]
    """Write y, the states before each chunk, and the last state into that before the first step."""
    length, size = u.shape[2], A.shape[1]
    g = first // (u.shape[1] // B.shape[1])
    now, x, total, kept = room(ROWS), room(ROWS), room(ROWS), room(ROWS)
    rate, states = room(size), room(size)
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        load(rate, A, d, width, 0, size)
        load(states, state[b], d, width, 0, size)
        for chunk in range(before.shape[2]):
            start = chunk * chunk_steps
            steps = min(chunk_steps, length - start)
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
                    kept[t] = exp2(now[t] * r)
                    h = muladd(kept[t], h, x[t] * at(enter, t))
                    total[t] = muladd(h, at(leave, t), total[t])
                states[n] = h
                for begin in range(0, steps, window):
                    end = min(begin + window, steps)
                    h = x[end - 1] * at(enter, end - 1)
                    for t in range(end - 2, begin - 1, -1):
                        h = kept[t] * h
                        total[t] = muladd(h, at(leave, t), total[t])
                        h = muladd(x[t], at(enter, t), h)
            store(total, y[b], d, width, start, steps)
        store(states, state[b], d, width, 0, size)


@numba.njit(cache=True, **IN_ORDER)
def backward(  # type: ignore[no-untyped-def]
    b, first, last, part, dy, u, delta, A, B, C, before, du, ddelta, dA, dB, dC, dstate, window, chunk_steps
):
    """Write or add up all gradients; that of the last state becomes that of the first."""
    length, size = u.shape[2], A.shape[1]
    g = first // (u.shape[1] // B.shape[1])
    now, value, x, slope = room(ROWS), room(ROWS), room(ROWS), room(ROWS)
    dx, dnow, kept, earlier, later, own = room(ROWS), room(ROWS), room(ROWS), room(ROWS), room(ROWS), room(ROWS)
    rate, drate, states, dstates = room(size), room(size), room(size), room(size)
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        load(rate, A, d, width, 0, size)
        load(dstates, dstate[b], d, width, 0, size)
        clear(drate, size)
        for chunk in range(before.shape[2] - 1, -1, -1):
            start = chunk * chunk_steps
            steps = min(chunk_steps, length - start)
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
                for begin in range(0, steps, window):
                    end = min(begin + window, steps)
                    s = vector(np.float32(0))
                    for t in range(end - 1, begin - 1, -1):
                        later[t] = kept[t] * s
                        s = muladd(x[t], at(enter, t), later[t])
                    s = vector(np.float32(0))  # the gradient, which the window's scan sends the other way
                    for t in range(begin, end):
                        dx[t] = muladd(s, at(enter, t), dx[t])
                        own[t] = s * x[t]
                        s = muladd(slope[t], at(leave, t), s)
                        through = s * later[t]
                        dnow[t] = muladd(through, r, dnow[t])
                        dr = muladd(through, now[t], dr)
                        s = s * kept[t]
                        later[t] = later[t] * slope[t]
                for t in range(steps - 1, -1, -1):
                    dh = muladd(slope[t], at(leave, t), dh)
                    dx[t] = muladd(dh, at(enter, t), dx[t])
                    denter, dleave = muladd(dh, x[t], own[t]), muladd(h, slope[t], later[t])
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
