"""Swin: attention inside windows that every second block shifts, so that cost is linear in pixels; and its all-MLP kin.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021), arXiv 2103.14030. The
net is timm's ``SwinTransformer``; ours differ from it in their blocks, which take maps of any size: they are filled up
at their right and lower edges before they are shifted, and nobody attends to what was filled up. Where the windows
divide the map, as in the published nets at their own size, that is the same. Swin-Mixer, of the paper's appendix and of
the authors' code (microsoft/Swin-Transformer, models/swin_mlp.py), has a matrix for each head in place of attention.

Shapes: B images, H x W places, windows of h x w = N places, n heads, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import checkpoint_filter_fn as timms_filter
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.windows import from_windows, to_windows
from vitrail.models.staged import cfg, nano_cfg

MIXERS = ("attention", "mlp")

# ---- blocks ----------------------------------------------------------------------------------------------------------


class Block(SwinTransformerBlock):
    """timm's block, for maps of any size; a side of one window or less is not shifted."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        (tall, wide), shift = self.window_size, _shift(self.shift_size, x, self.window_size)
        full = (-(-height // tall) * tall, -(-width // wide) * wide)
        x = F.pad(x, (0, 0, 0, full[1] - width, 0, full[0] - height))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        strangers = _strangers((height, width), full, self.window_size, shift, x.device)
        windows = to_windows(x, self.window_size).flatten(1, 2)  # (B windows, N, C)
        x = from_windows(self._attend(windows, strangers, x.shape[0]).unflatten(1, (tall, wide)), *full)
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :height, :width]

    def _attend(self, x: Tensor, strangers: Tensor | None, batch: int) -> Tensor:
        """Attend inside windows: as timm's ``WindowAttention``, whose weights these are, with torch's fused kernel."""
        attention = self.attn
        qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = attention._get_rel_pos_bias()  # (1, n, N, N)
        if strangers is not None:
            # The windows of an image stand beside its heads, so that the bias need not be repeated for each image.
            bias = torch.where(strangers[:, None], bias.new_tensor(float("-inf")), bias).flatten(0, 1)[None]
            qkv = qkv.reshape(3, batch, -1, *qkv.shape[3:])  # (3, B, windows n, N, d)
        query, key, value = qkv.unbind(0)
        drop = attention.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), drop)
        y = y.reshape(x.shape[0], attention.num_heads, *y.shape[2:])
        return attention.proj_drop(attention.proj(y.transpose(1, 2).flatten(2)))


def _shift(shift: tuple[int, int], x: Tensor, window: tuple[int, int]) -> tuple[int, int]:
    """Return by how much a map (B, H, W, C) is shifted: nothing along a side that is one window or less."""
    down, across = (0 if side <= one else step for side, one, step in zip(x.shape[1:3], window, shift))
    return down, across


def _strangers(
    size: tuple[int, int], full: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Return which places (windows, N, N) of a window must not see which: those of another edge, and filled-up ones."""
    if size == full and not any(shift):
        return None
    kinds = []
    for side, whole, step in zip(size, full, shift):
        place = torch.arange(whole, device=device)
        # After the shift the last ``step`` places are those of the other edge.
        kinds.append((place >= whole - step) + 2 * ((place + step) % whole >= side).long())
    kind = 4 * kinds[0][:, None] + kinds[1]
    windows = to_windows(kind[None, :, :, None], window).flatten(1)
    return windows[:, :, None] != windows[:, None]


class MixerBlock(nn.Module):
    """Swin-Mixer's: in each window, a matrix for each head mixes the places; a shifted window begins outside the map.

    Args:
        dim: C.
        num_heads: n.
        window_size: (h, w).
        shift_size: places by which the windows are shifted.
        mlp_ratio: hidden width of the feed-forward layer over C.
        drop_path: stochastic depth, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        shift_size: tuple[int, int],
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.num_heads = num_heads
        places = num_heads * window_size[0] * window_size[1]
        self.norm1 = nn.LayerNorm(dim)
        # A convolution in the published code, whose shapes it keeps; as products of matrices it is faster.
        self.spatial_mlp = nn.Conv1d(places, places, 1, groups=num_heads)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = x + self.drop_path1(self._mix(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _mix(self, x: Tensor) -> Tensor:
        (tall, wide), shift = self.window_size, _shift(self.shift_size, x, self.window_size)
        before = [side - step if step else 0 for side, step in zip((tall, wide), shift)]
        x = F.pad(x, (0, 0, before[1], 0, before[0], 0))
        windows = to_windows(x, (tall, wide)).view(-1, tall * wide, self.num_heads, x.shape[3] // self.num_heads)
        heads = windows.permute(2, 0, 3, 1).flatten(1, 2)  # (n, B windows d, N)
        matrices = self.spatial_mlp.weight.view(self.num_heads, tall * wide, tall * wide).transpose(1, 2)
        bias = self.spatial_mlp.bias.view(self.num_heads, 1, tall * wide)  # type: ignore[union-attr]
        y = torch.baddbmm(bias, heads, matrices).unflatten(1, (-1, windows.shape[3])).permute(1, 3, 0, 2)
        y = y.reshape(-1, tall, wide, x.shape[3])
        return from_windows(y, *x.shape[1:3])[:, before[0] :, before[1] :]


# ---- the net ---------------------------------------------------------------------------------------------------------


class Swin(SwinTransformer):
    """timm's Swin with blocks for images of any size; features at strides of the patch, doubled from stage to stage.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        patch_size: side of a patch, in pixels.
        embed_dim: width C of the first stage; it doubles with each.
        depths: blocks of each stage.
        num_heads: of each stage; they divide its width.
        window_size: side of the windows in places, or one for each stage.
        mixer: one of ``MIXERS``.
        shift: whether every second block shifts its windows by half of them.
        mlp_ratio: hidden width of the feed-forward layers over C.
        global_pool: as in timm, such as ``"avg"``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: heads that do not divide a width, stages of several numbers, no window, or another mixer.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        mixer: str = "attention",
        shift: bool = True,
        mlp_ratio: float = 4.0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        windows = (window_size,) * len(depths) if isinstance(window_size, int) else tuple(window_size)
        _check(embed_dim, depths, num_heads, windows, mixer)
        embed: Any = partial(PatchEmbed, dynamic_img_pad=True)
        sides: Any = tuple((side, side) for side in windows)
        super().__init__(
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=(0,) * len(depths),  # the blocks are ours
            num_heads=tuple(num_heads),
            window_size=sides,
            strict_img_size=False,
            drop_rate=drop_rate,
            drop_path_rate=0.0,
            embed_layer=embed,
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for place, (stage, depth, heads, side) in enumerate(zip(self.layers, depths, num_heads, windows)):
            make: Callable[..., nn.Module] = MixerBlock
            if mixer == "attention":
                make = partial(Block, input_resolution=(side, side), always_partition=True, dynamic_mask=True)
            stage.blocks = nn.Sequential(
                *(
                    make(
                        dim=embed_dim * 2**place,
                        num_heads=heads,
                        window_size=(side, side),
                        shift_size=(side // 2 * (shift and number % 2),) * 2,
                        mlp_ratio=mlp_ratio,
                        drop_path=next(rates),
                    )
                    for number in range(depth)
                )
            )
        self.apply(_init_weights)


def _check(dim: int, depths: Sequence[int], heads: Sequence[int], windows: Sequence[int], mixer: str) -> None:
    if mixer not in MIXERS:
        raise unknown("mixer", mixer, MIXERS)
    if not len(depths) == len(heads) == len(windows):
        raise InputError(
            f"depths = {tuple(depths)}, num_heads = {tuple(heads)} and window_size = {tuple(windows)} are of several "
            "lengths: give one of each for every stage"
        )
    if min(windows) < 1:
        raise InputError(f"window_size = {min(windows)} is not allowed: give 1 place or more")
    for place, one in enumerate(heads):
        if one < 1 or dim * 2**place % one:
            raise InputError(f"num_heads = {one} does not divide a width of {dim * 2**place}: give a divisor of it")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv1d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, of Swin or Swin-Mixer, or timm's, under our names, which are timm's."""
    weights = state_dict.get("model", state_dict)
    weights = weights.get("state_dict", weights)
    return timms_filter({re.sub(r"^module\.", "", key): value for key, value in weights.items()}, model)


# ---- the variants ----------------------------------------------------------------------------------------------------


_PLACES: dict[str, Any] = {"first_conv": "patch_embed.proj", "classifier": "head.fc", "crop_pct": 0.9}
default_cfgs = generate_default_cfgs(
    {
        "swin_nano": nano_cfg(**{**_PLACES, "crop_pct": 1.0}),
        "swin_tiny": cfg(**_PLACES),
        "swin_small": cfg(**_PLACES),
        "swin_base": cfg(**_PLACES),
        "swin_large": cfg(**_PLACES),
        "swin_tiny_c24": cfg(256, **_PLACES),
        "swin_mixer_nano": nano_cfg(**{**_PLACES, "crop_pct": 1.0}),
        "swin_mixer_tiny_c24": cfg(256, **_PLACES),
        "swin_mixer_tiny_c12": cfg(256, **_PLACES),
        "swin_mixer_tiny_c6": cfg(256, **_PLACES),
        "swin_mixer_base": cfg(**_PLACES),
    }
)
_NANO: dict[str, Any] = {"patch_size": 2, "embed_dim": 16, "depths": (2, 2, 2, 2), "window_size": (4, 4, 4, 2)}
_DEEP: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {**_DEEP, "embed_dim": 128, "num_heads": (4, 8, 16, 32)}
_MIXER: dict[str, Any] = {"mixer": "mlp"}


def _heads(first: int) -> tuple[int, ...]:
    return tuple(first * 2**stage for stage in range(4))


def _create(variant: str, pretrained: bool, **options: Any) -> Swin:
    net: Swin = build_model_with_cfg(
        Swin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **options,
    )
    return net


@register_model
def swin_nano(pretrained: bool = False, **kwargs: Any) -> Swin:
    """0.6 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    return _create("swin_nano", pretrained, **{**_NANO, "num_heads": (1, 2, 4, 8), **kwargs})


@register_model
def swin_tiny(pretrained: bool = False, **kwargs: Any) -> Swin:
    """28 M parameters; trained with stochastic depth 0.2."""
    return _create("swin_tiny", pretrained, **kwargs)


@register_model
def swin_small(pretrained: bool = False, **kwargs: Any) -> Swin:
    """50 M parameters; trained with stochastic depth 0.3."""
    return _create("swin_small", pretrained, **{**_DEEP, **kwargs})


@register_model
def swin_base(pretrained: bool = False, **kwargs: Any) -> Swin:
    """88 M parameters; trained with stochastic depth 0.5. With ``window_size=12`` as trained at 384 pixels."""
    return _create("swin_base", pretrained, **{**_BASE, **kwargs})


@register_model
def swin_large(pretrained: bool = False, **kwargs: Any) -> Swin:
    """197 M parameters. With ``window_size=12`` as trained at 384 pixels."""
    return _create("swin_large", pretrained, **{**_DEEP, "embed_dim": 192, "num_heads": _heads(6), **kwargs})


@register_model
def swin_tiny_c24(pretrained: bool = False, **kwargs: Any) -> Swin:
    """28 M parameters, 24 channels in a head, windows of 8; what Swin-Mixer is compared with."""
    return _create("swin_tiny_c24", pretrained, **{"num_heads": _heads(4), "window_size": 8, **kwargs})


@register_model
def swin_mixer_nano(pretrained: bool = False, **kwargs: Any) -> Swin:
    """0.4 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    return _create("swin_mixer_nano", pretrained, **{**_NANO, **_MIXER, "num_heads": (1, 2, 4, 8), **kwargs})


@register_model
def swin_mixer_tiny_c24(pretrained: bool = False, **kwargs: Any) -> Swin:
    """20 M parameters, 24 channels in a head; trained with stochastic depth 0.2."""
    return _create("swin_mixer_tiny_c24", pretrained, **{**_MIXER, "num_heads": _heads(4), "window_size": 8, **kwargs})


@register_model
def swin_mixer_tiny_c12(pretrained: bool = False, **kwargs: Any) -> Swin:
    """21 M parameters, 12 channels in a head; trained with stochastic depth 0.2."""
    return _create("swin_mixer_tiny_c12", pretrained, **{**_MIXER, "num_heads": _heads(8), "window_size": 8, **kwargs})


@register_model
def swin_mixer_tiny_c6(pretrained: bool = False, **kwargs: Any) -> Swin:
    """23 M parameters, 6 channels in a head; trained with stochastic depth 0.2."""
    return _create("swin_mixer_tiny_c6", pretrained, **{**_MIXER, "num_heads": _heads(16), "window_size": 8, **kwargs})


@register_model
def swin_mixer_base(pretrained: bool = False, **kwargs: Any) -> Swin:
    """61 M parameters, 32 channels in a head; trained with stochastic depth 0.5."""
    return _create("swin_mixer_base", pretrained, **{**_BASE, **_MIXER, **kwargs})
