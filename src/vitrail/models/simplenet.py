"""SimpleNet: thirteen convolutions in a row, a few poolings with dropout behind them, and nothing else.

Hasanpour, Rouhani, Fayyaz, Sabokrou, "Lets keep it simple, Using simple architectures to outperform deeper and more
complex architectures" (2016), arXiv 1608.06037, and the authors' code: Coderx7/SimpleNet (Caffe: the nets for CIFAR and
MNIST) and Coderx7/SimpleNet_Pytorch (these, and the ImageNet family, with which the published weights were trained).
The name SAF pooling is of the authors' next paper (arXiv 1802.06205); the layer is in this one already.

Shapes: B images, C channels, H x W places. A stage is what lies between two changes of H and W.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks


class SAFPool(nn.Module):
    """Simple adaptive feature composition: the strongest features of 2 x 2 places, of which training drops some.

    What later layers compose has to come from those that are left: it adapts, and does not lean on single features.

    Args:
        rate: share of the channels that is dropped in training, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)  # as Caffe does: an odd last row is seen too
        self.drop = nn.Dropout2d(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(H/2), ceil(W/2))."""
        return self.drop(self.pool(x))


class Layer(nn.Module):
    """A convolution, a norm and a rectifier; then, in training, some channels are dropped."""

    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int, rate: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2)
        self.norm = nn.BatchNorm2d(dim, momentum=0.05)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout2d(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H/s, W/s)."""
        return self.drop(self.act(self.norm(self.conv(x))))


class Stage(nn.Module):
    """Layers at one resolution; they begin with a pooling, a convolution of stride 2, or, in the first, the image."""

    def __init__(self, pool: nn.Module, blocks: Sequence[Layer]) -> None:
        super().__init__()
        self.pool = pool
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return through_blocks(self, self.pool(x))


class SimpleNet(StagedNet):
    """SimpleNet with timm's surface; features after each stage, for images of any size.

    Convolutions are numbered from 0. The published nets for ImageNet pool twice and convolve with stride 2 three times;
    those for images of 32 pixels pool four times.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        widths: channels of each convolution.
        scale: factor of all widths, above 0.
        strides: 1 or 2 for each of the first convolutions; the others have 1.
        pools: numbers of the convolutions that a pooling precedes.
        pointwise: numbers of the convolutions of one place; the others see 3 x 3.
        layer_drop_rate: share of the channels dropped behind each layer, or behind the pooling that follows it, in
            [0, 1); published 0.2 in the nets for small images.
        global_pool: one of ``layers.pooling.POOLS``, published ``"max"``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).

    Raises:
        InputError: a width, a stride, a number of a layer or a pooling that is not allowed.
    """

    BEFORE = r"^stages\.0\.blocks\.0\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (64, 128, 128, 128, 128, 128, 256, 256, 256, 512, 2048, 256, 256),
        scale: float = 1.0,
        strides: Sequence[int] = (2, 2, 2),
        pools: Sequence[int] = (6, 10),
        pointwise: Sequence[int] = (10, 11),
        layer_drop_rate: float = 0.0,
        global_pool: str = "max",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        depth = len(widths)
        dims = [round(width * scale) for width in widths]
        if not dims or min(dims) < 1:
            raise InputError(f"widths = {tuple(widths)} times scale = {scale} is not allowed: give 1 channel or more")
        if len(strides) > depth or not {1, 2}.issuperset(strides):
            raise InputError(f"strides = {tuple(strides)} is not allowed: give 1 or 2 for up to {depth} layers")
        for name, numbers, first in (("pools", pools, 1), ("pointwise", pointwise, 0)):
            if not set(range(first, depth)).issuperset(numbers):
                raise InputError(f"{name} = {tuple(numbers)} is not allowed: give numbers from {first} to {depth - 1}")
        if not 0 <= layer_drop_rate < 1:
            raise InputError(f"layer_drop_rate = {layer_drop_rate} is not allowed: give 0 or more, less than 1")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        starts = _starts(strides, pools)
        stages: list[Stage] = []
        self.feature_info = []
        reduction = 1
        for first, end in zip(starts, [*starts[1:], depth], strict=True):
            pooled, stride = first in pools, strides[first] if first < len(strides) else 1
            reduction *= stride * (2 if pooled else 1)
            blocks = [
                Layer(
                    dims[i - 1] if i else in_chans,
                    dims[i],
                    1 if i in pointwise else 3,
                    stride if i == first else 1,
                    # What a pooling follows is dropped behind it: by SAF pooling, or before the classifier.
                    0.0 if i + 1 in (*pools, depth) else layer_drop_rate,
                )
                for i in range(first, end)
            ]
            stages.append(Stage(SAFPool(layer_drop_rate) if pooled else nn.Identity(), blocks))
            info = {"num_chs": dims[end - 1], "reduction": reduction, "module": f"stages.{len(self.feature_info)}"}
            self.feature_info.append(info)
        self.stages = nn.Sequential(*stages)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("relu"))

    def put_head(self) -> None:
        """Set ``head`` for ``num_classes``; the authors leave it as torch makes it."""
        super().put_head()
        if isinstance(self.head, nn.Linear):
            self.head.reset_parameters()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map behind the last layer, (B, C, H, W)."""
        features: Tensor = self.stages(x)
        return features


def _starts(strides: Sequence[int], pools: Sequence[int]) -> list[int]:
    """Return the numbers of the layers with which stages begin."""
    return sorted({0, *pools, *(i for i, stride in enumerate(strides) if stride > 1)})


# ---- the authors' weights --------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights (of PyTorch) under our names."""
    state = state_dict.get("state_dict", state_dict)
    if "stages.0.blocks.0.conv.weight" in state:
        return state
    state = {key.removeprefix("module."): value for key, value in state.items()}
    # Theirs is one list, in which activations and dropout have numbers too: convolutions and norms come in turn.
    numbers = sorted({int(found[1]) for key in state if (found := re.match(r"features\.(\d+)\.", key))})
    layers = [name for name, module in model.named_modules() if isinstance(module, Layer)]
    places = [f"{layer}.{part}" for layer in layers for part in ("conv", "norm")]
    names = {f"features.{number}": place for number, place in zip(numbers, places)}
    ours = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        ours[f"{'head' if module == 'classifier' else names.get(module, module)}.{kind}"] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


_IMAGENET: dict[str, Any] = cfg(crop_pct=0.875, first_conv="stages.0.blocks.0.conv")
_CIFAR: dict[str, Any] = nano_cfg(first_conv="stages.0.blocks.0.conv")
default_cfgs = generate_default_cfgs(
    {
        "simplenet_nano": _CIFAR,
        "simplenet_cifar_310k": _CIFAR,
        "simplenet_cifar_460k": _CIFAR,
        "simplenet_cifar_5m": _CIFAR,
        "simplenet_cifar_5m_extra_pool": _CIFAR,
        "simplenetv1_small_m1_05": _IMAGENET,
        "simplenetv1_small_m2_05": _IMAGENET,
        "simplenetv1_small_m1_075": _IMAGENET,
        "simplenetv1_small_m2_075": _IMAGENET,
        "simplenetv1_5m_m1": _IMAGENET,
        "simplenetv1_5m_m2": _IMAGENET,
        "simplenetv1_9m_m1": _IMAGENET,
        "simplenetv1_9m_m2": _IMAGENET,
    }
)
_M1: dict[str, Any] = {"strides": (2, 2, 2), "pools": (6, 10)}
_M2: dict[str, Any] = {**_M1, "strides": (2, 2, 1, 2)}
_9M: dict[str, Any] = {"widths": (128, 192, 192, 192, 192, 192, 320, 320, 320, 640, 2560, 320, 320)}
_SMALL: dict[str, Any] = {"strides": (), "pools": (4, 7, 9, 12)}
_310K: dict[str, Any] = {**_SMALL, "widths": (64, 32, 32, 32, 32, 32, 64, 64, 64, 128, 256, 64, 64)}
_460K: dict[str, Any] = {**_SMALL, "widths": (32, 32, 32, 64, 64, 64, 64, 64, 64, 96, 96, 96, 100)}
_5M: dict[str, Any] = {**_SMALL, "widths": (64, 128, 128, 128, 128, 128, 256, 256, 256, 512, 2048, 256, 256)}


def _create(variant: str, pretrained: bool, **options: Any) -> SimpleNet:
    stages = len(_starts(options["strides"], options["pools"]))
    net: SimpleNet = create(SimpleNet, variant, pretrained, checkpoint_filter_fn, stages=stages, **options)
    return net


@register_model
def simplenet_nano(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """0.3 M parameters, for images of 16 to 64 pixels: the slim net for CIFAR at half its resolution; ours."""
    return _create("simplenet_nano", pretrained, **{**_310K, "strides": (2,), "pools": (4, 7, 9), **kwargs})


@register_model
def simplenet_cifar_310k(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """0.3 M parameters, for images of 32 pixels."""
    return _create("simplenet_cifar_310k", pretrained, **{**_310K, **kwargs})


@register_model
def simplenet_cifar_460k(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """0.4 M parameters, for images of 32 pixels."""
    return _create("simplenet_cifar_460k", pretrained, **{**_460K, **kwargs})


@register_model
def simplenet_cifar_5m(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """5.5 M parameters, for images of 32 pixels: the net of the paper."""
    return _create("simplenet_cifar_5m", pretrained, **{**_5M, **kwargs})


@register_model
def simplenet_cifar_5m_extra_pool(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """5.5 M parameters: the same with one pooling more, as the authors' weights of 2018 were trained by mistake."""
    return _create("simplenet_cifar_5m_extra_pool", pretrained, **{**_5M, "pools": (4, 7, 9, 10, 12), **kwargs})


@register_model
def simplenetv1_small_m1_05(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """1.5 M parameters."""
    return _create("simplenetv1_small_m1_05", pretrained, **{**_M1, "scale": 0.5, **kwargs})


@register_model
def simplenetv1_small_m2_05(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """1.5 M parameters; the resolution falls a layer later."""
    return _create("simplenetv1_small_m2_05", pretrained, **{**_M2, "scale": 0.5, **kwargs})


@register_model
def simplenetv1_small_m1_075(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """3.3 M parameters."""
    return _create("simplenetv1_small_m1_075", pretrained, **{**_M1, "scale": 0.75, **kwargs})


@register_model
def simplenetv1_small_m2_075(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """3.3 M parameters; the resolution falls a layer later."""
    return _create("simplenetv1_small_m2_075", pretrained, **{**_M2, "scale": 0.75, **kwargs})


@register_model
def simplenetv1_5m_m1(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """5.8 M parameters."""
    return _create("simplenetv1_5m_m1", pretrained, **{**_M1, **kwargs})


@register_model
def simplenetv1_5m_m2(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """5.8 M parameters; the resolution falls a layer later."""
    return _create("simplenetv1_5m_m2", pretrained, **{**_M2, **kwargs})


@register_model
def simplenetv1_9m_m1(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """9.5 M parameters."""
    return _create("simplenetv1_9m_m1", pretrained, **{**_M1, **_9M, **kwargs})


@register_model
def simplenetv1_9m_m2(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """9.5 M parameters; the resolution falls a layer later."""
    return _create("simplenetv1_9m_m2", pretrained, **{**_M2, **_9M, **kwargs})
