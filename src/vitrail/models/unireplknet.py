"""UniRepLKNet: a convolutional net that sees wide by large kernels rather than by depth.

Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and
Image Recognition" (CVPR 2024), arXiv 2311.15599; Zhang et al., "Scaling Up Your Kernels: Large Kernel Design in
ConvNets towards Universal Representations" (TPAMI 2025), arXiv 2410.08049; and the authors' code
(AILab-CVC/UniRepLKNet). The four guidelines of the design are where they act: (1) what is no large kernel goes into
efficient blocks that add depth, ``SqueezeExcite`` and ``FeedForward``; (2) a large kernel is trained beside dilated
small ones, ``DilatedReparamBlock``; (3) kernels are large in the middle and late stages, and (4) a deeper net gets
more 3 x 3 blocks, not more large kernels, ``kernel_plan``.

Shapes: B images, C channels, H x W places; stages and blocks take and return (B, C, H, W).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale2d, SqueezeExcite, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.large_kernel import LargeKernelConv2d
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks

BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Large kernel -> (size k, dilation r) of the small ones beside it; none reaches further: r (k - 1) + 1 <= K."""
SMALL = (3, 5)
"""Kernels of blocks that have no branches."""
MOST_LARGE = 9
"""Blocks of the third stage that have large kernels, at most."""


def kernel_plan(depths: Sequence[int], large: int = 13) -> tuple[tuple[int, ...], ...]:
    """Return the side of every block's kernel, as the guidelines place them and as every published net has them.

    The first stage has 3 x 3 kernels, the second and the fourth large ones. The third has large ones in at most nine
    blocks, at equal distances; the blocks between them are 3 x 3.

    Args:
        depths: blocks of the four stages.
        large: the side of a large kernel.
    """
    every = -(-depths[2] // MOST_LARGE)
    third = tuple(3 if block % every else large for block in range(depths[2]))
    return (3,) * depths[0], (large,) * depths[1], third, (large,) * depths[3]


# ---- re-parameterisation ---------------------------------------------------------------------------------------------


def folded(weight: Tensor, norm: Any, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return weight and bias, in double precision, of a convolution or a linear layer with its batch norm folded in."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.running_mean.double() - (0 if bias is None else bias.double())
    return weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)), norm.bias.double() - shift * scale


def spread(kernel: Tensor, dilation: int, side: int) -> Tensor:
    """Return a dilated kernel (C, 1, k, k) as one without dilation in the middle of a window (C, 1, side, side)."""
    edge = side // 2 - dilation * (kernel.shape[-1] // 2)
    window = kernel.new_zeros(*kernel.shape[:2], side, side)
    window[..., edge : side - edge : dilation, edge : side - edge : dilation] = kernel
    return window


def _filled(layer: Any, weight: Tensor, bias: Tensor, like: Tensor) -> Any:
    """Return the layer with these values, on the device and in the type of ``like``."""
    layer.to(like)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer.requires_grad_(like.requires_grad)


# ---- the parts -------------------------------------------------------------------------------------------------------


class DilatedReparamBlock(nn.Module):
    """A depthwise convolution by a large kernel and, beside it, by dilated small ones, each normalised; their sum.

    Args:
        dim: C.
        kernel_size: side K of the large kernel, one of ``BRANCHES``.

    Raises:
        InputError: another kernel.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise InputError(f"kernel_size = {kernel_size} has no dilated branches: give one of {[*BRANCHES]}")
        self.large: Any = nn.Sequential(LargeKernelConv2d(dim, kernel_size), nn.BatchNorm2d(dim))
        self.dilated = nn.ModuleDict(
            {
                f"k{k}_{r}": nn.Sequential(LargeKernelConv2d(dim, k, r), nn.BatchNorm2d(dim))
                for k, r in BRANCHES[kernel_size]
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = x.contiguous()  # large windows are faster on planes, on CPUs; once for all branches
        out = self.large(x)
        for branch in self.dilated.values():
            out = out + branch(x)
        return out

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return kernel (C, 1, K, K) and bias (C,) of the one convolution that all branches are, in float64."""
        if isinstance(self.large, LargeKernelConv2d):
            bias: Any = self.large.bias
            return self.large.weight.double(), bias.double()
        kernel, bias = folded(self.large[0].weight, self.large[1])
        branch: Any
        for branch in self.dilated.values():
            conv, norm = branch
            small, more = folded(conv.weight, norm)
            kernel, bias = kernel + spread(small, conv.dilation[0], kernel.shape[-1]), bias + more
        return kernel, bias

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Become one convolution that gives the same in evaluation; nothing if it is one already."""
        if not isinstance(self.large, LargeKernelConv2d):
            kernel, bias = self.merged()
            like = self.large[0].weight
            self.large = _filled(LargeKernelConv2d(len(bias), kernel.shape[-1], bias=True), kernel, bias, like)
            self.dilated = nn.ModuleDict()


class GlobalResponseNorm(nn.Module):
    """Scale each channel by its norm over the image, relative to the mean of all channels' (Woo et al., 2023).

    ``x (1 + gamma n / (mean n + 1e-6)) + beta`` of x (B, H, W, C), n the L2 norms over H and W. Both begin at zero.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        # Twice as fast as torch's norm on CPUs; the bound keeps the gradient of a silent channel at zero.
        response = x.square().sum((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        scale = 1 + self.gamma * response / (response.mean(-1, keepdim=True) + 1e-6)
        return x * scale if self.beta is None else torch.addcmul(self.beta, x, scale)


class FeedForward(nn.Module):
    """Two linear layers on every place, with GELU and global response normalisation between and a batch norm behind."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GlobalResponseNorm(4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        inside = self.grn(self.act(self.fc1(x.permute(0, 2, 3, 1))))  # (B, H, W, 4 C)
        return self.norm(self.fc2(inside).permute(0, 3, 1, 2))

    def fold(self, scale: Tensor) -> None:
        """Let the second layer take in beta of the response norm, the batch norm, and a factor (C,) behind them."""
        weight = self.fc2.weight.double()
        beta = self.grn.beta
        kernel, bias = folded(weight, self.norm, None if beta is None else weight @ beta.double().flatten())
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.fc2 = _filled(linear, kernel * scale[:, None], bias * scale, self.fc2.weight)
        self.grn.beta, self.norm = None, nn.Identity()


class Block(nn.Module):
    """A depthwise convolution, squeeze and excitation, a feed-forward layer; scaled and added to what came in.

    Args:
        dim: C, at least 4.
        kernel_size: of the convolution; one of ``SMALL``, or one of ``BRANCHES`` of 7 or more.
        drop_path: rate of stochastic depth.
        layer_scale: initial factor of the branch; 0 is none.
    """

    def __init__(self, dim: int, kernel_size: int, *, drop_path: float = 0.0, layer_scale: float = 1e-6) -> None:
        super().__init__()
        if kernel_size in SMALL:
            self.dwconv: Any = LargeKernelConv2d(dim, kernel_size)
        else:
            self.dwconv = DilatedReparamBlock(dim, kernel_size)
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, rd_channels=dim // 4)
        self.ffn = FeedForward(dim)
        self.ls: Any = LayerScale2d(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return x + self.drop_path(self.ls(self.ffn(self.se(self.norm(self.dwconv(x))))))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Become, for evaluation, one convolution, excitation and two linear layers; nothing if it is that already."""
        if isinstance(self.norm, nn.Identity):
            return
        branched = isinstance(self.dwconv, DilatedReparamBlock)
        kernel, bias = self.dwconv.merged() if branched else (self.dwconv.weight, None)
        kernel, bias = folded(kernel, self.norm, bias)
        like = next(self.dwconv.parameters())
        self.dwconv = _filled(LargeKernelConv2d(len(bias), kernel.shape[-1], bias=True), kernel, bias, like)
        one = torch.ones_like(bias)
        self.ffn.fold(one if isinstance(self.ls, nn.Identity) else self.ls.gamma.double())
        self.norm = self.ls = nn.Identity()


class Stage(nn.Module):
    """A downsampling (none in the first stage), then blocks."""

    def __init__(self, dim_in: int | None, dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if dim_in is None else nn.Sequential(*_halve(dim_in, dim))
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return through_blocks(self, self.downsample(x))


def _halve(before: int, after: int, stride: int = 2) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, 1), LayerNorm2d(after, eps=1e-6)]


# ---- the net ---------------------------------------------------------------------------------------------------------


class UniRepLKNet(StagedNet):
    """UniRepLKNet with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dim: width C of the first stage, a multiple of 4; it doubles with each.
        depths: blocks of the four stages.
        large_kernel: side of the large kernels, one of ``BRANCHES`` of 7 or more, or of ``SMALL``.
        kernel_sizes: side of every block's kernel, a tuple per stage; None is ``kernel_plan``.
        layer_scale: initial factor of each block's branch; 0 is none.
        stem_stride: 1, 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        img_size: unused: images of any size fit.

    Raises:
        InputError: options that do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dim: int = 96,
        depths: Sequence[int] = (3, 3, 27, 3),
        large_kernel: int = 13,
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        layer_scale: float = 1e-6,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise InputError(f"dim = {dim} is not allowed: give a multiple of 4")
        if len(depths) != 4 or min(depths) < 1:
            raise InputError(f"depths = {tuple(depths)} is not allowed: give one block or more for each of 4 stages")
        plan = kernel_plan(depths, large_kernel) if kernel_sizes is None else kernel_sizes
        sides = [tuple(stage) for stage in plan]
        if [len(stage) for stage in sides] != [*depths]:
            raise InputError(f"kernel_sizes = {sides} do not fit depths = {tuple(depths)}: give one side per block")
        allowed = {*SMALL, *BRANCHES}
        if wrong := {side for stage in sides for side in stage} - allowed:
            raise InputError(f"a kernel of {min(wrong)} is not allowed: give sides of {sorted(allowed)}")
        if stem_stride not in (1, 2, 4):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 1, 2 or 4")
        self.num_features = self.head_hidden_size = 8 * dim
        halves = (1 + (stem_stride > 1), 1 + (stem_stride > 2))
        self.stem = nn.Sequential(*_halve(in_chans, dim // 2, halves[0]), nn.GELU(), *_halve(dim // 2, dim, halves[1]))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, stage in enumerate(sides):
            width = dim * 2**i
            blocks = [Block(width, side, drop_path=next(rates), layer_scale=layer_scale) for side in stage]
            stages.append(Stage(width // 2 if i else None, width, blocks))
            self.feature_info.append({"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, 8 C, H/32, W/32)."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or with ``pre_logits`` the pooled and normalised features (B, 8 C)."""
        pooled = self.global_pool(x)
        pooled = self.norm(pooled) if pooled.ndim == 2 else pooled
        return pooled if pre_logits else self.head(self.drop(pooled))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_AUTHORS = (
    (r"^(?:module|model|backbone)\.", ""),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.origin_bn\.", ".dwconv.large.1."),
    (r"\.dwconv\.dil_conv_(k\d+_\d+)\.", r".dwconv.dilated.\1.0."),
    (r"\.dwconv\.dil_bn_(k\d+_\d+)\.", r".dwconv.dilated.\1.1."),
    (r"\.se\.down\.", ".se.fc1."),
    (r"\.se\.up\.", ".se.fc2."),
    (r"\.pwconv1\.1\.", ".ffn.fc1."),
    (r"\.act\.1\.", ".ffn.grn."),
    (r"\.pwconv2\.0\.", ".ffn.fc2."),
    (r"\.pwconv2\.2\.", ".ffn.norm."),
    (r"(\.blocks\.\d+)\.gamma$", r"\1.ls.gamma"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights under our names.

    Weights of a net that they re-parameterised fit a model of ours that timm's ``reparameterize_model`` returned. The
    norms of their detectors' and segmenters' backbones, one behind each stage, have no place here.
    """
    if "stem.0.weight" in state_dict:
        return state_dict
    theirs = state_dict.get("model", state_dict.get("state_dict", state_dict))
    merged = not any(".origin_bn." in key for key in theirs)
    large = ".dwconv." if merged else ".dwconv.large.0."
    ours = {}
    for key, value in theirs.items():
        for pattern, name in (*_AUTHORS, (r"\.dwconv\.lk_origin\.", large)):
            key = re.sub(pattern, name, key)
        if not re.match(r"norm\d\.|(?:decode|auxiliary)_head\.|neck\.|rpn_head\.|roi_head\.", key):
            ours[key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {
        "unireplknet_nano": nano_cfg(),
        "unireplknet_a": cfg(crop_pct=0.875),
        "unireplknet_f": cfg(crop_pct=0.875),
        "unireplknet_p": cfg(crop_pct=0.875),
        "unireplknet_n": cfg(crop_pct=0.875),
        "unireplknet_t": cfg(crop_pct=0.875),
        "unireplknet_s": cfg(crop_pct=0.875),
        "unireplknet_b": cfg(384, crop_mode="squash"),
        "unireplknet_l": cfg(384, crop_mode="squash"),
        "unireplknet_xl": cfg(384, crop_mode="squash"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> UniRepLKNet:
    net: UniRepLKNet = create(UniRepLKNet, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def unireplknet_nano(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """0.4 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"dim": 16, "depths": (1, 1, 2, 1), "large_kernel": 7, "layer_scale": 0.0, "stem_stride": 2}
    return _create("unireplknet_nano", pretrained, **{**own, **kwargs})


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """4.4 M parameters when re-parameterised; trained without stochastic depth."""
    return _create("unireplknet_a", pretrained, **{"dim": 40, "depths": (2, 2, 6, 2), **kwargs})


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """6.2 M parameters when re-parameterised; trained without stochastic depth."""
    return _create("unireplknet_f", pretrained, **{"dim": 48, "depths": (2, 2, 6, 2), **kwargs})


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """10.7 M parameters when re-parameterised; trained with stochastic depth 0.1."""
    return _create("unireplknet_p", pretrained, **{"dim": 64, "depths": (2, 2, 6, 2), **kwargs})


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """18.3 M parameters when re-parameterised; trained with stochastic depth 0.1."""
    return _create("unireplknet_n", pretrained, **{"dim": 80, "depths": (2, 2, 8, 2), **kwargs})


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """31 M parameters when re-parameterised; trained with stochastic depth 0.2."""
    return _create("unireplknet_t", pretrained, **{"dim": 80, "depths": (3, 3, 18, 3), **kwargs})


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """56 M parameters when re-parameterised; trained with stochastic depth 0.4."""
    return _create("unireplknet_s", pretrained, **{"dim": 96, **kwargs})


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """98 M parameters when re-parameterised; trained on ImageNet-22K with stochastic depth 0.1."""
    return _create("unireplknet_b", pretrained, **{"dim": 128, **kwargs})


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """218 M parameters when re-parameterised; trained on ImageNet-22K with stochastic depth 0.1."""
    return _create("unireplknet_l", pretrained, **{"dim": 192, **kwargs})


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """386 M parameters when re-parameterised; trained on ImageNet-22K with stochastic depth 0.2."""
    return _create("unireplknet_xl", pretrained, **{"dim": 256, **kwargs})
