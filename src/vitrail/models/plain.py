"""Nets whose blocks all work at one stride: timm's surface, which is the same for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitrail.errors import InputError

State = tuple[Tensor, ...]
"""What goes from block to block."""


class PlainNet(nn.Module):
    """A net of ``blocks`` that take and return one state, with timm's surface.

    A constructor sets ``num_features``, ``head_hidden_size``, ``feature_info``, ``blocks`` and what comes before and
    behind them; then it calls ``reset_classifier``, which is the subclass's, as are ``get_classifier`` and
    ``forward_head``.
    """

    BEFORE: ClassVar[str]
    """Names of what comes before the blocks."""
    BEHIND: ClassVar[str] = r"^norm"
    """Names of what comes behind them, but for the classifier."""
    NORM: ClassVar[str] = "norm"
    """Name of the norm of the map's places."""

    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    blocks: nn.ModuleList
    grad_checkpointing = False

    # ---- what a subclass says

    def begin(self, x: Tensor) -> tuple[State, tuple[int, ...]]:
        """Return what the first block takes of images, and the grid of their places."""
        raise NotImplementedError

    def pass_through(self, block: nn.Module, *state: Tensor) -> State:
        """Return the state after a block."""
        found: State = block(*state)
        return found

    def places(self, state: State) -> Tensor:
        """Return the places of the grid, (B, N, C)."""
        raise NotImplementedError

    def end(self, state: State) -> Any:
        """Return the features that ``forward_head`` takes."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier."""
        raise NotImplementedError

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or with ``pre_logits`` what the classifier takes."""
        raise NotImplementedError

    # ---- timm's surface

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into groups by depth."""
        return {"stem": self.BEFORE, "blocks": [(r"^blocks\.(\d+)", None), (self.BEHIND, (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping what is inside them."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Any:
        """Return the features that ``forward_head`` takes."""
        return self.end(self.final_state(x))

    def final_state(self, x: Tensor) -> State:
        """Return the state behind the last block."""
        state, _ = self.begin(x)
        for block in self.blocks:
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
        taken, last = feature_take_indices(len(self.blocks), indices)
        state, grid = self.begin(x)
        found = []
        for index, block in enumerate(self.blocks):
            if index > last and stop_early:
                break
            state = self._through(block, state)
            if index in taken:
                places = self.places(state)
                if norm:
                    places = getattr(self, self.NORM)(places)
                found.append(places.transpose(1, 2).unflatten(2, grid) if output_fmt == "NCHW" else places)
        return found if intermediates_only else (self.end(state), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last of ``indices``, the norm and the head; return the indices, counted anew."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            setattr(self, self.NORM, nn.Identity())
        if prune_head:
            self.reset_classifier(0)
        return list(taken)

    def _through(self, block: nn.Module, state: State) -> State:
        if self.grad_checkpointing and self.training:
            found: State = checkpoint(self.pass_through, block, *state)
            return found
        return self.pass_through(block, *state)


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
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed",
        "classifier": "head",
        **own,
    }


def plain_nano_cfg(**own: Any) -> dict[str, Any]:
    """Return what timm keeps of a variant of ours for small images: ten classes, 32 pixels."""
    small = {"num_classes": 10, "crop_pct": 1.0, "interpolation": "bilinear"}
    return plain_cfg(32, **{**small, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **own})


def create_plain(
    kind: type[nn.Module], variant: str, pretrained: bool, weights: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """Build a variant, by timm; ``features_only`` gives the map behind the last block.

    Args:
        kind: the net.
        variant: its registered name.
        pretrained: whether to load weights, as timm's entry points take it.
        weights: the net's ``checkpoint_filter_fn``, if there are published ones.
        **options: of the net.
    """
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=weights,
        feature_cfg={"out_indices": (-1,), "feature_cls": "getter"},
        **options,
    )
