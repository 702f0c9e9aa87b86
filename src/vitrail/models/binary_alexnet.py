"""AlexNet as XNOR-Net has it: a Binary-Weight-Network and an XNOR-Network.

Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks"
(ECCV 2016), and the authors' code for Torch 7 (allenai/XNOR-Net), whose nets these are: AlexNet without response
normalisation, its linear layers convolutions. The first and the last layer are not binary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.binary import BinaryConv2d
from vitrail.layers.pooling import global_pooling
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks


class Pool(nn.Module):
    """The maximum of 3 x 3 places, two apart; of what there is, where a map is smaller."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H', W')."""
        return F.max_pool2d(x, (min(3, x.shape[2]), min(3, x.shape[3])), 2)


class Stage(nn.Module):
    """A pooling, but for the first stage, and layers at one resolution."""

    def __init__(self, pool: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pool = pool
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return through_blocks(self, self.pool(x))


class BinaryAlexNet(StagedNet):
    """AlexNet with binary convolutions and timm's surface, for images of any size.

    The published convolutions have biases, which the normalisation that follows each takes away again; ours have none.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        widths: channels of the five convolutions.
        hidden: channels of the two layers that were linear.
        grid: side of the map that the first of these sees whole; a map of another side is averaged to it.
        stem: side, stride and padding of the first convolution.
        inputs: an XNOR-Network; else a Binary-Weight-Network.
        scaled: scale outputs by the magnitudes of inputs (K), as the paper does and the published code does not.
        global_pool: ``avg``; ``""``, only without classifier, leaves out what follows the last map.
        drop_rate: share of the channels dropped before each of the two layers that were linear, in [0, 1); published
            0.1 for the Binary-Weight-Network, none for the other.

    Raises:
        InputError: a number of widths that is not five, or a pooling that is not allowed.
    """

    BEFORE = r"^stages\.0\.blocks\.0\."
    BEHIND = r"^neck\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (96, 256, 384, 384, 256),
        hidden: int = 4096,
        grid: int = 6,
        stem: Sequence[int] = (11, 4, 2),
        inputs: bool = True,
        scaled: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(widths) != 5 or min(widths) < 1 or len(stem) != 3:
            raise InputError(
                f"widths = {tuple(widths)} with stem = {tuple(stem)} is not allowed: give channels of five "
                "convolutions, and side, stride and padding of the first"
            )
        self.num_classes = num_classes
        self.num_features, self.head_hidden_size, self.grid = widths[-1], hidden, grid
        self.feature_info = [
            {"num_chs": widths[layer], "reduction": stem[1] * 2**number, "module": f"stages.{number}"}
            for number, layer in enumerate((0, 1, 4))
        ]

        def binary(dim_in: int, dim: int, kernel: int, padding: int) -> nn.Sequential:
            conv = BinaryConv2d(dim_in, dim, kernel, padding=padding, bias=False, inputs=inputs, scaled=scaled)
            # An XNOR-Network normalises before each layer, the other behind it.
            return nn.Sequential(conv) if inputs else nn.Sequential(conv, nn.BatchNorm2d(dim, eps=1e-3), nn.ReLU())

        first = nn.Sequential(
            nn.Conv2d(in_chans, widths[0], stem[0], stem[1], stem[2], bias=False),
            nn.BatchNorm2d(widths[0], eps=1e-5 if inputs else 1e-3),
            nn.ReLU(),
        )
        kernels = (5, 3, 3, 3)
        layers = [binary(dim_in, dim, side, side // 2) for dim_in, dim, side in zip(widths, widths[1:], kernels)]
        self.stages = nn.Sequential(Stage(nn.Identity(), [first]), Stage(Pool(), layers[:1]), Stage(Pool(), layers[1:]))
        end = nn.Sequential(nn.BatchNorm2d(hidden, eps=1e-3), nn.ReLU()) if inputs else nn.Identity()
        self.pool = Pool()
        self.neck = nn.Sequential(
            nn.Dropout2d(drop_rate),
            binary(widths[-1], hidden, grid, 0),
            nn.Dropout2d(drop_rate),
            binary(hidden, hidden, 1, 0),
            end,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; ``global_pool`` is ``"avg"`` or, without classifier, ``""``."""
        if global_pool not in (None, "avg", ""):
            raise InputError(f"global_pool = {global_pool!r} is not allowed: give 'avg', or '' with num_classes = 0")
        if global_pool is not None:
            self.global_pool = global_pooling(global_pool, num_classes)
        super().reset_classifier(num_classes)

    def linear_head(self, width: int, std: float = 0.02) -> nn.Linear:
        """Return a new classifier, as the published code draws all layers."""
        return super().linear_head(width, math.sqrt(2 / width))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map behind the last pooling, (B, C, H, W)."""
        features: Tensor = self.pool(self.stages(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or with ``pre_logits`` what the classifier sees (B, ``hidden``)."""
        if not self.global_pool.pool_type:
            return x
        if x.shape[2:] != (self.grid, self.grid):
            x = F.adaptive_avg_pool2d(x, self.grid)
        hidden = self.global_pool(self.neck(x))
        return hidden if pre_logits else self.head(hidden)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return weights under our names.

    The authors' files are of Torch 7, which has no names: what converts them numbers modules by their places, as in
    ``features.4.2.weight``. They come in the order of the forward pass. Biases of convolutions are taken off the means
    of the normalisation that follows.

    Args:
        state: a checkpoint, with or without ``state_dict`` around it.
        model: the variant that it is for.

    Raises:
        InputError: numbered modules that are not as many as the model's.
    """
    state = dict(state.get("state_dict", state))
    if "stages.0.blocks.0.0.weight" in state:
        return state
    order: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, BinaryConv2d):
            order += [f"{name}.norm", name] if module.norm is not None else [name]
        elif isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear) and name not in order:
            order.append(name)
    places = {tuple(int(part) for part in key.split(".")[:-1] if part.isdigit()) for key in state}
    if len(places) != len(order):
        raise InputError(
            f"the checkpoint has {len(places)} numbered modules with weights and the model has {len(order)}: "
            "build the variant of the checkpoint, alexnet_bwn or alexnet_xnor"
        )
    named = {}
    for key, value in state.items():
        *owner, kind = key.split(".")
        number = sorted(places).index(tuple(int(part) for part in owner if part.isdigit()))
        named[number, kind] = value
    ours = {}
    for (number, kind), value in named.items():
        name = order[number]
        if kind == "bias" and _is_convolution(model, name):
            continue
        if kind == "running_mean" and _is_convolution(model, order[number - 1]):
            value = value - named.get((number - 1, "bias"), 0)
        ours[f"{name}.{kind}"] = value.flatten(1) if name == "head" and kind == "weight" else value
    return ours


def _is_convolution(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Conv2d)


_ALEXNET: dict[str, Any] = cfg(first_conv="stages.0.blocks.0.0", pool_size=(6, 6), crop_pct=0.875)
default_cfgs = generate_default_cfgs(
    {
        "alexnet_bwn": _ALEXNET,
        "alexnet_xnor": _ALEXNET,
        "alexnet_xnor_nano": nano_cfg(first_conv="stages.0.blocks.0.0"),
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> BinaryAlexNet:
    net: BinaryAlexNet = create(BinaryAlexNet, variant, pretrained, checkpoint_filter_fn, stages=3, **options)
    return net


@register_model
def alexnet_bwn(pretrained: bool = False, **kwargs: Any) -> BinaryAlexNet:
    """62 M parameters, 58 M of them signs of weights."""
    return _create("alexnet_bwn", pretrained, **{"inputs": False, "drop_rate": 0.1, **kwargs})


@register_model
def alexnet_xnor(pretrained: bool = False, **kwargs: Any) -> BinaryAlexNet:
    """62 M parameters, 58 M of them signs of weights, which meet signs of inputs."""
    return _create("alexnet_xnor", pretrained, **kwargs)


@register_model
def alexnet_xnor_nano(pretrained: bool = False, **kwargs: Any) -> BinaryAlexNet:
    """0.4 M parameters, for images of 28 to 64 pixels; ``inputs = False`` makes it a Binary-Weight-Network."""
    own = {"widths": (32, 64, 96, 96, 64), "hidden": 256, "grid": 2, "stem": (5, 1, 2)}
    return _create("alexnet_xnor_nano", pretrained, **{**own, **kwargs})
