"""SBCFormer: attention over a few places, brought back to the full map, gates what convolutions see there.

Lu, Suganuma, Okatani, "SBCFormer: Lightweight Network Capable of Full-size ImageNet Classification at 1 FPS on Single
Board Computers" (WACV 2024), arXiv 2311.03747, and the authors' code (xyongLu/SBCFormer), with which the weights were
trained. Each stage is an hourglass: the map shrinks to 7 x 7 places, whatever its size, and grows again.

Shapes: B images, H x W places, C channels, h x w places in the narrow part, n heads, queries and keys of k channels,
values of a k. Convolutions work on (B, C, H, W), transformers on (B, h, w, C).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg

# ---- convolutions ----------------------------------------------------------------------------------------------------


class ConvNorm(nn.Sequential):
    """A convolution without bias, and a norm."""

    def __init__(self, dim_in: int, dim: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(dim)
        )


class InvertedResidual(nn.Module):
    """A layer that widens, a depthwise one of 3 x 3 and one that narrows, added to what came in.

    Args:
        dim: C.
        hidden: channels between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = ConvNorm(dim, hidden)
        self.depthwise = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.project = ConvNorm(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return x + self.project(F.gelu(self.depthwise(F.gelu(self.expand(x)))))


# ---- the modified attention ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention of all places, whose values hold local details: a depthwise 3 x 3 convolution is added to them.

    A bias is learned for each head and each distance, in rows and in columns, that there is among ``side`` x ``side``
    places. On a map of another size it is resized: distances count as shares of the map.

    Args:
        dim: C.
        num_heads: n.
        key_dim: k.
        attn_ratio: a, channels of a head's values over those of its keys.
        side: places of the map's height and width for which biases are kept.
    """

    def __init__(self, dim: int, num_heads: int, key_dim: int, attn_ratio: float, side: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.key_dim = key_dim
        values = int(attn_ratio * key_dim) * num_heads
        self.qkv = nn.Linear(dim, 2 * key_dim * num_heads + values)  # published as a convolution of one place
        self.local = ConvNorm(values, values, 3, groups=values)
        self.proj = nn.Linear(values, dim)
        self.bias = nn.Parameter(torch.zeros(num_heads, side, side))

    def position_bias(self, height: int, width: int) -> Tensor:
        """Return what is added to the scores on a map of that size, (1, n, h w, h w)."""
        table: Tensor = self.bias
        if (height, width) != table.shape[1:]:
            table = F.interpolate(table[None], (height, width), mode="bilinear", align_corners=True)[0]
        rows, columns = (_distances(side, table.device) for side in (height, width))
        bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]  # (n, h, w, h, w)
        return bias.reshape(1, self.num_heads, height * width, height * width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, h, w, C)."""
        batch, height, width, _ = x.shape
        split = self.key_dim * self.num_heads
        query, key, value = self.qkv(x).split((split, split, self.local[1].num_features), -1)
        value = value.permute(0, 3, 1, 2)
        value = (value + F.gelu(self.local(value))).permute(0, 2, 3, 1)
        query, key, value = (
            part.reshape(batch, height * width, self.num_heads, -1).transpose(1, 2) for part in (query, key, value)
        )
        bias = self.position_bias(height, width).to(query.dtype)
        found = F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2)
        return self.proj(found.reshape(batch, height, width, -1))


def _distances(side: int, device: torch.device) -> Tensor:
    """Return how far places of a line are from each other, (side, side)."""
    places = torch.arange(side, device=device)
    return (places[:, None] - places).abs()


class Transformer(nn.Module):
    """The modified attention, then a feed-forward layer, each added to what came in."""

    def __init__(self, dim: int, attn: Attention, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, h, w, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


# ---- the hourglass ---------------------------------------------------------------------------------------------------


class Hourglass(nn.Module):
    """Two streams: what convolutions see on the full map, and what attention finds on a small one gates it.

    Args:
        dim: C.
        local: inverted residuals before the streams part.
        mixer: inverted residuals on the small map.
        transformers: of the small map.
        invres_ratio: hidden channels of the first inverted residuals over C; those of the small map have 2 C.
        pool: places of the full map, in height and in width, for one of the small map.
    """

    def __init__(
        self, dim: int, local: int, mixer: int, transformers: Sequence[Transformer], invres_ratio: float, pool: int
    ) -> None:
        super().__init__()
        self.local = nn.Sequential(*(InvertedResidual(dim, int(dim * invres_ratio)) for _ in range(local)))
        self.pool: nn.Module = nn.Identity()
        self.grow: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if pool > 1:
            # Windows that reach over the edge average what is inside.
            self.pool = nn.AvgPool2d(pool, ceil_mode=True)
            self.grow = nn.ConvTranspose2d(dim, dim, pool, pool, groups=dim)
            self.norm = nn.BatchNorm2d(dim)
        self.mixer = nn.Sequential(*(InvertedResidual(dim, 2 * dim) for _ in range(mixer)))
        self.blocks = nn.ModuleList(transformers)
        self.gate = ConvNorm(dim, dim)
        self.fuse = ConvNorm(2 * dim, dim)
        self.grad_checkpointing = False

    def _part(self, part: nn.Module, x: Tensor) -> Any:
        """Return ``part(x)``, computed again in the backward pass if that is wanted."""
        return checkpoint(part, x) if self.grad_checkpointing and self.training else part(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        for block in self.local:
            x = self._part(block, x)
        small = self.pool(x)
        for block in self.mixer:
            small = self._part(block, small)
        small = small.permute(0, 2, 3, 1)
        for block in self.blocks:
            small = self._part(block, small)
        wide = self.grow(small.permute(0, 3, 1, 2))[..., : x.shape[2], : x.shape[3]]
        wide = self.norm(wide)
        return self.fuse(torch.cat((wide, x * F.hardsigmoid(self.gate(wide))), 1))


class Stage(nn.Module):
    """What makes the map smaller, then an hourglass."""

    def __init__(self, merge: nn.Module, hourglass: Hourglass) -> None:
        super().__init__()
        self.merge = merge
        self.hourglass = hourglass

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self.hourglass.grad_checkpointing

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.hourglass.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        y: Tensor = self.hourglass(self.merge(x))
        return y


class SBCFormer(StagedNet):
    """SBCFormer with timm's surface; features at strides 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dims: width C of each of the three stages; a quarter and half of the first are those of the stem.
        num_heads: n of each stage.
        key_dim: k, channels of a head's queries and keys.
        attn_ratio: a, channels of a head's values over k.
        mlp_ratio: hidden width of the feed-forward layers over C.
        invres_ratio: hidden width of the inverted residuals on the full map over C.
        depths_invres: inverted residuals on the full map of each stage.
        depths_mixer: inverted residuals on its small map.
        depths_mattn: transformers on its small map.
        pool_ratios: by how much the map of each stage shrinks, in height and in width.
        side: height and width of the small maps for which attention biases are kept.
        stem_stride: 2, 4 or 8 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last transformer, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, a size, a stride or a pooling that is not allowed.
    """

    BEFORE = r"^stages\.0\.merge"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (128, 256, 384),
        num_heads: Sequence[int] = (4, 6, 8),
        key_dim: int = 24,
        attn_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        invres_ratio: float = 2.0,
        depths_invres: Sequence[int] = (2, 2, 1),
        depths_mixer: Sequence[int] = (2, 2, 2),
        depths_mattn: Sequence[int] = (2, 4, 3),
        pool_ratios: Sequence[int] = (4, 2, 1),
        side: int = 7,
        stem_stride: int = 8,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        by_stage = {
            "dims": (dims, 4),
            "num_heads": (num_heads, 1),
            "depths_invres": (depths_invres, 0),
            "depths_mixer": (depths_mixer, 0),
            "depths_mattn": (depths_mattn, 0),
            "pool_ratios": (pool_ratios, 1),
        }
        for name, (values, least) in by_stage.items():
            if len(values) != 3 or min(values) < least:
                raise InputError(
                    f"{name} = {tuple(values)} is not allowed: give {least} or more for each of three stages"
                )
        for name, value in (("key_dim", key_dim), ("side", side)):
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        if int(attn_ratio * key_dim) < 1:
            raise InputError(f"attn_ratio = {attn_ratio} leaves no values for key_dim = {key_dim}: give more")
        for name, ratio in (("mlp_ratio", mlp_ratio), ("invres_ratio", invres_ratio)):
            if int(min(dims) * ratio) < 1:
                raise InputError(f"{name} = {ratio} leaves no hidden channels for dims = {tuple(dims)}: give more")
        if stem_stride not in (2, 4, 8):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 2, 4 or 8")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[2]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths_mattn), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        merge: nn.Module = _stem(in_chans, dims[0], stem_stride)
        for i, dim in enumerate(dims):
            transformers = [
                Transformer(
                    dim, Attention(dim, num_heads[i], key_dim, attn_ratio, side), mlp_ratio, drop_path=next(rates)
                )
                for _ in range(depths_mattn[i])
            ]
            hourglass = Hourglass(
                dim, depths_invres[i], depths_mixer[i], transformers, invres_ratio=invres_ratio, pool=pool_ratios[i]
            )
            stages.append(Stage(merge, hourglass))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
            if i < 2:
                merge = ConvNorm(dim, dims[i + 1], 3, 2)
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[2], eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map behind the last stage, (B, C, H/32, W/32)."""
        features: Tensor = self.stages(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or with ``pre_logits`` the pooled, normalised features (B, C)."""
        pooled = self.global_pool(x)
        if pooled.ndim == 4:
            return pooled
        pooled = self.norm(pooled)
        return pooled if pre_logits else self.head(self.drop(pooled))


def _stem(in_chans: int, dim: int, stride: int) -> nn.Sequential:
    """Return three convolutions, of which the first halve the size until the stride is reached."""
    widths, layers = (in_chans, dim // 4, dim // 2, dim), []
    for i in range(3):
        layers += [ConvNorm(widths[i], widths[i + 1], 3, 2 if 2**i < stride else 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, Attention):
        # After its parts: this layer is one of their convolutions.
        nn.init.normal_(module.qkv.weight, std=math.sqrt(2 / module.qkv.out_features))
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))


# ---- the authors' weights --------------------------------------------------------------------------------------------

_AUTHORS = (
    (r"^module\.", ""),
    (r"^merging_blocks\.0\.stem\.", "stages.0.merge."),
    (r"^patch_embed\.stem\.", "stages.0.merge."),  # the same module under its second name
    (r"^merging_blocks\.(\d)\.conv\.", r"stages.\1.merge.0."),
    (r"^merging_blocks\.(\d)\.norm\.", r"stages.\1.merge.1."),
    (r"^sbcformer_blocks\.(\d)\.", r"stages.\1.hourglass."),
    (r"\.invres_blocks\.InvRes_", ".local."),
    (r"\.mixer\.Mixer_", ".mixer."),
    (r"\.trans_blocks\.MAttn_", ".blocks."),
    (r"\.convTrans\.", ".grow."),
    (r"\.proj_fuse\.", ".fuse."),
    (r"\.hourglass\.proj\.", ".hourglass.gate."),
    (r"\.pwconv1_bn\.", ".expand."),
    (r"\.dwconv_bn\.", ".depthwise."),
    (r"\.pwconv2_bn\.", ".project."),
    (r"\.attn\.pwconv\.", ".attn.qkv."),
    (r"\.attn\.dwconv\.", ".attn.local."),
    (r"\.attn\.proj_out\.", ".attn.proj."),
    (r"\.attention_biases$", ".bias"),
    (r"\.conv\.weight$", ".0.weight"),
    (r"\.bn\.(\w+)$", r".1.\1"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights under our names; what their modules keep beside their weights is left out."""
    state = state_dict.get("model", state_dict)
    if "stages.0.merge.0.0.weight" in state:
        return state
    ours = {}
    for key, value in state.items():
        # The block that was built last has a second name in their net.
        if key.endswith("attention_bias_idxs") or key.startswith("sbcformer_blk."):
            continue
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        if key.endswith(".qkv.weight"):
            value = value.flatten(1)
        elif key.endswith(".attn.bias"):
            side = math.isqrt(value.shape[1])
            value = value.unflatten(1, (side, side))
        ours[key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


_OWN: dict[str, Any] = {"first_conv": "stages.0.merge.0.0"}
default_cfgs = generate_default_cfgs(
    {
        "sbcformer_nano": nano_cfg(pool_size=(4, 4), **_OWN),
        "sbcformer_xs": cfg(crop_pct=0.875, **_OWN),
        "sbcformer_s": cfg(crop_pct=0.875, **_OWN),
        "sbcformer_b": cfg(crop_pct=0.875, **_OWN),
        "sbcformer_l": cfg(crop_pct=0.875, **_OWN),
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> SBCFormer:
    net: SBCFormer = create(SBCFormer, variant, pretrained, checkpoint_filter_fn, stages=3, **options)
    return net


@register_model
def sbcformer_nano(pretrained: bool = False, **kwargs: Any) -> SBCFormer:
    """0.14 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"dims": (16, 32, 64), "num_heads": (1, 2, 4), "key_dim": 16, "attn_ratio": 1.0, "mlp_ratio": 2.0}
    depths = {"depths_invres": (1, 1, 1), "depths_mixer": (1, 1, 1), "depths_mattn": (1, 1, 1)}
    return _create("sbcformer_nano", pretrained, **{**own, **depths, "side": 4, "stem_stride": 2, **kwargs})


@register_model
def sbcformer_xs(pretrained: bool = False, **kwargs: Any) -> SBCFormer:
    """5.6 M parameters."""
    own = {"dims": (96, 160, 288), "num_heads": (3, 5, 6), "key_dim": 16, "depths_mattn": (2, 3, 2)}
    return _create("sbcformer_xs", pretrained, **{**own, **kwargs})


@register_model
def sbcformer_s(pretrained: bool = False, **kwargs: Any) -> SBCFormer:
    """8.5 M parameters."""
    own = {"dims": (96, 192, 320), "num_heads": (3, 5, 7), "key_dim": 16}
    return _create("sbcformer_s", pretrained, **{**own, **kwargs})


@register_model
def sbcformer_b(pretrained: bool = False, **kwargs: Any) -> SBCFormer:
    """13.8 M parameters."""
    return _create("sbcformer_b", pretrained, **kwargs)


@register_model
def sbcformer_l(pretrained: bool = False, **kwargs: Any) -> SBCFormer:
    """18.5 M parameters."""
    own = {"dims": (192, 288, 384), "key_dim": 32, "invres_ratio": 4.0}
    return _create("sbcformer_l", pretrained, **{**own, **kwargs})
