"""DeiT III: plain vision transformers that learn from supervision alone, with scaled layers and stochastic depth.

Touvron, Cord, Jégou, "DeiT III: Revenge of the ViT" (ECCV 2022), arXiv 2204.07118, and the authors' code
(facebookresearch/deit). Most of the paper is how to train, which the shipped recipes ``deit3``, ``deit3_finetune`` and
``deit3_large_data`` say. The nets are timm's vision transformer; here they begin as published, drop every block alike
in training, take images of any size, and load weights that were learned at another resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.positions import resampled
from vitrail.models.staged import cfg, nano_cfg

FIXED = {"class_token", "dynamic_img_pad", "dynamic_img_size", "no_embed_class", "pos_embed", "reg_tokens"}
"""Options of timm's class that make a DeiT III."""
POOLINGS = ("", "avg", "avgmax", "max", "token")


class DeiT3(VisionTransformer):
    """timm's vision transformer as DeiT III has it, for images of any size.

    A class token joins the patches behind their embedded positions; what attention and the feed-forward net add is
    scaled channel by channel, and left out as often in every block. Images are filled with zeros, below and to the
    right, to whole patches, and positions are interpolated to the patches that there are.

    Args:
        img_size: side in pixels that the positions are learned for, or height and width.
        patch_size: side of a patch.
        embed_dim: width C.
        depth: blocks.
        num_heads: heads, which divide the width.
        drop_path_rate: share of the images that skip an addition, in [0, 1), the same for all blocks.
        init_values: what the scales of layers begin with.
        global_pool: ``token``, ``avg``, ``avgmax``, ``max``, or ``""`` with ``num_classes = 0``.
        **kwargs: as for ``timm.models.vision_transformer.VisionTransformer``, but for ``FIXED``.

    Raises:
        InputError: an option that is fixed here or out of range, or a pooling that does not exist.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_path_rate: float = 0.0,
        init_values: float = 1e-4,
        global_pool: str = "token",
        **kwargs: Any,
    ) -> None:
        fixed = FIXED & set(kwargs)
        if fixed:
            raise InputError(f"deit3: {min(fixed)} is fixed here: leave it out, or use one of timm's deit3_*")
        if not 0 <= drop_path_rate < 1:
            raise InputError(f"deit3: drop_path_rate = {drop_path_rate!r} is not allowed: give a number in [0, 1)")
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if min(*size, patch_size, depth) < 1:
            raise InputError(
                f"deit3: img_size = {img_size}, patch_size = {patch_size} and depth = {depth} are not allowed: give 1 "
                "pixel and block or more"
            )
        if num_heads < 1 or embed_dim % num_heads:
            raise InputError(
                f"deit3: num_heads = {num_heads} does not divide embed_dim = {embed_dim}: give a divisor of it"
            )
        net: Any = super().__init__  # timm names the poolings that it takes, which _pool has checked
        net(
            img_size=tuple(-(-side // patch_size) * patch_size for side in size),
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            init_values=init_values,
            global_pool=_pool(global_pool, kwargs.get("num_classes", 1000)),
            no_embed_class=True,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            **kwargs,
        )
        # timm's own nets drop later blocks more often.
        for block in self.blocks if drop_path_rate else ():
            block.drop_path1, block.drop_path2 = DropPath(drop_path_rate), DropPath(drop_path_rate)
        trunc_normal_(self.cls_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of more than one dimension that are not decayed."""
        return {"pos_embed", "cls_token"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: outputs; 0 leaves the pooled features.
            global_pool: as in the constructor; None leaves it. ``""``, without classifier, gives ``forward_features``.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        kind = self.global_pool if global_pool is None else global_pool
        super().reset_classifier(num_classes, _pool(kind, num_classes))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Return tokens (B, 1 + h w, C), the class token first, of patches (B, h, w, C)."""
        token, positions = (
            cast(Tensor, self.cls_token),
            cast(Tensor, self.pos_embed),
        )  # other nets of timm may lack them
        own = positions.unflatten(1, self.patch_embed.grid_size)
        patches = (x + resampled(own, (x.shape[1], x.shape[2]))).flatten(1, 2)
        return self.pos_drop(torch.cat((token.expand(x.shape[0], -1, -1), patches), 1))


def _pool(kind: str, num_classes: int) -> str:
    if kind not in POOLINGS:
        raise InputError(f"deit3: global_pool = {kind!r} is not allowed: give {', '.join(POOLINGS[1:])} or ''")
    if not kind and num_classes:
        raise InputError("deit3: global_pool = '' is not allowed with a classifier: give num_classes = 0, or a pooling")
    return kind


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return weights of the authors, of timm or of ours under our names, with positions for the model's resolution.

    Args:
        state: a checkpoint, with or without ``model`` around it.
        model: the net that it is for.

    Raises:
        InputError: positions that are of no square image, as those of DeiT's first version, which count its token.
    """
    net: Any = model
    named = {
        key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): value
        for key, value in state.get("model", state).items()
    }
    positions, grid = named.get("pos_embed"), net.patch_embed.grid_size
    if positions is not None and positions.shape[1] != math.prod(grid):
        side = math.isqrt(positions.shape[1])
        if side**2 != positions.shape[1]:
            raise InputError(
                f"the checkpoint has {positions.shape[1]} positions, which are no square of patches: give a checkpoint "
                "of DeiT III that was trained on square images, or build the model with img_size of its training"
            )
        named["pos_embed"] = resampled(positions.unflatten(1, (side, side)), grid).flatten(1, 2)
    return named


_vit: dict[str, Any] = {
    "pool_size": None,
    "fixed_input_size": True,  # positions are learned for one, and interpolated for others
    "first_conv": "patch_embed.proj",
    "license": "apache-2.0",
}

SIZES: dict[str, dict[str, Any]] = {
    "nano": {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "medium": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}

default_cfgs = generate_default_cfgs(
    {f"deit3_{size}": nano_cfg(**_vit) if size == "nano" else cfg(**_vit) for size in SIZES}
)


def _create(size: str, pretrained: bool, **options: Any) -> DeiT3:
    depth = options.get("depth", SIZES[size]["depth"])
    model: DeiT3 = build_model_with_cfg(
        DeiT3,
        f"deit3_{size}",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(max(0, depth - 3), depth)), "feature_cls": "getter"},
        **{**SIZES[size], **options},
    )
    return model


@register_model
def deit3_nano(pretrained: bool = False, **kwargs: Any) -> DeiT3:
    """0.5 M parameters, for images of 28 to 64 pixels; ours, not the paper's."""
    return _create("nano", pretrained, **kwargs)


@register_model
def deit3_tiny(pretrained: bool = False, **kwargs: Any) -> DeiT3:
    """6 M parameters."""
    return _create("tiny", pretrained, **kwargs)


@register_model
def deit3_small(pretrained: bool = False, **kwargs: Any) -> DeiT3:
    """22 M parameters."""
    return _create("small", pretrained, **kwargs)


@register_model
def deit3_medium(pretrained: bool = False, **kwargs: Any) -> DeiT3:
    """39 M parameters."""
    return _create("medium", pretrained, **kwargs)


@register_model
def deit3_base(pretrained: bool = False, **kwargs: Any) -> DeiT3:
    """87 M parameters."""
    return _create("base", pretrained, **kwargs)


@register_model
def deit3_large(pretrained: bool = False, **kwargs: Any) -> DeiT3:
    """304 M parameters."""
    return _create("large", pretrained, **kwargs)


@register_model
def deit3_huge(pretrained: bool = False, **kwargs: Any) -> DeiT3:
    """632 M parameters, patches of 14 pixels."""
    return _create("huge", pretrained, **kwargs)
