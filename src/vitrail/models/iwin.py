"""Iwin: attention connects places that stand far apart, a depthwise convolution beside it those that are neighbours.

Huo and Li, "Iwin Transformer: Hierarchical Vision Transformer using Interleaved Windows" (2025), arXiv 2507.18405, and
the authors' code (Cominder/Iwin-Transformer). The net has Swin's stages and no embedding of positions, so that its
weights fit images of any size, with windows of any size. Sizes that patches, windows or strides do not divide are
filled up with zeros as in the authors' code for segmentation.

Shapes: B images or clips, H x W places, or T x H x W, C channels. Stages take and return (B, C, ...); blocks work on
(B, ..., C).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.interleaved import InterleavedAttention, Window
from vitrail.models.staged import Block, StagedNet, cfg, check_stages, create, nano_cfg, through_blocks


class Downsample(nn.Module):
    """A norm and a convolution of 3 x 3 that halves height and width, rounded up, of a map or of each frame."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim_in)
        self.conv = nn.Conv2d(dim_in, dim, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ..., H/2, W/2, C) of (B, ..., H, W, c)."""
        before = x.shape[:-3]
        x = self.norm(x).flatten(0, -4)
        # The odd row and column of zeros are behind the map alone, as published: its windows begin at even places.
        x = F.pad(x, (0, 0, 0, 1 + x.shape[2] % 2, 0, 1 + x.shape[1] % 2)).permute(0, 3, 1, 2)
        return self.conv(x).permute(0, 2, 3, 1).unflatten(0, before)


class PatchEmbed(nn.Module):
    """A convolution of patches side by side, and a norm; what patches do not divide ends in zeros.

    Args:
        in_chans: channels of what comes in.
        dim: C.
        patch: side of a patch.
        time: frames of a patch; None for images.
    """

    def __init__(self, in_chans: int, dim: int, patch: int, time: int | None) -> None:
        super().__init__()
        self.patch, self.time = patch, time
        self.proj: nn.Module
        if time is None:
            self.proj = nn.Conv2d(in_chans, dim, patch, patch)
        else:
            self.proj = nn.Conv3d(in_chans, dim, (time, patch, patch), (time, patch, patch))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...)."""
        pad = [0, -x.shape[-1] % self.patch, 0, -x.shape[-2] % self.patch]
        if self.time is not None:
            pad += [0, -x.shape[2] % self.time]
        normed: Tensor = self.norm(self.proj(F.pad(x, pad)).movedim(1, -1)).movedim(-1, 1)
        return normed


class Stage(nn.Module):
    """A downsampling (none in the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...)."""
        return through_blocks(self, self.downsample(x.movedim(1, -1))).movedim(-1, 1)


class Iwin(StagedNet):
    """Iwin with timm's surface, for images (B, C, H, W) or clips (B, C, T, H, W) of any size.

    Features are at strides 4, 8, 16, 32 in space; in time, those of a clip are at stride 2.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        frames: of the clips that a net is for: it learns when each pair of frames was, and interpolates that for clips
            of another length; None is a net for images.
        dim: width C of the first stage; it doubles with each.
        depths: blocks of the four stages.
        num_heads: heads of each stage, which divide its width.
        window: places along a side of a window, which in a clip has all times; for larger images the same weights may
            have larger windows, and as many: 12 at 384 pixels, 16 at 512.
        mlp_ratio: hidden width of the feed-forward layers over C.
        conv: for each stage, whether a convolution stands beside its attention. The published nets have none where
            a window is the whole map.
        stem_stride: 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, heads that do not fit, a window, frames, a stride or a pooling that are
            not allowed.
    """

    BEFORE = r"^(?:stem|time_embed)"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        frames: int | None = None,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: Window = 7,
        mlp_ratio: float = 4.0,
        conv: Sequence[bool] = (True, True, True, False),
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages(stem_stride, depths=depths, num_heads=num_heads, conv=conv)
        if frames is not None and frames < 1:
            raise InputError(f"frames = {frames} is not allowed: give the number in a clip, or None for images")
        self.num_classes, self.frames = num_classes, frames
        self.num_features = self.head_hidden_size = dim * 8
        time = None if frames is None else 2
        self.stem = PatchEmbed(in_chans, dim, stem_stride, time)
        # One for each pair of frames, the same for all of its places.
        self.time_embed = None if frames is None else nn.Parameter(torch.zeros(1, dim, -(-frames // 2), 1, 1))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, (depth, heads, beside) in enumerate(zip(depths, num_heads, conv, strict=True)):
            width = dim * 2**i
            blocks = [
                Block(width, InterleavedAttention(width, heads, window, conv=beside), mlp_ratio, drop_path=next(rates))
                for _ in range(depth)
            ]
            stages.append(Stage(Downsample(width // 2, width) if i else nn.Identity(), blocks))
            self.feature_info.append({"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Return what is not decayed beside vectors: the times of a clip."""
        return set() if self.time_embed is None else {"time_embed"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, 8 C, H/32, W/32), or (B, 8 C, T/2, H/32, W/32) of clips.

        Raises:
            InputError: images for a net of clips, or the other way round.
        """
        if x.ndim != (4 if self.time_embed is None else 5):
            kind, frames = ("images", "") if self.time_embed is None else ("clips", "frames, ")
            raise InputError(
                f"an input of shape {tuple(x.shape)} does not suit a net for {kind}: give (batch, channels, {frames}"
                "height, width)"
            )
        x = self.stem(x)
        if self.time_embed is not None:
            times: Tensor = self.time_embed
            if x.shape[2] != times.shape[2]:
                times = F.interpolate(times[..., 0, 0], x.shape[2], mode="linear")[..., None, None]
            x = x + times
        features: Tensor = self.norm(self.stages(x).movedim(1, -1)).movedim(-1, 1)
        return features


def _init_weights(module: nn.Module) -> None:
    # Convolutions of images keep torch's own beginning, as published.
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


# ---- the authors' weights --------------------------------------------------------------------------------------------

_AUTHORS = (
    (r"^(?:module|backbone)\.", ""),
    (r"^cls_head\.fc_cls\.", "head."),
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d)\.downsample\.", lambda found: f"stages.{int(found[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"\.dwconv\.depthwise\.", ".attn.conv."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights of images or clips under our names.

    Of a net trained to segment or detect, its norms behind each stage are left out, and what is not of the net. The
    weights of images fit a net for clips too, whose patches begin as the mean over their frames; its times and, where
    the classes are not as many, its classifier stay as they are.
    """
    state = next((state_dict[key] for key in ("model", "state_dict") if key in state_dict), state_dict)
    ours: dict[str, Any] = {}
    own = model.state_dict()
    for key, value in state.items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        wanted = own.get(key)
        if key == "stem.proj.weight" and wanted is not None and wanted.ndim > value.ndim:
            value = value.unsqueeze(2).expand(-1, -1, wanted.shape[2], -1, -1) / wanted.shape[2]
        if not re.match(r"norm\d|decode_head|auxiliary_head|neck|rpn_head|roi_head", key):
            ours[key] = value
    if "time_embed" in own and "time_embed" not in ours:
        ours["time_embed"] = own["time_embed"]
        for key in ("head.weight", "head.bias"):
            if key in own and ours[key].shape != own[key].shape:
                ours[key] = own[key]
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


_OWN: dict[str, Any] = {"crop_pct": 0.875, "first_conv": "stem.proj"}
_LARGER: dict[str, Any] = {"first_conv": "stem.proj"}
default_cfgs = generate_default_cfgs(
    {
        "iwin_nano": nano_cfg(first_conv="stem.proj"),
        "iwin_tiny": cfg(**_OWN),
        "iwin_small": cfg(**_OWN),
        "iwin_small_384": cfg(384, **_LARGER),
        "iwin_small_512": cfg(512, **_LARGER),
        "iwin_small_1024": cfg(1024, **_LARGER),
        "iwin_base": cfg(**_OWN),
        "iwin_base_384": cfg(384, **_LARGER),
        "iwin_base_512": cfg(512, **_LARGER),
        "iwin_base_1024": cfg(1024, **_LARGER),
        "iwin_large": cfg(**_OWN),
        "iwin_large_384": cfg(384, **_LARGER),
    }
)
_S: dict[str, Any] = {"depths": (2, 2, 18, 2), "num_heads": (3, 4, 8, 16)}
_B: dict[str, Any] = {"dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_L: dict[str, Any] = {"dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
_384: dict[str, Any] = {"window": 12}
_512: dict[str, Any] = {"window": 16}
_1024: dict[str, Any] = {"window": 16, "conv": (True, True, True, True)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Iwin:
    net: Iwin = create(Iwin, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def iwin_nano(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """0.6 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"dim": 16, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 4, 8), "window": 4, "stem_stride": 2}
    return _create("iwin_nano", pretrained, **{**own, **kwargs})


@register_model
def iwin_tiny(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """30 M parameters; trained with stochastic depth 0.2."""
    return _create("iwin_tiny", pretrained, **kwargs)


@register_model
def iwin_small(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """52 M parameters; trained with stochastic depth 0.3, and on ImageNet-22K with heads (3, 6, 12, 24) and 0.2."""
    return _create("iwin_small", pretrained, **{**_S, **kwargs})


@register_model
def iwin_small_384(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """52 M parameters, with the windows of images of 384 pixels."""
    return _create("iwin_small_384", pretrained, **{**_S, **_384, **kwargs})


@register_model
def iwin_small_512(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """52 M parameters, with the windows of images of 512 pixels."""
    return _create("iwin_small_512", pretrained, **{**_S, **_512, **kwargs})


@register_model
def iwin_small_1024(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """52 M parameters, for images of 1024 pixels: the last stage has windows, and convolutions, too."""
    return _create("iwin_small_1024", pretrained, **{**_S, **_1024, **kwargs})


@register_model
def iwin_base(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """91 M parameters; trained with stochastic depth 0.5, on ImageNet-22K with 0.2."""
    return _create("iwin_base", pretrained, **{**_B, **kwargs})


@register_model
def iwin_base_384(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """91 M parameters, with the windows of images of 384 pixels."""
    return _create("iwin_base_384", pretrained, **{**_B, **_384, **kwargs})


@register_model
def iwin_base_512(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """91 M parameters, with the windows of images of 512 pixels."""
    return _create("iwin_base_512", pretrained, **{**_B, **_512, **kwargs})


@register_model
def iwin_base_1024(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """91 M parameters, for images of 1024 pixels: the last stage has windows, and convolutions, too."""
    return _create("iwin_base_1024", pretrained, **{**_B, **_1024, **kwargs})


@register_model
def iwin_large(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """204 M parameters; trained, on ImageNet-22K, with stochastic depth 0.2."""
    return _create("iwin_large", pretrained, **{**_L, **kwargs})


@register_model
def iwin_large_384(pretrained: bool = False, **kwargs: Any) -> Iwin:
    """204 M parameters, with the windows of images of 384 pixels."""
    return _create("iwin_large_384", pretrained, **{**_L, **_384, **kwargs})


def iwin_video_nano(**kwargs: Any) -> Iwin:
    """0.6 M parameters, for clips of 16 to 64 pixels; ours, not the paper's. Options are those of ``Iwin``."""
    own = {"dim": 16, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 4, 8), "window": 4, "stem_stride": 2, "frames": 8}
    return Iwin(**{"num_classes": 10, **own, **kwargs})


def iwin_video_tiny(**kwargs: Any) -> Iwin:
    """Iwin-T for clips of 32 frames, 30 M parameters; options are those of ``Iwin``."""
    return Iwin(**{"num_classes": 400, "frames": 32, **kwargs})


def iwin_video_small(**kwargs: Any) -> Iwin:
    """Iwin-S for clips of 32 frames, 51 M parameters; options are those of ``Iwin``."""
    return Iwin(**{"num_classes": 400, "frames": 32, "depths": (2, 2, 18, 2), **kwargs})


def iwin_video_base(**kwargs: Any) -> Iwin:
    """Iwin-B for clips of 32 frames; options are those of ``Iwin``."""
    return Iwin(**{"num_classes": 400, "frames": 32, **_B, **kwargs})


def iwin_video_large(**kwargs: Any) -> Iwin:
    """Iwin-L for clips of 32 frames; options are those of ``Iwin``."""
    return Iwin(**{"num_classes": 400, "frames": 32, **_L, **kwargs})
