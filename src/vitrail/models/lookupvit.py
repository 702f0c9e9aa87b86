"""LookupViT: few compressed tokens are thought over, and many lookup tokens are only looked up.

Koner, Jain, Jain, Tresp, Paul, "LookupViT: Compressing visual information to a limited number of tokens" (ECCV 2024),
arXiv 2407.12753; no code is published. A block gathers from the lookup tokens, refines what the compressed ones have,
and infuses it back by the same attention weights. Compressed tokens begin as the image's features at a smaller size, so
that one net has any number of them. A training of both classifiers is ``vitrail.methods.supervised.lookup_training``.

Shapes: B images or clips, N lookup tokens on a grid (h, w) or (t, h, w), M compressed tokens on a smaller one, C
channels, n heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block as Refinement
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.models.plain import PlainNet, State, create_plain, padded, plain_cfg, plain_nano_cfg

Grid = tuple[int, ...]
_NORM: Any = partial(nn.LayerNorm, eps=1e-6)

# ---- from one grid to another ----------------------------------------------------------------------------------------


@cache
def _along(before: int, after: int) -> np.ndarray:
    """Return (after, before): the weights of linear interpolation, averaging as widely as the grid gets coarser."""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - abs(np.arange(before) - centres[:, None]) / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


@cache
def _between(before: Grid, after: Grid) -> np.ndarray:
    """Return (M, N), the weights from one grid's places to another's."""
    weights = np.ones((1, 1))
    for old, new in zip(before, after, strict=True):
        weights = np.kron(weights, _along(old, new))
    return weights


def resized(x: Tensor, before: Grid, after: Grid) -> Tensor:
    """Return (B, M, C), the places (B, N, C) of a grid interpolated for another, linearly along each axis."""
    if before == after:
        return x
    return torch.tensor(_between(before, after), dtype=x.dtype, device=x.device) @ x


# ---- the block -------------------------------------------------------------------------------------------------------


class BidirectionalAttention(nn.Module):
    """Multi-head bidirectional cross-attention: compressed tokens ask lookup tokens, and answer by the same weights.

    Args:
        dim: C.
        num_heads: n, a divisor of it.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.gather_proj = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.infuse_proj = nn.Linear(dim, dim)

    def gather(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """Return what compressed tokens (B, M, C) learn from lookup tokens (B, N, C), and the weights (B, n, M, N)."""
        query = self._heads(self.query(compressed))
        key, value = (self._heads(x) for x in self.key_value(lookup).chunk(2, -1))
        weights = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1)
        return self.gather_proj((weights @ value).transpose(1, 2).flatten(2)), weights

    def infuse(self, compressed: Tensor, weights: Tensor) -> Tensor:
        """Return what lookup tokens get from compressed ones, (B, N, C): each by what it was asked for."""
        value = self._heads(self.value(compressed))
        return self.infuse_proj((weights.mT @ value).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Gather, refine, infuse: the refinement is a transformer's block, and lookup tokens get a thin feed-forward layer.

    It takes (3 N M + 2 M M) C + (4 N + 15 M) C C multiply-adds with the published ratios.

    Args:
        dim: C.
        num_heads: n.
        mlp_ratio: hidden width of the compressed tokens' feed-forward layer over C.
        lookup_ratio: the same of the lookup tokens.
        drop_path: stochastic depth.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, lookup_ratio: float, *, drop_path: float) -> None:
        super().__init__()
        self.norm_compressed = _NORM(dim)
        self.norm_lookup = _NORM(dim)
        self.cross = BidirectionalAttention(dim, num_heads)
        self.refine = Refinement(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=drop_path, norm_layer=_NORM)
        self.norm_infuse = _NORM(dim)
        self.norm_mlp = _NORM(dim)
        self.mlp = Mlp(dim, int(dim * lookup_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, lookup: Tensor, compressed: Tensor) -> State:
        """Return both sets of tokens, (B, N, C) and (B, M, C)."""
        gathered, weights = self.cross.gather(self.norm_compressed(compressed), self.norm_lookup(lookup))
        compressed = self.refine(compressed + self.drop_path(gathered))
        lookup = lookup + self.drop_path(self.cross.infuse(self.norm_infuse(compressed), weights))
        return lookup + self.drop_path(self.mlp(self.norm_mlp(lookup))), compressed


# ---- the net ---------------------------------------------------------------------------------------------------------


class LookupViT(PlainNet):
    """LookupViT with timm's surface, for images (B, C, H, W) or clips (B, C, T, H, W) of any size.

    A prediction is the mean of two classifiers: of the mean compressed token, and of the mean lookup token. Maps of
    features are those of the lookup tokens.

    Args:
        img_size: side in pixels for which there are positions; those of other sizes are interpolated.
        patch_size: side of a patch in pixels.
        in_chans: input channels.
        num_classes: outputs of each classifier; 0 leaves them off.
        frames: None for images; else the frames of a clip for which there are positions.
        tubelet: frames of a patch of a clip.
        embed_dim: C.
        depth: blocks.
        num_heads: n, a divisor of C.
        mlp_ratio: hidden width of the compressed tokens' feed-forward layers over C.
        lookup_ratio: the same of the lookup tokens.
        compressed: grid of the compressed tokens, (rows, columns), or (times, rows, columns) of clips.
        train_compressed: grids of which each batch in training gets one by chance; none is ``compressed`` alone.
        drop_rate: dropout before the classifiers, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: sizes below 1, heads that do not divide C, or grids with another number of sides.
    """

    BEFORE = r"^(?:patch_embed|lookup_pos|compressed_pos)"
    NORM = "norm_lookup"

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        frames: int | None = None,
        tubelet: int = 2,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        lookup_ratio: float = 0.5,
        compressed: Sequence[int] = (7, 7),
        train_compressed: Sequence[Sequence[int]] = (),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "tubelet": tubelet,
        }
        if frames is not None:
            sizes["frames"] = frames
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        if num_heads < 1 or embed_dim % num_heads:
            raise InputError(f"num_heads = {num_heads} does not divide a width of {embed_dim}: give a divisor of it")
        if int(embed_dim * min(mlp_ratio, lookup_ratio)) < 1:
            raise InputError(
                f"mlp_ratio = {mlp_ratio} and lookup_ratio = {lookup_ratio} are not allowed: give ratios that leave a "
                f"hidden width of 1 or more of {embed_dim}"
            )
        whole = (img_size, img_size) if frames is None else (frames, img_size, img_size)
        self.patch: Grid = (patch_size, patch_size) if frames is None else (tubelet, patch_size, patch_size)
        self.grid: Grid = tuple(-(-size // side) for size, side in zip(whole, self.patch, strict=True))
        self.own: Grid = self._checked(compressed)
        self.compressed = self.own
        self.train_compressed = tuple(self._checked(grid) for grid in train_compressed)
        self.num_features, self.head_hidden_size = embed_dim, 2 * embed_dim
        convolution: Any = nn.Conv2d if frames is None else nn.Conv3d
        self.patch_embed = convolution(in_chans, embed_dim, self.patch, self.patch)
        self.lookup_pos = nn.Parameter(torch.zeros(1, math.prod(self.grid), embed_dim))
        self.compressed_pos = nn.Parameter(torch.zeros(1, math.prod(self.own), embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, lookup_ratio, drop_path=rate) for rate in rates
        )
        self.norm_lookup: nn.Module = _NORM(embed_dim)
        self.norm_compressed: nn.Module = _NORM(embed_dim)
        self.drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self.apply(_init_weights)
        for positions in (self.lookup_pos, self.compressed_pos):
            trunc_normal_(positions, std=0.02)
        self.reset_classifier(num_classes)

    # ---- tokens

    def set_compressed(self, grid: Sequence[int]) -> None:
        """Choose the grid of the compressed tokens from now on: fewer of them cost less.

        Args:
            grid: (rows, columns), or (times, rows, columns) of clips.

        Raises:
            InputError: a grid of another number of sides, or a side below 1.
        """
        self.compressed = self._checked(grid)

    def _checked(self, grid: Sequence[int]) -> Grid:
        sides = tuple(grid) if isinstance(grid, Sequence) else ()
        if len(sides) != len(self.patch) or any(not isinstance(side, int) or side < 1 for side in sides):
            wanted = "(rows, columns)" if len(self.patch) == 2 else "(times, rows, columns)"
            raise InputError(f"compressed = {sides or grid} is not allowed: give {wanted}, each 1 or more")
        return sides

    def begin(self, x: Tensor) -> tuple[State, Grid]:
        """Return lookup and compressed tokens with their positions, and the grid of the lookup tokens."""
        if x.ndim != len(self.patch) + 2:
            sides = "height, width" if len(self.patch) == 2 else "frames, height, width"
            raise InputError(
                f"an input of shape {tuple(x.shape)} does not suit this net: give (batch, channels, {sides})"
            )
        x = self.patch_embed(padded(x, self.patch))
        grid: Grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        few = self.compressed
        if self.training and self.train_compressed:
            few = self.train_compressed[int(torch.randint(len(self.train_compressed), ()))]
        lookup = x + resized(self.lookup_pos, self.grid, grid)
        return (lookup, resized(x, grid, few) + resized(self.compressed_pos, self.own, few)), grid

    def places(self, state: State, grid: Grid) -> Tensor:
        """Return the lookup tokens."""
        found: Tensor = state[0]
        return found

    def end(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the normed tokens: compressed, then lookup."""
        lookup, compressed = state
        return self.norm_compressed(compressed), self.norm_lookup(lookup)

    # ---- classifiers

    def no_weight_decay(self) -> set[str]:
        """Return patterns of tensors that are not decayed: positions."""
        return {"lookup_pos", "compressed_pos"}

    def get_classifier(self) -> nn.Module:
        """Return the classifiers, of the compressed and of the lookup tokens."""
        return nn.ModuleList((self.head, self.head_lookup))

    def reset_classifier(self, num_classes: int) -> None:  # type: ignore[override]  # no choice of pooling
        """Replace the classifiers, on the device and in the type of the present weights.

        Args:
            num_classes: outputs of each; 0 leaves the mean compressed token beside the mean lookup token, (B, 2 C).
        """
        super().reset_classifier(num_classes)

    def put_head(self) -> None:
        """Set both classifiers."""
        super().put_head()
        self.head_lookup = self.linear_head() if self.num_classes else nn.Identity()

    def linear_head(self) -> nn.Linear:
        """Return a new classifier, which begins as the other layers."""
        place = self.lookup_pos
        head = nn.Linear(self.num_features, self.num_classes, device=place.device, dtype=place.dtype)
        _init_weights(head)
        return head

    def both(self, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what each classifier says of normed tokens: the compressed tokens', then the lookup tokens'."""
        compressed, lookup = (self.drop(tokens.mean(1)) for tokens in features)
        return self.head(compressed), self.head_lookup(lookup)

    def forward_head(self, x: tuple[Tensor, Tensor], pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or with ``pre_logits`` both mean tokens side by side (B, 2 C)."""
        if pre_logits or not self.num_classes:
            return torch.cat([tokens.mean(1) for tokens in x], 1)
        first, second = self.both(x)
        return (first + second) / 2


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.flatten(1))  # a patch is a vector: the view is of the weight itself
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- the variants ----------------------------------------------------------------------------------------------------

default_cfgs = generate_default_cfgs(
    {
        "lookupvit_nano": plain_nano_cfg(classifier=("head", "head_lookup")),
        "lookupvit_base": plain_cfg(classifier=("head", "head_lookup")),
        "lookupvit_large": plain_cfg(classifier=("head", "head_lookup")),
        "lookupvit_base_video": plain_cfg(classifier=("head", "head_lookup")),
    }
)
_LARGE: dict[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_VIDEO: dict[str, Any] = {"frames": 32, "tubelet": 2, "compressed": (8, 7, 7)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> LookupViT:
    net: LookupViT = create_plain(LookupViT, variant, pretrained, **kwargs)
    return net


@register_model
def lookupvit_nano(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "compressed": (4, 4)}
    return _create("lookupvit_nano", pretrained, **{**own, **kwargs})


@register_model
def lookupvit_base(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """B/16: as wide and deep as ViT-B, of 49 compressed tokens unless told otherwise."""
    return _create("lookupvit_base", pretrained, **kwargs)


@register_model
def lookupvit_large(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """L/16: as wide and deep as ViT-L, of 49 compressed tokens unless told otherwise."""
    return _create("lookupvit_large", pretrained, **{**_LARGE, **kwargs})


@register_model
def lookupvit_base_video(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """B/16x2 for clips (B, C, T, H, W), of patches of 16 x 16 pixels of two frames."""
    return _create("lookupvit_base_video", pretrained, **{**_VIDEO, **kwargs})
