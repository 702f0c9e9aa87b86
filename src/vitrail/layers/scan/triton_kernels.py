"""The loops of ``triton``: a program takes a block of channels of one group of one sequence through its chunks.

A chunk is a tile (channels, steps, states) in registers, and its steps are joined by an associative scan: a step takes
a state h to a h + e, and two of them to a state like one. Before a chunk only its first states are read.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _join(a, e, next_a, next_e):
    return next_a * a, next_a * e + next_e


@triton.jit
def _places(channels, groups, length, size, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Return what a program works on: the sequence, its channels, states (channels, N), and where they are kept."""
    # Sequences may hold more than 2^31 elements together.
    image, group, width = tl.program_id(0).to(tl.int64), tl.program_id(2), channels // groups
    inside = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    channel, n = group * width + inside, tl.arange(0, SIZE)
    rows = (image * channels + channel) * length
    columns = ((image * groups + group) * size + n) * length
    cells = channel[:, None] * size + n[None, :]
    return image, rows, columns, cells, inside < width, n < size


@triton.jit
def forward(
    u, delta, A, B, C, state, y, last, before,
    channels, groups, length, size, chunks,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write y (B, D, L), the last state (B, D, N) and the states before each chunk (B, chunks, D, N)."""
    image, rows, columns, cells, real_d, real_n = _places(channels, groups, length, size, WIDTH, SIZE)
    real = real_d[:, None] & real_n[None, :]
    whole = channels * size
    # What is not there is 0, and such a step, with its decay of 1, changes no state.
    rate = tl.load(A + cells, real, 0.0)
    h = tl.load(state + image * whole + cells, real, 0.0)
    end = (tl.arange(0, STEPS) == STEPS - 1)[None, :, None]
    for chunk in range(chunks):
        tl.store(before + (image * chunks + chunk) * whole + cells, h, real)
        t = chunk * STEPS + tl.arange(0, STEPS)
        wide, deep = real_d[:, None] & (t < length)[None, :], (t < length)[:, None] & real_n[None, :]
        now = tl.load(delta + rows[:, None] + t[None, :], wide, 0.0)
        x = now * tl.load(u + rows[:, None] + t[None, :], wide, 0.0)
        enter = tl.load(B + columns[None, :] + t[:, None], deep, 0.0)
        leave = tl.load(C + columns[None, :] + t[:, None], deep, 0.0)
        a = tl.exp(now[:, :, None] * rate[:, None, :])
        kept, made = tl.associative_scan((a, x[:, :, None] * enter[None, :, :]), 1, _join)
        states = kept * h[:, None, :] + made
        tl.store(y + rows[:, None] + t[None, :], tl.sum(states * leave[None, :, :], 2), wide)
        h = tl.sum(tl.where(end, states, 0.0), 1)
    tl.store(last + image * whole + cells, h, real)


@triton.jit
def backward(
    dy, dlast, u, delta, A, B, C, before, du, ddelta, dA, dB, dC, dstate,
    channels, groups, length, size, chunks,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the gradients; dA is (B, D, N), one for each sequence, and dB and dC, zero before, are added up."""
    image, rows, columns, cells, real_d, real_n = _places(channels, groups, length, size, WIDTH, SIZE)
    real = real_d[:, None] & real_n[None, :]
    whole = channels * size
    rate = tl.load(A + cells, real, 0.0)
    drate = tl.zeros_like(rate)
    # The gradient of the state that the chunk leaves behind.
    carried = tl.load(dlast + image * whole + cells, real, 0.0)
    place = tl.arange(0, STEPS)
    begin, end = (place == 0)[None, :, None], (place == STEPS - 1)[None, :]
    for past in range(chunks):
        chunk = chunks - 1 - past
        h = tl.load(before + (image * chunks + chunk) * whole + cells, real, 0.0)
        t = chunk * STEPS + place
        there = t < length
        wide, deep = real_d[:, None] & there[None, :], there[:, None] & real_n[None, :]
        at, where = rows[:, None] + t[None, :], columns[None, :] + t[:, None]
        now, value = tl.load(delta + at, wide, 0.0), tl.load(u + at, wide, 0.0)
        slope = tl.load(dy + at, wide, 0.0)
        enter, leave = tl.load(B + where, deep, 0.0), tl.load(C + where, deep, 0.0)
        x = now * value
        a = tl.exp(now[:, :, None] * rate[:, None, :])
        # States before each step: the scan of all that is a step earlier, which begins with a step that does nothing.
        earlier = wide & (place > 0)[None, :]
        then = tl.load(delta + at - 1, earlier, 0.0)
        entered = tl.load(B + where - 1, deep & (place > 0)[:, None], 0.0)
        x_then = then * tl.load(u + at - 1, earlier, 0.0)
        decay = tl.exp(then[:, :, None] * rate[:, None, :])
        kept, made = tl.associative_scan((decay, x_then[:, :, None] * entered[None, :, :]), 1, _join)
        prior = kept * h[:, None, :] + made
        # Gradients of the states after each step, from the last back: g_t = C_t dy_t + a_(t+1) g_(t+1).
        after = tl.load(delta + at + 1, real_d[:, None] & (t + 1 < length)[None, :] & ~end, 0.0)
        decay = tl.exp(after[:, :, None] * rate[:, None, :])
        kept, made = tl.associative_scan((decay, slope[:, :, None] * leave[None, :, :]), 1, _join, reverse=True)
        g = kept * carried[:, None, :] + made
        states = a * prior + x[:, :, None] * enter[None, :, :]
        through = g * a * prior
        dx = tl.sum(g * enter[None, :, :], 2)
        tl.store(du + at, dx * now, wide)
        tl.store(ddelta + at, dx * value + tl.sum(through * rate[:, None, :], 2), wide)
        drate += tl.sum(through * now[:, :, None], 1)
        tl.atomic_add(dB + where, tl.sum(g * x[:, :, None], 0), deep)
        tl.atomic_add(dC + where, tl.sum(states * slope[:, :, None], 0), deep)
        carried = tl.sum(tl.where(begin, g * a, 0.0), 1)
    tl.store(dA + image * whole + cells, drate, real)
    tl.store(dstate + image * whole + cells, carried, real)
