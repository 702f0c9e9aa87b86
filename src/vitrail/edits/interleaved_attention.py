"""Interleaved window attention in the place of a model's own attention: in classifiers, and in generators and on video.

Huo and Li, "Iwin Transformer: Hierarchical Vision Transformer using Interleaved Windows" (2025), arXiv 2507.18405, who
put it into the blocks of a diffusion transformer. Its cost grows with the places, where that of attention from
everywhere to everywhere grows with their square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError
from vitrail.layers.interleaved import InterleavedAttention, Window, sides
from vitrail.layers.mixed_block import MixedSwinBlock


def interleaved_attention(
    *, window: Window = 7, conv: bool = True, grid: Sequence[int] | None = None, prefix: int | None = None
) -> Edit:
    """Return the edit that puts interleaved window attention in the place of a ViT's, a Swin's or a generator's.

    It replaces timm's ``Attention``, of which ViTs and many diffusion transformers are made, and the windows of timm's
    Swin blocks, which then need no shifts. Projections are taken over, so that a trained model goes on from what it
    knew: where a window is the whole map, and the convolution gives zero, nothing changes.

    Args:
        window: places of a window along each axis, None for all; or one number, for height and width, with all times of
            a clip.
        conv: whether a depthwise convolution stands beside the attention, as published; the last block of a ViT that
            answers by its class token has none, which could not learn.
        grid: places of tokens along each axis: rows and columns, or times, rows and columns. None takes a ViT's own,
            and those of others for a square.
        prefix: tokens before the places; None takes a ViT's own number, and none of others.

    Raises:
        InputError: a window of no place or of other axes than the grid; or, from the edit, a model without such
            attention (the text lists what it has), one whose attention has a gate or another width, or a ViT for
            images of changing size.

    Example:
        >>> model = interleaved_attention(window=7)(timm.create_model("vit_tiny_patch16_224"))     # doctest: +SKIP
    """
    sides(window, grid if grid is not None else (1,) * (2 if isinstance(window, int) else len(window)))

    def edit(model: Any) -> nn.Module:
        tokens: dict[str, Any] = {"grid": grid, "prefix": prefix or 0}
        last = None
        if isinstance(model, VisionTransformer):
            if model.dynamic_img_size and grid is None:
                raise InputError(
                    "interleaved_attention: this ViT takes images of any size, and its blocks do not learn the shape "
                    "of a map: create it with dynamic_img_size=False and the img_size of your images, or name a grid"
                )
            tokens["grid"] = model.patch_embed.grid_size if grid is None else grid
            tokens["prefix"] = model.num_prefix_tokens if prefix is None else prefix
            # Of the last block only the class token is read, which no convolution reaches; a recursive one reads more.
            last = getattr(model.blocks[-1], "attn", None) if model.global_pool == "token" else None

        def build(module: Any) -> nn.Module:
            swin = isinstance(module, SwinTransformerBlock)
            attention = module.attn if swin else module
            weight = next(attention.qkv.parameters())
            dim = weight.shape[1]
            if getattr(attention, "gate", None) is not None or len(weight) != 3 * dim:
                raise InputError(
                    f"interleaved_attention: an attention of this {type(model).__name__} has a gate or heads that do "
                    "not make up its width: use a model without"
                )
            new = InterleavedAttention(
                dim,
                attention.num_heads,
                window,
                conv=conv and module is not last,
                attn_drop=attention.attn_drop.p,
                proj_drop=attention.proj_drop.p,
                **({} if swin else tokens),
            ).to(weight.dtype)
            new.qkv, new.proj = attention.qkv, attention.proj
            if not swin:
                new.q_norm, new.k_norm, new.norm = attention.q_norm, attention.k_norm, attention.norm
            return MixedSwinBlock(module, new) if swin else new

        return replace_modules(
            model,
            lambda _, module: isinstance(module, SwinTransformerBlock | Attention),
            build,
            what="attention of a ViT and no block of Swin",
        )

    return edit
