import math

import pytest
import torch
from timm.models import group_parameters

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks.simplenet import ARMS, HIDDEN, published_sizes, vgg_head
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.simplenet import Layer, SAFPool, SimpleNet, Stage, checkpoint_filter_fn, default_cfgs

TINY = {"num_classes": 3, "widths": (4, 5, 6, 7), "strides": (2, 1), "pools": (1, 3), "pointwise": (2,)}


def tiny(**options):
    torch.manual_seed(0)
    return SimpleNet(**{**TINY, **options})


# ---- slow loops, from the published code


def slow_conv(conv, x):
    """Convolve one image (C, H, W); beyond its edges are zeros."""
    reach, stride = conv.kernel_size[0] // 2, conv.stride[0]
    height, width = x.shape[1:]
    rows = []
    for row in range(0, height, stride):
        columns = []
        for column in range(0, width, stride):
            total = conv.bias
            for i in range(-reach, reach + 1):
                for j in range(-reach, reach + 1):
                    if 0 <= row + i < height and 0 <= column + j < width:
                        total = total + conv.weight[:, :, i + reach, j + reach] @ x[:, row + i, column + j]
            columns.append(total)
        rows.append(torch.stack(columns, -1))
    return torch.stack(rows, -2)


def slow_layer(layer, x):
    """Convolve, normalise with the stored statistics, and cut off below zero, for one image."""
    norm, y = layer.norm, slow_conv(layer.conv, x)
    y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return (y * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


def slow_pool(x):
    height, width = x.shape[1:]
    rows = [
        torch.stack([x[:, r : r + 2, c : c + 2].flatten(1).amax(1) for c in range(0, width, 2)], -1)
        for r in range(0, height, 2)
    ]
    return torch.stack(rows, -2)


def same(ours, theirs, given):
    """Compare values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("size", "kernel", "stride"), [((5, 4), 3, 1), ((5, 6), 3, 2), ((1, 1), 3, 2), ((3, 4), 1, 1)])
def test_a_layer_is_the_slow_loop(size, kernel, stride):
    layer = moved(Layer(3, 4, kernel, stride, 0.5)).eval()
    x = normal(2, 3, *size).requires_grad_()
    same(layer(x), torch.stack([slow_layer(layer, image) for image in x]), [x, *layer.parameters()])


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_saf_pooling_is_the_slow_loop(size):
    x = normal(2, 3, *size).requires_grad_()
    same(SAFPool(0.5).eval()(x), torch.stack([slow_pool(image) for image in x]), [x])


def test_saf_pooling_drops_whole_channels_of_the_pooled_map():
    torch.manual_seed(0)
    x = 1 + torch.rand(4, 50, 6, 6)
    pooled = SAFPool().train()(x)
    dropped = SAFPool(0.3).train()(x)
    gone = dropped.eq(0).flatten(2)
    assert torch.equal(gone.any(2), gone.all(2))
    assert 0.2 < float(gone.float().mean()) < 0.4
    kept = dropped.ne(0)
    torch.testing.assert_close(dropped[kept], pooled[kept] / 0.7)


@pytest.mark.parametrize("size", [(17, 14), (9, 5)])
def test_the_net_is_its_layers_and_the_strongest_place(size):
    model = moved(tiny()).eval()
    a, b, c, d = (module for module in model.modules() if isinstance(module, Layer))
    x = normal(2, 3, *size)
    answers = []
    for image in x:
        y = slow_layer(c, slow_layer(b, slow_pool(slow_layer(a, image))))
        y = slow_layer(d, slow_pool(y))
        answers.append(model.head.weight @ y.flatten(1).amax(1) + model.head.bias)
    torch.testing.assert_close(model(x), torch.stack(answers), rtol=1e-9, atol=1e-9)
    assert [layer.conv.kernel_size[0] for layer in (a, b, c, d)] == [3, 3, 1, 3]


def test_what_a_pooling_follows_is_dropped_behind_it():
    model = tiny(layer_drop_rate=0.2, drop_rate=0.4)
    assert [layer.drop.p for layer in model.modules() if isinstance(layer, Layer)] == [0, 0.2, 0, 0]
    assert [pool.drop.p for pool in model.modules() if isinstance(pool, SAFPool)] == [0.2, 0.2]
    assert model.drop.p == 0.4
    torch.manual_seed(1)
    assert Layer(3, 64, 3, 1, 0.5).train()(torch.rand(1, 3, 4, 4)).flatten(2).eq(0).all(2).float().mean() > 0.3


def test_weights_begin_as_published():
    model = create_model("simplenet_nano", num_classes=10)
    for layer in (module for module in model.modules() if isinstance(module, Layer)):
        places = layer.conv.kernel_size[0] ** 2
        bound = math.sqrt(2) * math.sqrt(6 / (places * (layer.conv.in_channels + layer.conv.out_channels)))
        assert 0.97 * bound < layer.conv.weight.detach().abs().max() <= bound
        own = 1 / math.sqrt(layer.conv.in_channels * places)
        assert 0 < layer.conv.bias.detach().abs().max() <= own
        assert layer.norm.momentum == 0.05
    bound = 1 / math.sqrt(model.num_features)
    assert 0.95 * bound < model.head.weight.detach().abs().max() <= bound
    assert model.head.bias.detach().abs().max() > 0


@pytest.mark.parametrize(
    ("name", "parameters", "reductions"),
    [
        ("simplenet_cifar_310k", 312_362, [1, 2, 4, 8, 16]),
        ("simplenet_cifar_460k", 385_790, [1, 2, 4, 8, 16]),
        ("simplenet_cifar_5m", 5_498_378, [1, 2, 4, 8, 16]),
        ("simplenet_cifar_5m_extra_pool", 5_498_378, [1, 2, 4, 8, 16, 32]),
        ("simplenetv1_small_m1_05", 1_379_082, [2, 4, 8, 16, 32]),
        ("simplenetv1_small_m2_05", 1_379_082, [2, 4, 8, 16, 32]),
        ("simplenetv1_small_m1_075", 3_096_202, [2, 4, 8, 16, 32]),
        ("simplenetv1_small_m2_075", 3_096_202, [2, 4, 8, 16, 32]),
        ("simplenetv1_5m_m1", 5_498_378, [2, 4, 8, 16, 32]),
        ("simplenetv1_5m_m2", 5_498_378, [2, 4, 8, 16, 32]),
        ("simplenetv1_9m_m1", 9_191_178, [2, 4, 8, 16, 32]),
        ("simplenetv1_9m_m2", 9_191_178, [2, 4, 8, 16, 32]),
    ],
)
def test_variants_are_as_published(name, parameters, reductions):
    with torch.device("meta"):
        model = create_model(name, num_classes=10)
    assert count_parameters(model) == parameters
    assert [info["reduction"] for info in model.feature_info] == reductions
    convs = [module.conv for module in model.modules() if isinstance(module, Layer)]
    assert len(convs) == 13
    assert [number for number, conv in enumerate(convs) if conv.kernel_size == (1, 1)] == [10, 11]
    strided = {"m1": [0, 1, 2], "m2": [0, 1, 3]}.get(name.split("_")[-2 if "small" in name else -1], [])
    assert [number for number, conv in enumerate(convs) if conv.stride == (2, 2)] == strided
    assert default_cfgs[name].default.input_size[1] == (32 if "cifar" in name else 224)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("simplenet_cifar_5m", [128, 256, 256, 256, 256]),
        ("simplenet_cifar_5m_extra_pool", [128, 256, 256, 512, 256, 256]),
        ("simplenetv1_5m_m1", [64, 128, 128, 512, 256]),
    ],
)
def test_resolution_falls_where_it_does_in_the_published_nets(name, widths):
    with torch.device("meta"):
        model = create_model(name, num_classes=2)
    assert [info["num_chs"] for info in model.feature_info] == widths


@pytest.mark.parametrize("rate", [None, 0.0])
def test_the_authors_keys_become_ours(rate):
    ours, twin = tiny(), tiny()
    state = {key: value + 1 for key, value in ours.state_dict().items()}
    theirs, number = {}, 0
    for i, name in enumerate(name for name, module in ours.named_modules() if isinstance(module, Layer)):
        number += 2 * (i in TINY["pools"])
        for part in ("conv", "norm"):
            theirs |= {
                f"features.{number}{key.removeprefix(f'{name}.{part}')}": value
                for key, value in state.items()
                if key.startswith(f"{name}.{part}.")
            }
            number += 1
        number += 1 + (rate is not None)  # the rectifier, and dropout where it has a rate
    assert {"features.0.weight", "features.1.running_var"} <= set(theirs)
    theirs |= {"classifier.weight": state["head.weight"], "classifier.bias": state["head.bias"]}
    for given in (theirs, {"state_dict": {f"module.{key}": value for key, value in theirs.items()}, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
        for key, value in twin.state_dict().items():
            assert torch.equal(value, state[key]), key
        twin.reset_classifier(3)
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def test_any_size_dense_features_and_groups():
    features = create_model("simplenet_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 45, 61))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 23, 31), (64, 6, 8), (64, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    with torch.device("meta"):
        assert create_model("simplenet_cifar_5m", num_classes=10)(torch.zeros(2, 3, 28, 28)).shape == (2, 10)
        assert create_model("simplenetv1_5m_m2", num_classes=10)(torch.zeros(2, 3, 225, 190)).shape == (2, 10)
    model = tiny(num_classes=0, global_pool="")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 7, 3, 5)
    assert model.eval()(torch.zeros(1, 3, 1, 1)).shape == (1, 7, 1, 1)
    nano = create_model("simplenet_nano", num_classes=10)
    groups = group_parameters(nano, nano.group_matcher(), reverse=True)
    assert sorted(set(groups.values())) == list(range(14))
    assert isinstance(model.stages[0], Stage)


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = {}
    for name, arm in ARMS.items():
        model = create_model(arm["model.name"], num_classes=10, **arm.get("model.options", {}))
        if "model.edits" in arm:
            model = vgg_head()(model)
            widths = [part.out_features for part in model.head if isinstance(part, torch.nn.Linear)]
            assert widths == [HIDDEN, HIDDEN, 10]
        assert model.eval()(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
        counts[name] = count_parameters(model)
    assert counts["vgg"] == pytest.approx(counts["simplenet"], rel=0.02)
    assert counts["resnet"] == pytest.approx(counts["simplenet"], rel=0.02)
    with pytest.raises(InputError, match="for a SimpleNet net, and this is a Linear"):
        vgg_head()(torch.nn.Linear(2, 2))


def test_published_sizes_are_counted():
    (row,) = published_sizes(["simplenetv1_small_m2_05"])
    assert row["params_m"] == pytest.approx(1.506792)
    assert row["madds_g"] == pytest.approx(0.42762752)
    assert row["params_off"] == row["madds_off"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, r"widths = \(\) times scale = 1.0 .*1 channel"),
        ({"scale": 0.01}, r"widths = \(4, 5, 6, 7\) times scale = 0.01 .*1 channel"),
        ({"strides": (3,)}, r"strides = \(3,\) .*1 or 2 for up to 4 layers"),
        ({"strides": (1, 1, 1, 1, 1)}, r"strides = .*1 or 2 for up to 4 layers"),
        ({"pools": (0,)}, r"pools = \(0,\) .*from 1 to 3"),
        ({"pools": (4,)}, r"pools = \(4,\) .*from 1 to 3"),
        ({"pointwise": (4,)}, r"pointwise = \(4,\) .*from 0 to 3"),
        ({"layer_drop_rate": 1.0}, "layer_drop_rate = 1.0 .*less than 1"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
