"""PATNet: a convolution sees a quarter of the channels, and attention works on those that it leaves untouched.

Huang et al., "Partial Convolution Meets Visual Attention" (2025), arXiv 2503.03148. The code is that of the paper's
longer form, PartialNet (haiduo/PartialNet), which has the same blocks; it goes back to FasterNet (Chen et al., CVPR
2023), whose nets are these without attention.

Shapes: B images, H x W places, N = H W, C channels, of which p = C / 4 are convolved and u = C - p are left.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.padded_conv import PaddedConv2d
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks

MIXERS = ("identity", "channel", "self")
"""What becomes of the channels that are not convolved: nothing, as in FasterNet; PAT_ch; PAT_sf."""
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
NEAR, FAR, BUCKETS = 20, 160, 40
"""Distances in places: each up to the first has a bias of its own; those to the second share, ever wider, the rest."""

# ---- the three partial attentions ------------------------------------------------------------------------------------


class GaussianChannelAttention(nn.Module):
    """PAT_ch: gates of channels from the mean and the deviation of each, as if their values were Gaussian.

    Args:
        dim: u.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * dim, dim, bias=False)
        self.gate_norm = nn.BatchNorm1d(dim)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, u, H, W)."""
        # A single place deviates from nothing; the unbiased estimate of the published code is no number there.
        deviation, mean = torch.std_mean(x, (2, 3), correction=min(1, x.shape[2] * x.shape[3] - 1))
        gate = F.hardsigmoid(self.gate_norm(self.mix(torch.cat((mean, deviation), 1))))
        return self.norm(x * gate[:, :, None, None])


class PartialSelfAttention(nn.Module):
    """PAT_sf: self-attention among all places, with a bias for the distance of two.

    Args:
        dim: u.
        num_heads: which divides u.
        attn_drop_rate, proj_drop_rate: dropout of the weights of attention and of what it found, in [0, 1).
    """

    def __init__(self, dim: int, num_heads: int, attn_drop_rate: float = 0.0, proj_drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.attn_drop_rate = num_heads, attn_drop_rate
        self.norm = LayerNorm2d(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        # As published: a distance is never negative, so that the first 40 entries are of no use.
        self.bias = nn.Parameter(torch.zeros(num_heads, 2 * BUCKETS + 1))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        """Return (B, u, H, W).

        Args:
            x: (B, u, H, W).
            buckets: of ``distance_buckets(H, W)``.
        """
        batch, dim, height, width = x.shape
        places = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, u)
        query, key, value = self.qkv(places).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[:, buckets][None].to(query.dtype)
        dropout = self.attn_drop_rate if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, bias, dropout)  # (B, heads, N, u / heads)
        found = self.proj_drop(self.proj(found.transpose(1, 2).flatten(2)))
        return found.transpose(1, 2).reshape(batch, dim, height, width)


def distance_buckets(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return which entry of the table of biases each pair of places has, (N, N): that of their rounded distance."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    distance = (rows[:, None] ** 2 + columns**2).float().sqrt().round()
    beyond = (distance.clamp(min=NEAR) / NEAR).log() / math.log(FAR / NEAR)
    far = (NEAR + beyond * (BUCKETS - NEAR)).round().clamp(max=BUCKETS)
    table = BUCKETS + torch.where(distance <= NEAR, distance, far).long()  # of a shift by rows and columns
    down, right = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    return table[down[:, None, :, None], right[None, :, None, :]].reshape(height * width, height * width)


class SpatialAttention(nn.Module):
    """PAT_sp: one half of the channels is gated, place by place, and the other half goes through a 1 x 1 convolution.

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        convolved = dim // 2
        self.parts = (dim - convolved, convolved)
        self.score = nn.Conv2d(dim - convolved, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim - convolved)
        self.conv_norm = nn.BatchNorm2d(convolved)
        self.conv = nn.Conv2d(convolved, convolved, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        gated, convolved = x.split(self.parts, 1)
        gated = self.norm(gated * F.hardsigmoid(self.score(gated)))
        return torch.cat((gated, self.conv(self.conv_norm(convolved))), 1)


class FoldedSpatialAttention(nn.Module):
    """What is left of PAT_sp when the convolution before it has taken in all that is linear.

    Args:
        gated: channels that are gated; a last one beside them is the score.
        bias: added to these, (gated,).
    """

    def __init__(self, gated: int, bias: Tensor) -> None:
        super().__init__()
        self.gated = gated
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) of (B, C + 1, H, W)."""
        gated, convolved, score = x.split((self.gated, x.shape[1] - self.gated - 1, 1), 1)
        return torch.cat((gated * F.hardsigmoid(score) + self.bias[:, None, None], convolved), 1)


# ---- the block -------------------------------------------------------------------------------------------------------


class PartialConv(nn.Module):
    """A 3 x 3 convolution of the first channels, beside what becomes of the others.

    Args:
        dim: C.
        convolved: p.
        others: a map of (B, C - p, H, W).
    """

    def __init__(self, dim: int, convolved: int, others: nn.Module) -> None:
        super().__init__()
        self.parts = (convolved, dim - convolved)
        self.conv = nn.Conv2d(convolved, convolved, 3, padding=1, bias=False)
        self.others = others

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        convolved, others = x.split(self.parts, 1)
        return torch.cat((self.conv(convolved), self.others(others, *more)), 1)


class Mlp(nn.Module):
    """A feed-forward layer of 1 x 1 convolutions, with or without spatial attention behind it.

    Args:
        dim: C.
        hidden: channels inside.
        act: a name of ``ACTIVATIONS``.
        spatial: whether PAT_sp follows.
    """

    def __init__(self, dim: int, hidden: int, act: str, *, spatial: bool) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=False)
        self.attention: nn.Module = SpatialAttention(dim) if spatial else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        y: Tensor = self.attention(self.fc2(self.act(self.norm(self.fc1(x)))))
        return y

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold spatial attention, in evaluation, into the convolution before it, but for its gate."""
        attention, fc2 = self.attention, self.fc2
        if not isinstance(attention, SpatialAttention):
            return
        gated, convolved = fc2.weight[:, :, 0, 0].split(attention.parts)
        scale, bias = _affine(attention.norm)
        after, before = _affine(attention.conv_norm)
        conv = attention.conv.weight[:, :, 0, 0]
        score = attention.score.weight[:, :, 0, 0]
        rows = torch.cat((scale[:, None] * gated, (conv * after) @ convolved, score @ gated))
        self.fc2 = nn.Conv2d(fc2.in_channels, len(rows), 1, device=rows.device, dtype=rows.dtype)
        self.fc2.weight.copy_(rows[:, :, None, None])
        self.fc2.bias.zero_()  # type: ignore[union-attr]
        self.fc2.bias[len(gated) : -1] = conv @ before  # type: ignore[index]
        self.attention = FoldedSpatialAttention(len(gated), bias)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return by what a norm multiplies in evaluation, and what it adds then."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight / (variance + norm.eps).sqrt()
    return scale, norm.bias - mean * scale


class Block(nn.Module):
    """Partial convolution and a feed-forward layer, which both are added at once, or one after the other.

    Args:
        mixer: the partial convolution.
        mlp: the feed-forward layer.
        drop_path: stochastic depth of the feed-forward layer, in [0, 1).
        apart: whether what the mixer gives is added before the feed-forward layer, as published for self-attention.
    """

    def __init__(self, mixer: PartialConv, mlp: Mlp, *, drop_path: float, apart: bool) -> None:
        super().__init__()
        self.mixer = mixer
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.apart = apart

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        mixed = self.mixer(x, *more)
        if self.apart:
            x = mixed = x + mixed
        return x + self.drop_path(self.mlp(mixed))


class Stage(nn.Module):
    """A convolution that halves the map, but in the first stage, then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.attends = isinstance(blocks[0].mixer.others, PartialSelfAttention)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.downsample(x)
        height, width = x.shape[2:]
        return through_blocks(self, x, *([distance_buckets(height, width, x.device)] if self.attends else []))


# ---- the net ---------------------------------------------------------------------------------------------------------


class PATNet(StagedNet):
    """PATNet with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dim: width C of the first stage; it doubles with each.
        depths: blocks of the four stages.
        mixers: what becomes of the channels that are not convolved, a name of ``MIXERS`` for each stage.
        spatial: whether the feed-forward layers have spatial attention.
        num_heads: of self-attention, in the stages that have it.
        n_div: C over the channels that are convolved.
        mlp_ratio: hidden width of the feed-forward layers over C.
        act: ``"relu"``, or ``"gelu"`` as in the two smallest nets.
        feature_dim: width of the layer before the classifier.
        stem_stride: 2 or 4 pixels per place of the first stage.
        attn_drop_rate, proj_drop_rate: dropout of self-attention, in [0, 1); 0.1 as published.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, a name that there is not, a width, heads, a rate, a stride or a pooling
            that is not allowed.
    """

    BEHIND = r"^hidden\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 4),
        mixers: Sequence[str] = ("channel", "channel", "channel", "self"),
        spatial: bool = True,
        num_heads: int = 6,
        n_div: int = 4,
        mlp_ratio: float = 2.0,
        act: str = "relu",
        feature_dim: int = 1280,
        stem_stride: int = 4,
        attn_drop_rate: float = 0.1,
        proj_drop_rate: float = 0.1,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != 4 or min(depths) < 1:
            raise InputError(f"depths = {tuple(depths)} is not allowed: give 1 or more for each of four stages")
        if len(mixers) != 4:
            raise InputError(f"mixers = {tuple(mixers)} has {len(mixers)} entries: give one for each of four stages")
        for name in mixers:
            if name not in MIXERS:
                raise unknown("mixer", name, MIXERS)
        if act not in ACTIVATIONS:
            raise unknown("activation", act, ACTIVATIONS)
        if n_div < 2 or dim < max(n_div, 2):
            raise InputError(f"dim = {dim} and n_div = {n_div} are not allowed: give n_div 2 or more, and dim as much")
        if int(dim * mlp_ratio) < 1 or feature_dim < 1:
            raise InputError(
                f"mlp_ratio = {mlp_ratio} and feature_dim = {feature_dim} are not allowed: give what leaves a channel"
            )
        for name, rate in (("attn_drop_rate", attn_drop_rate), ("proj_drop_rate", proj_drop_rate)):
            if not 0 <= rate < 1:
                raise InputError(f"{name} = {rate} is not allowed: give a rate in [0, 1)")
        if stem_stride not in (2, 4):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 2 or 4")
        self.num_classes = num_classes
        self.num_features, self.head_hidden_size = 8 * dim, feature_dim
        self.stem = _patches(in_chans, dim, stem_stride)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, (depth, kind) in enumerate(zip(depths, mixers, strict=True)):
            width = dim * 2**i
            left = width - width // n_div
            if kind == "self" and (num_heads < 1 or left % num_heads):
                raise InputError(f"num_heads = {num_heads} does not divide the {left} channels of stage {i} it attends")
            blocks = []
            for _ in range(depth):
                others: nn.Module = nn.Identity()
                if kind == "channel":
                    others = GaussianChannelAttention(left)
                elif kind == "self":
                    others = PartialSelfAttention(left, num_heads, attn_drop_rate, proj_drop_rate)
                mlp = Mlp(width, int(width * mlp_ratio), act, spatial=spatial)
                mixer = PartialConv(width, width // n_div, others)
                blocks.append(Block(mixer, mlp, drop_path=next(rates), apart=kind == "self"))
            stages.append(Stage(_patches(width // 2, width, 2) if i else nn.Identity(), blocks))
            self.feature_info.append({"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.hidden = nn.Linear(self.num_features, feature_dim, bias=False)
        self.act = ACTIVATIONS[act]()
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, 8 C, H/32, W/32)."""
        features: Tensor = self.stages(self.stem(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or with ``pre_logits`` what the classifier takes, (B, feature_dim)."""
        pooled = self.global_pool(x)
        if pooled.ndim == 4:
            return pooled
        pooled = self.act(self.hidden(pooled))
        return pooled if pre_logits else self.head(self.drop(pooled))


def _patches(dim_in: int, dim: int, side: int) -> nn.Sequential:
    """Return a convolution of patches that do not overlap, and a norm."""
    conv = PaddedConv2d(dim_in, dim, side, side, bias=False)
    conv.multiple = side
    return nn.Sequential(conv, nn.BatchNorm2d(dim))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- the authors' weights --------------------------------------------------------------------------------------------

_AUTHORS = (
    (r"^(module|model)\.", ""),
    (r"^patch_embed\.proj\.", "stem.0."),
    (r"^patch_embed\.norm\.", "stem.1."),
    (r"^stages\.([135])\.reduction\.", lambda found: f"stages.{(int(found[1]) + 1) // 2}.downsample.0."),
    (r"^stages\.([135])\.norm\.", lambda found: f"stages.{(int(found[1]) + 1) // 2}.downsample.1."),
    (r"^stages\.([0246])\.blocks\.", lambda found: f"stages.{int(found[1]) // 2}.blocks."),
    (r"\.spatial_mixing\.partial_conv3\.", ".mixer.conv."),
    (r"\.spatial_mixing\.attn\.cfc1\.", ".mixer.others.mix."),
    (r"\.spatial_mixing\.attn\.bn\.", ".mixer.others.gate_norm."),
    (r"\.spatial_mixing\.attn\.rpe_k\.lookup_table_bias$", ".mixer.others.bias"),
    (r"\.spatial_mixing\.(attn\.)?", ".mixer.others."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.", ".mlp.norm."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"\.mlp\.4\.conv_attn\.", ".mlp.attention.score."),
    (r"\.mlp\.4\.norm2\.", ".mlp.attention.conv_norm."),
    (r"\.mlp\.4\.", ".mlp.attention."),
    (r"^avgpool_pre_head\.1\.", "hidden."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, or those of FasterNet's authors, under our names."""
    state = next((state_dict[key] for key in ("state_dict", "model") if key in state_dict), state_dict)
    if "stem.0.weight" in state:
        return state
    ours = {}
    for key, value in state.items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        if key.endswith(".mix.weight"):
            value = value[:, :, 0].transpose(1, 2).flatten(1)  # all means, then all deviations
        elif key == "hidden.weight":
            value = value.flatten(1)
        ours[key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {
        "patnet_nano": nano_cfg(),
        **{f"patnet_{size}": cfg(crop_pct=0.9) for size in ("t0", "t1", "t2", "s", "m", "l")},
    }
)
_T: dict[str, Any] = {"depths": (1, 2, 8, 2), "act": "gelu"}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PATNet:
    net: PATNet = create(PATNet, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def patnet_nano(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """0.24 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"dim": 16, "depths": (1, 1, 2, 1), "num_heads": 4, "feature_dim": 128, "stem_stride": 2}
    still = {"attn_drop_rate": 0.0, "proj_drop_rate": 0.0}
    return _create("patnet_nano", pretrained, **{**own, **still, **kwargs})


@register_model
def patnet_t0(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """3.6 M parameters; trained without stochastic depth."""
    return _create("patnet_t0", pretrained, **{**_T, "dim": 32, "num_heads": 4, **kwargs})


@register_model
def patnet_t1(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """6.1 M parameters; trained with stochastic depth 0.02."""
    return _create("patnet_t1", pretrained, **{**_T, "dim": 48, **kwargs})


@register_model
def patnet_t2(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """12.7 M parameters; trained with stochastic depth 0.05."""
    return _create("patnet_t2", pretrained, **kwargs)


@register_model
def patnet_s(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """29.0 M parameters; trained with stochastic depth 0.1."""
    return _create("patnet_s", pretrained, **{"dim": 96, "depths": (2, 2, 9, 4), **kwargs})


@register_model
def patnet_m(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """61.4 M parameters; trained with stochastic depth 0.2."""
    return _create("patnet_m", pretrained, **{"dim": 128, "depths": (2, 3, 16, 4), **kwargs})


@register_model
def patnet_l(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """104.5 M parameters; trained with stochastic depth 0.3."""
    return _create("patnet_l", pretrained, **{"dim": 160, "depths": (2, 3, 20, 4), **kwargs})
