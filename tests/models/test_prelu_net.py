import math

import pytest
import torch
from torch import nn

from exact import moved, normal
from vitrail.checks.prelu_net import THIRTY, begun, variances
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.prelu_net import PReLUNet, SpatialPyramid, rectifier

TINY = {"stem_width": 4, "depths": (2, 1), "widths": (5, 6), "hidden": 7, "levels": (2, 1), "num_classes": 3}


@pytest.mark.parametrize("kind", ["channel", "shared"])
def test_a_rectifier_is_the_papers(kind):
    act = moved(rectifier(kind, 3))
    assert act.weight.shape == ((3,) if kind == "channel" else (1,))
    y = normal(2, 3, 4, 5).requires_grad_()
    grade = normal(2, 3, 4, 5, seed=1)
    wanted, slopes = torch.zeros_like(y), torch.zeros(3, dtype=torch.float64)
    inputs = torch.zeros_like(y)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in y.shape)).tolist():
        at = tuple(place)
        value, channel = y[at].item(), at[1]
        slope = act.weight[channel if kind == "channel" else 0].item()
        wanted[at] = max(0.0, value) + slope * min(0.0, value)
        inputs[at] = grade[at] * (1.0 if value > 0 else slope)
        slopes[channel] += grade[at] * min(0.0, value)  # equations 3 and 4
    found = act(y)
    torch.testing.assert_close(found, wanted.detach())
    own, of_slope = torch.autograd.grad((found * grade).sum(), (y, act.weight))
    torch.testing.assert_close(own, inputs.detach())
    torch.testing.assert_close(of_slope, slopes if kind == "channel" else slopes.sum().view(1))


@pytest.mark.parametrize("size", [(14, 14), (5, 3), (1, 2)])
def test_the_pyramid_takes_the_largest_of_each_bin(size):
    x = normal(2, 3, *size)
    wanted = []
    for level in (7, 3, 2, 1):
        for channel in range(3):
            for row in range(level):
                for column in range(level):
                    down = slice(math.floor(row * size[0] / level), math.ceil((row + 1) * size[0] / level))
                    across = slice(math.floor(column * size[1] / level), math.ceil((column + 1) * size[1] / level))
                    wanted.append(x[:, channel, down, across].amax((1, 2)))
    torch.testing.assert_close(SpatialPyramid((7, 3, 2, 1))(x), torch.stack(wanted, 1))


@pytest.mark.parametrize(("kind", "slope"), [("channel", 0.25), ("shared", 0.25), ("relu", 0.0)])
def test_it_is_plain_layers_and_begins_as_published(kind, slope):
    torch.manual_seed(0)
    model = PReLUNet(**{**TINY, "widths": (40, 60), "hidden": 90}, rectifier_kind=kind, drop_rate=0.5).eval()
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 4 + 3
    x = y = torch.randn(2, 3, 45, 61)
    for number, layer in enumerate(layers):
        std = 0.01 if number == 6 else (2 / ((1 + slope**2) * layer.weight[0].numel())) ** 0.5
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.15)
        assert not layer.bias.any()
        if number in (1, 3):
            y = nn.functional.max_pool2d(y, 2, ceil_mode=True)
        if number == 4:
            y = torch.cat([nn.functional.adaptive_max_pool2d(y, level).flatten(1) for level in (2, 1)], 1)
        y = layer(y)
        y = y if number == 6 else nn.functional.leaky_relu(y, slope)
    torch.testing.assert_close(model(x), y)
    wide = PReLUNet(**{**TINY, "hidden": 600}, rectifier_kind=kind).hidden[3].weight.detach()
    assert float(wide.std()) == pytest.approx((2 / (1 + slope**2) / 600) ** 0.5, rel=0.01)
    assert model.stem.conv.stride == (2, 2)
    model.reset_classifier(400)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert sum(isinstance(module, nn.PReLU) for module in model.modules()) == (0 if kind == "relu" else 6)


@pytest.mark.parametrize(
    ("name", "layers", "widths"),
    [("a", 19, (256, 512, 512)), ("b", 22, (256, 512, 512)), ("c", 22, (384, 768, 896))],
)
def test_published_nets_have_the_layers_of_the_paper(name, layers, widths):
    with torch.device("meta"):
        model = create_model(f"prelu_net_{name}", num_classes=1000)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == layers
    assert (model.stem.conv.out_channels, model.stem.conv.kernel_size) == (96, (7, 7))
    assert tuple(info["num_chs"] for info in model.feature_info) == widths
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16]
    assert (model.pyramid.levels, model.head_hidden_size) == ((7, 3, 2, 1), 4096)


def test_dropout_is_behind_both_layers():
    torch.manual_seed(0)
    model = PReLUNet(**{**TINY, "hidden": 1000}, drop_rate=0.5).train()
    seen = []
    model.hidden[3].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(torch.randn(2, 3, 33, 20))
    assert [float((value == 0).float().mean()) for value in seen] == pytest.approx([0.5, 0.5], abs=0.1)


def test_pooling_can_be_left_off_and_comes_back():
    model = PReLUNet(**{**TINY, "num_classes": 0}, global_pool="").eval()
    x = torch.randn(1, 3, 33, 20)
    assert model(x).shape == (1, 6, 5, 3)
    model.reset_classifier(0, "spp")
    assert model(x).shape == (1, 7)
    model.reset_classifier(4)
    assert model(x).shape == (1, 4)


def test_the_checks_plain_net_has_thirty_layers():
    model = create_model("prelu_net_nano", num_classes=10, **THIRTY)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == 30
    torch.manual_seed(0)
    begun(slope=1.0)(model)
    hidden = model.hidden[0].weight.detach()
    assert float(hidden.std()) == pytest.approx(hidden.shape[1] ** -0.5, rel=0.05)  # Xavier's
    assert float(model.head.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    lost = {(row["slope"], row["direction"]): row["change"] for row in variances() if row["beginning"] == "Xavier"}
    for slope in (0.0, 0.25):
        wanted = 29 * math.log2((1 + slope**2) / 2)
        assert lost[slope, "forward"] == pytest.approx(wanted, abs=2)
        assert lost[slope, "backward"] == pytest.approx(wanted, abs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1,)}, r"depths = \(1,\) .*for each stage"),
        ({"depths": (1, 0)}, r"depths = \(1, 0\)"),
        ({"hidden": 0}, "hidden = 0 .*one channel"),
        ({"stem_kernel": 4}, "stem_kernel = 4 .*odd side"),
        ({"stem_stride": 0}, "stem_stride = 0"),
        ({"levels": (2, 0)}, r"levels = \(2, 0\) .*1 or more"),
        ({"levels": ()}, r"levels = \(\)"),
        ({"rectifier_kind": "elu"}, "rectifier_kind = 'elu' .*'channel', 'shared' or 'relu'"),
        ({"global_pool": "max"}, "global_pool = 'max' .*'spp'"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        PReLUNet(**{**TINY, **options})
