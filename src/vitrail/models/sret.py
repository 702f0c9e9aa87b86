"""SReT: each block is passed through twice, so that depth comes without weights, and attends in sliced groups.

Shen et al., "Sliced Recursive Transformer" (ECCV 2022), arXiv 2111.05297, and the authors' code (szq0214/SReT), with
which the weights were trained. Behind every pass is a small projection of its own; what goes past a layer and what is
added to it are weighed by learnt numbers. Of the passes of a stage, one attends inside many groups of neighbours, the
next inside few groups drawn from all tokens, in turn, which together costs less than attention of all to all.

Shapes: B images, H x W places, C channels. Stages take and return (B, C, H, W); blocks work on tokens (B, H W, C).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.layers.attention import Attention
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.recursion import NonlinearProjection, in_groups
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg

# ---- a block and its passes ------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, then a feed-forward layer; four learnt numbers weigh what goes past each and what it gives.

    Args:
        dim: C.
        num_heads: a divisor of it.
        mlp_ratio: hidden width of the feed-forward layer over C.
        drop_path: stochastic depth, in [0, 1).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.residual = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, groups: int = 1, shuffled: bool = False) -> Tensor:
        """Return (B, N, C).

        Args:
            x: (B, N, C).
            groups, shuffled: as in ``layers.recursion.in_groups``.
        """
        past, taken, past_mlp, taken_mlp = self.residual.unbind()
        found = in_groups(self.attn, self.norm1(x), groups, shuffled=shuffled, training=self.training)
        x = past * x + taken * self.drop_path(found)
        return past_mlp * x + taken_mlp * self.drop_path(self.mlp(self.norm2(x)))


class Recursion(nn.Module):
    """A block, and for each pass through it a projection behind."""

    def __init__(self, block: Block, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.block = block
        self.projections = nn.ModuleList(projections)

    def forward(self, x: Tensor, number: int, groups: int, shuffled: bool) -> Tensor:
        """Return (B, N, C) after pass ``number``."""
        return self.projections[number](self.block(x, groups, shuffled))


class Stage(nn.Module):
    """A depthwise convolution that halves the size (none in the first stage), then the passes.

    Args:
        dim_in: channels that come; None is no convolution.
        dim: channels, a multiple of ``dim_in``.
        blocks: each with as many projections as it has passes.
        groups: in which the even and the odd passes attend, counted from 0 in the stage; odd ones shuffle.
    """

    def __init__(self, dim_in: int | None, dim: int, blocks: Sequence[Recursion], groups: Sequence[int]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if dim_in is None else nn.Conv2d(dim_in, dim, 3, 2, 1, groups=dim_in)
        self.blocks = nn.ModuleList(blocks)
        self.groups = tuple(groups)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.downsample(x)
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).contiguous()  # once, where each sum would else meet two layouts
        number = 0
        for block in self.blocks:
            for loop in range(len(block.projections)):  # type: ignore[arg-type]
                more = (loop, self.groups[number % 2], bool(number % 2))
                x = checkpoint(block, x, *more) if self.grad_checkpointing and self.training else block(x, *more)
                number += 1
        return x.transpose(1, 2).unflatten(2, (height, width))


# ---- the net ---------------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """Three convolutions, and a learnt position added to each place, interpolated on maps of another size."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int], side: int) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        for width, stride in zip((dim // 2, dim, dim), strides, strict=True):
            self.conv.extend([nn.Conv2d(in_chans, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)])
            in_chans = width
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, dim, side, side), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.conv(x)
        return x + _resized(self.pos_embed, x.shape[2:]).to(x.dtype)


def _resized(positions: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(positions.shape[2:]) == tuple(size):
        return positions
    return F.interpolate(positions.float(), tuple(size), mode="bicubic")


class SReT(StagedNet):
    """SReT with timm's surface; features at strides 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        img_size: pixels of the side for which positions are learnt; other sizes interpolate them.
        dims: width C of each stage, a multiple of the one before.
        depths: passes of each stage, as many for each of its blocks; hundreds, if wished.
        blocks: blocks of each stage that have weights. As many as passes is a net without recursion.
        num_heads: heads of each stage, which divide its width.
        groups: for each stage, the groups in which even passes attend, and those of odd ones, which shuffle; (1, 1) is
            attention of all to all.
        mlp_ratio: hidden width of the feed-forward layers over C.
        projection_ratio: hidden width of the projections between passes over C.
        stem_strides: of the three convolutions before the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth, in [0, 1); the published nets divide it by the passes, and give block j of a
            stage the share of that stage's pass j.

    Raises:
        InputError: an image of no pixels, entries of several lengths, passes that the blocks do not divide, widths or
            heads that do not fit, a group of none, or a pooling that is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (4, 10, 6),
        blocks: Sequence[int] = (2, 5, 3),
        num_heads: Sequence[int] = (2, 4, 8),
        groups: Sequence[Sequence[int]] = ((8, 2), (4, 1), (1, 1)),
        mlp_ratio: float = 3.6,
        projection_ratio: float = 1.0,
        stem_strides: Sequence[int] = (2, 2, 2),
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(img_size, dims, depths, blocks, num_heads, groups, stem_strides)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        stride = math.prod(stem_strides)
        self.stem = Stem(in_chans, dims[0], stem_strides, -(-img_size // stride))
        stages: list[Stage] = []
        self.feature_info = []
        for i, (dim, depth, number, heads, slices) in enumerate(zip(dims, depths, blocks, num_heads, groups)):
            before = sum(depths[:i])
            units = [
                Recursion(
                    Block(dim, heads, mlp_ratio, drop_path=drop_path_rate * (before + j) / sum(depths)),
                    [NonlinearProjection(dim, projection_ratio) for _ in range(depth // number)],
                )
                for j in range(number)
            ]
            stages.append(Stage(dims[i - 1] if i else None, dim, units, slices))
            self.feature_info.append({"num_chs": dim, "reduction": stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of matrices that are not decayed."""
        return {"stem.pos_embed"}

    def put_head(self) -> None:
        """Set ``head`` for ``num_classes``, begun as torch begins linear layers, as published."""
        place = self.norm.weight
        self.head = nn.Identity()
        if self.num_classes:
            self.head = nn.Linear(self.head_hidden_size, self.num_classes, device=place.device, dtype=place.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or with ``pre_logits`` the normalised pooled features (B, C)."""
        pooled = self.norm(self.global_pool(x).movedim(1, -1)).movedim(-1, 1)
        return pooled if pre_logits else self.head(self.drop(pooled))


def _check(
    img_size: int,
    dims: Sequence[int],
    depths: Sequence[int],
    blocks: Sequence[int],
    heads: Sequence[int],
    groups: Sequence[Sequence[int]],
    strides: Sequence[int],
) -> None:
    named = {"depths": depths, "blocks": blocks, "num_heads": heads, "groups": groups}
    for name, values in named.items():
        if not isinstance(values, Sequence):
            raise InputError(f"{name} = {values} is one number: give a list, with an entry for each of the stages")
        if len(values) != len(dims):
            raise InputError(
                f"{name} = {tuple(values)} has {len(values)} entries and dims has {len(dims)}: give one for each stage"
            )
    if img_size < 1:
        raise InputError(f"img_size = {img_size} is not allowed: give 1 pixel or more")
    if len(strides) != 3 or min(strides) < 1:
        raise InputError(f"stem_strides = {tuple(strides)} is not allowed: give three of 1 or more")
    for before, dim in zip((1, *dims), dims):
        if dim < 2 or dim % before:
            raise InputError(f"dims = {tuple(dims)} is not allowed: give multiples, each of the one before it")
    for depth, number in zip(depths, blocks):
        if number < 1 or depth < 1 or depth % number:
            raise InputError(f"blocks = {number} does not divide depths = {depth}: give each block as many passes")
    for dim, number in zip(dims, heads):
        if number < 1 or dim % number:
            raise InputError(f"num_heads = {number} does not divide a width of {dim}: give a divisor of it")
    for pair in groups:
        if not isinstance(pair, Sequence) or len(pair) != 2 or min(pair) < 1:
            raise InputError(
                f"groups = {pair} of a stage is not allowed: give two numbers of 1 or more, of even and odd passes"
            )


# ---- the authors' weights --------------------------------------------------------------------------------------------

_STEM = {"conv": 0, "bn": 1}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """Return the authors' weights under our names: a block's are there once, and positions fit the model."""
    state = {re.sub(r"^module\.", "", key): value for key, value in state_dict.get("model", state_dict).items()}
    if "stem.pos_embed" not in state:
        state = _ours(state, [len(stage.blocks[0].projections) for stage in model.stages])
    return {**state, "stem.pos_embed": _resized(state["stem.pos_embed"], model.stem.pos_embed.shape[2:])}


def _ours(state: Mapping[str, Tensor], loops: Sequence[int]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if found := re.match(r"patch_embed\.(conv|bn)(\d)\.(.+)", key):
            ours[f"stem.conv.{3 * int(found[2]) - 3 + _STEM[found[1]]}.{found[3]}"] = value
        elif found := re.match(r"pools\.(\d+)\.conv\.(.+)", key):
            ours[f"stages.{int(found[1]) + 1}.downsample.{found[2]}"] = value
        elif found := re.match(r"transformers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            stage, place = int(found[1]), int(found[2])  # a block and its projection stand in turn, for each pass
            number, loop = divmod(place // 2, loops[stage])
            name = f"stages.{stage}.blocks.{number}.{f'projections.{loop}' if place % 2 else 'block'}"
            if coefficient := re.match(r"coefficient(\d)\.", found[3]):
                size = 2 if place % 2 else 4
                ours.setdefault(f"{name}.residual", value.new_ones(size))[int(coefficient[1]) - 1] = value[0]
            else:
                ours[f"{name}.{found[3].replace('norm1', 'norm') if place % 2 else found[3]}"] = value
        else:
            ours["stem.pos_embed" if key == "pos_embed" else key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


# 224 pixels of 256, as in the evaluation of SReT in the authors' other repository, szq0214/FKD.
_CFG: dict[str, Any] = {"first_conv": "stem.conv.0", "crop_pct": 0.875}
_LT: dict[str, Any] = {"mlp_ratio": 4.0}
_S: dict[str, Any] = {
    "dims": (126, 252, 504),
    "num_heads": (3, 6, 12),
    "mlp_ratio": 3.0,
    "projection_ratio": 2.0,
}
_WHOLE: dict[str, Any] = {"groups": ((1, 1), (1, 1), (1, 1))}
default_cfgs = generate_default_cfgs(
    {
        "sret_nano": nano_cfg(first_conv="stem.conv.0"),
        "sret_t": cfg(**_CFG),
        "sret_lt": cfg(**_CFG),
        "sret_lt_16_14_1": cfg(**_CFG),
        "sret_s": cfg(**_CFG),
        "sret_t_wo_slice": cfg(**_CFG),
        "sret_lt_wo_slice": cfg(**_CFG),
        "sret_s_wo_slice": cfg(**_CFG),
        "sret_t_wo_slice_384": cfg(384, **{**_CFG, "crop_pct": 1.0}),
        "sret_s_wo_slice_384": cfg(384, **{**_CFG, "crop_pct": 1.0}),
        "sret_s_wo_slice_512": cfg(512, **{**_CFG, "crop_pct": 1.0}),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SReT:
    net: SReT = create(SReT, variant, pretrained, checkpoint_filter_fn, stages=3, **kwargs)
    return net


@register_model
def sret_nano(pretrained: bool = False, **kwargs: Any) -> SReT:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {
        "img_size": 32,
        "dims": (32, 64, 128),
        "depths": (2, 2, 2),
        "blocks": (1, 1, 1),
        "groups": ((4, 2), (2, 1), (1, 1)),
        "mlp_ratio": 3.0,
        "stem_strides": (2, 2, 1),
    }
    return _create("sret_nano", pretrained, **{**own, **kwargs})


@register_model
def sret_t(pretrained: bool = False, **kwargs: Any) -> SReT:
    """4.8 M parameters; trained with stochastic depth 0.1."""
    return _create("sret_t", pretrained, **kwargs)


@register_model
def sret_lt(pretrained: bool = False, **kwargs: Any) -> SReT:
    """5.0 M parameters, in groups of 8-4-1 and 2-1-1; trained with stochastic depth 0.1. The paper's TL."""
    return _create("sret_lt", pretrained, **{**_LT, **kwargs})


@register_model
def sret_lt_16_14_1(pretrained: bool = False, **kwargs: Any) -> SReT:
    """5.0 M parameters, in groups of 16-14-1 and 1-1-1; trained with stochastic depth 0.1."""
    return _create("sret_lt_16_14_1", pretrained, **{**_LT, "groups": ((16, 1), (14, 1), (1, 1)), **kwargs})


@register_model
def sret_s(pretrained: bool = False, **kwargs: Any) -> SReT:
    """21 M parameters; trained with stochastic depth 0.2."""
    return _create("sret_s", pretrained, **{**_S, **kwargs})


@register_model
def sret_t_wo_slice(pretrained: bool = False, **kwargs: Any) -> SReT:
    """4.8 M parameters, attention of all to all."""
    return _create("sret_t_wo_slice", pretrained, **{**_WHOLE, **kwargs})


@register_model
def sret_lt_wo_slice(pretrained: bool = False, **kwargs: Any) -> SReT:
    """5.0 M parameters, attention of all to all."""
    return _create("sret_lt_wo_slice", pretrained, **{**_LT, **_WHOLE, **kwargs})


@register_model
def sret_s_wo_slice(pretrained: bool = False, **kwargs: Any) -> SReT:
    """21 M parameters, attention of all to all; trained with stochastic depth 0.2."""
    return _create("sret_s_wo_slice", pretrained, **{**_S, **_WHOLE, **kwargs})


@register_model
def sret_t_wo_slice_384(pretrained: bool = False, **kwargs: Any) -> SReT:
    """4.9 M parameters, attention of all to all, positions for 384 pixels."""
    return _create("sret_t_wo_slice_384", pretrained, **{**_WHOLE, "img_size": 384, **kwargs})


@register_model
def sret_s_wo_slice_384(pretrained: bool = False, **kwargs: Any) -> SReT:
    """21 M parameters, attention of all to all, positions for 384 pixels."""
    return _create("sret_s_wo_slice_384", pretrained, **{**_S, **_WHOLE, "img_size": 384, **kwargs})


@register_model
def sret_s_wo_slice_512(pretrained: bool = False, **kwargs: Any) -> SReT:
    """21 M parameters, attention of all to all, positions for 512 pixels."""
    return _create("sret_s_wo_slice_512", pretrained, **{**_S, **_WHOLE, "img_size": 512, **kwargs})
