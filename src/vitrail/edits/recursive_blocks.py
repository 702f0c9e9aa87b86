"""Recursion for any transformer: each of its blocks is passed through several times, and attends in groups if wished.

Shen et al., "Sliced Recursive Transformer" (ECCV 2022), arXiv 2111.05297: depth without the weights of more blocks. As
in SReT, behind each pass stands a small projection of its own whose residual is weighed by learnt numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from timm.layers import LayerNorm2d
from timm.layers.attention import Attention
from torch import Tensor, nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError
from vitrail.layers.recursion import NonlinearProjection, in_groups


class SlicedAttention(nn.Module):
    """Attention of a block with its own weights, inside groups alone; ``RecursiveBlock`` says which.

    Args:
        attn: of all tokens, from (B, N, C) to (B, N, C).
    """

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn
        self.groups, self.shuffled = 1, False

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        """Return (B, N, C).

        Raises:
            InputError: it is masked.
        """
        if self.groups == 1:
            found: Tensor = self.attn(x, *more, **named)
            return found
        if any(value is not None and value is not False for value in (*more, *named.values())):
            raise InputError(
                f"recursive: groups = {self.groups} slices attention without a mask, and this has one: leave groups out"
            )
        return in_groups(self.attn, x, self.groups, shuffled=self.shuffled, training=self.training)


class RecursiveBlock(nn.Module):
    """A block of a transformer with its own weights, passed through several times.

    Args:
        block: of ``norm1`` and ``attn``, as timm's are, whose output is shaped as its input, (..., C).
        loops: passes.
        projection_ratio: hidden width of the projection behind each over C.
        groups: in which even and odd passes attend, counted from 0; odd ones shuffle.
    """

    def __init__(self, block: Any, loops: int, projection_ratio: float, groups: Sequence[int]) -> None:
        super().__init__()
        if max(groups) > 1:
            block.attn = SlicedAttention(block.attn).train(block.attn.training)
        self.block = block
        self.groups = tuple(groups)
        width = block.norm1.normalized_shape[-1]
        self.projections = nn.ModuleList(NonlinearProjection(width, projection_ratio) for _ in range(loops))

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        """Return what came, shaped alike."""
        attention = getattr(self.block, "attn", None)  # another edit may have put something else there
        for number, project in enumerate(self.projections):
            if isinstance(attention, SlicedAttention):
                attention.groups, attention.shuffled = self.groups[number % 2], bool(number % 2)
            x = project(self.block(x, *more, **named))
        return x


def recursive(
    *, loops: int = 2, projection_ratio: float = 1.0, groups: Sequence[int] = (1, 1), modules: str | None = None
) -> Edit:
    """Return the edit that passes through each block of a transformer several times.

    Weights grow by those of the projections alone, 2 C^2 a pass where a block has some 12 C^2; time grows with the
    passes.

    Args:
        loops: passes through each block, 2 or more.
        projection_ratio: hidden width of the projection behind each pass over C, above 0.
        groups: groups in which even passes attend, and those of odd ones, which shuffle; (1, 1) is attention as it was.
            Others are for models with timm's ``Attention``, such as vit and deit; class tokens are sliced like others.
        modules: a regular expression of the blocks' whole paths; None takes all that have a ``norm1`` over channels
            that stand last and an ``attn``: of timm, those of vit, deit, swin and others.

    Raises:
        InputError: a number out of range; or, from the edit, a model without such blocks (the text lists what it has),
            one that is recursive, or groups for attention that has no slices.

    Example:
        >>> model = recursive(loops=2)(timm.create_model("deit_tiny_patch16_224"))          # doctest: +SKIP
    """
    if not isinstance(loops, int) or loops < 2:
        raise InputError(f"recursive: loops = {loops!r} is not allowed: give 2 passes or more")
    if not projection_ratio > 0:
        raise InputError(f"recursive: projection_ratio = {projection_ratio} is not allowed: give more than 0")
    if not isinstance(groups, Sequence) or len(groups) != 2 or min(groups) < 1:
        raise InputError(
            f"recursive: groups = {groups} is not allowed: give two numbers of 1 or more, of even and odd passes"
        )

    def edit(model: nn.Module) -> nn.Module:
        surface: Any = model
        head = surface.get_classifier() if hasattr(model, "get_classifier") else None
        in_head = set(head.modules()) if isinstance(head, nn.Module) else set()

        def matches(name: str, module: nn.Module) -> bool:
            norm = getattr(module, "norm1", None)
            last = isinstance(norm, nn.LayerNorm) and not isinstance(norm, LayerNorm2d) and module not in in_head
            return last and hasattr(module, "attn") and (modules is None or re.fullmatch(modules, name) is not None)

        if any(isinstance(module, RecursiveBlock) for module in model.modules()):
            raise InputError(f"the blocks of this {type(model).__name__} are recursive already: name recursive once")

        blocks: list[Any] = [module for name, module in model.named_modules() if matches(name, module)]
        strangers = {type(block.attn).__name__ for block in blocks if not isinstance(block.attn, Attention)}
        if max(groups) > 1 and strangers:
            raise InputError(
                f"recursive: groups = {tuple(groups)} slices timm's Attention, and this {type(model).__name__} has "
                f"{', '.join(sorted(strangers))}: leave groups out"
            )

        def build(block: nn.Module) -> nn.Module:
            place = cast(Tensor, cast(Any, block).norm1.weight)
            return RecursiveBlock(block, loops, projection_ratio, groups).to(place)

        return replace_modules(model, matches, build, what="transformer block with norm1 and attn")

    return edit
