"""Kolmogorov-Arnold convolutions in the place of a net's own, and finetuning of a part of their basis.

Drokin, "Kolmogorov-Arnold Convolutions: Design Principles and Empirical Studies" (2024), arXiv 2407.01092; the layers
and what they rest on are in ``vitrail.layers.kan_layers``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError
from vitrail.layers.kan_layers import (
    FORMS,
    BottleneckKANConv,
    BottleneckKANExperts,
    KANConv,
    KANConvExperts,
    TunedKANConv,
    check_basis,
    make_layer,
)

LAYERS = (KANConv, BottleneckKANConv, BottleneckKANExperts, KANConvExperts)


def kan_conv(
    *,
    basis: str = "gram",
    kind: str = "full",
    degree: int = 3,
    grid_size: int | None = None,
    grid_range: Sequence[float] | None = None,
    norm: str | None = None,
    dropout: float = 0.0,
    experts: int = 4,
    top_k: int = 2,
    modules: str | None = None,
) -> Edit:
    """Return the edit that makes 2-D convolutions of a net Kolmogorov-Arnold convolutions.

    All of its plain convolutions change, as in the published nets, depthwise and 1x1 ones too. The net's own
    normalisations and activations stay where they are, in the place of those that the published layers end with.

    Args:
        basis: "gram", "rbf", "spline", "wavelet", "legendre", "chebyshev", "bernstein", "bernoulli", "jacobi" or
            "relu".
        kind: "full"; "bottleneck", where the basis sees fewer channels; "experts", a mixture of these;
            "full_experts", a mixture of full layers.
        degree: of polynomials, or order of splines and ReLU bumps, 1 to 12.
        grid_size: intervals or bumps of "spline", "rbf" and "relu", 2 or more; None is the published number.
        grid_range: the ends of that grid; None are the published ones.
        norm: "instance", "batch" or "none", inside the layer; None is none, or "batch" before the bumps of "rbf".
        dropout: inside the layers, in [0, 1).
        experts, top_k: how many, and how many an image goes through, of the kinds with experts.
        modules: regular expression; only layers whose whole dotted name matches change.

    Raises:
        InputError: an argument out of range; or, from the edit, a net without such a convolution (the text lists what
            it has).
        UnknownName: another basis, kind or normalisation.

    Example:
        >>> model = kan_conv()(timm.create_model("resnet18"))                                  # doctest: +SKIP
        >>> model = kan_conv(kind="bottleneck", modules=r"layer\\d.*conv2")(model)             # doctest: +SKIP
    """
    layer = make_layer(kind)
    check_basis(basis, degree, grid_size, grid_range, norm or "none", dropout, None)
    options: dict[str, Any] = {"basis": basis, "degree": degree, "act": False, "dropout": dropout}
    options["norm"] = norm or ("batch" if FORMS[basis].norm_first and kind in ("full", "full_experts") else "none")
    if grid_size is not None or grid_range is not None:
        options |= {"grid_size": grid_size, "grid_range": grid_range}
    if "experts" in kind:
        if not 1 <= top_k <= experts:
            raise InputError(f"experts = {experts} with top_k = {top_k} is not allowed: give top_k from 1 to experts")
        options |= {"experts": experts, "top_k": top_k}
    try:
        pattern = None if modules is None else re.compile(modules)
    except (re.error, TypeError) as error:
        raise InputError(
            f"kan_conv: modules = {modules!r} is no regular expression ({error}): "
            r"give one that matches whole names of layers, such as 'layer\d\.\d\.conv1'"
        ) from None

    def edit(model: nn.Module) -> nn.Module:
        inside = {
            part for found in model.modules() if isinstance(found, (*LAYERS, TunedKANConv)) for part in found.modules()
        }

        def matches(name: str, module: nn.Module) -> bool:
            # A kind of convolution of its own, such as one with standardised weights, is left to itself.
            plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and module not in inside
            return plain and (pattern is None or bool(pattern.fullmatch(name)))

        def build(conv: Any) -> nn.Module:
            shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
            new: nn.Module = layer(*shape, conv.groups, bias=conv.bias is not None, **options)
            return new.to(conv.weight.dtype)

        named = "" if pattern is None else f" whose whole name matches {modules!r}"
        return replace_modules(model, matches, build, what=f"plain 2-D convolution{named}")

    return edit


def kan_finetune(*, degrees: Sequence[int] = (), extra_degrees: int = 1, base: bool = False) -> Edit:
    """Return the edit after which Gram layers learn a part of their basis alone, and the rest of the net learns on.

    For nets whose weights were trained: layers begin as they are. Weights beside the trained ones, for the given
    degrees and for new ones, begin at zero; trained weights stay.

    Args:
        degrees: of the trained basis that learn, none by default.
        extra_degrees: new degrees above the trained ones.
        base: whether base convolutions learn.

    Raises:
        InputError: from the edit, a net without full layers with the basis "gram", or degrees that these do not have.

    Example:
        >>> model = kan_finetune(extra_degrees=2)(vitrail.load("runs/kan"))                    # doctest: +SKIP
    """
    if not degrees and extra_degrees < 1:
        raise InputError(
            f"degrees = {tuple(degrees)} with extra_degrees = {extra_degrees} leaves nothing to learn: give degrees, "
            "or extra_degrees of 1 or more"
        )

    def edit(model: nn.Module) -> nn.Module:
        taken = {part for found in model.modules() if isinstance(found, TunedKANConv) for part in found.modules()}
        return replace_modules(
            model,
            lambda _, module: isinstance(module, KANConv) and module.kind == "gram" and module not in taken,
            lambda layer: TunedKANConv(layer, degrees, extra_degrees, base=base),  # type: ignore[arg-type]
            what="Gram layer (kan_conv() makes such layers)",
        )

    return edit
