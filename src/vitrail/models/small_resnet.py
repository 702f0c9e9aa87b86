"""Residual networks for small images.

He et al., "Deep Residual Learning for Image Recognition" (2016), in the shape its section 4.2 gives small images: a 3x3
stem and no pooling before the first stage. Everything else (blocks, head, hooks for features, checkpointing, parameter
groups) is timm's ResNet. What departs from section 4.2: widths double four times; the stem may have stride 2, which
buys more accuracy per second of a CPU than full resolution does; and the last normalisation of each block starts at
zero (Goyal et al., 2017), which lets training start at high learning rates.
"""

from __future__ import annotations

from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn


class SmallResNet(ResNet):
    """timm's ResNet with a small stem; features at strides 1, 1, 2, 4, 8, times ``stem_stride``.

    Args:
        layers: blocks per stage.
        channels: width per stage.
        stem_stride: 1 keeps the resolution, 2 halves it.
        in_chans: input channels.
        **kwargs: as for ``timm.models.resnet.ResNet``.
    """

    def __init__(
        self,
        layers: tuple[int, ...] = (1, 1, 1, 1),
        channels: tuple[int, ...] = (32, 64, 128, 256),
        stem_stride: int = 1,
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        # timm ties the width after the stem to 64 unless the stem is "deep"; the deep stem itself is replaced below.
        stem: dict[str, Any] = {"stem_type": "deep", "stem_width": channels[0] // 2}
        block: Any = BasicBlock  # timm annotates instances where it takes classes
        super().__init__(block, layers, channels=channels, in_chans=in_chans, **stem, **kwargs)
        place = next(self.parameters())
        conv = nn.Conv2d(in_chans, channels[0], 3, stem_stride, 1, bias=False, device=place.device, dtype=place.dtype)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.conv1, self.maxpool = cast(Any, conv), cast(Any, nn.Identity())  # timm annotates its own choices
        for index, info in enumerate(self.feature_info):
            info["reduction"] = stem_stride * 2 ** max(index - 1, 0)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {"small_resnet_nano": _cfg(), "small_resnet_micro": _cfg(), "small_resnet_tiny": _cfg()}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SmallResNet:
    return build_model_with_cfg(SmallResNet, variant, pretrained, **kwargs)


@register_model
def small_resnet_nano(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """0.3 M parameters; for tests and for images of 8 to 16 pixels."""
    return _create("small_resnet_nano", pretrained, **{"channels": (16, 32, 64, 128), **kwargs})


@register_model
def small_resnet_micro(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """0.7 M parameters and 8 M multiply-adds at 28 pixels; for images of 24 to 96 pixels on a CPU."""
    return _create("small_resnet_micro", pretrained, **{"channels": (24, 48, 96, 192), "stem_stride": 2, **kwargs})


@register_model
def small_resnet_tiny(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """11 M parameters: ResNet-18 without the early pooling."""
    return _create(
        "small_resnet_tiny", pretrained, **{"layers": (2, 2, 2, 2), "channels": (64, 128, 256, 512), **kwargs}
    )
