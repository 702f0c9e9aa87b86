import pytest
import torch

from exact import moved, normal, same
from vitrail.layers.padded_conv import PaddedConv2d


def slow_padded_conv(conv, x):
    """Convolve an image filled up to whole places, an output at a time; what lies outside of the image counts zero."""
    (height, width), (rows, columns), stride, edge = x.shape[-2:], conv.kernel_size, conv.stride[0], conv.padding[0]
    filled = [side + (-side) % conv.multiple for side in (height, width)]
    down, across = ((side + 2 * edge - k) // stride + 1 for side, k in zip(filled, (rows, columns)))
    out = []
    for i in range(down):
        for j in range(across):
            total = conv.bias.expand(len(x), -1)
            for r in range(rows):
                for c in range(columns):
                    y, z = i * stride + r - edge, j * stride + c - edge
                    if 0 <= y < height and 0 <= z < width:
                        total = total + x[:, :, y, z] @ conv.weight[:, :, r, c].T
            out.append(total)
    return torch.stack(out, -1).unflatten(-1, (down, across))


@pytest.mark.parametrize("size", [(8, 4), (7, 9), (4, 5), (1, 8)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "multiple"), [(2, 2, 0, 4), ((3, 2), 2, 1, 4), (2, 1, 0, 2), (1, 1, 0, 1)]
)
def test_it_is_the_slow_loop(size, kernel, stride, padding, multiple):
    conv = moved(PaddedConv2d(3, 2, kernel, stride, padding))
    conv.multiple = multiple
    x = normal(2, 3, *size).requires_grad_()
    same(conv(x), slow_padded_conv(conv, x), [x, *conv.parameters()])


def test_it_fills_nothing_unless_told():
    conv = PaddedConv2d(3, 2, 2, 2).double()
    assert conv(normal(1, 3, 5, 7)).shape == (1, 2, 2, 3)
