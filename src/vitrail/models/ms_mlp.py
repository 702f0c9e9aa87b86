"""MS-MLP: a hierarchical net without attention, whose blocks shift groups of channels and mix them in regions.

Zheng et al., "Mixing and Shifting: Exploiting Global and Local Dependencies in Vision MLPs" (2022), arXiv 2202.06510,
and the authors' code (JegZheng/MS-MLP), with which the weights were trained. The farther a group of channels moves, the
larger is the region in which it is mixed.

Shapes: B images, H x W places, C channels. Stages take and return (B, C, H, W); inside they work on (B, H, W, C).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.mix_shift import MIX_SIZES, SHIFTS, MixShift
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks

# ---- the parts -------------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """One vector for each patch, normalised: a convolution with as large a stride as window.

    Images that the patches do not divide are filled up with zeros at their right and lower edges.
    """

    def __init__(self, dim_in: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim_in, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H / patch_size, W / patch_size)."""
        size = self.proj.stride[0]
        below, right = -x.shape[2] % size, -x.shape[3] % size
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Mix-shift, normalisation and feed-forward, added to what came in."""

    def __init__(
        self,
        dim: int,
        mix_sizes: Sequence[int],
        shifts: Sequence[int],
        mlp_ratio: float,
        *,
        drop_path: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.mix = MixShift(dim, mix_sizes, shifts)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        return x + self.drop_path(self.ls(self.mlp(self.norm(self.mix(x)))))


class Stage(nn.Module):
    """Patches of 2 x 2 places (none in the first stage), then blocks."""

    def __init__(self, dim_in: int | None, dim: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if dim_in is None else PatchEmbed(dim_in, dim, 2)
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return through_blocks(self, self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ---- the net ---------------------------------------------------------------------------------------------------------


class MSMLP(StagedNet):
    """MS-MLP with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        embed_dim: width C of the first stage; it doubles with each.
        depths: blocks per stage.
        mix_sizes: per stage, the side of the region of each group of channels, odd.
        shifts: places by which each group moves, in all stages.
        mlp_ratio: hidden width of the feed-forward layers over C.
        layer_scale: initial factor of each branch; 0 is none.
        patch_size: pixels of a side of the patches that the first stage begins with.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages or groups of different number, a width that the groups cannot cut, an even region, a patch
            of less than a pixel, or a pooling that there is not.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (3, 3, 9, 3),
        mix_sizes: Sequence[Sequence[int]] = MIX_SIZES,
        shifts: Sequence[int] = SHIFTS,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        patch_size: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(mix_sizes) != len(depths):
            raise InputError(
                f"mix_sizes has {len(mix_sizes)} entries and depths = {tuple(depths)} has {len(depths)}: give one for "
                "each stage"
            )
        if patch_size < 1:
            raise InputError(f"patch_size = {patch_size} is not allowed: give 1 pixel or more")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.stem = PatchEmbed(in_chans, embed_dim, patch_size)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        self.feature_info = []
        for i, (depth, sizes) in enumerate(zip(depths, mix_sizes)):
            dim = embed_dim * 2**i
            blocks = [
                Block(dim, sizes, shifts, mlp_ratio, drop_path=next(rates), layer_scale=layer_scale)
                for _ in range(depth)
            ]
            stages.append(Stage(dim // 2 if i else None, dim, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, 8 C, H/32, W/32)."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with ``pre_logits`` the pooled and then normalised features (B, 8 C)."""
        if not self.global_pool.pool_type:  # the normalisation is of pooled features
            return x
        pooled = self.norm(self.global_pool(x))
        return pooled if pre_logits else self.head(self.drop(pooled))


def _init_weights(module: nn.Module) -> None:
    # Convolutions begin as torch draws them.
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


_AUTHORS = (
    (r"^module\.", ""),
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.dwconv_lr\.", ".mix.across."),
    (r"\.dwconv_td\.", ".mix.down."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.gamma$", ".ls.gamma"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights under our names."""
    if "stem.proj.weight" in state_dict:
        return state_dict
    ours = {}
    for key, value in state_dict.get("model", state_dict).items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        # Their stage ends with the downsampling that ours begins with.
        found = re.match(r"layers\.(\d+)\.downsample\.(.+)", key)
        ours[f"stages.{int(found[1]) + 1}.downsample.{found[2]}" if found else key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {
        "ms_mlp_nano": nano_cfg(first_conv="stem.proj"),
        **{f"ms_mlp_{size}": cfg(crop_pct=0.875, first_conv="stem.proj") for size in ("tiny", "small", "base")},
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MSMLP:
    net: MSMLP = create(MSMLP, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def ms_mlp_nano(pretrained: bool = False, **kwargs: Any) -> MSMLP:
    """0.4 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"embed_dim": 24, "depths": (1, 1, 2, 1), "mlp_ratio": 2.0, "layer_scale": 1.0, "patch_size": 2}
    return _create("ms_mlp_nano", pretrained, **{**own, **kwargs})


@register_model
def ms_mlp_tiny(pretrained: bool = False, **kwargs: Any) -> MSMLP:
    """28 M parameters; trained with stochastic depth 0.1."""
    return _create("ms_mlp_tiny", pretrained, **kwargs)


@register_model
def ms_mlp_small(pretrained: bool = False, **kwargs: Any) -> MSMLP:
    """50 M parameters; trained with stochastic depth 0.4."""
    return _create("ms_mlp_small", pretrained, **{"depths": (3, 3, 27, 3), **kwargs})


@register_model
def ms_mlp_base(pretrained: bool = False, **kwargs: Any) -> MSMLP:
    """88 M parameters; trained with stochastic depth 0.5."""
    return _create("ms_mlp_base", pretrained, **{"embed_dim": 128, "depths": (3, 3, 27, 3), **kwargs})
