"""ResNeXt: residual blocks that sum many narrow paths of one shape.

Xie, Girshick, Dollár, Tu, He, "Aggregated Residual Transformations for Deep Neural Networks" (CVPR 2017). A block adds
to its input the sum of C paths, each of 1x1, 3x3 and 1x1 convolutions through d channels. Their first layers together
are one wide layer, their second layers one convolution in C groups, their last layers and the sum one wide layer: this
is timm's Bottleneck, whose nets these are. What is here besides: a constructor with any number of paths, the rule that
picks their width, and the nets for small images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.pooling import global_pooling
from vitrail.models.staged import cfg, nano_cfg

TEMPLATE = 64
"""Channels of a ResNet's bottleneck in its first stage: widths of paths are said for this one, and grow with it."""
EXPANSION = 4
"""Channels of a block's input and output for each channel of ``TEMPLATE``."""


def block_cost(cardinality: int, width: float) -> float:
    """Return the weights of a block of the first stage: C (256 d + 9 d d + 256 d), section 3.3 of the paper.

    Its multiply-adds are this times the places of the map.

    Args:
        cardinality: paths of the block, C.
        width: channels of each path, d.
    """
    return cardinality * (2 * EXPANSION * TEMPLATE * width + 9 * width**2)


def preserved_width(cardinality: int, complexity: float = 1.0) -> int:
    """Return the width of each path at which a block costs what ResNet's bottleneck does (table 2 of the paper).

    Args:
        cardinality: paths of a block, 1 to 200 or so.
        complexity: times the cost of ResNet's bottleneck, one path of 64 channels.

    Raises:
        InputError: a value out of range, or so many paths that one channel each costs half as much again.
    """
    if cardinality < 1 or complexity <= 0:
        raise InputError(
            f"cardinality = {cardinality!r} with complexity = {complexity!r} is not allowed: "
            "give at least one path and a complexity above 0"
        )
    target = complexity * block_cost(1, TEMPLATE)
    # The positive root of 9 C d^2 + 512 C d = target, and the integers beside it.
    half = EXPANSION * TEMPLATE / 9
    below = int((half**2 + target / (9 * cardinality)) ** 0.5 - half)
    width = min((max(below, 1), below + 1), key=lambda d: abs(block_cost(cardinality, d) - target))
    if block_cost(cardinality, width) > 1.5 * target:
        most = int(1.5 * target / block_cost(1, 1))
        raise InputError(f"cardinality = {cardinality} is too many paths for that complexity: give at most {most}")
    return width


class ResNeXt(ResNet):
    """timm's ResNet of bottlenecks with any number of paths; features after the stem and after each stage.

    Args:
        layers: blocks per stage, for 1 to 4 stages.
        cardinality: paths of a block, C.
        base_width: channels of a path in a stage of 64 channels, d; None takes ``preserved_width(cardinality)``. In
            a stage of n channels it is n d / 64, rounded down; the published nets begin with 64 and double.
        channels: of each stage; a stage gives four times as many.
        stem_stride: 4 is the stem for ImageNet, 7x7 with stride 2 and pooling; 1 and 2 are 3x3 convolutions without
            pooling. The published nets for small images have 1.
        in_chans: input channels.
        num_classes: 0 leaves the pooled features.
        global_pool: ``avg``, ``max``, ``avgmax``, or ``""`` with ``num_classes = 0``.
        **kwargs: as for ``timm.models.resnet.ResNet``.

    Raises:
        InputError: a value out of range, or a path without channels.
    """

    def __init__(
        self,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        cardinality: int = 32,
        base_width: float | None = None,
        channels: tuple[int, ...] = (64, 128, 256, 512),
        stem_stride: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        **kwargs: Any,
    ) -> None:
        if len(layers) != len(channels) or not 1 <= len(layers) <= 4 or min(layers) < 1:
            raise InputError(
                f"resnext: layers = {layers!r} with channels = {channels!r} is not allowed: give a number of blocks "
                "and of channels for each of 1 to 4 stages"
            )
        if stem_stride not in (1, 2, 4):
            raise InputError(f"resnext: stem_stride = {stem_stride!r} is not allowed: give 1, 2 or 4")
        if not isinstance(cardinality, int):
            raise InputError(f"resnext: cardinality = {cardinality!r} is not allowed: give a whole number of paths")
        width = preserved_width(cardinality) if base_width is None else base_width
        if cardinality < 1 or min(channels) * width < TEMPLATE:
            raise InputError(
                f"resnext: {cardinality} paths of base_width = {width} leave a stage of {min(channels)} channels "
                f"without a channel for each path: give at least one path and base_width = {TEMPLATE / min(channels)}"
            )
        global_pooling(global_pool, num_classes)  # refuses what does not go together
        small = stem_stride < 4
        # timm ties the width after the stem to 64 unless the stem is "deep"; the deep stem itself is replaced below.
        stem: dict[str, Any] = {"stem_type": "deep", "stem_width": channels[0] // 2} if small else {}
        block: Any = Bottleneck  # timm annotates instances where it takes classes
        super().__init__(
            block,
            layers,
            num_classes,
            in_chans,
            channels=channels,
            cardinality=cardinality,
            base_width=cast(int, width),
            global_pool=global_pool,
            **{"zero_init_last": False, **stem, **kwargs},
        )
        if small:
            place = next(self.parameters())
            wide = 2 * (channels[0] // 2)
            conv = nn.Conv2d(in_chans, wide, 3, stem_stride, 1, bias=False, device=place.device, dtype=place.dtype)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.conv1, self.maxpool = cast(Any, conv), cast(Any, nn.Identity())
            self.feature_info[0]["reduction"] = stem_stride
            for info in cast(list[dict[str, Any]], self.feature_info[1:]):
                info["reduction"] = info["reduction"] * stem_stride // 4
        for number in range(len(layers), 4):  # timm's forward goes through four
            self.add_module(f"layer{number + 1}", nn.Sequential())
        self._begin_classifier()

    def _begin_classifier(self) -> None:
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Set the number of classes and the pooling; ``""`` returns the features as they are."""
        kind = self.global_pool.pool_type if global_pool is None else global_pool
        global_pooling(kind, num_classes)
        super().reset_classifier(num_classes, kind)
        self._begin_classifier()

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return features of the stem and of the stages that there are, as timm's."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, taken, *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of these features, as timm's; return their numbers."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        if last < len(self.feature_info) - 1:
            return super().prune_intermediate_layers(taken, prune_norm, prune_head)
        if prune_head:
            self.reset_classifier(0, "")
        return taken


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return weights under timm's names.

    The authors' files are of Torch 7, which has no names: what converts them numbers modules by their places, as in
    ``4.0.0.0.1.running_mean``. They come in the order of timm's. Later files of theirs have timm's names already.

    Args:
        state: a checkpoint, with or without ``state_dict`` around it and ``module.`` before its names.
        model: the model that they are for.

    Raises:
        InputError: numbered modules that are not as many as the model's.
    """
    inner = state.get("state_dict", state)
    state = {key.removeprefix("module.").removeprefix("features."): value for key, value in inner.items()}
    numbered: dict[tuple[int, ...], list[str]] = {}
    for key in state:
        parts = key.split(".")[:-1]
        if all(part.isdigit() for part in parts):
            numbered.setdefault(tuple(map(int, parts)), []).append(key)
    if not numbered:
        return state
    # Some that convert them give the classifier a name.
    named = {key: key.replace("last_linear.", "fc.") for key in state if key.startswith("last_linear.")}
    owners = dict.fromkeys(key.rpartition(".")[0] for key in model.state_dict())
    names = [owner for owner in owners if not (named and owner == "fc")]
    if len(names) != len(numbered):
        raise InputError(
            f"the checkpoint has {len(numbered)} numbered modules with weights and the model has {len(names)}: "
            "build the model with the depth of the checkpoint"
        )
    for name, place in zip(names, sorted(numbered), strict=True):
        named.update({key: f"{name}.{key.rpartition('.')[2]}" for key in numbered[place]})
    return {named.get(key, key): value for key, value in state.items()}


_resnet: dict[str, Any] = {"first_conv": "conv1", "classifier": "fc", "license": "bsd-3-clause"}

default_cfgs = generate_default_cfgs(
    {
        "resnext_nano": nano_cfg(**_resnet, pool_size=(4, 4)),
        "resnext29_8x64d": cfg(32, **_resnet, num_classes=10, pool_size=(8, 8)),
        "resnext29_16x64d": cfg(32, **_resnet, num_classes=10, pool_size=(8, 8)),
        "resnext50": cfg(**_resnet),
        "resnext101": cfg(**_resnet),
        "resnext152": cfg(**_resnet),
    }
)


def _create(variant: str, pretrained: bool, layers: tuple[int, ...] = (3, 4, 6, 3), **options: Any) -> ResNeXt:
    model: ResNeXt = build_model_with_cfg(
        ResNeXt,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(layers) + 1))},
        layers=layers,
        **options,
    )
    return model


@register_model
def resnext_nano(pretrained: bool = False, **kwargs: Any) -> ResNeXt:
    """0.2 M parameters, for images of 28 to 64 pixels: eight paths in three stages."""
    own = {"layers": (1, 1, 1), "channels": (16, 32, 64), "cardinality": 8, "stem_stride": 2}
    return _create("resnext_nano", pretrained, **{**own, **kwargs})


_SMALL_IMAGES = {"layers": (3, 3, 3), "channels": (64, 128, 256), "base_width": 64, "stem_stride": 1}


@register_model
def resnext29_8x64d(pretrained: bool = False, **kwargs: Any) -> ResNeXt:
    """34 M parameters, for images of 32 pixels: 29 layers, eight paths of 64 channels."""
    return _create("resnext29_8x64d", pretrained, **{**_SMALL_IMAGES, "cardinality": 8, **kwargs})


@register_model
def resnext29_16x64d(pretrained: bool = False, **kwargs: Any) -> ResNeXt:
    """68 M parameters, for images of 32 pixels: 29 layers, 16 paths of 64 channels."""
    return _create("resnext29_16x64d", pretrained, **{**_SMALL_IMAGES, "cardinality": 16, **kwargs})


@register_model
def resnext50(pretrained: bool = False, **kwargs: Any) -> ResNeXt:
    """25 M parameters; any ``cardinality``, and ``base_width`` so that parameters stay, unless it is given too."""
    return _create("resnext50", pretrained, **kwargs)


@register_model
def resnext101(pretrained: bool = False, **kwargs: Any) -> ResNeXt:
    """44 M parameters; any ``cardinality``, and ``base_width`` so that parameters stay, unless it is given too."""
    return _create("resnext101", pretrained, **{"layers": (3, 4, 23, 3), **kwargs})


@register_model
def resnext152(pretrained: bool = False, **kwargs: Any) -> ResNeXt:
    """60 M parameters; any ``cardinality``, and ``base_width`` so that parameters stay, unless it is given too."""
    return _create("resnext152", pretrained, **{"layers": (3, 8, 36, 3), **kwargs})
