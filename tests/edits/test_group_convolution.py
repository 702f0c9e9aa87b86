import copy
import math
import re

import pytest
import timm
import torch
from torch import nn

from once import quick_run
from vitrail.checks import e2gc as check
from vitrail.edits.group_convolution import group_convolution, layer_costs, model_optimum, optimum_size
from vitrail.errors import InputError
from vitrail.evaluate.energy import work


def grouped(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) and m.in_channels > 3]


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_groups_have_one_size_in_all_layers(size):
    model = on_meta("resnext50_32x4d")
    assert group_convolution(size=size)(model) is model
    layers = grouped(model)
    assert len(layers) == 16
    assert {layer.in_channels // layer.groups for layer in layers} == {size}
    assert [layer.weight.shape[1] for layer in layers] == [size] * 16


def test_mobilenet_and_where_channels_are_fewer():
    model = group_convolution(size=64)(on_meta("mobilenetv1_100"))
    assert [layer.groups for layer in grouped(model)] == [1, 1, 2, 2, 4, 4, 8, 8, 8, 8, 8, 8, 16]
    model = group_convolution(size=6)(on_meta("mobilenetv1_100"))  # 4 divides the widths
    assert {layer.in_channels // layer.groups for layer in grouped(model)} == {4}


def test_a_number_of_groups_is_the_other_form():
    model = group_convolution(groups=64)(on_meta("mobilenetv1_100"))
    assert [layer.groups for layer in grouped(model)] == [32, 64] + [64] * 11


def test_a_number_of_groups_divides_the_channels():
    net = group_convolution(groups=5)(nn.Sequential(nn.Conv2d(12, 18, 3, groups=2)))
    assert net[0].groups == 3


def test_where_no_size_so_small_fits_it_is_the_least_that_does():
    model = nn.Sequential(nn.Conv2d(12, 4, 1, groups=2))  # groups of 1 or 2 channels would leave some without outputs
    group_convolution(size=2)(model)
    assert model[0].groups == 4
    model = nn.Sequential(nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 4, 3, groups=2))
    group_convolution(size=1)(model)
    assert [conv.groups for conv in model] == [2, 4]


def test_multiply_adds_follow_the_size():
    images = torch.zeros(1, 3, 32, 32, device="meta")
    plain = on_meta("mobilenetv1_100")
    found = [work(group_convolution(size=size)(copy.deepcopy(plain)).eval(), images)[0] for size in (2, 4, 8)]
    assert found[2] - found[1] == pytest.approx(2 * (found[1] - found[0]))


def test_new_weights_are_drawn_by_how_many_outputs_an_input_has():
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 128, 3, 2, 1, 2, groups=64)
    net = group_convolution(size=16)(nn.Sequential(conv).double().eval())
    (new,) = net
    assert new.groups == 4
    assert float(new.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05)
    assert not new.bias.any()
    assert (new.stride, new.padding, new.dilation) == (conv.stride, conv.padding, conv.dilation)
    assert new.weight.dtype == torch.float64
    assert not new.training
    assert net(torch.zeros(1, 64, 9, 9).double()).shape == conv.double()(torch.zeros(1, 64, 9, 9).double()).shape


def slow_costs(size, m, n, side, out, taps):
    """Count one multiply-add and one fetch at a time."""
    macs = sum(1 for _ in range(out * out) for _ in range(n) for _ in range(size) for _ in range(taps))
    fetched = m * side * side + n * out * out + n * size * taps
    return macs, 4 * fetched


@pytest.mark.parametrize(("size", "m", "n", "side", "out"), [(1, 6, 6, 5, 5), (3, 6, 12, 5, 3), (2, 4, 2, 3, 3)])
def test_costs_are_counts(size, m, n, side, out):
    found = layer_costs(size, (m, n), (side * side, out * out), 9, per_mac=2.0, per_byte=3.0)
    macs, moved = slow_costs(size, m, n, side, out, 9)
    assert found == (2.0 * macs, 3.0 * moved)


@pytest.mark.parametrize(("channels", "places"), [((256, 256), (196, 196)), ((64, 128), (3136, 784))])
def test_at_the_optimum_computing_costs_what_moving_does(channels, places):
    size = optimum_size(channels, places, 9)
    assert 1 < size < channels[0]
    computed, moved = layer_costs(size, channels, places, 9)
    assert computed == pytest.approx(moved)
    assert optimum_size(channels, places, 9, per_byte=1e-15) < size
    assert optimum_size((8, 8), places, 9) == min(8, optimum_size((8, 8), places, 9))
    assert optimum_size((16, 16), (1, 1), 9) == 16


def test_the_optimum_of_a_model_is_the_mean_over_its_layers():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.Conv2d(64, 64, 2, 2, groups=2)
    )
    net[1].eval()
    costs = {"per_mac": 1.0, "per_byte": 8.0}
    each = [optimum_size((64, 64), (256, 256), 9, **costs), optimum_size((64, 64), (256, 64), 4, **costs)]
    assert model_optimum(net, 32, **costs) == 2 ** round(sum(map(math.log2, each)) / 2)
    assert [layer.training for layer in net] == [True, False, True]
    assert not any(layer._forward_hooks for layer in net)
    edited = group_convolution(side=32)(copy.deepcopy(net))
    wanted = model_optimum(net, 32)
    assert {layer.in_channels // layer.groups for layer in edited[1:]} == {wanted}


def test_a_pattern_groups_dense_layers_too():
    model = on_meta("resnet18")
    group_convolution(size=16, modules=r"layer4\..*conv2")(model)
    assert [m.groups for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1] == [32, 32]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size = 0"),
        ({"size": 2.0}, "size = 2.0"),
        ({"groups": True}, "groups = True"),
        ({"side": -1}, "side = -1"),
        ({"size": 2, "groups": 2}, "size = 2 with groups = 2"),
        ({"modules": "a("}, "no regular expression"),
    ],
)
def test_a_wrong_option_is_refused(options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        group_convolution(**options)


def test_a_model_without_grouped_layers_is_refused():
    with pytest.raises(InputError, match="found no grouped convolution whose groups would become of size 4 in ResNet"):
        group_convolution(size=4)(on_meta("resnet18"))
    with pytest.raises(InputError, match="found no grouped convolution whose groups would become 32 in ResNet"):
        group_convolution(groups=32)(on_meta("resnext50_32x4d"))
    with pytest.raises(InputError, match="ResNet has no grouped convolution"):
        model_optimum(on_meta("resnet18"))


def test_the_crossing_is_the_last_where_time_doubles():
    assert check.crossing((1, 2, 4, 8), (1.0, 3.0, 1.0, 4.0)) == pytest.approx(4 * math.sqrt(2))
    assert check.crossing((1, 2), (1.0, 1.5)) == 2


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert len(verdict.findings) == 5
    rows = {(row["net"], row["arm"]): row for row in verdict.tables["nets"]}
    for net in check.NETS:
        assert rows[net, "size"]["macs"] == pytest.approx(rows[net, "count"]["macs"], rel=0.2)
    assert [row["size"] for row in verdict.tables["sizes"]] == list(check.SIZES)
