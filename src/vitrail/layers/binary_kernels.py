"""Machine code of convolutions of bits. Importing this needs numba; ``binary`` is how to use it.

Lanes are eight places of the output; a word is 64 channels of one place, or of one weight. Words that differ are
counted as Harley and Seal did: full adders over whole vectors leave one population count for eight words. LLVM makes
of it what the processor has: one instruction for half an adder under AVX-512, vectors in halves under AVX2.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as untyped_intrinsic

LANES = 8
ROWS = 4
"""A filter's words are filled up with zeros to a multiple of this; two times as many go through the adders at once."""
FLAGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "cache": True}
intrinsic: Any = untyped_intrinsic  # typed as if it were called with its context

WORD, INDEX = ir.IntType(64), ir.IntType(32)
WORDS, FLOATS = ir.VectorType(WORD, LANES), ir.VectorType(ir.FloatType(), LANES)


def _number(value: int) -> Any:
    return ir.Constant(WORDS, [WORD(value)] * LANES)


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INDEX(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(INDEX, LANES), None))


def _count(builder: Any, words: Any) -> Any:
    kind = ir.FunctionType(WORDS, [WORDS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{LANES}i64"), [words])


def _add(context: Any, builder: Any, a: Any, b: Any, c: Any) -> tuple[Any, Any]:
    """Return sum and carry of three bits, for all bits."""
    if "+avx512f" in context.codegen().magic_tuple()[2]:  # one instruction each, which LLVM does not find
        kind = ir.FunctionType(WORDS, [WORDS] * 3 + [INDEX])
        table = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.pternlog.q.512")
        odd, most = (builder.call(table, [a, b, c, INDEX(truth)]) for truth in (0b10010110, 0b11101000))
        return odd, most
    return builder.xor(builder.xor(a, b), c), builder.or_(builder.and_(a, b), builder.and_(c, builder.or_(a, b)))


@intrinsic
def agreement(
    context: Any,
    x: Any,
    filters: Any,
    o: Any,
    valid: Any,
    ones: Any,
    taps: Any,
    outside: Any,
    count: Any,
    scale: Any,
    alpha: Any,
    bias: Any,
    out: Any,
    start: Any,
) -> Any:
    """Write the outputs of filter o at eight places from element ``start`` of ``out`` on.

    They are (``valid`` - 2 bits that differ) alpha[o] ``scale`` + bias[o]. Bits of ``x`` outside of the image are 0,
    and differ where the filter has ``ones[o, tap]``: the first ``count`` of ``taps`` are outside in the lanes in which
    ``outside`` is 2, and are added to ``valid`` again.
    """
    signature = types.void(
        x, filters, types.intp, valid, ones, taps, outside, types.intp, scale, alpha, bias, out, types.intp
    )

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        many, floats = ir.PointerType(WORDS), ir.PointerType(FLOATS)

        def array(number: int) -> Any:
            return context.make_array(signature.args[number])(context, builder, arguments[number])

        def vector(number: int, index: Any, kind: Any = floats) -> Any:
            place = builder.gep(builder.bitcast(array(number).data, kind), [index])
            return builder.load(place, align=4 if kind == floats else 8)

        def spread(number: int, index: Any, kind: Any) -> Any:
            return _spread(builder, builder.load(builder.gep(array(number).data, [index])), kind)

        o, count, start = arguments[2], arguments[7], arguments[12]
        rows = builder.extract_value(array(1).shape, 1)
        places = [cgutils.alloca_once_value(builder, _number(0)) for _ in range(4)]
        for place in places:
            builder.store(_number(0), place)

        def through(row: Any, steps: int) -> None:
            """Take that many times ``ROWS`` words through the adders."""
            ones, twos, fours, eights = (builder.load(place) for place in places)
            carried = []
            for step in range(steps):
                differ = []
                for k in range(step * ROWS, (step + 1) * ROWS):
                    j = builder.add(row, WORD(k))
                    weight = spread(1, builder.add(builder.mul(o, rows), j), WORDS)
                    differ.append(builder.xor(vector(0, j, many), weight))
                ones, left = _add(context, builder, ones, differ[0], differ[1])
                ones, right = _add(context, builder, ones, differ[2], differ[3])
                twos, four = _add(context, builder, twos, left, right)
                carried.append(four)
            fours, eight = _add(context, builder, fours, *(carried if steps == 2 else (carried[0], _number(0))))
            eights = builder.add(eights, _count(builder, eight))
            for place, value in zip(places, (ones, twos, fours, eights)):
                builder.store(value, place)

        twice = builder.and_(rows, WORD(-2 * ROWS))
        with cgutils.for_range_slice(builder, WORD(0), twice, WORD(2 * ROWS)) as (row, _):
            through(row, 2)
        with builder.if_then(builder.icmp_signed("<", twice, rows)):
            through(twice, 1)
        one, two, four, total = (builder.load(place) for place in places)
        for part in (four, two, one):
            total = builder.add(builder.add(total, total), _count(builder, part))
        sums = cgutils.alloca_once(builder, FLOATS)
        builder.store(vector(3, WORD(0)), sums)
        width = builder.extract_value(array(4).shape, 1)
        with cgutils.for_range(builder, count) as loop:
            tap = builder.load(builder.gep(array(5).data, [loop.index]))
            weight = spread(4, builder.add(builder.mul(o, width), tap), FLOATS)
            builder.store(builder.fadd(builder.load(sums), builder.fmul(weight, vector(6, loop.index))), sums)
        y = builder.fsub(builder.load(sums), builder.sitofp(builder.add(total, total), FLOATS))
        # In the order of the float form, and without fusing, so that both round alike.
        y = builder.fmul(y, spread(9, o, FLOATS))
        y = builder.fmul(y, vector(8, WORD(0)))
        y = builder.fadd(y, spread(10, o, FLOATS))
        builder.store(y, builder.bitcast(builder.gep(array(11).data, [start]), floats), align=4)

    return signature, generate


@numba.njit(**FLAGS)
def pack_signs(x, words, size):  # type: ignore[no-untyped-def]
    """Set bit c % 64 of ``words[b, g, c // 64]`` where channel c of group g of ``x`` is not below 0.

    Args:
        x: (B, G C, H W) floats; ``size`` is C.
        words: (B, G, ceil(C / 64), H W).
    """
    places = x.shape[2]
    for b in range(words.shape[0]):
        for g in range(words.shape[1]):
            for w in range(words.shape[2]):
                row = words[b, g, w]
                for i in range(places):
                    row[i] = 0
                for c in range(64 * w, min(size, 64 * w + 64)):
                    bit = np.int64(1) << np.int64(c - 64 * w)
                    channel = x[b, g * size + c]
                    for i in range(places):
                        row[i] |= bit if channel[i] >= 0 else np.int64(0)


@numba.njit(**FLAGS)
def mean_magnitude(x, means, size):  # type: ignore[no-untyped-def]
    """Set ``means`` (B, G, H W) to the mean over the ``size`` channels of each group of |x|."""
    for b in range(means.shape[0]):
        for g in range(means.shape[1]):
            row = means[b, g]
            for i in range(len(row)):
                row[i] = 0
            for c in range(size):
                channel = x[b, g * size + c]
                for i in range(len(row)):
                    row[i] += abs(channel[i])
            for i in range(len(row)):
                row[i] /= np.float32(size)


@numba.njit(**FLAGS)
def convolve(  # type: ignore[no-untyped-def]
    b, first, last, words, means, filters, ones, shape, kernel, stride, padding, dilation, size, alpha, bias, out
):
    """Write the places ``first`` to ``last`` of image b of ``out`` (B, O, places).

    Args:
        words: (B, G, n, H W), of the signs.
        means: (B, G, H W), or (0, 0, 0) where outputs are not scaled by their inputs.
        filters: (O, rows), row t n + i the i-th of the n words of tap t; zeros up to a multiple of ``ROWS``.
        ones: (O, taps), how many bits of each are 1.
        shape: H, W and the columns of the output.
        size: channels of a group.
    """
    height, width, columns = shape
    count, rows, places = words.shape[2], filters.shape[1], out.shape[2]
    groups = words.shape[1]
    own = len(alpha) // groups
    area = kernel[0] * kernel[1]
    x = np.zeros((rows, LANES), np.int64)
    top, left = np.empty(LANES, np.intp), np.empty(LANES, np.intp)
    valid, scale, y = np.zeros(LANES, np.float32), np.ones(LANES, np.float32), np.empty(LANES, np.float32)
    taps, outside = np.empty(area, np.int64), np.empty((area, LANES), np.float32)
    for g in range(groups):
        for start in range(first, last, LANES):
            valid[:] = 0
            if means.shape[0]:
                scale[:] = 0
            found = 0
            for lane in range(LANES):
                place = min(start + lane, last - 1)
                top[lane] = place // columns * stride[0] - padding[0]
                left[lane] = place % columns * stride[1] - padding[1]
            for tap in range(area):
                down, right = tap // kernel[1] * dilation[0], tap % kernel[1] * dilation[1]
                missing = False
                for lane in range(LANES):
                    i, j = top[lane] + down, left[lane] + right
                    inside = 0 <= i < height and 0 <= j < width
                    for w in range(count):
                        x[tap * count + w, lane] = words[b, g, w, i * width + j] if inside else 0
                    outside[found, lane] = 0 if inside else 2
                    if inside:
                        valid[lane] += np.float32(size)
                        if means.shape[0]:
                            scale[lane] += means[b, g, i * width + j]
                    else:
                        missing = True
                if missing:
                    taps[found] = tap
                    found += 1
            if means.shape[0]:
                for lane in range(LANES):
                    scale[lane] /= np.float32(area)
            whole = start + LANES <= last
            for o in range(g * own, (g + 1) * own):
                if whole:
                    at = (b * len(alpha) + o) * places + start
                    agreement(x, filters, o, valid, ones, taps, outside, found, scale, alpha, bias, out, at)
                else:
                    agreement(x, filters, o, valid, ones, taps, outside, found, scale, alpha, bias, y, 0)
                    for lane in range(last - start):
                        out[b, o, start + lane] = y[lane]
