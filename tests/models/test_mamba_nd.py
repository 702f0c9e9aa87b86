import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks.mamba_nd import ARMS, CLIPS, IMAGES, blobs_in_motion
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.mamba_nd import (
    AXES,
    DESIGNS,
    GridForecast,
    Layer,
    MambaND,
    ManyWays,
    Merge,
    OneWay,
    Stem,
    anomaly_correlation,
    checkpoint_filter_fn,
    inflate,
    latitude_weights,
    mamba_nd_video_nano,
    mamba_nd_video_s,
    mamba_nd_video_s_k400,
    read_design,
    reading,
    weighted_mse,
    weighted_rmse,
)

TINY = {"img_size": (8, 12), "patch_size": 2, "dim": 4, "depths": (2, 3), "states": 2}
CLIP = {"img_size": (3, 4, 6), "patch_size": (1, 2, 2), "dim": 4, "depths": (6,), "states": 2}


def tiny(**options):
    torch.manual_seed(0)
    return MambaND(**{"num_classes": 3, **TINY, **options})


# ---- slow loops, from the paper and the published code


def places(text, shape):
    """Return the sequences of place numbers that an order such as ``t/wh-`` reads, by nested counting."""
    letters = AXES[len(shape)]
    apart, _, inner = text[:-1].rpartition("/")
    number = {where: place for place, where in enumerate(itertools.product(*map(range, shape)))}

    def walk(axes):
        return itertools.product(*(range(shape[letters.index(axis)]) for axis in axes))

    sequences = []
    for outside in walk(apart):
        sequence = []
        for inside in walk(inner):
            at = dict(zip(apart + inner, (*outside, *inside), strict=True))
            sequence.append(number[tuple(at[axis] for axis in letters)])
        sequences.append(sequence[::-1] if text[-1] == "-" else sequence)
    return sequences


def silu(x):
    return x / (1 + torch.exp(-x))


def slow_conv(layer, x):
    """Convolve every channel of (L, D) with itself and the three places before."""
    rows = []
    for place in range(len(x)):
        taps = [layer.weight[:, 0, tap] * x[place - 3 + tap] for tap in range(4) if place - 3 + tap >= 0]
        rows.append(layer.bias + sum(taps))
    return torch.stack(rows)


def slow_scan(x, x_proj, dt_weight, dt_bias, a_log, skip):
    """Scan a sequence (L, D) without gate."""
    rank, states = dt_weight.shape[1], a_log.shape[1]
    h, rows = torch.zeros_like(a_log), []
    for row in x:
        found = x_proj @ row
        step = torch.log1p(torch.exp(dt_weight @ found[:rank] + dt_bias))
        h = torch.exp(-step[:, None] * torch.exp(a_log)) * h + (step * row)[:, None] * found[rank : rank + states]
        rows.append(h @ found[rank + states :] + skip * row)
    return torch.stack(rows)


def slow_one_way(mixer, x, text, shape):
    """Mix the places (L, C) of one grid."""
    out = torch.zeros_like(x)
    for sequence in places(text, shape):
        inside, gate = (x[sequence] @ mixer.in_proj.weight.T).chunk(2, 1)
        inside = silu(slow_conv(mixer.conv1d, inside))
        path = (mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D)
        y = slow_scan(inside, *path) * silu(gate)
        out = out.index_put((torch.tensor(sequence),), y @ mixer.out_proj.weight.T)
    return out


def slow_many_ways(mixer, x, texts, shape, heads):
    inside, gate = (x @ mixer.in_proj.weight.T).chunk(2, 1)
    inside = silu(slow_conv(mixer.conv1d, inside))
    width = inside.shape[1] // len(texts) if heads else inside.shape[1]
    found = []
    for number, text in enumerate(texts):
        (sequence,) = places(text, shape)
        part = inside[:, number * width : (number + 1) * width] if heads else inside
        own = slice(number * width, (number + 1) * width)
        y = slow_scan(
            part[sequence],
            mixer.x_proj_weight[number],
            mixer.dt_projs_weight[number],
            mixer.dt_projs_bias[number],
            mixer.A_logs[own],
            mixer.Ds[own],
        )
        found.append(torch.zeros_like(y).index_put((torch.tensor(sequence),), y))
    return (torch.cat(found, 1) if heads else sum(found)) * silu(gate) @ mixer.out_proj.weight.T


def alike(module, x, ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight, given = normal(*ours.shape, seed=9), [x, *module.parameters()]
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), given, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def layer_norm(layer, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


# ---- orders and designs


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2), (1, 4), (2, 2, 3), (3, 1, 2), (1, 3, 2)])
def test_orders_read_a_grid_as_they_are_written(shape):
    texts = {text for design in DESIGNS[len(shape)].values() for text in design.replace("|", " ").split()}
    texts = {part for text in texts for part in text.replace("&", ",").split(",")}
    texts |= {"w/h-"} if len(shape) == 2 else {"t/wh-", "w/th+"}
    for text in texts:
        (spec,) = read_design(text, AXES[len(shape)])
        (way,) = spec.ways
        sequences = places(text, shape)
        assert reading(way, shape).tolist() == [place for sequence in sequences for place in sequence], text
        assert way.length(shape) == len(sequences[0]), text
        with pytest.raises(ValueError, match="read-only"):
            reading(way, shape)[0] = 5


def test_a_design_is_layers_in_blocks():
    specs = read_design("hw+|wh- hw-&wh+ hw+,wh+", "hw")
    assert [len(spec.ways) for spec in specs] == [1, 1, 2, 2]
    assert [spec.ends for spec in specs] == [False, True, True, True]
    assert [spec.alone for spec in specs] == [False, False, True, True]
    assert [spec.heads for spec in specs] == [False, False, False, True]
    assert specs[1].ways == ((((1, 0), 0, True)),)
    assert [way.backwards for way in read_design("alternating", "thw")[5].ways] == [True]
    assert read_design("alternating", "hw") == read_design("hw+ hw- wh+ wh-", "hw")


def test_designs_are_those_of_the_paper():
    for count, axes in AXES.items():
        orders = read_design("alternating", axes)
        assert len(orders) == 2 * count
        fastest = [spec.ways[0].axes[-1] for spec in orders]
        assert sorted(set(fastest)) == list(range(count))
        for name in ("nd_ssm", "multi_head"):
            (spec,) = read_design(name, axes)
            assert [way for spec in orders for way in spec.ways] == list(spec.ways)
        flat = [spec.ways for spec in read_design("bi_block", axes)]
        assert flat == [spec.ways for spec in orders]
        (both,) = read_design("bi_ssm", axes)
        assert both.ways == (orders[0].ways[0], orders[1].ways[0])


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        *[("hw+", (2, 3)), ("hw-", (3, 2)), ("wh+", (3, 3)), ("wh-", (2, 4)), ("h/w-", (2, 3)), ("hw+", (1, 1))],
        *[("twh-", (2, 2, 2)), ("wht+", (3, 1, 2)), ("t/wh-", (2, 2, 3)), ("wh/t+", (3, 2, 1))],
    ],
)
def test_a_layer_of_one_order_is_the_slow_loop(text, shape):
    torch.manual_seed(0)
    (spec,) = read_design(text, AXES[len(shape)])
    mixer = moved(OneWay(6, spec.ways[0], states=3, expand=1.5))
    x = normal(2, math.prod(shape), 6).requires_grad_()
    alike(mixer, x, mixer.on_grid(x, shape), torch.stack([slow_one_way(mixer, grid, text, shape) for grid in x]))


@pytest.mark.parametrize(
    ("design", "shape"),
    [
        *[("bi_ssm", (2, 3)), ("nd_ssm", (3, 2)), ("nd_ssm", (1, 1)), ("multi_head", (2, 3)), ("wh-,hw+", (2, 2))],
        *[("bi_ssm", (2, 1, 3)), ("nd_ssm", (2, 2, 2)), ("multi_head", (2, 1, 3))],
    ],
)
def test_a_layer_of_several_orders_is_the_slow_loop(design, shape):
    torch.manual_seed(0)
    (spec,) = read_design(design, AXES[len(shape)])
    texts = DESIGNS[len(shape)].get(design, design).replace("&", ",").split(",")
    mixer = moved(ManyWays(6, spec.ways, spec.heads, states=3, expand=2))
    x = normal(2, math.prod(shape), 6).requires_grad_()
    slow = [slow_many_ways(mixer, grid, texts, shape, spec.heads) for grid in x]
    alike(mixer, x, mixer.on_grid(x, shape), torch.stack(slow))


# ---- the net


@pytest.mark.parametrize(("design", "count"), [("alternating", 1), ("bi_block", 2), ("quad_block", 4), ("nd_ssm", 1)])
def test_a_block_of_one_layer_adds_to_what_it_normed_and_one_of_several_to_what_came(design, count):
    model = moved(tiny(design=design, depths=(4,)))
    x = normal(2, 6, 4)
    block = model.stages[0].blocks[0]
    assert len(block.layers) == count
    found = [layer.mixer.on_grid(layer_norm(layer.norm, x, 1e-5), (2, 3)) for layer in block.layers]
    start = layer_norm(block.layers[0].norm, x, 1e-5) if count == 1 else x
    torch.testing.assert_close(block(x, (2, 3)), start + sum(found), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1), (2, 4, 6), (3, 3, 5)])
def test_merging_takes_four_places_of_a_plane(shape):
    merge = moved(Merge(3))
    x = normal(2, 3, *shape)
    found = merge(x)
    *lead, height, width = shape
    assert found.shape == (2, 3, *lead, -(-height // 2), -(-width // 2))
    for at in np.ndindex(2, *found.shape[2:]):
        image, *planes, row, column = at
        four = []
        for channel, down, right in np.ndindex(3, 2, 2):
            inside = 2 * row + down < height and 2 * column + right < width
            where = (image, channel, *planes, 2 * row + down, 2 * column + right)
            four.append(x[where] if inside else x.new_zeros(()))
        expected = layer_norm(merge.norm, torch.stack(four), 1e-5) @ merge.reduction.weight.T
        torch.testing.assert_close(found[(image, slice(None), *planes, row, column)], expected)


def test_a_stem_fills_its_last_patches_with_zeros_and_adds_positions():
    stem = moved(Stem(3, 4, (8, 12), (4, 4), pos_drop=0.0))
    x = normal(2, 3, 7, 10)
    found = stem(x)
    assert found.shape == (2, 4, 2, 3)
    for row, column in np.ndindex(2, 3):
        patch = torch.zeros(2, 3, 4, 4, dtype=x.dtype)
        seen = x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        patch[:, :, : seen.shape[2], : seen.shape[3]] = seen
        expected = torch.einsum("bcij,dcij->bd", patch, stem.projection.weight) + stem.projection.bias
        torch.testing.assert_close(found[:, :, row, column], expected + stem.pos_embed[:, 3 * row + column])


def test_positions_are_interpolated():
    stem = Stem(1, 2, (8, 8), (2, 2), pos_drop=0.0)
    table = stem.pos_embed.detach().reshape(1, 4, 4, 2).permute(0, 3, 1, 2)
    torch.testing.assert_close(stem.positions((3, 7)), F.interpolate(table, (3, 7), mode="bicubic"))
    clip = Stem(1, 2, (2, 8, 8), (1, 2, 2), pos_drop=0.0)
    table = clip.pos_embed.detach().reshape(1, 2, 4, 4, 2).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(clip.positions((3, 4, 5)), F.interpolate(table, (3, 4, 5), mode="trilinear"))
    assert clip(torch.zeros(1, 1, 3, 7, 10)).shape == (1, 2, 3, 4, 5)


def test_the_net_is_stem_layers_norm_mean_norm_and_head():
    model = moved(tiny()).eval()
    x = 1e-2 * normal(2, 3, 8, 12)
    inside = model.stem(x)
    texts = iter(["hw+", "hw-", "wh+", "wh-", "hw+"])
    for stage in model.stages:
        inside = stage.downsample(inside)
        shape = tuple(inside.shape[2:])
        inside = inside.flatten(2).transpose(1, 2)
        for block in stage.blocks:
            normed = layer_norm(block.layers[0].norm, inside, 1e-5)
            text = next(texts)  # goes on from stage to stage
            found = [slow_one_way(block.layers[0].mixer, grid, text, shape) for grid in normed]
            inside = normed + torch.stack(found)
        inside = inside.transpose(1, 2).reshape(2, 4, *shape)
    features = layer_norm(model.norm, inside.permute(0, 2, 3, 1), 1e-6)
    torch.testing.assert_close(model.forward_features(x), features.permute(0, 3, 1, 2))
    pooled = layer_norm(model.fc_norm, features.mean((1, 2)), 1e-6)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


def test_the_norms_have_their_epsilon():
    model = tiny()
    assert model.norm.eps == model.fc_norm.eps == 1e-6
    assert mamba_nd_video_nano(fc_norm=True, norm_eps=1e-5).fc_norm.eps == 1e-5
    clip = mamba_nd_video_nano()
    assert isinstance(clip.norm, torch.nn.Identity)
    assert isinstance(clip.fc_norm, torch.nn.Identity)


def test_dropout_rises_with_depth_and_is_where_it_is_said():
    model = tiny(drop_path_rate=0.4, proj_drop_rate=0.2, pos_drop_rate=0.3, drop_rate=0.1)
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    assert [getattr(layer.drop_path, "drop_prob", 0.0) for layer in layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert {layer.drop.p for layer in layers} == {0.2}
    assert (model.stem.drop.p, model.drop.p) == (0.3, 0.1)
    block = tiny(proj_drop_rate=0.999999).train().stages[0].blocks[0]
    x = torch.randn(1, 6, 4)
    torch.testing.assert_close(block(x, (2, 3)), F.layer_norm(x, (4,)))
    block = tiny(drop_path_rate=0.999999).train().stages[1].blocks[-1]
    torch.testing.assert_close(block(x, (2, 3)), F.layer_norm(x, (4,)))


def test_blocks_of_several_layers_end_with_their_stage():
    model = tiny(design="quad_block", depths=(6, 3))
    assert [[len(block.layers) for block in stage.blocks] for stage in model.stages] == [[4, 2], [2, 1]]
    ways = [module.mixer.way for module in model.modules() if isinstance(module, Layer)]
    assert ways == [spec.ways[0] for spec in (read_design("alternating", "hw") * 3)[:9]]
    assert not model.stages[1].blocks[1].alone


def test_weights_begin_as_published():
    model = create_model("mamba_nd_nano", num_classes=100, head_std=0.1)
    assert float(model.stem.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.1, rel=0.1)
    assert not model.head.bias.any()
    assert float(create_model("mamba_nd_nano", num_classes=100).head.weight.detach().std()) < 3e-5
    mixer = model.stages[0].blocks[0].layers[0].mixer
    torch.testing.assert_close(mixer.A_log.detach().exp(), torch.arange(1.0, 9).expand(128, 8))
    with torch.device("meta"):
        assert mamba_nd_video_s().head_std == 0.01
        assert mamba_nd_video_s_k400().head_std == 0.02


def test_variants_are_as_published():
    with torch.device("meta"):
        for name, backbone, width in (("mamba_nd_s", 24_120_192, 384), ("mamba_nd_b", 93_656_832, 768)):
            model = create_model(name, num_classes=0)
            assert count_parameters(model) == backbone
            assert [len(stage.blocks) for stage in model.stages] == [10, 14]
            assert model.stem.grid == (28, 28)
            assert model.num_features == width
        plain = create_model("mamba_nd_b", num_classes=1000, depths=(24,))
        assert count_parameters(plain) / 1e6 == pytest.approx(92.06, abs=0.01)
        clips = mamba_nd_video_s()
        assert count_parameters(clips) == 36_520_320 + 385 * 51
        assert clips.stem.grid == (16, 14, 14)
        kinetics = mamba_nd_video_s_k400()
        assert kinetics.stem.grid == (16, 14, 14)
        assert count_parameters(kinetics) == 36_520_320 - 3 * 256 * 384 + 2 * 384 + 385 * 400
    for number, layer in enumerate(module for module in clips.modules() if isinstance(module, Layer)):
        (way,) = (layer.mixer.way,)
        assert way.backwards == bool(number % 2)
        assert way.axes == ((0, 1, 2), (0, 2, 1), (2, 1, 0))[number // 2 % 3]


@pytest.mark.parametrize("design", ["alternating", "nd_ssm"])
def test_what_sets_the_rates_and_the_positions_is_not_decayed(design):
    model = tiny(design=design)
    kept = next(
        group["params"]
        for group in param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        if not group["weight_decay"]
    )
    kept = {id(parameter) for parameter in kept}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in kept) == (parameter.ndim < 2 or ".A_log" in name or name == "stem.pos_embed"), name


def test_the_authors_keys_become_ours():
    ours, twin = tiny(), tiny(dim=4)
    names = {"stem.pos_embed": "backbone.pos_embed", "stem.projection.bias": "backbone.patch_embed.projection.bias"}
    names |= {"stem.projection.weight": "backbone.patch_embed.projection.weight", "head.bias": "head.fc.bias"}
    names |= {
        f"{one}.{kind}": f"backbone.{two}.{kind}"
        for one, two in (("norm", "ln1"), ("fc_norm", "ln2"))
        for kind in ("weight", "bias")
    }
    names["head.weight"] = "head.fc.weight"
    for number, place in enumerate(["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1", "1.blocks.2"]):
        start = f"stages.{place}.layers.0."
        for key in ours.state_dict():
            if key.startswith(start):
                names[key] = f"backbone.layers.{number}.{key.removeprefix(start)}"
    for key in ("norm.weight", "norm.bias", "reduction.weight"):
        names[f"stages.1.downsample.{key}"] = f"backbone.layers.1.down_sample_layer.{key}"
    theirs = {names[key]: value + 1 for key, value in ours.state_dict().items()}
    for given in ({"state_dict": theirs, "meta": {}}, theirs):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def test_the_authors_keys_of_clips_become_ours():
    clip = MambaND(num_classes=3, **CLIP, final_norm=False)
    given = {"layers.5.mixer.D": 5, "head.0.weight": 6, "head.1.bias": 7, "pos_embed": 8}
    found = checkpoint_filter_fn({"model": given}, clip)
    assert found == {
        "stages.0.blocks.5.layers.0.mixer.D": 5,
        "fc_norm.weight": 6,
        "head.bias": 7,
        "stem.pos_embed": 8,
    }
    assert checkpoint_filter_fn({"cls_head.fc_cls.bias": 1}, clip) == {"head.bias": 1}
    assert set(found) <= set(clip.state_dict())


def test_an_images_net_becomes_the_beginning_of_a_clips_net():
    torch.manual_seed(0)
    image = MambaND(num_classes=5, **{**TINY, "img_size": (4, 6), "depths": (8,)})
    clip = MambaND(num_classes=3, **{**CLIP, "patch_size": (3, 2, 2), "img_size": (6, 4, 6), "depths": (12,)})
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    clip.load_state_dict(inflate(image.state_dict(), clip), strict=True)
    for number, block in enumerate(clip.stages[0].blocks):
        one = number // 6 * 4 + number % 6
        for key, value in block.state_dict().items():
            expected = before[f"stages.0.blocks.{number}.{key}"]
            if number % 6 < 4:
                expected = image.stages[0].blocks[one].state_dict()[key]
            assert torch.equal(value, expected), (number, key)
    assert torch.equal(clip.stem.pos_embed, torch.cat([image.stem.pos_embed] * 2, 1))
    assert torch.equal(clip.norm.weight, image.norm.weight)
    assert torch.equal(clip.head.weight, before["head.weight"])
    still = torch.randn(2, 3, 1, 4, 6)
    expected = image.stem.projection(still[:, :, 0])
    torch.testing.assert_close(clip.stem.projection(still.expand(-1, -1, 3, -1, -1))[:, :, 0], expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"dim": 6}, "give nets of one width"),
        ({"img_size": (6, 6)}, "one width, patch and grid"),
        ({"depths": (9,)}, "no place in the clip's net"),
        ({"depths": (4, 4)}, "no place in the clip's net"),
    ],
)
def test_weights_that_do_not_become_those_of_clips_are_explained(image, message):
    image = MambaND(**{**TINY, "img_size": (4, 6), "depths": (8,), **image})
    clip = MambaND(**{**CLIP, "depths": (12,)})
    with pytest.raises(InputError, match=message):
        inflate(image.state_dict(), clip)


def test_any_size_dense_features_and_pooling():
    features = create_model("mamba_nd_nano", num_classes=10, features_only=True).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 10, 13), (64, 5, 7)]
    assert features.feature_info.reduction() == [4, 8]
    model = tiny(num_classes=0, global_pool="")
    assert model(torch.zeros(1, 3, 9, 13)).shape == (1, 4, 3, 4)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 9, 13)).shape == (1, 4)


@pytest.mark.parametrize("design", DESIGNS[3])
def test_clips_of_any_length_and_size(design):
    torch.manual_seed(0)
    model = MambaND(num_classes=3, **{**CLIP, "dim": 6, "design": design, "head_std": 1.0}).eval()
    for size in ((3, 4, 6), (5, 5, 7)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 3)
    x = torch.randn(1, 3, 3, 4, 6, requires_grad=True)
    features = model.forward_features(x)
    assert features.shape == (1, 6, 3, 2, 3)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), model.fc_norm(features.mean((2, 3, 4))))
    model(x)[0, 0].backward()
    assert bool((x.grad.abs().sum((0, 1, 3, 4)) > 0).all())
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape


# ---- forecasts


def test_rows_weigh_as_much_as_their_area():
    latitudes = [-67.5, -22.5, 22.5, 67.5]
    cosines = [math.cos(value * math.pi / 180) for value in latitudes]
    expected = torch.tensor([value / (sum(cosines) / 4) for value in cosines])
    torch.testing.assert_close(latitude_weights(latitudes), expected)
    torch.testing.assert_close(latitude_weights(torch.tensor([-90.0, 0, 90])), torch.tensor([0.0, 3, 0]))


def test_scores_of_a_forecast_are_the_slow_loops():
    rows, columns, batch, fields = 3, 5, 4, 2
    weights = latitude_weights([-60, 10, 45]).double()
    forecast, truth = normal(batch, fields, rows, columns), normal(batch, fields, rows, columns, seed=1)
    climate = normal(fields, rows, columns, seed=2)
    total, roots, correlations = 0.0, torch.zeros(fields, dtype=torch.float64), []
    for field in range(fields):
        for one in range(batch):
            here = 0.0
            for row, column in np.ndindex(rows, columns):
                here += float(weights[row] * (forecast - truth)[one, field, row, column] ** 2)
            total += here
            roots[field] += (here / (rows * columns)) ** 0.5 / batch
        ours, theirs = forecast[:, field] - climate[field], truth[:, field] - climate[field]
        ours, theirs = ours - ours.mean(), theirs - theirs.mean()
        sums = [0.0, 0.0, 0.0]
        for one, row, column in np.ndindex(batch, rows, columns):
            a, b, weight = ours[one, row, column], theirs[one, row, column], weights[row]
            for number, product in enumerate((a * b, a * a, b * b)):
                sums[number] += float(weight * product)
        correlations.append(sums[0] / (sums[1] * sums[2]) ** 0.5)
    torch.testing.assert_close(float(weighted_mse(forecast, truth, weights)), total / (batch * fields * rows * columns))
    torch.testing.assert_close(weighted_rmse(forecast, truth, weights), roots)
    found = anomaly_correlation(forecast, truth, climate, weights)
    torch.testing.assert_close(found, torch.tensor(correlations, dtype=torch.float64))
    torch.testing.assert_close(anomaly_correlation(truth, truth, climate, weights), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("options", [TINY, CLIP, {**TINY, "depths": (2,)}], ids=["two stages", "clip", "one stage"])
def test_a_forecast_is_backbone_hidden_layers_and_patches(options):
    torch.manual_seed(0)
    model = GridForecast(MambaND(2, 0, global_pool="", **options), 3).eval()
    frames = (3,) if options is CLIP else ()
    x, hours = torch.randn(2, 2, *frames, 7, 11), torch.tensor([6.0, 72.0])
    places = model.backbone.stem(x)
    lead = hours[:, None] / 100 * model.lead.weight[:, 0] + model.lead.bias
    places = places + lead.reshape(2, 4, *[1] * (places.ndim - 2))
    features = model.backbone.norm(model.backbone.stages(places).movedim(1, -1))
    if frames:
        features = features.mean(1)
    first, _, second, _, last = model.head
    patches = last(F.gelu(second(F.gelu(first(features)))))
    found, side = model(x, hours), model.stride
    assert side == 2 * 2 ** (len(options["depths"]) - 1)
    assert found.shape == (2, 3, 7, 11)
    for one, field, row, column in np.ndindex(2, 3, 7, 11):
        value = patches[one, row // side, column // side, field * side**2 + row % side * side + column % side]
        torch.testing.assert_close(found[one, field, row, column], value)


def test_a_forecast_learns_where_the_wind_carries_a_field():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    height, width = 4, 8
    weights = latitude_weights([-67.5, -22.5, 22.5, 67.5])

    def weather():
        waves = torch.randn(16, 2, height, 2, generator=generator)
        along = torch.arange(width) * 2 * math.pi / width
        field = waves[..., :1] * along.sin() + waves[..., 1:] * along.cos()
        hours = torch.randint(1, 3, (16,), generator=generator)
        later = torch.stack([one.roll(int(shift), -1) for one, shift in zip(field, hours, strict=True)])
        return field, hours * 6, later  # a column to the east every six hours

    backbone = MambaND(2, 0, (height, width), 1, 16, (2,), "alternating", 4, global_pool="")
    model = GridForecast(backbone, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        field, hours, later = weather()
        loss = weighted_mse(model(field, hours), later, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    field, hours, later = weather()
    with torch.no_grad():
        found = model.eval()(field, hours)
    still = weighted_rmse(field, later, weights)
    assert bool((weighted_rmse(found, later, weights) < 0.7 * still).all())
    climate = torch.zeros(2, height, width)
    assert bool((anomaly_correlation(found, later, climate, weights) > 0.8).all())


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    for make, options in (
        (lambda **kw: create_model("mamba_nd_nano", num_classes=10, img_size=28, **kw), IMAGES),
        (mamba_nd_video_nano, CLIPS),
    ):
        counts = [count_parameters(make(**{**options, **design})) for design in ARMS.values()]
        assert counts[0] == counts[1]
        assert counts[2] == pytest.approx(counts[0], rel=0.01)
    designs = [design["design"] for design in ARMS.values()]
    assert designs == ["alternating", "single", "bi_ssm"]


def test_blobs_move_a_pixel_a_frame():
    clips, labels = blobs_in_motion(64, torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == {0, 1, 2, 3}
    for clip, label in zip(clips[:, 0], labels.tolist(), strict=True):
        down, right = ((-1, 0), (1, 0), (0, -1), (0, 1))[label]
        there = [clip[0].roll((down * t, right * t), (0, 1)) for t in range(len(clip))]
        assert float((clip - torch.stack(there)).abs().mean()) < 0.3
        away = [clip[0].roll((-down * t, -right * t), (0, 1)) for t in range(len(clip))]
        assert float((clip - torch.stack(away)).abs().mean()) > 0.3


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "alternatng"}, "unknown design 'alternatng'.*'alternating'.* or give orders"),
        ({"design": "hw+ hh-"}, "'hh-' is no order.* h, w once, and a sign"),
        ({"design": "thw+"}, "'thw\\+' is no order"),
        ({"design": ""}, "'' is no order"),
        ({"design": "hw+,hw-&wh+"}, "cannot be one layer"),
        ({"design": "h/w+&hw-"}, "cannot be one layer.* without '/'"),
        ({"design": "hw+,hw-,wh+"}, "8 channels cannot be 3 heads"),
        ({"depths": ()}, r"depths = \(\) .*1 layer or more"),
        ({"depths": (2, 0)}, r"depths = \(2, 0\)"),
        ({"patch_size": (1, 2, 2)}, "img_size = .* and patch_size = .* do not go together"),
        ({"patch_size": (2, 4)}, "the last two of a patch alike"),
        ({"patch_size": 0}, "of 1 or more"),
        ({"img_size": (8, 8, 8, 8), "patch_size": (2, 2, 2, 2)}, "2 or 3 sides"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny()(torch.zeros(1, 3, 2, 8, 12)), "does not suit a net of 2 axes: give .batch, channels, h, w"),
        (lambda: latitude_weights([91.0]), "from -90 to 90"),
        (lambda: latitude_weights([[0.0]]), "one for each row"),
        (lambda: latitude_weights([float("nan")]), "from -90 to 90"),
        (lambda: latitude_weights([90.0, -90.0]), "all at a pole"),
        (lambda: weighted_mse(*[torch.zeros(1, 2, 3, 4)] * 2, torch.ones(4)), "do not go together"),
        (lambda: weighted_rmse(torch.zeros(1, 1, 3, 4), torch.zeros(1, 2, 3, 4), torch.ones(3)), "do not go together"),
        (
            lambda: anomaly_correlation(*[torch.zeros(1, 2, 3, 4)] * 2, torch.zeros(3, 4), torch.ones(3)),
            r"climate \(3, 4\) does not fit",
        ),
        (lambda: GridForecast(tiny(num_classes=0), 2), "must not pool"),
        (lambda: GridForecast(tiny(), 2), "must not pool"),
        (
            lambda: GridForecast(tiny(num_classes=0, global_pool=""), 2)(torch.zeros(2, 3, 8, 12), torch.zeros(1)),
            "one time ahead for each",
        ),
    ],
)
def test_calls_that_do_not_fit_are_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()
