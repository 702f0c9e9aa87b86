"""Kolmogorov-Arnold convolutions: a kernel of functions in the place of a kernel of numbers.

Drokin, "Kolmogorov-Arnold Convolutions: Design Principles and Empirical Studies" (2024), arXiv 2407.01092, and its code
(IvanDrokin/torch-conv-kan). Every input channel and place of the kernel has a function of its own for every output
channel: an activation times a number, and a sum over a basis. So a layer is a convolution of the activated input plus a
convolution of its basis functions, then a normalisation and an activation.

    KANConv             the layer, in one, two or three dimensions, for every basis
    BottleneckKANConv   the basis sees fewer channels, through 1x1 convolutions
    BottleneckKANExperts, KANConvExperts   mixtures of experts inside the bottleneck, and of whole layers
    KANSelfAttention, KANFocalModulation   attention and focal modulation whose projections are such layers
    TunedKANConv        a trained layer of which a part of the basis learns on
    NoiseInjection      noise in the place of dropout

Shapes: B images, C channels, K functions of a basis, G groups, E experts; ``...`` stands for 1, 2 or 3 axes of places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers import kan_bases

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_NORMS: dict[str, dict[int, Any]] = {
    "instance": {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
NORMS = (*_NORMS, "none")
_DROPOUT: dict[int, Any] = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
Sides = int | Sequence[int]

# ---- the basis, as a module ------------------------------------------------------------------------------------------


class Polynomials(nn.Module):
    """All polynomials of a table but for the first where it is constant: ``constant`` has its value, or 0."""

    table: Tensor

    def __init__(self, table: Tensor, constant: float) -> None:
        super().__init__()
        self.constant = constant
        self.register_buffer("table", (table[1:] if constant else table).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, G, K, C, ...) of (B, G, C, ...)."""
        return kan_bases.polynomials(x, self.table, 2)


class Gram(nn.Module):
    """The SiLU of Gram polynomials with learnt factors, but for that of degree 0, which is ``constant``."""

    constant = 1 / (1 + math.exp(-1))

    def __init__(self, degree: int, std: float) -> None:
        super().__init__()
        self.beta = nn.Parameter(std * torch.randn(degree + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, G, K, C, ...) of (B, G, C, ...)."""
        return F.silu(kan_bases.polynomials(x, kan_bases.gram_table(self.beta)[1:], 2))


class Radial(nn.Module):
    """Gaussian bumps on an even grid, as wide as they are apart."""

    constant = 0.0
    centres: Tensor

    def __init__(self, grid_size: int, low: float, high: float) -> None:
        super().__init__()
        self.width = (high - low) / (grid_size - 1)
        self.register_buffer("centres", torch.linspace(low, high, grid_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, G, K, C, ...) of (B, G, C, ...)."""
        return kan_bases.radial(x, self.centres, self.width, 2)


class Splines(nn.Module):
    """B-splines on an even grid."""

    constant = 0.0
    centres: Tensor

    def __init__(self, grid_size: int, order: int, low: float, high: float) -> None:
        super().__init__()
        self.step, self.order = (high - low) / grid_size, order
        centres = kan_bases.spline_centres(grid_size, order, low, high).float()
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, G, K, C, ...) of (B, G, C, ...)."""
        return kan_bases.splines(x, self.centres, self.step, self.order, 2)


class ReLUBumps(nn.Module):
    """Bumps of two ReLUs, whose bounds each channel of a group learns."""

    constant = 0.0

    def __init__(self, grid_size: int, order: int, channels: int, axes: int) -> None:
        super().__init__()
        low = torch.arange(-order, grid_size) / grid_size
        shape = (len(low), channels, *[1] * axes)
        self.low = nn.Parameter(low.view(-1, *[1] * (axes + 1)).expand(shape).clone())
        self.high = nn.Parameter(self.low.detach() + (order + 1) / grid_size)
        self.scale = 4 * grid_size**2 / (order + 1) ** 2

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, G, K, C, ...) of (B, G, C, ...)."""
        return kan_bases.relu_bumps(x, self.low, self.high, self.scale, 2)


class Wavelets(nn.Module):
    """One wavelet for each pair of an input and an output channel of a group, with learnt place and width."""

    constant = 0.0
    window: Tensor

    def __init__(self, wavelet: str, channels: int, out_channels: int, groups: int, axes: int) -> None:
        super().__init__()
        if wavelet not in kan_bases.WAVELETS:
            raise unknown("wavelet", wavelet, kan_bases.WAVELETS, f"there are {', '.join(kan_bases.WAVELETS)}")
        self.wavelet = wavelet
        shape = (groups, out_channels, channels, *[1] * axes)
        self.scale = nn.Parameter(torch.ones(shape))
        self.translation = nn.Parameter(torch.zeros(shape))
        window = torch.hamming_window(channels, periodic=False) if wavelet == "shannon" else torch.ones(channels)
        self.register_buffer("window", window.view(-1, *[1] * axes), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, G, K, C, ...) of (B, G, C, ...), with a K for each output channel of the group."""
        found = kan_bases.WAVELETS[self.wavelet]((x.unsqueeze(2) - self.translation) / self.scale)
        return found * self.window if self.wavelet == "shannon" else found


# ---- what the published layers of each basis do around it ------------------------------------------------------------

Placement = Literal["full", "poly", "degree", "out"]
PLACEMENTS = ("full", "poly", "degree", "out")
"""Of dropout: before all, before the basis, after the basis, after the layer."""


def _per_image(x: Tensor) -> Tensor:
    """Return x of (B, G, C, ...) stretched to [-1, 1] by its extremes in each image and group."""
    axes = tuple(range(2, x.ndim))
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return 2 * (x - low) / (high - low).clamp_min(1e-12) - 1


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Form:
    """A published layer.

    Attributes:
        squash: what brings (B, G, C, ...) to where the basis lives.
        base: the activation of the base convolution's input; None is no base convolution.
        act: the activation behind the normalisation; "prelu" learns its slope.
        placement: of dropout.
        small: whether weights begin with the published deviation 1 / (C K k^n).
        norm_first: whether the normalisation is of what the basis is taken of, and not of the sum.
    """

    squash: Callable[[Tensor], Tensor]
    base: Callable[[Tensor], Tensor] | None
    act: str
    placement: Placement
    small: bool = False
    norm_first: bool = False


FORMS = {
    "spline": Form(_identity, F.gelu, "prelu", "out"),
    "rbf": Form(_identity, F.silu, "none", "poly", norm_first=True),
    "wavelet": Form(_identity, F.silu, "none", "poly"),
    "legendre": Form(_per_image, _identity, "silu", "poly"),
    "chebyshev": Form(torch.tanh, None, "none", "out", small=True),
    "gram": Form(torch.tanh, F.silu, "silu", "poly"),
    "bernstein": Form(torch.sigmoid, _identity, "silu", "poly"),
    "bernoulli": Form(torch.sigmoid, _identity, "silu", "poly"),
    "jacobi": Form(torch.tanh, _identity, "silu", "degree", small=True),
    "relu": Form(_identity, F.silu, "silu", "full"),
}
"""By the name of the basis. The published code's "Bernstein polynomials" are all 1: see the card."""
POLYNOMIALS: dict[str, Callable[..., Tensor]] = {
    "legendre": kan_bases.legendre_table,
    "chebyshev": kan_bases.chebyshev_table,
    "bernstein": kan_bases.bernstein_table,
    "bernoulli": kan_bases.bernoulli_table,
    "jacobi": kan_bases.jacobi_table,
}
GRIDS = {"spline": (5, -1.0, 1.0), "rbf": (8, -2.0, 2.0), "relu": (5, 0.0, 1.0)}
"""Published grids: intervals or bumps, and the ends."""


class NoiseInjection(nn.Module):
    """Add noise to some entries in training, as large as ``alpha`` deviations of their channel.

    Args:
        p: share of the entries, in [0, 1].
        alpha: deviation of the noise over that of the channel.
    """

    def __init__(self, p: float = 0.05, alpha: float = 0.05) -> None:
        super().__init__()
        self.p, self.alpha = p, alpha

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, C, ...), in training with noise."""
        if not self.training:
            return x
        spread = x.std([axis for axis in range(x.ndim) if axis != 1], keepdim=True)
        return x + self.alpha * (torch.rand_like(x) < self.p) * torch.randn_like(x) * spread


class KANConv(nn.Module):
    """A Kolmogorov-Arnold convolution of (B, C, ...).

    Args:
        in_channels, out_channels: multiples of ``groups``.
        kernel_size, stride, padding, dilation: as of ``torch.nn.Conv2d``, numbers or one for each axis.
        groups: G, each of which sees its own channels.
        basis: a name of ``FORMS``.
        degree: of polynomials, 1 to ``kan_bases.MOST_DEGREE``, or order of splines and of ReLU bumps.
        grid_size: of "spline", "rbf" and "relu"; None is the published one of ``GRIDS``.
        grid_range: its two ends, of "spline" and "rbf"; None are the published ones.
        wavelet: a name of ``kan_bases.WAVELETS``.
        a, b: of Jacobi polynomials, above -1.
        axes: 1, 2 or 3.
        base: whether there is a base convolution, where the published layer has one.
        act: whether there is the published layer's last activation.
        norm: one of ``NORMS``.
        affine: whether the normalisation learns a scale and a shift.
        bias: whether something is added to each output channel.
        dropout: share of channels, in [0, 1).
        placement: of dropout, of ``PLACEMENTS``; None is the published one of the basis.
        noise: inject noise in the place of dropout.

    Raises:
        InputError: a value that is not allowed.
        UnknownName: another basis, wavelet, normalisation or placement.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sides,
        stride: Sides = 1,
        padding: Sides | str = 0,
        dilation: Sides = 1,
        groups: int = 1,
        *,
        basis: str = "gram",
        degree: int = 3,
        grid_size: int | None = None,
        grid_range: Sequence[float] | None = None,
        wavelet: str = "mexican_hat",
        a: float = 1.0,
        b: float = 1.0,
        axes: int = 2,
        base: bool = True,
        act: bool = True,
        norm: str = "instance",
        affine: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        placement: str | None = None,
        noise: bool = False,
    ) -> None:
        super().__init__()
        check_basis(basis, degree, grid_size, grid_range, norm, dropout, placement)
        if axes not in CONV:
            raise InputError(f"axes = {axes} is not allowed: give 1, 2 or 3")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise InputError(
                f"groups = {groups} does not divide {in_channels} input and {out_channels} output channels: give a "
                "number that divides both, such as 1"
            )
        form = FORMS[basis]
        kernel = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
        self.kind, self.groups, self.axes, self.kernel_size = basis, groups, axes, kernel
        self.in_channels, self.out_channels = in_channels, out_channels
        self.placement = placement or form.placement
        self.where: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        inside, outside = in_channels // groups, out_channels // groups
        places = math.prod(kernel)

        if base and form.base:
            self.base = CONV[axes](in_channels, out_channels, kernel, groups=groups, bias=False, **self.where)
            nn.init.kaiming_uniform_(self.base.weight, nonlinearity="linear")
        else:
            self.base = None
        count, self.basis = _basis(
            basis, degree, grid_size, grid_range, wavelet, (a, b), inside, outside, groups, axes, in_channels * places
        )
        # Wavelets are of one output channel each, so their convolution has a group for each.
        self.weight = nn.Parameter(torch.empty(out_channels, count * inside, *kernel))
        self.mix = None
        fan_in = count * inside * places
        if basis == "wavelet":
            self.mix = CONV[axes](out_channels, out_channels, 1, groups=groups, bias=False)
            nn.init.kaiming_uniform_(self.mix.weight, nonlinearity="linear")
        elif basis == "gram" or basis in ("legendre", "bernstein", "bernoulli"):
            fan_in *= outside  # the published weights have an axis of groups before, and their fan-in counts the next
        if form.small:
            nn.init.normal_(self.weight, std=1 / (in_channels * count * places))
        else:
            nn.init.uniform_(self.weight, -math.sqrt(3 / fan_in), math.sqrt(3 / fan_in))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.norm = make_norm(norm, in_channels if form.norm_first else out_channels, axes, affine)
        self.act: nn.Module = nn.Identity()
        if act and form.act != "none":
            self.act = nn.PReLU() if form.act == "prelu" else nn.SiLU()
        drop: nn.Module = NoiseInjection(dropout) if noise else _DROPOUT[axes](dropout)
        self.drop = drop if dropout else nn.Identity()

    def _drop(self, x: Tensor, place: str) -> Tensor:
        return self.drop(x) if place == self.placement else x

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', ...)."""
        return self.combined(x, self.basis, self.weight)

    def combined(self, x: Tensor, basis: Any, weight: Tensor) -> Tensor:
        """Return (B, C', ...) of x with a basis and its weights (C', K C / G, ...)."""
        if x.ndim != self.axes + 2 or x.shape[1] != self.in_channels:
            raise InputError(
                f"a KAN convolution of {self.in_channels} channels and {self.axes} axes of places met "
                f"{tuple(x.shape)}: give (B, {self.in_channels}, ...)"
            )
        form = FORMS[self.kind]
        x = self._drop(x, "full")
        y = self.expanded(self.norm(x) if form.norm_first else x, basis, weight)
        if self.base is not None and form.base is not None:
            y = y + self.base(form.base(x))
        y = y if form.norm_first else self.norm(y)
        return self._drop(self.act(y), "out")

    def expanded(self, x: Tensor, basis: Any, weight: Tensor) -> Tensor:
        """Return the convolution of the basis functions of x."""
        grouped = FORMS[self.kind].squash(x.unflatten(1, (self.groups, -1)))
        # Dropout is of channels; those of a group lie beside each other.
        grouped = self._drop(grouped.flatten(1, 2), "poly").unflatten(1, (self.groups, -1))
        functions = self._drop(basis(grouped).flatten(1, 3), "degree")
        convolve = _CONVOLVE[self.axes]
        inside = self.in_channels // self.groups
        split = inside if basis.constant else 0
        groups = self.out_channels if self.mix is not None else self.groups
        y = convolve(functions, weight[:, split:], self.bias, groups=groups, **self.where)
        if basis.constant:
            # What is the same at all places and channels needs but one channel; at the borders zeros are beside it.
            level = x.new_full((1, 1, *x.shape[2:]), basis.constant)
            y = y + convolve(level, weight[:, :split].sum(1, keepdim=True).to(x.dtype), **self.where)
        return y if self.mix is None else self.mix(y)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, basis={self.kind}, groups={self.groups}"


def check_basis(
    basis: str,
    degree: int,
    grid_size: int | None,
    grid_range: Sequence[float] | None,
    norm: str,
    dropout: float,
    placement: str | None,
) -> None:
    """Refuse what makes no layer; the arguments are those of ``KANConv``.

    Raises:
        InputError: a value that is not allowed.
        UnknownName: another basis, normalisation or placement.
    """
    for what, name, names in (
        ("basis", basis, FORMS),
        ("norm", norm, NORMS),
        ("placement", placement or PLACEMENTS[0], PLACEMENTS),
    ):
        if name not in names:
            raise unknown(what, name, names, f"there are {', '.join(names)}")
    if not isinstance(degree, int) or not 1 <= degree <= kan_bases.MOST_DEGREE:
        raise InputError(f"degree = {degree!r} is not allowed: give 1 to {kan_bases.MOST_DEGREE}; 3 is published")
    if grid_size is not None and grid_size < 2:
        raise InputError(f"grid_size = {grid_size} is not allowed: give 2 or more, or leave it out")
    if grid_range is not None and (len(grid_range) != 2 or not grid_range[0] < grid_range[1]):
        raise InputError(f"grid_range = {grid_range} is not allowed: give two ends, the lower first, such as (-1, 1)")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout = {dropout} is not allowed: give a share from 0 to below 1")


def make_norm(norm: str, channels: int, axes: int, affine: bool) -> nn.Module:
    """Return a normalisation by its name in ``NORMS``."""
    return nn.Identity() if norm == "none" else _NORMS[norm][axes](channels, affine=affine)


def _basis(
    kind: str,
    degree: int,
    grid_size: int | None,
    grid_range: Sequence[float] | None,
    wavelet: str,
    ab: tuple[float, float],
    inside: int,
    outside: int,
    groups: int,
    axes: int,
    fan_in: int,
) -> tuple[int, nn.Module]:
    """Return how many functions of each channel have weights for an output channel, and the basis."""
    size, low, high = GRIDS.get(kind, (0, 0.0, 0.0))
    size = grid_size or size
    low, high = grid_range or (low, high)
    if kind == "gram":
        return degree + 1, Gram(degree, 1 / (fan_in * (degree + 1)))
    if kind == "spline":
        return size + degree, Splines(size, degree, low, high)
    if kind == "rbf":
        return size, Radial(size, low, high)
    if kind == "relu":
        return size + degree, ReLUBumps(size, degree, inside, axes)
    if kind == "wavelet":
        return 1, Wavelets(wavelet, inside, outside, groups, axes)
    table = POLYNOMIALS[kind](degree, *(ab if kind == "jacobi" else ()))
    return degree + 1, Polynomials(table, 0.0 if kind == "bernstein" else 1.0)


# ---- bottleneck ------------------------------------------------------------------------------------------------------

REDUCTION, LEAST = 4.0, 16
"""Published: how many times fewer channels the basis sees, and at least how many."""


class Squeezed(nn.Module):
    """A base convolution, and beside it a 1x1 convolution, something in fewer channels, and another.

    What ``inner`` does is set by those that derive from this: ``BottleneckKANConv`` and ``BottleneckKANExperts``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sides,
        stride: Sides,
        padding: Sides | str,
        dilation: Sides,
        groups: int,
        *,
        reduction: float,
        least: int,
        axes: int,
        norm: str,
        affine: bool,
        bias: bool,
        act: bool,
    ) -> None:
        super().__init__()
        if not reduction >= 1 or least < 1:
            raise InputError(f"reduction = {reduction} with least = {least} is not allowed: give 1 or more for both")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise InputError(
                f"groups = {groups} does not divide {in_channels} input and {out_channels} output channels: give a "
                "number that divides both, such as 1"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        width = int(max(in_channels // groups / reduction, out_channels // groups / reduction))
        if width < least:
            width = min(least, in_channels // groups, out_channels // groups)
        self.width = width * groups
        where: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        conv = CONV[axes]
        self.base = conv(in_channels, out_channels, kernel_size, groups=groups, bias=bias, **where)
        self.inner_proj = conv(in_channels, self.width, 1, groups=groups, bias=False)
        self.out_proj = conv(self.width, out_channels, 1, groups=groups, bias=False)
        for layer in (self.base, self.inner_proj, self.out_proj):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
        self.norm = make_norm(norm, out_channels, axes, affine)
        self.act = nn.SiLU() if act else nn.Identity()

    def around(self, x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        """Return (B, C', ...) of (B, C, ...)."""
        if x.shape[1] != self.in_channels:
            raise InputError(
                f"a KAN convolution of {self.in_channels} channels met {tuple(x.shape)}: give (B, {self.in_channels}, "
                "...)"
            )
        y = self.out_proj(inner(self.inner_proj(x)))
        return self.act(self.norm(y + self.base(F.silu(x))))


class BottleneckKANConv(Squeezed):
    """A Kolmogorov-Arnold convolution whose basis sees fewer channels.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as of ``KANConv``.
        basis: "gram" and "relu" are published.
        reduction: the larger of the two numbers of channels over those that the basis sees.
        least: at least how many it sees, where there are as many.
        dropout: share of the entries of the input that get noise, or with "relu" that are dropped with their channel.
        axes, norm, affine, bias, act: as of ``KANConv``.
        **options: of the basis: degree, grid_size, grid_range.

    Raises:
        InputError: a value that is not allowed.
        UnknownName: another basis or normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sides,
        stride: Sides = 1,
        padding: Sides | str = 0,
        dilation: Sides = 1,
        groups: int = 1,
        *,
        basis: str = "gram",
        reduction: float = REDUCTION,
        least: int = LEAST,
        axes: int = 2,
        norm: str = "instance",
        affine: bool = False,
        bias: bool = False,
        act: bool = True,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        check_basis(basis, options.get("degree", 3), None, None, norm, dropout, None)
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        around: dict[str, Any] = {"axes": axes, "norm": norm, "affine": affine, "bias": bias, "act": act}
        super().__init__(*shape, reduction=reduction, least=least, **around)
        noise: nn.Module = NoiseInjection(dropout) if basis == "gram" else _DROPOUT[axes](dropout)
        self.drop = noise if dropout else nn.Identity()
        self.core = _core(self.width, shape, axes, basis, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', ...)."""
        return self.around(self.drop(x), self.core)


def _core(width: int, shape: Sequence[Any], axes: int, basis: str, **options: Any) -> KANConv:
    """Return the convolution of basis functions in a bottleneck; ``shape`` is of the layer around."""
    bare: dict[str, Any] = {"basis": basis, "axes": axes, "base": False, "norm": "none", "act": False}
    core = KANConv(width, width, *shape[2:], **{**bare, **options})
    if isinstance(core.basis, Gram):
        # As published, of the channels outside.
        core.basis.beta.data *= width / shape[0]
    return core


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


class Router(nn.Module):
    """Noisy top-k gating of Shazeer et al. (2017): which experts an image goes through, and how much each counts.

    Args:
        channels: of the pooled image.
        experts: E.
        top_k: experts of an image, 1 to E.

    Raises:
        InputError: numbers that do not fit.
    """

    def __init__(self, channels: int, experts: int, top_k: int) -> None:
        super().__init__()
        if experts < 1 or not 1 <= top_k <= experts:
            raise InputError(
                f"experts = {experts} with top_k = {top_k} is not allowed: give 1 expert or more, and top_k from 1 to "
                "their number"
            )
        self.top_k = top_k
        self.gate = nn.Parameter(torch.zeros(channels, experts))
        self.noise = nn.Parameter(torch.zeros(channels, experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gates (B, E), zero but for k of each image, and the load (E,), of images (B, C, ...).

        In training the load is the expected number of images of each expert under the noise, which has a gradient.
        """
        pooled = x.flatten(2).mean(2)
        clean = pooled @ self.gate
        spread = F.softplus(pooled @ self.noise) + 1e-2
        logits = clean + spread * torch.randn_like(clean) if self.training else clean
        best = logits.softmax(1).topk(self.top_k, 1)
        shares = best.values / (best.values.sum(1, keepdim=True) + 1e-6)
        gates = torch.zeros_like(shares.new_empty(logits.shape)).scatter(1, best.indices, shares)
        if not self.training or self.top_k == logits.shape[1]:
            return gates, (gates > 0).sum(0).to(gates.dtype)
        return gates, _expected_load(clean, logits, spread, self.top_k)


def _expected_load(clean: Tensor, noisy: Tensor, spread: Tensor, top_k: int) -> Tensor:
    """Return how many images each expert would get, in the mean over its noise, that of the others being as it is."""
    ordered = noisy.topk(top_k + 1, 1).values
    last_in, first_out = ordered[:, top_k - 1 : top_k], ordered[:, top_k:]
    threshold = torch.where(noisy > first_out, first_out, last_in)
    return torch.special.ndtr((clean - threshold) / spread).sum(0)


def imbalance(gates: Tensor, load: Tensor) -> Tensor:
    """Return the squared coefficients of variation of the experts' sums of gates and of their loads, added up."""
    return _variation(gates.sum(0)) + _variation(load)


def _variation(x: Tensor) -> Tensor:
    return x.float().var() / (x.float().mean() ** 2 + 1e-10) if len(x) > 1 else x.sum() * 0


def _mixed(x: Tensor, gates: Tensor, experts: nn.ModuleList) -> Tensor:
    """Return the sum over experts of their gates times what they say of the images that have one."""
    if torch.compiler.is_exporting() or x.is_meta:
        # Which images an expert gets is known only when it runs: all go through all, and most count for nothing.
        said = [expert(x) * _like(gate, x) for expert, gate in zip(experts, gates.unbind(1))]
        return sum(said[1:], said[0])
    parts, rows = [], []
    for expert, gate in zip(experts, gates.unbind(1)):
        row = gate.nonzero().squeeze(1)
        if len(row):
            parts.append(expert(x[row]) * _like(gate[row], x))
            rows.append(row)
    y = torch.cat(parts)
    return y.new_zeros(len(x), *y.shape[1:]).index_add(0, torch.cat(rows), y)


def _like(gate: Tensor, x: Tensor) -> Tensor:
    return gate.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class KANConvExperts(nn.Module):
    """A mixture of Kolmogorov-Arnold convolutions, which all begin alike.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as of ``KANConv``.
        experts: E.
        top_k: experts of an image.
        bottleneck: whether the experts are bottleneck layers.
        **options: of the experts.

    Raises:
        InputError: a value that is not allowed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sides,
        stride: Sides = 1,
        padding: Sides | str = 0,
        dilation: Sides = 1,
        groups: int = 1,
        *,
        experts: int = 16,
        top_k: int = 4,
        bottleneck: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        kind: Any = BottleneckKANConv if bottleneck else KANConv
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        self.router = Router(in_channels, experts, top_k)
        self.experts = nn.ModuleList(kind(*shape, **options) for _ in range(experts))
        for expert in self.experts[1:]:
            expert.load_state_dict(self.experts[0].state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', ...)."""
        gates, _ = self.router(x)
        return _mixed(x, gates, self.experts)


class BottleneckKANExperts(Squeezed):
    """A bottleneck layer inside which experts, each a convolution of basis functions, share the work.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as of ``KANConv``.
        experts: E.
        top_k: experts of an image.
        basis: "gram" is published.
        reduction, least, axes, norm, affine, bias, act: as of ``BottleneckKANConv``.
        dropout: share of the entries of the basis functions that get noise.
        **options: of the basis.

    Raises:
        InputError: a value that is not allowed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sides,
        stride: Sides = 1,
        padding: Sides | str = 0,
        dilation: Sides = 1,
        groups: int = 1,
        *,
        experts: int = 8,
        top_k: int = 2,
        basis: str = "gram",
        reduction: float = REDUCTION,
        least: int = LEAST,
        axes: int = 2,
        norm: str = "instance",
        affine: bool = False,
        bias: bool = False,
        act: bool = True,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        check_basis(basis, options.get("degree", 3), None, None, norm, dropout, None)
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        around: dict[str, Any] = {"axes": axes, "norm": norm, "affine": affine, "bias": bias, "act": act}
        super().__init__(*shape, reduction=reduction, least=least, **around)
        self.router = Router(self.width, experts, top_k)
        drop: dict[str, Any] = {"dropout": dropout, "placement": "degree", "noise": True}
        self.experts = nn.ModuleList(
            # Here the deviation is of the channels inside.
            _core(self.width, (self.width, *shape[1:]), axes, basis, **drop, **options)
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', ...)."""
        return self.around(x, lambda inner: _mixed(inner, self.router(inner)[0], self.experts))


# ---- attention and focal modulation ----------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "full": KANConv,
    "bottleneck": BottleneckKANConv,
    "experts": BottleneckKANExperts,
    "full_experts": KANConvExperts,
}
"""Layers by what they are called in options."""


def make_layer(kind: str) -> Any:
    """Return the class of a layer by its name in ``KINDS``.

    Raises:
        UnknownName: another name.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS, f"there are {', '.join(KINDS)}")
    return KINDS[kind]


class KANSelfAttention(nn.Module):
    """Attention of one head between all places, whose queries, keys and values are Kolmogorov-Arnold convolutions.

    Args:
        channels: C.
        inner: channels of the attention, behind a 1x1 convolution; None: all.
        kernel_size: odd.
        kind: of the layers, of ``KINDS``.
        rotary: turn pairs of channels of queries and keys by angles that grow with the place, two axes only; the
            frequencies of both axes are learnt.
        theta: base of the frequencies.
        axes: 1, 2 or 3.
        norm: of the sum and inside the layers, of ``NORMS``.
        affine: as of ``KANConv``.
        **options: of the layers.

    Raises:
        InputError: an even kernel; ``rotary`` without two axes or a width that four divides.
    """

    def __init__(
        self,
        channels: int,
        inner: int | None = None,
        kernel_size: int = 3,
        *,
        kind: str = "full",
        rotary: bool = False,
        theta: float = 10.0,
        axes: int = 2,
        norm: str = "batch",
        affine: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(f"kernel_size = {kernel_size} is not allowed: give an odd number, so that places stay")
        width = inner or channels
        if rotary and (axes != 2 or width % 4):
            raise InputError(
                f"rotary positions need two axes and a width that four divides, and here are {axes} and {width}"
            )
        self.inner_proj = CONV[axes](channels, width, 1) if inner else nn.Identity()
        self.outer_proj = CONV[axes](width, channels, 1) if inner else nn.Identity()
        layer = make_layer(kind)
        own: dict[str, Any] = {"padding": kernel_size // 2, "axes": axes, "norm": norm, "affine": affine, **options}
        self.proj_k, self.proj_q, self.proj_v = (layer(width, width, kernel_size, **own) for _ in range(3))
        self.gamma = nn.Parameter(torch.zeros(1))
        self.norm = make_norm(norm, channels, axes, affine)
        self.freqs = nn.Parameter(_frequencies(width, theta)) if rotary else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...)."""
        inner = self.inner_proj(x)
        q, k, v = (proj(inner).flatten(2).transpose(1, 2) for proj in (self.proj_q, self.proj_k, self.proj_v))
        if self.freqs is not None:
            angles = _angles(self.freqs, inner.shape[2], inner.shape[3])
            q, k = _turned(q, angles), _turned(k, angles)
        # As published: no scale.
        found = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]
        y = self.outer_proj(found.transpose(1, 2).reshape(inner.shape))
        return self.norm(self.gamma * x + y)


def _frequencies(width: int, theta: float) -> Tensor:
    """Return frequencies along both axes, (2, width / 2), as a random turn of the plane of axial ones."""
    size = theta ** -(torch.arange(0, width, 4).float() / width)
    turn = torch.rand(()) * 2 * math.pi
    along = [torch.cat((size * turn.cos(), size * (turn + math.pi / 2).cos()))]
    across = [torch.cat((size * turn.sin(), size * (turn + math.pi / 2).sin()))]
    return torch.stack(along + across)


def _angles(freqs: Tensor, height: int, width: int) -> Tensor:
    """Return the angle of each pair of channels at each place, (H W, C / 2)."""
    rows = torch.arange(height, device=freqs.device, dtype=freqs.dtype).repeat_interleave(width)
    columns = torch.arange(width, device=freqs.device, dtype=freqs.dtype).repeat(height)
    return columns[:, None] * freqs[0] + rows[:, None] * freqs[1]


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Return (B, N, C) with each pair of channels turned by its angle."""
    one, other = x.unflatten(2, (-1, 2)).unbind(3)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.stack((one * cos - other * sin, one * sin + other * cos), 3).flatten(2)


class KANFocalModulation(nn.Module):
    """Focal modulation of Yang et al. (2022) whose layers are Kolmogorov-Arnold convolutions.

    Args:
        channels: C.
        focal_window: side of the first context's kernel, odd.
        focal_level: contexts.
        focal_factor: what each kernel's side adds to the one before, even.
        normalize: divide the contexts' sum by their number and one.
        post_norm: normalise the modulated query.
        full: have Kolmogorov-Arnold layers before and behind the contexts too, and not 1x1 convolutions.
        kind: of the layers that are not depthwise, of ``KINDS``.
        axes, norm, affine: as of ``KANConv``.
        **options: of the layers.

    Raises:
        InputError: a window or a factor that is not allowed.
    """

    def __init__(
        self,
        channels: int,
        focal_window: int = 3,
        focal_level: int = 2,
        focal_factor: int = 2,
        *,
        normalize: bool = True,
        post_norm: bool = True,
        full: bool = True,
        kind: str = "full",
        axes: int = 2,
        norm: str = "batch",
        affine: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if focal_window % 2 == 0 or focal_factor % 2 or focal_level < 1:
            raise InputError(
                f"focal_window = {focal_window}, focal_factor = {focal_factor} and focal_level = {focal_level} are not "
                "allowed: give an odd window, an even factor and one level or more"
            )
        layer = make_layer(kind)
        own: dict[str, Any] = {"axes": axes, "norm": norm, "affine": affine, **options}
        self.parts = [channels, channels, focal_level + 1]
        make = (lambda a, b: layer(a, b, 1, **own)) if full else (lambda a, b: CONV[axes](a, b, 1))
        self.f, self.h = make(channels, sum(self.parts)), make(channels, channels)
        self.proj = layer(channels, channels, 1, **own)
        sides = [focal_window + focal_factor * level for level in range(focal_level)]
        self.focal_layers = nn.ModuleList(
            # Depthwise layers have no channels to squeeze: as published they are full ones.
            KANConv(channels, channels, side, padding=side // 2, groups=channels, **own)
            for side in sides
        )
        self.share = 1 / (focal_level + 1) if normalize else 1.0
        self.norm = make_norm(norm, channels, axes, affine) if post_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...)."""
        query, context, gates = self.f(x).split(self.parts, 1)
        total = torch.zeros_like(query)
        for level, focal in enumerate(self.focal_layers):
            context = focal(context)
            total = total + context * gates[:, level : level + 1]
        # As published, the mean is of the gated sum, and not of the last context.
        total = total + total.mean(tuple(range(2, x.ndim)), keepdim=True) * gates[:, -1:]
        return self.proj(self.norm(query * self.h(self.share * total)))


# ---- finetuning of a part of the basis -------------------------------------------------------------------------------


class TunedKANConv(nn.Module):
    """A trained Gram layer whose weights stay, beside which some degrees learn, and degrees above its own are new.

    What learns begins at zero: the layer begins as the trained one. The normalisation learns on.

    Args:
        layer: trained, of the basis "gram"; it becomes a part of this and is frozen.
        degrees: of its own that learn, each 0 to its degree.
        extra_degrees: new ones.
        base: whether the base convolution learns.

    Raises:
        InputError: another basis, degrees that it does not have, or nothing to learn.
    """

    def __init__(
        self, layer: KANConv, degrees: Sequence[int] = (), extra_degrees: int = 1, *, base: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(layer.basis, Gram):
            raise InputError(
                f"finetuning by degrees is of layers with the basis 'gram', and this one has {layer.kind!r}: finetune "
                "all of it"
            )
        degree = len(layer.basis.beta) - 1
        wrong = [number for number in degrees if not 0 <= number <= degree]
        if wrong or len(set(degrees)) != len(degrees):
            raise InputError(f"degrees = {tuple(degrees)} are not allowed: give different ones from 0 to {degree}")
        if extra_degrees < 0 or degree + extra_degrees > kan_bases.MOST_DEGREE or not (degrees or extra_degrees):
            raise InputError(
                f"extra_degrees = {extra_degrees} beside {len(degrees)} degrees is not allowed: give 0 to "
                f"{kan_bases.MOST_DEGREE - degree}, and one or more of either"
            )
        self.layer, self.degree, self.extra, self.degrees = layer, degree, extra_degrees, tuple(sorted(degrees))
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.startswith("norm.") or (base and name.startswith("base.")))
        inside = layer.in_channels // layer.groups
        shape = layer.weight.shape[2:]
        # Degree d rests on factor d - 1, and degrees 0 and 1 on none.
        self.factors = [number - 1 for number in self.degrees if number > 1]
        self.weight_delta = _zeros(layer.weight, layer.out_channels, len(self.degrees) * inside, *shape)
        self.weight_extra = _zeros(layer.weight, layer.out_channels, extra_degrees * inside, *shape)
        self.beta_delta = _zeros(layer.weight, len(self.factors))
        self.beta_extra = _zeros(layer.weight, extra_degrees)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return the weights and the factors of one layer of all degrees that is the same."""
        inside = self.layer.in_channels // self.layer.groups
        parts = list(self.layer.weight.split(inside, 1))
        beta: Tensor = self.trained.beta
        if self.weight_delta is not None:
            for degree, delta in zip(self.degrees, self.weight_delta.split(inside, 1)):
                parts[degree] = parts[degree] + delta
        if self.beta_delta is not None:
            places = torch.tensor(self.factors, device=beta.device)
            beta = beta.index_put((places,), self.beta_delta, accumulate=True)
        if self.weight_extra is None or self.beta_extra is None:
            return torch.cat(parts, 1), beta
        # The trained layer's last factor had no part in it, so that of the first new degree begins anew, at zero.
        return torch.cat((*parts, self.weight_extra), 1), torch.cat((beta[:-1], self.beta_extra, beta.new_zeros(1)))

    @property
    def trained(self) -> Gram:
        """The basis of the trained layer."""
        return cast(Gram, self.layer.basis)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', ...)."""
        weight, beta = self.merged()
        return self.layer.combined(x, _GramOf(beta), weight)

    def reparameterize(self) -> None:
        """Take what was learnt into the trained layer, which then has all degrees and no part that is frozen."""
        weight, beta = self.merged()
        self.layer.weight, self.trained.beta = nn.Parameter(weight.detach()), nn.Parameter(beta.detach())
        self.weight_delta = self.weight_extra = self.beta_delta = self.beta_extra = None
        self.layer.requires_grad_(True)


def _zeros(like: Tensor, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(like.new_zeros(shape)) if math.prod(shape) else None


class _GramOf:
    """Gram polynomials with given factors."""

    constant = Gram.constant

    def __init__(self, beta: Tensor) -> None:
        self.beta = beta

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(kan_bases.polynomials(x, kan_bases.gram_table(self.beta)[1:], 2))
