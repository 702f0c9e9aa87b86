"""Focal modulation: a query is multiplied by a summary of its surroundings, gathered before anything interacts.

Yang, Li, Dai, Gao, "Focal Modulation Networks" (NeurIPS 2022), arXiv 2203.11926. Attention lets every query meet every
key and then gathers values; focal modulation gathers first: depthwise convolutions, one after another, summarise ever
wider surroundings, gates weigh these levels at each place, and a linear layer makes the modulator of their sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, trunc_normal_
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError
from vitrail.layers.mixed_block import MixedSwinBlock


class FocalModulation(nn.Module):
    """y = W_y (q * h(sum over l = 1 .. L + 1 of G^l Z^l)): equations 4 to 6 of the paper, under the published names.

    Z^1 .. Z^L are the context after 1 .. L depthwise convolutions with GELU, Z^(L+1) is the GELU of the mean of Z^L
    over all places; the gates G and the query q are linear in the input. Tokens that stand at no place, such as a
    class token, see the mean alone, through a gate of their own.

    Args:
        dim: channels C.
        focal_window: side of the first convolution, odd.
        focal_level: convolutions L, 1 or more.
        focal_factor: what each convolution's side adds to the one before, even.
        grid: rows and columns of the places of tokens (B, N, C); not needed for maps.
        prefix: tokens before the places.
        proj_drop: dropout of the output, in [0, 1).
        normalize_modulator: divide the sum by L + 1.
        post_norm: normalise the modulated query, as in the largest published nets.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        dim: int,
        focal_window: int = 3,
        focal_level: int = 3,
        focal_factor: int = 2,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
        proj_drop: float = 0.0,
        normalize_modulator: bool = False,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        _refuse(focal_window, focal_level, focal_factor)
        self.grid, self.prefix = grid, prefix
        self.parts = [dim, dim, focal_level + 1]
        self.f = nn.Linear(dim, sum(self.parts))
        self.h = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        sides = [focal_window + focal_factor * level for level in range(focal_level)]
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim, bias=False), nn.GELU())
            for side in sides
        )
        self.ln = nn.LayerNorm(dim) if post_norm else nn.Identity()
        self.share = 1 / (focal_level + 1) if normalize_modulator else 1.0
        for linear in (self.f, self.proj):  # the convolutions begin as torch has them, as in the published code
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (B, H, W, C) or (B, N, C), as given.

        Raises:
            InputError: a mask, which focal modulation does not have, or tokens that do not fit the grid.
        """
        if attn_mask is not None or is_causal:
            raise InputError("focal modulation takes no attention mask: leave attn_mask and is_causal out")
        height, width, prefix = self._places(x)
        query, context, gates = self.f(x.flatten(1, -2)).split(self.parts, -1)  # (B, N, ...)
        context, levels = (
            part[:, prefix:].transpose(1, 2).unflatten(2, (height, width)) for part in (context, gates)
        )  # (B, C, H, W), (B, L + 1, H, W)
        total = torch.zeros_like(context)
        for level, layer in enumerate(self.focal_layers):
            context = layer(context)
            total = total + context * levels[:, level : level + 1]
        mean = F.gelu(context.mean((2, 3), keepdim=True))
        before = []
        if prefix:
            alone = self.share * mean * gates[:, None, :prefix, -1:]  # (B, C, prefix, 1)
            before = [self.h(alone)[..., 0]]
        # The last call is that of the map, which evaluate/modulator.py draws.
        placed = self.h(self.share * (total + mean * levels[:, -1:])).flatten(2)
        modulator = torch.cat((*before, placed), 2).transpose(1, 2)
        return self.proj_drop(self.proj(self.ln(query * modulator))).view(x.shape)

    def _places(self, x: Tensor) -> tuple[int, int, int]:
        """Return height, width and tokens that stand at no place."""
        if x.ndim == 4:
            return x.shape[1], x.shape[2], 0
        if self.grid is None or x.shape[1] != self.prefix + self.grid[0] * self.grid[1]:
            raise InputError(
                f"{x.shape[1]} tokens came to focal modulation for {self.prefix} + {self.grid} of them: give images of "
                "the size that the model had when it was edited, or edit one created with their img_size"
            )
        return *self.grid, self.prefix


def focal_modulation(
    *,
    focal_window: int = 3,
    focal_level: int = 3,
    focal_factor: int = 2,
    normalize_modulator: bool = False,
    post_norm: bool = False,
) -> Edit:
    """Return the edit that puts focal modulation in the place of the attention of a ViT's or Swin's blocks.

    New weights begin as published. A Swin then takes maps of any size, and needs no shifts, as modulation knows no
    windows.

    Args:
        focal_window: side of the first convolution, odd; 3 is published, 5 with three levels for the largest nets.
        focal_level: convolutions, 1 or more; 2, 3 and 4 are published.
        focal_factor: what each convolution's side adds to the one before, even; 2 is published.
        normalize_modulator: divide the sum of the levels by their number.
        post_norm: normalise the modulated query, as in the largest published nets.

    Raises:
        InputError: an argument out of range; or, from the edit, a model without such attention (the text lists what it
            has), or a ViT for images of changing size.

    Example:
        >>> model = focal_modulation()(timm.create_model("vit_tiny_patch16_224"))          # doctest: +SKIP
    """
    _refuse(focal_window, focal_level, focal_factor)

    def edit(model: Any) -> nn.Module:
        tokens: dict[str, Any] = {}
        if isinstance(model, VisionTransformer):
            if model.dynamic_img_size:
                raise InputError(
                    "focal_modulation: this ViT takes images of any size, and its blocks do not learn the shape of a "
                    "map: create it with dynamic_img_size=False and the img_size of your images"
                )
            tokens = {"grid": model.patch_embed.grid_size, "prefix": model.num_prefix_tokens}

        def matches(_: str, module: nn.Module) -> bool:
            return isinstance(module, SwinTransformerBlock) or (bool(tokens) and isinstance(module, Attention))

        def build(module: Any) -> nn.Module:
            swin = isinstance(module, SwinTransformerBlock)
            attention = module.attn if swin else module
            new = FocalModulation(
                module.dim if swin else model.embed_dim,
                focal_window,
                focal_level,
                focal_factor,
                proj_drop=attention.proj_drop.p,
                normalize_modulator=normalize_modulator,
                post_norm=post_norm,
                **tokens,
            ).to(next(module.parameters()).dtype)
            return MixedSwinBlock(module, new) if swin else new

        return replace_modules(model, matches, build, what="attention of a ViT and no block of Swin")

    return edit


def _refuse(focal_window: int, focal_level: int, focal_factor: int) -> None:
    for name, value, odd, least in (
        ("focal_window", focal_window, 1, 1),
        ("focal_factor", focal_factor, 0, 0),
    ):
        if not isinstance(value, int) or value < least or value % 2 != odd:
            kind = "an odd number from 1" if odd else "an even number from 0"
            raise InputError(f"focal_modulation: {name} = {value!r} is not allowed: give {kind}")
    if not isinstance(focal_level, int) or focal_level < 1:
        raise InputError(f"focal_modulation: focal_level = {focal_level!r} is not allowed: give a whole number from 1")
