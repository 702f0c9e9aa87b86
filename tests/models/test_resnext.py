import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck
from torch import nn

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.resnext import ResNeXt, block_cost, checkpoint_filter_fn, preserved_width

TINY = {"layers": (2, 1), "channels": (4, 8), "cardinality": 2, "base_width": 32, "stem_stride": 1}


def paths_one_by_one(block, x, paths):
    """Equation 3 of the paper: y = x + sum of T_i(x), each path with its own slices of the weights."""

    def norm(y, bn, part):
        return F.batch_norm(y, None, None, bn.weight[part], bn.bias[part], training=True, eps=bn.eps)

    width = block.conv1.out_channels // paths
    total = 0
    for path in range(paths):
        part = slice(path * width, (path + 1) * width)
        y = F.relu(norm(F.conv2d(x, block.conv1.weight[part]), block.bn1, part))
        y = F.relu(norm(F.conv2d(y, block.conv2.weight[part], stride=block.stride, padding=1), block.bn2, part))
        total = total + F.conv2d(y, block.conv3.weight[:, part])
    shortcut = x if block.downsample is None else block.downsample(x)
    return F.relu(shortcut + norm(total, block.bn3, slice(None)))


@pytest.mark.parametrize(("paths", "width", "size"), [(1, 16, (5, 5)), (3, 32, (4, 7)), (4, 16, (1, 3))])
def test_a_block_sums_its_paths(paths, width, size):
    net = ResNeXt((2, 2), paths, width, channels=(8, 16), stem_stride=1, num_classes=0)
    blocks = [(block, 32 if stage else 8) for stage, block in enumerate((net.layer1[0], net.layer2[0]))]
    blocks.append((net.layer1[1], 32))
    for block, wide in blocks:
        block = moved(block).train()
        x = normal(2, wide, *size).requires_grad_()
        leaves = [x, *block.parameters()]
        found, wanted = block(x), paths_one_by_one(block, x, paths)
        torch.testing.assert_close(found, wanted)
        grade = normal(*found.shape, seed=1)
        for own, other in zip(
            torch.autograd.grad((found * grade).sum(), leaves), torch.autograd.grad((wanted * grade).sum(), leaves)
        ):
            torch.testing.assert_close(own, other)


def test_the_cost_of_a_block_is_its_weights():
    for paths, width in ((1, 64), (8, 14), (32, 4)):
        block = Bottleneck(256, 64, cardinality=paths, base_width=width)
        weights = sum(conv.weight.numel() for conv in block.modules() if isinstance(conv, nn.Conv2d))
        assert block_cost(paths, width) == weights


def test_the_rule_gives_the_papers_widths():
    assert {paths: preserved_width(paths) for paths in (1, 2, 4, 8, 32)} == {1: 64, 2: 40, 4: 24, 8: 14, 32: 4}
    assert [preserved_width(paths, 2.0) for paths in (1, 2, 64)] == [99, 64, 4]


@pytest.mark.parametrize("complexity", [0.25, 1.0, 3.0])
def test_no_other_width_is_nearer_in_cost(complexity):
    target = complexity * (256 * 64 + 9 * 64 * 64 + 64 * 256)
    for paths in (1, 3, 7, 16, 40):
        cost = {width: paths * (256 * width + 9 * width * width + width * 256) for width in range(1, 200)}
        assert preserved_width(paths, complexity) == min(cost, key=lambda width: abs(cost[width] - target))


def test_paths_and_widths_are_free():
    for paths, width in ((1, None), (5, None), (8, 24), (3, 100)):
        with torch.device("meta"):
            net = ResNeXt((1, 1), paths, width, channels=(64, 128), stem_stride=2, num_classes=0)
        own = preserved_width(paths) if width is None else width
        assert [net.layer1[0].conv2.groups, net.layer2[0].conv2.groups] == [paths, paths]
        assert [net.layer1[0].conv2.out_channels, net.layer2[0].conv2.out_channels] == [paths * own, 2 * paths * own]
    with torch.device("meta"):
        default, eight = (create_model("resnext50", num_classes=9, **own) for own in ({}, {"cardinality": 8}))
    assert (default.layer4[0].conv2.groups, default.layer4[0].conv2.out_channels) == (32, 32 * 32)
    assert (eight.layer1[0].conv2.groups, eight.layer1[0].conv2.out_channels) == (8, 8 * 14)


def test_the_net_for_imagenet_is_timms():
    torch.manual_seed(0)
    small = {"layers": (1, 1, 1, 1), "channels": (64, 8, 8, 8)}
    ours = ResNeXt(cardinality=2, base_width=32, num_classes=5, **small).eval()
    theirs = timm.models.resnet.ResNet(Bottleneck, cardinality=2, base_width=32, num_classes=5, **small).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 45, 61)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.feature_info == theirs.feature_info


@pytest.mark.parametrize(("name", "millions"), [("resnext29_8x64d", 34.4), ("resnext29_16x64d", 68.1)])
def test_nets_for_small_images_are_the_published(name, millions):
    with torch.device("meta"):
        model = create_model(name, num_classes=10)
        assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert [len(model.layer1), len(model.layer2), len(model.layer3), len(model.layer4)] == [3, 3, 3, 0]
    assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4]
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.out_channels) == ((3, 3), (1, 1), 64)


@pytest.mark.parametrize(("depth", "layers"), [("101", [3, 4, 23, 3]), ("152", [3, 8, 36, 3])])
def test_depths_are_the_published(depth, layers):
    with torch.device("meta"):
        model = create_model(f"resnext{depth}", num_classes=2)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == layers


def test_it_begins_as_published():
    torch.manual_seed(0)
    model = create_model("resnext_nano", num_classes=10, cardinality=2, base_width=64)
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        # Of all outputs, not those of a group.
        std = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert float(conv.weight.detach().std()) == pytest.approx(std, rel=0.12)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
    assert not model.fc.bias.any()
    model.reset_classifier(4)
    assert not model.fc.bias.any()


@pytest.mark.parametrize("stride", [1, 2])
def test_features_are_those_of_the_stages_there_are(stride):
    model = ResNeXt(**{**TINY, "stem_stride": stride}, num_classes=3).eval()
    assert [info["reduction"] for info in model.feature_info] == [stride, stride, 2 * stride]
    x = torch.randn(1, 3, 33, 20)
    with torch.no_grad():
        last, found = model.forward_intermediates(x)
        (only,) = model.forward_intermediates(x, [-2], intermediates_only=True)
        logits = model(x)
    sides = [-(-33 // reduction) for reduction in (stride, stride, 2 * stride)]
    assert [value.shape[1:3] for value in found] == list(zip((4, 16, 32), sides))
    torch.testing.assert_close(found[1], only)
    torch.testing.assert_close(last, found[2])
    torch.testing.assert_close(model.forward_head(last), logits)
    assert model.prune_intermediate_layers([0, 2], prune_head=False) == [0, 2]
    torch.testing.assert_close(model(x), logits)
    assert (model.num_features, model.head_hidden_size) == (32, 32)
    assert model.prune_intermediate_layers(1) == [2]
    assert (model.num_classes, model(x).shape[1]) == (0, 32)
    assert model.prune_intermediate_layers([1]) == [1]
    assert (len(model.layer2), model.num_features, model(x).shape[1]) == (0, 16, 16)


def numbered(model):
    """Return a state named by the places that the authors' code gives its modules."""
    state = {}
    for key, value in model.state_dict().items():
        owner, _, kind = key.rpartition(".")
        if kind == "num_batches_tracked":
            continue
        if owner == "fc":
            place = "11"
        elif not owner.startswith("layer"):
            place = {"conv1": "0", "bn1": "1"}[owner]
        else:
            stage, block, part = owner.split(".", 2)
            inside = {"conv1": "0.0", "bn1": "0.1", "conv2": "0.3", "bn2": "0.4", "conv3": "0.6", "bn3": "0.7"}
            inside |= {"downsample.0": "1.0", "downsample.1": "1.1"}
            place = f"{int(stage[5:]) + 2}.{block}.0.{inside[part]}"
        state[f"{place}.{kind}"] = value
    return state


def test_the_authors_checkpoints_are_renamed():
    torch.manual_seed(0)
    model = ResNeXt(**{**TINY, "layers": (2, 11)}, num_classes=3)  # place 10 comes after place 9
    own = {key: value for key, value in model.state_dict().items() if not key.endswith("tracked")}
    state = numbered(model)
    backwards = dict(reversed(state.items()))
    renamed = {f"features.{key}": value for key, value in state.items() if not key.startswith("11.")}
    renamed |= {"last_linear.weight": state["11.weight"], "last_linear.bias": state["11.bias"]}
    wrapped = {"state_dict": {f"module.{key}": value for key, value in own.items()}}
    for given in (state, backwards, renamed, wrapped, own):
        found = checkpoint_filter_fn(given, model)
        assert found.keys() == own.keys()
        assert all(found[key] is own[key] or torch.equal(found[key], own[key]) for key in own)
    with pytest.raises(InputError, match=r"85 numbered modules .* the model has 25"):
        checkpoint_filter_fn(state, ResNeXt(**TINY))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 1, 1)}, r"layers = \(1, 1, 1\) .*1 to 4 stages"),
        ({"layers": (1, 0)}, r"layers = \(1, 0\)"),
        ({"layers": (), "channels": ()}, "1 to 4 stages"),
        ({"stem_stride": 3}, "stem_stride = 3 .*1, 2 or 4"),
        ({"cardinality": 2.5}, "cardinality = 2.5 .*whole number"),
        ({"cardinality": 0}, "0 paths .*at least one path"),
        ({"cardinality": 0, "base_width": None}, "cardinality = 0"),
        ({"base_width": 15}, r"base_width = 15 .*base_width = 16\.0"),
        ({"cardinality": 201, "base_width": None}, "cardinality = 201 is too many .*at most 200"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        ResNeXt(**{**TINY, **options})


def test_a_pooling_without_classifier_is_refused_later_too():
    model = ResNeXt(**TINY, num_classes=2)
    with pytest.raises(InputError, match=r"global_pool = '' .*num_classes = 0"):
        model.reset_classifier(2, "")
    with pytest.raises(InputError, match=r"complexity = 0\.0 is not allowed"):
        preserved_width(1, 0.0)
