import pytest
import torch
import torch.nn.functional as F

from vitrail.layers.clamp import clamp


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 1.0)])
def test_equals_hardtanh_at_and_around_the_limits(low, high, inplace):
    torch.manual_seed(0)
    values = torch.cat([torch.randn(1000) * 5, torch.tensor([low, high, low - 1e-6, high + 1e-6, 0.0])])
    grad = torch.randn_like(values)
    results = []
    for function in (lambda x: F.hardtanh(x, low, high), lambda x: clamp(x, low, high, inplace=inplace)):
        leaf = values.clone().requires_grad_()
        out = function(leaf * 1)
        out.backward(grad)
        results.append((out.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_inplace_writes_into_its_input():
    x = torch.tensor([-1.0, 3.0, 9.0])
    assert clamp(x, 0, 6, inplace=True).data_ptr() == x.data_ptr()
    assert x.tolist() == [0, 3, 6]
