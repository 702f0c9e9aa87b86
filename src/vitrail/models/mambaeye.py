"""MambaEye: a causal net that walks over the patches of an image, and has an answer after each.

Choi, Kim and Kim, "MambaEye: A Size-Agnostic Visual Encoder with Causal Sequential Processing" (CVPR 2026 Findings),
arXiv 2511.19963, and the authors' code (usingcolor/MambaEye). A step sees the pixels of one patch and the move that led
there, not the place: an image of any size, read in any order, is a walk. Its training is
``vitrail.methods.supervised.mambaeye_training``.

Shapes: B images, L steps, P pixels a patch's side, C channels inside. A position is the row and the column of a patch's
upper left pixel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.mamba import Memory
from vitrail.layers.mamba2 import Mamba2
from vitrail.layers.scan.orders import Order, inverse, raster, snake
from vitrail.models.plain import PlainNet, State, create_plain, plain_cfg, plain_nano_cfg

# ---- walks -----------------------------------------------------------------------------------------------------------


@cache
def spiral(shape: tuple[int, int]) -> Order:
    """Return the places of a grid from the middle outwards, ring after ring, each clockwise up to its left end."""
    rows, columns = np.divmod(np.arange(math.prod(shape)), shape[1])
    down, right = rows - (shape[0] - 1) // 2, columns - (shape[1] - 1) // 2
    ring = np.maximum(abs(down), abs(right))
    order: Order = np.lexsort((np.arctan2(down, right), ring))
    return order


@cache
def shuffled(shape: tuple[int, int]) -> Order:
    """Return the places of a grid in a random order, always the same for one shape."""
    order: Order = np.random.default_rng(shape).permutation(math.prod(shape))
    return order


WALKS: Mapping[str, Callable[[tuple[int, int]], Order]] = {
    "random": shuffled,
    "raster": raster,
    "columns": partial(raster, axes=(1, 0)),
    "reversed": lambda shape: raster(shape)[::-1],
    "snake": snake,
    "spiral": spiral,
}
"""Orders of the tiles of an image. Any other walk is given as positions."""


def tiles(height: int, width: int, patch: int) -> Tensor:
    """Return the positions of the patches that cover an image, in reading order, (L, 2).

    Where P divides no side, the last patches lie over those before them, as published, and inside the image.
    """
    sides = (torch.arange(0, side, patch).clamp(max=max(side - patch, 0)) for side in (height, width))
    return torch.cartesian_prod(*sides)


def cut(images: Tensor, positions: Tensor, patch: int) -> Tensor:
    """Return the pixels of patches, (B, L, channels P P), channel by channel.

    Args:
        images: (B, channels, H, W); sides below P are filled up with zeros.
        positions: (L, 2), or (B, L, 2) for walks that differ.
        patch: P.
    """
    images = F.pad(images, (0, max(patch - images.shape[3], 0), 0, max(patch - images.shape[2], 0)))
    places = _pixels(positions, images.shape[3], patch)  # (.., L, P P)
    images = images.flatten(2)
    if positions.ndim == 2:
        return images[..., places].transpose(1, 2).flatten(2)
    each = places.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)
    return images.gather(2, each).unflatten(2, (positions.shape[1], -1)).transpose(1, 2).flatten(2)


def moves_between(positions: Tensor) -> Tensor:
    """Return the moves (.., L, 2), in pixels down and to the right, that lead along positions; the first is none."""
    return torch.diff(positions, dim=-2, prepend=positions[..., :1, :]).to(torch.float32)


def seen_share(positions: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Return the share of an image's pixels that the patches up to each step have covered, in (0, 1], (.., L).

    Args:
        positions: (L, 2), or (B, L, 2).
        height, width: H and W, at least P.
        patch: P.
    """
    walks = positions if positions.ndim == 3 else positions.unsqueeze(0)
    length = walks.shape[1]
    places = _pixels(walks, width, patch)
    steps = torch.arange(length, device=places.device).view(1, length, 1).expand_as(places)
    first = torch.full((len(walks), height * width), length, device=places.device)  # the step that saw it first
    first.scatter_reduce_(1, places.flatten(1), steps.flatten(1), "amin")
    new = torch.zeros(len(walks), length + 1, device=places.device)
    new.scatter_add_(1, first, torch.ones_like(first, dtype=new.dtype))
    share = new[:, :length].cumsum(1) / (height * width)
    return share if positions.ndim == 3 else share[0]


def _pixels(positions: Tensor, width: int, patch: int) -> Tensor:
    """Return the pixels' numbers in an image of ``width`` columns, (.., L, P P)."""
    inside = torch.arange(patch, device=positions.device)
    rows, columns = (positions[..., axis, None] + inside for axis in (0, 1))
    return (rows.unsqueeze(-1) * width + columns.unsqueeze(-2)).flatten(-2)


def embed_moves(moves: Tensor, dim: int) -> Tensor:
    """Return sines, then cosines, of each axis of moves (.., 2) at frequencies 1 to almost 1 / 10000, (.., 2 dim).

    Args:
        moves: in pixels, of either sign.
        dim: numbers for one axis, even.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, device=moves.device, dtype=torch.float32) / dim)
    angles = moves.to(torch.float32).unsqueeze(-1) * frequencies  # (.., 2, dim / 2)
    return torch.cat((angles.sin(), angles.cos()), -1).flatten(-2)


# ---- the net ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A norm and Mamba-2's mixer, added to what came in, which is kept in float32 at least."""

    def __init__(self, dim: int, mixer: Mamba2) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = mixer

    def forward(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Return (B, L, C) and the memory to go on with."""
        y, memory = self.mixer.stream(self.norm(x.to(self.norm.weight.dtype)), memory)
        return x + y, memory


class MambaEye(PlainNet):
    """MambaEye with timm's surface, for images of any size and walks of any kind.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        patch_size: P, in pixels.
        dim: C.
        depth: blocks.
        move_dim: numbers that a move is described by, for each of its axes, even.
        states: N of the mixers.
        width: steps that the mixers' convolutions see.
        expand: channels in the mixers over C.
        head_dim: channels of a head there.
        walk: one of ``WALKS``, the order in which an image is read unless positions are given.
        global_pool: ``"last"``, the last step, as published; ``"avg"``, the mean of all steps; or ``""``, every step,
            only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).

    Raises:
        InputError: sizes below 1 or that do not divide, a walk or a pooling that does not exist.
    """

    BEFORE = r"^embed"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 16,
        dim: int = 256,
        depth: int = 24,
        move_dim: int = 256,
        states: int = 64,
        width: int = 4,
        expand: float = 2.0,
        head_dim: int = 64,
        walk: str = "random",
        global_pool: str = "last",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {"patch_size": patch_size, "depth": depth}.items():
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        if move_dim < 2 or move_dim % 2:
            raise InputError(f"move_dim = {move_dim} is not allowed: give an even number, sines and cosines")
        if walk not in WALKS:
            raise unknown("walk", walk, WALKS, "another is given to the model as positions")
        self.patch_size, self.move_dim, self.walk = patch_size, move_dim, walk
        self.num_features = self.head_hidden_size = dim
        self.embed = nn.Linear(in_chans * patch_size**2 + 2 * move_dim, dim)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            mixer = Mamba2(dim, states=states, width=width, expand=expand, head_dim=head_dim)
            with torch.no_grad():  # as published, after GPT-2: what many blocks add up to stays of one size
                mixer.out_proj.weight.div_(math.sqrt(depth))
            self.blocks.append(Block(dim, mixer))
        self.norm: nn.Module = nn.RMSNorm(dim, eps=1e-5)
        self.drop = nn.Dropout(drop_rate)
        self.feature_info = [{"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)]
        self.reset_classifier(num_classes, global_pool)

    # ---- walks

    def forward_walk(self, patches: Tensor, moves: Tensor) -> Tensor:
        """Return the logits after each step of a walk, (B, L, classes).

        Args:
            patches: pixels, (B, L, in_chans P P), as ``cut`` gives them.
            moves: that led to each patch from the one before, in pixels down and to the right, (B, L, 2) or (L, 2).

        Raises:
            InputError: shapes that do not go together.
        """
        return self.stream(patches, moves)[0]

    def stream(
        self, patches: Tensor, moves: Tensor, memory: Sequence[Memory] | None = None
    ) -> tuple[Tensor, tuple[Memory, ...]]:
        """Return the logits after each step, (B, L, classes), and the memory to go on with, of one size for any walk.

        The steps of a walk give the same one at a time, many at a time, or all at once.

        Args:
            patches, moves: as ``forward_walk``.
            memory: what the call before returned; None is the beginning of a walk.

        Raises:
            InputError: as ``forward_walk``.
        """
        x = self._embedded(patches, moves)
        after = []
        for number, block in enumerate(self.blocks):
            x, kept = self.recomputed(block, x, None if memory is None else memory[number])
            after.append(kept)
        return self.head(self.drop(self.normed(x))), tuple(after)

    def positions(self, height: int, width: int) -> Tensor:
        """Return the model's own walk over an image: the positions of all tiles, (L, 2)."""
        places = tiles(height, width, self.patch_size)
        return places[torch.tensor(np.array(WALKS[self.walk](self._grid(height, width))))]

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def _embedded(self, patches: Tensor, moves: Tensor) -> Tensor:
        """Return (B, L, C), in float32 at least."""
        pixels = self.embed.in_features - 2 * self.move_dim
        if patches.ndim != 3 or patches.shape[2] != pixels or patches.shape[1] < 1:
            raise InputError(
                f"patches {tuple(patches.shape)} are not allowed: give (B, L, {pixels}), the pixels of at least one "
                f"patch of {self.patch_size} x {self.patch_size}"
            )
        batch, length = patches.shape[:2]
        if moves.shape not in ((length, 2), (batch, length, 2)):
            raise InputError(
                f"moves {tuple(moves.shape)} do not fit patches {tuple(patches.shape)}: give (L, 2) or (B, L, 2)"
            )
        led = embed_moves(moves, self.move_dim).to(patches.dtype).expand(batch, length, -1)
        x = F.silu(self.embed(torch.cat((patches, led), 2)))
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _read(self, images: Tensor, positions: Tensor | None) -> Tensor:
        """Return what the first block takes of images, read along positions or along the model's own walk."""
        if positions is None:
            positions = self.positions(*images.shape[-2:])
        else:
            check_positions(positions, images, self.patch_size)
        positions = positions.to(images.device)
        return self._embedded(cut(images, positions, self.patch_size), moves_between(positions))

    # ---- timm's surface

    def no_weight_decay(self) -> set[str]:
        """Return patterns of what is not decayed, as Mamba-2 marks it: rates, step sizes and the way past the scan."""
        return {"*.A_log", "*.dt_bias", "*.D"}

    def pools(self) -> tuple[str, ...]:
        """Return what ``global_pool`` may be."""
        return ("last", "avg", "")

    def linear_head(self) -> nn.Linear:
        """Return a new classifier, which each step's features go through."""
        place = self.embed.weight
        return nn.Linear(self.num_features, self.num_classes, device=place.device, dtype=place.dtype)

    def begin(self, x: Tensor) -> tuple[State, tuple[int, int]]:
        """Return the steps of the model's own walk, and the grid of the patches."""
        return (self._read(x, None),), self._grid(*x.shape[-2:])

    def pass_through(self, block: nn.Module, *state: Any) -> State:
        """Return the state after a block, from the beginning of a walk."""
        return block(*state)[:1]

    def places(self, state: State, grid: tuple[int, ...]) -> Tensor:
        """Return the places in reading order, each as it was when the walk came to it: it knows those before it."""
        order = WALKS[self.walk]((grid[0], grid[1]))
        return state[0].index_select(1, torch.tensor(inverse(np.array(order)), device=state[0].device))

    def normed(self, x: Tensor) -> Tensor:
        """Return steps behind the last norm, in the type of the weights."""
        return self.norm(x.to(self.embed.weight.dtype))

    def forward_features(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the features of every step, (B, L, C)."""
        return self.end(self.final_state((self._read(x, positions),)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or with ``pre_logits`` the pooled features (B, C)."""
        if self.global_pool:
            x = x[:, -1] if self.global_pool == "last" else x.mean(1)
        return x if pre_logits else self.head(self.drop(x))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return logits (B, classes).

        Args:
            x: (B, in_chans, H, W), of any size.
            positions: of the patches to look at, in this order, (L, 2) or for each image (B, L, 2), integers; None is
                all tiles in the order of ``walk``.

        Raises:
            InputError: positions outside the image, or of another shape.
        """
        return self.forward_head(self.forward_features(x, positions))


def check_positions(positions: Tensor, images: Tensor, patch: int) -> None:
    """Raise InputError unless positions are integers (L, 2) or (B, L, 2) of patches inside the images."""
    fits = positions.ndim in (2, 3) and positions.shape[-1] == 2 and positions.shape[-2] > 0
    if not fits or positions.shape[:-2] not in ((), images.shape[:1]) or positions.is_floating_point():
        raise InputError(
            f"positions {tuple(positions.shape)} of {positions.dtype} are not allowed: give integers (L, 2), or "
            f"({len(images)}, L, 2) for {len(images)} images"
        )
    most = [max(side - patch, 0) for side in images.shape[-2:]]
    flat = positions.reshape(-1, 2)
    low, high = flat.amin(0).tolist(), flat.amax(0).tolist()
    if min(low) < 0 or high[0] > most[0] or high[1] > most[1]:
        raise InputError(
            f"positions from {tuple(low)} to {tuple(high)} leave an image of {tuple(images.shape[-2:])}: patches of "
            f"{patch} pixels begin at rows from 0 to {most[0]} and columns from 0 to {most[1]}"
        )


_AUTHORS = (
    (r"^model\.", ""),
    (r"^init_fc\.0\.", "embed."),
    (r"^mamba2_net\.layers\.", "blocks."),
    (r"^mamba2_net\.norm_f\.", "norm."),
    (r"^classification_head\.0\.", "head."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, as published or as their training saves them, under our names."""
    if "embed.weight" in state_dict:
        return state_dict
    ours = {}
    for key, value in state_dict.get("state_dict", state_dict).items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        ours[key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


# As published: pixels from 0 to 1.
_OWN: dict[str, Any] = {"crop_pct": 1.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "first_conv": None}
default_cfgs = generate_default_cfgs(
    {
        "mambaeye_nano": plain_nano_cfg(first_conv=None),
        "mambaeye_tiny": plain_cfg(512, **_OWN),
        "mambaeye_small": plain_cfg(512, **_OWN),
        "mambaeye_base": plain_cfg(512, **_OWN),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MambaEye:
    net: MambaEye = create_plain(MambaEye, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def mambaeye_nano(pretrained: bool = False, **kwargs: Any) -> MambaEye:
    """0.3 M parameters, for images of 14 to 112 pixels; ours, not the paper's."""
    own = {"patch_size": 4, "dim": 96, "depth": 4, "move_dim": 32, "states": 16, "head_dim": 48}
    return _create("mambaeye_nano", pretrained, **{**own, **kwargs})


@register_model
def mambaeye_tiny(pretrained: bool = False, **kwargs: Any) -> MambaEye:
    """5.8 M parameters, 12 blocks."""
    return _create("mambaeye_tiny", pretrained, **{"depth": 12, **kwargs})


@register_model
def mambaeye_small(pretrained: bool = False, **kwargs: Any) -> MambaEye:
    """11 M parameters, 24 blocks."""
    return _create("mambaeye_small", pretrained, **{"depth": 24, **kwargs})


@register_model
def mambaeye_base(pretrained: bool = False, **kwargs: Any) -> MambaEye:
    """21 M parameters, 48 blocks."""
    return _create("mambaeye_base", pretrained, **{"depth": 48, **kwargs})
