import pytest
import torch
import torch.nn.functional as F

from vitrail.layers.large_kernel import LargeKernelConv2d, convolved


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


GRID = [
    (1, 1, (3, 4)),
    (3, 1, (5, 4)),
    (3, 5, (3, 9)),
    (5, 2, (1, 7)),
    (13, 1, (6, 5)),
    (15, 1, (3, 3)),
    (3, 7, (8, 5)),
]


def slow(x, weight, bias, dilation):
    """Sum the taps of the window, one place at a time."""
    batch, channels, height, width = x.shape
    side = weight.shape[-1]
    rows = []
    for row in range(height):
        for column in range(width):
            total = bias.expand(batch, channels)
            for i in range(side):
                for j in range(side):
                    y, z = row + dilation * (i - side // 2), column + dilation * (j - side // 2)
                    if 0 <= y < height and 0 <= z < width:
                        total = total + weight[:, 0, i, j] * x[:, :, y, z]
            rows.append(total)
    return torch.stack(rows, -1).view(x.shape)


@pytest.mark.parametrize(("side", "dilation", "size"), GRID)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_slow_loop(side, dilation, size, layout):
    x = normal(2, 3, *size).contiguous(memory_format=layout).requires_grad_()
    weight, bias = normal(3, 1, side, side, seed=1).requires_grad_(), normal(3, seed=2).requires_grad_()
    given, weighing = (x, weight, bias), normal(2, 3, *size, seed=3)
    found = [
        [out, *torch.autograd.grad((out * weighing).sum(), given)]
        for out in (convolved(x, weight, bias, dilation), slow(x, weight, bias, dilation))
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert found[0][0].shape == x.shape


def test_its_gradients_have_gradients():
    x, weight = normal(1, 2, 4, 3).requires_grad_(), normal(2, 1, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, weight: convolved(x, weight, None, 2), (x, weight))


def test_gradients_that_nobody_wants_are_left_out():
    x, weight = normal(1, 2, 4, 3), normal(2, 1, 3, 3, seed=1).requires_grad_()
    convolved(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    assert not convolved(x, weight.detach()).requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_torchs(bias):
    torch.manual_seed(0)
    layer = LargeKernelConv2d(4, 5, 2, bias=bias)
    x = torch.randn(2, 4, 7, 6)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=4, dilation=2, groups=4)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x[None])[0].detach(), expected.detach())


def test_low_precision_is_summed_in_float32():
    torch.manual_seed(0)
    layer, x = LargeKernelConv2d(4, 13, bias=True), torch.randn(2, 4, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            exact = layer(x)
        torch.testing.assert_close(layer(x), exact.bfloat16(), rtol=0, atol=0)
    low = layer.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    low.sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16


def test_where_a_graph_is_recorded_it_is_torchs_own(monkeypatch):
    layer, x = LargeKernelConv2d(4, 15), torch.zeros(1, 4, 8, 8)
    assert "Convolution" in layer(x).grad_fn.name()
    assert layer(x).grad_fn.name() != "ConvolutionBackward0"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer(x).grad_fn.name() == "ConvolutionBackward0"
