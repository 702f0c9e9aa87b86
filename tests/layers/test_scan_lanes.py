import numpy as np
import pytest

numba = pytest.importorskip("numba")

from vitrail.layers.scan import lanes  # noqa: E402
from vitrail.layers.scan.lanes import (  # noqa: E402
    FLAGS,
    IN_ORDER,
    LANES,
    LOG2_E,
    _exp2,
    add_sums,
    exp2,
    load,
    room,
    sigmoid,
    softplus,
    store,
    vector,
)


def values(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def of_each(function):
    """Return a function of vectors as one of arrays."""

    @numba.njit(**IN_ORDER)
    def run(x):
        rows = room(1)
        for start in range(0, x.size, LANES):
            for k in range(LANES):
                rows[0, k] = x[start + k]
            rows[0] = function(rows[0])
            for k in range(LANES):
                x[start + k] = rows[0, k]

    def of(x):
        found = np.resize(np.asarray(x, np.float32), -(-len(x) // LANES) * LANES)
        run(found)
        return found[: len(x)]

    return of


@pytest.fixture(params=["AVX-512 where there is", "anywhere"])
def powers(request, monkeypatch):
    if request.param == "anywhere":
        monkeypatch.setattr(lanes, "_has_avx512", lambda context: False)

    @numba.njit(**IN_ORDER)
    def one(x):
        return exp2(x)

    return of_each(one)


def test_powers_of_two(powers):
    x = np.linspace(-125, 125, 200_001).astype(np.float32)
    exact = 2.0 ** x.astype(np.float64)
    assert np.abs(powers(x) / exact - 1).max() < 2.5e-7
    small = np.float32([1e-8, -1e-8, 1e-7, -1e-7, 1e-3, -1e-3])
    assert np.abs(powers(small) - 2.0 ** small.astype(np.float64)).max() < 7e-8
    assert np.array_equal(powers([0, 1, -1, 60, -60]), np.float32([1, 2, 0.5, 2.0**60, 2.0**-60]))


def test_powers_beyond_a_float(powers):
    low = powers([-126.5, -200, -1e4, -1e30, -3e38, -np.inf])
    assert np.all((low >= 0) & (low <= 2.0**-126))
    assert np.all(powers([127, 200, 1e4, 1e30, np.inf]) >= 2.0**126)


@pytest.mark.parametrize(
    ("function", "exact"),
    [(softplus, lambda x: np.logaddexp(0, x)), (sigmoid, lambda x: np.exp(-np.logaddexp(0, -x)))],
    ids=["softplus", "sigmoid"],
)
def test_softplus_and_its_slope(function, exact):
    run = of_each(function)
    x = np.concatenate([np.linspace(-87, 100, 200_001), np.linspace(-1, 1, 20_001)]).astype(np.float32)
    assert np.abs(run(x) / exact(x.astype(np.float64)) - 1).max() < 4e-7
    assert run([np.nan]) != run([np.nan])
    low = run([-87.5, -200, -1e30, -np.inf])
    assert np.all((low > 0) & (low < 2e-38))
    high = run([20, 21, 1e4, 1e30, np.inf])
    assert np.array_equal(high, np.float32([20, 21, 1e4, 1e30, np.inf] if function is softplus else [1] * 5))


@numba.njit(**IN_ORDER)
def through_tiles(x, first, width, start, count, moved, sums):
    rows = room(40)
    for t in range(40):
        rows[t] = vector(np.float32(7))  # what must not be seen
    load(rows, x, first, width, start, count)
    add_sums(sums, start, rows, count)
    for t in range(count):
        rows[t] = rows[t] * np.float32(2) + rows[t]
    store(rows, moved, first, width, start, count)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 37])
@pytest.mark.parametrize("width", [1, 15, 16])
@pytest.mark.parametrize("order", ["steps", "channels", "neither"])
def test_columns_become_rows_and_back(width, count, order):
    shape, cut = {
        "steps": ((20, 45), lambda x: x),
        "channels": ((45, 20), lambda x: x.T),
        "neither": ((20, 45, 2), lambda x: x[..., 1]),
    }[order]
    x, moved = cut(values(*shape)), cut(np.full(shape, 5, np.float32))
    sums = np.ones(45, np.float32)
    through_tiles(x, 3, width, 5, count, moved, sums)
    part = (slice(3, 3 + width), slice(5, 5 + count))
    expected = np.full_like(x, 5)  # what is not to be written stays
    expected[part] = 3 * x[part]
    assert np.allclose(moved, expected, rtol=1e-6)
    total = np.ones(45, np.float32)
    total[part[1]] += x[part].sum(0)
    assert np.allclose(sums, total, atol=1e-5)


def test_rows_of_an_array_may_lie_apart():
    x = values(16, 3, 20)
    moved, sums = np.zeros_like(x), np.zeros(20, np.float32)
    through_tiles(x[:, 1], 0, 16, 0, 20, moved[:, 1], sums)
    assert np.allclose(moved[:, 1], 3 * x[:, 1], rtol=1e-6)
    assert not moved[:, ::2].any()


def test_the_exponential_for_loops_of_floats():
    @numba.njit(**FLAGS)
    def run(x):
        for index in range(x.size):
            x[index] = _exp2(x[index] * LOG2_E)

    x = np.linspace(-80, 80, 10_001).astype(np.float32)
    found = x.copy()
    run(found)
    error = found / np.exp(x.astype(np.float64)) - 1
    assert np.abs(error).max() < 6e-6  # of rounding what is raised
