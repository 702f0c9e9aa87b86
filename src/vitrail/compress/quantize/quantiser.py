"""The uniform affine quantiser, with a gradient for what goes in and for its range."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import InputError

MOST_BITS = 16


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves to even; the gradient passes as if nothing were rounded."""
    return x + (x.round() - x).detach()


class _Affine(torch.autograd.Function):
    """``(round(clamp(x / scale + zero)) - zero) * scale``, the rounding straight through; one pass where autograd's
    own would take many. Scale and zero broadcast with x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
        """Keep what the gradient needs: what was not clipped, and how the output moves with the scale."""
        exact = (x / scale).add_(zero)
        stored = exact.clamp(0, most)
        kept = stored == exact
        stored.round_()
        ctx.save_for_backward(kept, torch.where(kept, stored - exact, stored - zero), scale, zero)
        return stored.sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of x, scale and zero."""
        kept, slope, scale, zero = ctx.saved_tensors
        passed = grads[0] * kept
        clipped = (grads[0] - passed).sum_to_size(zero.shape)
        return passed, (grads[0] * slope).sum_to_size(scale.shape), -clipped * scale, None


def check_bits(bits: int) -> int:
    """Return ``bits``, or raise when a quantiser cannot have as many."""
    if not (isinstance(bits, Integral) and 1 <= bits <= MOST_BITS):
        raise InputError(f"{bits!r} bits are not allowed: give a whole number from 1 to {MOST_BITS}")
    return bits


class AffineQuantiser(nn.Module):
    """Rounds to ``2 ** bits`` evenly spaced values, of which zero is one.

    The range is held as its least value and its span, as in AdaQuant: both are parameters, and the gradient reaches
    them through the scale, the zero point (rounded, straight through) and what is clipped.

    Args:
        bits: from 1 to 16.
        low: least value, of a shape that broadcasts with what is quantised: (1,) per tensor, (C, 1, 1, 1) per channel
            of a kernel. Above zero it counts as zero, so that zero is in the range.
        high: largest value, likewise; below zero it counts as zero.
    """

    def __init__(self, bits: int, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        low, high = low.detach().clamp(max=0), high.detach().clamp(min=0)
        span = high - low
        self.low = nn.Parameter(low.clone())
        self.span = nn.Parameter(torch.where(span == 0, torch.ones_like(span), span))

    @property
    def scale(self) -> Tensor:
        """The distance between neighbours."""
        return self.span.clamp(1e-6, 1e5) / (2**self.bits - 1)

    @property
    def zero(self) -> Tensor:
        """The integer that stands for zero, 0 to ``2 ** bits - 1``."""
        return round_ste(-self.low / self.scale).clamp(0, 2**self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` as it comes back after it was stored in integers from 0 to ``2 ** bits - 1``."""
        return _Affine.apply(x, self.scale, self.zero, 2**self.bits - 1)

    def extra_repr(self) -> str:
        """Name the width."""
        return f"bits={self.bits}"


def channel_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return least and largest weight of each output channel, (C, 1, ...), for a weight (C, ...)."""
    flat = weight.detach().flatten(1)
    shape = (-1, *[1] * (weight.ndim - 1))
    return flat.amin(1).view(shape), flat.amax(1).view(shape)
