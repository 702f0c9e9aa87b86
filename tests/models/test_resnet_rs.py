import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from exact import moved, normal
from once import quick_run
from vitrail.app.build import count_flops
from vitrail.checks import resnet_rs as check
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.resnet_rs import FAMILY, ResNetRS, channels_of, deepest, multiply_adds, scaled, stages_of, widest
from vitrail.training.recipe import Recipe

TINY = {"layers": (2, 1, 1, 1), "width": 0.125, "num_classes": 3}


def normed(x, layer):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    scale, shift = (value[:, None, None] for value in (layer.weight, layer.bias))
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def slow_block(block, x, stride):
    """A bottleneck as the authors' code has it: the gate of channels before the sum."""
    y = normed(F.conv2d(x, block.conv1.weight), block.bn1).relu()
    y = normed(F.conv2d(y, block.conv2.weight, stride=stride, padding=1), block.bn2).relu()
    y = normed(F.conv2d(y, block.conv3.weight), block.bn3)
    gate = y.mean((2, 3), keepdim=True)
    gate = F.conv2d(gate, block.se.fc1.weight, block.se.fc1.bias).relu()
    y = y * torch.sigmoid(F.conv2d(gate, block.se.fc2.weight, block.se.fc2.bias))
    if block.downsample is not None:
        if stride == 2:  # means of two by two, and of what there is at the border
            rows, columns = (-(-side // 2) for side in x.shape[2:])
            means = [
                x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((2, 3))
                for row in range(rows)
                for column in range(columns)
            ]
            x = torch.stack(means, -1).unflatten(-1, (rows, columns))
        x = normed(F.conv2d(x, block.downsample[1].weight), block.downsample[2])
    return (x + y).relu()


def slow_net(model, x, strides):
    for place, stride in ((0, strides[0]), (3, 1), (6, 1)):
        norm = model.bn1 if place == 6 else model.conv1[place + 1]
        x = normed(F.conv2d(x, model.conv1[place].weight, stride=stride, padding=1), norm).relu()
    x = normed(F.conv2d(x, model.maxpool[0].weight, stride=strides[1], padding=1), model.maxpool[1]).relu()
    for number, stage in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        for place, block in enumerate(stage):
            x = slow_block(block, x, 2 if number and place == 0 else 1)
    return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("size", "stem"), [((19, 34), 4), ((12, 9), 2), ((5, 11), 1)])
def test_the_net_is_the_authors(size, stem):
    model = moved(ResNetRS(**TINY, stem_stride=stem)).train()
    x = normal(3, 3, *size).requires_grad_()
    found, wanted = model(x), slow_net(model, x, {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stem])
    torch.testing.assert_close(found, wanted)
    weight, leaves = normal(3, 3, seed=1), [x, *model.parameters()]
    ours, slow = (torch.autograd.grad((y * weight).sum(), leaves) for y in (found, wanted))
    for one, other in zip(ours, slow):
        torch.testing.assert_close(one, other)


def test_the_published_net_is_timms():
    torch.manual_seed(0)
    ours = create_model("resnet_rs", num_classes=4, layers=(1, 2, 1, 1), width=0.25).eval()
    narrow = {"layers": (1, 2, 1, 1), "channels": (16, 32, 64, 128), "stem_width": 8}
    theirs = create_model("resnetrs50", num_classes=4, **narrow).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 45, 61)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_depths_are_the_published():
    with torch.device("meta"):
        net = create_model("resnet_rs", num_classes=2)
        theirs = create_model("resnetrs152", num_classes=2)
    assert tuple(len(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)) == FAMILY[50]
    assert tuple(len(stage) for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)) == FAMILY[152]
    assert net.conv1[0].out_channels == 32 and net.layer1[0].conv1.out_channels == 64
    for depth, layers in FAMILY.items():
        assert stages_of(sum(layers)) == layers and abs(3 * sum(layers) + 2 - depth) <= 2
    for (depth, side), (_, madds) in check.PUBLISHED.items():
        assert madds is None or multiply_adds(FAMILY[depth], 1.0, side) / 1e9 == pytest.approx(madds, rel=0.01)


def test_it_begins_as_published():
    torch.manual_seed(0)
    model = ResNetRS((2, 1, 1, 1), 0.5, num_classes=20)
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        fan = conv.weight[0].numel()
        assert float(conv.weight.detach().std()) == pytest.approx(fan**-0.5, rel=0.15)
        assert float(conv.weight.detach().abs().max()) <= 2 * fan**-0.5 / 0.8796 + 1e-6
        assert conv.bias is None or not conv.bias.any()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            assert not block.bn3.weight.any() and (block.bn2.weight == 1).all()
    for _ in range(2):
        assert float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not model.fc.bias.any()
        model.reset_classifier(30)


def test_blocks_are_dropped_by_stage():
    model = ResNetRS(**TINY, drop_path_rate=0.5)
    for stage, rate in zip((model.layer1, model.layer2, model.layer3, model.layer4), (0.2, 0.3, 0.4, 0.5)):
        assert [block.drop_path.drop_prob for block in stage] == pytest.approx([rate] * len(stage))
    assert not any(isinstance(module, DropPath) for module in ResNetRS(**TINY).modules())


@pytest.mark.parametrize("stem", [1, 2, 4])
def test_features_are_where_they_say(stem):
    features = create_model("resnet_rs_nano", num_classes=0, stem_stride=stem, features_only=True)
    strides = features.feature_info.reduction()
    assert strides == {4: [2, 4, 8, 16, 32], 2: [2, 2, 4, 8, 16], 1: [1, 1, 2, 4, 8]}[stem]
    found = features.eval()(torch.randn(1, 3, 33, 50))
    assert [tuple(x.shape[2:]) for x in found] == [(-(-33 // s), -(-50 // s)) for s in strides]


# ---- the rules


@pytest.mark.parametrize(
    ("layers", "width", "side", "stem", "classes"),
    [((1, 1, 1, 1), 0.25, 32, 2, 10), ((2, 1, 3, 1), 0.375, 45, 4, 7), ((1, 2, 1, 2), 0.125, 29, 1, 3)],
)
def test_the_formula_of_the_cost_is_what_is_counted(layers, width, side, stem, classes):
    with torch.device("meta"):
        net = ResNetRS(layers, width, stem, num_classes=classes)
    counted = count_flops(net, (side, side))
    assert multiply_adds(layers, width, side, stem_stride=stem, num_classes=classes) == counted


def test_blocks_spread_as_in_the_published_nets():
    for count in (*range(4, 70), 100, 139, 200):
        layers = stages_of(count)
        assert sum(layers) == count and min(layers) >= 1
    costs = [multiply_adds(stages_of(count), 1.0, 160) for count in range(4, 160)]
    assert all(less < more for less, more in itertools.pairwise(costs))
    assert stages_of(24) == (3, 4, 14, 3)  # between 50 and 101 layers the third stage alone grows
    assert stages_of(58) == (3, 16, 36, 3)  # and between 152 and 200 the second
    assert stages_of(8) == (2, 2, 3, 1)


@pytest.mark.parametrize("budget", [0.8, 2.3, 3.1, 7.7, 30.0, 64.0])
def test_what_is_chosen_is_the_largest_within_the_budget(budget):
    long, short = (scaled(budget, regime) for regime in ("long", "short"))
    for found in (long, short):
        assert found.multiply_adds == multiply_adds(found.layers, found.width, found.resolution) <= budget * 1e9
    assert (long.width, short.layers, long.resolution) == (1.0, FAMILY[50], short.resolution)
    deeper = stages_of(sum(long.layers) + 1)
    assert multiply_adds(deeper, 1.0, long.resolution) > budget * 1e9
    assert multiply_adds(FAMILY[50], short.width + 0.125, short.resolution) > budget * 1e9


def test_resolution_grows_slowly():
    sides = [scaled(budget, "long").resolution for budget in (0.8, 2.3, 4.5, 9.1, 18.3, 36.5, 73, 146)]
    assert sides == [128, 160, 192, 224, 256, 288, 320, 320]
    for depth, side in check.PUBLISHED:
        found = scaled(multiply_adds(FAMILY[depth], 1.0, side) / 1e9, "long")
        assert abs(found.resolution - side) <= 32
    assert scaled(63.95, "long").depth == 419


def test_any_net_is_scaled_and_built():
    base = {"layers": (1, 1, 1, 1), "width": 0.25, "resolution": 30, "stem_stride": 2, "num_classes": 10}
    own = multiply_adds((1, 1, 1, 1), 0.25, 30, stem_stride=2, num_classes=10) / 1e9
    same = scaled(own, "short", **base)
    assert (same.layers, same.width, same.resolution) == ((1, 1, 1, 1), 0.25, 30)
    found = scaled(4 * own, "long", **base)
    assert found.resolution == 42 and sum(found.layers) > 4
    settings = found.settings()
    options = settings["model.options"]
    assert settings["model.img_size"] == 42 and options == {"layers": list(found.layers), "width": 0.25}
    with torch.device("meta"):
        net = create_model("resnet_rs", num_classes=10, stem_stride=2, **options)
    assert count_flops(net, (42, 42)) == found.multiply_adds
    assert found.depth == 3 * sum(found.layers) + 2


def test_halves_of_the_rule():
    assert deepest(10, sum) == stages_of(10) and deepest(1, sum) == stages_of(4)
    assert widest(0.6, lambda width: width) == 0.5 and widest(0, lambda width: 1) == 0.125
    assert [channels_of(width) for width in (0.01, 0.125, 0.35, 1, 1.5)] == [8, 8, 24, 64, 96]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 1, 1)}, r"layers = \(1, 1, 1\) .*4 stages"),
        ({"layers": (1, 0, 1, 1)}, r"layers = \(1, 0, 1, 1\)"),
        ({"width": 0}, "width = 0 .*above 0"),
        ({"width": float("inf")}, "width = inf .*above 0"),
        ({"stem_stride": 3}, "stem_stride = 3 .*1, 2 or 4"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate = 1\.0 .*\[0, 1\)"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        ResNetRS(**{**TINY, **options})


def test_what_cannot_be_scaled_is_explained():
    with pytest.raises(InputError, match=r"regime = 'medium' .*'long' or 'short'"):
        scaled(3.0, "medium")
    for budget in (float("nan"), float("inf"), "4"):
        with pytest.raises(InputError, match=r"budget = .* is not allowed: give billions"):
            scaled(budget, "long")
    for regime in ("long", "short"):
        with pytest.raises(InputError, match=r"a budget of 1e-05 G .* G of the least net"):
            scaled(1e-5, regime)
    with pytest.raises(InputError, match=r"global_pool = '' .*num_classes = 0"):
        ResNetRS(**TINY).reset_classifier(2, "")


# ---- the recipe and the check


def test_the_recipe_is_the_published_configuration():
    recipe = Recipe.load("resnet_rs")
    model, augment, optim, train = recipe.model, recipe.augment, recipe.optim, recipe.train
    assert (model.name, model.img_size, model.drop_rate, model.drop_path_rate) == ("resnet_rs", 160, 0.25, 0.0)
    assert model.crop_pct == pytest.approx(160 / 192, abs=1e-4)
    assert recipe.method.options == {"smoothing": 0.1}
    assert (augment.policy, augment.scale, augment.rand_augment, augment.mixup) == ("crop", (0.08, 1.0), 30, 0.0)
    assert (optim.name, optim.momentum, optim.weight_decay) == ("momentum", 0.9, 4e-5)
    assert optim.lr == pytest.approx(0.1 * train.batch_size / 256)
    assert (train.batch_size, train.epochs, train.ema, train.min_lr) == (4096, 350, 0.9999, 0.0)
    assert train.epochs * train.warmup == pytest.approx(5, rel=0.01)


def test_the_quick_check_runs():
    verdict, _ = quick_run(check)
    assert [finding.outcome for finding in verdict.findings][-2:] == ["confirmed", "confirmed"]
    costs = {row["arm"]: row["madds"] for row in verdict.tables["cost of the arms"]}
    assert costs["short, wide"] == pytest.approx(costs["short, deep"], rel=0.05)
    assert costs["short, wide"] > 2 * costs["short, base"]
