"""ResNet-RS: residual networks with squeeze-and-excitation and ResNet-D's stem, and the two rules that scale them.

Bello, Fedus, Du, Cubuk, Srinivas, Lin, Shlens, Zoph, "Revisiting ResNets: Improved Training and Scaling Strategies"
(NeurIPS 2021), arXiv 2103.07579, and the authors' code (tensorflow/tpu, models/official/resnet). The published nets are
timm's ``resnetrs50`` to ``resnetrs420``; how they are trained is in the shipped recipe ``resnet_rs``. What is here
besides: a constructor of any depth and width, which begins as published, and ``scaled``, the rules as code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from timm.layers import DropPath, SqueezeExcite
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from vitrail.errors import InputError
from vitrail.layers.pooling import global_pooling
from vitrail.models.staged import cfg, nano_cfg

Regime = Literal["long", "short"]
CHANNELS = 64
"""Of the first stage, for a width of 1; each further stage has twice as many, and gives out four times that."""
SE_RATIO = 0.25
FAMILY: dict[int, tuple[int, ...]] = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    270: (4, 29, 53, 4),
    350: (4, 36, 72, 4),
    420: (4, 44, 87, 4),
}
"""Depth -> blocks per stage, as published."""
GROWTH = 0.2
"""Exponent of the resolution in the multiply-adds: 160 pixels at the least published net, 320 at the 28-fold cost."""
FIFTHS = (1, 10)
"""Least and greatest resolution in fifths of the one that is scaled: 160, 192, 224, 256 and 320 are 5 to 10 of them."""


class ResNetRS(ResNet):
    """timm's ResNet as ResNet-RS has it, of any depth and width.

    Args:
        layers: blocks in each of four stages.
        width: times the published channels, 64 in the first stage; rounded to multiples of 8.
        stem_stride: 4 is the published stem, of stride 2 twice; 2 and 1 are for small images.
        drop_path_rate: share of the images that skip a block of the last stage, in [0, 1); as published, four, three
            and two fifths of it in those before.
        in_chans: input channels.
        num_classes: 0 leaves the pooled features.
        global_pool: ``avg``, ``max``, ``avgmax``, or ``""`` with ``num_classes = 0``.
        **kwargs: as for ``timm.models.resnet.ResNet``.

    Raises:
        InputError: a value out of range.
    """

    def __init__(
        self,
        layers: Sequence[int] = FAMILY[50],
        width: float = 1.0,
        stem_stride: int = 4,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        **kwargs: Any,
    ) -> None:
        if len(layers) != 4 or min(layers) < 1:
            raise InputError(f"resnet_rs: layers = {layers!r} is not allowed: give a number of blocks for 4 stages")
        if not 0 < width < math.inf:
            raise InputError(f"resnet_rs: width = {width!r} is not allowed: give a number above 0")
        if stem_stride not in (1, 2, 4):
            raise InputError(f"resnet_rs: stem_stride = {stem_stride!r} is not allowed: give 1, 2 or 4")
        if not 0 <= drop_path_rate < 1:
            raise InputError(f"resnet_rs: drop_path_rate = {drop_path_rate!r} is not allowed: give a number in [0, 1)")
        global_pooling(global_pool, num_classes)  # refuses what does not go together
        first = channels_of(width)
        block: Any = Bottleneck  # timm annotates instances where it takes classes
        super().__init__(
            block,
            tuple(layers),
            num_classes,
            in_chans,
            channels=tuple(first * 2**stage for stage in range(4)),
            global_pool=global_pool,
            stem_type="deep",
            stem_width=first // 2,
            replace_stem_pool=True,
            avg_down=True,
            block_args={"attn_layer": partial(SqueezeExcite, rd_ratio=SE_RATIO)},
            **kwargs,
        )
        stem: Any = (self.conv1, self.maxpool)
        for convolutions, least in zip(stem, (2, 4)):
            if stem_stride < least:
                convolutions[0].stride = (1, 1)
        places: Any = self.feature_info
        for number, info in enumerate(places):
            info["reduction"] = info["reduction"] * stem_stride // 4 if number else min(2, stem_stride)
        # timm's own nets drop later blocks of a stage more often.
        stages: Any = (self.layer1, self.layer2, self.layer3, self.layer4)
        for stage, share in zip(stages, (2, 3, 4, 5)):
            for unit in stage if drop_path_rate else ():
                unit.drop_path = DropPath(drop_path_rate * share / 5)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
                # Cut off at two standard deviations, which takes 12 % of the deviation; the quotient puts it back.
                std = fan**-0.5 / 0.87962566
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._begin_classifier()

    def _begin_classifier(self) -> None:
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Set the number of classes and the pooling; ``""`` returns the features as they are.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        kind = self.global_pool.pool_type if global_pool is None else global_pool
        global_pooling(kind, num_classes)
        super().reset_classifier(num_classes, kind)
        self._begin_classifier()


def channels_of(width: float) -> int:
    """Return the channels of the first stage for a width, a multiple of 8."""
    return max(8, round(CHANNELS * width / 8) * 8)


# ---- the rules


def multiply_adds(
    layers: Sequence[int], width: float, resolution: int, *, stem_stride: int = 4, num_classes: int = 1000
) -> int:
    """Return the multiply-adds of a ``ResNetRS`` for one square image: of its convolutions and its classifier.

    Args:
        layers, width, stem_stride, num_classes: as of the net.
        resolution: side of the image in pixels.
    """
    first = channels_of(width)
    half = first // 2
    side = -(-resolution // (2 if stem_stride > 1 else 1))
    total = side**2 * 9 * (3 * half + half * half + half * first)
    side = -(-side // (2 if stem_stride > 2 else 1))
    total += side**2 * 9 * first**2
    inside = first
    for stage, blocks in enumerate(layers):
        narrow = first * 2**stage
        wide, reduced = 4 * narrow, round(4 * narrow * SE_RATIO)
        before, side = side, -(-side // (2 if stage else 1))
        for number in range(blocks):
            entry = inside if number == 0 else wide
            total += (before if number == 0 else side) ** 2 * entry * narrow
            total += side**2 * (9 * narrow**2 + narrow * wide) + 2 * wide * reduced
            total += side**2 * entry * wide if number == 0 else 0  # the shortcut's convolution
        inside = wide
    return total + inside * num_classes


@dataclass(frozen=True)
class Scaled:
    """A net that the rules chose.

    Attributes:
        layers: blocks per stage.
        width: times the published channels.
        resolution: side of the images in pixels.
        multiply_adds: of one image.
    """

    layers: tuple[int, ...]
    width: float
    resolution: int
    multiply_adds: int

    @property
    def depth(self) -> int:
        """Layers with weights, counted as in the names of ResNets: three a block, the stem and the classifier."""
        return 3 * sum(self.layers) + 2

    def settings(self) -> dict[str, Any]:
        """Return the entries of a recipe that build it, by dotted key."""
        options = {"layers": list(self.layers), "width": self.width}
        return {"model.name": "resnet_rs", "model.options": options, "model.img_size": self.resolution}


def stages_of(blocks: int) -> tuple[int, ...]:
    """Return how that many blocks spread over four stages: between, below and above the published nets, as they do."""
    nets = list(FAMILY.values())
    below = max((net for net in nets if sum(net) <= blocks), key=sum, default=nets[0])
    above = min((net for net in nets if sum(net) >= blocks), key=sum, default=nets[-1])
    if sum(below) < blocks < sum(above):
        part = (blocks - sum(below)) / (sum(above) - sum(below))
        shares = [low + part * (high - low) for low, high in zip(below, above)]
    else:
        net = below if sum(below) <= blocks else above
        shares = [count * blocks / sum(net) for count in net]
    found = [max(1, int(share)) for share in shares]
    while sum(found) < blocks:  # to the stage that lacks most
        stage = max(range(4), key=lambda number: shares[number] - found[number])
        found[stage] += 1
    return tuple(found)


def scaled(
    budget: float,
    regime: Regime,
    *,
    layers: Sequence[int] = FAMILY[50],
    width: float = 1.0,
    resolution: int = 160,
    stem_stride: int = 4,
    num_classes: int = 1000,
) -> Scaled:
    """Scale a net to a budget by the paper's two rules; by default, the smallest published one.

    Resolution grows slowly, with the fifth root of the cost and to twice its beginning at most. What is left of the
    budget goes into depth where training is long enough to overfit, and into width where it is short.

    Args:
        budget: multiply-adds that an image may take, in billions.
        regime: ``"long"``, many epochs of the images that there are (the paper: 350 of ImageNet), or ``"short"``, few
            (10), or so many images that nothing is learnt by heart.
        layers, width, resolution, stem_stride, num_classes: of the net that is scaled.

    Raises:
        InputError: another regime, or a budget that is no number or that the least net exceeds.

    Example:
        >>> scaled(9.1, "long").resolution
        224
    """
    if regime not in get_args(Regime):
        raise InputError(f"regime = {regime!r} is not allowed: give 'long' or 'short'")
    if not isinstance(budget, int | float) or not math.isfinite(budget):
        raise InputError(f"budget = {budget!r} is not allowed: give billions of multiply-adds, such as 4.1")
    cost = partial(multiply_adds, stem_stride=stem_stride, num_classes=num_classes)
    limit, own = budget * 1e9, cost(layers, width, resolution)
    fifths = round(5 * max(limit, 0.0) ** GROWTH / own**GROWTH)
    side = max(1, round(resolution * min(max(fifths, FIFTHS[0]), FIFTHS[1]) / 5))
    deep, wide = tuple(layers), channels_of(width) / CHANNELS
    if regime == "long":
        deep = deepest(limit, lambda counts: cost(counts, width, side))
    else:
        wide = widest(limit, lambda times: cost(layers, times, side))
    taken = cost(deep, wide, side)
    if taken > limit:
        raise InputError(
            f"a budget of {budget:g} G multiply-adds is below the {taken / 1e9:.3g} G of the least net of this kind at "
            f"{side} px: give more, or begin with a smaller net"
        )
    return Scaled(deep, wide, side, taken)


def deepest(limit: float, cost: Callable[[tuple[int, ...]], int]) -> tuple[int, ...]:
    """Return the blocks per stage of the deepest net whose ``cost`` is within the limit, or of the least net."""
    return stages_of(_largest(lambda blocks: cost(stages_of(blocks)), limit, 4))


def widest(limit: float, cost: Callable[[float], int]) -> float:
    """Return the greatest width whose ``cost`` is within the limit, or the least width."""
    return 8 * _largest(lambda count: cost(8 * count / CHANNELS), limit, 1) / CHANNELS


def _largest(cost: Callable[[int], int], limit: float, least: int) -> int:
    """Return the largest number from ``least`` on whose cost is within the limit; ``least`` if none is."""
    high = least
    while cost(2 * high) <= limit:
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


# ---- variants

_resnet: dict[str, Any] = {"first_conv": "conv1.0", "classifier": "fc", "license": "apache-2.0"}

default_cfgs = generate_default_cfgs(
    {"resnet_rs_nano": nano_cfg(**_resnet), "resnet_rs": cfg(160, **_resnet, pool_size=(5, 5))}
)


def _create(variant: str, pretrained: bool, **options: Any) -> ResNetRS:
    model: ResNetRS = build_model_with_cfg(ResNetRS, variant, pretrained, **options)
    return model


@register_model
def resnet_rs_nano(pretrained: bool = False, **kwargs: Any) -> ResNetRS:
    """0.7 M parameters, for images of 28 to 64 pixels; ours, not the paper's."""
    return _create("resnet_rs_nano", pretrained, **{"layers": (1, 1, 1, 1), "width": 0.25, "stem_stride": 2, **kwargs})


@register_model
def resnet_rs(pretrained: bool = False, **kwargs: Any) -> ResNetRS:
    """36 M parameters; any ``layers`` and ``width``, as ``scaled`` chooses them."""
    return _create("resnet_rs", pretrained, **kwargs)
