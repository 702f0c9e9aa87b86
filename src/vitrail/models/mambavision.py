"""MambaVision: convolutions, then state-space mixers, then self-attention, in windows.

Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone" (CVPR 2025), arXiv 2407.08083, and the
authors' code (NVlabs/MambaVision), with which the weights were trained. We follow the code in what the paper does not
say: it adds the bias of the step sizes twice, and begins with that bias at zero, not at Mamba's values.

Shapes: B images, H x W places, windows of L = size^2 places, C channels, D = C / 2, N states. Stages take and return
(B, C, H, W); blocks of the last two work on (windows, L, C).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.mamba import Scan, initial_rates, rates
from vitrail.layers.scan import selective_scan
from vitrail.layers.windows import from_windows, to_windows
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks

STATES = 8
"""N of every published variant."""

# ---- the parts -------------------------------------------------------------------------------------------------------


class MambaVisionMixer(nn.Module):
    """Two branches of half the width: convolution, SiLU and a selective scan; convolution and SiLU. Then both, mixed.

    The convolutions see one place to either side, where Mamba's see those before alone, and the second branch is
    concatenated with the first, where Mamba's multiplies it.

    Args:
        dim: C, even.
    """

    scan: Scan = staticmethod(selective_scan)
    """Another with its arguments may be set in its place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half, self.rank = dim // 2, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.x_proj = nn.Linear(half, self.rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(self.rank, half)
        self.A_log = nn.Parameter(initial_rates(half, STATES))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (windows, L, C)."""
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (windows, D, L) each
        x, z = F.silu(self.conv1d_x(x)), F.silu(self.conv1d_z(z))
        delta, enter, leave = self.x_proj(x.transpose(1, 2)).split((self.rank, STATES, STATES), dim=-1)
        y, _ = self.scan(
            x,
            self.dt_proj(delta).transpose(1, 2),
            rates(self.A_log),
            enter.transpose(1, 2),
            leave.transpose(1, 2),
            self.D,
            delta_bias=self.dt_proj.bias,  # for the second time: the weights were trained so
            softplus=True,
        )
        return self.out_proj(torch.cat((y, z), dim=1).transpose(1, 2))


class Attention(nn.Module):
    """Self-attention of the places of a window, without positions: the convolutions before it know them."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (windows, L, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (windows, L, 3, n, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _scale(dim: int, layer_scale: float) -> nn.Module:
    return LayerScale(dim, layer_scale) if layer_scale else nn.Identity()


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate else nn.Identity()


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each added to what came in."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, *, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.ls1 = _scale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = _scale(dim, layer_scale)
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return (windows, L, C)."""
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, added to what came in."""

    def __init__(self, dim: int, *, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        inside = F.gelu(self.norm1(self.conv1(x)), approximate="tanh")
        return x + self.drop_path(self.norm2(self.conv2(inside)))


class Stage(nn.Module):
    """A downsampling (none in the first stage), then blocks: on the plane, or on its windows.

    A plane that the windows do not divide is filled up with zeros at its right and lower edges. As published, the
    blocks see these as places like any other, also where the plane is smaller than one window.
    """

    def __init__(self, dim_in: int | None, dim: int, window: int | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if dim_in is None else nn.Conv2d(dim_in, dim, 3, 2, 1, bias=False)
        self.window = window
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.downsample(x)
        if self.window is None:
            return through_blocks(self, x)
        height, width = x.shape[-2:]
        windows = to_windows(x.permute(0, 2, 3, 1), self.window)
        places = through_blocks(self, windows.flatten(1, 2))
        return from_windows(places.view(windows.shape), height, width).permute(0, 3, 1, 2)


# ---- the net ---------------------------------------------------------------------------------------------------------


class MambaVision(StagedNet):
    """MambaVision with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    The first two stages are convolutional; the last two, which are hybrid, mix the places of windows.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        stem_dim: width of the first convolution.
        dim: width C of the first stage; it doubles with each.
        depths: blocks of the four stages.
        num_heads: heads of the attention in the hybrid stages; they divide the width of the stage, 4 C and 8 C.
        window_sizes: side of the windows in the hybrid stages, in places.
        mlp_ratio: hidden width of the feed-forward layers over C.
        attention: which blocks of each hybrid stage attend, from 0; the others have the MambaVision mixer. None is as
            published: the last half, rounded down.
        layer_scale: initial factor of each branch of the hybrid stages; 0 is none.
        stem_stride: 1, 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, heads that do not divide a width, a block that there is not, a window or
            a stride or a pooling that is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_dim: int = 32,
        dim: int = 80,
        depths: Sequence[int] = (1, 3, 8, 4),
        num_heads: Sequence[int] = (8, 16),
        window_sizes: Sequence[int] = (14, 7),
        mlp_ratio: float = 4.0,
        attention: Sequence[Sequence[int]] | None = None,
        layer_scale: float = 0.0,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != 4:
            raise InputError(f"depths = {tuple(depths)} has {len(depths)} entries: give one for each of four stages")
        if attention is None:
            attention = [range((depth + 1) // 2, depth) for depth in depths[2:]]
        hybrid = {"num_heads": num_heads, "window_sizes": window_sizes, "attention": attention}
        for name, values in hybrid.items():
            if len(values) != 2:
                raise InputError(
                    f"{name} = {tuple(values)} has {len(values)} entries: give one for each of the last two stages, "
                    "which are hybrid"
                )
        for stage in (0, 1):
            depth, width, heads = depths[2 + stage], dim * 2 ** (2 + stage), num_heads[stage]
            if heads < 1 or width % heads:
                raise InputError(f"num_heads = {heads} does not divide a width of {width}: give a divisor of it")
            if window_sizes[stage] < 1:
                raise InputError(f"window_sizes = {window_sizes[stage]} is not allowed: give 1 place or more")
            beyond = [block for block in attention[stage] if not 0 <= block < depth]
            if beyond:
                raise InputError(
                    f"attention names block {beyond[0]} of a stage with {depth} blocks: give numbers from 0 to "
                    f"{depth - 1}"
                )
        if stem_stride not in (1, 2, 4):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 1, 2 or 4")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim * 8
        self.stem = _stem(in_chans, stem_dim, dim, stem_stride)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, depth in enumerate(depths):
            width = dim * 2**i
            blocks: list[nn.Module]
            if i < 2:
                blocks = [ConvBlock(width, drop_path=next(rates)) for _ in range(depth)]
            else:
                attends = set(attention[i - 2])
                blocks = [
                    Block(
                        width,
                        Attention(width, num_heads[i - 2]) if block in attends else MambaVisionMixer(width),
                        mlp_ratio,
                        drop_path=next(rates),
                        layer_scale=layer_scale,
                    )
                    for block in range(depth)
                ]
            stages.append(Stage(width // 2 if i else None, width, None if i < 2 else window_sizes[i - 2], blocks))
            self.feature_info.append({"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(self.num_features)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        # The authors' mixer first draws Mamba's step sizes, which this replaces.
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of matrices that are not decayed: with ``A_log`` at 0 all states forget at one pace."""
        return {"*.A_log"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, 8 C, H/32, W/32)."""
        return self.norm(self.stages(self.stem(x)))


def _stem(in_chans: int, inside: int, dim: int, stride: int) -> nn.Sequential:
    """Return two 3x3 convolutions, each of which may halve the size."""
    layers: list[nn.Module] = []
    for before, after, halves in ((in_chans, inside, stride > 1), (inside, dim, stride > 2)):
        conv = nn.Conv2d(before, after, 3, 1 + halves, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(after, eps=1e-4), nn.ReLU()]
    return nn.Sequential(*layers)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_AUTHORS = (
    (r"^(?:module|model)\.", ""),
    (r"^patch_embed\.conv_down\.", "stem."),
    (r"^levels\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, of their repository or of the Hugging Face hub, under our names."""
    if "stem.0.weight" in state_dict:
        return state_dict
    ours = {}
    for key, value in state_dict.get("state_dict", state_dict).items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        # Their level ends with the downsampling that our stage begins with.
        found = re.fullmatch(r"levels\.(\d+)\.downsample\.reduction\.0\.weight", key)
        ours[f"stages.{int(found[1]) + 1}.downsample.weight" if found else key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {
        "mambavision_nano": nano_cfg(),
        "mambavision_t": cfg(),
        "mambavision_t2": cfg(crop_pct=0.98),
        "mambavision_s": cfg(crop_pct=0.93),
        "mambavision_b": cfg(),
        "mambavision_l": cfg(),
        "mambavision_l2": cfg(),
        "mambavision_l2_512": cfg(512, crop_pct=0.93, crop_mode="squash"),
        "mambavision_l3_256": cfg(256),
        "mambavision_l3_512": cfg(512, crop_pct=0.93, crop_mode="squash"),
    }
)
_S: dict[str, Any] = {"stem_dim": 64, "dim": 96, "depths": (3, 3, 7, 5)}
_B: dict[str, Any] = {"stem_dim": 64, "dim": 128, "depths": (3, 3, 10, 5), "layer_scale": 1e-5}
_L: dict[str, Any] = {**_B, "dim": 196, "num_heads": (16, 32)}
_L2: dict[str, Any] = {**_L, "depths": (3, 3, 12, 5)}
_L3: dict[str, Any] = {**_L, "dim": 256, "depths": (3, 3, 20, 10)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MambaVision:
    net: MambaVision = create(MambaVision, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def mambavision_nano(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """0.7 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {
        "stem_dim": 16,
        "dim": 16,
        "depths": (1, 1, 4, 2),
        "num_heads": (4, 8),
        "window_sizes": (4, 2),
        "stem_stride": 2,
    }
    return _create("mambavision_nano", pretrained, **{**own, **kwargs})


@register_model
def mambavision_t(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """32 M parameters; trained with stochastic depth 0.2."""
    return _create("mambavision_t", pretrained, **kwargs)


@register_model
def mambavision_t2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """35 M parameters; trained with stochastic depth 0.2."""
    return _create("mambavision_t2", pretrained, **{"depths": (1, 3, 11, 4), **kwargs})


@register_model
def mambavision_s(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """50 M parameters; trained with stochastic depth 0.2."""
    return _create("mambavision_s", pretrained, **{**_S, **kwargs})


@register_model
def mambavision_b(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """98 M parameters; trained with stochastic depth 0.3."""
    return _create("mambavision_b", pretrained, **{**_B, **kwargs})


@register_model
def mambavision_l(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """228 M parameters; trained with stochastic depth 0.3."""
    return _create("mambavision_l", pretrained, **{**_L, **kwargs})


@register_model
def mambavision_l2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """241 M parameters; trained with stochastic depth 0.3."""
    return _create("mambavision_l2", pretrained, **{**_L2, **kwargs})


@register_model
def mambavision_l2_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """241 M parameters, with the windows of images of 512 pixels; trained with stochastic depth 0.3."""
    return _create("mambavision_l2_512", pretrained, **{**_L2, "window_sizes": (32, 16), **kwargs})


@register_model
def mambavision_l3_256(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """740 M parameters, with the windows of images of 256 pixels; trained with stochastic depth 0.5."""
    return _create("mambavision_l3_256", pretrained, **{**_L3, "window_sizes": (16, 8), **kwargs})


@register_model
def mambavision_l3_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """740 M parameters, with the windows of images of 512 pixels; trained with stochastic depth 0.5."""
    return _create("mambavision_l3_512", pretrained, **{**_L3, "window_sizes": (32, 16), **kwargs})
