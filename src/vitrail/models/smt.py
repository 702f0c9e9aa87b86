"""SMT: convolutions of several widths modulate the values in early stages; self-attention takes over in late ones.

Lin et al., "Scale-Aware Modulation Meet Transformer" (ICCV 2023), arXiv 2307.08579, and the authors' code
(AFeng-x/SMT), with which the weights were trained. We follow the code in what the paper does not say: attention adds a
3x3 depthwise convolution of its values, and every stage ends with a norm.

Shapes: B images, H x W places, C channels, n heads. Stages take and return (B, C, H, W); blocks work on (B, H, W, C),
of which a convolution sees the transpose without a copy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.models.staged import StagedNet, cfg, check_stages, create, nano_cfg, through_blocks

AGGREGATIONS = ("across", "within", "none")
"""What a group of the aggregation holds: a channel of each head, as published, or neighbours in a head; or none is."""

# ---- the mixers ------------------------------------------------------------------------------------------------------


class MixedConv(nn.Module):
    """Multi-head mixed convolution: each head, a part of the channels, has a depthwise window of its own width.

    Args:
        dim: C, a multiple of the number of heads.
        kernels: width of each head's window, odd.
    """

    def __init__(self, dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        width = dim // len(kernels)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in kernels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return what each head makes of its part of (B, C, H, W), each (B, C/n, H, W)."""
        return [conv(part) for conv, part in zip(self.convs, x.chunk(len(self.convs), 1), strict=True)]


class Aggregation(nn.Module):
    """Scale-aware aggregation: a channel of each head meets in a group of a convolution; another one mixes the groups.

    Args:
        dim: C.
        heads: n.
        across: whether groups reach over the heads, as published; else each holds n neighbours in one head.
        expand: channels between the convolutions over C.
    """

    def __init__(self, dim: int, heads: int, *, across: bool = True, expand: int = 2) -> None:
        super().__init__()
        self.across = across
        self.proj0 = nn.Conv2d(dim, dim * expand, 1, groups=dim // heads)
        self.norm = nn.BatchNorm2d(dim * expand)
        self.proj1 = nn.Linear(dim * expand, dim)  # published as a convolution of one place

    def forward(self, heads: list[Tensor]) -> Tensor:
        """Return (B, H, W, C) of what the heads found, each (B, C/n, H, W)."""
        x = torch.stack(heads, 2).flatten(1, 2) if self.across else torch.cat(heads, 1)
        return self.proj1(F.gelu(self.norm(self.proj0(x))).permute(0, 2, 3, 1))


class Modulation(nn.Module):
    """Scale-aware modulation: what mixed convolutions find, aggregated, multiplies the values.

    Args:
        dim: C, a multiple of the number of heads.
        kernels: as in ``MixedConv``.
        aggregation: one of ``AGGREGATIONS``.
    """

    def __init__(self, dim: int, kernels: Sequence[int], aggregation: str = "across") -> None:
        super().__init__()
        self.v = nn.Linear(dim, dim)
        self.s = nn.Linear(dim, dim)
        self.mixed = MixedConv(dim, kernels)
        self.aggregation: Aggregation | None = None
        if aggregation != "none":
            self.aggregation = Aggregation(dim, len(kernels), across=aggregation == "across")
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        heads = self.mixed(self.s(x).permute(0, 3, 1, 2))
        if self.aggregation is None:
            modulator = torch.cat(heads, 1).permute(0, 2, 3, 1)
        else:
            modulator = self.aggregation(heads)
        return self.proj(modulator * self.v(x))


class Attention(nn.Module):
    """Self-attention of all places, and a depthwise convolution of the values, which knows where they are."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        key, value = self.kv(x).chunk(2, -1)
        query, key, heads = (
            part.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q(x), key, value)
        )
        found = F.scaled_dot_product_attention(query, key, heads).transpose(1, 2).reshape(x.shape)
        return self.proj(found + self.local_conv(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ConvMlp(nn.Module):
    """A feed-forward layer whose hidden places see their neighbours."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = self.fc1(x)
        return self.fc2(F.gelu(x + self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


# ---- the net ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each added to what came in."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, *, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Stem(nn.Sequential):
    """A convolution, which may halve the size, and another, which does: an odd last row or column meets zeros."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int) -> None:
        first = nn.Conv2d(in_chans, dim, kernel, stride // 2, kernel // 2, bias=False)
        super().__init__(first, nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, dim, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        conv, norm, act, halve = self
        x = act(norm(conv(x)))
        return halve(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)))


class Stage(nn.Module):
    """A convolution that halves the size (the stem, in the first), a norm, blocks, and another norm."""

    def __init__(self, embed: nn.Module, dim: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.embed = embed
        self.embed_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.embed_norm(self.embed(x).permute(0, 2, 3, 1))
        return self.norm(through_blocks(self, x)).permute(0, 3, 1, 2)


class SMT(StagedNet):
    """SMT with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dims: width C of each of the four stages.
        depths: blocks of each.
        mlp_ratios: hidden width of the feed-forward layers of each over C.
        kernels: width of the convolutions of each head of the modulation, odd; their number divides ``dims``.
        num_heads: heads of the attention in each stage; they divide ``dims``.
        attention: which blocks of each stage attend, from 0; the others modulate. None is as published: every second
            of the third stage and all of the last.
        aggregation: one of ``AGGREGATIONS``.
        layer_scale: initial factor of each branch; 0 is none.
        stem_kernel: width of the first convolution, odd.
        stem_stride: 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, heads that do not divide a width, a block that there is not, a window, a
            stride, an aggregation or a pooling that is not allowed.
    """

    BEFORE = r"^stages\.0\.embed"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 1),
        mlp_ratios: Sequence[float] = (4, 4, 4, 2),
        kernels: Sequence[int] = (3, 5, 7, 9),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attention: Sequence[Sequence[int]] | None = None,
        aggregation: str = "across",
        layer_scale: float = 0.0,
        stem_kernel: int = 3,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if attention is None:
            attention = [(), (), range(1, depths[2], 2), range(depths[3])] if len(depths) == 4 else [()] * 4
        more: dict[str, Sequence[Any]] = {"mlp_ratios": mlp_ratios, "num_heads": num_heads, "attention": attention}
        check_stages(stem_stride, dims=dims, depths=depths, **more)
        if min(dims) < 1 or min(int(dim * ratio) for dim, ratio in zip(dims, mlp_ratios, strict=True)) < 1:
            raise InputError(
                f"dims = {tuple(dims)} with mlp_ratios = {tuple(mlp_ratios)} is not allowed: give what leaves a channel"
            )
        for width in kernels or (0,):
            if width < 1 or width % 2 == 0:
                raise InputError(f"kernels = {tuple(kernels)} is not allowed: give odd widths of 1 place or more")
        if stem_kernel < 1 or stem_kernel % 2 == 0:
            raise InputError(f"stem_kernel = {stem_kernel} is not allowed: give an odd width of 1 pixel or more")
        if aggregation not in AGGREGATIONS:
            raise unknown("aggregation", aggregation, AGGREGATIONS)
        for dim, depth, heads, attends in zip(dims, depths, num_heads, attention, strict=True):
            for kind, count in (("attention", heads), ("the modulation", len(kernels))):
                if count < 1 or dim % count:
                    raise InputError(f"{count} heads of {kind} do not divide a width of {dim}: give a divisor of it")
            beyond = [block for block in attends if not 0 <= block < depth]
            if beyond:
                raise InputError(
                    f"attention names block {beyond[0]} of a stage with {depth} blocks: give numbers from 0 to "
                    f"{depth - 1}"
                )
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[3]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        embed: nn.Module = Stem(in_chans, dims[0], stem_kernel, stem_stride)
        for i, dim in enumerate(dims):
            blocks = [
                Block(
                    dim,
                    Attention(dim, num_heads[i]) if j in attention[i] else Modulation(dim, kernels, aggregation),
                    mlp_ratios[i],
                    drop_path=next(rates),
                    layer_scale=layer_scale,
                )
                for j in range(depths[i])
            ]
            stages.append(Stage(embed, dim, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
            if i < 3:
                embed = nn.Conv2d(dim, dims[i + 1], 3, 2, 1)
        self.stages = nn.Sequential(*stages)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        features: Tensor = self.stages(x)
        return features


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Aggregation):  # after its parts
        nn.init.normal_(module.proj1.weight, std=math.sqrt(2 / module.proj1.out_features))


_AUTHORS = (
    (r"^module\.", ""),
    (r"^patch_embed1\.conv\.", "stages.0.embed."),
    (r"\.attn\.", ".mixer."),
    (r"\.mixer\.(proj[01])\.", r".mixer.aggregation.\1."),
    (r"\.mixer\.bn\.", ".mixer.aggregation.norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)
_PARTS = {"block": "blocks", "norm": "norm", "patch_embed.proj": "embed", "patch_embed.norm": "embed_norm"}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights under our names."""
    if "stages.0.embed.0.weight" in state_dict:
        return state_dict
    ours = {}
    for key, value in state_dict.get("model", state_dict).items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        key = re.sub(r"\.local_conv_(\d+)\.", lambda found: f".mixed.convs.{int(found[1]) - 1}.", key)
        # Their stages are numbered from 1.
        found = re.fullmatch(r"(patch_embed|block|norm)(\d)(\.proj|(?<=patch_embed\d)\.norm)?\.(.+)", key)
        if found:
            key = f"stages.{int(found[2]) - 1}.{_PARTS[found[1] + (found[3] or '')]}.{found[4]}"
        # Their last convolution of the aggregation sees one place: a linear layer.
        ours[key] = value.flatten(1) if key.endswith(".proj1.weight") else value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


_OWN: dict[str, Any] = {"first_conv": "stages.0.embed.0"}
default_cfgs = generate_default_cfgs(
    {
        "smt_nano": nano_cfg(**_OWN),
        "smt_t": cfg(crop_pct=0.875, **_OWN),
        "smt_s": cfg(crop_pct=0.875, **_OWN),
        "smt_b": cfg(crop_pct=0.875, **_OWN),
        "smt_l": cfg(crop_pct=0.875, **_OWN),
        "smt_l_384": cfg(384, crop_mode="squash", **_OWN),
    }
)
_B: dict[str, Any] = {"depths": (4, 6, 28, 2), "mlp_ratios": (8, 6, 4, 2), "stem_kernel": 7}
_L: dict[str, Any] = {**_B, "dims": (96, 192, 384, 768), "depths": (4, 6, 28, 4), "layer_scale": 1e-4}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SMT:
    net: SMT = create(SMT, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def smt_nano(pretrained: bool = False, **kwargs: Any) -> SMT:
    """0.4 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "stem_stride": 2}
    return _create("smt_nano", pretrained, **{**own, **kwargs})


@register_model
def smt_t(pretrained: bool = False, **kwargs: Any) -> SMT:
    """11.5 M parameters; trained with stochastic depth 0.1."""
    return _create("smt_t", pretrained, **kwargs)


@register_model
def smt_s(pretrained: bool = False, **kwargs: Any) -> SMT:
    """20.5 M parameters; trained with stochastic depth 0.2."""
    return _create("smt_s", pretrained, **{"depths": (3, 4, 18, 2), **kwargs})


@register_model
def smt_b(pretrained: bool = False, **kwargs: Any) -> SMT:
    """32 M parameters; trained with stochastic depth 0.3."""
    return _create("smt_b", pretrained, **{**_B, **kwargs})


@register_model
def smt_l(pretrained: bool = False, **kwargs: Any) -> SMT:
    """80.5 M parameters; trained on ImageNet-22K with stochastic depth 0.1."""
    return _create("smt_l", pretrained, **{**_L, **kwargs})


@register_model
def smt_l_384(pretrained: bool = False, **kwargs: Any) -> SMT:
    """The same net, tuned at 384 pixels; trained with stochastic depth 0.1."""
    return _create("smt_l_384", pretrained, **{**_L, **kwargs})
