"""ConvFirst against slow loops written from its figure."""

import copy

import pytest
import torch
from timm.utils import reparameterize_model
from torch import nn

from exact import moved, normal, same
from vitrail.app.build import count_parameters
from vitrail.app.check import check
from vitrail.checks.convfirst import NETS, QUICK_NETS, arms
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.convfirst import (
    ConvFirst,
    ConvFirstNet,
    ConvNorm,
    Downsample,
    FusedConvFirst,
    checkpoint_filter_fn,
    fuse_blocks,
)

TINY = {"dims": (8, 8, 16, 24), "depths": (2, 1, 3, 2), "expansion": 2.0, "num_classes": 3}


def tiny(**options):
    torch.manual_seed(0)
    return ConvFirstNet(**{**TINY, **options})


def settled(module):
    """Move it from its beginning, the variances of its norms too."""
    module = moved(module)
    for name, value in module.named_buffers():
        if name.endswith("running_var"):
            value.copy_(torch.linspace(0.5, 2, len(value), dtype=value.dtype))
    return module


# ---- the blocks


def conv_norm(layer, x, stride=1):
    """A grouped convolution, channel by channel and place by place, and its norm."""
    weight, batch = layer.conv.weight, len(x)
    out, group, side, _ = weight.shape
    height, width = (-(-size // stride) for size in x.shape[2:])
    images = []
    for image in range(batch):
        maps = []
        for channel in range(out):
            first = channel // (out // layer.conv.groups) * group
            places = []
            for row in range(height):
                for column in range(width):
                    total = torch.zeros((), dtype=x.dtype)
                    for i in range(side):
                        for j in range(side):
                            up, across = row * stride + i - side // 2, column * stride + j - side // 2
                            if 0 <= up < x.shape[2] and 0 <= across < x.shape[3]:
                                total = total + x[image, first : first + group, up, across] @ weight[channel, :, i, j]
                    places.append(total)
            maps.append(torch.stack(places).view(height, width))
        images.append(torch.stack(maps))
    y, norm = torch.stack(images), layer.norm
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    shape = (1, -1, 1, 1)
    scaled = (y - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return scaled * norm.weight.view(shape) + norm.bias.view(shape)


def activated(x, act):
    return x.clamp(min=0) if act == "relu" else x / (1 + torch.exp(-x))


def slow_block(block, x):
    return x + conv_norm(block.prj, activated(conv_norm(block.exp, conv_norm(block.conv, x)), block.act))


def slow_downsample(block, x):
    both = torch.cat((conv_norm(block.conv, x), x), 1)
    height, width = both.shape[2:]
    rows = []
    for row in range(0, height, 2):
        line = []
        for column in range(0, width, 2):
            total = 0
            for i, p in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                for j, q in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                    up, across = min(max(row + i, 0), height - 1), min(max(column + j, 0), width - 1)
                    total = total + p * q * both[:, :, up, across]
            line.append(total)
        rows.append(torch.stack(line, -1))
    return conv_norm(block.prj, activated(conv_norm(block.exp, torch.stack(rows, -2)), block.act))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "slow", "shape"),
    [
        (lambda: ConvFirst(4, 1.5, group_width=2), slow_block, (2, 4, 2, 3)),
        (lambda: ConvFirst(3, 2, group_width=1, act="silu"), slow_block, (2, 3, 1, 4)),
        (lambda: Downsample(4, 3, 0.5, group_width=4), slow_downsample, (2, 4, 3, 2)),
        (lambda: Downsample(2, 4, 1, group_width=1, act="silu"), slow_downsample, (3, 2, 1, 1)),
    ],
)
def test_a_block_is_the_slow_loop(make, slow, shape, training):
    torch.manual_seed(0)
    block, x = settled(make()).train(training), normal(*shape).requires_grad_()
    same(block(x), slow(block, x), [x, *block.parameters()])


def test_stochastic_depth_leaves_what_came_in():
    block = ConvFirst(8, 2, drop_path=0.999).train()
    x = torch.randn(4, 8, 3, 3)
    torch.manual_seed(0)
    assert torch.equal(block(x), x)


# ---- folding and fusing


def test_norms_fold_into_convolutions():
    model, x = settled(tiny(act="silu")).eval(), normal(2, 3, 21, 18)
    folded = reparameterize_model(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    again = reparameterize_model(folded)
    torch.testing.assert_close(again(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [None, "layers", "depth_first"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_fused_blocks_change_nothing(act, form):
    model, x = settled(tiny(act=act)).eval(), normal(2, 3, 21, 18)
    fused = fuse_blocks(copy.deepcopy(model).train(), form)
    kinds = [type(module) for module in fused.modules()]
    assert kinds.count(FusedConvFirst) == 4
    assert ConvFirst not in kinds
    assert not fused.training
    assert {module.form for module in fused.modules() if isinstance(module, FusedConvFirst)} == {form}
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


def test_fused_blocks_use_their_form(monkeypatch):
    taken = []
    monkeypatch.setattr("vitrail.models.convfirst.fused_block", lambda x, *_, form, **more: taken.append(form) or x)
    fuse_blocks(tiny(), "layers")(torch.zeros(1, 3, 32, 32))
    assert taken == ["layers"] * 4


def test_fusing_refuses_what_it_cannot():
    with pytest.raises(InputError, match=r"unknown form .*'quick'"):
        fuse_blocks(tiny(), "quick")
    with pytest.raises(InputError, match="Linear has no ConvFirst block"):
        fuse_blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="has no ConvFirst block"):
        fuse_blocks(fuse_blocks(tiny()))


# ---- the net


def test_the_net_is_stem_stages_mean_and_head():
    assert {block.act for stage in tiny(act="silu").stages for block in stage.blocks} == {"silu"}
    model, x = settled(tiny()).eval(), normal(1, 3, 5, 6)
    inside = conv_norm(model.stem[0], x, stride=2).clamp(min=0)
    assert inside.shape == (1, 8, 3, 3)
    for stage in model.stages:
        for number, block in enumerate(stage.blocks):
            assert isinstance(block, ConvFirst if number else Downsample)
            inside = block(inside)
    torch.testing.assert_close(model(x), inside.mean((2, 3)) @ model.head.weight.T + model.head.bias)


def test_stem_strides_and_drop_path():
    for stride in (1, 2):
        assert tiny(stem_stride=stride).stem(torch.zeros(2, 3, 8, 6)).shape == (2, 8, 8 // stride, 6 // stride)
    model = tiny(drop_path_rate=0.6)
    blocks = [block for stage in model.stages for block in stage.blocks if isinstance(block, ConvFirst)]
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx([0, 0.2, 0.4, 0.6])


def test_weights_begin_by_what_leaves_them():
    torch.manual_seed(0)
    block = ConvFirst(64, 4)
    fans = {"conv": 8 * 9, "exp": 256, "prj": 64}
    for name, fan in fans.items():
        model = tiny(dims=(64,) * 4, depths=(2, 1, 1, 1), expansion=4.0)
        block = getattr(model.stages[0].blocks[1], name)
        assert float(block.conv.weight.detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.05), name
        assert block.conv.bias is None


def test_variants_are_of_the_published_sizes():
    shapes = {
        "p": ((24, 48, 96, 192), (2, 2, 15, 9), 5_893_168),
        "n": ((40, 80, 160, 320), (2, 6, 8, 6), 10_161_760),
        "t": ((40, 80, 160, 320), (3, 6, 22, 8), 17_196_320),
        "s": ((64, 128, 256, 512), (3, 6, 12, 6), 28_700_328),
    }
    for name, (dims, depths, count) in shapes.items():
        with torch.device("meta"):
            model = create_model(f"convfirst_{name}", num_classes=1000)
        assert count_parameters(model) == count
        assert [info["num_chs"] for info in model.feature_info] == list(dims)
        assert tuple(len(stage.blocks) for stage in model.stages) == depths
        block = model.stages[3].blocks[1]
        assert (block.conv.conv.groups, block.exp.conv.out_channels) == (dims[3] // 8, 6 * dims[3])
        assert block.act == "relu"
        first = model.stages[3].blocks[0]
        assert (first.exp.conv.in_channels, first.exp.conv.out_channels) == (2 * dims[2], 6 * dims[2])
        assert model.pretrained_cfg["input_size"] == (3, 256, 256)


def test_any_size_dense_features_and_weights_as_they_are():
    features = create_model("convfirst_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 19, 25), (64, 5, 7), (128, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    model = tiny(global_pool="", num_classes=0).eval()
    for size in ((1, 1), (17, 33), (225, 190)):
        expected = tuple(-(-side // 32) for side in size)
        assert model(torch.zeros(1, 3, *size)).shape == (1, 24, *expected)
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (8, 8)}, r"dims = \(8, 8\) has 2 entries: give one for each of four stages"),
        ({"depths": (1,)}, r"depths = \(1,\) has 1 entries"),
        ({"dims": (8, 12, 16, 24)}, "dims = 12 .*multiples of the group width, 8"),
        ({"group_width": 0}, "group width, 0"),
        ({"depths": (1, 0, 1, 1)}, "depths = .*1 or more"),
        ({"expansion": 0.1}, "expansion = 0.1 leaves no hidden channels"),
        ({"act": "gelu"}, "unknown activation 'gelu'.*relu"),
        ({"stem_stride": 4}, "stem_stride = 4 .*1 or 2"),
        ({"global_pool": "median"}, "global_pool = 'median'"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


# ---- the check


def test_arms_of_the_check_are_one_net_in_two_forms():
    with torch.device("meta"):
        built = arms(QUICK_NETS)
    assert list(built) == ["convfirst fused", "convfirst layers", "convnext", "resnet"]
    assert set(NETS) == set(QUICK_NETS) == {"convfirst", "convnext", "resnet"}
    fused, layers = (list(built[f"convfirst {form}"].modules()) for form in ("fused", "layers"))
    blocks = sum(isinstance(module, ConvFirst) for module in layers)
    assert sum(isinstance(module, FusedConvFirst) for module in fused) == blocks == 5
    assert not any(isinstance(module, ConvFirst) for module in fused)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in [*fused, *layers])
    assert all(isinstance(module.norm, nn.Identity) for module in layers if isinstance(module, ConvNorm))


def test_the_check_runs_and_draws(tmp_path):
    evidence = check("convfirst", out=tmp_path)
    assert len(evidence["findings"]) == 6
    assert evidence["findings"][4]["outcome"] == evidence["findings"][5]["outcome"] == "confirmed"
    drawn = sorted(path.name.split("Z-")[1] for path in tmp_path.glob("*.svg"))
    waterlines = ["convfirst-fused", "convfirst-layers", "convnext", "resnet"]
    assert drawn == ["efficiency-gap.svg", *(f"waterline-{name}.svg" for name in waterlines)]
    rows = evidence["tables"]["efficiency, last seed"]
    assert [row["gmacs"] > 0 for row in rows] == [True] * 4
