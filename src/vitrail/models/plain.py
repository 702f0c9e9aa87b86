"""Nets whose blocks all work at one stride: timm's surface, which is the same for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.pooling import checked_pool
from vitrail.models.staged import cfg, nano_cfg

State = tuple[Any, ...]
"""What goes from block to block: tensors, and what blocks have to know of them."""


class PlainNet(nn.Module):
    """A net of blocks that take and return one state, with timm's surface.

    A constructor sets ``num_features``, ``head_hidden_size``, ``feature_info``, the blocks and what comes before and
    behind them; then it calls ``reset_classifier``.
    """

    BEFORE: ClassVar[str]
    """Names of what comes before the blocks."""
    BLOCKS: ClassVar[str] = "blocks"
    """Name of the blocks."""
    BEHIND: ClassVar[str] = r"^norm"
    """Names of what comes behind them, but for the classifier."""
    NORM: ClassVar[str] = "norm"
    """Name of the norm of the map's places."""

    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    head: nn.Module
    grad_checkpointing = False

    # ---- what a subclass says

    def begin(self, x: Tensor) -> tuple[State, tuple[int, ...]]:
        """Return what the first block takes of images, and the grid of their places."""
        raise NotImplementedError

    def pass_through(self, block: nn.Module, *state: Any) -> State:
        """Return the state after a block."""
        found: State = block(*state)
        return found

    def places(self, state: State, grid: tuple[int, ...]) -> Tensor:
        """Return the places of the grid, (B, N, C)."""
        raise NotImplementedError

    def normed(self, x: Tensor) -> Tensor:
        """Return places behind the last norm."""
        found: Tensor = getattr(self, self.NORM)(x)
        return found

    def end(self, state: State) -> Any:
        """Return the features that ``forward_head`` takes."""
        return self.normed(state[0])

    def pools(self) -> tuple[str, ...]:
        """Return what ``global_pool`` may be; ``""``, which pools nothing, is for a net without classifier."""
        return ("avg", "")

    def put_head(self) -> None:
        """Set ``head`` for ``num_classes``."""
        self.head = self.linear_head() if self.num_classes else nn.Identity()

    def linear_head(self) -> nn.Linear:
        """Return a new classifier of the pooled features."""
        place = next(self._blocks.parameters())
        head = nn.Linear(self.num_features, self.num_classes, device=place.device, dtype=place.dtype)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or with ``pre_logits`` what the classifier takes."""
        raise NotImplementedError

    # ---- timm's surface

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into groups by depth."""
        return {"stem": self.BEFORE, "blocks": [(rf"^{self.BLOCKS}\.(\d+)", None), (self.BEHIND, (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping what is inside them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier of the pooled features."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, on the device and in the type of the present weights.

        Args:
            num_classes: outputs; 0 leaves the pooled features.
            global_pool: as in the constructor; None leaves it. ``""``, without classifier, gives ``forward_features``.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = checked_pool(global_pool, num_classes, self.pools())
        self.put_head()

    def forward_features(self, x: Tensor) -> Any:
        """Return the features that ``forward_head`` takes."""
        return self.end(self.final_state(self.begin(x)[0]))

    def final_state(self, state: State) -> State:
        """Return the state behind the last block, from that before the first."""
        for block in self._blocks:
            state = self._through(block, state)
        return state

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return what blocks give for the places, and the final features.

        Args:
            x: images or clips.
            indices: of blocks; a number means as many of the last, None all.
            norm: whether the last norm is applied to each.
            stop_early: do not go on behind the last block of ``indices``.
            output_fmt: ``"NCHW"``, (B, C, ...) on the grid, or ``"NLC"``, (B, N, C).
            intermediates_only: return the list alone.

        Returns:
            A list, or (final features, list).

        Raises:
            InputError: another format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"output_fmt = {output_fmt!r} is not allowed: give NCHW or NLC")
        taken, last = feature_take_indices(len(self._blocks), indices)
        state, grid = self.begin(x)
        found = []
        for index, block in enumerate(self._blocks):
            if index > last and stop_early:
                break
            state = self._through(block, state)
            if index in taken:
                places = self.places(state, grid)
                if norm:
                    places = self.normed(places)
                found.append(places.transpose(1, 2).unflatten(2, grid) if output_fmt == "NCHW" else places)
        return found if intermediates_only else (self.end(state), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last of ``indices``, the norm and the head; return the indices, counted anew."""
        taken, last = feature_take_indices(len(self._blocks), indices)
        setattr(self, self.BLOCKS, self._blocks[: last + 1])
        if prune_norm:
            setattr(self, self.NORM, nn.Identity())
        if prune_head:
            self.reset_classifier(0)
        return list(taken)

    def recomputed(self, function: Callable[..., Any], *given: Any) -> Any:
        """Return what a function gives; it is called again in the backward pass if blocks are to be."""
        return checkpoint(function, *given) if self.grad_checkpointing and self.training else function(*given)

    def _through(self, block: nn.Module, state: State) -> State:
        found: State = self.recomputed(self.pass_through, block, *state)
        return found

    @property
    def _blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = getattr(self, self.BLOCKS)
        return blocks


def padded(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Return images or clips with zeros behind the last row, column or frame, to whole patches.

    Args:
        x: (B, channels, ...), one axis for each side of a patch.
        patch: its sides.
    """
    missing = [-size % side for size, side in zip(x.shape[2:], patch, strict=True)]
    return F.pad(x, [pad for side in reversed(missing) for pad in (0, side)]) if any(missing) else x


def plain_cfg(side: int = 224, **own: Any) -> dict[str, Any]:
    """Return what timm keeps of a published variant: ImageNet, ``side`` pixels."""
    return cfg(side, **{"pool_size": None, "crop_pct": 0.9, "first_conv": "patch_embed", **own})


def plain_nano_cfg(**own: Any) -> dict[str, Any]:
    """Return what timm keeps of a variant of ours for small images: ten classes, 32 pixels."""
    return nano_cfg(**{"pool_size": None, "first_conv": "patch_embed", **own})


def create_plain(
    kind: type[nn.Module],
    variant: str,
    pretrained: bool,
    weights: Callable[..., Any] | None = None,
    *,
    maps: int = 1,
    **options: Any,
) -> Any:
    """Build a variant, by timm.

    Args:
        kind: the net.
        variant: its registered name.
        pretrained: whether to load weights, as timm's entry points take it.
        weights: the net's ``checkpoint_filter_fn``, if there are published ones.
        maps: of as many last blocks does ``features_only`` give them, unless it is told which.
        **options: of the net.
    """
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=weights,
        feature_cfg={"out_indices": maps, "feature_cls": "getter"},
        **options,
    )
