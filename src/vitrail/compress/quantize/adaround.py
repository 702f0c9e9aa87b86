"""Learned rounding, the strongest simple alternative to moving weights freely.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (ICML 2020),
https://arxiv.org/abs/2004.10568: each weight is rounded down or up, whichever makes the layer's output come out best;
the choice is relaxed to a number between (equations 21 to 24) and driven to either end while the exponent falls.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vitrail.compress.quantize.layers import QuantLayer

GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched sigmoid."""


class SoftRounding(nn.Module):
    """Rounds a weight down, or up, or in part between; begins where the weight is.

    Args:
        layer: the quantised layer, whose weight, scale and zero point are taken as they are.
    """

    below: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        with torch.no_grad():
            quantiser = layer.weight_quantiser
            weight: Any = layer.layer.weight
            exact = weight / quantiser.scale
            self.most = 2**quantiser.bits - 1
            for name, value in (("below", exact.floor()), ("scale", quantiser.scale), ("zero", quantiser.zero)):
                self.register_buffer(name, value.clone())
            share = ((exact - self.below - GAMMA) / (ZETA - GAMMA)).clamp(1e-6, 1 - 1e-6)
        self.choice = nn.Parameter(torch.logit(share))

    def share(self) -> Tensor:
        """Return how far each weight is rounded up, 0 to 1."""
        return (self.choice.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def penalty(self, exponent: float) -> Tensor:
        """Return the sum of what keeps the shares from 0 and 1."""
        return (1 - (2 * self.share() - 1).abs().pow(exponent)).sum()

    def forward(self, *, hard: bool = False) -> Tensor:
        """Return the weight with soft shares, or rounded for good."""
        share = (self.share() >= 0.5).to(self.below) if hard else self.share()
        return ((self.below + share + self.zero).clamp(0, self.most) - self.zero) * self.scale


def adaround(
    layer: QuantLayer,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    lr: float = 1e-1,
    strength: float = 0.01,
) -> None:
    """Choose how the weights of ``layer`` are rounded, in place; its scales and its bias stay.

    Args:
        layer: quantised, in evaluation mode.
        inputs, targets: what goes in and what should come out, (N, ...).
        steps: of Adam; the first fifth is without the penalty, whose exponent then falls from 20 to 2.
        batch_size: images per step.
        seed: of the batches.
        lr: learning rate; ten times the paper's, which takes 10,000 steps, so that 100 to 1,000 can change a choice.
        strength: weight of the penalty.
    """
    rounding = SoftRounding(layer)
    optimiser = torch.optim.Adam(rounding.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    warm = steps // 5
    for step in range(steps):
        rows = torch.randperm(len(inputs), generator=generator)[:batch_size]
        with torch.no_grad():
            given = layer.input_quantiser(inputs[rows])
        out = functional_call(layer.layer, {"weight": rounding()}, (given,))
        loss = len(rounding.below) * F.mse_loss(out, targets[rows])  # summed over the channels
        if step >= warm:
            left = 1 - (step - warm) / max(steps - warm, 1)
            loss = loss + strength * rounding.penalty(2 + 18 * left)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        weight: Any = layer.layer.weight
        weight.copy_(rounding(hard=True))
