"""GGeM: the generalised mean of the patch tokens, with an exponent for each group of channels.

Ko et al., "Group Generalized Mean Pooling for Vision Transformer" (2022). The generalised mean of a channel's values
x_1 ... x_N is (1/N sum x_i^p)^(1/p): the mean for p = 1, the maximum as p grows. GeM learns one p; GGeM divides the
channels into groups, as attention divides them into heads, and learns a p for each.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError

EPS = 1e-6
"""Least value that is pooled: a power of a negative number is not real, so values below count as this."""
LEAST_P = 0.05
"""Least exponent: dividing by a smaller one would show the rounding of float32."""


class GGeM(nn.Module):
    """Pool the axes ``dim`` of a tensor (B, ..., C) or (B, C, ...) by a generalised mean per group of channels.

    Args:
        groups: G; the channels are divided into G equal runs, in their order.
        p: initial exponent of all groups, at least ``LEAST_P``.
        dim: axes to pool; the one that remains beside the batch holds the channels.
        flatten: return (B, C); else the pooled axes stay, with length 1.
        skip: leave out the first ones of axis 1, the class token and its kin.

    Raises:
        InputError: a number out of range; in ``forward``, an input with other axes or channels than can be grouped.
    """

    def __init__(
        self, groups: int, p: float = 3.0, *, dim: tuple[int, ...] = (1,), flatten: bool = True, skip: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(groups, int) or groups < 1:
            raise InputError(f"ggem: groups = {groups!r} is not allowed: give 1 or more, such as the number of heads")
        if not isinstance(p, int | float) or not LEAST_P <= p < math.inf:
            raise InputError(f"ggem: p = {p!r} is not allowed: give {LEAST_P} or more; 1 is the mean, 3 is usual")
        self.dim, self.flatten, self.skip = dim, flatten, skip
        self.p = nn.Parameter(torch.full((groups,), float(p)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled (B, C) of x, in its type; the powers are taken in float32 or better."""
        if x.ndim != len(self.dim) + 2:
            raise InputError(
                f"ggem pools the axes {self.dim} of {len(self.dim) + 2} and met the shape {tuple(x.shape)}"
            )
        x = x[:, self.skip :]
        (axis,) = set(range(1, x.ndim)) - set(self.dim)
        _refuse_unequal(x.shape[axis], len(self.p))
        wide = torch.promote_types(x.dtype, torch.float32)
        p = self.p.to(wide).clamp_min(LEAST_P).repeat_interleave(x.shape[axis] // len(self.p))
        p = p.view([-1 if i == axis else 1 for i in range(x.ndim)])
        # In logarithms no power overflows, whatever p is; half precision has no room for the cube of 41 or of 0.003.
        powers = p * x.to(wide).clamp_min(EPS).log()
        mean = powers.logsumexp(self.dim, keepdim=True) - math.log(math.prod(x.shape[i] for i in self.dim))
        pooled = (mean / p).exp().to(x.dtype)
        return pooled.flatten(1) if self.flatten else pooled

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"groups={len(self.p)}, dim={self.dim}"


def ggem(*, groups: int | None = None, p: float = 3.0) -> Edit:
    """Return the edit that makes GGeM the pooling of a model, for its classifier and for ``pre_logits`` alike.

    In a vision transformer it pools the patch tokens, without class and register tokens, in place of the class token,
    the mean or an attention pooling; the final normalisation stays where the model has it, before or after the pooling.
    In a model with feature maps it takes the place of timm's ``SelectAdaptivePool2d``.

    Args:
        groups: that the channels are divided into; None: as many as the last attention has heads. 1 is GeM.
        p: initial exponent of all groups.

    Raises:
        InputError: a number out of range; or, from the edit, a model without such a pooling (the text lists what it
            has), or whose channels cannot be divided so.

    Example:
        >>> model = ggem()(timm.create_model("vit_base_patch16_224"))          # doctest: +SKIP
        >>> model = ggem(groups=8)(timm.create_model("resnet50"))              # doctest: +SKIP
    """
    GGeM(1 if groups is None else groups, p)  # refuse a wrong number now, not when the edit is applied

    def edit(model: nn.Module) -> nn.Module:
        surface: Any = model

        def pooling(**layout: Any) -> GGeM:
            return GGeM(_heads(model) if groups is None else groups, p, **layout)

        def before(layer: nn.Module) -> nn.Module:
            tokens = pooling(skip=surface.num_prefix_tokens)
            _refuse_unequal(surface.num_features, len(tokens.p))
            return nn.Sequential(tokens, layer)

        def inside(select: Any) -> nn.Module:
            # The forms of pooling differ in the axes they take and in whether they or their holder flatten.
            old = select.pool
            select.pool = pooling(dim=tuple(getattr(old, "dim", (2, 3))), flatten=getattr(old, "flatten", False))
            select.pool_type = "ggem"
            return cast(nn.Module, select)

        what = "pooling of tokens or feature maps that could be replaced"
        if not _pools_tokens(model):
            return replace_modules(model, lambda _, m: _pools_maps(m), inside, what=what)
        first = getattr(surface, "fc_norm", surface.head_drop)
        replace_modules(model, lambda _, m: m is first, before, what=what)
        surface.global_pool, surface.attn_pool = "", None  # the model's own pooling hands all tokens on
        return model

    return edit


def _pools_tokens(model: Any) -> bool:
    """Whether this is a transformer of timm that pools tokens before its ``fc_norm`` or ``head_drop``."""
    pool = getattr(model, "global_pool", None)
    one_head = getattr(model, "head_dist", None) is None  # a distilled one reads two tokens, each with its classifier
    surface = hasattr(model, "num_prefix_tokens") and hasattr(model, "head_drop")
    return isinstance(pool, str) and bool(pool) and surface and one_head


def _pools_maps(module: nn.Module) -> bool:
    if not isinstance(module, SelectAdaptivePool2d):
        return False
    return bool(module.pool_type) and not module.pool_type.endswith(("catavgmax", "ggem"))  # the first doubles channels


def _heads(model: nn.Module) -> int:
    """Return how many heads the last attention of the trunk has."""
    found = [
        module.num_heads
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_heads", None), int) and not name.startswith("attn_pool")
    ]
    if not found:
        raise InputError(
            f"ggem: {type(model).__name__} has no attention heads to count: say groups=8, or another number"
        )
    return int(found[-1])


def _refuse_unequal(channels: int, groups: int) -> None:
    if channels % groups:
        raise InputError(
            f"ggem: {channels} channels cannot be divided into {groups} equal groups: give another groups="
        )
