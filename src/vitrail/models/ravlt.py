"""RAVLT: linear attention whose KV buffer and output features are of higher rank.

Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention" (CVPR 2025), arXiv 2411.07635, and the authors' code
(qhfan/RALA), with which the weights were trained. Linear attention sums the outer products of keys and values into a
buffer of d x d numbers, once for all queries. Where the terms are alike its rank is low, and so is the output's.
Rank-augmented linear attention (RALA) weights each term by what the mean query makes of its key, and multiplies the
output by a projection of the input. As published, the first two stages have it; the last two, of few places, attend by
softmax (issue 9 of the code).

Shapes: B images, H x W places, L = HW, n heads of d channels, C = n d. Stages take and return (B, C, H, W); inside they
work on (B, H, W, C).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.models.planes import Block, DepthwiseConv, SizeTables, Stage, rotate
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg

FORMS = ("rala", "linear", "softmax")
"""Attention with a weighted KV buffer, with a plain one, and with the weights of every pair of places."""

# ---- the mathematics -------------------------------------------------------------------------------------------------


class Angles(NamedTuple):
    """Cosine and sine, (L, d), of the angles by which queries and keys are turned."""

    cos: Tensor
    sin: Tensor


def plane_rotation(height: int, width: int, head_dim: int, device: torch.device | None = None) -> Angles:
    """Return the angles of each place: the first half of the channels turn with its row, the others with its column.

    Args:
        height, width: H and W.
        head_dim: d, a multiple of 4.
        device: of the result.
    """
    frequency = 10000.0 ** -torch.linspace(0, 1, head_dim // 4, dtype=torch.float32, device=device)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None, None] * frequency
    columns = torch.arange(width, dtype=torch.float32, device=device)[:, None] * frequency
    angle = torch.cat((rows.expand(-1, width, -1), columns.expand(height, -1, -1)), dim=-1)  # (H, W, d / 2)
    angle = angle.flatten(0, 1).repeat_interleave(2, dim=-1)
    return Angles(angle.cos(), angle.sin())


def key_weights(query: Tensor, key: Tensor) -> Tensor:
    """Return alpha / L, (B, n, 1, L), of sum 1: what the mean of the queries makes of each key.

    Args:
        query, key: (B, n, L, d), through the kernel.
    """
    mean = query.mean(2, keepdim=True) * query.shape[-1] ** -0.5
    return (mean @ key.transpose(2, 3)).softmax(-1)


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, angles: Angles, *, weighted: bool
) -> tuple[Tensor, Tensor]:
    """Attend through a buffer of d x d numbers: sum_j alpha_j k_j v_j^T, turned by place, once for all queries.

    Args:
        query, key: (B, n, L, d), before the kernel, which is 1 + ELU.
        value: (B, n, L, d).
        angles: of the places; as published, they turn the numerator alone.
        weighted: whether alpha is that of ``key_weights`` times L, or 1.

    Returns:
        The buffer over L, (B, n, d, d), and the output (B, n, L, d).
    """
    query, key = F.elu(query) + 1, F.elu(key) + 1
    if weighted:
        weights = key_weights(query, key)
        total = weights @ key  # (B, n, 1, d)
        terms = value * weights.transpose(2, 3)
    else:
        total = key.mean(2, keepdim=True)
        terms = value / key.shape[2]
    buffer = rotate(key, *angles).transpose(2, 3) @ terms
    norm = query @ total.transpose(2, 3) + 1e-6  # (B, n, L, 1)
    return buffer, rotate(query, *angles) @ buffer / norm


# ---- the parts -------------------------------------------------------------------------------------------------------


class PlaneAngles(SizeTables):
    """The angles of one stage."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def _compute(self, height: int, width: int, device: torch.device) -> Angles:
        return plane_rotation(height, width, self.head_dim, device)


class Attention(nn.Module):
    """Attention of one of ``FORMS``, with a 5x5 depth-wise convolution of the values.

    Args:
        dim: C.
        num_heads: n.
        form: one of ``FORMS``.
        modulated: multiply the output by a projection of the input. The authors' softmax attention has it, too.
    """

    def __init__(self, dim: int, num_heads: int, form: str = "rala", *, modulated: bool = True) -> None:
        super().__init__()
        self.num_heads, self.form, self.modulated = num_heads, form, modulated
        self.qkvo = nn.Linear(dim, dim * (4 if modulated else 3))
        self.lepe = DepthwiseConv(dim, 5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """Return (B, H, W, C)."""
        query, key, value, *gate = self.qkvo(x).split(x.shape[-1], dim=-1)
        _, mixed = self._mix(query, key, value, angles)
        y = mixed.transpose(1, 2).reshape(x.shape) + self.lepe(value)
        return self.proj(y * gate[0] if gate else y)

    def attention_features(self, x: Tensor, angles: Angles) -> tuple[Tensor | None, Tensor]:
        """Return the KV buffer (B, n, d, d), None for softmax, and the features (B, n, L, d) that attention gives.

        The features are modulated, and without the convolution of the values: what ``evaluate.attention_rank`` probes.
        """
        query, key, value, *gate = self.qkvo(x).split(x.shape[-1], dim=-1)
        buffer, mixed = self._mix(query, key, value, angles)
        return buffer, mixed * self._heads(gate[0]) if gate else mixed

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, angles: Angles) -> tuple[Tensor | None, Tensor]:
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.form == "softmax":
            return None, F.scaled_dot_product_attention(rotate(query, *angles), rotate(key, *angles), value)
        return linear_attention(query, key, value, angles, weighted=self.form == "rala")

    def _heads(self, x: Tensor) -> Tensor:
        """Return (B, n, L, d) of (B, H, W, C)."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


# ---- the net ---------------------------------------------------------------------------------------------------------


class RAVLT(StagedNet):
    """RAVLT with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        embed_dims: width C per stage.
        depths: blocks per stage.
        num_heads: heads n per stage; C / n is a multiple of 4, as channels turn in pairs with rows and columns.
        mlp_ratios: hidden width of the feed-forward layers over C, per stage.
        attention: one of ``FORMS`` per stage.
        modulated: multiply the output of attention by a projection of its input.
        layer_scale: initial factor of each branch per stage; 0 is none.
        head_width: channels of the projection before the pooling.
        stem_stride: 1, 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of different number, a width that the heads do not divide so, an attention or a stride or a
            pooling that there is not.
    """

    BEHIND = r"^(?:proj|norm)\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (3.5, 3.5, 3.5, 3.5),
        attention: Sequence[str] = ("rala", "rala", "softmax", "softmax"),
        modulated: bool = True,
        layer_scale: Sequence[float] = (1, 1, 1, 1),
        head_width: int = 1024,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        per_stage = {
            "depths": depths,
            "num_heads": num_heads,
            "mlp_ratios": mlp_ratios,
            "attention": attention,
            "layer_scale": layer_scale,
        }
        for name, values in per_stage.items():
            if len(values) != len(embed_dims):
                raise InputError(
                    f"{name} = {tuple(values)} has {len(values)} entries and embed_dims has {len(embed_dims)}: "
                    "give one for each stage"
                )
        for dim, heads, form in zip(embed_dims, num_heads, attention):
            if heads < 1 or dim % (4 * heads):
                raise InputError(
                    f"embed_dims = {dim} with num_heads = {heads} is not allowed: channels turn in pairs with rows and "
                    "with columns; give a width that is a multiple of four times the heads"
                )
            if form not in FORMS:
                raise unknown("attention", form, FORMS)
        if stem_stride not in (1, 2, 4):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 1, 2 or 4")
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.head_hidden_size = head_width
        self.stem = _stem(in_chans, embed_dims[0], stem_stride)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages, dim_in = [], None
        self.feature_info = []
        for i, (dim, heads, form) in enumerate(zip(embed_dims, num_heads, attention)):
            blocks = [
                Block(
                    dim,
                    partial(Attention, dim, heads, form, modulated=modulated),
                    mlp_ratios[i],
                    drop_path=next(rates),
                    layer_scale=layer_scale[i],
                )
                for _ in range(depths[i])
            ]
            stages.append(Stage(dim_in, dim, PlaneAngles(dim // heads), blocks))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
            dim_in = dim
        self.stages = nn.Sequential(*stages)
        self.proj = nn.Linear(self.num_features, head_width)
        self.norm = nn.BatchNorm2d(head_width)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with ``pre_logits`` the pooled features (B, head_hidden_size)."""
        if not self.global_pool.pool_type:  # the projection belongs to the pooling
            return x
        tokens = self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        pooled = self.global_pool(F.silu(self.norm(tokens)))
        return pooled if pre_logits else self.head(self.drop(pooled))


def _stem(in_chans: int, dim: int, stride: int) -> nn.Sequential:
    """Return four 3x3 convolutions, of which the first and the last may halve the size."""
    first, last = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stride]
    layers: list[nn.Module] = []
    for before, step in ((in_chans, first), (dim // 2, 1), (dim // 2, 1)):
        layers += [nn.Conv2d(before, dim // 2, 3, step, 1), nn.BatchNorm2d(dim // 2), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(dim // 2, dim, 3, last, 1), nn.BatchNorm2d(dim))


def _init_weights(module: nn.Module) -> None:
    # The authors' linear layers are convolutions of one place, and all their convolutions begin so.
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_AUTHORS = (
    (r"^(?:module|backbone)\.", ""),
    (r"^patch_embed\.proj\.", "stem."),
    (r"^layers\.(\d+)\.", r"stages.\1."),
    (r"\.(norm[12])\.norm\.", r".\1."),
    (r"\.ffn\.", ".mlp."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)
_ONE_PLACE = re.compile(r"(?:qkvo|attn\.proj|fc1|fc2|^proj|^head)\.weight$")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights under our names; their frequencies are computed here and left out."""
    if "stem.0.weight" in state_dict:
        return state_dict
    ours = {}
    for key, value in state_dict.get("model", state_dict).items():
        if ".RoPE." in key:
            continue
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        # Their stage ends with the downsampling that ours begins with.
        found = re.match(r"stages\.(\d+)\.downsample\.(reduction|norm)\.(.+)", key)
        if found:
            key = f"stages.{int(found[1]) + 1}.downsample.{0 if found[2] == 'reduction' else 1}.{found[3]}"
        ours[key] = value.flatten(1) if _ONE_PLACE.search(key) else value.flatten() if "gamma" in key else value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {"ravlt_nano": nano_cfg(), **{f"ravlt_{size}": cfg() for size in ("t", "s", "b", "l")}}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RAVLT:
    net: RAVLT = create(RAVLT, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def ravlt_nano(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """0.7 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {
        "embed_dims": (32, 64, 96, 128),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 3, 4),
        "mlp_ratios": (3, 3, 3, 3),
        "head_width": 256,
        "stem_stride": 2,
    }
    return _create("ravlt_nano", pretrained, **{**own, **kwargs})


@register_model
def ravlt_t(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """15 M parameters; trained with stochastic depth 0.1."""
    return _create("ravlt_t", pretrained, **kwargs)


@register_model
def ravlt_s(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """26 M parameters; trained with stochastic depth 0.15."""
    own = {"embed_dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
    return _create("ravlt_s", pretrained, **{**own, **kwargs})


@register_model
def ravlt_b(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """48 M parameters; trained with stochastic depth 0.4."""
    own = {
        "embed_dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "layer_scale": (1, 1, 1e-6, 1e-6),
    }
    return _create("ravlt_b", pretrained, **{**own, **kwargs})


@register_model
def ravlt_l(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """95 M parameters; trained with stochastic depth 0.55."""
    own = {
        "embed_dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "layer_scale": (1e-6, 1e-6, 1e-6, 1e-6),
    }
    return _create("ravlt_l", pretrained, **{**own, **kwargs})
