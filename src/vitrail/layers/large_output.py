"""Losses of an output of very many classes: all at once, in parts that never exist together, or of a sample of them.

The targets of an image are few: its label, or what a teacher thinks likeliest. What the other classes cost is a sum
over all classes, of exp(x) under a softmax and of log(1 + exp(x)) under sigmoids. The sum can be taken part by part,
exactly, with each part's logits computed again for its gradient; or be estimated from classes drawn by chance (Bengio
and Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model", 2008), so
that the sums and their gradients are right in expectation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitrail.errors import InputError

Form = Literal["sigmoid", "softmax"]
Part = Callable[[], Tensor]


def large_loss(
    parts: Sequence[Part],
    sizes: Sequence[int],
    places: Tensor,
    shares: Tensor,
    *,
    form: Form = "softmax",
) -> Tensor:
    """Return the cross-entropy (B,) of sparse targets to logits that come in parts, each freed before the next.

    Softmax: log sum_j exp(x_j) times the sum of the shares, less sum_k share_k x_k. Sigmoid: the binary cross-entropies
    of all classes, summed: sum_j log(1 + exp(x_j)) - sum_k share_k x_k.

    Args:
        parts: each returns its logits (B, size); called again for the gradient where there are several.
        sizes: classes of each part; they are numbered through.
        places: numbers of the classes that an image has a share of, (B, K); where the share is 0, any.
        shares: of these classes, (B, K), in [0, 1]; of the others it is 0.
        form: of the probabilities.
    """
    _check_form(form)
    sums, dots = [], []
    start = 0
    for part, size in zip(parts, sizes, strict=True):

        def terms(part: Part = part, start: int = start, size: int = size) -> tuple[Tensor, Tensor]:
            logits = _wide(part())  # (B, size)
            here = (places >= start) & (places < start + size)
            picked = logits.gather(1, (places - start).clamp(0, size - 1))
            total = logits.logsumexp(1) if form == "softmax" else F.softplus(logits).sum(1)
            return total, (picked * shares * here).sum(1)

        total, dot = terms() if len(parts) == 1 else checkpoint(terms, use_reentrant=False)
        sums.append(total)
        dots.append(dot)
        start += size
    every = torch.stack(sums)
    others = every.logsumexp(0) * shares.sum(1) if form == "softmax" else every.sum(0)
    return others - torch.stack(dots).sum(0)


def sharded_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor,
    shares: Tensor,
    *,
    size: int,
    form: Form = "softmax",
) -> Tensor:
    """Return ``large_loss`` (B,) of a linear layer of which ``size`` classes at a time are computed.

    The gradient of the weights is written where it belongs, so that nothing of (B, N) ever exists, nor two of (N, D).

    Args:
        x: (B, D).
        weight, bias: (N, D) and (N,); computed in their type.
        places, shares: as of ``large_loss``; no gradient goes to the shares.
        size: from 1; the last shard may be smaller.
        form: of the probabilities.

    Raises:
        InputError: no size, or a form that there is not.
    """
    _check_form(form)
    if size < 1:
        raise InputError(f"shards of {size} classes are not allowed: give 1 or more")
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    found: Tensor = _Sharded.apply(x.to(weight.dtype), weight, bias, places, shares.to(weight.dtype), size, form)
    return found


class _Sharded(torch.autograd.Function):
    """``sharded_loss``, with each shard's logits computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, places: Tensor, shares: Tensor, size: int, form: Form
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            sums, dot = [], x.new_zeros(len(x))
            for start in range(0, len(weight), size):
                logits = F.linear(x, weight[start : start + size], bias[start : start + size])
                sums.append(logits.logsumexp(1) if form == "softmax" else F.softplus(logits).sum(1))
                here = (places >= start) & (places < start + logits.shape[1])
                dot += (logits.gather(1, (places - start).clamp(0, logits.shape[1] - 1)) * shares * here).sum(1)
        total = torch.stack(sums).logsumexp(0) if form == "softmax" else torch.stack(sums).sum(0)
        ctx.save_for_backward(x, weight, bias, places, shares, total)
        ctx.size, ctx.form = size, form
        return (total * shares.sum(1) if form == "softmax" else total) - dot

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, places, shares, total = ctx.saved_tensors
        to_x, to_weight, to_bias = torch.zeros_like(x), torch.empty_like(weight), torch.empty_like(bias)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(weight), ctx.size):
                rows = slice(start, start + ctx.size)
                logits = F.linear(x, weight[rows], bias[rows])
                if ctx.form == "softmax":
                    pull = (logits - total[:, None]).exp_() * shares.sum(1, keepdim=True)
                else:
                    pull = logits.sigmoid_()
                here = (places >= start) & (places < start + pull.shape[1])
                pull.scatter_add_(1, (places - start).clamp(0, pull.shape[1] - 1), -shares * here)
                pull *= slope[:, None]
                to_x += pull @ weight[rows]
                torch.mm(pull.T, x, out=to_weight[rows])
                torch.sum(pull, 0, out=to_bias[rows])
        return to_x, to_weight, to_bias, None, None, None, None


def sampled_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor,
    shares: Tensor,
    *,
    samples: int,
    form: Form = "softmax",
    drawn: Tensor | None = None,
) -> Tensor:
    """Return an estimate (B,) of ``large_loss`` of a linear layer from its targets and some of the other classes.

    Classes are drawn evenly, with replacement, once for the batch. Of those that are no target of an image the sum is
    N / S times that of the drawn ones: unbiased for the sigmoid's loss and gradient, and for the softmax's partition
    function and that function's gradient, of which the loss is the logarithm.

    Args:
        x: (B, D).
        weight, bias: (N, D) and (N,).
        places, shares: as of ``large_loss``; a class is given once, or again with a share of 0 where it is in the first
            column, which pads.
        samples: S, from 1.
        form: of the probabilities.
        drawn: the classes (S,), if not by chance.

    Raises:
        InputError: no samples, or a form that there is not.
    """
    _check_form(form)
    if samples < 1:
        raise InputError(f"samples = {samples} is not allowed: give 1 or more")
    count = len(weight)
    if drawn is None:
        drawn = torch.randint(count, (samples,), device=x.device)
    padding = (places == places[:, :1]) & (torch.arange(places.shape[1], device=x.device) > 0)
    # In one lookup: the gradient of each is as large as the whole.
    rows = F.embedding(torch.cat((places.flatten(), drawn)), weight).to(x.dtype)
    own, apart = rows[: places.numel()].unflatten(0, places.shape), rows[places.numel() :]  # (B, K, D), (S, D)
    targets = _wide(torch.einsum("bd,bkd->bk", x, own))
    others = _wide(F.linear(x, apart))  # (B, S)
    if bias is not None:
        targets, others = targets + bias[places], others + bias[drawn]
    hit = (drawn[None, :, None] == places[:, None]).any(-1)
    scale = count / len(drawn)
    dot = (targets * shares).sum(1)
    if form == "sigmoid":
        known = F.softplus(targets).masked_fill(padding, 0).sum(1)
        return known + scale * F.softplus(others).masked_fill(hit, 0).sum(1) - dot
    logits = torch.cat(
        (targets.masked_fill(padding, -torch.inf), others.masked_fill(hit, -torch.inf) + math.log(scale)), 1
    )
    return logits.logsumexp(1) * shares.sum(1) - dot


def _check_form(form: str) -> None:
    if form not in ("sigmoid", "softmax"):
        raise InputError(f"form = {form!r} is not allowed: choose 'sigmoid' or 'softmax'")


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
