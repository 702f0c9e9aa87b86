"""Heads for dense tasks on any backbone that gives features: UPerNet for masks, torchvision's detectors for boxes.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (ECCV 2018), arXiv 1807.10221; Lin et al., "Feature
Pyramid Networks for Object Detection" (CVPR 2017), arXiv 1612.03144; Li et al., "Exploring Plain Vision Transformer
Backbones for Object Detection" (ECCV 2022), arXiv 2203.16527, for nets of one resolution.

    model = segmenter("swin_nano", num_classes=4)
    loss = segmentation_loss(model(images), masks)
    model = detector("swin_nano", num_classes=4)
    losses = model(images, targets)  # in training; model.eval()(images) gives boxes, labels and scores

Both take images of any size, normalised as the backbone has learned them, and classes with the background as number 0.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import Format, LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from vitrail.errors import InputError, VitrailError, unknown
from vitrail.evaluate.dense import IGNORED
from vitrail.models.factory import create_model
from vitrail.models.pretrained import load_pretrained

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

LEVELS = 4
"""Of a pyramid, as the heads' papers have them: those of the largest strides."""
BINS = (1, 2, 3, 6)
"""Sides of the grids that the pyramid pooling sees the last map in."""
AUXILIARY_WEIGHT = 0.4
"""Of the auxiliary head's loss."""
DETECTORS = ("retinanet", "faster_rcnn")
OCTAVES, RATIOS = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), (0.5, 1.0, 2.0)
"""Sides, over four strides, and heights over widths of the anchors at each place."""

# ---- features --------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Features of ascending strides, from any net that timm builds with ``features_only=True``.

    Of several maps of one stride the last counts, as in the paper of feature pyramids. A plain net, whose maps are all
    of one stride, gives its last one at four strides, from 4 on where it can: halved by pooling, doubled by transposed
    convolutions, as in ViTDet.

    Args:
        net: with ``feature_info``.
        levels: most maps to give, those of the largest strides.

    Attributes:
        channels, strides: of each map; the side of a map is that of the image over the stride, rounded up.

    Raises:
        InputError: a net that gives no maps, or no level.
    """

    def __init__(self, net: nn.Module, levels: int = LEVELS) -> None:
        super().__init__()
        info, form = getattr(net, "feature_info", None), Format(getattr(net, "output_fmt", Format.NCHW))
        if not isinstance(info, FeatureInfo) or form not in (Format.NCHW, Format.NHWC):
            raise InputError(
                f"a {type(net).__name__} gives no maps of features: give a name, or a net of create_model(..., "
                "features_only=True)"
            )
        if levels < 1:
            raise InputError(f"levels = {levels} is not allowed: give 1 or more")
        self.net = net
        self.channels_last = form == Format.NHWC
        strides, channels = info.reduction(), info.channels()
        self.taken = sorted({stride: place for place, stride in enumerate(strides)}.values())
        self.plain = _plain(channels[-1], strides[-1]) if len(strides) == 1 or len(self.taken) == 1 else None
        if self.plain is None:
            self.taken = self.taken[-levels:]
            self.strides = [strides[place] for place in self.taken]
            self.channels = [channels[place] for place in self.taken]
        else:
            del self.plain[:-levels]
            self.strides = [level.stride for level in self.plain]
            self.channels = [level.channels for level in self.plain]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps (B, C, H, W), the finest first."""
        maps = self.net(x)
        maps = [maps[place].permute(0, 3, 1, 2) if self.channels_last else maps[place] for place in self.taken]
        return maps if self.plain is None else [level(maps[-1]) for level in self.plain]


class _Scaled(nn.Module):
    """A plain net's map, ``doublings`` times twice as large, or as small where that is negative."""

    def __init__(self, channels: int, stride: int, doublings: int) -> None:
        super().__init__()
        self.halving = 2 ** max(-doublings, 0)
        self.stride = stride * self.halving // 2 ** max(doublings, 0)
        layers: list[nn.Module] = []
        for step in range(doublings):
            if step:
                layers += [LayerNorm2d(channels), nn.GELU()]
            layers.append(nn.ConvTranspose2d(channels, channels := max(channels // 2, 1), 2, 2))
        self.channels = channels
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return F.max_pool2d(x, self.halving, ceil_mode=True) if self.halving > 1 else x


def _plain(channels: int, stride: int) -> nn.ModuleList:
    most = 0
    while stride % 2 ** (most + 1) == 0 and stride // 2 ** (most + 1) >= 4:
        most += 1
    return nn.ModuleList(_Scaled(channels, stride, most - level) for level in range(LEVELS))


def pyramid(backbone: str | nn.Module, levels: int = LEVELS, pretrained: str = "none", **options: Any) -> Pyramid:
    """Return the features of a model.

    Args:
        backbone: a name of ``model_names()``, or a net that was created with ``features_only=True``.
        levels: as for ``Pyramid``.
        pretrained: weights for a model given by its name: ``"none"``, ``"auto"``, ``"package"``, ``"hub"`` or a path,
            as for ``load_pretrained``.
        **options: of a model given by its name, such as ``in_chans`` and ``drop_path_rate``.

    Raises:
        InputError: no such model, one that gives no maps, or weights that cannot be had.
    """
    if isinstance(backbone, nn.Module):
        if options or pretrained != "none":
            given = ", ".join([*options, *(["pretrained"] if pretrained != "none" else [])])
            raise InputError(f"{given} cannot be given to a net that is built: give its name in place of the net")
        return Pyramid(backbone, levels)
    try:
        net = create_model(backbone, num_classes=0, features_only=True, **options)
    except VitrailError:
        raise
    except (RuntimeError, AttributeError, TypeError, AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"the model {backbone} gives no maps of features ({type(error).__name__}: {error}): give one whose card "
            "has the trait 'dense', such as 'rmt_t'"
        ) from None
    if pretrained != "none":
        whole = create_model(backbone, num_classes=0, **options)
        load_pretrained(whole, backbone, pretrained)
        _copy(whole, net, backbone)
    return Pyramid(net, levels)


def _copy(whole: nn.Module, net: nn.Module, name: str) -> None:
    """Load the weights of a model into the net of its features, where timm puts "model." before, or "_" for "."."""
    known = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    own = {key: known.get(key.replace(".", "_").removeprefix("model_")) for key in net.state_dict()}
    missing = [key for key, value in own.items() if value is None]
    if missing:
        raise InputError(
            f"the weights of {name} do not name {missing[0]} of its features: give pretrained = 'none', or a net with "
            "weights in place of the name"
        )
    net.load_state_dict(own)


# ---- segmentation: UPerNet -------------------------------------------------------------------------------------------


def _conv(before: int, after: int, side: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def _classes(width: int, num_classes: int) -> nn.Sequential:
    conv = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(0.1), conv)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Pools the last map in grids, passes it down the pyramid, and fuses all levels at the finest one.

    Args:
        channels: of each map, the finest first.
        num_classes: K.
        width: of everything inside.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, width: int) -> None:
        super().__init__()
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), _conv(channels[-1], width, 1)) for side in BINS
        )
        self.bottleneck = _conv(channels[-1] + len(BINS) * width, width, 3)
        self.laterals = nn.ModuleList(_conv(before, width, 1) for before in channels[:-1])
        self.smooth = nn.ModuleList(_conv(width, width, 3) for _ in channels[:-1])
        self.fuse = _conv(len(channels) * width, width, 3)
        self.classifier = _classes(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K, H, W) of the finest map's size."""
        last = maps[-1]
        top = self.bottleneck(torch.cat([last, *(_resize(pool(last), last) for pool in self.pooled)], 1))
        levels = [top]
        for lateral, x in zip(reversed(self.laterals), reversed(maps[:-1])):
            side = lateral(x)
            levels.insert(0, side + _resize(levels[0], side))
        smooth = [*(conv(x) for conv, x in zip(self.smooth, levels)), top]
        return self.classifier(self.fuse(torch.cat([_resize(x, smooth[0]) for x in smooth], 1)))


class Segmenter(nn.Module):
    """A pyramid, UPerNet's head and, to learn with, a convolutional one on the map before the last.

    Args:
        backbone: the features.
        num_classes: K.
        width: of the heads.
        auxiliary: whether there is the second head.
    """

    def __init__(self, backbone: Pyramid, num_classes: int, width: int, *, auxiliary: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.head = UPerHead(backbone.channels, num_classes, width)
        self.auxiliary = None
        if auxiliary:
            before = backbone.channels[-2:][0]
            self.auxiliary = nn.Sequential(_conv(before, width, 3), *_classes(width, num_classes))

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, K, H, W) of the images' size; in training with an auxiliary head, a pair of them.

        Raises:
            InputError: one image alone in training, where its mean cannot be normalised.
        """
        if self.training and len(x) == 1:
            raise InputError(
                "one image alone cannot train UPerNet, which normalises the images' means over the batch: give two or "
                "more, or set model.eval()"
            )
        maps = self.backbone(x)
        logits = _resize(self.head(maps), x)
        if self.auxiliary is None or not self.training:
            return logits
        return logits, _resize(self.auxiliary(maps[-2:][0]), x)


def segmenter(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    width: int = 128,
    auxiliary: bool = False,
    levels: int = LEVELS,
    pretrained: str = "none",
    **options: Any,
) -> Segmenter:
    """Return a net that gives each pixel a class: UPerNet on any backbone.

    Args:
        backbone: a name of ``model_names()``, or a net that was created with ``features_only=True``.
        num_classes: K, with the background.
        width: of the head; 512 as published.
        auxiliary: whether a second head, of convolutions, joins in training.
        levels: most maps of features to use, those of the largest strides.
        pretrained: weights of the backbone, as for ``load_pretrained``.
        **options: of a backbone given by its name.

    Raises:
        InputError: no such model, one that gives no maps, weights that cannot be had, no width, or one class.
    """
    _check(num_classes, width)
    net = pyramid(backbone, levels, pretrained, **options)
    return Segmenter(net, num_classes, width, auxiliary=auxiliary)


def segmentation_loss(logits: Any, masks: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Return the cross entropy, a mean over the pixels that count; 0 where none does.

    Args:
        logits: (B, K, H, W), or a pair of them, of which the second is the auxiliary head's.
        masks: classes (B, H, W), int64.
        ignore_index: class of pixels that do not count.

    Raises:
        InputError: masks that do not fit the logits.
    """
    if isinstance(logits, tuple):
        main, auxiliary = (segmentation_loss(part, masks, ignore_index) for part in logits)
        return main + AUXILIARY_WEIGHT * auxiliary
    if masks.dtype != torch.int64 or masks.shape != (len(logits), *logits.shape[2:]):
        raise InputError(
            f"masks of shape {tuple(masks.shape)} and type {masks.dtype} do not fit logits of shape "
            f"{tuple(logits.shape)}: give int64 classes of shape {(len(logits), *logits.shape[2:])}"
        )
    total = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="sum")
    return total / (masks != ignore_index).sum().clamp(min=1)


# ---- detection: torchvision's ----------------------------------------------------------------------------------------


class _Maps(nn.Module):
    """What torchvision's detectors take for a backbone: named maps of one width, with one more by subsampling."""

    def __init__(self, body: Pyramid, width: int) -> None:
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.channels, width, extra_blocks=LastLevelMaxPool())
        self.out_channels = width

    def forward(self, x: Tensor) -> Any:
        return self.fpn(OrderedDict((str(place), one) for place, one in enumerate(self.body(x))))


class _AsTheyAre(nn.Module):
    """Puts images together, in place of torchvision's transform: of their own size and values, filled up with zeros."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, images: Sequence[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        from torchvision.models.detection.image_list import ImageList

        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (-(-max(sides) // self.divisor) * self.divisor for sides in zip(*sizes))
        batch = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
        return ImageList(torch.stack(batch), sizes), targets

    def postprocess(self, result: Any, *sizes: Any) -> Any:
        return result


class _LevelOf:
    """Where to look for a box: at the largest stride of which its side has fourteen (equation 1 of the FPN paper)."""

    def __init__(self, strides: Sequence[int]) -> None:
        self.strides = strides

    def __call__(self, boxes: list[Tensor]) -> Tensor:
        sides = torch.cat([(one[:, 2:] - one[:, :2]).prod(1).sqrt() for one in boxes])
        fits = sides[:, None] * (1 + 1e-6) >= 14 * torch.tensor(self.strides, device=sides.device)
        return (fits.sum(1) - 1).clamp(min=0)


def detector(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    kind: str = "retinanet",
    width: int = 128,
    levels: int = LEVELS,
    pretrained: str = "none",
    **options: Any,
) -> nn.Module:
    """Return a net that finds boxes: torchvision's RetinaNet or Faster R-CNN on any backbone.

    It takes images (B, C, H, W), or a list of (C, H, W) of several sizes; in training also a list of ``boxes`` (N, 4)
    and ``labels`` (N,), from 1, of each, and returns its losses by name. Else it returns ``boxes``, ``labels`` and
    ``scores`` of each image. Unlike torchvision's own nets it leaves the size and the values of images as they are.
    The sides of the anchors are 4 to 8 strides at every level, so that images may be small.

    Args:
        backbone: a name of ``model_names()``, or a net that was created with ``features_only=True``.
        num_classes: K, with the background.
        kind: one of ``DETECTORS``.
        width: of the feature pyramid and the head; 256 as published.
        levels: most maps of features to use, those of the largest strides; one more is subsampled from the last.
        pretrained: weights of the backbone, as for ``load_pretrained``.
        **options: of a backbone given by its name.

    Raises:
        InputError: no such model, one that gives no maps, weights that cannot be had, no width, one class, or another
            kind.
    """
    from torchvision.models.detection import FasterRCNN, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    _check(num_classes, width)
    if kind not in DETECTORS:
        raise unknown("kind of detector", kind, DETECTORS)
    body = pyramid(backbone, levels, pretrained, **options)
    strides = [*body.strides, 2 * body.strides[-1]]
    sizes = tuple(tuple(4 * stride * octave for octave in OCTAVES) for stride in strides)
    anchors = AnchorGenerator(sizes, (RATIOS,) * len(strides))
    maps = _Maps(body, width)
    net: nn.Module
    if kind == "faster_rcnn":
        pool = MultiScaleRoIAlign([str(place) for place in range(len(body.strides))], 7, 2)
        # torchvision would guess them from the first image, and wrongly from a small one that was filled up.
        pool.scales, pool.map_levels = [1 / stride for stride in body.strides], _LevelOf(body.strides)
        net = FasterRCNN(
            maps,
            rpn_anchor_generator=anchors,
            box_roi_pool=pool,
            box_head=TwoMLPHead(width * 7**2, 4 * width),
            box_predictor=FastRCNNPredictor(4 * width, num_classes),
            # A quarter of the FPN paper's: the pooling of boxes is most of the time.
            rpn_pre_nms_top_n_train=500,
            rpn_post_nms_top_n_train=500,
            box_batch_size_per_image=128,
        )
    else:
        net = RetinaNet(maps, num_classes, anchor_generator=anchors)
    net.transform = _AsTheyAre(math.lcm(*strides))
    return net


def _check(num_classes: int, width: int) -> None:
    if num_classes < 2 or width < 1:
        raise InputError(
            f"num_classes = {num_classes} and width = {width} are not allowed together: give two classes or more, the "
            "background among them, and a width of 1 or more"
        )
