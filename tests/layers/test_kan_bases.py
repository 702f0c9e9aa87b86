import math

import numpy as np
import pytest
import torch
from scipy import special
from scipy.interpolate import BSpline

from exact import normal, same
from vitrail.errors import InputError
from vitrail.layers import kan_bases as kb

X = normal(3, 7).tanh()


def slow_gram(x, beta):
    rows = [torch.ones_like(x), x]
    for i in range(2, len(beta)):
        n, m = i - 1, i
        factor = ((m + n) * (m - n) * n**2) / (m**2 / (4.0 * n**2 - 1.0)) * beta[n]
        rows.append(x * rows[-1] - factor * rows[-2])
    return torch.stack(rows, -1)


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 8])
def test_polynomials_are_the_textbooks(degree):
    tables = {
        special.eval_legendre: kb.legendre_table(degree),
        special.eval_chebyt: kb.chebyshev_table(degree),
        lambda n, x: special.eval_jacobi(n, 1.5, -0.5, x): kb.jacobi_table(degree, 1.5, -0.5),
        lambda n, x: special.comb(degree, n) * x**n * (1 - x) ** (degree - n): kb.bernstein_table(degree),
    }
    for slow, table in tables.items():
        expected = np.stack([slow(n, X.numpy()) for n in range(degree + 1)], -1)
        np.testing.assert_allclose(kb.polynomials(X, table), expected, atol=1e-10)


def test_bernoulli_polynomials_differ_by_powers():
    found = kb.polynomials(X + 1, kb.bernoulli_table(6)) - kb.polynomials(X, kb.bernoulli_table(6))
    torch.testing.assert_close(found, torch.stack([n * X ** max(n - 1, 0) for n in range(7)], -1))
    assert kb.bernoulli_table(2)[:, 0].tolist() == pytest.approx([1, -1 / 2, 1 / 6])


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6])
def test_gram_polynomials_follow_their_recurrence(degree):
    x, beta = X.clone().requires_grad_(), (0.1 * normal(degree + 1, seed=2)).requires_grad_()
    slow, fast = slow_gram(x, beta), kb.gram(x, beta)
    same(fast, slow, [x] if degree < 2 else [x, beta])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("dim", [-1, 1, 2])
def test_powers_double(count, dim):
    x = normal(2, 3, 4).requires_grad_()
    slow = torch.stack([x**n for n in range(1, count + 1)], dim)
    same(kb.powers(x, count, dim), slow, [x])


@pytest.mark.parametrize("dim", [-1, 1, 2])
def test_radial_bumps(dim):
    x, centres = (3 * normal(2, 3, 4)).requires_grad_(), torch.linspace(-2, 2, 5).double()
    slow = torch.stack([(-(((x - centre) / 0.7) ** 2)).exp() for centre in centres], dim)
    same(kb.radial(x, centres, 0.7, dim), slow, [x])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [2, 5])
def test_splines_are_those_of_an_even_grid(order, size):
    step = 3 / size
    knots = -1 + step * np.arange(-order, size + order + 1)
    x = torch.linspace(-4, 5, 91).double() + 1e-3
    bumps = [BSpline.basis_element(knots[i : i + order + 2], extrapolate=False) for i in range(size + order)]
    expected = np.stack([np.nan_to_num(bump(x.numpy())) for bump in bumps], -1)
    centres = kb.spline_centres(size, order, -1, 2)
    np.testing.assert_allclose(kb.splines(x, centres, step, order), expected, atol=1e-12)
    inside = kb.splines(torch.linspace(-1, 2, 20).double(), centres, step, order)
    np.testing.assert_allclose(inside.sum(-1), 1)


def test_relu_bumps():
    low, high = torch.tensor([-0.6, 0.0]).double(), torch.tensor([0.2, 0.8]).double()
    found = kb.relu_bumps(X, low, high, 6.25)
    for i, value in enumerate(X.flatten()):
        for k in range(2):
            expected = (max(value - low[k], 0) * max(high[k] - value, 0) * 6.25) ** 2
            assert float(found.flatten(0, 1)[i, k]) == pytest.approx(float(expected))


def test_wavelets():
    for x in np.linspace(-3, 3, 37):
        v = abs(x)
        t = 2 * v - 1
        nu = t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)
        window = 1.0 if v <= 0.5 else 0.0 if v >= 1 else math.cos(math.pi / 2 * nu)
        expected = {
            "mexican_hat": 2 / (math.sqrt(3) * math.pi**0.25) * (x * x - 1) * math.exp(-x * x / 2),
            "morlet": math.cos(5 * x) * math.exp(-x * x / 2),
            "dog": -x * math.exp(-x * x / 2),
            "meyer": math.sin(math.pi * v) * window,
            "shannon": math.sin(x) / x if x else 1.0,
        }
        for name, value in expected.items():
            found = kb.WAVELETS[name](torch.tensor([x], dtype=torch.float64))
            assert float(found) == pytest.approx(value, abs=1e-12), name


def test_they_are_the_same_when_exported(monkeypatch):
    x, centres = normal(2, 3), torch.linspace(-1, 1, 3).double()
    expected = kb.powers(x, 5, 1), kb.radial(x, centres, 0.5, 2)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close((kb.powers(x, 5, 1), kb.radial(x, centres, 0.5, 2)), expected)


def test_a_wrong_jacobi_is_refused():
    with pytest.raises(InputError, match=r"a = -1.0 and b = 0"):
        kb.jacobi_table(3, -1.0, 0.0)
