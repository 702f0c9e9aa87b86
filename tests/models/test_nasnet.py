import copy
import json
import math
import tomllib

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.layers.pool2d_same import AvgPool2dSame
from timm.models import get_pretrained_cfg
from timm.models.nasnet import NASNetALarge
from torch import nn

from exact import moved, normal
from vitrail.app.build import build_model, count_parameters
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.nasnet import (
    NASNET_A,
    OPERATIONS,
    Cell,
    Halving,
    NASNet,
    Operation,
    checkpoint_filter_fn,
    read_genotype,
)
from vitrail.training.recipe import Recipe

TINY = {"num_classes": 3, "filters": 2, "cells": 1, "stem": "small", "stem_width": 3}
OTHER = {
    "normal": {"blocks": [[1, 1, "conv_1x3_3x1", "identity", "concat"], [2, 2, "identity", "max_pool_5x5", "add"]]},
    "reduction": {"blocks": [[0, 0, "dilated_3x3", "conv_1x1", "concat"], [2, 0, "conv_3x3", "identity", "add"]]},
}
"""Reads its first state in neither kind's last block alone, leaves a state unread, and concatenates."""


def tiny(**options):
    torch.manual_seed(0)
    return NASNet(**{**TINY, **options})


# ---- slow loops, from the paper and the published code


def start_of(side, width, stride):
    """Return where the first window begins, by TensorFlow's rule: half of what is missing, the odd one behind."""
    outputs = math.ceil(side / stride)
    return max((outputs - 1) * stride + width - side, 0) // 2


def windows(x, width, stride, dilation=(1, 1)):
    """Yield each place of the output with those of the input below its window, and the weights that they meet."""
    spans = [(size - 1) * apart + 1 for size, apart in zip(width, dilation)]
    starts = [start_of(side, span, step) for side, span, step in zip(x.shape[2:], spans, stride)]
    for row in range(math.ceil(x.shape[2] / stride[0])):
        for column in range(math.ceil(x.shape[3] / stride[1])):
            yield (
                row,
                column,
                [
                    (r, c, i, j)
                    for i in range(width[0])
                    for j in range(width[1])
                    if 0 <= (r := row * stride[0] - starts[0] + i * dilation[0]) < x.shape[2]
                    if 0 <= (c := column * stride[1] - starts[1] + j * dilation[1]) < x.shape[3]
                ],
            )


def slow_conv(conv, x):
    rows, columns = (math.ceil(side / step) for side, step in zip(x.shape[2:], conv.stride))
    depthwise = conv.groups > 1
    out = {}
    for row, column, places in windows(x, conv.kernel_size, conv.stride, conv.dilation):
        terms = [
            x[:, :, r, c] * conv.weight[:, 0, i, j] if depthwise else x[:, :, r, c] @ conv.weight[:, :, i, j].T
            for r, c, i, j in places
        ]
        out[row, column] = sum(terms)
    return torch.stack([torch.stack([out[r, c] for c in range(columns)], -1) for r in range(rows)], -2)


def slow_pool(kind, width, x, stride):
    rows, columns = (math.ceil(side / stride) for side in x.shape[2:])
    out = {}
    for row, column, places in windows(x, (width, width), (stride, stride)):
        seen = torch.stack([x[:, :, r, c] for r, c, _, _ in places])
        out[row, column] = seen.amax(0) if kind == "max" else seen.mean(0)
    return torch.stack([torch.stack([out[r, c] for c in range(columns)], -1) for r in range(rows)], -2)


def slow_norm(bn, x):
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return (x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]


def slow_operation(body, name, x, stride):
    """Apply what ``name`` says with the weights of ``body``, ReLU and all."""
    size = [math.ceil(side / stride) for side in x.shape[2:]]
    layers = [layer for layer in body.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    if "pool" in name:
        kind, _, size = name.split("_")
        x = slow_pool(kind, int(size[0]), x, stride)
        return slow_norm(layers[1], slow_conv(layers[0], x)) if layers else x
    for number, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            x = slow_norm(layer, x)
        else:
            first = number == 0 or isinstance(layers[number - 1], nn.BatchNorm2d)
            x = slow_conv(layer, x.clamp(min=0) if first else x)
    assert list(x.shape[2:]) == size
    return x


def slow_halving(layer, x):
    rows, columns = (math.ceil(side / 2) for side in x.shape[2:])
    full = torch.zeros(*x.shape[:2], 2 * rows + 1, 2 * columns + 1, dtype=x.dtype)
    full[:, :, : x.shape[2], : x.shape[3]] = x
    out = torch.stack(
        [
            torch.stack(
                [
                    torch.cat([conv.weight[:, :, 0, 0] @ full[b, :, 2 * r + d, 2 * c + d] for d, conv in parts])
                    for b in range(len(x))
                ]
            )
            for parts in [list(enumerate((layer.conv1, layer.conv2)))]
            for r in range(rows)
            for c in range(columns)
        ],
        -1,
    )
    return slow_norm(layer.bn, out.unflatten(-1, (rows, columns)))


def slow_cell(cell, plan, x, before, *, stride, align):
    """Follow a genotype block by block."""
    states = [slow_operation(cell.squeeze, "squeeze", x, 1)]
    if align == "halve":
        before = slow_halving(cell.align, before.clamp(min=0))
    elif align == "width":
        before = slow_operation(cell.align, "align", before, 1)
    states.append(before)
    for number, block in enumerate(plan["blocks"]):
        parts = [
            slow_operation(side[number].body, name, states[state], stride if state < 2 else 1)
            for side, state, name in zip((cell.left, cell.right), block[:2], block[2:4])
        ]
        states.append(sum(parts) if block[4] == "add" else torch.cat(parts, 1))
    read = {state for block in plan["blocks"] for state in block[:2]}
    found = []
    for state in plan.get("output", [s for s in range(len(states)) if s not in read]):
        y = states[state]
        if state < 2 and stride == 2:
            y = slow_halving(cell.join[str(state)], y)
        elif str(state) in cell.join:
            conv, norm = cell.join[str(state)]
            y = slow_norm(norm, slow_conv(conv, y))
        found.append(y)
    return torch.cat(found, 1)


def same(ours, theirs, given):
    """Compare values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


# ---- operations


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_the_slow_loop(name):
    for before, after, stride, size in ((2, 2, 1, (3, 4)), (2, 2, 2, (4, 5)), (2, 3, 2, (5, 4)), (3, 2, 1, (2, 1))):
        torch.manual_seed(0)
        operation = moved(Operation(name, before, after, stride, 1e-3, 0.0)).eval()
        x = normal(2, before, *size).requires_grad_()
        ours = operation(F.relu(x) if operation.rectified else x)
        assert ours.shape == (2, after, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        same(ours, slow_operation(operation.body, name, x, stride), [x, *operation.parameters()])
    assert isinstance(Operation("identity", 2, 2, 1, 1e-3, 0.5).body, nn.Identity)


def test_there_are_the_papers_thirteen_operations():
    kernels = {
        name: [conv.kernel_size for conv in OPERATIONS[name](4, 4, 1, 1e-3).modules() if isinstance(conv, nn.Conv2d)]
        for name in OPERATIONS
    }
    separable = {f"sep_{k}x{k}": [(k, k), (1, 1), (k, k), (1, 1)] for k in (3, 5, 7)}
    crossed = {f"conv_1x{k}_{k}x1": [(1, k), (k, 1)] for k in (3, 7)}
    pools = {name: [] for name in ("identity", "avg_pool_3x3", "max_pool_3x3", "max_pool_5x5", "max_pool_7x7")}
    rest = {"conv_1x1": [(1, 1)], "conv_3x3": [(3, 3)], "dilated_3x3": [(3, 3)]}
    assert kernels == {**separable, **crossed, **pools, **rest}
    for name in rest:
        (conv,) = (each for each in OPERATIONS[name](4, 4, 1, 1e-3).modules() if isinstance(each, nn.Conv2d))
        assert conv.dilation == ((2, 2) if name == "dilated_3x3" else (1, 1))


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 2)])
def test_halving_takes_every_other_place_and_those_between(size):
    torch.manual_seed(0)
    layer = moved(Halving(3, 5, 1e-3)).eval()
    x = normal(2, 3, *size).requires_grad_()
    same(layer(x), slow_halving(layer, x), [x, *layer.parameters()])
    assert (layer.conv1.out_channels, layer.conv2.out_channels) == (2, 3)


# ---- cells


@pytest.mark.parametrize("genotype", [NASNET_A, OTHER], ids=["nasnet_a", "other"])
@pytest.mark.parametrize(("kind", "stride"), [("normal", 1), ("reduction", 2)])
@pytest.mark.parametrize("align", ["raw", "width", "halve"])
def test_a_cell_is_the_slow_loop(genotype, kind, stride, align):
    torch.manual_seed(0)
    plan = read_genotype(genotype)[kind]
    options = {"stride": stride, "align": align, "keep": False, "eps": 1e-3, "drop_path": 0.0}
    cell = moved(Cell(plan, 3, 5, 2, **options)).eval()
    x, before = normal(1, 3, 3, 2), normal(1, 5, *((5, 4) if align == "halve" else (3, 2)), seed=1)
    x, before = x.requires_grad_(), before.requires_grad_()
    given = [x, before, *cell.parameters()]
    ours = cell(x, before)
    theirs = slow_cell(cell, genotype[kind], x, before, stride=stride, align=align)
    assert ours.shape[1] == cell.out_channels
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), given, allow_unused=True),
        strict=True,
    ):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_what_came_before_stays_if_it_has_the_width():
    cell = Cell(read_genotype(NASNET_A)["normal"], 4, 2, 2, stride=1, align="width", keep=False, eps=1e-3, drop_path=0)
    assert isinstance(cell.align, nn.Identity)


# ---- the net


def mean_of_what_there_is(self, x):
    """Average as TensorFlow does; timm's counts the border as zeros."""
    side = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
    frame = [side[1] // 2, side[1] - side[1] // 2, side[0] // 2, side[0] - side[0] // 2]
    return F.avg_pool2d(F.pad(x, frame), 3, 2) / F.avg_pool2d(F.pad(torch.ones_like(x), frame), 3, 2)


def test_the_large_net_is_timms(monkeypatch):
    monkeypatch.setattr(AvgPool2dSame, "forward", mean_of_what_there_is)
    torch.manual_seed(0)
    theirs = NASNetALarge(num_classes=3, stem_size=4, num_features=192).eval()
    for value in theirs.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.rand(value.shape)
    ours = create_model("nasnet_large", num_classes=3, filters=8, stem_width=4).eval()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    assert checkpoint_filter_fn(ours.state_dict(), ours).keys() == ours.state_dict().keys()
    x = torch.randn(1, 3, 33, 45)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def flow(model):
    """Return what each cell was given, by the numbers of the cells that gave it; -1 is the stem."""
    given, maps = [], []

    def note(module, inputs, output):
        places = [[id(each) for each in maps].index(id(one)) - 1 if maps else -1 for one in inputs]
        given.append(tuple(places))
        maps.extend([output] if maps else [inputs[0], output])

    for stage in model.stages:
        for cell in stage.blocks:
            cell.register_forward_hook(note)
    model.eval()(torch.zeros(1, 3, 32, 32))
    return given


def test_cells_are_given_the_two_before_them():
    small = flow(tiny(cells=2))
    assert small == [(-1, -1), (0, -1), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5)]
    large = {"filters": 8, "cells": 1, "stem": "imagenet"}
    assert flow(tiny(**large)) == [(-1, -1), (0, -1), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]
    skipping = flow(tiny(**large, skip_reduction=True))
    assert skipping == [(-1, -1), (0, -1), (1, 0), (2, 1), (3, 1), (4, 3), (5, 3)]


def test_the_net_ends_with_relu_mean_and_head():
    model = moved(tiny()).eval()
    x = normal(2, 3, 9, 12)
    inside = model.stem(x)
    conv, norm = model.stem
    torch.testing.assert_close(inside, slow_norm(norm, slow_conv(conv, x)))
    last = model.stages((inside, inside))[0]
    pooled = last.clamp(min=0).mean((2, 3))
    assert (last < 0).any()
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)
    large = tiny(stem="imagenet", filters=8).eval()
    assert large.stem(torch.zeros(1, 3, 45, 28)).shape == (1, 3, 22, 13)  # no padding, as published


def test_paths_are_dropped_more_often_in_deeper_cells_and_identities_never():
    model = tiny(cells=2, drop_path_rate=0.4)
    for number, cell in enumerate(cell for stage in model.stages for cell in stage.blocks):
        for side, place in ((cell.left, 2), (cell.right, 3)):
            for operation, block in zip(side, cell.blocks, strict=True):
                if block[place] == "identity":
                    assert isinstance(operation.drop_path, nn.Identity)
                else:
                    assert operation.drop_path.drop_prob == pytest.approx(0.4 * (number + 1) / 8)
    assert not any(isinstance(module, DropPath) for module in tiny().modules())
    operation = Operation("conv_1x1", 2, 2, 1, 1e-3, 0.5)
    torch.manual_seed(0)
    x = torch.randn(64, 2, 1, 1)
    out = operation.train()(x)
    gone = (out.flatten(1) == 0).all(1)
    assert 0.2 < gone.float().mean() < 0.8
    torch.testing.assert_close(out[~gone], 2 * operation.body(x)[~gone])  # made up for, as published


def test_weights_begin_as_published():
    torch.manual_seed(0)
    model = create_model("nasnet_cifar", num_classes=10, cells=1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 800:
            fan_out = module.weight.shape[0] // module.groups * math.prod(module.kernel_size)
            std = float(module.weight.detach().std())
            assert std == pytest.approx(math.sqrt(2 / fan_out), rel=0.08), name
            assert module.weight.detach().abs().max() < 2.01 * math.sqrt(2.6 / fan_out)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_variants_are_as_published():
    with torch.device("meta"):
        cifar = create_model("nasnet_cifar", num_classes=10)
        mobile = create_model("nasnet_mobile", num_classes=1000)
    assert (count_parameters(cifar), cifar.num_features) == (3_346_538, 768)
    assert (count_parameters(mobile), mobile.num_features) == (5_289_978, 1056)
    assert [len(stage.blocks) for stage in mobile.stages] == [1, 5, 5, 5]
    assert {module.eps for module in mobile.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    assert [info["reduction"] for info in mobile.feature_info] == [4, 8, 16, 32]
    assert [info["reduction"] for info in cifar.feature_info] == [1, 2, 4]
    large = create_model("nasnet_large", num_classes=3, filters=8, cells=1).pretrained_cfg
    theirs = get_pretrained_cfg("nasnetalarge")
    for key in ("input_size", "pool_size", "crop_pct", "mean", "std"):
        assert large[key] == getattr(theirs, key), key


def authors_name(key, model):
    """Return the name of a tensor in TensorFlow's checkpoint."""
    head, _, rest = key.partition(".")
    leaf = rest.rpartition(".")[2]
    if head == "head":
        return f"final_layer/FC/{'weights' if leaf == 'weight' else 'biases'}"
    norm = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    large = len(model.stages) == 4
    if head == "stem":
        return {
            "0": "conv0/weights" if large else "l1_stem_3x3/weights",
            "1": f"{'conv0_bn' if large else 'l1_stem_bn'}/{norm[leaf]}",
        }[rest[0]]
    stage, _, block, *parts = rest.split(".")
    stage, block, first = int(stage) - large, int(block), int(stage) > 0
    depth = len(model.stages[-1].blocks) - 1
    if large and block == 0 and stage < 1:
        scope = f"cell_stem_{stage + 1}"
    elif first and block == 0:
        scope = f"reduction_cell_{stage - 1}"
    else:
        scope = f"cell_{stage * depth + block - first}"
    if parts[0] in ("left", "right"):
        cell = model.stages[stage + large].blocks[block]
        names = getattr(cell.blocks[int(parts[1])], f"{parts[0]}_op")
        scope += f"/comb_iter_{parts[1]}/{parts[0]}"
        if names.startswith("sep"):
            number, size = int(parts[3]), names.removeprefix("sep_")
            which = f"{size}_{1 + number // 4}"
            kind = ("depthwise_weights", "pointwise_weights")[number % 4] if number % 4 < 2 else norm[leaf]
            return f"{scope}/{'bn_sep' if number % 4 == 2 else 'separable'}_{which}/{kind}"
        return f"{scope}/{'1x1/weights' if parts[3] == '0' else 'bn_1/' + norm[leaf]}"
    if parts[0] == "join":
        scope += f"/reduction_{parts[1]}"
        parts = ["path", *parts[2:]]
    if parts[1] == "bn":
        return f"{scope}/final_path_bn/{norm[leaf]}"
    if parts[1].startswith("conv"):
        return f"{scope}/path{parts[1][-1]}_conv/weights"
    names = {
        "squeeze": ("1x1", "beginning_bn"),
        "align": ("prev_1x1", "prev_bn"),
        "path": ("path_conv", "path_bn"),
    }
    return f"{scope}/{names[parts[0]][int(parts[1])]}/{'weights' if parts[1] == '0' else norm[leaf]}"


@pytest.mark.parametrize("options", [{}, {"stem": "imagenet", "filters": 8}, {"cells": 2, "num_classes": 4}])
def test_the_authors_arrays_become_ours(options):
    ours, twin = tiny(**options), tiny(**options)
    state = {key: value + 1 for key, value in ours.state_dict().items()}
    theirs = {"global_step": torch.tensor(3), "aux_7/FC/weights": torch.zeros(2, 2)}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        name = authors_name(key, ours)
        if value.ndim == 4:
            value = value.permute(2, 3, 0, 1) if "depthwise" in name else value.permute(2, 3, 1, 0)
        elif value.ndim == 2:
            value = torch.cat([torch.zeros(1, value.shape[1]), value]).T  # the background's class
        elif name.endswith("biases"):
            value = torch.cat([torch.zeros(1), value])
        assert name not in theirs, name
        theirs |= {name: value.numpy(), f"{name}/ExponentialMovingAverage": torch.zeros(1)}
    scopes = {name.partition("/")[0] for name in theirs}
    cells = {f"cell_{number}" for number in range(3 * options.get("cells", 1))}
    assert cells | {"reduction_cell_0", "reduction_cell_1"} <= scopes
    if "stem" in options:
        assert {"cell_stem_0", "cell_stem_1", "conv0_bn"} <= scopes
    else:
        assert "cell_0/comb_iter_2/right/1x1/weights" in theirs
        assert "cell_0/reduction_1/path_bn/gamma" in theirs
    twin.load_state_dict(checkpoint_filter_fn(theirs, twin), strict=True)
    for key, value in twin.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, state[key])


# ---- surface


def test_a_genotype_lives_in_a_recipe():
    torch.manual_seed(0)
    recipe = Recipe.from_dict({"model": {"name": "nasnet_nano", "options": {"genotype": OTHER, "filters": 4}}})
    again = Recipe.from_dict(tomllib.loads(recipe.to_toml()))
    assert again.model.options["genotype"] == OTHER == json.loads(json.dumps(OTHER))
    one, other = build_model(recipe.model, 5), build_model(again.model, 5)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 28, 28)
    assert torch.equal(one.eval()(x), other.eval()(x))
    assert one.stages[0].blocks[0].blocks[0].combine == "concat"


def test_any_size_dense_features_and_pruning():
    features = create_model("nasnet_nano", num_classes=10, features_only=True, out_indices=(0, 2)).eval()
    maps = features(torch.randn(1, 3, 45, 61))
    assert [tuple(m.shape[1:]) for m in maps] == [(48, 23, 31), (192, 6, 8)]
    model = tiny().eval()
    x = torch.randn(1, 3, 17, 33)
    last, found = model.forward_intermediates(x, [0, 1], stop_early=True)
    assert torch.equal(last, found[1])
    whole, found = model.forward_intermediates(x)
    assert torch.equal(whole, model.forward_features(x))
    assert all((each >= 0).all() for each in found)
    assert torch.equal(found[1], last)
    twin = copy.deepcopy(model)
    assert twin.prune_intermediate_layers([1]) == [1]
    assert (len(twin.stages), twin.num_features) == (2, model.feature_info[1]["num_chs"])
    assert torch.equal(twin(x), last)
    with pytest.raises(InputError, match="output_fmt = 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


# ---- what is refused


def changed(kind, **own):
    return {"genotype": {**OTHER, kind: {**OTHER[kind], **own}}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "big"}, "unknown stem 'big'"),
        ({"filters": 1}, "filters = 1 .*2 or more"),
        ({"stem": "imagenet", "filters": 10}, "filters = 10 .*a multiple of 4, 8 or more"),
        ({"cells": 0}, "cells = 0.*1 or more"),
        ({"stem_stride": 3}, "stem_stride = 3 .*give 2, or 1"),
        ({"stem": "imagenet", "filters": 8, "stem_stride": 1}, "stem_stride = 1 .*stem = 'small'"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"genotype": "nasnet_b"}, "genotype: str .*normal and reduction"),
        ({"genotype": {"normal": {}}}, r"genotype: \['normal'\] .*normal and reduction"),
        (changed("normal", blocks=[]), "genotype.normal = .*a table with blocks"),
        (changed("normal", more=1), "genotype.normal = .*a table with blocks"),
        (changed("normal", blocks=[[0, 1, "identity", "identity"]]), "normal.blocks.0 = .*give .left, right"),
        (changed("normal", blocks=[[0, 2, "identity", "identity", "add"]]), "state 2 .*from 0 to 1"),
        (changed("normal", blocks=[[0, 1, "sep_3x33", "identity", "add"]]), "unknown operation .*'sep_3x3'"),
        (changed("normal", blocks=[[0, 1, "identity", "identity", "sum"]]), "unknown combination .*'sum'"),
        (changed("reduction", output=[]), r"reduction.output = \[\] .*a list of states"),
        (changed("reduction", output=[4]), "output: the state 4 .*from 0 to 3"),
        (changed("reduction", output=[3]), r"reduction.output = \[3\] .*which are \[1, 3\]"),
        (changed("reduction", output=[1, 3, 3]), "name once each state"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
