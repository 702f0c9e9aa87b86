"""LBVim, which reads its patches one way at a time, and a head for bags of tiles, both with LBMamba's scan.

Zhang et al., "LBMamba: Locally Bi-directional Mamba" (TMLR 2025), arXiv 2506.15976, and the authors' code
(cvlab-stonybrook/LBMamba). Blocks read from the first and from the last patch in turn, so that two of them see all;
there is no class token. The head is MambaMIL (Yang et al., MICCAI 2024, arXiv 2403.06800; isyangshu/MambaMIL).

Shapes: B images or bags of N patches or tiles, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_, trunc_normal_tf_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.edits.lbmamba import LocalMamba
from vitrail.errors import InputError
from vitrail.layers.mamba import MambaBlock
from vitrail.models.vim import NANO, Vim, create_vim, vim_cfg, vim_nano_cfg
from vitrail.models.vim import checkpoint_filter_fn as vim_filter_fn


class LatentPool(nn.Module):
    """A learnt query attends to all places, (B, N, C) to (B, C); then a norm.

    Args:
        dim: C.
        num_heads: heads, which divide C.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"pool_heads = {num_heads} does not divide a width of {dim}: give a divisor of it")
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.kv = nn.Linear(dim, 2 * dim)
        self.post_norm = nn.LayerNorm(dim)
        trunc_normal_tf_(self.latent, std=dim**-0.5)
        trunc_normal_(self.kv.weight, std=0.02)
        nn.init.zeros_(self.kv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C)."""
        keys, values = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, n, N, d)
        query = self.latent.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).expand(x.shape[0], -1, -1, -1)
        return self.post_norm(F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(1))


class LBVim(Vim):
    """Vim with one locally bidirectional scan in a block, from the first patch and from the last in turn.

    Args:
        window: places of a window; None is as published, by the number of patches.
        pool_heads: heads of a learnt query that pools the patches; None takes their mean.
        **kwargs: as for ``Vim``, but for ``class_token``.
    """

    def __init__(self, *, window: int | None = None, pool_heads: int | None = None, **kwargs: Any) -> None:
        self.window = window
        super().__init__(class_token="none", **kwargs)
        self.attn_pool = None if pool_heads is None else LatentPool(self.num_features, pool_heads)

    def mixer(self, index: int, dim: int, states: int) -> nn.Module:
        """Return the mixer of the block ``index``."""
        return LocalMamba(dim, states=states, window=self.window, reverse=index % 2 == 1)

    def _pooled(self, x: Tensor) -> Tensor:
        return self.attn_pool(x) if self.attn_pool is not None and self.global_pool else super()._pooled(x)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """Return the authors' weights under our names."""
    ours = {}
    for key, value in vim_filter_fn(state_dict, model).items():
        key = key.replace("head.0.", "attn_pool.", 1) if key.startswith("head.0.") else key
        ours[key.replace("head.1.", "head.", 1) if key.startswith("head.1.") else key] = value
    return ours


class MambaMIL(nn.Module):
    """Classify a bag of tile features: a linear layer, blocks of LBMamba over the tiles, and attention that pools them.

    Tiles are read in the order that they are given in, from the first; the tiles of a bag in a batch are all real.

    Args:
        in_features: of a tile.
        num_classes: outputs.
        dim: C.
        depth: blocks.
        dropout: after the first layer, in [0, 1).
        window: places of a window; None is as published, by the number of tiles.

    Example:
        >>> logits = MambaMIL(1024, 2)(torch.randn(500, 1024))          # doctest: +SKIP
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dim: int = 512,
        depth: int = 2,
        dropout: float = 0.25,
        window: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes), ("dim", dim), ("depth", depth)):
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        self.in_features = in_features
        self.embed = nn.Sequential(nn.Linear(in_features, dim), nn.ReLU(), nn.Dropout(dropout))
        self.layers = nn.ModuleList(MambaBlock(LocalMamba(dim, window=window), nn.LayerNorm(dim)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.Sequential(nn.Linear(dim, 128), nn.Tanh(), nn.Linear(128, 1))
        self.classifier = nn.Linear(dim, num_classes)
        for module in self.modules():  # also the step sizes of the mixers, as in the authors' code
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled bag (B, C) and what each tile counts in it, (B, N), which adds up to 1.

        Args:
            bag: (B, N, in_features), or (N, in_features) for one bag.

        Raises:
            InputError: a bag of another shape, or without tiles.
        """
        bag = bag.unsqueeze(0) if bag.ndim == 2 else bag
        if bag.ndim != 3 or bag.shape[2] != self.in_features or not bag.shape[1]:
            raise InputError(
                f"a bag {tuple(bag.shape)} must be (B, N, {self.in_features}), or (N, {self.in_features}), with a tile "
                "or more"
            )
        x = self.embed(bag)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        weights = self.attention(x).squeeze(-1).softmax(-1)
        return (weights.unsqueeze(1) @ x).squeeze(1), weights

    def forward(self, bag: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.classifier(self.forward_features(bag)[0])


# ---- the variants ----------------------------------------------------------------------------------------------------

default_cfgs = generate_default_cfgs(
    {
        "lbvim_nano": vim_nano_cfg(),
        "lbvim_tiny": vim_cfg(),
        "lbvim_300": vim_cfg(),
        "lbvim_small": vim_cfg(),
        "lbvim_528": vim_cfg(),
        "lbvim_base": vim_cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Vim:
    return create_vim(LBVim, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def lbvim_nano(pretrained: bool = False, **kwargs: Any) -> Vim:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    return _create("lbvim_nano", pretrained, **{**NANO, **kwargs})


@register_model
def lbvim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """As wide as Vim's tiny net; trained with stochastic depth 0.05."""
    return _create("lbvim_tiny", pretrained, **kwargs)


@register_model
def lbvim_300(pretrained: bool = False, **kwargs: Any) -> Vim:
    """300 channels; trained with stochastic depth 0.05."""
    return _create("lbvim_300", pretrained, **{"embed_dim": 300, **kwargs})


@register_model
def lbvim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """As wide as Vim's small net; trained with stochastic depth 0.05."""
    return _create("lbvim_small", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def lbvim_528(pretrained: bool = False, **kwargs: Any) -> Vim:
    """528 channels, and a learnt query of 6 heads that pools; trained with stochastic depth 0.05."""
    return _create("lbvim_528", pretrained, **{"embed_dim": 528, "pool_heads": 6, **kwargs})


@register_model
def lbvim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """As wide as Vim's base net; the authors' code has none of this width."""
    return _create("lbvim_base", pretrained, **{"embed_dim": 768, **kwargs})
