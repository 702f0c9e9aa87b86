"""The stochastic layer-wise shuffle: in training, blocks read their tokens in an order drawn at random.

Huang et al., "Stochastic Layer-Wise Shuffle: A Good Practice to Improve Vision Mamba Training" (2024; ICML 2025), arXiv
2408.17081. Deep tokens are thought to say what there is more than where it is, so the deeper a block the likelier its
shuffle: block l of L, counted from 0, with probability P l / (L - 1). Before the block all tokens, the class token
among them, are put in one random order, the same for the whole batch; behind it the order is as before.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.edits.surgery import Edit
from vitrail.errors import InputError
from vitrail.layers.scan.orders import Order, inverse, rearrange

BLOCKS = r"(?:.*\.)?(?:blocks|layers)\.\d+"
"""Paths of blocks, as backbones name them."""


class LayerShuffle(nn.Module):
    """What a shuffled block is given: hooks before and behind it. It holds no weights, and by itself does nothing.

    Args:
        rate: probability of a shuffle, in [0, 1].
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self._order: Order | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, for a block that calls all its parts in turn."""
        return x

    def attach(self, block: nn.Module) -> None:
        """Shuffle before ``block`` and restore the order behind it."""
        block.add_module("layer_shuffle", self)
        block.register_forward_pre_hook(self._before)
        block.register_forward_hook(self._behind)

    def _before(self, block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._order = None
        # The draw is made where tensors of the CPU are: a checkpointed block then draws the same again.
        if not block.training or float(torch.rand(())) >= self.rate:
            return None
        tokens = given[0]
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            met = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise InputError(
                f"shufflemamba shuffles tokens (B, L, C), and a {type(block).__name__} is given {met}: name blocks of "
                "a sequence with modules="
            )
        self._order = torch.randperm(tokens.shape[1]).numpy()
        return self._all(given, tokens.shape[1], self._order)

    def _behind(self, block: nn.Module, given: tuple[Any, ...], result: Any) -> Any:
        order, self._order = self._order, None
        if order is None:
            return None
        if isinstance(result, Tensor):
            return rearrange(result, inverse(order))
        return self._all(result, len(order), inverse(order))

    @staticmethod
    def _all(values: tuple[Any, ...], length: int, order: Order) -> tuple[Any, ...]:
        """Return the values with every sequence among them in that order: a block may be given its residual apart."""
        return tuple(
            rearrange(value, order)
            if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == length
            else value
            for value in values
        )

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"rate={self.rate:.3g}"


def shufflemamba(*, rate: float = 0.5, modules: str | None = None) -> Edit:
    """Shuffle the tokens of blocks in training, the deeper the more often; evaluation and weights stay as they are.

    Args:
        rate: P, the probability of the last block, in (0, 1]; it rises from 0 at the first. Published nets of 98 M
            parameters and more were trained with 0.5.
        modules: a regular expression of the blocks' whole paths; None takes what stands in a list that is called
            ``blocks`` or ``layers``, as in Vim. Blocks of attention alone do not know an order: there it does nothing.

    Raises:
        InputError: a rate out of range; or, from the edit, a model without such blocks (the text lists what it has),
            or with shuffled ones.

    Example:
        >>> model = shufflemamba(rate=0.5)(timm.create_model("vim_tiny"))          # doctest: +SKIP
    """
    if not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise InputError(f"shufflemamba: rate = {rate!r} is not allowed: give a probability above 0, at most 1")

    def edit(model: nn.Module) -> nn.Module:
        found = [(name, module) for name, module in model.named_modules() if re.fullmatch(modules or BLOCKS, name)]
        # Of blocks within blocks, the outer ones.
        blocks = [module for name, module in found if not any(name.startswith(f"{other}.") for other, _ in found)]
        if not blocks:
            kinds = Counter(type(module).__name__ for module in model.modules() if module is not model)
            listed = ", ".join(f"{name} x{count}" for name, count in kinds.most_common(12))
            raise InputError(f"the edit found no blocks in {type(model).__name__}; its modules are: {listed}")
        if any(isinstance(module, LayerShuffle) for module in model.modules()):
            raise InputError(f"the blocks of this {type(model).__name__} are shuffled already: name shufflemamba once")
        for block, probability in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
            LayerShuffle(probability).train(block.training).attach(block)
        return model

    return edit
