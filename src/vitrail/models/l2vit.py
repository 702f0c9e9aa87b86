"""L2ViT: blocks of softmax attention in windows and of linear attention everywhere, in turn.

Zheng, "The Linear Attention Resurrection in Vision Transformer" (2025), arXiv 2501.16182, and the author's code
(ChuanyangZheng/L2ViT), with which the weights were trained. Linear attention spreads over the map; a local
concentration module of two depthwise convolutions after it brings it back to what is near. We follow the code in what
the abstract does not say: where the encodings stand, a floor under the denominator and a learned temperature.

Shapes: B images, H x W = N places, C channels, n heads of d channels, C = n d. Stages take and return (B, C, H, W);
blocks work on (B, H, W, C), which for a channels-last image is the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.windows import from_windows, to_windows
from vitrail.models.staged import StagedNet, cfg, check_stages, create, nano_cfg, through_blocks

ATTENTIONS = ("linear", "softmax")
FLOOR = 100.0
"""Least denominator of the linear attention in the published nets."""

# ---- the mathematics -------------------------------------------------------------------------------------------------


def linear_attention(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor, floor: float = FLOOR) -> Tensor:
    """Attend from every place to every place, at a cost linear in places.

    With r = ReLU, place i gets t sum_j (r(q_i) . r(k_j)) v_j / max(sum_j r(q_i) . r(k_j), floor). The sum over j of
    k_j v_j is the same for all i, and is taken once.

    Args:
        query, key: (B, n, N, d).
        value: (B, n, N, e).
        temperature: t, broadcast to (n, 1, 1).
        floor: least denominator, above 0: it keeps the start of training stable.

    Returns:
        (B, n, N, e).
    """
    query, key = query.relu(), key.relu()
    total = (query @ key.sum(dim=-2).unsqueeze(-1)).clamp(min=floor)  # (B, n, N, 1)
    return query @ (key.transpose(-2, -1) @ value * temperature) / total


# ---- the parts -------------------------------------------------------------------------------------------------------


class GlobalAttention(nn.Module):
    """Attention of all places, linear as published, or softmax for comparison.

    Args:
        dim: C.
        num_heads: n, a divisor of C.
        kind: one of ``ATTENTIONS``.
        floor: of ``linear_attention``.
    """

    def __init__(self, dim: int, num_heads: int, *, kind: str = "linear", floor: float = FLOOR) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.floor = floor
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        start = torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5)
        self.temperature = nn.Parameter(start) if kind == "linear" else None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of (B, H, W, C), each (B, n, N, d)."""
        split = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def weights(self, x: Tensor) -> Tensor:
        """Return how much each place attends to each, (B, n, N, N), to look at; rows sum to 1, or less at the floor.

        The temperature, which only scales what comes out, is left out.
        """
        query, key, _ = self.heads(x)
        if self.temperature is None:
            return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        scores = query.relu() @ key.relu().transpose(-2, -1)
        return scores / scores.sum(-1, keepdim=True).clamp(min=self.floor)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        query, key, value = self.heads(x)
        if self.temperature is None:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            out = linear_attention(query, key, value, self.temperature, self.floor)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class WindowAttention(nn.Module):
    """Softmax attention inside windows, without positions: the convolutions before it know them.

    A map that the windows do not divide is filled up with zeros at its right and lower edges; as published, these are
    places like any other.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        windows = to_windows(x, self.window)
        split = self.qkv(windows.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))  # (B w, L, 3, n, d)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(windows.shape)
        return from_windows(self.proj(out), *x.shape[1:3])


def _on_map(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a module of (B, C, H, W) makes of (B, H, W, C), in that order."""
    y: Tensor = module(x.permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1)


class PositionalEncoding(nn.Module):
    """The conditional positional encoding: a depthwise 3x3 convolution, added to what came in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        return x + _on_map(self.proj, x)


class LocalConcentration(nn.Module):
    """The local concentration module: two depthwise 7x7 convolutions with a GELU and a batch norm between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return self.conv2(self.bn(F.gelu(self.conv1(x))))


class LocalBlock(nn.Module):
    """Window attention, then a feed-forward layer, with an encoding of positions before each."""

    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float, *, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList(PositionalEncoding(dim) for _ in range(2))
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = self.cpe[0](x)
        x = self.cpe[1](x + self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GlobalBlock(nn.Module):
    """Linear attention of all places, the local concentration module, and a feed-forward layer.

    Args:
        dim: C.
        attn: the attention.
        mlp_ratio: hidden width of the feed-forward layer over C.
        concentration: whether there is the module, as published.
        drop_path: stochastic depth.
    """

    def __init__(
        self, dim: int, attn: GlobalAttention, mlp_ratio: float, *, concentration: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.cpe = PositionalEncoding(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm3 = nn.LayerNorm(dim) if concentration else None
        self.local_mp = LocalConcentration(dim) if concentration else None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = self.cpe(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.norm3 is not None and self.local_mp is not None:
            x = x + self.drop_path(_on_map(self.local_mp, self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A norm and a convolution that halves the size (neither in the first stage), then blocks.

    A map of an odd side is filled up with zeros at its right and lower edges.
    """

    def __init__(self, dim_in: int | None, dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.Identity() if dim_in is None else LayerNorm2d(dim_in, eps=1e-5)
        self.downsample = nn.Identity() if dim_in is None else nn.Conv2d(dim_in, dim, 2, 2)
        self.halves = dim_in is not None
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.norm(x)
        x = self.downsample(_filled(x, 2) if self.halves else x)
        return through_blocks(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _filled(x: Tensor, multiple: int) -> Tensor:
    """Fill up (B, C, H, W) at its right and lower edges."""
    below, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    return F.pad(x, (0, right, 0, below)) if below or right else x


# ---- the net ---------------------------------------------------------------------------------------------------------


class L2ViT(StagedNet):
    """L2ViT with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Blocks of a stage are local and global in turn; the first is local.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dims: width C of the four stages.
        depths: blocks of the four stages.
        num_heads: heads of each stage, which divide its width.
        window: side of the windows, in places.
        mlp_ratio: hidden width of the feed-forward layers over C.
        attention: of the global blocks, one of ``ATTENTIONS``; ``"linear"`` as published.
        concentration: whether global blocks have the local concentration module, as published.
        floor: least denominator of the linear attention, above 0.
        stem_stride: 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, heads that do not divide a width, a kind of attention that there is not,
            a window, floor, stride or pooling that is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        attention: str = "linear",
        concentration: bool = True,
        floor: float = FLOOR,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages(stem_stride, dims=dims, depths=depths, num_heads=num_heads)
        for dim, heads in zip(dims, num_heads, strict=True):
            if heads < 1 or dim % heads:
                raise InputError(f"num_heads = {heads} does not divide a width of {dim}: give a divisor of it")
        if attention not in ATTENTIONS:
            raise unknown("attention", attention, ATTENTIONS)
        if window < 1:
            raise InputError(f"window = {window} is not allowed: give 1 place or more")
        if not floor > 0:
            raise InputError(f"floor = {floor} is not allowed: give a number above 0, such as {FLOOR:g}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem_stride = stem_stride
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0] // 2, 3, 2, 1),
            nn.BatchNorm2d(dims[0] // 2),
            nn.ReLU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, stem_stride // 2, 1),
            nn.BatchNorm2d(dims[0]),
            LayerNorm2d(dims[0], eps=1e-5),
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())

        def block(number: int, dim: int, heads: int) -> nn.Module:
            if number % 2 == 0:
                return LocalBlock(dim, heads, window, mlp_ratio, drop_path=next(rates))
            attn = GlobalAttention(dim, heads, kind=attention, floor=floor)
            return GlobalBlock(dim, attn, mlp_ratio, concentration=concentration, drop_path=next(rates))

        stages: list[Stage] = []
        self.feature_info = []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            blocks = [block(number, dim, heads) for number in range(depth)]
            stages.append(Stage(dims[i - 1] if i else None, dim, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(self.num_features, eps=1e-5)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        return self.norm(self.stages(self.stem(_filled(x, self.stem_stride))))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- the author's weights --------------------------------------------------------------------------------------------

_AUTHOR = (
    (r"^module\.", ""),
    (r"^downsample_layers\.0\.proj\.proj\.", "stem."),
    (r"^downsample_layers\.0\.norm\.", "stem.5."),
    (r"^downsample_layers\.(\d)\.norm\.", r"stages.\1.norm."),
    (r"^downsample_layers\.(\d)\.proj\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the author's weights under our names."""
    state = state_dict.get("model", state_dict)
    if "stem.0.weight" in state:
        return state
    local = {name for name, module in model.named_modules() if isinstance(module, LocalBlock)}
    ours = {}
    for key, value in state.items():
        for pattern, name in _AUTHOR:
            key = re.sub(pattern, name, key)
        block, _, rest = key.partition(".cpe.0.")
        # A global block has one encoding, which stands in a list in the author's code.
        ours[f"{block}.cpe.{rest}" if rest and block not in local else key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


_OWN: dict[str, Any] = {"crop_pct": 0.875}
default_cfgs = generate_default_cfgs(
    {
        "l2vit_nano": nano_cfg(),
        "l2vit_tiny": cfg(**_OWN),
        "l2vit_small": cfg(**_OWN),
        "l2vit_base": cfg(**_OWN),
        "l2vit_base_384": cfg(384, crop_mode="squash"),
    }
)
_B: dict[str, Any] = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> L2ViT:
    net: L2ViT = create(L2ViT, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def l2vit_nano(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """0.6 M parameters, for images of 16 to 64 pixels; ours, not the paper's: its few places want a lower floor."""
    own = {"dims": (16, 32, 64, 128), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window": 4}
    return _create("l2vit_nano", pretrained, **{**own, "floor": 1.0, "stem_stride": 2, **kwargs})


@register_model
def l2vit_tiny(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """29 M parameters."""
    return _create("l2vit_tiny", pretrained, **kwargs)


@register_model
def l2vit_small(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """50 M parameters."""
    return _create("l2vit_small", pretrained, **{"depths": (2, 2, 18, 2), **kwargs})


@register_model
def l2vit_base(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """89 M parameters; trained with stochastic depth 0.3."""
    return _create("l2vit_base", pretrained, **{**_B, **kwargs})


@register_model
def l2vit_base_384(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """89 M parameters, with the windows of images of 384 pixels; tuned with stochastic depth 0.2."""
    return _create("l2vit_base_384", pretrained, **{**_B, "window": 12, **kwargs})
