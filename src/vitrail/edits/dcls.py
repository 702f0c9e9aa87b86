"""DCLS: convolutions whose few kernel elements learn where in a large kernel they stand.

Khalfaoui-Hassani, Pellegrini, Masquelier, "Dilated Convolution with Learnable Spacings" (ICLR 2023), and "beyond
bilinear interpolation" (2023). An element has a weight and a real-valued position. It is spread over the places around
its position, so that the position has a gradient, and the sum of all elements is the kernel of a plain convolution.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.weight_init import trunc_normal_
from timm.models import convnext
from torch import Tensor, nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError, unknown
from vitrail.layers.large_kernel import LargeKernelConv2d, large_kernel_conv2d

FORMS = ("bilinear", "triangle", "gauss")
LEAST_WIDTH = {"triangle": 1.0, "gauss": 0.27}
"""Added to |SIG|, as published: a triangle of width 1 is bilinear interpolation."""
FIRST_SIG = {"triangle": 0.0, "gauss": 0.23}
EPS = 1e-7
LEAST_LOG = -75.0
"""Of a Gaussian share; smaller ones are 0. Processors convolve with denormal numbers many times more slowly."""
LR_SCALE = 5.0
"""Of positions and widths, as published; they are not decayed."""
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
CONVS: dict[int, tuple[Any, Any]] = {
    1: (nn.Conv1d, F.conv1d),
    2: (nn.Conv2d, F.conv2d),
    3: (nn.Conv3d, F.conv3d),
}


# ---- from elements to a kernel


def dense_kernel(
    weight: Tensor, positions: Tensor, size: Sequence[int], form: str = "bilinear", widths: Tensor | None = None
) -> Tensor:
    """Return the kernel (O, I, *size) of m elements for each pair of channels.

    Args:
        weight: (O, I, m).
        positions: (axes, O, I, m), in places from the middle, ``size // 2``; beyond the kernel they count as its edge.
        size: places along each axis.
        form: ``bilinear``: an element is shared by the 2 to the power of ``axes`` places around it; ``triangle`` and
            ``gauss``: by all places, in shares of sum 1 that fall with the distance.
        widths: SIG, as ``positions``, for ``triangle`` and ``gauss``; an element is |SIG| + ``LEAST_WIDTH`` wide.

    Raises:
        InputError: no widths for a form that has them.
    """
    # Not clamp, whose gradient is 0 on the edges as well: what was put back there could never leave.
    places = [
        p.masked_fill(p < -(k // 2), -(k // 2)).masked_fill(p > (k - 1) // 2, (k - 1) // 2) + k // 2
        for p, k in zip(positions, size)
    ]
    if form == "bilinear":
        return _scattered(weight, places, size)
    if widths is None:
        raise InputError(f"dense_kernel: elements of the form {form!r} have widths: give them, or take 'bilinear'")
    # Made in full precision: an autocast product would round every share.
    device = weight.device.type
    known = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if known else contextlib.nullcontext():
        return _spread(weight, places, widths, size, form)


def _scattered(weight: Tensor, places: list[Tensor], size: Sequence[int]) -> Tensor:
    place, share = torch.zeros_like(weight, dtype=torch.long)[..., None], weight[..., None]  # (O, I, m, corners)
    for where, k in zip(places, size):
        # At the far edge the element is all in the upper of its two places, with the derivative from inside.
        low = where.detach().floor().clamp(max=max(k - 2, 0))
        rest = where - low
        corners = torch.stack((low, (low + 1).clamp(max=k - 1)), -1).long()
        place = (place[..., None] * k + corners[..., None, :]).flatten(-2)
        share = (share[..., None] * torch.stack((1 - rest, rest), -1)[..., None, :]).flatten(-2)
    flat = weight.new_zeros(*weight.shape[:2], math.prod(size))
    return flat.scatter_add(2, place.flatten(2), share.flatten(2)).unflatten(2, tuple(size))


def _spread(weight: Tensor, places: list[Tensor], widths: Tensor, size: Sequence[int], form: str) -> Tensor:
    """Both forms are products over the axes, and so is the sum that they are divided by: no m x size tensor is made."""
    shares = []
    for where, sig, k in zip(places, widths, size):
        # |SIG| with a derivative of 1 at 0: torch's has 0, and the triangles, which begin there, would never widen.
        width = (torch.where(sig < 0, -sig, sig) + LEAST_WIDTH[form])[..., None]
        away = torch.arange(k, device=weight.device) - where[..., None]  # (O, I, m, k)
        if form == "triangle":
            shares.append((width - away.abs()).relu())
        else:
            log = -0.5 * (away / width) ** 2
            shares.append(log.masked_fill(log < LEAST_LOG / len(size), -torch.inf).exp())
    total = torch.stack([share.sum(-1) for share in shares]).prod(0)  # (O, I, m)
    rest = torch.ones_like(total)[..., None]
    for share in shares[1:]:
        rest = (rest[..., None] * share[..., None, :]).flatten(-2)
    first = shares[0] * (weight / (total + EPS))[..., None]
    return (first.transpose(-1, -2) @ rest).view(*weight.shape[:2], *size)


# ---- layers


class Dcls(nn.Module):
    """What ``Dcls1d``, ``Dcls2d`` and ``Dcls3d`` have in common; they are made, not this.

    Args:
        in_channels, out_channels: both divisible by ``groups``.
        kernel_count: m, elements in the kernel of each pair of channels.
        kernel_size: places along each axis, the paper's dilated kernel size.
        stride, padding, groups, bias, padding_mode: as of torch's convolution.
        form: of ``FORMS``.

    Attributes:
        weight: (O, I, m), with I = in_channels / groups.
        P: positions (axes, O, I, m), in places from the middle. In training every pass first puts those that a step
            took out of the kernel back on its edge.
        SIG: widths, as P; None with ``bilinear``.

    Raises:
        InputError: an argument out of range; in ``forward``, an input with another number of axes.
    """

    axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_count: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        form: str = "bilinear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _refuse("kernel_count", kernel_count)
        if form not in FORMS:
            raise unknown("form of dcls", form, FORMS)
        if padding_mode not in PADDING_MODES:
            raise unknown("padding_mode of dcls", padding_mode, PADDING_MODES)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise InputError(
                f"dcls: groups = {groups} does not divide {in_channels} channels in and {out_channels} out: "
                "give a number that divides both"
            )
        self.in_channels, self.out_channels, self.groups, self.padding_mode = (
            in_channels,
            out_channels,
            groups,
            padding_mode,
        )
        self.kernel_size = self._each(kernel_size)
        for side in self.kernel_size:
            _refuse("kernel_size", side)
        self.stride, self.padding = self._each(stride), self._each(padding)
        self.form = form
        shape, kind = (out_channels, in_channels // groups, kernel_count), {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(shape, **kind))  # type: ignore[arg-type]
        self.P = nn.Parameter(torch.empty((self.axes, *shape), **kind))  # type: ignore[arg-type]
        self.SIG = None if form == "bilinear" else nn.Parameter(torch.empty_like(self.P))
        self.bias = nn.Parameter(torch.empty(out_channels, **kind)) if bias else None  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and bias as torch's convolution does, with m in place of its taps; positions near the middle."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.normal_(self.P, 0, 0.5)
        self._put_back()
        if self.SIG is not None:
            nn.init.constant_(self.SIG, FIRST_SIG[self.form])

    def param_groups(self) -> list[dict[str, Any]]:
        """Return how positions and widths are trained: without weight decay, at ``LR_SCALE`` times the rate."""
        learned = [parameter for parameter in (self.P, self.SIG) if parameter is not None]
        return [{"params": learned, "weight_decay": 0.0, "lr_scale": LR_SCALE}]

    def kernel(self) -> Tensor:
        """Return the plain convolution's weight (O, I, *kernel_size)."""
        return dense_kernel(self.weight, self.P, self.kernel_size, self.form, self.SIG)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, in_channels, *plane)."""
        if x.ndim != self.axes + 2:
            raise InputError(
                f"{type(self).__name__} takes a batch with {self.axes + 2} axes, (B, C, ...), and met {tuple(x.shape)}"
            )
        if self.training:
            self._put_back()
        kernel = self.kernel()
        if self._large():
            return large_kernel_conv2d(x, kernel, self.bias)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            around = [zeros for zeros in reversed(self.padding) for _ in range(2)]
            x, padding = F.pad(x, around, mode=self.padding_mode), 0
        out: Tensor = CONVS[self.axes][1](x, kernel, self.bias, self.stride, padding, 1, self.groups)
        return out

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return the plain convolution that this is: the same results, to the last bit."""
        bias = self.bias is not None
        if self._large():
            conv: Any = LargeKernelConv2d(self.in_channels, self.kernel_size[0], bias=bias)
        else:
            conv = CONVS[self.axes][0](
                self.in_channels,
                self.out_channels,
                self.kernel_size,
                self.stride,
                self.padding,
                groups=self.groups,
                bias=bias,
                padding_mode=self.padding_mode,
            )
        conv.weight = nn.Parameter(self.kernel())
        conv.bias = self.bias
        fused: nn.Module = conv.train(self.training)
        return fused

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_count={self.weight.shape[-1]}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, groups={self.groups}, "
            f"form={self.form!r}"
        )

    def _put_back(self) -> None:
        for positions, k in zip(self.P.detach(), self.kernel_size):
            positions.clamp_(-(k // 2), (k - 1) // 2)

    def _large(self) -> bool:
        """Whether it is a convolution that has a fast way on CPUs."""
        k = self.kernel_size[0]
        depthwise = self.groups == self.in_channels == self.out_channels
        whole = self.stride == (1, 1) and self.kernel_size == (k, k) and k % 2 == 1 and self.padding == (k // 2, k // 2)
        return depthwise and whole and self.padding_mode == "zeros"

    def _each(self, value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) * self.axes if isinstance(value, int) else tuple(value)
        if len(values) != self.axes:
            raise InputError(f"{type(self).__name__}: {value!r} is not one number, nor {self.axes}: give either")
        return values


class Dcls1d(Dcls):
    """Convolve (B, C, L); arguments of ``Dcls``."""

    axes = 1


class Dcls2d(Dcls):
    """Convolve (B, C, H, W); arguments of ``Dcls``. P[0] are rows and P[1] columns."""

    axes = 2


class Dcls3d(Dcls):
    """Convolve (B, C, D, H, W); arguments of ``Dcls``."""

    axes = 3


def _refuse(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"dcls: {name} = {value!r} is not allowed: give a whole number from 1")


# ---- networks


def dcls(
    *,
    kernel_size: int = 17,
    kernel_count: int = 34,
    form: str = "bilinear",
    shared: bool = False,
    min_kernel: int = 3,
    modules: str | None = None,
) -> Edit:
    """Return the edit that replaces convolutions by ones with learnable spacings.

    It replaces the 2-D convolutions of an odd kernel that keep the size of the plane but for their stride: the 3 x 3
    ones of ResNets, the depthwise ones of ConvNeXt and MobileNets. The first convolution, which sees the image, stays.
    Dilation is left out: positions reach as far. Depthwise weights begin as in the published ConvNeXt (a normal
    distribution of 0.02, no bias), others as torch's convolution.

    Args:
        kernel_size: side of the kernels, odd. Published for ConvNeXt: 17 with ``bilinear``, 23 with ``gauss``.
        kernel_count: elements in a kernel. Published: 34 (ConvNeXt-T) and 40 (S, B), 26 with ``gauss``: as many
            parameters as 7 x 7, if shared.
        form: of ``FORMS``.
        shared: one set of positions and widths for all layers of as many channels and groups, which are those of a
            stage; published for ConvNeXt.
        min_kernel: smallest side of a convolution that is replaced, 2 or more.
        modules: regular expression; the layers whose whole dotted name matches are replaced, the first one too.

    Raises:
        InputError: an argument out of range; or, from the edit, a model without such convolutions.

    Example:
        >>> model = dcls(shared=True)(timm.create_model("convnext_tiny"))                    # doctest: +SKIP
        >>> model = dcls(kernel_size=7, kernel_count=3)(timm.create_model("resnet50"))       # doctest: +SKIP
    """
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"dcls: kernel_size = {kernel_size!r} is not allowed: give an odd number from 1")
    if not isinstance(min_kernel, int) or min_kernel < 2:
        raise InputError(f"dcls: min_kernel = {min_kernel!r} is not allowed: give a whole number from 2")
    Dcls2d(1, 1, kernel_count, kernel_size, form=form, device="meta")  # refuse the others now, too
    try:
        pattern = None if modules is None else re.compile(modules)
    except (re.error, TypeError) as error:
        raise InputError(
            f"dcls: modules = {modules!r} is no regular expression ({error}): "
            r"give one that matches whole names of layers, such as 'stages\.0\..*'"
        ) from None

    def edit(model: nn.Module) -> nn.Module:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        owners: dict[tuple[int, ...], Dcls2d] = {}

        def matches(name: str, module: nn.Module) -> bool:
            named = module is not first if pattern is None else pattern.fullmatch(name) is not None
            return named and _keeps_size(module, min_kernel)

        def build(layer: Any) -> nn.Module:
            new = Dcls2d(
                layer.in_channels,
                layer.out_channels,
                kernel_count,
                kernel_size,
                layer.stride,
                kernel_size // 2,
                layer.groups,
                layer.bias is not None,
                layer.padding_mode,
                form,
                layer.weight.device,
                layer.weight.dtype,
            )
            if layer.groups == layer.in_channels:
                trunc_normal_(new.weight, std=0.02)
                if new.bias is not None:
                    nn.init.zeros_(new.bias)
            if shared:
                owner = owners.setdefault((*new.weight.shape, new.groups), new)
                new.P, new.SIG = owner.P, owner.SIG
            return new

        what = f"convolution of {min_kernel} x {min_kernel} or more, beyond the first, that keeps the size of the plane"
        if pattern is not None:
            what = f"convolution whose whole name matches {modules!r} and that keeps the size of the plane"
        return replace_modules(model, matches, build, what=what)

    return edit


def _keeps_size(layer: nn.Module, min_kernel: int) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return False
    kept = isinstance(layer, Conv2dSame) or layer.padding in (
        "same",
        tuple(side // 2 * dilation for side, dilation in zip(layer.kernel_size, layer.dilation)),
    )
    return kept and min(layer.kernel_size) >= min_kernel and all(side % 2 for side in layer.kernel_size)


def repulsion(model: nn.Module) -> Tensor:
    """Return how close together elements stand: 0 if all those of a kernel are a place or more apart, at most 1.

    It is the mean over pairs, kernels and sets of positions of max(0, 1 - distance). The published training of ConvNeXt
    adds its square to the loss from the 21st of 300 epochs on.

    Raises:
        InputError: a model without such layers, or with one element in each kernel.
    """
    sets = {id(module.P): module.P for module in model.modules() if isinstance(module, Dcls)}
    terms = []
    for positions in sets.values():
        axes, *_, m = positions.shape
        if m > 1:
            points = positions.permute(1, 2, 3, 0).reshape(-1, m, axes)
            near = (1 - torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")).relu()
            terms.append(near.triu(1).sum() * 2 / (len(points) * m * (m - 1)))
    if not terms:
        raise InputError(
            f"repulsion needs layers with two learnable positions or more, and {type(model).__name__} has none: "
            "add the edit dcls"
        )
    return torch.stack(terms).mean()


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the authors' ConvNeXts under the names of timm's with this edit, ``shared=True``.

    Their bilinear form of ConvNeXt has rows first, as here, and the two others have columns first.

    Args:
        state: their checkpoint, or its ``model``.
        model: the edited model of timm.

    Raises:
        InputError: the tensors are not those of the model.
    """
    own = model.state_dict()
    renamed: dict[str, Tensor] = convnext.checkpoint_filter_fn(dict(state), model)
    if any(key.endswith(".SIG") for key in renamed):
        renamed = {key: value.flip(0) if key.endswith((".P", ".SIG")) else value for key, value in renamed.items()}
    wrong = [key for key in own if key not in renamed or renamed[key].shape != own[key].shape]
    if wrong or len(renamed) != len(own):
        raise InputError(
            f"the checkpoint has {len(renamed)} tensors and {type(model).__name__} has {len(own)}"
            + (f"; {wrong[0]} is missing or of another shape" if wrong else "")
            + ": create the variant of the checkpoint, with as many classes, and edit it with the same options of dcls"
        )
    return renamed
