"""VCMamba: convolutions throughout, and in the last blocks a scan along a snake in four directions.

Munir, Zhang and Marculescu, "VCMamba: Bridging Convolutions with Multi-Directional Mamba for Efficient Visual
Representation" (ICCV workshops 2025), arXiv 2509.04669, and the authors' code (Wertyuui345/VCMamba), with which the
weights were trained. We follow the code in what the paper does not say: of what is scanned, the values alone are put
into the order of a direction, while step sizes, B and C stay as the rows are read; the bias of the step sizes is added
twice, and begins at zero.

Shapes: B images, H x W places, L = H W, C channels, E = 2 C inside the mixer, N states, K = 4 directions. All blocks
take and return (B, C, H, W).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath, lecun_normal_, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.mamba import Scan, initial_rates, rates
from vitrail.layers.scan import selective_scan
from vitrail.layers.scan.orders import Order, cross_merge, cross_scan, snake
from vitrail.layers.two_heads import TwoHeaded, fitting_heads
from vitrail.models.staged import StagedNet, cfg, check_stages, create, nano_cfg

STATES = 16
"""N of every published variant."""
START, RIGHT, LEFT, UP, DOWN = range(5)
"""How a step of a scan was reached: rows of ``direction_Bs``."""

# ---- the directions --------------------------------------------------------------------------------------------------


@cache
def ways(shape: tuple[int, int]) -> tuple[Order, ...]:
    """Return the snake along the rows, the same backwards, and both along the columns."""
    rows, columns = snake(shape), snake(shape, (1, 0))
    return rows, rows[::-1], columns, columns[::-1]


@cache
def moves(shape: tuple[int, int]) -> Order:
    """Return which way each step of each of ``ways`` was reached, (K, L): START for the first, then RIGHT to DOWN."""
    found = np.full((4, math.prod(shape)), START)
    for number, order in enumerate(ways(shape)):
        down, right = (np.diff(axis) for axis in np.divmod(order, shape[1]))
        found[number, 1:] = np.select([right > 0, right < 0, down < 0], [RIGHT, LEFT, UP], DOWN)
    return found


# ---- the parts -------------------------------------------------------------------------------------------------------


class SnakeMixer(nn.Module):
    """A convolution, and scans of it along four snakes, added up; B also knows which way a step goes.

    Args:
        dim: C.
    """

    scan: Scan = staticmethod(selective_scan)
    """Another with its arguments may be set in its place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inside, self.rank = 2 * dim, math.ceil(dim / 16)
        self.in_conv = nn.Sequential(nn.Conv2d(dim, inside, 1), nn.BatchNorm2d(inside))
        self.conv2d = nn.Conv2d(inside, inside, 7, padding=3, groups=inside)
        self.x_proj = nn.Linear(inside, self.rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(self.rank, inside)
        self.A_log = nn.Parameter(initial_rates(inside, STATES))
        self.D = nn.Parameter(torch.ones(inside))
        self.direction_Bs = nn.Parameter(trunc_normal_(torch.empty(5, STATES), std=0.02))
        self.norm = nn.LayerNorm(inside)
        self.out_conv = nn.Sequential(nn.ReLU(), nn.Conv2d(inside, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        plane = (x.shape[2], x.shape[3])
        x = F.silu(self.conv2d(self.in_conv(x))).flatten(2).transpose(1, 2)  # (B, L, E)
        delta, enter, leave = self.x_proj(x).split((self.rank, STATES, STATES), -1)
        delta, leave = self.dt_proj(delta).transpose(1, 2), leave.transpose(1, 2)
        steps = torch.from_numpy(moves(plane)).to(x.device)
        enter = (enter[:, None] + self.direction_Bs[steps].to(enter.dtype)).transpose(2, 3)  # (B, K, N, L)
        orders = ways(plane)
        count = len(orders)
        # Step sizes, B and C are not put into the order of the direction: the weights were trained so.
        y, _ = self.scan(
            cross_scan(x, orders).transpose(2, 3).flatten(1, 2),
            delta.repeat(1, count, 1),
            rates(self.A_log).repeat(count, 1),
            enter,
            leave[:, None].expand(-1, count, -1, -1),
            self.D.repeat(count),
            delta_bias=self.dt_proj.bias.repeat(count),  # for the second time: they were trained so, too
            softplus=True,
        )
        y = self.norm(cross_merge(y.unflatten(1, (count, -1)).transpose(2, 3), orders))
        return self.out_conv(y.transpose(1, 2).unflatten(2, plane))


class ConvMlp(nn.Module):
    """A feed-forward layer of convolutions, depthwise inside, with a batch normalisation after each."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.mid = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.mid_norm = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        for conv in (self.fc1, self.fc2):
            trunc_normal_(conv.weight, std=0.02)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        inside = F.gelu(self.norm1(self.fc1(x)))
        return self.norm2(self.fc2(F.gelu(self.mid_norm(self.mid(inside)))))


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate else nn.Identity()


class ConvBlock(nn.Module):
    """A feed-forward layer of convolutions, scaled and added to what came in."""

    def __init__(self, dim: int, mlp_ratio: float, *, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), layer_scale))
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return x + self.drop_path(self.layer_scale * self.mlp(x))


class MambaBlock(nn.Module):
    """Scans, then a feed-forward layer of convolutions, each added to what came in, without a scale."""

    def __init__(self, dim: int, mlp_ratio: float, *, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.mamba = SnakeMixer(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = x + self.drop_path(self.mamba(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A downsampling (none in the first stage), convolutional blocks, positions, blocks of scans.

    Positions are learnt for one size of plane, and are interpolated for another.
    """

    def __init__(self, dim_in: int | None, dim: int, conv_blocks: list[nn.Module], blocks: list[nn.Module], side: int):
        super().__init__()
        self.downsample = (
            nn.Identity() if dim_in is None else nn.Sequential(nn.Conv2d(dim_in, dim, 3, 2, 1), nn.BatchNorm2d(dim))
        )
        self.blocks = nn.ModuleList(conv_blocks + blocks)
        self.first = len(conv_blocks)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, dim, side, side), std=0.02)) if blocks else None
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.downsample(x)
        for number, block in enumerate(self.blocks):
            if number == self.first and self.pos_embed is not None:
                x = x + _positions(self.pos_embed, (x.shape[2], x.shape[3])).to(x.dtype)
            x = checkpoint(block, x) if self.grad_checkpointing and self.training else block(x)
        return x


def _positions(learnt: Tensor, plane: tuple[int, int]) -> Tensor:
    return learnt if learnt.shape[2:] == plane else F.interpolate(learnt, plane, mode="bicubic")


# ---- the net ---------------------------------------------------------------------------------------------------------


class VCMamba(TwoHeaded, StagedNet):
    """VCMamba with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        img_size: pixels of the side for which positions are learnt; other sizes interpolate them.
        dims: width C of the four stages, even.
        depths: blocks of the four stages.
        mamba: blocks at the end of each stage that scan; the others are convolutional. As published, four of the last.
        mlp_ratio: hidden width of the feed-forward layers over C.
        layer_scale: initial factor of each convolutional block.
        distilled: whether there is a second classifier, as published, that learns from a teacher; a prediction is the
            mean of both. ``TwoHeadDistillation`` trains such a net.
        stem_stride: 1, 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, more blocks that scan than there are, a stride, a size or a pooling that
            is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (4, 4, 12, 6),
        mamba: Sequence[int] = (0, 0, 0, 4),
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        distilled: bool = False,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(distilled=distilled)
        check_stages(stem_stride, (1, 2, 4), dims=dims, depths=depths, mamba=mamba)
        for depth, scanning in zip(depths, mamba, strict=True):
            if not 0 <= scanning <= depth:
                raise InputError(f"mamba = {scanning} of a stage with {depth} blocks: give a number from 0 to {depth}")
        if img_size < 1:
            raise InputError(f"img_size = {img_size} is not allowed: give a number of pixels, 1 or more")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = _stem(in_chans, dims[0], stem_stride)
        drops = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, (dim, depth, scanning) in enumerate(zip(dims, depths, mamba, strict=True)):
            conv: list[nn.Module] = [
                ConvBlock(dim, mlp_ratio, drop_path=next(drops), layer_scale=layer_scale)
                for _ in range(depth - scanning)
            ]
            scans: list[nn.Module] = [MambaBlock(dim, mlp_ratio, drop_path=next(drops)) for _ in range(scanning)]
            stride = stem_stride * 2**i
            stages.append(Stage(dims[i - 1] if i else None, dim, conv, scans, math.ceil(img_size / stride)))
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1])
        self.drop = nn.Dropout(drop_rate)
        self.stages.apply(_init_linear)  # replaces Mamba's step sizes
        self.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of tensors that are not decayed: positions, and what sets how fast states forget."""
        found = {"*.A_log": "A_log", "*.pos_embed": "pos_embed"}
        names = [name for name, _ in self.named_parameters()]
        return {pattern for pattern, end in found.items() if any(name.endswith(end) for name in names)}

    def put_head(self) -> None:
        """Set the classifiers, on the device and in the type of the present weights."""
        self.put_heads(self.num_features, self.num_classes, self.norm.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        return self.norm(self.stages(self.stem(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits, or with ``pre_logits`` the pooled features, (B, C).

        In training, after ``set_distilled_training``: a pair of logits, of which the second learns from a teacher.
        """
        pooled = self.global_pool(x)
        return pooled if pre_logits else self.logits(self.drop(pooled))


def _stem(in_chans: int, dim: int, stride: int) -> nn.Sequential:
    """Return two 3x3 convolutions, each of which may halve the size."""
    layers: list[nn.Module] = []
    for before, after, halves in ((in_chans, dim // 2, stride > 1), (dim // 2, dim, stride > 2)):
        conv = nn.Conv2d(before, after, 3, 1 + halves, 1)
        lecun_normal_(conv.weight)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_AUTHORS = (
    (r"^module\.", ""),
    (r"^patch_embed\.", "stem."),
    (r"^network\.([1357])\.proj\.", r"network.\1.downsample.0."),
    (r"^network\.([1357])\.norm\.", r"network.\1.downsample.1."),
    (r"^network\.([0246])\.", r"network.\1.blocks."),
    (r"^network\.(\d)\.", lambda found: f"stages.{(int(found[1]) + 1) // 2}."),
    (r"\.layer_scale_2$", ".layer_scale"),
    (r"^pos_embed$", "stages.3.pos_embed"),
    (r"^dist_head\.", "head_dist."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights under our names.

    A net of one classifier gets the mean of both, which predicts the same; positions are interpolated to the model's.
    """
    state = state_dict.get("model", state_dict)
    if "stem.0.weight" in state:
        return state
    ours = {}
    for key, value in state.items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        ours[key] = value
    wanted = model.state_dict().get("stages.3.pos_embed")
    if wanted is not None and wanted.shape != ours["stages.3.pos_embed"].shape:
        side = (wanted.shape[2], wanted.shape[3])
        ours["stages.3.pos_embed"] = F.interpolate(ours["stages.3.pos_embed"], side, mode="bicubic")
    return fitting_heads(ours, model)


# ---- the variants ----------------------------------------------------------------------------------------------------


_OWN: dict[str, Any] = {"crop_pct": 0.9}
default_cfgs = generate_default_cfgs(
    {
        "vcmamba_nano": nano_cfg(**_OWN),
        "vcmamba_s": cfg(**_OWN),
        "vcmamba_m": cfg(**_OWN),
        "vcmamba_b": cfg(**_OWN),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VCMamba:
    net: VCMamba = create(VCMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def vcmamba_nano(pretrained: bool = False, **kwargs: Any) -> VCMamba:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"img_size": 32, "dims": (16, 24, 48, 64), "depths": (1, 1, 2, 3), "mamba": (0, 0, 0, 2), "stem_stride": 2}
    return _create("vcmamba_nano", pretrained, **{**own, **kwargs})


@register_model
def vcmamba_s(pretrained: bool = False, **kwargs: Any) -> VCMamba:
    """10.5 M parameters; trained with stochastic depth 0.2."""
    own = {"dims": (32, 64, 144, 288), "depths": (4, 4, 12, 8)}
    return _create("vcmamba_s", pretrained, **{**own, **kwargs})


@register_model
def vcmamba_m(pretrained: bool = False, **kwargs: Any) -> VCMamba:
    """21 M parameters; trained with stochastic depth 0.2."""
    return _create("vcmamba_m", pretrained, **{"dims": (48, 96, 224, 448), **kwargs})


@register_model
def vcmamba_b(pretrained: bool = False, **kwargs: Any) -> VCMamba:
    """31.5 M parameters."""
    return _create("vcmamba_b", pretrained, **kwargs)
