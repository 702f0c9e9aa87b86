"""What the tests of several backbones ask of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitrail.models import create_model


def pyramid(name: str, *indices: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return shapes, but for the batch, and strides of a net's features of an image of 45 x 61 pixels.

    Args:
        name: of the net.
        indices: the features that are asked for.
    """
    net = create_model(name, num_classes=10, features_only=True, out_indices=indices).eval()
    return [tuple(found.shape[1:]) for found in net(torch.randn(1, 3, 45, 61))], net.feature_info.reduction()


def loads(net: nn.Module, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Load all of a net's weights, and find them to be those of ``state``."""
    net.load_state_dict(weights, strict=True)
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
