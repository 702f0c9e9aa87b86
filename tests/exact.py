"""Inputs and weights in double precision, for comparing a module with a slow loop, and the comparison."""

from __future__ import annotations

from collections.abc import Sequence

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


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a linear layer gives, written out."""
    return x @ layer.weight.T + layer.bias


def layer_norm(layer: nn.Module, x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return what a layer norm over the last axis gives, written out."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def same(ours: Tensor, theirs: Tensor, given: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Compare values, and the gradients of an uneven sum of them in all that is given.

    Args:
        ours, theirs: what the module and the slow loop gave.
        given: what both were made from.
        tolerance: of values, relative and absolute, and of gradients; these may be ten times as far off, relatively.
    """
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=10 * tolerance, atol=tolerance)
