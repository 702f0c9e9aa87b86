"""Bases of functions of one variable, for Kolmogorov-Arnold networks: every function of a basis at once.

Drokin, "Kolmogorov-Arnold Convolutions: Design Principles and Empirical Studies" (2024), arXiv 2407.01092, and what it
rests on: B-splines (Liu et al., 2024), radial functions (Li, 2024), wavelets (Bozorgasl and Chen, 2024), Legendre,
Chebyshev, Jacobi and Gram polynomials, Bernstein polynomials, and bumps made of two ReLUs (Qiu et al., 2024).

A function of this file takes x of any shape and returns one value more per entry for each function of the basis, along
a new axis ``dim``, the last unless told otherwise. Nothing loops over the functions of a basis: polynomials are a table
of coefficients times the powers of x, which double in number with each step, and all others are closed forms.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import InputError

MOST_DEGREE = 12
"""Highest degree of a polynomial: beyond it float32 shows the cancellation between powers."""

# ---- polynomials -----------------------------------------------------------------------------------------------------


def along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return a vector so shaped that it runs along the axis ``dim`` that x (with that axis, of length 1) has."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return values.to(x.dtype).view(shape)


def contract(rows: Tensor, x: Tensor, dim: int, constants: Tensor | None = None) -> Tensor:
    """Return x with its axis ``dim`` (K) replaced by its products with ``rows`` (R, K), plus ``constants`` (R,).

    Args:
        rows, constants: of x's type.
        x: of any shape.
        dim: -1, or a number from 1 on.
    """
    if dim == -1:
        return F.linear(x, rows, constants)
    flat = x.flatten(dim + 1).flatten(0, dim - 1)  # (A, K, N)
    # A product of matrices of one number each is several times as fast as what ``rows @ x`` makes of it.
    batch = rows.expand(flat.shape[0], -1, -1)
    if constants is None:
        y = torch.bmm(batch, flat)
    else:
        y = torch.baddbmm(constants[:, None].expand(flat.shape[0], -1, flat.shape[2]), batch, flat)
    return y.view(*x.shape[:dim], len(rows), *x.shape[dim + 1 :])


class _Powers(torch.autograd.Function):
    """x, x^2, ...: autograd would keep and copy the powers at every doubling."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, dim: int) -> Tensor:
        found = x.new_empty((*x.shape[:dim], count, *x.shape[dim:]) if dim >= 0 else (*x.shape, count))
        found.select(dim, 0).copy_(x)
        have = 1
        while have < count:  # each round doubles their number
            more = min(have, count - have)
            last = found.narrow(dim, have - 1, 1)
            torch.mul(found.narrow(dim, 0, more), last, out=found.narrow(dim, have, more))
            have += more
        ctx.save_for_backward(found)
        ctx.dim = dim
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (found,), dim, (grad,) = ctx.saved_tensors, ctx.dim, grads
        count = found.shape[dim]
        if count == 1:
            return grad.squeeze(dim), None, None
        higher = grad.narrow(dim, 1, count - 1) * found.narrow(dim, 0, count - 1)
        degrees = torch.arange(2, count + 1, dtype=grad.dtype, device=grad.device)
        return grad.select(dim, 0) + contract(degrees[None], higher, dim).squeeze(dim), None, None


def powers(x: Tensor, count: int, dim: int = -1) -> Tensor:
    """Return x, x^2, ... x^count along a new axis ``dim``."""
    if not torch.compiler.is_exporting():
        return cast(Tensor, _Powers.apply(x, count, dim))
    found = step = x.unsqueeze(dim)
    while found.shape[dim] < count:
        found = torch.cat((found, found * step), dim)
        step = step * step
    return found.narrow(dim, 0, count)


def polynomials(x: Tensor, table: Tensor, dim: int = -1) -> Tensor:
    """Return polynomials of x along a new axis ``dim``.

    Args:
        x: of any shape.
        table: (K, degree + 1), the coefficients of 1, x, x^2, ... of each of the K polynomials; degree 1 or more.
        dim: where the new axis of length K stands.
    """
    table = table.to(x.dtype)
    return contract(table[:, 1:], powers(x, table.shape[1] - 1, dim), dim, table[:, 0])


@cache
def _jacobi_rows(degree: int, a: float, b: float) -> np.ndarray:
    """Return the coefficients of the Jacobi polynomials from their recurrence, (degree + 1, degree + 1)."""
    rows = np.zeros((degree + 2, degree + 2))
    rows[0, 0], rows[1, :2] = 1, ((a - b) / 2, (a + b + 2) / 2)
    for n in range(2, degree + 1):
        c = 2 * n + a + b
        lead = c * (c - 1) / (2 * n * (n + a + b))
        middle = (c - 1) * (a * a - b * b) / (2 * n * (n + a + b) * (c - 2))
        last = (n + a - 1) * (n + b - 1) * c / (n * (n + a + b) * (c - 2))
        rows[n] = lead * np.roll(rows[n - 1], 1) + middle * rows[n - 1] - last * rows[n - 2]
    return rows[: degree + 1, : degree + 1]


def jacobi_table(degree: int, a: float = 1.0, b: float = 1.0) -> Tensor:
    """Return the coefficients of the Jacobi polynomials up to ``degree``; a = b = 0 are Legendre's.

    Raises:
        InputError: a or b not above -1.
    """
    if not (a > -1 and b > -1):
        raise InputError(f"a = {a} and b = {b} make no Jacobi polynomials: give numbers above -1, such as 1.0")
    return torch.tensor(_jacobi_rows(degree, float(a), float(b)))


def legendre_table(degree: int) -> Tensor:
    """Return the coefficients of the Legendre polynomials up to ``degree``."""
    return jacobi_table(degree, 0.0, 0.0)


@cache
def _chebyshev_rows(degree: int) -> list[list[float]]:
    return [_padded(np.polynomial.chebyshev.cheb2poly(row), degree) for row in np.eye(degree + 1)]


def chebyshev_table(degree: int) -> Tensor:
    """Return the coefficients of the Chebyshev polynomials of the first kind up to ``degree``."""
    return torch.tensor(_chebyshev_rows(degree), dtype=torch.float64)


def bernstein_table(degree: int) -> Tensor:
    """Return the coefficients of the Bernstein polynomials of ``degree``, on [0, 1]."""
    n = degree
    return torch.tensor(
        [[math.comb(n, j) * math.comb(j, k) * (-1.0) ** (j - k) for j in range(n + 1)] for k in range(n + 1)],
        dtype=torch.float64,
    )


def bernoulli_table(degree: int) -> Tensor:
    """Return the coefficients of the Bernoulli polynomials up to ``degree``, on [0, 1]."""
    numbers = [1.0]
    for n in range(1, degree + 1):
        numbers.append(-sum(math.comb(n + 1, k) * numbers[k] for k in range(n)) / (n + 1))
    return torch.tensor(
        [_padded([math.comb(n, j) * numbers[n - j] for j in range(n + 1)], degree) for n in range(degree + 1)],
        dtype=torch.float64,
    )


def _padded(row: np.ndarray | list[float], degree: int) -> list[float]:
    return [*map(float, row), *[0.0] * (degree + 1 - len(row))]


def gram_factors(degree: int) -> Tensor:
    """Return what the learnt numbers of ``gram_table`` are multiplied by, (degree + 1,); the first and last count not.

    With n = 1, 2, ... and m = n + 1: (m + n) (m - n) n^2 / (m^2 / (4 n^2 - 1)).
    """
    n = torch.arange(degree + 1, dtype=torch.float64)
    m = n + 1
    return (m + n) * (m - n) * n**2 * (4 * n**2 - 1) / m**2


def gram_table(beta: Tensor) -> Tensor:
    """Return the coefficients of the Gram polynomials whose recurrence has learnt factors.

    P_0 = 1, P_1 = x, P_(n+1) = x P_n - f_n beta_n P_(n-1), with f of ``gram_factors``.

    Args:
        beta: (degree + 1,), learnt; gradients go through.
    """
    degree = len(beta) - 1
    rows = list(torch.eye(degree + 1, dtype=beta.dtype, device=beta.device)[:2])
    factors = gram_factors(degree).to(beta) * beta
    # This recurrence is of (degree + 1) numbers a step: the values of x have no part in it.
    for n in range(1, degree):
        rows.append(F.pad(rows[n][:-1], (1, 0)) - factors[n] * rows[n - 1])
    return torch.stack(rows)


def gram(x: Tensor, beta: Tensor, dim: int = -1) -> Tensor:
    """Return the Gram polynomials of x, in [-1, 1], with the learnt ``beta`` (degree + 1,)."""
    return polynomials(x, gram_table(beta), dim)


# ---- bumps -----------------------------------------------------------------------------------------------------------


class _Radial(torch.autograd.Function):
    """Gaussian bumps: autograd would keep three times as much, and sum over the bumps in as many steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, centres: Tensor, width: float, dim: int) -> Tensor:
        scaled = x.unsqueeze(dim) / width
        found = scaled - along(centres / width, scaled, dim)
        torch.addcmul(found.new_zeros(()), found, found, value=-1, out=found).exp_()
        ctx.save_for_backward(x, centres, found)
        ctx.width, ctx.dim = width, dim
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, centres, found = ctx.saved_tensors
        rows = torch.stack((torch.ones_like(centres), centres)).to(found.dtype)
        total, weighted = contract(rows, grads[0] * found, ctx.dim).unbind(ctx.dim)
        return 2 / ctx.width**2 * (weighted - x * total), None, None, None


def radial(x: Tensor, centres: Tensor, width: float, dim: int = -1) -> Tensor:
    """Return exp(-((x - c) / width)^2) for each centre c, (K,), which takes no gradient."""
    if not torch.compiler.is_exporting():
        return cast(Tensor, _Radial.apply(x, centres, width, dim))
    x = x.unsqueeze(dim)
    return (-(((x - along(centres, x, dim)) / width) ** 2)).exp()


def spline_centres(grid_size: int, order: int, low: float, high: float) -> Tensor:
    """Return the middles of the grid_size + order B-splines of an even grid with ``grid_size`` intervals."""
    step = (high - low) / grid_size
    numbers = torch.arange(grid_size + order, dtype=torch.float64)
    return low + step * (numbers - (order - 1) / 2)


def splines(x: Tensor, centres: Tensor, step: float, order: int, dim: int = -1) -> Tensor:
    """Return B-splines of ``order`` on an even grid, of which each is the same bump at another centre.

    Args:
        x: of any shape; beyond the grid the bumps fall to 0.
        centres: (K,), as of ``spline_centres``.
        step: between knots.
        order: degree of the pieces, 1 or more; 3 is cubic.
        dim: where the new axis stands.
    """
    x = x.unsqueeze(dim)
    away = ((x - along(centres, x, dim)) / step).abs()
    half = (order + 1) / 2
    # 1/k! sum_j (-1)^j C(k + 1, j) (half - j - |u|)_+^k: by symmetry, half of the terms of the truncated powers do.
    pieces = [
        (-1) ** j * math.comb(order + 1, j) / math.factorial(order) * (half - j - away).relu() ** order
        for j in range(math.ceil(half))
    ]
    return sum(pieces[1:], pieces[0])


def relu_bumps(x: Tensor, low: Tensor, high: Tensor, scale: float, dim: int = -1) -> Tensor:
    """Return (relu(x - low) relu(high - x) scale)^2, with bounds that broadcast with x and its new axis."""
    x = x.unsqueeze(dim)
    return ((x - low).relu() * (high - x).relu() * scale) ** 2


# ---- wavelets --------------------------------------------------------------------------------------------------------


def mexican_hat(x: Tensor) -> Tensor:
    """Return the second derivative of a Gaussian, as published without its minus sign."""
    return 2 / (math.sqrt(3) * math.pi**0.25) * (x**2 - 1) * (-0.5 * x**2).exp()


def morlet(x: Tensor) -> Tensor:
    """Return the real Morlet wavelet of frequency 5."""
    return (-0.5 * x**2).exp() * (5 * x).cos()


def gaussian_derivative(x: Tensor) -> Tensor:
    """Return the derivative of a Gaussian."""
    return -x * (-0.5 * x**2).exp()


def meyer(x: Tensor) -> Tensor:
    """Return the sine under Meyer's window."""
    away = x.abs()
    t = (2 * away - 1).clamp(0, 1)
    fade = (math.pi / 2 * t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)).cos()
    return (math.pi * away).sin() * fade


def shannon(x: Tensor) -> Tensor:
    """Return sin(x) / x; the published code puts a Hamming window over the input channels upon it."""
    return torch.sinc(x / math.pi)


WAVELETS = {
    "mexican_hat": mexican_hat,
    "morlet": morlet,
    "dog": gaussian_derivative,
    "meyer": meyer,
    "shannon": shannon,
}
"""Mother wavelets by their published names."""
