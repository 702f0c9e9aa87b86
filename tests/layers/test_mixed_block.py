import pytest
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from exact import moved, normal, same
from vitrail.layers.mixed_block import MixedSwinBlock


class Rows(nn.Module):
    """Something to mix with: each row of a map sees the one above it, at the top the lowest."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x.roll(1, dims=1) * self.weight


def mixed():
    torch.manual_seed(0)
    return moved(MixedSwinBlock(SwinTransformerBlock(6, (4, 4), num_heads=2, window_size=2, drop_path=0.5), Rows()))


def slow_norm(layer, place):
    """Normalise the features (C,) of one place."""
    mean = sum(place) / len(place)
    variance = sum((value - mean) ** 2 for value in place) / len(place)
    return (place - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias


def slow_mlp(mlp, place):
    inside = mlp.fc1.weight @ place + mlp.fc1.bias
    return mlp.fc2.weight @ (inside * (1 + torch.erf(inside / 2**0.5)) / 2) + mlp.fc2.bias


def slow_block(block, image, *, mix=True, mlp=True):
    """The block place by place, for one map (H, W, C), with or without either branch."""
    height, width = image.shape[:2]
    rows = []
    for i in range(height):
        for j in range(width):
            place = image[i, j]
            if mix:
                place = place + slow_norm(block.norm1, image[i - 1, j]) * block.mix.weight
            rows.append(place + slow_mlp(block.mlp, slow_norm(block.norm2, place)) if mlp else place)
    return torch.stack(rows).unflatten(0, (height, width))


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
def test_it_is_the_slow_loop_at_any_size(size):
    block = mixed().eval()
    x = normal(2, *size, 6).requires_grad_()
    same(block(x), torch.stack([slow_block(block, image) for image in x]), [x, *block.parameters()])


@pytest.mark.parametrize("dropped", ["mix", "mlp"])
def test_each_branch_is_dropped_by_itself(dropped):
    block = mixed().train()
    paths = {"mix": block.drop_path1, "mlp": block.drop_path2}
    assert all(isinstance(path, DropPath) and path.drop_prob == 0.5 for path in paths.values())
    for name, path in paths.items():
        path.drop_prob = float(name == dropped)
    x = normal(1, 3, 4, 6)
    torch.testing.assert_close(block(x)[0], slow_block(block, x[0], **{dropped: False}))


def test_it_has_no_windows_to_fit():
    block = mixed().eval()
    x = normal(1, 3, 5, 6)
    before = block(x)
    block.set_input_size((7, 7), window_size=7)
    torch.testing.assert_close(block(x), before, rtol=0, atol=0)
