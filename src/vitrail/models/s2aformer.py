"""S2AFormer: attention with keys and values of a smaller map, and with one channel in a head's queries and keys.

Xu et al., "S2AFormer: Strip Self-Attention for Efficient Vision Transformer" (2025), arXiv 2505.22195. No code is
published, and we had not all of the paper: the card says what of this file is the paper's and what is ours.

Shapes: B images, H x W places, N = H W, C channels in heads; the smaller map has n places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.padded_conv import PaddedConv2d
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks

# ---- the layers ------------------------------------------------------------------------------------------------------


class StripSelfAttention(nn.Module):
    """Self-attention (SSA) with K and V from a map made smaller, and with few channels in Q and K.

    Args:
        dim: C.
        num_heads: which divides C.
        reduction: places, in height and in width, for one of the smaller map.
        key_dim: channels of a head's queries and keys; 0 is C / heads, as in spatial-reduction attention.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int = 1, key_dim: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        width = num_heads * key_dim if key_dim else dim
        self.query = nn.Conv2d(dim, width, 1)
        self.reduce: nn.Module = nn.Identity()
        if reduction > 1:
            conv = PaddedConv2d(dim, dim, reduction, reduction, groups=dim)
            conv.multiple = reduction
            self.reduce = nn.Sequential(conv, LayerNorm2d(dim))
        self.key = nn.Conv2d(dim, width, 1)
        self.value = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        small = self.reduce(x)
        query, key, value = (
            part.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
            for part in (self.query(x), self.key(small), self.value(small))
        )  # (B, heads, N or n, channels)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.proj(found.transpose(2, 3).reshape(x.shape))


class LocalInteraction(nn.Module):
    """Neighbours speak to each other, channel by channel (LIM): two depthwise convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return self.conv2(self.norm(F.gelu(self.conv1(x))))


class HybridPerceptionBlock(nn.Module):
    """A depthwise convolution, strip self-attention, local interaction and a feed-forward layer, each added (HPB).

    Args:
        dim: C.
        attn: strip self-attention, or None to leave it out.
        mlp_ratio: hidden width of the feed-forward layer over C.
        interaction: whether there is local interaction.
        drop_path: stochastic depth of all but the first part, in [0, 1).
    """

    def __init__(
        self, dim: int, attn: StripSelfAttention | None, mlp_ratio: float, *, interaction: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        hidden = int(dim * mlp_ratio)
        parts: dict[str, nn.Module] = {} if attn is None else {"attn": attn}
        if interaction:
            parts["lim"] = LocalInteraction(dim)
        parts["mlp"] = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))
        self.norms = nn.ModuleDict({name: LayerNorm2d(dim) for name in parts})
        self.parts = nn.ModuleDict(parts)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = x + self.conv(x)
        for name, part in self.parts.items():
            x = x + self.drop_path(part(self.norms[name](x)))
        return x


class Stage(nn.Module):
    """A convolution that halves the map, and blocks."""

    def __init__(self, dim_in: int, dim: int, blocks: Sequence[HybridPerceptionBlock]) -> None:
        super().__init__()
        conv = PaddedConv2d(dim_in, dim, 2, 2)
        conv.multiple = 2
        self.downsample = nn.Sequential(conv, LayerNorm2d(dim))
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return through_blocks(self, self.downsample(x))


# ---- the net ---------------------------------------------------------------------------------------------------------


class S2AFormer(StagedNet):
    """S2AFormer with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        stem_dim: width of the stem.
        dims: width C of the four stages.
        depths: blocks of the four stages.
        num_heads: of each stage, which divide its width.
        reductions: places, in height and in width, for one of the maps of keys and values.
        key_dim: channels of a head's queries and keys, 1 as published; 0 is C / heads.
        attention: whether blocks have strip self-attention.
        interaction: whether blocks have local interaction.
        mlp_ratio: hidden width of the feed-forward layers over C.
        feature_dim: width of the layer before the classifier.
        stem_stride: 1, or 2 as published: the first stage has half as many places in height and in width again.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, heads that do not divide a width, a number of channels, a stride or a
            pooling that is not allowed.
    """

    BEHIND = r"^(?:norm|hidden)\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_dim: int = 16,
        dims: Sequence[int] = (40, 80, 160, 320),
        depths: Sequence[int] = (1, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        key_dim: int = 1,
        attention: bool = True,
        interaction: bool = True,
        mlp_ratio: float = 4.0,
        feature_dim: int = 1280,
        stem_stride: int = 2,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        by_stage = {"dims": dims, "depths": depths, "num_heads": num_heads, "reductions": reductions}
        for name, values in by_stage.items():
            if len(values) != 4 or min(values) < 1:
                raise InputError(f"{name} = {tuple(values)} is not allowed: give 1 or more for each of four stages")
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % heads:
                raise InputError(f"num_heads = {heads} does not divide a width of {dim}: give a divisor")
        for name, value in (("stem_dim", stem_dim), ("feature_dim", feature_dim)):
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        if int(min(dims) * mlp_ratio) < 1:
            raise InputError(f"mlp_ratio = {mlp_ratio} leaves no hidden channels for dims = {tuple(dims)}: give more")
        if key_dim < 0:
            raise InputError(f"key_dim = {key_dim} is not allowed: give 1 or more, or 0 for the width of a head")
        if stem_stride not in (1, 2):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 1 or 2")
        self.num_classes = num_classes
        self.num_features, self.head_hidden_size = dims[3], feature_dim
        widths = (in_chans, stem_dim, stem_dim, stem_dim)
        layers: list[nn.Module] = []
        for i in range(3):
            stride = 1 if i else stem_stride
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(stem_dim), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, dim in enumerate(dims):
            blocks = [
                HybridPerceptionBlock(
                    dim,
                    StripSelfAttention(dim, num_heads[i], reductions[i], key_dim) if attention else None,
                    mlp_ratio,
                    interaction=interaction,
                    drop_path=next(rates),
                )
                for _ in range(depths[i])
            ]
            stages.append(Stage(dims[i - 1] if i else stem_dim, dim, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2 ** (i + 1), "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[3])
        self.hidden = nn.Linear(dims[3], feature_dim)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or with ``pre_logits`` what the classifier takes, (B, feature_dim)."""
        pooled = self.global_pool(x)
        if pooled.ndim == 4:
            return pooled
        pooled = F.gelu(self.hidden(pooled))
        return pooled if pre_logits else self.head(self.drop(pooled))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return weights as they are: none were published, and ours have our names."""
    inner: Mapping[str, Any] = state.get("state_dict", state)
    return inner


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {
        "s2aformer_nano": nano_cfg(),
        **{f"s2aformer_{size}": cfg(crop_pct=0.9) for size in ("mini", "t", "xs", "s", "m")},
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> S2AFormer:
    net: S2AFormer = create(S2AFormer, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def s2aformer_nano(pretrained: bool = False, **kwargs: Any) -> S2AFormer:
    """0.09 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"stem_dim": 8, "dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 4)}
    small = {"reductions": (4, 2, 2, 1), "feature_dim": 128, "mlp_ratio": 2.0, "stem_stride": 1}
    return _create("s2aformer_nano", pretrained, **{**own, **small, **kwargs})


@register_model
def s2aformer_mini(pretrained: bool = False, **kwargs: Any) -> S2AFormer:
    """5.0 M parameters; widths and depths are ours."""
    own = {"dims": (32, 64, 136, 352), "depths": (2, 2, 2, 2)}
    return _create("s2aformer_mini", pretrained, **{**own, **kwargs})


@register_model
def s2aformer_t(pretrained: bool = False, **kwargs: Any) -> S2AFormer:
    """5.8 M parameters; widths and depths are ours."""
    return _create("s2aformer_t", pretrained, **kwargs)


@register_model
def s2aformer_xs(pretrained: bool = False, **kwargs: Any) -> S2AFormer:
    """6.5 M parameters; widths and depths are ours."""
    own = {"dims": (40, 88, 168, 352), "depths": (2, 2, 6, 2)}
    return _create("s2aformer_xs", pretrained, **{**own, **kwargs})


@register_model
def s2aformer_s(pretrained: bool = False, **kwargs: Any) -> S2AFormer:
    """10.6 M parameters; widths and depths are ours."""
    own = {"stem_dim": 24, "dims": (52, 104, 208, 416), "depths": (2, 3, 6, 3)}
    return _create("s2aformer_s", pretrained, **{**own, **kwargs})


@register_model
def s2aformer_m(pretrained: bool = False, **kwargs: Any) -> S2AFormer:
    """24.8 M parameters; widths and depths are ours."""
    own = {"stem_dim": 32, "dims": (80, 160, 304, 560), "depths": (3, 3, 12, 3)}
    return _create("s2aformer_m", pretrained, **{**own, **kwargs})
