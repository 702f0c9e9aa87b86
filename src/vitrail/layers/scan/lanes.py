"""Sixteen floats side by side as one value, for numba: kernels say which vectors they use, and keep them in registers.

Left to itself the compiler makes vectors of loops, but shorter ones than many processors have, and stores between any
two loops what would fit in registers. For a processor with shorter vectors it splits these. Importing this needs numba,
whose caches do not notice that this file changed: touch the files that import it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic as untyped_intrinsic
from numba.extending import overload, register_model

LANES = 16
FLAGS: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy", "boundscheck": False}
IN_ORDER: dict[str, Any] = {**FLAGS, "fastmath": False}
"""For kernels in these vectors: bits are the same in whichever lane, and rounding is not taken for nothing."""
LOG2_E = np.float32(np.log2(np.e))
intrinsic: Any = untyped_intrinsic  # typed as if it were called with its context

FLOAT, WORD = ir.FloatType(), ir.IntType(32)
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES)
ALIGNED, ANYWHERE = 64, 4


class Lanes(types.Type):
    """``LANES`` floats."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


class Tile(types.Type):
    """Rows of ``LANES`` floats on the stack: ``tile[t]`` is one, ``tile[t, k]`` a float of it."""

    def __init__(self) -> None:
        super().__init__(name="Tile")


lanes, tile = Lanes(), Tile()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.PointerType(FLOATS))


# ---- arithmetic, also of a vector and a number


def _spread(builder: Any, value: Any) -> Any:
    if value.type == FLOATS:
        return value
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(WORDS, None))


def _number(value: float) -> Any:
    return ir.Constant(FLOATS, [FLOAT(float(np.float32(value)))] * LANES)


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _define(symbol: Callable[..., Any], instruction: str) -> None:
    @intrinsic
    def apply(context: Any, a: Any, b: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            return getattr(builder, instruction)(*(_spread(builder, x) for x in arguments))

        return lanes(a, b), generate

    @overload(symbol)
    def choose(a, b):  # type: ignore[no-untyped-def]
        if {a, b} in ({lanes}, {lanes, types.float32}):
            return lambda a, b: apply(a, b)
        return None


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
_define(operator.truediv, "fdiv")


@intrinsic
def vector(context: Any, value: Any) -> Any:
    """Return a number in all lanes."""
    return lanes(types.float32), lambda _, builder, __, arguments: _spread(builder, arguments[0])


@intrinsic
def muladd(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c, rounded once where the processor can."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return _call(builder, "llvm.fmuladd.v16f32", *(_spread(builder, x) for x in arguments))

    return lanes(a, b, c), generate


@intrinsic
def below_zero(context: Any, x: Any, a: Any, b: Any) -> Any:
    """Return a where x < 0, and b elsewhere, also where x is not a number."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        x, a, b = (_spread(builder, value) for value in arguments)
        return builder.select(builder.fcmp_ordered("<", x, _number(0)), a, b)

    return lanes(x, a, b), generate


# 2^f for f from -1/2 to 1/2 as 1 + f q(f), to 1e-7, and exactly 1 at 0: many small steps must not add up an error.
# q is exact at 0 and where the third of Chebyshev's polynomials, stretched so that f^2 = 0 is one of its zeros, has its
# others: that makes the error even.
_EDGE = np.cos(np.pi / 6)
_POINTS = np.sqrt((np.cos(np.pi * np.array([1, 3]) / 6) + _EDGE) / (1 + _EDGE)) / 2
_POINTS = np.concatenate([_POINTS, -_POINTS])
SERIES = np.polynomial.polynomial.polyfit(
    np.append(_POINTS, 0), np.append(np.expm1(_POINTS * np.log(2)) / _POINTS, np.log(2)), 4
)
LOWEST, HIGHEST = -126, 126
ROUNDING = 1.5 * 2**23
"""A float plus this is rounded: its last bits are an integer."""


@intrinsic
def exp2(context: Any, x: Any) -> Any:
    """Return 2^x. What a float cannot hold is 0 or infinite, or, without AVX-512, 2^-126 or 2^126."""

    def generate(context: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return (_exp2_avx512 if _has_avx512(context) else _exp2_anywhere)(builder, arguments[0])

    return lanes(lanes), generate


def _has_avx512(context: Any) -> bool:
    return "+avx512dq" in context.codegen().magic_tuple()[2]


def _exp2_avx512(builder: Any, x: Any) -> Any:
    """With two instructions: what rounding takes away, and a product with a power of two."""
    all_lanes, usual_rounding = ir.IntType(16)(-1), WORD(4)
    f = _call(builder, "llvm.x86.avx512.mask.reduce.ps.512", x, WORD(0), x, all_lanes, usual_rounding)
    whole = builder.fsub(x, f)
    return _call(
        builder, "llvm.x86.avx512.mask.scalef.ps.512", _series(builder, f), whole, x, all_lanes, usual_rounding
    )


def _exp2_anywhere(builder: Any, x: Any) -> Any:
    """With the integer added to the exponent's bits."""
    x = builder.select(builder.fcmp_ordered(">", x, _number(LOWEST)), x, _number(LOWEST))
    x = builder.select(builder.fcmp_ordered("<", x, _number(HIGHEST)), x, _number(HIGHEST))
    whole = builder.fadd(x, _number(ROUNDING))
    f = builder.fsub(x, builder.fsub(whole, _number(ROUNDING)))
    exponent = builder.shl(builder.bitcast(whole, WORDS), ir.Constant(WORDS, [WORD(23)] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(_series(builder, f), WORDS), exponent), FLOATS)


def _series(builder: Any, f: Any) -> Any:
    found = _number(SERIES[-1])
    for coefficient in [*SERIES[-2::-1], 1.0]:
        found = _call(builder, "llvm.fmuladd.v16f32", found, f, _number(coefficient))
    return found


# log(1 + e) for e from 0 to 1 as e times a polynomial, exact at Chebyshev's points.
_POINTS = (np.cos(np.pi * (2 * np.arange(10) + 1) / 20) + 1) / 2
LOG1P = tuple(np.polynomial.polynomial.polyfit(_POINTS, np.log1p(_POINTS) / _POINTS, 9).astype(np.float32)[::-1])
LN2_HIGH = np.float32(0.693359375)
"""The logarithm of 2 in so few bits that its product with a small integer is exact."""
LN2_LOW = np.float32(np.log(2) - 0.693359375)
LEAST, ROUND = np.float32(-87), np.float32(ROUNDING)
ZERO, ONE, MINUS = np.float32(0), np.float32(1), np.float32(-1)


@numba.njit(**IN_ORDER)
def exp_of_minus(x):  # type: ignore[no-untyped-def]
    """Return e^-|x|, to 3e-7 of itself, and e^-87 for what is less."""
    x = below_zero(x, x, x * MINUS)
    x = below_zero(x - LEAST, vector(LEAST), x)
    whole = (x * LOG2_E + ROUND) - ROUND
    rest = muladd(whole, LN2_LOW * MINUS, muladd(whole, LN2_HIGH * MINUS, x))
    return exp2(rest * LOG2_E) * exp2(whole)


@numba.njit(**IN_ORDER)
def softplus(x):  # type: ignore[no-untyped-def]
    """Return log(1 + e^x), to 4e-7 of itself, and e^-87 for what is less."""
    e = exp_of_minus(x)
    found = vector(LOG1P[0])
    for coefficient in LOG1P[1:]:
        found = muladd(found, e, vector(coefficient))
    return muladd(found, e, below_zero(x, ZERO, x))


@numba.njit(**IN_ORDER)
def sigmoid(x):  # type: ignore[no-untyped-def]
    """Return 1 / (1 + e^-x), to 4e-7 of itself, and e^-87 for what is less: the slope of ``softplus``."""
    e = exp_of_minus(x)
    return below_zero(x, e, ONE) / (e + ONE)


# ---- tiles


@intrinsic
def room(context: Any, count: Any) -> Any:
    """Return a tile of ``count`` rows: the compiler sees that it overlaps with nothing else."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        found = builder.alloca(FLOATS, arguments[0])
        found.align = ALIGNED
        return found

    return tile(types.intp), generate


@intrinsic
def _get(context: Any, rows: Any, t: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        rows, t = arguments
        return builder.load(builder.gep(rows, [t]), align=ALIGNED)

    return lanes(tile, types.intp), generate


@intrinsic
def _put(context: Any, rows: Any, t: Any, value: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        rows, t, value = arguments
        builder.store(value, builder.gep(rows, [t]), align=ALIGNED)

    return types.void(tile, types.intp, lanes), generate


@intrinsic
def _get_float(context: Any, rows: Any, place: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        rows, place = arguments
        return builder.load(builder.gep(builder.bitcast(rows, ir.PointerType(FLOAT)), [place]))

    return types.float32(tile, types.intp), generate


@intrinsic
def _put_float(context: Any, rows: Any, place: Any, value: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        rows, place, value = arguments
        builder.store(value, builder.gep(builder.bitcast(rows, ir.PointerType(FLOAT)), [place]))

    return types.void(tile, types.intp, types.float32), generate


@overload(operator.getitem)
def _read(rows, index):  # type: ignore[no-untyped-def]
    if rows is not tile:
        return None
    if isinstance(index, types.BaseTuple):
        return lambda rows, index: _get_float(rows, index[0] * LANES + index[1])
    return lambda rows, index: _get(rows, index)


@overload(operator.setitem)
def _write(rows, index, value):  # type: ignore[no-untyped-def]
    if rows is not tile:
        return None
    if isinstance(index, types.BaseTuple):
        return lambda rows, index, value: _put_float(rows, index[0] * LANES + index[1], value)
    return lambda rows, index, value: _put(rows, index, value)


@numba.njit(**IN_ORDER)
def clear(rows, count):  # type: ignore[no-untyped-def]
    """Set ``count`` rows to 0."""
    for t in range(count):
        rows[t] = vector(np.float32(0))


# ---- between tiles and arrays (channels, steps), of which either may lie side by side in memory


@intrinsic
def at(context: Any, values: Any, index: Any) -> Any:
    """Return an element of a contiguous array, from 0: that numba allows for indices below it takes time."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.load(builder.gep(array.data, [arguments[1]]))

    return types.float32(values, types.intp), generate


@numba.njit(**IN_ORDER)
def load(rows, values, first, width, start, count):  # type: ignore[no-untyped-def]
    """Set ``rows[t, k]`` to ``values[first + k, start + t]`` for ``width`` k and ``count`` t; other lanes to 0."""
    if width == LANES and values.strides[0] == values.itemsize:
        for t in range(count):
            rows[t] = _load_row(values, first, start + t)
        return
    squares = count // LANES if width == LANES and values.strides[1] == values.itemsize else 0
    for square in range(squares):
        _load_square(rows, square * LANES, values, first, start + square * LANES)
    for t in range(squares * LANES, count):
        rows[t] = vector(np.float32(0))
        for k in range(width):
            rows[t, k] = values[first + k, start + t]


@numba.njit(**IN_ORDER)
def store(rows, values, first, width, start, count):  # type: ignore[no-untyped-def]
    """Set ``values[first + k, start + t]`` to ``rows[t, k]``."""
    if width == LANES and values.strides[0] == values.itemsize:
        for t in range(count):
            _store_row(values, first, start + t, rows[t])
        return
    squares = count // LANES if width == LANES and values.strides[1] == values.itemsize else 0
    for square in range(squares):
        _store_square(rows, square * LANES, values, first, start + square * LANES)
    for k in range(width):
        for t in range(squares * LANES, count):
            values[first + k, start + t] = rows[t, k]


@numba.njit(**IN_ORDER)
def add_sums(values, start, rows, count):  # type: ignore[no-untyped-def]
    """Add the sum over the lanes of ``rows[t]`` to ``values[start + t]``, for ``count`` t."""
    squares = count // LANES
    for square in range(squares):
        _add_square(values, start + square * LANES, rows, square * LANES)
    for t in range(squares * LANES, count):
        for k in range(LANES):
            values[start + t] += rows[t, k]


def _load_rows(builder: Any, rows: Any, t: Any) -> list[Any]:
    return [builder.load(builder.gep(rows, [builder.add(t, t.type(row))]), align=ALIGNED) for row in range(LANES)]


def _place(context: Any, builder: Any, kind: Any, values: Any, i: Any, j: Any) -> Any:
    """Return where [i, j] is in an array of two axes."""
    array = context.make_array(kind)(context, builder, values)
    offset = builder.add(*(builder.mul(x, builder.extract_value(array.strides, axis)) for axis, x in enumerate((i, j))))
    start = builder.bitcast(array.data, ir.PointerType(ir.IntType(8)))
    return builder.bitcast(builder.gep(start, [offset]), ir.PointerType(FLOATS))


@intrinsic
def _load_row(context: Any, values: Any, i: Any, j: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature.args[0], *arguments), align=ANYWHERE)

    return lanes(values, types.intp, types.intp), generate


@intrinsic
def _store_row(context: Any, values: Any, i: Any, j: Any, row: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, i, j, row = arguments
        builder.store(row, _place(context, builder, signature.args[0], values, i, j), align=ANYWHERE)

    return types.void(values, types.intp, types.intp, lanes), generate


@intrinsic
def _load_square(context: Any, rows: Any, t: Any, values: Any, i: Any, j: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, t, values, i, j = arguments
        kind = signature.args[2]
        places = [_place(context, builder, kind, values, builder.add(i, i.type(k)), j) for k in range(LANES)]
        columns = _transposed(builder, [builder.load(place, align=ANYWHERE) for place in places])
        for row, value in enumerate(columns):
            builder.store(value, builder.gep(rows, [builder.add(t, t.type(row))]), align=ALIGNED)

    return types.void(tile, types.intp, values, types.intp, types.intp), generate


@intrinsic
def _store_square(context: Any, rows: Any, t: Any, values: Any, i: Any, j: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, t, values, i, j = arguments
        for k, value in enumerate(_transposed(builder, _load_rows(builder, rows, t))):
            place = _place(context, builder, signature.args[2], values, builder.add(i, i.type(k)), j)
            builder.store(value, place, align=ANYWHERE)

    return types.void(tile, types.intp, values, types.intp, types.intp), generate


@intrinsic
def _add_square(context: Any, values: Any, i: Any, rows: Any, t: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, i, rows, t = arguments
        left = _load_rows(builder, rows, t)
        for stride in (1, 2, 4, 8):
            pairs = zip(left[::2], left[1::2], strict=True)
            left = [builder.fadd(*_exchanged(builder, a, b, stride)) for a, b in pairs]
        array = context.make_array(signature.args[0])(context, builder, values)
        place = builder.bitcast(builder.gep(array.data, [i]), ir.PointerType(FLOATS))
        builder.store(builder.fadd(builder.load(place, align=ANYWHERE), left[0]), place, align=ANYWHERE)

    return types.void(values, types.intp, tile, types.intp), generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    rows = list(rows)
    for stride in (1, 2, 4, 8):
        for row in range(LANES):
            if not row & stride:
                rows[row], rows[row + stride] = _exchanged(builder, rows[row], rows[row + stride], stride)
    return rows


def _exchanged(builder: Any, a: Any, b: Any, stride: int) -> tuple[Any, Any]:
    """Exchange the second of each pair of blocks of ``stride`` lanes in ``a`` with the first in ``b``."""
    firsts = [(lane & ~stride) + (LANES if lane & stride else 0) for lane in range(LANES)]
    seconds = [lane + stride for lane in firsts]
    found = [builder.shuffle_vector(a, b, ir.Constant(WORDS, [WORD(k) for k in mask])) for mask in (firsts, seconds)]
    return found[0], found[1]


# ---- for kernels that are written float by float, and whose loops the compiler makes vectors of


@intrinsic
def _float_of_bits(context: Any, bits: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def _stack(context: Any, count: Any) -> Any:
    """Return room for ``count`` floats on the stack: the compiler sees that it overlaps with nothing else."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        found = builder.alloca(FLOAT, arguments[0])
        found.align = ALIGNED
        return found

    return types.CPointer(types.float32)(types.intp), generate


C1, C2, C3, C4, C5 = (np.float32(value) for value in SERIES)
LOW, HIGH, HALF, BIAS, ONE = np.float32(LOWEST), np.float32(HIGHEST), np.float32(127.5), np.int32(127), np.float32(1)


@numba.njit(inline="always", **FLAGS)
def _exp2(x: Any) -> Any:
    """Return 2^x, without a branch or a call."""
    x = min(max(x, LOW), HIGH)
    whole = np.int32(x + HALF)  # x + 127, rounded: the exponent's bits
    f = x - np.float32(np.int32(whole - BIAS))  # integers, as the compiler may reorder floats and lose bits
    series = ONE + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * C5))))
    return _float_of_bits(np.int32(whole << np.int32(23))) * series
