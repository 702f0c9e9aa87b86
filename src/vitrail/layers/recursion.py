"""What recursive transformers put around shared blocks: projections between passes, and attention in sliced groups.

Shen et al., "Sliced Recursive Transformer" (ECCV 2022), arXiv 2111.05297, and the authors' code (szq0214/SReT).
Shapes: B images, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.scan.orders import Order, inverse, rearrange


class NonlinearProjection(nn.Module):
    """What stands between two passes through one block, with weights of its own: a x + b mlp(norm(x)).

    Without it a block that is applied to its own output tends to do nothing the second time. a and b are learnt.

    Args:
        dim: C.
        ratio: hidden width over C.

    Raises:
        InputError: a hidden width of none.
    """

    def __init__(self, dim: int, ratio: float = 1.0) -> None:
        super().__init__()
        if int(dim * ratio) < 1:
            raise InputError(f"projection_ratio = {ratio} leaves no hidden channel of {dim}: give more, such as 1.0")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * ratio))
        self.residual = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C)."""
        return self.residual[0] * x + self.residual[1] * self.mlp(self.norm(x))


def in_groups(
    attend: Callable[[Tensor], Tensor], x: Tensor, groups: int, *, shuffled: bool = False, training: bool = False
) -> Tensor:
    """Return what tokens become that attend inside groups alone: the more groups, the fewer pairs.

    Groups are of one size; where it does not divide the tokens, the first ones have one token more.

    Args:
        attend: attention, from (b, n, C) to (b, n, C).
        x: (B, N, C).
        groups: how many; those beyond N stay empty.
        shuffled: whether a group is not a run of neighbours, but drawn from all tokens. The order is drawn anew in
            training, for all images of the batch; in evaluation it is the same each time.
        training: whether this is training.

    Returns:
        (B, N, C).
    """
    count = x.shape[1]
    groups = min(groups, count)
    if groups == 1:
        return attend(x)
    if shuffled:
        # Drawn where tensors of the CPU are: a checkpointed block then draws the same again.
        order = torch.randperm(count).numpy() if training else _drawn_once(count)
        return rearrange(in_groups(attend, rearrange(x, order), groups), inverse(order))
    size, more = divmod(count, groups)
    runs = [(number, side) for number, side in ((more, size + 1), (groups - more, size)) if number]
    parts = x.split([number * side for number, side in runs], 1)
    found = [
        attend(part.reshape(-1, side, x.shape[2])).reshape(x.shape[0], number * side, -1)
        for part, (number, side) in zip(parts, runs, strict=True)
    ]
    return torch.cat(found, 1) if len(found) > 1 else found[0]


@cache
def _drawn_once(count: int) -> Order:
    return np.random.default_rng(0).permutation(count)
