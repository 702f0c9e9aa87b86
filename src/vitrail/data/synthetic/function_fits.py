"""Seven functions to fit: oscillating, product-like, composed, with steps and with corners.

Yang et al., "Activation Space Selectable Kolmogorov-Arnold Networks" (2024), arXiv 2408.08338, fit seven functions, of
which only the number could be read. The first four are those of Liu et al., "KAN: Kolmogorov-Arnold Networks" (2024),
arXiv 2404.19756, on which they build; the others are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vitrail.errors import unknown


def _bessel(x: Tensor) -> Tensor:
    return torch.special.bessel_j0(20 * x[:, 0])


def _exponential(x: Tensor) -> Tensor:
    return ((math.pi * x[:, 0]).sin() + x[:, 1] ** 2).exp()


def _product(x: Tensor) -> Tensor:
    return x[:, 0] * x[:, 1]


def _composed(x: Tensor) -> Tensor:
    waves = (math.pi * (x[:, :2] ** 2).sum(1)).sin() + (math.pi * (x[:, 2:] ** 2).sum(1)).sin()
    return (waves / 2).exp()


def _steps(x: Tensor) -> Tensor:
    return (3 * x[:, 0]).floor() / 3


def _corners(x: Tensor) -> Tensor:
    return (x[:, 0] - x[:, 1]).abs()


def _chirp(x: Tensor) -> Tensor:
    return (4 * math.pi * x[:, 0] ** 2).sin() * (-(x[:, 0] ** 2)).exp()


FUNCTIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "bessel": (1, _bessel),
    "exponential": (2, _exponential),
    "product": (2, _product),
    "composed": (4, _composed),
    "steps": (1, _steps),
    "corners": (2, _corners),
    "chirp": (1, _chirp),
}
"""Numbers of variables, each in [-1, 1], and functions of (N, variables)."""


def function_fit(name: str, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return points, drawn evenly from [-1, 1], and the values of a function there, scaled to a deviation of 1.

    Args:
        name: of ``FUNCTIONS``.
        count: points.
        seed: of the points; the scale is that of 4096 points of seed 0.

    Returns:
        (N, variables) and (N, 1), float32.

    Raises:
        UnknownName: another function.
    """
    if name not in FUNCTIONS:
        raise unknown("function", name, FUNCTIONS, f"there are {', '.join(FUNCTIONS)}")
    variables, function = FUNCTIONS[name]

    def points(number: int, draw: int) -> Tensor:
        return 2 * torch.rand(number, variables, generator=torch.Generator().manual_seed(draw)) - 1

    norm = function(points(4096, 0))
    x = points(count, seed)
    return x, ((function(x) - norm.mean()) / norm.std())[:, None]
