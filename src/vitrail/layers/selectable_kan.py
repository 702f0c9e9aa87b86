"""Kolmogorov-Arnold layers that choose for each node in which space of functions its activations live.

Yang, Zhang, Luo, Lu and Shen, "Activation Space Selectable Kolmogorov-Arnold Networks" (2024), arXiv 2408.08338. A
layer of one basis does well on some functions and badly on others. Here each node, a feature or a channel that comes
in, has functions of several spaces at first, weighted by shares that are learnt (full training); then it keeps the
space of the largest share (selective training); and what was not chosen is taken out (pruning).

Shapes: B samples, C nodes, S spaces, K functions of a space; ``...`` stands for the places of a convolution, if any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers import kan_bases


def _spline(x: Tensor, count: int) -> Tensor:
    """Cubic B-splines on [-1, 1]."""
    order = min(3, count - 1)
    size = count - order
    return kan_bases.splines(x, kan_bases.spline_centres(size, order, -1, 1).to(x.device), 2 / size, order, 1)


def _radial(x: Tensor, count: int) -> Tensor:
    """Gaussian bumps on [-2, 2]."""
    return kan_bases.radial(x, torch.linspace(-2, 2, count, device=x.device, dtype=x.dtype), 4 / (count - 1), 1)


def _chebyshev(x: Tensor, count: int) -> Tensor:
    """Chebyshev polynomials of degrees 1 to ``count`` of tanh(x)."""
    return kan_bases.polynomials(x.tanh(), kan_bases.chebyshev_table(count)[1:].to(x.device), 1)


def _legendre(x: Tensor, count: int) -> Tensor:
    """Legendre polynomials of degrees 1 to ``count`` of tanh(x)."""
    return kan_bases.polynomials(x.tanh(), kan_bases.legendre_table(count)[1:].to(x.device), 1)


def _wavelet(x: Tensor, count: int) -> Tensor:
    """Mexican hats with even centres on [-1, 1], as wide as these are apart."""
    centres = torch.linspace(-1, 1, count, device=x.device, dtype=x.dtype)
    x = x.unsqueeze(1)
    return kan_bases.mexican_hat((x - kan_bases.along(centres, x, 1)) * (count - 1) / 2)


def _fourier(x: Tensor, count: int) -> Tensor:
    """Sines and cosines of pi x, 2 pi x, ..."""
    waves = torch.arange(count, device=x.device)
    x = x.unsqueeze(1)
    turn = math.pi * kan_bases.along(waves // 2 + 1, x, 1) * x
    return torch.where(kan_bases.along(waves % 2, x, 1) > 0, turn.cos(), turn.sin())


SPACES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "spline": _spline,
    "radial": _radial,
    "chebyshev": _chebyshev,
    "legendre": _legendre,
    "wavelet": _wavelet,
    "fourier": _fourier,
}
"""From (B, C, ...) and K to (B, K, C, ...)."""
DEFAULT = ("spline", "chebyshev", "wavelet")
LEAST, MOST = 2, kan_bases.MOST_DEGREE
"""Functions of a space."""


class SelectableKAN(nn.Module):
    """A layer whose nodes choose among spaces of functions: of vectors, or a convolution of planes.

    y = base(SiLU(x)) + sum over spaces s, nodes c and functions k of gate(s, c) w(s, k, c) phi(s, k)(x_c)

    Args:
        in_features, out_features: nodes that come in and go out, or channels; multiples of ``groups``.
        kernel_size: of a convolution; None is a layer of vectors (B, C).
        stride, padding, dilation, groups: of a convolution.
        spaces: different names of ``SPACES``, one or more; with one there is nothing to choose.
        size: K, functions of each space, ``LEAST`` to ``MOST``.
        bias: whether something is added to each output.

    Attributes:
        selected: (C,), the number of the space that each node has chosen, or -1.

    Raises:
        InputError: a value that is not allowed.
        UnknownName: another space.
    """

    selected: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        spaces: Sequence[str] = DEFAULT,
        size: int = 4,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_spaces(spaces, size)
        if groups < 1 or in_features % groups or out_features % groups:
            raise InputError(
                f"groups = {groups} does not divide {in_features} input and {out_features} output channels: give a "
                "number that divides both, such as 1"
            )
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.spaces, self.size, self.linear = tuple(spaces), size, kernel_size is None
        kernel = (
            () if kernel_size is None else (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        )
        self.where: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        inside = in_features // groups
        self.base: nn.Module = (
            nn.Linear(in_features, out_features, bias=bias)
            if kernel_size is None
            else nn.Conv2d(in_features, out_features, kernel, bias=bias, **self.where)  # type: ignore[arg-type]
        )
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(len(spaces), out_features, size, inside, *kernel))
        # At first every space has an equal share of the deviation of a linear layer.
        bound = math.sqrt(3 / (size * inside * math.prod(kernel)))
        nn.init.uniform_(self.weight, -bound, bound)
        self.shares: nn.Parameter | None = nn.Parameter(torch.zeros(len(spaces), in_features))
        self.register_buffer("selected", torch.full((in_features,), -1))
        self.kept: list[tuple[str, list[int]]] | None = None

    def gates(self) -> Tensor:
        """Return what the functions of each space and node count, (S, C): shares, or the choice."""
        if self.shares is None:
            raise InputError("the layer is pruned and has no shares any more: prune a copy to keep them")
        chosen = F.one_hot(self.selected.clamp_min(0), len(self.spaces)).T
        return torch.where(self.selected >= 0, chosen.to(self.shares.dtype), self.shares.softmax(0))

    @torch.no_grad()
    def select(self) -> None:
        """Let each node that has not chosen yet keep the space of its largest share; its output stays as it is."""
        if self.shares is None or self.weight is None:
            return
        fresh = self.selected < 0
        gates, best = self.gates(), self.shares.argmax(0)
        factor = torch.where(fresh, gates, torch.ones_like(gates)).unflatten(1, (self.groups, -1))  # (S, G, C / G)
        weight = self.weight.unflatten(1, (self.groups, -1))  # (S, G, O / G, K, C / G, ...)
        weight.mul_(
            factor[:, :, None, None].reshape(*factor.shape[:2], 1, 1, factor.shape[2], *[1] * (weight.ndim - 5))
        )
        self.selected.copy_(torch.where(fresh, best, self.selected))

    def reparameterize(self) -> None:
        """Prune: keep the chosen functions alone. A layer that has not chosen, or has groups, stays as it is."""
        if self.weight is None or self.groups > 1 or bool((self.selected < 0).any()):
            return
        chosen = self.selected.tolist()
        kept = [(name, [c for c, s in enumerate(chosen) if s == number]) for number, name in enumerate(self.spaces)]
        self.kept = [(name, nodes) for name, nodes in kept if nodes]
        parts = [self.weight[self.spaces.index(name)][:, :, nodes].flatten(1, 2) for name, nodes in self.kept]
        self.chosen_weight = nn.Parameter(torch.cat(parts, 1).detach())
        self.weight = self.shares = None

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C') or (B, C', H', W')."""
        if x.ndim != (2 if self.linear else 4) or x.shape[1] != self.in_features:
            wanted = f"(B, {self.in_features}{'' if self.linear else ', H, W'})"
            raise InputError(f"a selectable KAN layer met {tuple(x.shape)}: give {wanted}")
        y = self.base(F.silu(x))
        if self.weight is None:
            found = [SPACES[name](x[:, nodes], self.size).flatten(1, 2) for name, nodes in self.kept or ()]
            return y + self._combined(torch.cat(found, 1), self.chosen_weight)
        gates = self.gates().to(x.dtype)
        parts = [SPACES[name](x, self.size) * _over(gate, x) for name, gate in zip(self.spaces, gates)]
        functions = torch.stack(parts, 1).flatten(1, 2)  # (B, S K, C, ...)
        weight = self.weight.transpose(0, 1).flatten(1, 2)  # (O, S K, C / G, ...)
        if self.groups > 1:
            grouped = functions.unflatten(2, (self.groups, -1)).transpose(1, 2)  # (B, G, S K, C / G, ...)
            return y + self._combined(grouped.flatten(1, 3), weight.flatten(1, 2))
        return y + self._combined(functions.flatten(1, 2), weight.flatten(1, 2))

    def _combined(self, functions: Tensor, weight: Tensor) -> Tensor:
        return F.linear(functions, weight) if self.linear else F.conv2d(functions, weight, **self.where)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{self.in_features}, {self.out_features}, spaces={self.spaces}, size={self.size}"


def _over(gate: Tensor, x: Tensor) -> Tensor:
    return gate.view(-1, *[1] * (x.ndim - 2))


def check_spaces(spaces: Sequence[str], size: int) -> None:
    """Refuse spaces or a number of functions that a layer cannot have.

    Raises:
        InputError: no space, one twice, or a number that is not allowed.
        UnknownName: another space.
    """
    for name in spaces:
        if name not in SPACES:
            raise unknown("space", name, SPACES, f"there are {', '.join(SPACES)}")
    if not spaces or len(set(spaces)) != len(spaces) or isinstance(spaces, str):
        raise InputError(f"spaces = {spaces!r} is not allowed: give one or more different names of {', '.join(SPACES)}")
    if not isinstance(size, int) or not LEAST <= size <= MOST:
        raise InputError(f"size = {size!r} is not allowed: give {LEAST} to {MOST} functions")


def select(model: nn.Module) -> int:
    """Let all nodes of a model choose their space; return how many layers had one to choose."""
    layers = [module for module in model.modules() if isinstance(module, SelectableKAN)]
    for layer in layers:
        layer.select()
    return len(layers)


def selection(model: nn.Module) -> list[dict[str, Any]]:
    """Return what the nodes of a model chose, or, before they chose, what has the largest share.

    Returns:
        A row for each layer and space: ``layer``, ``space``, ``nodes`` that have it, ``share`` of the layer's nodes,
        and ``chosen``, whether the choice is made.

    Raises:
        InputError: a model without such layers.
    """
    rows = []
    for name, layer in model.named_modules():
        if isinstance(layer, SelectableKAN):
            done = bool((layer.selected >= 0).all())
            best = layer.selected if layer.shares is None or done else layer.shares.argmax(0)
            for number, space in enumerate(layer.spaces):
                nodes = int((best == number).sum())
                share = nodes / layer.in_features
                rows.append({"layer": name, "space": space, "nodes": nodes, "share": share, "chosen": done})
    if not rows:
        raise InputError(
            f"{type(model).__name__} has no layers with selectable activations: add the edit skan, or take "
            "sconvkan_nano"
        )
    return rows
