"""Inputs and weights in double precision, for comparing a module with a slow loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(module: nn.Module) -> nn.Module:
    """Return it in double precision, with all that starts at zero or one moved."""
    generator = torch.Generator().manual_seed(3)
    module = module.double()
    with torch.no_grad():
        for value in [*module.parameters(), *(v for k, v in module.named_buffers() if "running_mean" in k)]:
            value += 0.3 * torch.randn(value.shape, dtype=torch.float64, generator=generator)
    return module
