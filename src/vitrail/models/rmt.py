"""RMT: a hierarchical vision transformer whose attention decays with the Manhattan distance.

Fan et al., "RMT: Retentive Networks Meet Vision Transformers" (CVPR 2024), arXiv 2309.11523, and the authors' code
(qhfan/RMT), with which the weights were trained. We follow the code, which adds the decay's logarithm to the scores
before the softmax, and turns queries and keys by their place in reading order, as RetNet does. To a reader who found
the softmax multiplied by the decay in the paper, the authors answered that the code does so and normalises after it
(issue 21 of their repository): the weights of a place still sum to 1.

Shapes: B images, H x W places, n heads of d channels, C = n d, L places in a row of attention. Stages take and return
(B, C, H, W); inside they work on (B, H, W, C), which for a channels-last image is the same memory.
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

from vitrail.errors import InputError
from vitrail.models.planes import Block, DepthwiseConv, SizeTables, Stage, rotate
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg

# ---- the mathematics -------------------------------------------------------------------------------------------------


def head_decays(num_heads: int, first: float, span: float, device: torch.device | None = None) -> Tensor:
    """Return log gamma of each head, (n,): gamma_i = 1 - 2^-(first + span i / n), so later heads see farther.

    Args:
        num_heads: n.
        first: exponent of the first head, above 0.
        span: by how much the exponent grows over all heads.
        device: of the result.
    """
    exponents = first + span * torch.arange(num_heads, dtype=torch.float32, device=device) / num_heads
    return torch.log1p(-(2.0**-exponents))


def axis_decay(length: int, log_gamma: Tensor) -> Tensor:
    """Return log D of one axis, (n, L, L): |i - j| log gamma."""
    place = torch.arange(length, dtype=log_gamma.dtype, device=log_gamma.device)
    return (place[:, None] - place).abs() * log_gamma[:, None, None]


def manhattan_decay(height: int, width: int, log_gamma: Tensor) -> Tensor:
    """Return log D of the plane, (n, HW, HW): (|x - x'| + |y - y'|) log gamma, places in reading order."""
    rows, columns = axis_decay(height, log_gamma), axis_decay(width, log_gamma)
    return (rows[:, :, None, :, None] + columns[:, None, :, None, :]).flatten(3).flatten(1, 2)


def rotation(height: int, width: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, (H, W, 1, d), of the angles by which each place's queries and keys are turned."""
    frequency = 10000.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float32, device=device)
    place = torch.arange(height * width, dtype=torch.float32, device=device).reshape(height, width, 1, 1)
    angle = (place * frequency).repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin()


def manhattan_attention(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None) -> Tensor:
    """Attend from every place to every place: softmax(query key^T / sqrt(d) + log D) value.

    Args:
        query, key, value: (B, H, W, n, d).
        decay: log D (n, HW, HW), or None for attention without it.

    Returns:
        (B, H, W, n, d).
    """
    flat = _attend(query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2), decay)
    return flat.reshape(value.shape)


def decomposed_attention(
    query: Tensor, key: Tensor, value: Tensor, decay_h: Tensor | None, decay_w: Tensor | None
) -> Tensor:
    """Attend along each row and then along each column, at a cost of H + W and not HW per place.

    It equals ``manhattan_attention`` where the scores are a sum of one term per axis, as the decay is.

    Args:
        query, key, value: (B, H, W, n, d).
        decay_h, decay_w: log D of the axes, (n, H, H) and (n, W, W), or None.

    Returns:
        (B, H, W, n, d).
    """

    def columns(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)  # (BW, H, n, d)

    mixed = _attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), decay_w).reshape(value.shape)
    mixed = _attend(columns(query), columns(key), columns(mixed), decay_h)
    return mixed.reshape(value.transpose(1, 2).shape).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None) -> Tensor:
    """Attend within the second dimension of (B', L, n, d)."""
    mask = None if decay is None else decay.to(query.dtype)[None]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B', n, L, d)
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


# ---- the parts -------------------------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """What depends on the size alone, shared by the blocks of a stage."""

    cos: Tensor
    sin: Tensor
    decays: tuple[Tensor | None, ...]
    """Of the plane, or of rows and columns."""


class SpatialPrior(SizeTables):
    """The tables of one stage."""

    def __init__(
        self, num_heads: int, head_dim: int, *, first: float, span: float, decay: bool, decomposed: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.first, self.span = first, span
        self.decay, self.decomposed = decay, decomposed

    def _compute(self, height: int, width: int, device: torch.device) -> Tables:
        log_gamma = head_decays(self.num_heads, self.first, self.span, device)
        decays: tuple[Tensor | None, ...]
        if not self.decay:
            decays = (None, None) if self.decomposed else (None,)
        elif self.decomposed:
            decays = (axis_decay(height, log_gamma), axis_decay(width, log_gamma))
        else:
            decays = (manhattan_decay(height, width, log_gamma),)
        return Tables(*rotation(height, width, self.head_dim, device), decays)


class ManhattanSelfAttention(nn.Module):
    """Manhattan self-attention with local context enhancement: a 5x5 depth-wise convolution of the values."""

    def __init__(self, dim: int, num_heads: int, *, decomposed: bool) -> None:
        super().__init__()
        self.num_heads, self.decomposed = num_heads, decomposed
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.lepe = DepthwiseConv(dim, 5)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """Return (B, H, W, C)."""
        value = self.v_proj(x)
        query, key, heads = (
            tensor.unflatten(-1, (self.num_heads, -1)) for tensor in (self.q_proj(x), self.k_proj(x), value)
        )  # (B, H, W, n, d)
        query, key = rotate(query, tables.cos, tables.sin), rotate(key, tables.cos, tables.sin)
        attention = decomposed_attention if self.decomposed else manhattan_attention
        mixed = attention(query, key, heads, *tables.decays)
        return self.out_proj(mixed.flatten(-2) + self.lepe(value))


# ---- the net ---------------------------------------------------------------------------------------------------------


class RMT(StagedNet):
    """RMT with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        embed_dims: width C per stage.
        depths: blocks per stage.
        num_heads: heads n per stage; C / n is even, as channels are turned in pairs.
        mlp_ratios: hidden width of the feed-forward layers over C, per stage.
        decomposed: per stage, whether attention runs along rows and columns or over the whole plane.
        decay: False is attention without the spatial prior.
        first_decays: exponent of the first head's decay per stage, above 0; see ``head_decays``.
        decay_spans: by how much the exponent grows over the heads, per stage.
        layer_scale: initial factor of each branch per stage; 0 is none.
        head_width: channels of the projection before the pooling.
        token_head: adds a classifier of every place; the largest answer of all places counts half.
        stem_stride: 1, 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of different number, a width that the heads do not divide evenly, a decay or a stride or a
            pooling that is not allowed.
    """

    BEHIND = r"^(?:proj|norm)\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        decomposed: Sequence[bool] = (True, True, True, False),
        decay: bool = True,
        first_decays: Sequence[float] = (2, 2, 2, 2),
        decay_spans: Sequence[float] = (4, 4, 6, 6),
        layer_scale: Sequence[float] = (0, 0, 0, 0),
        head_width: int = 1024,
        token_head: bool = False,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        per_stage = {
            "embed_dims": embed_dims,
            "depths": depths,
            "num_heads": num_heads,
            "mlp_ratios": mlp_ratios,
            "decomposed": decomposed,
            "first_decays": first_decays,
            "decay_spans": decay_spans,
            "layer_scale": layer_scale,
        }
        for name, values in per_stage.items():
            if len(values) != len(embed_dims):
                raise InputError(
                    f"{name} = {tuple(values)} has {len(values)} entries and embed_dims has {len(embed_dims)}: "
                    "give one for each stage"
                )
        for dim, heads, first in zip(embed_dims, num_heads, first_decays):
            if heads < 1 or dim % (2 * heads):
                raise InputError(
                    f"embed_dims = {dim} with num_heads = {heads} is not allowed: channels are turned in pairs within "
                    "a head; give a width that is a multiple of twice the heads"
                )
            if not first > 0:
                raise InputError(f"first_decays = {first} is not allowed: give a number above 0")
        if stem_stride not in (1, 2, 4):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 1, 2 or 4")
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.head_hidden_size = head_width
        self.stem = _stem(in_chans, embed_dims[0], stem_stride)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages, dim_in = [], None
        self.feature_info = []
        for i, (dim, heads, whole) in enumerate(zip(embed_dims, num_heads, decomposed)):
            prior = SpatialPrior(
                heads, dim // heads, first=first_decays[i], span=decay_spans[i], decay=decay, decomposed=whole
            )
            blocks = [
                Block(
                    dim,
                    partial(ManhattanSelfAttention, dim, heads, decomposed=whole),
                    mlp_ratios[i],
                    drop_path=next(rates),
                    layer_scale=layer_scale[i],
                )
                for _ in range(depths[i])
            ]
            stages.append(Stage(dim_in, dim, prior, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
            dim_in = dim
        self.stages = nn.Sequential(*stages)
        self.proj = nn.Linear(self.num_features, head_width)
        self.norm = nn.BatchNorm2d(head_width)
        self.has_token_head = token_head
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        # The authors' attention first draws Xavier weights, which this replaces.
        self.apply(_init_weights)

    def put_head(self) -> None:
        """Set both classifiers, of the pooled features and of places."""
        super().put_head()
        self.token_head = self.linear_head(self.num_features) if self.num_classes and self.has_token_head else None

    def token_logits(self, x: Tensor) -> Tensor:
        """Return the answer of every place, (B, HW, classes), from ``forward_features``: what token labels train.

        Raises:
            InputError: the model has no such head.
        """
        if self.token_head is None:
            raise InputError("this RMT has no classifier of places: build it with token_head=True and num_classes > 0")
        return self.token_head(x.flatten(2).transpose(1, 2))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with ``pre_logits`` the pooled features (B, head_hidden_size)."""
        if not self.global_pool.pool_type:  # the projection belongs to the pooling
            return x
        tokens = self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        pooled = self.global_pool(F.silu(self.norm(tokens)))
        if pre_logits:
            return pooled
        logits = self.head(self.drop(pooled))
        # While it trains, the authors' net returns the two apart, for an objective that has a label for each place.
        return logits if self.token_head is None else logits + 0.5 * self.token_logits(x).amax(1)


def _stem(in_chans: int, dim: int, stride: int) -> nn.Sequential:
    """Return four 3x3 convolutions, of which the first and the third may halve the size."""
    first, third = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stride]
    layers: list[nn.Module] = []
    for before, after, step in ((in_chans, dim // 2, first), (dim // 2, dim // 2, 1), (dim // 2, dim, third)):
        layers += [nn.Conv2d(before, after, 3, step, 1), nn.BatchNorm2d(after), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 3, 1, 1), nn.BatchNorm2d(dim))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


_AUTHORS = (
    (r"^patch_embed\.proj\.", "stem."),
    (r"^layers\.(\d+)\.", r"stages.\1."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.retention\.", ".attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.(pos|lepe|dwconv)\.conv\.", r".\1."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^aux_head\.", "token_head."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights under our names; their tables are computed here and left out."""
    if "stem.0.weight" in state_dict:
        return state_dict
    ours = {}
    for key, value in state_dict.get("model", state_dict).items():
        if ".Relpos." in key:
            continue
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        # Their stage ends with the downsampling that ours begins with.
        found = re.match(r"stages\.(\d+)\.downsample\.(reduction|norm)\.(.+)", key)
        if found:
            key = f"stages.{int(found[1]) + 1}.downsample.{0 if found[2] == 'reduction' else 1}.{found[3]}"
        ours[key] = value.flatten() if key.endswith(".gamma") else value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


_BOTH_HEADS: dict[str, Any] = {"classifier": ("head", "token_head")}
default_cfgs = generate_default_cfgs(
    {
        "rmt_nano": nano_cfg(),
        "rmt_t": cfg(),
        "rmt_s": cfg(),
        "rmt_b": cfg(),
        "rmt_l": cfg(),
        "rmt_s_label": cfg(**_BOTH_HEADS),
        "rmt_b_label": cfg(**_BOTH_HEADS),
        "rmt_l_label": cfg(**_BOTH_HEADS),
    }
)
_T: dict[str, Any] = {"decomposed": (True, True, False, False)}
_S: dict[str, Any] = {"depths": (3, 4, 18, 4), "mlp_ratios": (4, 4, 3, 3)}
_B: dict[str, Any] = {
    "embed_dims": (80, 160, 320, 512),
    "depths": (4, 8, 25, 8),
    "num_heads": (5, 5, 10, 16),
    "mlp_ratios": (4, 4, 3, 3),
    "decay_spans": (5, 5, 6, 6),
    "layer_scale": (0, 0, 1e-6, 1e-6),
}
_L: dict[str, Any] = {
    **_B,
    "embed_dims": (112, 224, 448, 640),
    "num_heads": (7, 7, 14, 20),
    "decay_spans": (6, 6, 6, 6),
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RMT:
    net: RMT = create(RMT, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def rmt_nano(pretrained: bool = False, **kwargs: Any) -> RMT:
    """0.7 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {
        "embed_dims": (32, 64, 96, 128),
        "depths": (1, 1, 2, 1),
        "num_heads": (2, 4, 6, 8),
        "head_width": 256,
        "stem_stride": 2,
    }
    return _create("rmt_nano", pretrained, **{**own, **kwargs})


@register_model
def rmt_t(pretrained: bool = False, **kwargs: Any) -> RMT:
    """14 M parameters; trained with stochastic depth 0.1; attends to the whole plane from the third stage on."""
    return _create("rmt_t", pretrained, **{**_T, **kwargs})


@register_model
def rmt_s(pretrained: bool = False, **kwargs: Any) -> RMT:
    """27 M parameters; trained with stochastic depth 0.15."""
    return _create("rmt_s", pretrained, **{**_S, **kwargs})


@register_model
def rmt_b(pretrained: bool = False, **kwargs: Any) -> RMT:
    """54 M parameters; trained with stochastic depth 0.4."""
    return _create("rmt_b", pretrained, **{**_B, **kwargs})


@register_model
def rmt_l(pretrained: bool = False, **kwargs: Any) -> RMT:
    """95 M parameters; trained with stochastic depth 0.5."""
    return _create("rmt_l", pretrained, **{**_L, **kwargs})


@register_model
def rmt_s_label(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-S with a classifier of every place, as trained with token labels (the paper's RMT-S*)."""
    return _create("rmt_s_label", pretrained, **{**_S, "token_head": True, **kwargs})


@register_model
def rmt_b_label(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-B with a classifier of every place, as trained with token labels (the paper's RMT-B*)."""
    return _create("rmt_b_label", pretrained, **{**_B, "token_head": True, **kwargs})


@register_model
def rmt_l_label(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-L with a classifier of every place, as trained with token labels (the paper's RMT-L*)."""
    return _create("rmt_l_label", pretrained, **{**_L, "token_head": True, **kwargs})
