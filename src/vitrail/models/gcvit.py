"""GC ViT: attention in windows whose queries are, in every second block, a summary of the whole image.

Hatamizadeh, Yin, Heinrich, Kautz, Molchanov, "Global Context Vision Transformers" (ICML 2023), arXiv 2206.09959. At the
start of each stage convolutions and pooling make one map of queries of the size of a window; it meets the keys and
values of every window, so that no windows have to be shifted. The nets are timm's, for images of one size. Those that
timm does not have, and a nano, are built here from its parts, for images of any size.

Shapes: B images, H x W places, windows of w x w = N places, n heads, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.gcvit import FeatureBlock, GlobalContextVit, GlobalContextVitBlock
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.pooling import global_pooling
from vitrail.layers.windows import from_windows, real_places, to_windows
from vitrail.models.staged import cfg, create, nano_cfg


class Block(GlobalContextVitBlock):
    """timm's block for maps of any size: windows are filled up, and nobody attends to what fills them."""

    def _window_attn(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        batch, height, width, _ = x.shape
        attention: Any = self.attn
        windows = to_windows(x, self.window_size).flatten(1, 2)  # (B windows, N, C)
        kinds = 2 if attention.use_global else 3
        parts = attention.qkv(windows).unflatten(2, (kinds, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if q_global is not None and attention.use_global:
            shared = q_global.flatten(1, 2).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)  # (B, n, N, d)
            query = shared.repeat_interleave(windows.shape[0] // batch, dim=0)
            key, value = parts.unbind(0)
        else:
            query, key, value = parts.unbind(0)
        bias = attention.rel_pos.get_bias().to(query.dtype)  # (1, n, N, N)
        real = real_places(height, width, self.window_size, x.device)
        if real is not None:
            # The windows of an image stand beside its heads, so that the bias need not be repeated for each image.
            bias = torch.where(real[:, None, None], bias, float("-inf")).flatten(0, 1)[None]
            query, key, value = (part.reshape(batch, -1, *part.shape[2:]) for part in (query, key, value))
        drop = attention.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, bias, drop)
        y = y.reshape(windows.shape[0], attention.num_heads, *y.shape[2:]).transpose(1, 2).flatten(2)
        y = attention.proj_drop(attention.proj(y))
        return from_windows(y.unflatten(1, self.window_size), height, width)


class QueryMap(FeatureBlock):
    """timm's convolutions and poolings before the global queries; another size of map is resized to a window's."""

    def __init__(self, dim: int, levels: int, window: int) -> None:
        super().__init__(dim, levels)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, w, w) of (B, C, H, W)."""
        x = super().forward(x)
        size = (self.window, self.window)
        return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class GCViT(GlobalContextVit):
    """timm's GC ViT for images of any size, begun as the authors' code begins it.

    Args:
        stem_stride: 2, or 4 as published.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        global_pool: as in timm, such as ``"avg"``; ``""`` only without classifier.
        embed_dim: width of the first stage; it doubles with each.
        depths: blocks of each stage; the second, fourth ... have global queries.
        num_heads: of each stage; they divide its width.
        window_size: side of the windows of each stage, in places.
        query_levels: halvings from a stage's map to its global queries; what is then left is resized.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).
        **kwargs: as for ``timm.models.gcvit.GlobalContextVit``, but for the size of images.

    Raises:
        InputError: a stride that is not allowed, settings of stages of several numbers, heads that do not divide a
            width, no window, or no pooling with a classifier.
    """

    def __init__(
        self,
        stem_stride: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 19, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_size: Sequence[int] = (7, 7, 14, 7),
        query_levels: Sequence[int] = (3, 2, 0, 0),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        _refuse(stem_stride, embed_dim, depths, num_heads, window_size, query_levels)
        global_pooling(global_pool, num_classes)
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            window_size=tuple(window_size),
            embed_dim=embed_dim,
            depths=(0,) * len(depths),  # the blocks are ours
            num_heads=tuple(num_heads),
            **kwargs,
        )
        self.stem.conv1.stride = (stem_stride // 2, stem_stride // 2)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: Any = self.stages
        for place, (stage, info) in enumerate(zip(stages, self.feature_info)):
            info["reduction"] = stem_stride * 2**place
            stage.global_block = QueryMap(stage.dim, query_levels[place], window_size[place])
            stage.blocks = nn.ModuleList(
                Block(
                    stage.dim,
                    feat_size=(window_size[place], window_size[place]),
                    num_heads=num_heads[place],
                    window_size=window_size[place],
                    mlp_ratio=mlp_ratio,
                    use_global=number % 2 == 1,
                    layer_scale=layer_scale,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=next(rates),
                )
                for number in range(depths[place])
            )
        module: Any
        for name, module in self.named_modules():
            # Squeeze-and-excitation has linear layers in the authors' code.
            if isinstance(module, nn.Linear) or re.search(r"\.se\.fc[12]$", name):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        """Set the number of classes and the pooling; ``""``, without classifier, gives ``forward_features``.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        global_pooling(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool, device, dtype)


def _refuse(
    stem_stride: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: Sequence[int],
    query_levels: Sequence[int],
) -> None:
    if stem_stride not in (2, 4):
        raise InputError(f"gcvit: stem_stride = {stem_stride} is not allowed: give 2 or 4")
    for name, values in (("depths", depths), ("num_heads", num_heads), ("window_size", window_size)):
        if not isinstance(values, Sequence):
            raise InputError(f"gcvit: {name} = {values} is one number: give a list, with an entry for each stage")
    if not len(depths) == len(num_heads) == len(window_size) == len(query_levels):
        raise InputError(
            f"gcvit: depths = {tuple(depths)}, num_heads = {tuple(num_heads)}, window_size = {tuple(window_size)} and "
            f"query_levels = {tuple(query_levels)} are of several lengths: give one of each for every stage"
        )
    if min(depths) < 1:
        raise InputError(f"gcvit: depths = {tuple(depths)} is not allowed: give 1 block or more for each stage")
    if min(window_size) < 1 or min(query_levels) < 0:
        raise InputError(
            f"gcvit: window_size = {tuple(window_size)} with query_levels = {tuple(query_levels)} is not allowed: give "
            "windows of 1 place or more, and levels from 0"
        )
    for place, heads in enumerate(num_heads):
        if heads < 1 or embed_dim * 2**place % heads:
            raise InputError(
                f"gcvit: num_heads = {heads} does not divide a width of {embed_dim * 2**place}: give a divisor of it"
            )


_NAMES = (
    (r"^module\.", ""),
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.", "stem.down."),
    (r"^levels\.(\d+)\.downsample\.", lambda found: f"stages.{int(found[1]) + 1}.downsample."),
    (r"^levels\.", "stages."),
    (r"\.q_global_gen\.to_q_global\.(\d+)\.conv\.", lambda found: f".global_block.blocks.conv{int(found[1]) + 1}."),
    (r"\.(down|downsample)\.conv\.", r".\1.conv_block."),
    (r"(\.conv_block|\.blocks\.conv\d+)\.0\.", r"\1.conv_dw."),
    (r"(\.conv_block|\.blocks\.conv\d+)\.2\.fc\.0\.", r"\1.se.fc1."),
    (r"(\.conv_block|\.blocks\.conv\d+)\.2\.fc\.2\.", r"\1.se.fc2."),
    (r"(\.conv_block|\.blocks\.conv\d+)\.3\.", r"\1.conv_pw."),
    (r"\.attn\.relative_position_bias_table$", ".attn.rel_pos.relative_position_bias_table"),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""The authors' names, and timm's."""


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, or timm's, under timm's names.

    Args:
        state: a checkpoint, with or without ``state_dict`` or ``model`` around it and ``module.`` before its names.
        model: the GC ViT that they are for, of timm or of ours.
    """
    state = state.get("state_dict", state.get("model", state))
    if "stem.conv1.weight" in state:
        return state
    found = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            continue
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        key = re.sub(r"^norm\.", f"stages.{len(model.stages) - 1}.norm.", key)  # type: ignore[arg-type]
        found[key] = value[..., None, None] if ".se.fc" in key else value
    return found


# ---- the variants ----------------------------------------------------------------------------------------------------


_PLACES: dict[str, Any] = {"first_conv": "stem.conv1", "classifier": "head.fc"}
default_cfgs = generate_default_cfgs(
    {
        "gcvit_nano": nano_cfg(pool_size=(4, 4), **_PLACES),
        "gcvit_tiny2": cfg(crop_pct=0.875, **_PLACES),
        "gcvit_small2": cfg(crop_pct=0.875, **_PLACES),
        "gcvit_large": cfg(**_PLACES),
        "gcvit_large_384": cfg(384, crop_mode="squash", **_PLACES),
        "gcvit_large_512": cfg(512, crop_mode="squash", **_PLACES),
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> GCViT:
    net: GCViT = create(GCViT, variant, pretrained, checkpoint_filter_fn, stages=len(options["depths"]), **options)
    return net


@register_model
def gcvit_nano(pretrained: bool = False, **kwargs: Any) -> GCViT:
    """0.3 M parameters, for images of 28 to 64 pixels; three stages, windows of 4 places."""
    shape = {
        "stem_stride": 2,
        "embed_dim": 24,
        "depths": (2, 2, 2),
        "num_heads": (1, 2, 4),
        "window_size": (4, 4, 4),
        "query_levels": (2, 1, 0),
    }
    return _create("gcvit_nano", pretrained, **{**shape, **kwargs})


@register_model
def gcvit_tiny2(pretrained: bool = False, **kwargs: Any) -> GCViT:
    """34 M parameters; trained with stochastic depth 0.25."""
    return _create("gcvit_tiny2", pretrained, **{"depths": (3, 4, 29, 5), **kwargs})


@register_model
def gcvit_small2(pretrained: bool = False, **kwargs: Any) -> GCViT:
    """68 M parameters; trained with stochastic depth 0.35."""
    shape = {"embed_dim": 96, "depths": (3, 4, 23, 5), "num_heads": (3, 6, 12, 24), "layer_scale": 1e-5}
    return _create("gcvit_small2", pretrained, **{**shape, **kwargs})


_LARGE: dict[str, Any] = {
    "embed_dim": 192,
    "depths": (3, 4, 19, 5),
    "num_heads": (6, 12, 24, 48),
    "mlp_ratio": 2.0,
    "layer_scale": 1e-5,
}


@register_model
def gcvit_large(pretrained: bool = False, **kwargs: Any) -> GCViT:
    """201 M parameters; trained with stochastic depth 0.5."""
    return _create("gcvit_large", pretrained, **{**_LARGE, **kwargs})


@register_model
def gcvit_large_384(pretrained: bool = False, **kwargs: Any) -> GCViT:
    """202 M parameters, windows for 384 pixels; trained with stochastic depth 0.1, after ImageNet-21K."""
    return _create("gcvit_large_384", pretrained, **{**_LARGE, "window_size": (12, 12, 24, 12), **kwargs})


@register_model
def gcvit_large_512(pretrained: bool = False, **kwargs: Any) -> GCViT:
    """203 M parameters, windows for 512 pixels; trained with stochastic depth 0.1, after ImageNet-21K."""
    return _create("gcvit_large_512", pretrained, **{**_LARGE, "window_size": (16, 16, 32, 16), **kwargs})
