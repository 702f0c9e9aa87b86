import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.layers.rectifier_init import rectifier_init_, rectifier_std

LAYERS = [
    (nn.Linear(6, 10), 6, 10),
    (nn.Conv2d(8, 12, (3, 5)), 8 * 15, 12 * 15),
    (nn.Conv2d(8, 12, 3, groups=4), 2 * 9, 3 * 9),
    (nn.Conv1d(4, 6, 3, stride=2), 12, 18),
    (nn.ConvTranspose2d(8, 4, 4, stride=2), 8 * 4, 4 * 16),
]


@pytest.mark.parametrize(("layer", "inputs", "outputs"), LAYERS)
def test_the_deviation_is_the_papers(layer, inputs, outputs):
    for slope in (0.0, 0.25, 1.0):
        assert rectifier_std(layer, slope) ** 2 == pytest.approx(2 / ((1 + slope**2) * inputs))
        assert rectifier_std(layer, slope, "backward") ** 2 == pytest.approx(2 / ((1 + slope**2) * outputs))


@pytest.mark.parametrize("slope", [0.0, 0.25, 0.8])
def test_variances_stay_through_a_layer(slope):
    torch.manual_seed(0)
    layers = [nn.Linear(400, 700), nn.Conv2d(128, 64, 3), nn.ConvTranspose2d(64, 32, 4, stride=2)]
    inputs = [(64, 400), (4, 128, 9, 9), (4, 64, 12, 12)]
    for layer, shape in zip(layers, inputs):
        rectifier_init_(layer, slope)
        y = layer(nn.functional.leaky_relu(torch.randn(shape), slope))
        middle = y if y.ndim == 2 else y[..., 4:-4, 4:-4] if layer.stride == (2, 2) else y
        assert float(middle.detach().var()) == pytest.approx(1, abs=0.12)


def test_gradients_stay_through_a_layer():
    torch.manual_seed(0)
    layer = rectifier_init_(nn.Linear(700, 400), 0.25, "backward")
    x = torch.randn(64, 700, requires_grad=True)
    (found,) = torch.autograd.grad(layer(nn.functional.leaky_relu(x, 0.25)), x, torch.randn(64, 400))
    assert float(found.var()) == pytest.approx(1, abs=0.12)


def test_it_begins_any_model_and_leaves_norms_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3, bias=False), nn.BatchNorm2d(40), nn.Sequential(nn.Linear(40, 300)))
    with torch.no_grad():
        model[1].weight.fill_(7)
        model[1].bias.fill_(7)
    assert rectifier_init_(model) is model
    assert (model[1].weight == 7).all()
    assert (model[1].bias == 7).all()
    assert not model[2][0].bias.any()
    assert float(model[0].weight.detach().std()) == pytest.approx((2 / 27) ** 0.5, rel=0.1)
    assert float(model[2][0].weight.detach().std()) == pytest.approx(0.05**0.5, rel=0.05)


def test_what_it_cannot_begin_is_explained():
    with pytest.raises(InputError, match="no linear layer and no convolution in ReLU"):
        rectifier_init_(nn.ReLU())
    with pytest.raises(InputError, match=r"direction = 'up' .*'forward' or 'backward'"):
        rectifier_init_(nn.Linear(2, 2), direction="up")
    with pytest.raises(InputError, match="this is a BatchNorm2d"):
        rectifier_std(nn.BatchNorm2d(3))
