"""VOLO: outlook attention, whose weights are a linear layer of the window's centre, before a transformer.

Yuan, Hou, Jiang, Feng, Yan, "VOLO: Vision Outlooker for Visual Recognition" (TPAMI 2022), arXiv 2106.13112, and the
authors' code (sail-sg/volo). The nets are timm's; the nano is built from its class, for small images and images of any
size. They are trained by token labelling, ``vitrail.methods.supervised.token_labelling``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.volo import VOLO, Downsample, PatchEmbed
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.positions import resampled

SCALE = 2
"""Patches along each side that become one place behind the outlookers."""


class PaddedPatchEmbed(PatchEmbed):
    """timm's embedding, of images filled with zeros, below and to the right, to whole places.

    Args:
        patch_size: 4, 8 or 16 pixels.
        **kwargs: as for ``timm.models.volo.PatchEmbed``.
    """

    def __init__(self, patch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(patch_size=patch_size, **kwargs)
        self.place = SCALE * patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H', W'), H' and W' even."""
        height, width = (-side % self.place for side in x.shape[-2:])
        return super().forward(F.pad(x, (0, width, 0, height)) if height or width else x)


class PlacedDownsample(Downsample):
    """timm's downsampling, and the embedding of positions that follows it, interpolated to the places that there are.

    Args:
        in_embed_dim: channels in.
        out_embed_dim: channels out, C.
        grid: rows and columns of places that the embedding is learned for.
        drop_rate: dropout behind the positions, in [0, 1).
        device, dtype: of the weights.
    """

    def __init__(
        self,
        in_embed_dim: int,
        out_embed_dim: int,
        grid: tuple[int, int],
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_embed_dim, out_embed_dim, SCALE, device=device, dtype=dtype)
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, out_embed_dim, device=device, dtype=dtype))
        trunc_normal_(self.pos_embed, std=0.02)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H', W', C)."""
        x = super().forward(x)
        return self.drop(x + resampled(self.pos_embed, (x.shape[1], x.shape[2])))


class Volo(VOLO):
    """timm's VOLO of one stage of outlookers, for images of any size.

    Args:
        layers: blocks of each stage, two stages or more; those of the first are outlookers.
        img_size: side in pixels that the embedding of positions is learned for, or height and width.
        patch_size: side and stride of the embedded patches: 4, 8 or 16.
        in_chans: input channels.
        stem_hidden_dim: channels of the convolutions before the patches.
        embed_dims: width of each stage.
        num_heads: of each stage; they divide its width.
        **kwargs: as for ``timm.models.volo.VOLO``, but for ``downsamples``, ``outlook_attention`` and
            ``pooling_scale``, which are the published, and ``use_mix_token``: MixToken is a part of token labelling.

    Raises:
        InputError: a patch size out of range, an image of no pixels, stages of several numbers, heads that do not
            divide a width, an option that is fixed here, or a pooling that does not exist.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 8,
        in_chans: int = 3,
        stem_hidden_dim: int = 64,
        embed_dims: tuple[int, ...] = (192, 384, 384, 384),
        num_heads: tuple[int, ...] = (6, 12, 12, 12),
        global_pool: str = "token",
        **kwargs: Any,
    ) -> None:
        fixed = {"downsamples", "outlook_attention", "pooling_scale", "use_mix_token"} & set(kwargs)
        if patch_size not in (4, 8, 16):
            raise InputError(f"volo: patch_size = {patch_size!r} is not allowed: give 4, 8 or 16")
        if fixed:
            raise InputError(
                f"volo: {min(fixed)} is fixed here: leave it out; method.name=volo:TokenLabelling is what mixes tokens"
            )
        if not len(layers) == len(embed_dims) == len(num_heads) > 1:
            raise InputError(
                f"volo: layers = {tuple(layers)}, embed_dims = {tuple(embed_dims)} and num_heads = {tuple(num_heads)} "
                "are not allowed: give one of each for every stage, of two stages or more"
            )
        for width, heads in zip(embed_dims, num_heads, strict=True):
            if heads < 1 or width % heads:
                raise InputError(f"volo: num_heads = {heads} does not divide a width of {width}: give a divisor of it")
        if global_pool not in ("token", "avg", ""):
            raise InputError(f"volo: global_pool = {global_pool!r} is not allowed: give token, avg or ''")
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if min(size) < 1:
            raise InputError(f"volo: img_size = {img_size} is not allowed: give 1 pixel or more")
        whole = [-(-side // (SCALE * patch_size)) * SCALE * patch_size for side in size]
        net: Any = super().__init__  # timm annotates one side where it takes two, and lists where it takes tuples
        net(
            layers,
            img_size=whole,
            in_chans=in_chans,
            global_pool=global_pool,
            patch_size=patch_size,
            stem_hidden_dim=stem_hidden_dim,
            embed_dims=embed_dims,
            num_heads=num_heads,
            pooling_scale=SCALE,
            **kwargs,
        )
        positions = self.pos_embed
        place = {"device": positions.device, "dtype": positions.dtype}
        # Behind the downsampling, where timm adds them too, positions can see how many places there are.
        self.network[1] = PlacedDownsample(
            embed_dims[0], embed_dims[1], (positions.shape[1], positions.shape[2]), self.pos_drop.p, **place
        )
        self.pos_embed = None  # type: ignore[assignment]
        self.patch_embed = PaddedPatchEmbed(
            patch_size=patch_size,
            img_size=whole[0],
            stem_conv=True,
            stem_stride=2,
            in_chans=in_chans,
            hidden_dim=stem_hidden_dim,
            embed_dim=embed_dims[0],
            **place,
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of matrices that are not decayed."""
        return {"network.1.pos_embed", "cls_token"}


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the authors' weights under the names of ``model``, positions interpolated to its own.

    Args:
        state: a checkpoint, with or without ``state_dict`` around it and ``module.`` before its names.
        model: a ``Volo``, or timm's VOLO.
    """
    ours = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
    name, own = next((key, value) for key, value in model.state_dict().items() if key.endswith("pos_embed"))
    ours[name] = resampled(ours.pop("pos_embed"), (own.shape[1], own.shape[2]))
    return ours


default_cfgs = generate_default_cfgs(
    {
        "volo_nano": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.conv.0",
            "classifier": ("head", "aux_head"),
            "license": "apache-2.0",
        }
    }
)


@register_model
def volo_nano(pretrained: bool = False, **kwargs: Any) -> Volo:
    """0.5 M parameters, for images of 28 to 64 pixels; ours, not the paper's.

    ``features_only`` gives the maps behind the outlookers and behind the transformer, at strides 4 and 8.
    """
    options = {
        "layers": (2, 1, 1, 1),
        "embed_dims": (48, 96, 96, 96),
        "num_heads": (3, 6, 6, 6),
        "stem_hidden_dim": 16,
        "patch_size": 4,
        "img_size": 32,
    }
    model: Volo = build_model_with_cfg(
        Volo,
        "volo_nano",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 3), "feature_cls": "getter"},
        **{**options, **kwargs},
    )
    return model
