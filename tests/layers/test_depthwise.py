import pytest
import torch

from vitrail.layers.depthwise import DepthwiseForm, depthwise_conv2d


def gradients(x, weight, bias, grad, stride, padding, form):
    leaves = [value.clone(memory_format=torch.preserve_format).requires_grad_() for value in (x, weight, bias)]
    out = depthwise_conv2d(*leaves, stride, padding, form=form)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def reference(x, weight, bias, grad, stride, padding):
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    out = torch.conv2d(*leaves, stride, padding, 1, x.shape[1])
    out.backward(grad.double())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("window", [(3, 3), (5, 5), (7, 7), (5, 4), (1, 6)])
@pytest.mark.parametrize("pad", ["same", "none", "wide"])
def test_split_gradients_equal_fp64(window, stride, pad, layout):
    torch.manual_seed(0)
    padding = {"same": (window[0] // 2, window[1] // 2), "none": (0, 0), "wide": (window[0] // 2, window[1])}[pad]
    x = torch.randn(3, 20, 9, 11).contiguous(memory_format=layout)
    weight, bias = torch.randn(20, 1, *window), torch.randn(20)
    grad = torch.randn_like(torch.conv2d(x, weight, bias, stride, padding, 1, 20))
    want = reference(x, weight, bias, grad, stride, padding)
    for got, exact in zip(gradients(x, weight, bias, grad, stride, padding, DepthwiseForm(split=True)), want):
        assert got.shape == exact.shape
        assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("plane", [(1, 1), (2, 3), (1, 2), (4, 1)])
def test_a_plane_may_be_smaller_than_the_window(plane, stride):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 8, *plane), torch.randn(8, 1, 7, 7), torch.randn(8)
    grad = torch.randn_like(torch.conv2d(x, weight, bias, stride, (3, 3), 1, 8))
    want = reference(x, weight, bias, grad, stride, (3, 3))
    for got, exact in zip(gradients(x, weight, bias, grad, stride, (3, 3), DepthwiseForm(split=True)), want):
        assert got.shape == exact.shape
        assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("weight_fp32", [False, True])
@pytest.mark.parametrize("input_fp32", [False, True])
def test_bf16_forms_stay_near_fp64(split, weight_fp32, input_fp32):
    torch.manual_seed(1)
    x, weight, bias = (v.bfloat16() for v in (torch.randn(4, 16, 10, 10), torch.randn(16, 1, 5, 5), torch.randn(16)))
    grad = torch.randn(4, 16, 10, 10).bfloat16()
    got = gradients(x, weight, bias, grad, (1, 1), (2, 2), DepthwiseForm(split, weight_fp32, input_fp32))
    for value, exact in zip(got, reference(x, weight, bias, grad, (1, 1), (2, 2))):
        assert value.dtype == torch.bfloat16
        assert (value.double() - exact).abs().max() <= 0.02 * exact.abs().max()


def test_frozen_parts_get_no_gradient():
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 1, 5, 5, requires_grad=True)
    depthwise_conv2d(x, weight, None, (1, 1), (2, 2), form=DepthwiseForm(split=True)).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
