"""UniFormer: blocks of one form, whose places learn from their neighbours in early stages and from all in late ones.

Li et al., "UniFormer: Unifying Convolution and Self-attention for Visual Recognition" (TPAMI 2023), arXiv 2201.09450;
for clips, "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning" (ICLR 2022), arXiv
2201.04676; and the authors' code (Sense-X/UniFormer), with which the weights were trained.

Shapes: B images or clips, a grid (H, W) or (T, H, W) of L places, C channels. Stages take and return (B, C, ...); their
blocks work on (B, ..., C), of which a convolution sees the transpose without a copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.models.staged import StagedNet, cfg, check_stages, create, nano_cfg, through_blocks

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _turned(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer of (B, C, ...) to (B, ..., C)."""
    y: Tensor = layer(x.movedim(-1, 1)).movedim(1, -1)
    return y


# ---- the relation aggregators ----------------------------------------------------------------------------------------


class Local(nn.Module):
    """Local multi-head relation aggregator: every channel is a head, with a learnt affinity to the places nearby.

    Args:
        dim: C.
        axes: of the grid, 2 or 3; the neighbourhood is 5 places along each.
    """

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim)  # this and ``proj`` are published as convolutions of one place
        self.affinity = _CONV[axes](dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ..., C)."""
        return self.proj(_turned(self.affinity, self.value(x)))


class Global(nn.Module):
    """Global multi-head relation aggregator: self-attention of all places of an image, or of a clip, space and time.

    Args:
        dim: C.
        num_heads: a divisor of it.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ..., C)."""
        qkv = self.qkv(x).flatten(1, -2).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, n, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A dynamic position embedding, an aggregator and a feed-forward layer, each added to what came in.

    Args:
        dim: C.
        axes: of the grid, 2 or 3.
        num_heads: of a global aggregator; None makes a local one, which is normed by the batch and not by the place.
        mlp_ratio: hidden width of the feed-forward layer over C.
        drop_path: stochastic depth of the last two parts.
        layer_scale: initial factor of these; 0 is none.
    """

    def __init__(
        self, dim: int, axes: int, num_heads: int | None, mlp_ratio: float, *, drop_path: float, layer_scale: float
    ) -> None:
        super().__init__()
        self.local = num_heads is None
        self.pos_embed = _CONV[axes](dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = (
            _NORM[axes](dim) if num_heads is None else nn.LayerNorm(dim, eps=1e-6) for _ in range(2)
        )
        self.mixer = Local(dim, axes) if num_heads is None else Global(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ..., C)."""
        x = x + _turned(self.pos_embed, x)
        x = x + self.drop_path(self.ls1(self.mixer(self._normed(self.norm1, x))))
        return x + self.drop_path(self.ls2(self.mlp(self._normed(self.norm2, x))))

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = _turned(norm, x) if self.local else norm(x)
        return y


# ---- what makes places of pixels -------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """A convolution of patches side by side, and a norm; planes that patches do not divide end in zeros.

    Args:
        in_chans: channels of what comes in.
        dim: C.
        patch: side of a patch.
        time: None for images; else frames that a patch begins apart, 1 or 2. With 2 it sees one more on either side.
    """

    def __init__(self, in_chans: int, dim: int, patch: int, time: int | None) -> None:
        super().__init__()
        self.patch = patch
        if time is None:
            self.proj: nn.Module = nn.Conv2d(in_chans, dim, patch, patch)
        else:
            deep = 3 if time == 2 else 1
            self.proj = nn.Conv3d(in_chans, dim, (deep, patch, patch), (time, patch, patch), (deep // 2, 0, 0))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ..., C)."""
        x = F.pad(x, (0, -x.shape[-1] % self.patch, 0, -x.shape[-2] % self.patch))
        normed: Tensor = self.norm(self.proj(x).movedim(1, -1))
        return normed


class ConvEmbed(nn.Sequential):
    """Convolutions of width 3, each but the first after a GELU, that halve the size where they are told to."""

    def __init__(self, in_chans: int, widths: Sequence[int], strides: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for width, stride in zip(widths, strides, strict=True):
            if layers:
                layers.append(nn.GELU())
            layers += [nn.Conv2d(in_chans, width, 3, stride, 1), nn.BatchNorm2d(width)]
            in_chans = width
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        return super().forward(x).movedim(1, -1)


# ---- the net ---------------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """An embedding of patches, then blocks."""

    def __init__(self, embed: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...)."""
        return through_blocks(self, self.embed(x)).movedim(-1, 1)


class UniFormer(StagedNet):
    """UniFormer with timm's surface, for images (B, C, H, W) or clips (B, C, T, H, W) of any size.

    Features are at strides 4, 8, 16, 32 in space; in time, those of a clip are at stride 2.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        axes: 2 for images, 3 for clips.
        dims: width C of each of the four stages.
        depths: blocks of each.
        head_dim: width of a head of the global aggregators; it divides their ``dims``.
        aggregators: of each stage, L (local) or G (global).
        mlp_ratio: hidden width of the feed-forward layers over C.
        layer_scale: initial factor of each branch, for each stage; 0 is none.
        overlap: of images, whether patches overlap, made by convolutions of width 3.
        stem_stride: 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, heads that do not divide a width, axes, aggregators, patches, a stride or
            a pooling that are not allowed.
    """

    BEFORE = r"^stages\.0\.embed"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        axes: int = 2,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 8, 3),
        head_dim: int = 64,
        aggregators: str = "LLGG",
        mlp_ratio: float = 4.0,
        layer_scale: Sequence[float] = (0, 0, 0, 0),
        overlap: bool = False,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages(stem_stride, dims=dims, depths=depths, layer_scale=layer_scale)
        if not re.fullmatch("[LG]{4}", aggregators):
            raise InputError(
                f"aggregators = {aggregators!r} is not allowed: give L or G for each stage, such as 'LLGG'"
            )
        if axes not in _CONV:
            raise InputError(f"axes = {axes} is not allowed: give 2 for images, 3 for clips")
        if overlap and axes == 3:
            raise InputError("overlap = True is for images: give axes = 2, or overlap = False")
        for dim, kind in zip(dims, aggregators, strict=True):
            if kind == "G" and (head_dim < 1 or dim % head_dim):
                raise InputError(f"head_dim = {head_dim} does not divide a width of {dim}: give a divisor of it")
        self.num_classes, self.axes = num_classes, axes
        self.num_features = self.head_hidden_size = dims[3]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        before = in_chans
        for i, (dim, kind) in enumerate(zip(dims, aggregators, strict=True)):
            embed: nn.Module
            if not overlap:
                time = None if axes == 2 else 1 if i else 2
                embed = PatchEmbed(before, dim, 2 if i else stem_stride, time)
            elif i:
                embed = ConvEmbed(before, (dim,), (2,))
            else:
                embed = ConvEmbed(before, (dim // 2, dim), (2, stem_stride // 2))
            blocks = [
                Block(
                    dim,
                    axes,
                    dim // head_dim if kind == "G" else None,
                    mlp_ratio,
                    drop_path=next(rates),
                    layer_scale=layer_scale[i],
                )
                for _ in range(depths[i])
            ]
            stages.append(Stage(embed, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
            before = dim
        self.stages = nn.Sequential(*stages)
        self.norm = _NORM[axes](self.num_features)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, Block) and not module.local:
                module.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32), or (B, C, T/2, H/32, W/32) of clips."""
        if x.ndim != self.axes + 2:
            raise InputError(
                f"an input of shape {tuple(x.shape)} does not suit a net of {self.axes} axes: give (batch, channels, "
                f"{'height, width' if self.axes == 2 else 'frames, height, width'})"
            )
        features: Tensor = self.norm(self.stages(x))
        return features


def _init_weights(module: nn.Module) -> None:
    # Layers that are published as convolutions keep torch's own beginning, which is theirs.
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ---- the authors' weights --------------------------------------------------------------------------------------------

_AUTHORS = (
    (r"^(?:module|backbone)\.", ""),
    (r"\.conv1\.", ".mixer.value."),
    (r"\.conv2\.", ".mixer.proj."),
    (r"\.attn\.(weight|bias)$", r".mixer.affinity.\1"),
    (r"\.attn\.", ".mixer."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^(patch_embed\d\.)proj\.(\d\.)", r"\1\2"),
)
_FLAT = re.compile(r"\.mixer\.(?:value|proj)\.weight$|\.mlp\.fc[12]\.weight$")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights of images or clips under our names, without the classifier of labelled tokens."""
    if any(key.startswith("stages.") for key in state_dict):
        return state_dict
    ours = {}
    for key, value in state_dict.get("model", state_dict.get("model_state", state_dict)).items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        # Their stages are numbered from 1.
        found = re.fullmatch(r"(patch_embed|blocks)(\d)\.(.+)", key)
        if found:
            kind = "embed" if found[1] == "patch_embed" else "blocks"
            key = f"stages.{int(found[2]) - 1}.{kind}.{found[3]}"
        if _FLAT.search(key):
            value = value.flatten(1)  # convolutions of one place
        elif key.endswith(".gamma"):
            value = value.flatten()
        if not key.startswith("aux_head."):
            ours[key] = value
    return ours


def inflate(state_dict: Mapping[str, Tensor], model: UniFormer) -> dict[str, Tensor]:
    """Return the weights of a net for images as the first ones of a net for clips.

    A convolution along time begins as the mean over its frames of the one of images.

    Args:
        state_dict: of a ``UniFormer`` of two axes, of the same stages, without overlapping patches.
        model: for clips.

    Returns:
        All of ``model``'s state; its classifier as it was, where the classes are not as many.

    Raises:
        InputError: weights that do not fit.
    """
    own = model.state_dict()
    found = {}
    for key, wanted in own.items():
        value = state_dict.get(key)
        if value is not None and wanted.ndim == 5 and value.ndim == 4:
            value = value.unsqueeze(2).expand(-1, -1, wanted.shape[2], -1, -1) / wanted.shape[2]
        if key.startswith("head.") and (value is None or value.shape != wanted.shape):
            value = wanted
        if value is None or value.shape != wanted.shape:
            has = "is absent" if value is None else f"becomes {tuple(value.shape)}"
            raise InputError(
                f"{key} of an image's net {has}, and the clip's has {tuple(wanted.shape)}: give nets of the same "
                "stages, without overlap"
            )
        found[key] = value
    return found


# ---- the variants ----------------------------------------------------------------------------------------------------


_OWN: dict[str, Any] = {"crop_pct": 0.875, "first_conv": "stages.0.embed.proj"}
_OVERLAP: dict[str, Any] = {**_OWN, "first_conv": "stages.0.embed.0"}
default_cfgs = generate_default_cfgs(
    {
        "uniformer_nano": nano_cfg(first_conv="stages.0.embed.proj"),
        "uniformer_small": cfg(**_OWN),
        "uniformer_small_dim32": cfg(**_OWN),
        "uniformer_small_plus": cfg(**_OVERLAP),
        "uniformer_small_plus_dim64": cfg(**_OVERLAP),
        "uniformer_base": cfg(**_OWN),
        "uniformer_base_dim32": cfg(**_OWN),
        "uniformer_base_ls": cfg(**_OWN),
        "uniformer_large_ls": cfg(**_OWN),
    }
)
_PLUS: dict[str, Any] = {"depths": (3, 5, 9, 3), "overlap": True}
_BASE: dict[str, Any] = {"depths": (5, 8, 20, 7)}
_LARGE: dict[str, Any] = {"dims": (128, 192, 448, 640), "depths": (5, 10, 24, 7), "layer_scale": (1e-6,) * 4}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> UniFormer:
    net: UniFormer = create(UniFormer, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def uniformer_nano(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """0.4 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "head_dim": 16, "stem_stride": 2}
    return _create("uniformer_nano", pretrained, **{**own, **kwargs})


@register_model
def uniformer_small(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S, 22 M parameters; trained with stochastic depth 0.1."""
    return _create("uniformer_small", pretrained, **kwargs)


@register_model
def uniformer_small_dim32(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S with heads of 32 channels, as it was first trained with labelled tokens."""
    return _create("uniformer_small_dim32", pretrained, **{"head_dim": 32, **kwargs})


@register_model
def uniformer_small_plus(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S with overlapping patches and deeper, 24 M parameters, and heads of 32 channels."""
    return _create("uniformer_small_plus", pretrained, **{**_PLUS, "head_dim": 32, **kwargs})


@register_model
def uniformer_small_plus_dim64(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """The same with heads of 64 channels."""
    return _create("uniformer_small_plus_dim64", pretrained, **{**_PLUS, **kwargs})


@register_model
def uniformer_base(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-B, 50 M parameters; trained with stochastic depth 0.3."""
    return _create("uniformer_base", pretrained, **{**_BASE, **kwargs})


@register_model
def uniformer_base_dim32(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-B with heads of 32 channels, as it was first trained with labelled tokens."""
    return _create("uniformer_base_dim32", pretrained, **{**_BASE, "head_dim": 32, **kwargs})


@register_model
def uniformer_base_ls(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-B with layer scale in its global blocks."""
    return _create("uniformer_base_ls", pretrained, **{**_BASE, "layer_scale": (0, 0, 1e-6, 1e-6), **kwargs})


@register_model
def uniformer_large_ls(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-L, 100 M parameters, with layer scale; trained with labelled tokens."""
    return _create("uniformer_large_ls", pretrained, **{**_LARGE, **kwargs})


def uniformer_video_nano(**kwargs: Any) -> UniFormer:
    """0.4 M parameters, for clips of 4 to 16 frames of 16 to 32 pixels; ours, not the paper's."""
    own = {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "head_dim": 16, "stem_stride": 2, "num_classes": 10}
    return UniFormer(**{"axes": 3, **own, **kwargs})


def uniformer_video_small(**kwargs: Any) -> UniFormer:
    """UniFormer-S for clips of 8, 16 or 32 frames, as for Kinetics-400; trained with stochastic depth 0.1."""
    return UniFormer(**{"axes": 3, "num_classes": 400, **kwargs})


def uniformer_video_base(**kwargs: Any) -> UniFormer:
    """UniFormer-B for clips of 8, 16 or 32 frames, as for Kinetics-400; trained with stochastic depth 0.3."""
    return UniFormer(**{"axes": 3, "num_classes": 400, **_BASE, **kwargs})
