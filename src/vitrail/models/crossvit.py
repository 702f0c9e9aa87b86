"""CrossViT: fine and coarse patches in two branches, which meet by their class tokens.

Chen, Fan, Panda, "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification" (ICCV 2021), arXiv
2103.14899, and the authors' code (IBM/CrossViT). After some blocks of its own, each branch lends its class token to the
other, where it attends to the patches and comes back. The nets are timm's; the nano is built from its class, for small
images and images of any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.crossvit import CrossVit
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.pooling import checked_pool
from vitrail.layers.positions import resampled

FORMATS = ("NCHW", "NLC")
POOLS = ("token", "avg")


class CrossViT(CrossVit):
    """timm's CrossViT of two branches, for images of any size.

    Images are filled with zeros, below and to the right, to whole patches of the coarse branch, and embedded positions
    are interpolated to the patches that there are. Both branches see the image at one scale.

    Args:
        img_size: side in pixels that the positions are learned for, or height and width.
        patch_size: sides of fine and coarse patches; the second is a multiple of the first.
        embed_dim: width of each branch.
        depth: of each multi-scale block: attention blocks of the branches, and of cross attention, 0 or 1 for one.
        num_heads: of each branch; they divide its width.
        mlp_ratio: hidden width over width, of each branch; a third, as published, is not used.
        global_pool: ``"token"`` or ``"avg"``.
        **kwargs: as for ``timm.models.crossvit.CrossVit``, but for ``img_scale`` and ``crop_scale``.

    Raises:
        InputError: patches, widths, heads or depths that do not go together, an option that is fixed here, or a pooling
            that does not exist.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: Sequence[int] = (8, 16),
        embed_dim: Sequence[int] = (192, 384),
        depth: Sequence[Sequence[int]] = ((1, 3, 1), (1, 3, 1), (1, 3, 1)),
        num_heads: Sequence[int] = (6, 12),
        mlp_ratio: Sequence[float] = (2.0, 2.0, 4.0),
        global_pool: str = "token",
        **kwargs: Any,
    ) -> None:
        _refuse_shape(patch_size, embed_dim, depth, num_heads, mlp_ratio)
        fixed = {"img_scale", "crop_scale", "multi_conv"} & set(kwargs)
        if fixed:
            raise InputError(f"crossvit: {min(fixed)} is fixed here: leave it out, or use one of timm's crossvit_*")
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if min(size) < 1:
            raise InputError(f"crossvit: img_size = {img_size} is not allowed: give 1 or more")
        net: Any = super().__init__  # timm annotates one side where it takes two
        net(
            img_size=tuple(-(-side // patch_size[1]) * patch_size[1] for side in size),
            patch_size=tuple(patch_size),
            embed_dim=tuple(embed_dim),
            depth=depth,
            num_heads=tuple(num_heads),
            mlp_ratio=tuple(mlp_ratio),
            global_pool=checked_pool(global_pool, 0, POOLS),
            **kwargs,
        )
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping what is inside them."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into groups by depth."""
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers of both branches.

        Args:
            num_classes: outputs; 0 leaves the pooled features of both, side by side.
            global_pool: as in the constructor; None leaves it.

        Raises:
            InputError: a pooling that does not exist.
        """
        if global_pool is not None:
            checked_pool(global_pool, 0, POOLS)
        super().reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Return the tokens of both branches, the class token first: (B, 1 + N, C) each."""
        branches, _ = self._embedded(x)
        for block in self.blocks:
            branches = self._through(block, branches)
        return [norm(tokens) for norm, tokens in zip(self.norm, branches)]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return what multi-scale blocks give for the patches, and the final features.

        Args:
            x: (B, in_chans, H, W).
            indices: with D blocks, 0 to D - 1 are those of the fine branch and D to 2 D - 1 of the coarse one; a number
                means as many of the last, None all.
            norm: whether the last norm of the branch is applied to each.
            stop_early: do not go on behind the last block of ``indices``.
            output_fmt: ``"NCHW"``, (B, C, h, w), or ``"NLC"``, (B, N, C).
            intermediates_only: return the list alone.

        Raises:
            InputError: another format.
        """
        if output_fmt not in FORMATS:
            raise InputError(f"crossvit: output_fmt = {output_fmt!r} is not allowed: give one of {', '.join(FORMATS)}")
        count = self.num_feature_blocks
        wanted, _ = feature_take_indices(2 * count, indices)
        last = max(index % count for index in wanted)
        branches, grids = self._embedded(x)
        found = {}
        for number, block in enumerate(self.blocks):
            if number > last and (stop_early or intermediates_only):
                break
            branches = self._through(block, branches)
            for side, (tokens, grid) in enumerate(zip(branches, grids)):
                if side * count + number in wanted:
                    patches = (self.norm[side](tokens) if norm else tokens)[:, 1:]
                    map_of = patches.mT.unflatten(2, grid) if output_fmt == "NCHW" else patches
                    found[side * count + number] = map_of.contiguous()
        taken = [found[index] for index in sorted(found)]
        return taken if intermediates_only else ([n(tokens) for n, tokens in zip(self.norm, branches)], taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leave out what the maps of ``indices`` do not depend on, and return which they are.

        With the classifiers goes what the class tokens do behind the last block that is left: no patch sees it.
        """
        wanted: list[int] = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.blocks[-1] = Apart(self.blocks[-1])
        return wanted

    def _embedded(self, x: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Return the tokens of both branches, the class token first, with their positions; and their grids."""
        embeds: Any = self.patch_embed
        coarse = embeds[1].patch_size[0]
        height, width = (-side % coarse for side in x.shape[-2:])
        if height or width:
            x = F.pad(x, (0, width, 0, height))
        branches, grids = [], []
        for number, embed in enumerate(embeds):
            token, positions = getattr(self, f"cls_token_{number}"), getattr(self, f"pos_embed_{number}")
            patches = embed.proj(x)  # (B, C, h, w)
            grid = (patches.shape[2], patches.shape[3])
            own = tuple(side // embed.patch_size[0] for side in embed.img_size)
            if grid != own:
                there = resampled(positions[:, 1:].unflatten(1, own), grid)
                positions = torch.cat((positions[:, :1], there.flatten(1, 2)), 1)
            tokens = torch.cat((token.expand(x.shape[0], -1, -1), patches.flatten(2).mT), 1)
            branches.append(self.pos_drop(tokens + positions))
            grids.append(grid)
        return branches, grids

    def _through(self, block: nn.Module, branches: list[Tensor]) -> list[Tensor]:
        return checkpoint(block, branches) if self.grad_checkpointing and self.training else block(branches)


class Apart(nn.Module):
    """The attention blocks of a multi-scale block, without the exchange of class tokens behind them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks: Any = block.blocks

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """Return the tokens of each branch."""
        return [block(tokens) for block, tokens in zip(self.blocks, branches)]


def _refuse_shape(patch_size: Any, embed_dim: Any, depth: Any, num_heads: Any, mlp_ratio: Any) -> None:
    """Raise InputError for a net that is not one of two branches."""
    for name, pair in (("patch_size", patch_size), ("embed_dim", embed_dim), ("num_heads", num_heads)):
        if not isinstance(pair, Sequence) or len(pair) != 2 or min(pair) < 1:
            raise InputError(f"crossvit: {name} = {pair} is not allowed: give two numbers of 1 or more, one a branch")
    if patch_size[1] % patch_size[0]:
        raise InputError(
            f"crossvit: patch_size = {tuple(patch_size)} is not allowed: give two sides, the second a multiple of the "
            "first"
        )
    for dim, heads in zip(embed_dim, num_heads):
        if dim % heads:
            raise InputError(f"crossvit: num_heads = {heads} does not divide embed_dim = {dim}: give a divisor of it")
    if not depth or not all(len(row) == 3 and min(row[:2]) >= 1 and row[2] >= 0 for row in depth):
        raise InputError(
            f"crossvit: depth = {depth} is not allowed: give each multi-scale block three numbers: attention blocks of "
            "the fine and of the coarse branch, 1 or more, and of cross attention, 0 or more"
        )
    if not isinstance(mlp_ratio, Sequence) or len(mlp_ratio) < 2 or min(mlp_ratio[:2]) * min(embed_dim) < 1:
        raise InputError(
            f"crossvit: mlp_ratio = {mlp_ratio} is not allowed: give one for each branch that leaves a hidden width"
        )


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the authors' weights under the names of timm's nets and ours.

    Args:
        state: a checkpoint, with or without ``model`` around it, as the authors saved it.
        model: the model that they are for.
    """
    parts = ("pos_embed.", "cls_token.")
    return {
        key.replace(".", "_", 1) if key.startswith(parts) else key: value
        for key, value in state.get("model", state).items()
    }


default_cfgs = generate_default_cfgs(
    {
        "crossvit_nano": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": ("patch_embed.0.proj", "patch_embed.1.proj"),
            "classifier": ("head.0", "head.1"),
            "license": "apache-2.0",
        }
    }
)


@register_model
def crossvit_nano(pretrained: bool = False, **kwargs: Any) -> CrossViT:
    """0.3 M parameters, for images of 28 to 64 pixels; ours, not the paper's.

    ``features_only`` gives the last map of the fine branch and that of the coarse one, at strides 4 and 8.
    """
    options: dict[str, Any] = {
        "img_size": 32,
        "patch_size": (4, 8),
        "embed_dim": (32, 64),
        "depth": ((1, 2, 0), (1, 2, 0)),
        "num_heads": (2, 2),
        "mlp_ratio": (3, 3, 1),
    }
    options |= kwargs
    blocks = len(options["depth"])
    model: CrossViT = build_model_with_cfg(
        CrossViT,
        "crossvit_nano",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (blocks - 1, 2 * blocks - 1), "feature_cls": "getter"},
        **options,
    )
    return model
