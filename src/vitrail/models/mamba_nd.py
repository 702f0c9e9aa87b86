"""Mamba-ND: ordinary Mamba layers on grids of two and three axes, each of which reads the places in another order.

Li, Singh and Grover, "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data" (ECCV 2024), arXiv
2402.05892, and the authors' code (jacklishufan/Mamba-ND), with which the weights were trained. We follow the code in
what the paper does not say: a layer adds to its *normed* input. Of the alternatives that the paper compares, the code
has the arrangement of layers in blocks and the factorised orders; layers with several scans are written from the text.

Shapes: B images or clips, a grid (H, W) or (T, H, W) of L places, C channels, D inside a mixer, V fields.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.mamba import Mamba, ScanPaths
from vitrail.layers.scan.orders import Order, cross_merge, cross_scan, inverse, raster, rearrange
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks

# ---- orders and designs ----------------------------------------------------------------------------------------------

AXES = {2: "hw", 3: "thw"}
"""Letters of a grid's axes, as they lie in memory."""
DESIGNS = {
    2: {
        "alternating": "hw+ hw- wh+ wh-",
        "single": "hw+",
        "rows": "hw+ hw-",
        "bi_block": "hw+|hw- wh+|wh-",
        "quad_block": "hw+|hw-|wh+|wh-",
        "bi_ssm": "hw+&hw-",
        "nd_ssm": "hw+&hw-&wh+&wh-",
        "multi_head": "hw+,hw-,wh+,wh-",
        "factorised": "h/w+ h/w- w/h+ w/h-",
    },
    3: {
        "alternating": "thw+ thw- twh+ twh- wht+ wht-",
        "single": "thw+",
        "rows": "thw+ thw-",
        "planes": "thw+ thw- twh+ twh- thw+ thw-",
        "bi_block": "thw+|thw- twh+|twh- wht+|wht-",
        "six_block": "thw+|thw-|twh+|twh-|wht+|wht-",
        "bi_ssm": "thw+&thw-",
        "nd_ssm": "thw+&thw-&twh+&twh-&wht+&wht-",
        "multi_head": "thw+,thw-,twh+,twh-,wht+,wht-",
        "factorised_plane": "t/hw+ t/hw- t/wh+ t/wh- wht+ wht-",
        "factorised": "th/w+ th/w- tw/h+ tw/h- wh/t+ wh/t-",
    },
}
"""Designs of the paper for planes and for volumes; their layers follow each other, and begin again at the end.

``hw+`` is an order: the axes from the slowest to the fastest, forwards or backwards; axes before a ``/`` keep sequences
apart. A layer has one order, or several, each with a scan of its own: of all channels and added up (``&``), or of
channels of its own (``,``). Layers with a ``|`` between them form a block: they read the same places, and what they
find is added up.
"""


class Way(NamedTuple):
    """One order in which a layer reads a grid."""

    axes: tuple[int, ...]
    """From the slowest to the fastest."""
    apart: int
    """How many of them, the slowest, keep sequences apart."""
    backwards: bool

    def length(self, shape: tuple[int, ...]) -> int:
        """Return how many places a sequence has."""
        return math.prod(shape[axis] for axis in self.axes[self.apart :])


class Spec(NamedTuple):
    """One layer of a design."""

    ways: tuple[Way, ...]
    heads: bool
    """Whether each order has channels of its own."""
    ends: bool
    """Whether this layer is the last of its block."""
    alone: bool
    """Whether it is all of its block."""


def read_design(text: str, axes: str) -> tuple[Spec, ...]:
    """Return the layers of a design.

    Args:
        text: a name of ``DESIGNS`` for that many axes, or orders as there.
        axes: of ``AXES``.

    Raises:
        InputError: no such name, or orders that do not read all axes.
    """
    known = DESIGNS[len(axes)]
    if re.fullmatch(r"\w+", text):
        if text not in known:
            raise unknown("design", text, known, f"or give orders, such as '{known['alternating']}'")
        text = known[text]
    specs = []
    for block in text.split() or [""]:
        layers = block.split("|")
        for number, layer in enumerate(layers):
            ways = tuple(_read_way(part, axes, text) for part in re.split("[&,]", layer))
            if ("&" in layer and "," in layer) or (len(ways) > 1 and any(way.apart for way in ways)):
                raise InputError(
                    f"design: {layer!r} cannot be one layer: join its orders by '&' or by ',', not by both, and give "
                    "them without '/'"
                )
            specs.append(Spec(ways, "," in layer, number == len(layers) - 1, len(layers) == 1))
    return tuple(specs)


def _read_way(text: str, axes: str, design: str) -> Way:
    found = re.fullmatch(r"(?:(\w+)/)?(\w+)([+-])", text)
    letters = f"{found[1] or ''}{found[2]}" if found else ""
    if not found or sorted(letters) != sorted(axes):
        raise InputError(
            f"design = {design!r}: {text!r} is no order: give each of the axes {', '.join(axes)} once, and a sign, "
            f"such as '{axes}+'"
        )
    return Way(tuple(axes.index(letter) for letter in letters), len(found[1] or ""), found[3] == "-")


@cache
def reading(way: Way, shape: tuple[int, ...]) -> Order:
    """Return the order of the places of a grid; sequences that are kept apart follow each other."""
    order = raster(shape, way.axes)
    if way.backwards:
        order = order.reshape(-1, way.length(shape))[:, ::-1].ravel()
        order.flags.writeable = False
    return order


# ---- the layers ------------------------------------------------------------------------------------------------------


class OneWay(Mamba):
    """Mamba's mixer on a grid, read in one order."""

    def __init__(self, dim: int, way: Way, *, states: int, expand: float) -> None:
        super().__init__(dim, states=states, expand=expand)
        self.way = way

    def on_grid(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return (B, L, C)."""
        order = reading(self.way, shape)
        y = self(rearrange(x, order).reshape(-1, self.way.length(shape), x.shape[2]))
        return rearrange(y.reshape(x.shape), inverse(order))


class ManyWays(ScanPaths):
    """Mamba's mixer with a scan for each of several orders, after one convolution: bi-SSM, ND-SSM, multi-head SSM.

    The convolution reads the places as they lie in memory. The scans have parameters of their own; their results are
    added up, or, of heads, put side by side, and then gated together.
    """

    def __init__(self, dim: int, ways: tuple[Way, ...], heads: bool, *, states: int, expand: float) -> None:
        channels, count = int(expand * dim), len(ways)
        if heads and channels % count:
            raise InputError(f"{channels} channels cannot be {count} heads: give dim and expand that make a multiple")
        super().__init__(count, channels // count if heads else channels, math.ceil(dim / 16), states=states)
        self.ways, self.heads = ways, heads
        self.in_proj = nn.Linear(dim, 2 * channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, 4, groups=channels, padding=3)
        self.out_proj = nn.Linear(channels, dim, bias=False)

    def on_grid(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return (B, L, C)."""
        inside, gate = self.in_proj(x).chunk(2, -1)
        inside = F.silu(self.conv1d(inside.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        orders = [reading(way, shape) for way in self.ways]
        if self.heads:
            parts = zip(inside.chunk(len(orders), -1), orders, strict=True)
            found = self.along(torch.stack([rearrange(part, order) for part, order in parts], 1)).unbind(1)
            y = torch.cat([rearrange(part, inverse(order)) for part, order in zip(found, orders, strict=True)], -1)
        else:
            y = cross_merge(self.along(cross_scan(inside, orders)), orders)
        return self.out_proj(y * F.silu(gate))


class Layer(nn.Module):
    """A norm and a mixer."""

    def __init__(self, dim: int, spec: Spec, *, states: int, expand: float, proj_drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer: OneWay | ManyWays
        if len(spec.ways) == 1:
            self.mixer = OneWay(dim, spec.ways[0], states=states, expand=expand)
        else:
            self.mixer = ManyWays(dim, spec.ways, spec.heads, states=states, expand=expand)
        self.drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the normed places, and what the mixer makes of them, each (B, L, C)."""
        normed = self.norm(x)
        return normed, self.drop_path(self.drop(self.mixer.on_grid(normed, shape)))


class Block(nn.Module):
    """One layer, or several that read the same places."""

    def __init__(self, layers: Sequence[Layer], *, alone: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.alone = alone

    def forward(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return (B, L, C)."""
        if self.alone:
            normed, found = self.layers[0](x, shape)
            return normed + found  # not x: the weights were trained so
        for _, found in [layer(x, shape) for layer in self.layers]:
            x = x + found
        return x


class Merge(nn.Module):
    """Four places of a plane, or of every plane of a volume, become one; a last odd row or column meets zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ..., H/2, W/2)."""
        x = F.pad(x, (0, -x.shape[-1] % 2, 0, -x.shape[-2] % 2))
        x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # (B, C, ..., h, 2, w, 2)
        x = x.movedim(1, -1).movedim(-4, -1).movedim(-3, -1)  # (B, ..., h, w, C, 2, 2)
        return self.reduction(self.norm(x.flatten(-3))).movedim(-1, 1)


class Stage(nn.Module):
    """Blocks on a grid, before which the stages after the first merge its places."""

    def __init__(self, dim: int, blocks: Sequence[Block], *, merges: bool) -> None:
        super().__init__()
        self.downsample = Merge(dim) if merges else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...)."""
        x = self.downsample(x)
        shape = tuple(x.shape[2:])
        places = x.flatten(2).transpose(1, 2)
        places = through_blocks(self, places, shape)
        return places.transpose(1, 2).unflatten(2, shape)


class Stem(nn.Module):
    """Patches become places, which learn where they are; inputs that patches do not divide end in zeros."""

    def __init__(
        self, in_chans: int, dim: int, size: tuple[int, ...], patch: tuple[int, ...], *, pos_drop: float
    ) -> None:
        super().__init__()
        self.patch = patch
        self.grid = tuple(-(-side // step) for side, step in zip(size, patch, strict=True))
        conv: Any = nn.Conv2d if len(patch) == 2 else nn.Conv3d
        self.projection = conv(in_chans, dim, patch, patch)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, math.prod(self.grid), dim), std=0.02))
        self.drop = nn.Dropout(pos_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...)."""
        if x.ndim != len(self.patch) + 2:
            raise InputError(
                f"an input of shape {tuple(x.shape)} does not suit a net of {len(self.patch)} axes: give (batch, "
                f"channels, {', '.join(AXES[len(self.patch)])})"
            )
        steps = zip(reversed(x.shape[2:]), reversed(self.patch), strict=True)
        x = self.projection(F.pad(x, [pad for side, step in steps for pad in (0, -side % step)]))
        return self.drop(x + self.positions(tuple(x.shape[2:])).to(x.dtype))

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """Return the position embedding of a grid, (1, C, ...)."""
        table = self.pos_embed.transpose(1, 2).unflatten(2, self.grid)
        if grid == self.grid:
            return table
        mode = "bicubic" if len(grid) == 2 else "trilinear"
        return F.interpolate(table.float(), grid, mode=mode, align_corners=False)


# ---- the net ---------------------------------------------------------------------------------------------------------


class MambaND(StagedNet):
    """Mamba-ND with timm's surface, for images (B, C, H, W) or clips (B, C, T, H, W) of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        img_size: side, or sides (H, W) or (T, H, W), for which positions are learnt; others are interpolated.
        patch_size: side, or sides (H, W) or (T, H, W), of a patch; their number is that of the axes.
        dim: width C.
        depths: layers of each stage; before each but the first, four places of a plane become one.
        design: a name of ``DESIGNS``, or orders as there.
        states: N of the scans.
        expand: D over C.
        final_norm: whether the last features are normed.
        fc_norm: whether the pooled features are normed.
        norm_eps: of these two norms.
        head_std: of the first weights of the classifier.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        pos_drop_rate: dropout after the positions, in [0, 1).
        proj_drop_rate: dropout of what a mixer adds, in [0, 1).
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: sizes that do not go together, or a design or a pooling that is not allowed.
    """

    BEHIND = r"^(?:fc_)?norm\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 8,
        dim: int = 384,
        depths: Sequence[int] = (10, 14),
        design: str = "alternating",
        states: int = 16,
        expand: float = 2.0,
        final_norm: bool = True,
        fc_norm: bool = True,
        norm_eps: float = 1e-6,
        head_std: float = 2e-5,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        size = (img_size,) * len(patch) if isinstance(img_size, int) else tuple(img_size)
        if len(patch) not in AXES or len(size) != len(patch) or min(*patch, *size) < 1 or patch[-1] != patch[-2]:
            raise InputError(
                f"img_size = {img_size} and patch_size = {patch_size} do not go together: give a side, or 2 or 3 sides "
                "each, of 1 or more, the last two of a patch alike"
            )
        if not depths or min(depths) < 1:
            raise InputError(f"depths = {tuple(depths)} is not allowed: give 1 layer or more for each stage")
        specs = read_design(design, AXES[len(patch)])
        self.num_classes, self.head_std = num_classes, head_std
        self.num_features = self.head_hidden_size = dim
        self.stem = Stem(in_chans, dim, size, patch, pos_drop=pos_drop_rate)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages: list[Stage] = []
        self.feature_info = []
        number = 0  # of the layer: the design goes on over the ends of stages
        for i, depth in enumerate(depths):
            blocks: list[Block] = []
            waiting: list[Layer] = []
            for last in reversed(range(depth)):
                spec = specs[number % len(specs)]
                waiting.append(
                    Layer(
                        dim,
                        spec,
                        states=states,
                        expand=expand,
                        proj_drop=proj_drop_rate,
                        drop_path=rates[number],
                    )
                )
                number += 1
                if spec.ends or last == 0:
                    blocks.append(Block(waiting, alone=spec.alone))
                    waiting = []
            stages.append(Stage(dim, blocks, merges=i > 0))
            self.feature_info.append({"num_chs": dim, "reduction": patch[-1] * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if final_norm else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=norm_eps) if fc_norm else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of matrices that are not decayed: with ``A_log`` at 0 all states forget at one pace."""
        return {"stem.pos_embed", "*.A_log*"}

    def put_head(self) -> None:
        """Set ``head``, which begins as published."""
        self.head = self.linear_head(self.num_features, self.head_std) if self.num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, ...), the grid at the stride of the last stage."""
        return self.norm(self.stages(self.stem(x)).movedim(1, -1)).movedim(-1, 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with ``pre_logits`` the pooled features (B, C)."""
        if not self.global_pool.pool_type:
            return x
        pooled = self.fc_norm(self.global_pool(x.flatten(2, -2)))  # a clip is pooled as one high plane
        return pooled if pre_logits else self.head(self.drop(pooled))


# ---- the authors' weights --------------------------------------------------------------------------------------------

_AUTHORS = (
    (r"^(?:module\.)?(?:backbone\.)?", ""),
    (r"^patch_embed\.", "stem."),
    (r"^pos_embed$", "stem.pos_embed"),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
    (r"^(?:head\.fc|cls_head\.fc_cls)\.", "head."),
    (r"^head\.0\.", "fc_norm."),
    (r"^head\.1\.", "head."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights of images or clips under our names."""
    if "stem.pos_embed" in state_dict:
        return state_dict
    layers = [name for name, module in model.named_modules() if isinstance(module, Layer)]
    ours = {}
    for key, value in state_dict.get("state_dict", state_dict.get("model", state_dict)).items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
        if found and found[2].startswith("down_sample_layer."):
            # Their layer ends with the merging that our next stage begins with.
            after = int(layers[int(found[1])].split(".")[1]) + 1
            key = f"stages.{after}.downsample.{found[2].partition('.')[2]}"
        elif found:
            key = f"{layers[int(found[1])]}.{found[2]}"
        ours[key] = value
    return ours


def inflate(state_dict: Mapping[str, Tensor], model: MambaND) -> dict[str, Tensor]:
    """Return the weights of a net for images as the first ones of a net for clips.

    Of six layers of a clip's net the first four are those of images, and the two along time begin as they are; patches
    see the mean of their frames, and all times the same positions.

    Args:
        state_dict: of a ``MambaND`` of two axes and one stage, of the width and the patches of ``model``, with two
            layers for each three of it.
        model: for clips, of the design ``alternating`` and one stage; its grid of places has the sides of the other.

    Returns:
        All of ``model``'s state, its classifier as it was.

    Raises:
        InputError: weights that do not fit.
    """
    own = model.state_dict()
    found = {}
    for key, value in state_dict.items():
        part = re.fullmatch(r"(stages\.0\.blocks\.)(\d+)(\..+)", key)
        if part:
            number = int(part[2])
            key = f"{part[1]}{number // 4 * 6 + number % 4}{part[3]}"
        elif key == "stem.projection.weight":
            frames = own[key].shape[2]
            value = value.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
        elif key == "stem.pos_embed":
            value = value.repeat(1, model.stem.grid[0], 1)
        if key.startswith("head."):
            continue
        if key in own and own[key].shape != value.shape:
            raise InputError(
                f"{key} of an image's net becomes {tuple(value.shape)}, and the clip's has {tuple(own[key].shape)}: "
                "give nets of one width, patch and grid"
            )
        if key not in own and not key.startswith(("norm.", "fc_norm.")):
            raise InputError(f"{key} has no place in the clip's net: give it one stage, and three layers for every two")
        if key in own:
            found[key] = value
    return {**own, **found}


# ---- forecasts of fields on a globe ----------------------------------------------------------------------------------


def latitude_weights(latitudes: Sequence[float] | Tensor) -> Tensor:
    """Return the share of each row in the area of the globe, of mean one: cos(latitude) over its mean, (H,).

    Args:
        latitudes: of the rows' centres, degrees in [-90, 90].

    Raises:
        InputError: latitudes beyond the poles, or no row off them.
    """
    values = torch.as_tensor(latitudes, dtype=torch.float64)
    if values.ndim != 1 or not len(values) or not bool((values.abs() <= 90).all()):
        raise InputError("latitudes must be a row of degrees from -90 to 90, one for each row of the fields")
    weights = torch.deg2rad(values).cos().clamp(min=0)
    if not bool(weights.sum() > 1e-9):
        raise InputError("latitudes are all at a pole, where a row has no area: give the rows' centres")
    return (weights / weights.mean()).float()


def weighted_mse(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean squared error of fields, each row by its area: the loss of a forecast.

    Args:
        forecast, truth: (B, V, H, W).
        weights: of ``latitude_weights``, (H,).

    Raises:
        InputError: shapes that do not go together.
    """
    _check_fields(forecast, truth, weights)
    return ((forecast - truth).square() * weights.to(forecast)[:, None]).mean()


def weighted_rmse(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the root of the weighted mean squared error of each field, averaged over the batch, (V,).

    Args, Raises: as ``weighted_mse``.
    """
    _check_fields(forecast, truth, weights)
    return ((forecast - truth).square() * weights.to(forecast)[:, None]).mean((2, 3)).sqrt().mean(0)


def anomaly_correlation(forecast: Tensor, truth: Tensor, climate: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted correlation of what departs from the climate, in [-1, 1], of each variable, (V,).

    Both departures are centred on their mean over all fields that are given, as in WeatherBench and ClimaX: give those
    of a whole test at once.

    Args:
        forecast, truth: (B, V, H, W).
        climate: the long mean of the truth, (V, H, W) or (B, V, H, W).
        weights: of ``latitude_weights``, (H,).

    Raises:
        InputError: shapes that do not go together.
    """
    _check_fields(forecast, truth, weights)
    if climate.shape not in (truth.shape, truth.shape[1:]):
        raise InputError(f"a climate {tuple(climate.shape)} does not fit fields {tuple(truth.shape)}: give (V, H, W)")
    ours, theirs = forecast - climate, truth - climate
    ours, theirs = (value - value.mean((0, 2, 3), keepdim=True) for value in (ours, theirs))
    rows = weights.to(forecast)[:, None]

    def over(value: Tensor) -> Tensor:
        return (value * rows).sum((0, 2, 3))

    return over(ours * theirs) / (over(ours.square()) * over(theirs.square())).sqrt()


def _check_fields(forecast: Tensor, truth: Tensor, weights: Tensor) -> None:
    if forecast.ndim != 4 or forecast.shape != truth.shape or weights.shape != truth.shape[2:3]:
        raise InputError(
            f"a forecast {tuple(forecast.shape)}, a truth {tuple(truth.shape)} and weights {tuple(weights.shape)} do "
            "not go together: give (B, V, H, W) twice, and (H,)"
        )


class GridForecast(nn.Module):
    """Fields on a grid, or the last few of them, become the fields at a time ahead.

    A Mamba-ND without classifier reads the fields, as channels of an image or of a clip; the time ahead is added to its
    places; and two hidden layers and a linear one make of each of its features the patch that it stands for.

    Args:
        backbone: made with ``num_classes=0, global_pool=""``; ``in_chans`` are the fields that it reads.
        outputs: fields V that are foretold.
        hidden: layers of the head before the last.

    Raises:
        InputError: a backbone that pools.
    """

    def __init__(self, backbone: MambaND, outputs: int, *, hidden: int = 2) -> None:
        super().__init__()
        if backbone.num_classes or backbone.global_pool.pool_type:
            raise InputError("the backbone of a forecast must not pool: make it with num_classes=0 and global_pool=''")
        dim, self.stride = backbone.num_features, backbone.feature_info[-1]["reduction"]
        self.backbone, self.outputs = backbone, outputs
        self.lead = nn.Linear(1, dim)
        inside = [layer for _ in range(hidden) for layer in (nn.Linear(dim, dim), nn.GELU())]
        self.head = nn.Sequential(*inside, nn.Linear(dim, outputs * self.stride**2))

    def forward(self, x: Tensor, hours: Tensor) -> Tensor:
        """Return the fields (B, V, H, W).

        Args:
            x: (B, fields, H, W), or (B, fields, T, H, W), the latest last.
            hours: ahead, (B,).

        Raises:
            InputError: not one time for each.
        """
        if hours.shape != x.shape[:1]:
            raise InputError(f"hours {tuple(hours.shape)} must be ({len(x)},): one time ahead for each of the batch")
        height, width = x.shape[-2:]
        lead = self.lead(hours.to(x)[:, None] / 100)  # ClimaX's unit
        places = self.backbone.stem(x)
        places = self.backbone.stages(places + lead.reshape(*lead.shape, *[1] * (x.ndim - 2)))
        places = self.backbone.norm(places.movedim(1, -1))
        if x.ndim == 5:
            places = places.mean(1)  # over time
        patches = self.head(places).movedim(-1, 1)
        return F.pixel_shuffle(patches, self.stride)[:, :, :height, :width]


# ---- the variants ----------------------------------------------------------------------------------------------------


_OWN: dict[str, Any] = {"first_conv": "stem.projection"}
default_cfgs = generate_default_cfgs(
    {
        "mamba_nd_nano": nano_cfg(pool_size=(4, 4), **_OWN),
        "mamba_nd_s": cfg(pool_size=(14, 14), crop_pct=0.875, **_OWN),
        "mamba_nd_b": cfg(pool_size=(14, 14), crop_pct=0.875, **_OWN),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MambaND:
    net: MambaND = create(MambaND, variant, pretrained, checkpoint_filter_fn, stages=2, **kwargs)
    return net


@register_model
def mamba_nd_nano(pretrained: bool = False, **kwargs: Any) -> MambaND:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"img_size": 32, "patch_size": 4, "dim": 64, "depths": (4, 4), "states": 8}
    return _create("mamba_nd_nano", pretrained, **{**own, **kwargs})


@register_model
def mamba_nd_s(pretrained: bool = False, **kwargs: Any) -> MambaND:
    """Mamba2D-S/8, 24 M parameters; trained with stochastic depth 0.1, and 0.1 of the positions dropped."""
    return _create("mamba_nd_s", pretrained, **kwargs)


@register_model
def mamba_nd_b(pretrained: bool = False, **kwargs: Any) -> MambaND:
    """Mamba2D-B/8, 94 M parameters; trained with stochastic depth 0.1, and 0.1 of the positions dropped."""
    return _create("mamba_nd_b", pretrained, **{"dim": 768, **kwargs})


_CLIPS: dict[str, Any] = {
    "img_size": (32, 224, 224),
    "patch_size": (2, 16, 16),
    "depths": (36,),
    "final_norm": False,
    "fc_norm": False,
    "head_std": 0.01,
}


def mamba_nd_video_nano(**kwargs: Any) -> MambaND:
    """0.2 M parameters, for clips (B, C, 8, 16, 16); ours, not the paper's."""
    own = {"img_size": (8, 16, 16), "patch_size": (1, 4, 4), "dim": 64, "depths": (6,), "states": 8}
    return MambaND(**{**_CLIPS, "num_classes": 10, **own, **kwargs})


def mamba_nd_video_s(**kwargs: Any) -> MambaND:
    """Mamba3D-S, 36 M parameters, for clips of 32 frames, as for HMDB-51 and UCF-101; all its drop rates were 0.1."""
    return MambaND(**{**_CLIPS, "num_classes": 51, **kwargs})


def mamba_nd_video_s_k400(**kwargs: Any) -> MambaND:
    """Mamba3D-S for Kinetics-400: clips of 16 frames, each of which is cut by itself, and a norm before the head."""
    own = {"img_size": (16, 224, 224), "patch_size": (1, 16, 16), "fc_norm": True, "norm_eps": 1e-5, "head_std": 0.02}
    return MambaND(**{**_CLIPS, "num_classes": 400, **own, **kwargs})
