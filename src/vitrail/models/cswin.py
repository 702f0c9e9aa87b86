"""CSWin: half of the heads attend in vertical stripes of the map, the other half in horizontal ones.

Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows" (CVPR 2022), arXiv
2107.00652, and the authors' code (microsoft/CSWin-Transformer), with which the weights were trained. Two blocks see the
whole map, for the price of stripes. Where a map is no multiple of the stripes we do as their code for dense tasks: it
is filled up with zeros on both sides, behind the projection, and these places are attended to like others.

Shapes: B images, H x W places, C channels, stripes of h x w = L places, n heads of d channels in a branch of c = n d.
Stages take and return (B, C, H, W); blocks work on (B, H, W, C), which for a channels-last image is the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.windows import from_windows, to_windows
from vitrail.models.staged import Block, StagedNet, cfg, check_stages, create, nano_cfg, through_blocks

# ---- attention in stripes --------------------------------------------------------------------------------------------


class StripeAttention(nn.Module):
    """Self-attention inside stripes, with the locally-enhanced positional encoding.

    The encoding, LePE, is a depthwise 3x3 convolution of the values, which knows nothing beyond its stripe; it is
    added to what the attention gives.

    Args:
        dim: c, channels of this branch.
        num_heads: n, heads of this branch.
        stripe: height and width (h, w) in places; None is all of the map.
        lepe: whether there is an encoding; without it attention does not know where places are.
    """

    def __init__(self, dim: int, num_heads: int, stripe: tuple[int | None, int | None], *, lepe: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.stripe = stripe
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if lepe else None

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend.

        Args:
            qkv: queries, then keys, then values, (B, H, W, 3 c).

        Returns:
            (B, H, W, c).
        """
        height, width = qkv.shape[1:3]
        tall, wide = self.stripe[0] or height, self.stripe[1] or width
        below, right = -height % tall, -width % wide
        top, left = below // 2, right // 2
        if below or right:
            qkv = F.pad(qkv, (0, 0, left, right - left, top, below - top))
        stripes = to_windows(qkv, (tall, wide))  # (B s, h, w, 3 c)
        heads = stripes.reshape(-1, tall * wide, 3, self.num_heads, self.dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (B s, n, L, d) each
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, tall, wide, self.dim)
        if self.get_v is not None:
            out = out + self.get_v(stripes[..., 2 * self.dim :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = from_windows(out, height + below, width + right)
        return out[:, top : top + height, left : left + width]


class CrossShapedAttention(nn.Module):
    """Attention in vertical stripes by the first half of the channels, in horizontal ones by the second half.

    Args:
        dim: C.
        num_heads: of both branches together.
        stripe: width of the stripes in places; None is attention from everywhere to everywhere, in one branch.
        lepe: as in ``StripeAttention``.

    Raises:
        InputError: heads that do not divide the width or, in two branches, that are odd; a stripe of no place.
    """

    def __init__(self, dim: int, num_heads: int, stripe: int | None, *, lepe: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"num_heads = {num_heads} does not divide a width of {dim}: give a divisor of it")
        if stripe is not None and num_heads % 2:
            raise InputError(f"num_heads = {num_heads} is odd: give an even number, half of it for each direction")
        if stripe is not None and stripe < 1:
            raise InputError(f"stripes = {stripe} is not allowed: give 1 place or more")
        # One branch after the other: (q k v) of the first, (q k v) of the second. The authors have (q q, k k, v v).
        self.qkv = nn.Linear(dim, 3 * dim)
        shapes: list[tuple[int | None, int | None]]
        shapes = [(None, None)] if stripe is None else [(None, stripe), (stripe, None)]
        branches = len(shapes)
        self.attns = nn.ModuleList(
            StripeAttention(dim // branches, num_heads // branches, shape, lepe=lepe) for shape in shapes
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        parts = self.qkv(x).chunk(len(self.attns), dim=-1)
        found = [attend(part) for attend, part in zip(self.attns, parts, strict=True)]
        return self.proj(torch.cat(found, dim=-1) if len(found) > 1 else found[0])


# ---- the net ---------------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """An overlapping convolution that halves the size (none in the first stage, which the stem does), then blocks."""

    def __init__(self, dim_in: int | None, dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        merge = [] if dim_in is None else [nn.Conv2d(dim_in, dim, 3, 2, 1), LayerNorm2d(dim, eps=1e-5)]
        self.downsample = nn.Sequential(*merge)
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return through_blocks(self, self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CSWin(StagedNet):
    """CSWin with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dim: width C of the first stage; it doubles with each.
        depths: blocks of the four stages.
        num_heads: heads of each stage, which divide its width; even but in the last, which is not split.
        stripes: width of the stripes in the first three stages, in places; the last attends everywhere.
        mlp_ratio: hidden width of the feed-forward layers over C.
        lepe: whether attention has the locally-enhanced positional encoding, as published.
        stem_stride: 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, heads that do not fit, a stripe of no place, a stride or a pooling that
            is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripes: Sequence[int] = (1, 2, 7),
        mlp_ratio: float = 4.0,
        lepe: bool = True,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages(stem_stride, depths=depths, num_heads=num_heads)
        if len(stripes) != 3:
            raise InputError(
                f"stripes = {tuple(stripes)} has {len(stripes)} entries: give one for each of the first three stages"
            )
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim * 8
        # As published: at 4 pixels a padding of 2, so that 224 pixels are 56 places and the last is seen whole.
        padding = 2 if stem_stride == 4 else 3
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dim, 7, stem_stride, padding), LayerNorm2d(dim, eps=1e-5))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, (depth, heads, stripe) in enumerate(zip(depths, num_heads, (*stripes, None), strict=True)):
            width = dim * 2**i
            blocks = [
                Block(width, CrossShapedAttention(width, heads, stripe, lepe=lepe), mlp_ratio, drop_path=next(rates))
                for _ in range(depth)
            ]
            stages.append(Stage(width // 2 if i else None, width, blocks))
            self.feature_info.append({"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(self.num_features, eps=1e-5)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, 8 C, H/32, W/32)."""
        return self.norm(self.stages(self.stem(x)))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ---- the authors' weights --------------------------------------------------------------------------------------------

_AUTHORS = (
    (r"^module\.", ""),
    (r"^stage1_conv_embed\.0\.", "stem.0."),
    (r"^stage1_conv_embed\.2\.", "stem.1."),
    (r"^stage(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks."),
    (r"^merge(\d)\.conv\.", r"stages.\1.downsample.0."),
    (r"^merge(\d)\.norm\.", r"stages.\1.downsample.1."),
    (r"\.(qkv|attns|proj)\.", r".attn.\1."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, those averaged over steps if there are any, under our names."""
    state = next((state_dict[key] for key in ("state_dict_ema", "state_dict") if key in state_dict), state_dict)
    if "stem.0.weight" in state:
        return state
    branches = {
        f"{name}.qkv": len(module.attns)
        for name, module in model.named_modules()
        if isinstance(module, CrossShapedAttention)
    }
    ours = {}
    for key, value in state.items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        split = branches.get(key.rpartition(".")[0], 1)
        if split > 1:
            value = value.unflatten(0, (3, split, -1)).transpose(0, 1).flatten(0, 2)
        ours[key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {
        "cswin_nano": nano_cfg(),
        "cswin_tiny": cfg(crop_pct=0.9),
        "cswin_small": cfg(crop_pct=0.9),
        "cswin_base": cfg(crop_pct=0.9),
        "cswin_base_384": cfg(384),
        "cswin_large": cfg(crop_pct=0.9),
        "cswin_large_384": cfg(384),
    }
)
_S: dict[str, Any] = {"depths": (2, 4, 32, 2)}
_B: dict[str, Any] = {**_S, "dim": 96, "num_heads": (4, 8, 16, 32)}
_L: dict[str, Any] = {**_S, "dim": 144, "num_heads": (6, 12, 24, 24)}
_384: dict[str, Any] = {"stripes": (1, 2, 12)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CSWin:
    net: CSWin = create(CSWin, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def cswin_nano(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """0.5 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"dim": 16, "depths": (1, 1, 3, 1), "num_heads": (2, 2, 4, 4), "stripes": (1, 2, 2), "stem_stride": 2}
    return _create("cswin_nano", pretrained, **{**own, **kwargs})


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """22 M parameters; trained with stochastic depth 0.2."""
    return _create("cswin_tiny", pretrained, **kwargs)


@register_model
def cswin_small(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """35 M parameters; trained with stochastic depth 0.4."""
    return _create("cswin_small", pretrained, **{**_S, **kwargs})


@register_model
def cswin_base(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """77 M parameters; trained with stochastic depth 0.5."""
    return _create("cswin_base", pretrained, **{**_B, **kwargs})


@register_model
def cswin_base_384(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """77 M parameters, with the stripes of images of 384 pixels; tuned with stochastic depth 0.7."""
    return _create("cswin_base_384", pretrained, **{**_B, **_384, **kwargs})


@register_model
def cswin_large(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """173 M parameters; tuned, after ImageNet-22K, with stochastic depth 0.2."""
    return _create("cswin_large", pretrained, **{**_L, **kwargs})


@register_model
def cswin_large_384(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """173 M parameters, with the stripes of images of 384 pixels."""
    return _create("cswin_large_384", pretrained, **{**_L, **_384, **kwargs})
