"""Nets of Kolmogorov-Arnold convolutions: VGG-, ResNet-, DenseNet- and U-Net-like.

Drokin, "Kolmogorov-Arnold Convolutions: Design Principles and Empirical Studies" (2024), arXiv 2407.01092, and its code
(IvanDrokin/torch-conv-kan). All take any basis and any kind of layer of ``vitrail.layers.kan_layers``; the published
nets that are registered here have Gram polynomials, in full or bottleneck layers. The U-Nets are for masks:

    net = KANUNet(in_chans=3, num_classes=1, kind="bottleneck", mixer="focal")
    logits = net(images)  # (B, classes, H, W)

Shapes: (B, C, H, W). What follows a published layer, a normalisation and an activation, is inside the layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.kan_layers import (
    REDUCTION,
    BottleneckKANConv,
    KANConv,
    KANFocalModulation,
    KANSelfAttention,
    make_layer,
)
from vitrail.models.staged import StagedNet, cfg, nano_cfg, through_blocks


class KANStage(nn.Module):
    """What halves the resolution, and blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return through_blocks(self, self.downsample(x))


NARROW = 8.0
"""How many times fewer channels the basis sees in 3x3 bottlenecks of the published nets for classes."""


class Layers:
    """Makes the layers of a net.

    Args:
        kind: of ``vitrail.layers.kan_layers.KINDS``.
        groups: of all kernels but 1x1 ones and the first.
        reduction: of the bottlenecks of 3x3 layers.
        **options: of the layers: ``basis``, ``degree``, ``norm``, ``affine``, ``dropout``, ``experts`` and others.
    """

    def __init__(self, kind: str, groups: int, reduction: float = REDUCTION, **options: Any) -> None:
        self.layer, self.groups = make_layer(kind), groups
        narrow = {"reduction": reduction} if kind in ("bottleneck", "experts") else {}
        self.options = {**narrow, **options}
        # As published, experts are of 3x3 kernels behind the first.
        self.plain: Any = {"experts": BottleneckKANConv, "full_experts": KANConv}.get(kind, self.layer)
        self.bare = {name: value for name, value in options.items() if name not in ("experts", "top_k", "bottleneck")}

    def first(self, in_dim: int, dim: int, side: int, stride: int) -> nn.Module:
        """Return a layer without groups, experts and dropout."""
        options = {**self.bare, "dropout": 0.0}
        return self.plain(in_dim, dim, side, stride, side // 2, **options)

    def three(self, in_dim: int, dim: int, stride: int = 1) -> nn.Module:
        """Return a layer with a 3x3 kernel."""
        return self.layer(in_dim, dim, 3, stride, 1, groups=self.groups, **self.options)

    def one(self, in_dim: int, dim: int, stride: int = 1) -> nn.Module:
        """Return a layer with a 1x1 kernel."""
        return self.plain(in_dim, dim, 1, stride, **self.bare)


class KANNet(StagedNet):
    """What the nets for classes share: timm's surface, and a linear classifier of the pooled features."""

    BEHIND: ClassVar[str] = r"^head\."

    stem: nn.Module

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into groups by depth."""
        blocks: list[Any] = [(r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        if not coarse and any(".downsample." in name for name, _ in self.named_parameters() if ".blocks." not in name):
            blocks += [(r"^stages\.(\d+)\.downsample", (0,))]
        return {"stem": self.BEFORE, "blocks": [*blocks, (r"^head\.", (99999,))] if self.num_classes else blocks}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map behind the last stage, (B, C, H, W)."""
        return self.stages(self.stem(x))

    def _finish(self, stages: list[nn.Module], dims: Sequence[int], strides: Sequence[int], drop_rate: float) -> None:
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{number}"}
            for number, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]


# ---- VGG -------------------------------------------------------------------------------------------------------------

VGG: dict[str, tuple[tuple[int, ...], ...]] = {
    "vgg11": ((1,), (2,), (4, 4), (8, 8), (8, 8)),
    "vgg13": ((1, 1), (2, 2), (4, 4), (8, 8), (8, 8)),
    "vgg16": ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)),
    "vgg19": ((1, 1), (2, 2), (4, 4, 4, 4), (8, 8, 8, 8), (8, 8, 8, 8)),
}
"""Widths of the layers between poolings, over the first's. The versions 2, 3 and 4 have two more layers behind a
further pooling, of 8 and 8, 8 and 16, or 16 and 16."""
TAILS = {1: (), 2: ((8, 8),), 3: ((8, 16),), 4: ((16, 16),)}


def vgg_widths(name: str, version: int = 1, base: int = 16) -> tuple[tuple[int, ...], ...]:
    """Return the widths of the published VGGs: a row of layers for each stage.

    Raises:
        InputError: no such net or version.
    """
    if name not in VGG or version not in TAILS:
        raise InputError(f"there is no {name} of version {version}: give one of {', '.join(VGG)} and 1, 2, 3 or 4")
    return tuple(tuple(base * width for width in stage) for stage in (*VGG[name], *TAILS[version]))


class KANVGG(KANNet):
    """A VGG of Kolmogorov-Arnold convolutions with timm's surface; features at strides 1, 2, 4, ...

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        widths: of the layers of each stage, as ``vgg_widths`` gives them; poolings are between stages.
        attention: stages that end with self-attention, counted from 0; published, before the last two poolings.
        inner: channels inside the attention; None: all.
        kind: of the layers, of ``vitrail.layers.kan_layers.KINDS``.
        groups: of the layers behind the first.
        basis, degree, norm, affine: of the layers, as of ``KANConv``.
        dropout: inside the layers behind the first, as of ``KANConv``.
        layer_options: more of them, such as ``grid_size`` or ``experts``.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).

    Raises:
        InputError: stages without a layer, or a value that the layers or the pooling do not allow.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: Sequence[Sequence[int]] = ((32,), (64,), (128, 128), (256, 256), (256, 256), (512, 512)),
        attention: Sequence[int] = (),
        inner: int | None = None,
        kind: str = "full",
        groups: int = 1,
        basis: str = "gram",
        degree: int = 5,
        norm: str = "instance",
        affine: bool = True,
        dropout: float = 0.0,
        layer_options: Mapping[str, Any] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not widths or not all(widths):
            raise InputError(f"widths = {tuple(widths)}: give one layer or more for each of one or more stages")
        options = {"basis": basis, "degree": degree, "norm": norm, "affine": affine, **(layer_options or {})}
        layers = Layers(kind, groups, NARROW, dropout=dropout, **options)
        self.num_classes = num_classes
        dim = widths[0][0]
        self.stem = layers.first(in_chans, dim, 3, 1)
        stages: list[nn.Module] = []
        for number, stage in enumerate(widths):
            blocks = []
            for width in stage[1:] if number == 0 else stage:
                blocks.append(layers.three(dim, width))
                dim = width
            if number in attention:
                own: dict[str, Any] = {"kind": "full", "groups": groups}
                if layers.plain is BottleneckKANConv:
                    own |= {"kind": "bottleneck", "reduction": NARROW}
                blocks.append(KANSelfAttention(dim, inner, dropout=dropout, **{**own, **_without_experts(options)}))
            # Odd sides are rounded up, as in timm's nets; published sizes have none.
            pool = nn.MaxPool2d(2, 2, ceil_mode=True) if number else nn.Identity()
            stages.append(KANStage(pool, blocks))
        self._finish(stages, [stage[-1] for stage in widths], [2**n for n in range(len(widths))], drop_rate)
        self.reset_classifier(num_classes, global_pool)


def _without_experts(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("experts", "top_k", "bottleneck")}


# ---- ResNet ----------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """A 3x3 and, as published, a 1x1 layer, beside a skip; nothing follows the sum."""

    expansion = 1

    def __init__(self, in_dim: int, dim: int, stride: int, layers: Layers) -> None:
        super().__init__()
        self.conv1 = layers.three(in_dim, dim, stride)
        self.conv2 = layers.one(dim, dim)
        self.downsample = layers.one(in_dim, dim, stride) if stride > 1 or in_dim != dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return self.conv2(self.conv1(x)) + self.downsample(x)


class BottleneckBlock(nn.Module):
    """A 1x1, a 3x3 and a 1x1 layer to four times the width, beside a skip."""

    expansion = 4

    def __init__(self, in_dim: int, dim: int, stride: int, layers: Layers) -> None:
        super().__init__()
        out = 4 * dim
        self.conv1 = layers.one(in_dim, dim)
        self.conv2 = layers.three(dim, dim, stride)
        self.conv3 = layers.one(dim, out)
        self.downsample = layers.one(in_dim, out, stride) if stride > 1 or in_dim != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return self.conv3(self.conv2(self.conv1(x))) + self.downsample(x)


BLOCKS: dict[str, Any] = {"basic": BasicBlock, "bottleneck": BottleneckBlock}


class KANResNet(KANNet):
    """A ResNet of Kolmogorov-Arnold convolutions with timm's surface; features at strides 4, 8, 16, 32.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        block: of ``BLOCKS``.
        depths: blocks of each stage.
        width: of the first stage; it doubles with each.
        small_stem: begin with a 3x3 layer of stride 1 and no pooling; features are then at strides 1, 2, 4, 8.
        kind, groups, basis, degree, norm, affine, dropout, layer_options, global_pool, drop_rate: as of ``KANVGG``.

    Raises:
        InputError: another block, or a value that the layers or the pooling do not allow.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        block: str = "basic",
        depths: Sequence[int] = (2, 2, 2, 2),
        width: int = 8,
        small_stem: bool = False,
        kind: str = "full",
        groups: int = 1,
        basis: str = "gram",
        degree: int = 3,
        norm: str = "instance",
        affine: bool = False,
        dropout: float = 0.0,
        layer_options: Mapping[str, Any] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise InputError(f"block = {block!r} is not allowed: give {' or '.join(BLOCKS)}")
        options = {"basis": basis, "degree": degree, "norm": norm, "affine": affine, **(layer_options or {})}
        layers, make = Layers(kind, groups, NARROW, dropout=dropout, **options), BLOCKS[block]
        self.num_classes = num_classes
        self.stem = nn.Sequential(layers.first(in_chans, width, 3 if small_stem else 7, 1 if small_stem else 2))
        if not small_stem:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        dim, stages, dims = width, [], []
        for number, depth in enumerate(depths):
            blocks = []
            for position in range(depth):
                inside = width * 2**number
                blocks.append(make(dim, inside, 2 if number and not position else 1, layers))
                dim = inside * make.expansion
            stages.append(KANStage(nn.Identity(), blocks))
            dims.append(dim)
        first = 1 if small_stem else 4
        self._finish(list(stages), dims, [first * 2**n for n in range(len(dims))], drop_rate)
        self.reset_classifier(num_classes, global_pool)


# ---- DenseNet --------------------------------------------------------------------------------------------------------


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 layer, whose channels are added to those that came in."""

    def __init__(self, in_dim: int, growth: int, wide: Layers, layers: Layers) -> None:
        super().__init__()
        self.conv1 = wide.one(in_dim, 4 * growth)
        self.conv2 = layers.three(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C + growth, H, W)."""
        return torch.cat((x, self.conv2(self.conv1(x))), 1)


class Transition(nn.Module):
    """A normalisation, SELU and a plain 1x1 convolution to half the channels, which average pooling follows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, dim // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C / 2, ceil(H / 2), ceil(W / 2))."""
        x = self.conv(F.selu(self.norm(x)))
        return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)


class KANDenseNet(KANNet):
    """A DenseNet of Kolmogorov-Arnold convolutions with timm's surface; features at strides 4, 8, 16, 32.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        depths: layers of each stage.
        growth: channels that a layer adds.
        width: channels before the first stage.
        small_stem: begin with a 3x3 layer of stride 1 and no pooling; features are then at strides 1, 2, 4, 8.
        kind, groups, basis, degree, norm, affine, layer_options, global_pool, drop_rate: as of ``KANVGG``.
        dropout: inside the 3x3 layers, as of ``KANConv``.

    Raises:
        InputError: a value that the layers or the pooling do not allow.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (6, 12, 24, 16),
        growth: int = 32,
        width: int = 64,
        small_stem: bool = False,
        kind: str = "full",
        groups: int = 1,
        basis: str = "gram",
        degree: int = 3,
        norm: str = "instance",
        affine: bool = True,
        dropout: float = 0.0,
        layer_options: Mapping[str, Any] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        options = {"basis": basis, "degree": degree, "norm": norm, "affine": affine, **(layer_options or {})}
        layers, wide = Layers(kind, groups, NARROW, dropout=dropout, **options), Layers(kind, groups, **options)
        self.num_classes = num_classes
        self.stem = nn.Sequential(layers.first(in_chans, width, 3 if small_stem else 7, 1 if small_stem else 2))
        if not small_stem:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        dim, stages, dims = width, [], []
        for number, depth in enumerate(depths):
            downsample: nn.Module = Transition(dim) if number else nn.Identity()
            dim = dim // 2 if number else dim
            blocks = [DenseLayer(dim + growth * position, growth, wide, layers) for position in range(depth)]
            dim += growth * depth
            stages.append(KANStage(downsample, blocks))
            dims.append(dim)
        first = 1 if small_stem else 4
        self._finish(list(stages), dims, [first * 2**n for n in range(len(dims))], drop_rate)
        self.reset_classifier(num_classes, global_pool)


# ---- U-Nets ----------------------------------------------------------------------------------------------------------

MIXERS = ("conv", "self-att", "focal")


def _up(x: Tensor, like: Tensor) -> Tensor:
    """Return x at the size of ``like``, with its corners where they were, beside it."""
    x = F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)
    return torch.cat((x, like), 1)


class KANUNet(nn.Module):
    """A U-Net of Kolmogorov-Arnold convolutions, for masks of images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs for each pixel, before a sigmoid or a softmax.
        depth: resolutions, 2 or more.
        layers: of each resolution, on either side.
        width: of the first; it doubles with each. 16, 32 and 64 are published.
        kind: of the layers, of ``vitrail.layers.kan_layers.KINDS``.
        mixer: what each step of the decoder begins with, of ``MIXERS``: nothing, self-attention or focal modulation.
        inner: channels inside the attention; None: all.
        groups, basis, degree, norm, affine, dropout, layer_options: as of ``KANVGG``.

    Raises:
        InputError: another mixer, or a value that is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        depth: int = 5,
        layers: int = 2,
        width: int = 16,
        kind: str = "bottleneck",
        mixer: str = "conv",
        inner: int | None = None,
        groups: int = 1,
        basis: str = "gram",
        degree: int = 3,
        norm: str = "batch",
        affine: bool = True,
        dropout: float = 0.0,
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise InputError(f"mixer = {mixer!r} is not allowed: give {', '.join(MIXERS)}")
        if depth < 2 or layers < 1:
            raise InputError(f"depth = {depth} with layers = {layers} makes no U-Net: give 2 or more, and 1 or more")
        options = {"basis": basis, "degree": degree, "norm": norm, "affine": affine, **(layer_options or {})}
        make = Layers(kind, groups, dropout=dropout, **options)
        first = Layers(kind, groups, **options)
        dims = [width * 2**number for number in range(depth)]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for number, dim in enumerate(dims):
            before = make.three(dims[number - 1], dim, 2) if number else first.three(in_chans, dim)
            self.encoder.append(nn.Sequential(before, *[make.three(dim, dim) for _ in range(layers - 1)]))
        inside: dict[str, Any] = {"kind": "bottleneck" if make.plain is BottleneckKANConv else "full"}
        for dim in reversed(dims[:-1]):
            steps: list[nn.Module] = []
            if mixer == "self-att":
                own = {**inside, **_without_experts(options)}
                steps = [KANSelfAttention(3 * dim, inner, groups=groups, dropout=dropout, **own)]
            elif mixer == "focal":
                steps = [KANFocalModulation(3 * dim, dropout=dropout, **inside, **_without_experts(options))]
            steps += [make.three(3 * dim, dim), *[make.three(dim, dim) for _ in range(layers - 1)]]
            self.decoder.append(nn.Sequential(*steps))
        self.head = nn.Conv2d(width, num_classes, 1)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes, H, W)."""
        skips = []
        for block in self.encoder:
            x = self._through(block, x)
            skips.append(x)
        for number, block in enumerate(self.decoder, 2):
            x = self._through(block, _up(x, skips[-number]))
        return self.head(x)

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x) if self.grad_checkpointing and self.training else block(x)


class KANResUNet(nn.Module):
    """A U-Net of the blocks of ``KANResNet``, for masks of images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs for each pixel.
        depths: blocks of each of four resolutions, on either side.
        width: of the first; it doubles with each.
        kind, groups, basis, degree, norm, affine, dropout, layer_options: as of ``KANVGG``.

    Raises:
        InputError: a value that the layers do not allow, or depths that are not four.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        depths: Sequence[int] = (2, 2, 2, 2),
        width: int = 8,
        kind: str = "full",
        groups: int = 1,
        basis: str = "gram",
        degree: int = 3,
        norm: str = "instance",
        affine: bool = True,
        dropout: float = 0.0,
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if len(depths) != 4:
            raise InputError(f"depths = {tuple(depths)} has {len(depths)} entries: give one for each of four stages")
        options = {"basis": basis, "degree": degree, "norm": norm, "affine": affine, **(layer_options or {})}
        make = Layers(kind, groups, dropout=dropout, **options)
        dims = [width * 2**number for number in range(4)]
        self.stem = Layers(kind, 1, **options).first(in_chans, width, 3, 1)
        self.encoder, self.decoder, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

        def blocks(in_dim: int, dim: int, depth: int, stride: int = 1) -> nn.Sequential:
            found = [BasicBlock(in_dim, dim, stride, make), *[BasicBlock(dim, dim, 1, make) for _ in range(depth - 1)]]
            return nn.Sequential(*found)

        for number, (dim, depth) in enumerate(zip(dims, depths)):
            self.encoder.append(blocks(dims[number - 1] if number else width, dim, depth, 2 if number else 1))
        self.middle = blocks(dims[-1], dims[-1], depths[-1])
        for dim, depth in zip(reversed(dims[:-1]), reversed(depths[:-1])):
            self.merge.append(make.three(3 * dim, dim))
            self.decoder.append(blocks(dim, dim, depth))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes, H, W)."""
        x, skips = self.stem(x), []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        x = self.middle(x)
        for number, (merge, stage) in enumerate(zip(self.merge, self.decoder), 2):
            x = stage(merge(_up(x, skips[-number])))
        return self.head(x)


def dice_bce_loss(logits: Tensor, masks: Tensor, *, bce_weight: float = 0.1, smooth: float = 1.0) -> Tensor:
    """Return the loss that the published U-Nets are trained with, for masks of one class or several that may overlap.

    1 less the Dice coefficient, the mean over images and classes, plus ``bce_weight`` times the binary cross-entropy.

    Args:
        logits: (B, classes, H, W).
        masks: the same shape, in [0, 1].
        bce_weight: 0 or more; published: 0.1.
        smooth: added above and below the fraction, above 0.
    """
    found = logits.sigmoid()
    overlap = (found * masks).sum((2, 3))
    dice = (2 * overlap + smooth) / (found.sum((2, 3)) + masks.sum((2, 3)) + smooth)
    return 1 - dice.mean() + bce_weight * F.binary_cross_entropy_with_logits(logits, masks)


# ---- the authors' weights --------------------------------------------------------------------------------------------

_OWN = re.compile(
    r"(?P<layer>.*?)(?:^|\.)(?P<part>base_conv|poly_weights|beta_weights|layer_norm|inner_proj|out_proj)(?:$|\.)"
)


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the authors' weights under our names, for nets with Gram polynomials.

    Their layers and ours stand in the same order; a layer's groups are of one tensor here.

    Args:
        state: of their checkpoint.
        model: the net of the same variant.

    Raises:
        InputError: the tensors are not those of the model.
    """
    own = model.state_dict()
    if state.keys() == own.keys():
        return dict(state)
    state = {key.replace(".module.", ".").removeprefix("module."): value for key, value in state.items()}
    layers: dict[str, dict[str, Tensor]] = {}
    rest: list[Tensor] = []
    for key, value in state.items():
        found = _OWN.match(key)
        if found:
            layers.setdefault(found["layer"], {})[key.removeprefix(f"{found['layer']}.")] = value
        else:
            rest.append(value)
    ours = {name: m for name, m in model.named_modules() if isinstance(m, (BottleneckKANConv, KANConv))}
    outer = {name: m for name, m in ours.items() if not name.endswith(".core")}
    renamed: dict[str, Tensor] = {}
    for (name, layer), parts in zip(outer.items(), layers.values()):
        core = "core." if isinstance(layer, BottleneckKANConv) else ""
        renamed |= {f"{name}.{key}": value for key, value in _layer(parts, core).items()}
    others = [key for key in own if not any(key.startswith(f"{name}.") for name in outer)]
    renamed |= dict(zip(others, rest))
    wrong = [key for key in own if key not in renamed or renamed[key].shape != own[key].shape]
    if wrong or len(layers) != len(outer) or len(rest) != len(others):
        raise InputError(
            f"the checkpoint has {len(layers)} KAN layers and {type(model).__name__} has {len(outer)}"
            + (f"; {wrong[0]} is missing or of another shape" if wrong else "")
            + ": create the variant of the checkpoint, with as many classes and the same degree and normalisation"
        )
    return renamed


def _layer(parts: Mapping[str, Tensor], core: str) -> dict[str, Tensor]:
    """Return the tensors of one published layer under our names; ``core`` stands before those of the basis."""
    found: dict[str, Tensor] = {}
    groups: dict[str, list[Tensor]] = {}
    for key, value in parts.items():
        if key == "poly_weights":
            found[f"{core}weight"] = value.flatten(0, 1)
        elif key == "beta_weights":
            found[f"{core}basis.beta"] = value
        else:
            part, _, name = key.split(".")  # such as base_conv.0.weight
            groups.setdefault(f"{ {'base_conv': 'base', 'layer_norm': 'norm'}.get(part, part) }.{name}", []).append(
                value
            )
    return found | {key: values[0] if values[0].ndim == 0 else torch.cat(values) for key, values in groups.items()}


# ---- variants --------------------------------------------------------------------------------------------------------


def _cfg(**own: Any) -> dict[str, Any]:
    return cfg(crop_pct=0.875, interpolation="bilinear", first_conv="stem.0.base", **own)


def _nano(**own: Any) -> dict[str, Any]:
    return nano_cfg(first_conv="stem.0.base", **own)


default_cfgs = generate_default_cfgs(
    {
        "vgg_kagn11_v2": _cfg(),
        "vgg_kagn11_v4": _cfg(),
        "vgg_kagn_bn11_v4": _cfg(),
        "reskagnet18": _cfg(),
        "reskagnet50": _cfg(),
        "reskagnet101": _cfg(),
        "reskagnet152": _cfg(),
        "densekagnet121": _cfg(),
        "densekagnet161": _cfg(),
        "densekagnet169": _cfg(),
        "densekagnet201": _cfg(),
        "densekagnet121bn": _cfg(),
        "densekagnet161bn": _cfg(),
        "densekagnet169bn": _cfg(),
        "densekagnet201bn": _cfg(),
        "kan_vgg_nano": _nano(pool_size=(8, 8)),
        "kan_resnet_nano": _nano(pool_size=(8, 8)),
        "kan_densenet_nano": _nano(pool_size=(8, 8)),
    }
)


def _create(net: type[KANNet], variant: str, pretrained: bool, stages: int, /, **options: Any) -> Any:
    return build_model_with_cfg(
        net,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(stages)), "flatten_sequential": True},
        **options,
    )


def _vgg(variant: str, pretrained: bool, widths: Sequence[Sequence[int]], /, **options: Any) -> KANVGG:
    return _create(KANVGG, variant, pretrained, len(widths), **{"widths": widths, **options})


@register_model
def vgg_kagn11_v2(pretrained: bool = False, **kwargs: Any) -> KANVGG:
    """VGG-11 with Gram polynomials of degree 5; 59.1 % on ImageNet."""
    return _vgg("vgg_kagn11_v2", pretrained, vgg_widths("vgg11", 2, 32), **kwargs)


@register_model
def vgg_kagn11_v4(pretrained: bool = False, **kwargs: Any) -> KANVGG:
    """VGG-11 with Gram polynomials of degree 5 and a wider end; 61.17 % on ImageNet."""
    return _vgg("vgg_kagn11_v4", pretrained, vgg_widths("vgg11", 4, 32), **kwargs)


_BN: dict[str, Any] = {"kind": "bottleneck", "norm": "batch"}


@register_model
def vgg_kagn_bn11_v4(pretrained: bool = False, **kwargs: Any) -> KANVGG:
    """VGG-11 with Gram polynomials of degree 5 in bottlenecks; 68.5 % on ImageNet."""
    return _vgg("vgg_kagn_bn11_v4", pretrained, vgg_widths("vgg11", 4, 32), **{**_BN, "dropout": 0.05, **kwargs})


@register_model
def kan_vgg_nano(pretrained: bool = False, **kwargs: Any) -> KANVGG:
    """A small VGG of ours, of degree 3 with batch normalisation."""
    own = {"degree": 3, "norm": "batch"}
    return _vgg("kan_vgg_nano", pretrained, ((8,), (16,), (32,)), **{**own, **kwargs})


def _resnet(variant: str, pretrained: bool, depths: Sequence[int], /, **options: Any) -> KANResNet:
    return _create(KANResNet, variant, pretrained, len(depths), **{"depths": depths, **options})


_DEEP: dict[str, Any] = {"block": "bottleneck", "affine": True, "dropout": 0.15, "drop_rate": 0.25}


@register_model
def reskagnet18(pretrained: bool = False, **kwargs: Any) -> KANResNet:
    """ResNet-18 with Gram polynomials of degree 3."""
    return _resnet("reskagnet18", pretrained, (2, 2, 2, 2), **{"drop_rate": 0.25, **kwargs})


@register_model
def reskagnet50(pretrained: bool = False, **kwargs: Any) -> KANResNet:
    """ResNet-50 with Gram polynomials of degree 3."""
    return _resnet("reskagnet50", pretrained, (3, 4, 6, 3), **{**_DEEP, **kwargs})


@register_model
def reskagnet101(pretrained: bool = False, **kwargs: Any) -> KANResNet:
    """ResNet-101 with Gram polynomials of degree 3."""
    return _resnet("reskagnet101", pretrained, (3, 4, 23, 3), **{**_DEEP, **kwargs})


@register_model
def reskagnet152(pretrained: bool = False, **kwargs: Any) -> KANResNet:
    """ResNet-152 with Gram polynomials of degree 3."""
    return _resnet("reskagnet152", pretrained, (3, 8, 36, 3), **{**_DEEP, **kwargs})


@register_model
def kan_resnet_nano(pretrained: bool = False, **kwargs: Any) -> KANResNet:
    """A small ResNet of ours with Gram polynomials and batch normalisation."""
    own = {"small_stem": True, "norm": "batch", "affine": True}
    return _resnet("kan_resnet_nano", pretrained, (1, 1, 1), **{**own, **kwargs})


def _dense(variant: str, pretrained: bool, depths: Sequence[int], /, **options: Any) -> KANDenseNet:
    return _create(KANDenseNet, variant, pretrained, len(depths), **{"depths": depths, **options})


_DENSE = {"121": (6, 12, 24, 16), "161": (6, 12, 36, 24), "169": (6, 12, 32, 32), "201": (6, 12, 48, 32)}


@register_model
def densekagnet121(pretrained: bool = False, **kwargs: Any) -> KANDenseNet:
    """DenseNet-121 with Gram polynomials of degree 3."""
    return _dense("densekagnet121", pretrained, _DENSE["121"], **kwargs)


@register_model
def densekagnet161(pretrained: bool = False, **kwargs: Any) -> KANDenseNet:
    """DenseNet-161 with Gram polynomials of degree 3."""
    return _dense("densekagnet161", pretrained, _DENSE["161"], **{"growth": 48, **kwargs})


@register_model
def densekagnet169(pretrained: bool = False, **kwargs: Any) -> KANDenseNet:
    """DenseNet-169 with Gram polynomials of degree 3."""
    return _dense("densekagnet169", pretrained, _DENSE["169"], **kwargs)


@register_model
def densekagnet201(pretrained: bool = False, **kwargs: Any) -> KANDenseNet:
    """DenseNet-201 with Gram polynomials of degree 3."""
    return _dense("densekagnet201", pretrained, _DENSE["201"], **kwargs)


@register_model
def densekagnet121bn(pretrained: bool = False, **kwargs: Any) -> KANDenseNet:
    """DenseNet-121 with Gram polynomials of degree 3 in bottlenecks."""
    return _dense("densekagnet121bn", pretrained, _DENSE["121"], **{**_BN, **kwargs})


@register_model
def densekagnet161bn(pretrained: bool = False, **kwargs: Any) -> KANDenseNet:
    """DenseNet-161 with Gram polynomials of degree 3 in bottlenecks."""
    return _dense("densekagnet161bn", pretrained, _DENSE["161"], **{**_BN, "growth": 48, **kwargs})


@register_model
def densekagnet169bn(pretrained: bool = False, **kwargs: Any) -> KANDenseNet:
    """DenseNet-169 with Gram polynomials of degree 3 in bottlenecks."""
    return _dense("densekagnet169bn", pretrained, _DENSE["169"], **{**_BN, **kwargs})


@register_model
def densekagnet201bn(pretrained: bool = False, **kwargs: Any) -> KANDenseNet:
    """DenseNet-201 with Gram polynomials of degree 3 in bottlenecks."""
    return _dense("densekagnet201bn", pretrained, _DENSE["201"], **{**_BN, **kwargs})


@register_model
def kan_densenet_nano(pretrained: bool = False, **kwargs: Any) -> KANDenseNet:
    """A small DenseNet of ours with Gram polynomials in bottlenecks."""
    own = {"growth": 16, "width": 32, "small_stem": True, "norm": "batch"}
    return _dense("kan_densenet_nano", pretrained, (1, 1), **{**own, **kwargs})
