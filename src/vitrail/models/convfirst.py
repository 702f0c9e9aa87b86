"""ConvFirst: a cheap grouped convolution, then a feed-forward layer, in a block that one kernel can compute at once.

Lavin, "On the Efficiency of Convolutional Neural Networks" (2024), arXiv 2404.03617. The blocks are those of its
figure 6; the author's later kernels (andravin/spio) have the first of them too, with SiLU in place of ReLU. No code or
weights of the net were published: what is ours in it is said at the line, and in the card.

Shapes: B images, H x W places, C channels in groups of 8, A C hidden channels. All maps are (B, C, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import BlurPool2d, DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vitrail.errors import InputError, unknown
from vitrail.layers.block_fusion import ACTIVATIONS, FORMS, fused_block
from vitrail.models.staged import StagedNet, cfg, check_stages, create, nano_cfg, through_blocks

GROUP_WIDTH = 8
"""Channels of a group: as many as a tensor core's product of 16-bit values once took at a time."""

# ---- the blocks ------------------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """A convolution and its batch norm."""

    def __init__(self, dim: int, out: int, kernel_size: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.norm: Any = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', H', W')."""
        return self.norm(self.conv(x))

    def reparameterize(self) -> None:
        """Fold the norm's running statistics into the convolution; then it can only predict."""
        if isinstance(self.norm, nn.Identity):
            return
        self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
        self.norm = nn.Identity()


class ConvFirst(nn.Module):
    """A grouped convolution, with no activation behind it, and a feed-forward layer, added to what came in.

    Args:
        dim: C, a multiple of ``group_width``.
        expansion: A: hidden channels over C.
        group_width: channels of a group of the convolution.
        act: ``"relu"`` as published, or ``"silu"``.
        drop_path: stochastic depth, in [0, 1).
    """

    def __init__(
        self, dim: int, expansion: float, *, group_width: int = GROUP_WIDTH, act: str = "relu", drop_path: float = 0.0
    ) -> None:
        super().__init__()
        hidden = int(expansion * dim)
        self.conv = ConvNorm(dim, dim, 3, groups=dim // group_width)
        self.exp = ConvNorm(dim, hidden)
        self.act = act
        self.prj = ConvNorm(hidden, dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return x + self.drop_path(self.prj(ACTIVATIONS[self.act](self.exp(self.conv(x)))))


class Downsample(nn.Module):
    """ConvFirst of stride 2: what came in goes on beside its convolution, and both are blurred before every second
    place is taken.

    Args:
        dim: C of what comes in, a multiple of ``group_width``.
        out: C of what goes out.
        expansion: hidden channels over those that come in.
        group_width, act: as for ``ConvFirst``.
    """

    def __init__(
        self, dim: int, out: int, expansion: float, *, group_width: int = GROUP_WIDTH, act: str = "relu"
    ) -> None:
        super().__init__()
        hidden = int(expansion * dim)
        self.conv = ConvNorm(dim, dim, 3, groups=dim // group_width)
        # Reflection, the usual border, needs two places.
        self.pool = BlurPool2d(2 * dim, pad_mode="replicate")
        self.exp = ConvNorm(2 * dim, hidden)
        self.act = act
        self.prj = ConvNorm(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out, H/2, W/2), sizes rounded up."""
        both = self.pool(torch.cat((self.conv(x), x), 1))
        return self.prj(ACTIVATIONS[self.act](self.exp(both)))


class FusedConvFirst(nn.Module):
    """A ``ConvFirst`` block, its norms folded, that never writes its hidden values to memory; it only predicts.

    Args:
        block: whose values it takes.
        form: of ``vitrail.layers.block_fusion``; None for the one that suits the device.
    """

    def __init__(self, block: ConvFirst, form: str | None = None) -> None:
        super().__init__()
        for part in (block.conv, block.exp, block.prj):
            part.reparameterize()
        self.conv: Any = block.conv.conv
        self.exp: Any = block.exp.conv
        self.prj: Any = block.prj.conv
        self.act, self.form = block.act, form

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        exp, prj = (layer.weight.flatten(1) for layer in (self.exp, self.prj))
        weights = (self.conv.weight, self.conv.bias, exp, self.exp.bias, prj, self.prj.bias)
        return fused_block(x, *(value.detach() for value in weights), act=self.act, form=self.form)


def fuse_blocks(model: nn.Module, form: str | None = None) -> nn.Module:
    """Replace every ``ConvFirst`` block by its fused form, for inference, and return the same model.

    Args:
        model: which has such blocks; it is put into evaluation mode.
        form: one of ``layers.block_fusion.FORMS``; None for the one that suits the device.

    Raises:
        InputError: an unknown form, or the model has no such block.
    """
    if form is not None and form not in FORMS:
        raise unknown("form of the fused block", form, FORMS)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ConvFirst)
    ]
    if not found:
        raise InputError(f"{type(model).__name__} has no ConvFirst block to fuse: give one of convfirst_*, unfused")
    for parent, name, child in found:
        setattr(parent, name, FusedConvFirst(child, form))
    return model.eval()


class Stage(nn.Module):
    """A block of stride 2, then blocks that keep the size."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H/2, W/2)."""
        return through_blocks(self, x)


# ---- the net ---------------------------------------------------------------------------------------------------------


class ConvFirstNet(StagedNet):
    """ConvFirst with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Stem, head and initialisation, which the figure does not show, are ours: those of an EfficientNet without its last
    convolution.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dims: width C of the four stages, multiples of ``group_width``; the stem has that of the first.
        depths: blocks of the four stages, 1 or more, that of stride 2 among them.
        expansion: A: hidden channels of a block over those that come in.
        group_width: channels of a group of the convolutions; 8 as published, 1 for depthwise ones.
        act: ``"relu"`` as published, or ``"silu"`` as in the author's later code.
        stem_stride: 1 or 2 pixels per place before the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, a width or a depth that is not allowed, an activation that there is not, a
            stride or a pooling that is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (40, 80, 160, 320),
        depths: Sequence[int] = (2, 6, 8, 6),
        expansion: float = 6.0,
        group_width: int = GROUP_WIDTH,
        act: str = "relu",
        stem_stride: int = 2,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages(stem_stride, (1, 2), dims=dims, depths=depths)
        for dim in dims:
            if group_width < 1 or dim < 1 or dim % group_width:
                raise InputError(f"dims = {dim} is not allowed: give multiples of the group width, {group_width}")
        if min(depths) < 1:
            raise InputError(f"depths = {tuple(depths)} is not allowed: give 1 or more for each stage")
        if int(expansion * min(dims)) < 1:
            raise InputError(f"expansion = {expansion} leaves no hidden channels for dims = {tuple(dims)}: give more")
        if act not in ACTIVATIONS:
            raise unknown("activation", act, ACTIVATIONS)
        options: dict[str, Any] = {"group_width": group_width, "act": act}
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths) - 4, device="cpu").tolist())
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = nn.Sequential(ConvNorm(in_chans, dims[0], 3, stem_stride), nn.ReLU(inplace=True))
        stages: list[Stage] = []
        self.feature_info = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks: list[nn.Module] = [Downsample(dims[max(i - 1, 0)], dim, expansion, **options)]
            blocks += [ConvFirst(dim, expansion, drop_path=next(rates), **options) for _ in range(depth - 1)]
            stages.append(Stage(blocks))
            reduction = stem_stride * 2 ** (i + 1)
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.drop = nn.Dropout(drop_rate)
        self.apply(_init_weights)
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        return self.stages(self.stem(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the weights as they are: the author published none."""
    return state_dict


# ---- the variants ----------------------------------------------------------------------------------------------------

_OWN: dict[str, Any] = {"first_conv": "stem.0.conv"}
default_cfgs = generate_default_cfgs(
    {
        "convfirst_nano": nano_cfg(**_OWN),
        "convfirst_p": cfg(256, **_OWN),
        "convfirst_n": cfg(256, **_OWN),
        "convfirst_t": cfg(256, **_OWN),
        "convfirst_s": cfg(256, **_OWN),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ConvFirstNet:
    net: ConvFirstNet = create(ConvFirstNet, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def convfirst_nano(pretrained: bool = False, **kwargs: Any) -> ConvFirstNet:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's ConvFirst Nano."""
    own = {"dims": (16, 32, 64, 128), "depths": (2, 2, 3, 2), "expansion": 4.0, "stem_stride": 1}
    return _create("convfirst_nano", pretrained, **{**own, **kwargs})


@register_model
def convfirst_p(pretrained: bool = False, **kwargs: Any) -> ConvFirstNet:
    """Size of the paper's ConvFirst Pico, 5.9 M parameters; widths and depths are ours."""
    own = {"dims": (24, 48, 96, 192), "depths": (2, 2, 15, 9)}
    return _create("convfirst_p", pretrained, **{**own, **kwargs})


@register_model
def convfirst_n(pretrained: bool = False, **kwargs: Any) -> ConvFirstNet:
    """Size of the paper's ConvFirst Nano, 10.2 M parameters; widths and depths are ours."""
    return _create("convfirst_n", pretrained, **kwargs)


@register_model
def convfirst_t(pretrained: bool = False, **kwargs: Any) -> ConvFirstNet:
    """Size of the paper's ConvFirst Tiny, 17.2 M parameters; widths and depths are ours."""
    own = {"depths": (3, 6, 22, 8)}
    return _create("convfirst_t", pretrained, **{**own, **kwargs})


@register_model
def convfirst_s(pretrained: bool = False, **kwargs: Any) -> ConvFirstNet:
    """Size of the paper's ConvFirst Small, 28.6 M parameters; widths and depths are ours."""
    own = {"dims": (64, 128, 256, 512), "depths": (3, 6, 12, 6)}
    return _create("convfirst_s", pretrained, **{**own, **kwargs})
