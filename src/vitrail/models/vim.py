"""Vim: a plain sequence of patches, mixed by state spaces that are scanned from both its ends.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model" (ICML 2024),
arXiv 2401.09417, and the authors' code (hustvl/Vim), with which the weights were trained. Several systems build on it.

Shapes: B images of N patches, h x w; L = N + 1 places with the class token; C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import lecun_normal_, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.mamba import BidirectionalMamba, MambaBlock, bidirectional_keys
from vitrail.models.plain import PlainNet, State, create_plain, plain_cfg, plain_nano_cfg

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
TOKENS = ("middle", "first", "none")
"""Where the class token is put among the patches."""
POOLS = ("token", "avg", "")


class PatchEmbed(nn.Module):
    """Patches as vectors, (B, C, h, w). An image that patches do not cover gets zeros at its right and lower edges.

    Args:
        in_chans: input channels.
        dim: C.
        size: side of a patch in pixels.
        stride: from patch to patch, in pixels.
    """

    def __init__(self, in_chans: int, dim: int, size: int, stride: int) -> None:
        super().__init__()
        for name, value in (("patch_size", size), ("stride", stride)):
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 pixel or more")
        self.size, self.stride = size, stride
        self.proj = nn.Conv2d(in_chans, dim, size, stride)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the patches in a column and in a row of an image."""
        rows, columns = (1 + -(-max(side - self.size, 0) // self.stride) for side in (height, width))
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, h, w)."""
        rows, columns = self.grid(*x.shape[2:])
        missing = [(count - 1) * self.stride + self.size for count in (columns, rows)]
        return self.proj(F.pad(x, (0, max(missing[0] - x.shape[3], 0), 0, max(missing[1] - x.shape[2], 0))))


class Vim(PlainNet):
    """Vim with timm's surface; features at one stride after any blocks, for images of any size.

    Args:
        img_size: side in pixels for which there are position embeddings; those of other sizes are interpolated.
        patch_size: side of a patch in pixels.
        stride: from patch to patch; None is ``patch_size``. Published finetuned weights have half of it.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        embed_dim: C.
        depth: blocks.
        states: of the scans.
        norm: of ``NORMS``.
        class_token: of ``TOKENS``.
        global_pool: ``"token"``, ``"avg"`` of the patches, or, only without classifier, ``""``; None is the class token
            where there is one.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: a norm, a token or a pooling that there is not, or a size that is not allowed.
    """

    BEFORE = r"^(?:cls_token|pos_embed|patch_embed)"
    BLOCKS = "layers"  # as the authors name them
    NORM = "norm_f"

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        states: int = 16,
        norm: str = "rms",
        class_token: str = "middle",
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS, f"there are {', '.join(NORMS)}")
        if class_token not in TOKENS:
            raise unknown("class_token", class_token, TOKENS, f"there are {', '.join(TOKENS)}")
        for name, value in (("img_size", img_size), ("embed_dim", embed_dim), ("depth", depth)):
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        self.num_features = self.head_hidden_size = embed_dim
        self.class_token = class_token
        self.num_prefix_tokens = int(class_token == "first")  # of what explains a result by its tokens
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, stride or patch_size)
        self.grid = self.patch_embed.grid(img_size, img_size)
        self.cls_token = None if class_token == "none" else nn.Parameter(torch.zeros(1, 1, embed_dim))
        places = self.grid[0] * self.grid[1] + (self.cls_token is not None)
        self.pos_embed = nn.Parameter(torch.zeros(1, places, embed_dim))  # in the order of the sequence
        # The authors' blocks drop what the block before them added, and so each its own rate; the same, said otherwise.
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.layers = nn.ModuleList(
            MambaBlock(self.mixer(index, embed_dim, states), NORMS[norm](embed_dim, eps=1e-5), drop_path=rate)
            for index, rate in enumerate(rates)
        )
        self.norm_f: nn.Module = NORMS[norm](embed_dim, eps=1e-5)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.patch_embed.stride, "module": f"layers.{index}"}
            for index in range(depth)
        ]
        self.drop = nn.Dropout(drop_rate)
        own = "avg" if self.cls_token is None else "token"
        self.reset_classifier(num_classes, own if global_pool is None else global_pool)
        self.init_weights()

    def mixer(self, index: int, dim: int, states: int) -> nn.Module:
        """Return the mixer of the block ``index``, from (B, L, C) to (B, L, C)."""
        return BidirectionalMamba(dim, states=states)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the first weights as published; the step sizes of the way back begin at softplus(0), not at Mamba's."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("mixer.out_proj.weight"):
                parameter.div_(len(self.layers) ** 0.5)
            if name.endswith("back.dt_proj.bias"):
                nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of tensors that are not decayed: with ``A_log`` at 0 all states forget at one pace."""
        return {"pos_embed", "*.A_log"} | ({"cls_token"} if self.cls_token is not None else set())

    def pools(self) -> tuple[str, ...]:
        """Return what ``global_pool`` may be."""
        return POOLS if self.cls_token is not None else POOLS[1:]

    # ---- from image to logits

    def begin(self, x: Tensor) -> tuple[State, tuple[int, int]]:
        """Return the sequence (B, L, C), the class token among the patches where it was put, and the patches' grid."""
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = _with_token(x, self.cls_token.expand(x.shape[0], -1, -1), self._place(x.shape[1]))
        return (x + self._positions(grid),), grid

    def pass_through(self, block: nn.Module, *state: Any) -> State:
        """Return the state after a block."""
        return (block(*state),)

    def places(self, state: State, grid: tuple[int, ...]) -> Tensor:
        """Return the patches."""
        return self._patches(state[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with ``pre_logits`` the pooled features (B, C)."""
        pooled = self._pooled(x)
        return pooled if pre_logits else self.head(self.drop(pooled))

    def _pooled(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            return x[:, self._place(x.shape[1] - 1)]
        return self._patches(x).mean(1) if self.global_pool else x

    def _patches(self, x: Tensor) -> Tensor:
        return x if self.cls_token is None else _without_token(x, self._place(x.shape[1] - 1))

    def _place(self, patches: int) -> int:
        """Return the patches before the class token."""
        return patches // 2 if self.class_token == "middle" else 0

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Return position embeddings (1, L, C) for a grid of patches."""
        return self.pos_embed if grid == self.grid else self.resized(self.pos_embed, self.grid, grid)

    def resized(self, positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """Return position embeddings (1, L, C) of one grid interpolated for another; the class token keeps its own."""
        patches = positions
        if self.cls_token is not None:
            patches = _without_token(positions, self._place(old[0] * old[1]))
        plane = patches.transpose(1, 2).unflatten(2, old).to(torch.promote_types(positions.dtype, torch.float32))
        plane = F.interpolate(plane, new, mode="bicubic", align_corners=False).to(positions.dtype)
        patches = plane.flatten(2).transpose(1, 2)
        if self.cls_token is None:
            return patches
        place = self._place(old[0] * old[1])
        return _with_token(patches, positions[:, place : place + 1], self._place(new[0] * new[1]))


def _with_token(x: Tensor, token: Tensor, place: int) -> Tensor:
    return torch.cat((x[:, :place], token, x[:, place:]), 1)


def _without_token(x: Tensor, place: int) -> Tensor:
    return torch.cat((x[:, :place], x[:, place + 1 :]), 1)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """Return the authors' weights under our names, their position embeddings interpolated where the grid is another."""
    ours = bidirectional_keys(state_dict.get("model", state_dict))
    positions = ours.get("pos_embed")
    if positions is not None and positions.shape[1] != model.pos_embed.shape[1]:
        side = round((positions.shape[1] - (model.cls_token is not None)) ** 0.5)
        ours["pos_embed"] = model.resized(positions, (side, side), model.grid)
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


def vim_cfg(**own: Any) -> dict[str, Any]:
    """Return what timm keeps of a published variant."""
    return plain_cfg(first_conv="patch_embed.proj", **own)


def vim_nano_cfg() -> dict[str, Any]:
    """Return what timm keeps of a variant of ours for small images."""
    return plain_nano_cfg(first_conv="patch_embed.proj")


NANO: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4}
default_cfgs = generate_default_cfgs(
    {"vim_nano": vim_nano_cfg(), "vim_tiny": vim_cfg(), "vim_small": vim_cfg(), "vim_base": vim_cfg()}
)


def create_vim(
    kind: type[Vim], variant: str, pretrained: bool, filter_fn: Any = checkpoint_filter_fn, **kwargs: Any
) -> Vim:
    """Build a variant of a net of this family as timm builds its own."""
    model: Vim = create_plain(kind, variant, pretrained, filter_fn, maps=3, **kwargs)
    return model


@register_model
def vim_nano(pretrained: bool = False, **kwargs: Any) -> Vim:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    return create_vim(Vim, "vim_nano", pretrained, **{**NANO, **kwargs})


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """7 M parameters; published weights trained with stochastic depth 0."""
    return create_vim(Vim, "vim_tiny", pretrained, **kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """26 M parameters; published weights trained with stochastic depth 0.05."""
    return create_vim(Vim, "vim_small", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """98 M parameters."""
    return create_vim(Vim, "vim_base", pretrained, **{"embed_dim": 768, **kwargs})
