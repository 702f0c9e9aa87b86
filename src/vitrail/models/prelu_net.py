"""PReLU networks: plain convolutions, rectifiers that learn their slope, and a pyramid of pools before three layers.

He, Zhang, Ren, Sun, "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification" (ICCV
2015). There is no normalisation: such deep nets train because of how they begin, ``vitrail.layers.rectifier_init``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.rectifier_init import rectifier_init_
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks

SLOPE = 0.25
"""Of all PReLUs at the start; section 2.1 of the paper."""
Rectifier = Literal["channel", "shared", "relu"]


def rectifier(kind: Rectifier, dim: int) -> nn.Module:
    """Return max(0, y) + a min(0, y) with an a for each of ``dim`` channels, with one for all, or with a = 0.

    Raises:
        InputError: another kind.
    """
    if kind == "relu":
        return nn.ReLU()
    if kind not in ("channel", "shared"):
        raise InputError(f"prelu_net: rectifier_kind = {kind!r} is not allowed: give 'channel', 'shared' or 'relu'")
    return nn.PReLU(dim if kind == "channel" else 1, SLOPE)


class Layer(nn.Module):
    """A convolution and a rectifier."""

    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int, kind: Rectifier) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2)
        self.act = rectifier(kind, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H/s, W/s)."""
        y: Tensor = self.act(self.conv(x))
        return y


class Stage(nn.Module):
    """A pooling of 2 x 2 places and layers at the resolution that it leaves."""

    def __init__(self, blocks: Sequence[Layer]) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)  # an odd last row is seen too
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(H/2), ceil(W/2))."""
        return through_blocks(self, self.pool(x))


class SpatialPyramid(nn.Module):
    """The largest of each channel in n x n bins of the map, for each n of some; one length for maps of any size.

    He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks" (2014): bin i of n goes from floor((i - 1) w /
    n) to ceil(i w / n) of w places.

    Args:
        levels: bins on a side, each 1 or more.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C * sum of n * n) for (B, C, H, W)."""
        return torch.cat([F.adaptive_max_pool2d(x, level).flatten(1) for level in self.levels], dim=1)


class PReLUNet(StagedNet):
    """A PReLU network with timm's surface; features after each stage, for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off, behind two layers of ``hidden`` features.
        stem_width: channels of the first convolution.
        stem_kernel: its side, odd.
        stem_stride: its stride, 1 or more.
        depths: convolutions of each stage.
        widths: channels of each stage.
        hidden: width of the two layers between the pyramid and the classifier.
        levels: of the pyramid, bins on a side.
        rectifier_kind: ``channel`` learns a slope for each channel, ``shared`` one for each layer, ``relu`` none.
        global_pool: ``spp``, the pyramid, which ``avg`` stands for too; ``""``, only without classifier, gives
            ``forward_features``.
        drop_rate: dropout behind each of the two layers, in [0, 1); published 0.5.

    Raises:
        InputError: a value out of range.
    """

    BEHIND = r"^hidden\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_width: int = 96,
        stem_kernel: int = 7,
        stem_stride: int = 2,
        depths: Sequence[int] = (5, 5, 5),
        widths: Sequence[int] = (256, 512, 512),
        hidden: int = 4096,
        levels: Sequence[int] = (7, 3, 2, 1),
        rectifier_kind: Rectifier = "channel",
        global_pool: str = "spp",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(widths) or not depths or min(depths) < 1:
            raise InputError(
                f"prelu_net: depths = {tuple(depths)} with widths = {tuple(widths)} is not allowed: give one or more "
                "layers and a width for each stage"
            )
        if min(stem_width, hidden, *widths) < 1:
            raise InputError(
                f"prelu_net: stem_width = {stem_width}, widths = {tuple(widths)} and hidden = {hidden} are not "
                "allowed: give one channel or more everywhere"
            )
        if stem_kernel % 2 != 1 or stem_stride < 1:
            raise InputError(
                f"prelu_net: stem_kernel = {stem_kernel} with stem_stride = {stem_stride} is not allowed: "
                "give an odd side and a stride of 1 or more"
            )
        if not levels or min(levels) < 1:
            raise InputError(f"prelu_net: levels = {tuple(levels)} is not allowed: give bins on a side, each 1 or more")
        self.stem = Layer(in_chans, stem_width, stem_kernel, stem_stride, rectifier_kind)
        stages, self.feature_info, dim = [], [], stem_width
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stages.append(Stage([Layer(width if i else dim, width, 3, 1, rectifier_kind) for i in range(depth)]))
            reduction = stem_stride * 2 ** (number + 1)
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{number}"})
            dim = width
        self.stages = nn.Sequential(*stages)
        self.num_features, self.head_hidden_size = dim, hidden
        self.pyramid = SpatialPyramid(levels)
        self.hidden = nn.Sequential(
            nn.Linear(dim * sum(level * level for level in levels), hidden),
            rectifier(rectifier_kind, hidden),
            nn.Dropout(drop_rate),
            nn.Linear(hidden, hidden),
            rectifier(rectifier_kind, hidden),
        )
        self.drop = nn.Dropout(drop_rate)
        rectifier_init_(self, 0.0 if rectifier_kind == "relu" else SLOPE)
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, on the device and in the type of the present weights.

        Args:
            num_classes: outputs; 0 leaves the features of the layer before.
            global_pool: as in the constructor; None leaves it.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        if global_pool is not None:
            if global_pool not in ("spp", "avg", "") or (num_classes and not global_pool):
                raise InputError(
                    f"prelu_net: global_pool = {global_pool!r} is not allowed: give 'spp', or '' with num_classes = 0"
                )
            self.pooled = bool(global_pool)
        self.num_classes = num_classes
        self.put_head()

    def put_head(self) -> None:
        """Set ``head`` for ``num_classes``; it begins small, as poolings of the largest make its inputs large."""
        self.head = self.linear_head(self.head_hidden_size, std=0.01) if self.num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map behind the last stage, (B, C, H, W)."""
        features: Tensor = self.stages(self.stem(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or with ``pre_logits`` what the classifier takes, (B, hidden)."""
        if not self.pooled:
            return x
        x = self.hidden(self.pyramid(x))
        return x if pre_logits else self.head(self.drop(x))


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return weights as they are: none were published, and ours have our names."""
    inner: Mapping[str, Any] = state.get("state_dict", state)
    return inner


default_cfgs = generate_default_cfgs(
    {
        "prelu_net_nano": nano_cfg(first_conv="stem.conv"),
        "prelu_net_a": cfg(first_conv="stem.conv", pool_size=(14, 14)),
        "prelu_net_b": cfg(first_conv="stem.conv", pool_size=(14, 14)),
        "prelu_net_c": cfg(first_conv="stem.conv", pool_size=(14, 14)),
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> PReLUNet:
    stages = len(options.get("depths", (5, 5, 5)))
    model: PReLUNet = create(PReLUNet, variant, pretrained, checkpoint_filter_fn, stages=stages, **options)
    return model


@register_model
def prelu_net_nano(pretrained: bool = False, **kwargs: Any) -> PReLUNet:
    """0.2 M parameters, for images of 28 to 64 pixels: seven convolutions and three layers."""
    own = {
        "stem_width": 16,
        "stem_kernel": 3,
        "stem_stride": 1,
        "depths": (2, 2, 2),
        "widths": (24, 32, 48),
        "hidden": 64,
    }
    return _create("prelu_net_nano", pretrained, **{**own, "levels": (4, 2, 1), **kwargs})


@register_model
def prelu_net_a(pretrained: bool = False, **kwargs: Any) -> PReLUNet:
    """178 M parameters: the paper's model A, 19 layers."""
    return _create("prelu_net_a", pretrained, **kwargs)


@register_model
def prelu_net_b(pretrained: bool = False, **kwargs: Any) -> PReLUNet:
    """183 M parameters: the paper's model B, 22 layers."""
    return _create("prelu_net_b", pretrained, **{"depths": (6, 6, 6), **kwargs})


@register_model
def prelu_net_c(pretrained: bool = False, **kwargs: Any) -> PReLUNet:
    """331 M parameters: the paper's model C, 22 wide layers."""
    return _create("prelu_net_c", pretrained, **{"depths": (6, 6, 6), "widths": (384, 768, 896), **kwargs})
