import copy
import itertools
import math
import re

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import Conv2dSame
from timm.utils import reparameterize_model
from torch import nn

from exact import normal, same
from once import quick_run
from vitrail.app.build import count_flops, count_parameters
from vitrail.checks import dcls as check
from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import check_parity, export_onnx
from vitrail.edits.dcls import (
    CONVS,
    FORMS,
    Dcls,
    Dcls1d,
    Dcls2d,
    Dcls3d,
    checkpoint_filter_fn,
    dcls,
    dense_kernel,
    repulsion,
)
from vitrail.errors import InputError
from vitrail.methods.supervised.supervised import Supervised
from vitrail.models import create_model
from vitrail.training.optim import param_groups
from vitrail.training.recipe import OptimConfig

LAYERS = {1: Dcls1d, 2: Dcls2d, 3: Dcls3d}


def slow_share(form, place, position, sig):
    """How much of an element at ``position`` a place has, before they are made to sum to one."""
    share = 1.0
    for x, p, s in zip(place, position, sig):
        if form == "bilinear":
            share = share * torch.clamp(1 - abs(x - p), min=0)
        elif form == "triangle":
            share = share * torch.clamp(abs(s) + 1 - abs(x - p), min=0)
        else:
            share = share * torch.exp(-((x - p) ** 2) / (2 * (abs(s) + 0.27) ** 2))
    return share


def slow_kernel(weight, positions, size, form, sigs):
    """Add up the elements of every kernel, place by place."""
    outputs, inputs, m = weight.shape
    grid = list(itertools.product(*(range(k) for k in size)))
    kernels = []
    for o, i in itertools.product(range(outputs), range(inputs)):
        total = {place: weight.new_zeros(()) for place in grid}
        for e in range(m):
            position = [positions[d, o, i, e] + k // 2 for d, k in enumerate(size)]
            sig = [0.0 if sigs is None else sigs[d, o, i, e] for d in range(len(size))]
            shares = {place: slow_share(form, place, position, sig) for place in grid}
            norm = 1.0 if form == "bilinear" else sum(shares.values()) + 1e-7
            for place in grid:
                total[place] = total[place] + weight[o, i, e] * shares[place] / norm
        kernels.append(torch.stack([total[place] for place in grid]))
    return torch.stack(kernels).view(outputs, inputs, *size)


def elements(shape, size, form, seed=0, spread=0.6):
    """Weights, positions inside the kernel and off its places, and widths of both signs."""
    weight = normal(*shape, seed=seed).requires_grad_()
    positions = (
        normal(len(size), *shape, seed=seed + 1) * spread * torch.tensor([k / 2 for k in size]).view(-1, 1, 1, 1)
    )
    for p, k in zip(positions, size):
        p.clamp_(-(k // 2) + 0.1, max((k - 1) // 2 - 0.1, -(k // 2) + 0.1))
    sigs = None if form == "bilinear" else (0.5 * normal(len(size), *shape, seed=seed + 2)).requires_grad_()
    return weight, positions.requires_grad_(), sigs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 2, 3), (7,)), ((1, 2, 3), (4,)), ((2, 1, 2), (5, 5)), ((1, 1, 3), (3, 6)), ((1, 1, 2), (2, 3, 5))],
)
def test_the_kernel_is_the_slow_sum_of_its_elements(form, shape, size):
    weight, positions, sigs = elements(shape, size, form)
    given = [value for value in (weight, positions, sigs) if value is not None]
    same(dense_kernel(weight, positions, size, form, sigs), slow_kernel(weight, positions, size, form, sigs), given)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_positions_are_finite_differences(form):
    weight, positions, sigs = elements((1, 2, 3), (3, 5), form)
    given = [weight, positions] + ([] if sigs is None else [sigs])

    def kernel(*values):
        return dense_kernel(values[0], values[1], (3, 5), form, values[2] if len(values) > 2 else None)

    assert torch.autograd.gradcheck(kernel, given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("edge", "inside"), [(-3.0, 1e-6), (2.0, -1e-6)])
def test_an_element_on_an_edge_can_leave_it(form, edge, inside):
    """Of an even kernel, with three places before the middle and two behind."""
    weight, sig = torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    pull = normal(6)

    def value(at):
        return (dense_kernel(weight, torch.full_like(sig, at), (6,), form, sig)[0, 0] * pull).sum()

    position = torch.full_like(sig, edge, requires_grad=True)
    (slope,) = torch.autograd.grad((dense_kernel(weight, position, (6,), form, sig)[0, 0] * pull).sum(), position)
    ahead = (value(edge + inside) - value(edge)).item() / inside
    # The tip of a triangle stands on a place there: its slope is the mean of both sides.
    assert slope.item() == pytest.approx(ahead, rel=1e-4) if form != "triangle" else slope.item() * ahead > 0
    assert torch.equal(value(edge - 1e5 * inside), value(edge))
    whole = dense_kernel(weight, torch.full_like(sig, edge), (6,), form, sig)
    assert whole.sum().item() == pytest.approx(1)


def test_a_kernel_of_one_place_is_the_sum_of_its_elements():
    weight, positions, _ = elements((2, 1, 3), (1, 1), "bilinear")
    torch.testing.assert_close(dense_kernel(weight, positions, (1, 1)), weight.sum(-1)[..., None, None])


def test_a_triangle_that_has_not_widened_is_bilinear_and_can_widen():
    weight, positions, _ = elements((1, 2, 3), (5, 5), "bilinear")
    sigs = torch.zeros_like(positions).requires_grad_()
    wide = dense_kernel(weight, positions, (5, 5), "triangle", sigs)
    torch.testing.assert_close(wide, dense_kernel(weight, positions, (5, 5)), rtol=1e-6, atol=1e-6)
    pull = normal(*wide.shape)
    (slope,) = torch.autograd.grad((wide * pull).sum(), sigs)
    step = torch.zeros_like(positions)
    step[1, 0, 1, 2] = 1e-6
    wider = dense_kernel(weight, positions, (5, 5), "triangle", step)
    assert ((wider - wide) * pull).sum().item() / 1e-6 == pytest.approx(slope[1, 0, 1, 2].item(), rel=1e-4)
    assert (slope != 0).all()


@pytest.mark.parametrize("form", ["bilinear", "gauss"])
@pytest.mark.parametrize(
    ("axes", "size", "options"),
    [
        (1, (5,), {"stride": 2, "padding": 1, "groups": 2}),
        (2, (3, 5), {"padding": (1, 2), "padding_mode": "circular", "bias": False}),
        (2, (4, 3), {"stride": (2, 1), "padding": (2, 1), "padding_mode": "reflect"}),
        (2, (5, 5), {"padding": 2, "groups": 4}),
        (2, (5, 5), {"padding": 1, "groups": 4}),
        (3, (3, 2, 3), {"padding": 1, "groups": 2}),
    ],
)
def test_a_layer_convolves_with_its_kernel_and_folds_to_the_same_bits(form, axes, size, options):
    torch.manual_seed(0)
    layer = LAYERS[axes](4, 4, 3, size, form=form, **options).double()
    nn.init.normal_(layer.P, std=2.0)
    x = normal(2, 4, *(7, 6, 5)[:axes])
    folded = layer.eval().fuse()
    assert isinstance(folded, CONVS[axes][0])
    assert folded.weight.shape == (4, 4 // layer.groups, *size)
    assert not folded.training
    assert torch.equal(folded(x), layer(x))
    plain = CONVS[axes][0](4, 4, size, **options).double()
    plain.weight, plain.bias = folded.weight, folded.bias
    torch.testing.assert_close(layer(x), plain(x))


def test_it_begins_as_published():
    torch.manual_seed(0)
    layer = Dcls2d(64, 48, 40, 17, groups=2, form="gauss")
    assert layer.weight.abs().max().item() == pytest.approx(1 / math.sqrt(32 * 40), rel=0.01)
    assert layer.bias.abs().max().item() <= 1 / math.sqrt(32 * 40)
    assert layer.P.std().item() == pytest.approx(0.5, rel=0.02)
    assert (layer.SIG == 0.23).all()
    triangle = Dcls2d(64, 48, 40, 3, form="triangle")
    assert (triangle.SIG == 0).all()
    assert triangle.P.abs().max() == 1
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1, groups=groups) for groups in (64, 64, 1)))
    layers = dcls(kernel_count=40)(model)
    assert layers[1].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not layers[1].bias.any()
    assert layers[2].weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64 * 40), rel=0.03)


def test_positions_are_put_back_in_training_and_count_as_the_edge_before():
    layer = Dcls2d(2, 2, 3, (4, 5), groups=2).eval()
    with torch.no_grad():
        layer.P[0].fill_(9.0)
        layer.P[1].fill_(-9.0)
    x = torch.randn(1, 2, 6, 6)
    before = layer(x)
    assert (layer.P[0] == 9).all()
    after = layer.train()(x)
    assert torch.equal(before, after)
    assert (layer.P[0] == 1).all()
    assert (layer.P[1] == -2).all()


def test_layers_that_share_positions_train_with_both_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(2)))
    dcls(kernel_size=5, kernel_count=3, shared=True)(model)
    one, other = model[1], model[2]
    assert one.P is other.P
    with torch.no_grad():
        one.P.mul_(9)
    apart = copy.deepcopy(model)
    apart[2].P = nn.Parameter(apart[1].P.detach().clone())
    x = torch.randn(2, 3, 8, 8)
    for net in (model, apart):
        net(x).square().sum().backward()
    torch.testing.assert_close(one.P.grad, apart[1].P.grad + apart[2].P.grad)


def test_positions_and_widths_are_not_decayed_and_learn_five_times_as_fast():
    model = dcls(form="gauss", kernel_size=5, kernel_count=3, shared=True)(create_model("convnext_atto", num_classes=3))
    found = {}
    for group in param_groups(Supervised(model), OptimConfig(lr=0.1, weight_decay=0.3)):
        found |= {id(parameter): (group["weight_decay"], group.get("lr_scale", 1.0)) for parameter in group["params"]}
    layers = [module for module in model.modules() if isinstance(module, Dcls)]
    assert len({id(layer.P) for layer in layers}) == len({id(layer.SIG) for layer in layers}) == 4
    for layer in layers:
        assert found[id(layer.P)] == found[id(layer.SIG)] == (0.0, 5.0)
        assert found[id(layer.weight)] == (0.3, 1.0)
    assert set(found) == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize(
    ("name", "count", "params", "madds"),
    [("tiny", 34, 28.589, 5.0), ("small", 40, 50.224, None), ("base", 40, 88.591, 16.5)],
)
def test_published_sizes(name, count, params, madds):
    """As many parameters as ConvNeXt, and the published multiply-adds."""
    with torch.device("meta"):
        model = dcls(kernel_count=count, shared=True)(timm.create_model(f"convnext_{name}"))
    assert count_parameters(model) / 1e6 == pytest.approx(params, rel=2e-4)
    if madds is not None:
        assert count_flops(model, (224, 224)) / 1e9 == pytest.approx(madds, rel=0.01)
    assert {value.device.type for value in model.parameters()} == {"meta"}
    blocks = model.stages[1].blocks
    assert blocks[0].conv_dw.P is blocks[1].conv_dw.P
    assert blocks[0].conv_dw.weight is not blocks[1].conv_dw.weight


def test_the_gaussian_convnext_has_the_published_size():
    with torch.device("meta"):
        model = dcls(kernel_size=23, kernel_count=26, form="gauss", shared=True)(timm.create_model("convnext_tiny"))
    assert count_parameters(model) / 1e6 == pytest.approx(28.6, abs=0.05)


class Net(nn.Module):
    """Convolutions that keep the size of the plane but for their stride, and some that do not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.plain = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.strided = nn.Conv2d(8, 16, 5, 2, 2)
        self.dilated = nn.Conv2d(16, 16, (3, 5), padding=(2, 4), dilation=2, groups=16, padding_mode="reflect")
        self.same = nn.Conv2d(16, 16, 7, padding="same", groups=4)
        self.tf = Conv2dSame(16, 16, 3, 2, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.shrinks = nn.Conv2d(16, 16, 3)
        self.even = nn.Conv2d(16, 16, 4, padding=2)
        self.up = nn.ConvTranspose2d(16, 16, 3, padding=1)


def test_convolutions_that_keep_the_plane_are_replaced():
    before = dict(Net().double().named_children())
    model = dcls(kernel_size=9, kernel_count=4)(Net().double())
    found = {name: m for name, m in model.named_children() if isinstance(m, Dcls)}
    assert list(found) == ["plain", "strided", "dilated", "same", "tf"]
    for name, layer in found.items():
        x = normal(1, before[name].in_channels, 18, 23)
        assert layer(x).shape == before[name](x).shape, name
        assert layer.groups == before[name].groups
        assert (layer.bias is None) == (before[name].bias is None)
    assert found["dilated"].padding_mode == "reflect"
    assert isinstance(dcls(min_kernel=5)(Net()).plain, nn.Conv2d)
    named = dcls(modules="stem|pla.*")(Net())
    assert isinstance(named.stem, Dcls)
    assert isinstance(named.plain, Dcls)
    assert isinstance(named.same, nn.Conv2d)


def test_the_3_x_3_convolutions_of_resnet50():
    with torch.device("meta"):
        model = dcls(kernel_size=7, kernel_count=3)(create_model("resnet50", num_classes=1000))
    found = [name for name, module in model.named_modules() if isinstance(module, Dcls)]
    assert len(found) == 16
    assert all(name.endswith("conv2") for name in found)
    # Three elements, each with two positions, have as many parameters as nine taps.
    assert count_parameters(model) / 1e6 == pytest.approx(25.56, abs=0.005)


def test_a_net_folds_to_plain_convolutions_and_so_does_its_file(tmp_path):
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 3, 2, 1)
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    dcls(kernel_size=9, kernel_count=6, form="gauss")(model).eval()
    x = torch.randn(2, 3, 24, 24)
    folded = reparameterize_model(model)
    assert not any(isinstance(module, Dcls) for module in folded.modules())
    assert torch.equal(folded(x), model(x))
    assert isinstance(model[1], Dcls)
    preprocess = Preprocess((24, 24))
    report = export_onnx(model, preprocess, tmp_path / "model.onnx", classes=["a", "b", "c"])
    assert report.operators["Conv"] == 3
    assert not {"ScatterElements", "Exp", "MatMul"} & set(report.operators)
    weights = [tuple(tensor.dims) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert {(4, 1, 9, 9), (6, 4, 9, 9)} <= set(weights)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 26, 3), np.uint8))
    assert check_parity(model, preprocess, tmp_path / "model.onnx", [photo]).max_abs_diff < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_the_kernel_is_made_in_full_precision(form):
    exact = elements((4, 1, 5), (7, 7), form)
    weight, positions, sigs = (None if value is None else value.detach().float() for value in exact)
    with torch.autocast("cpu", torch.bfloat16):
        kernel = dense_kernel(weight, positions, (7, 7), form, sigs)
    torch.testing.assert_close(kernel.double(), dense_kernel(*exact[:2], (7, 7), form, exact[2]), rtol=1e-5, atol=1e-5)


def slow_repulsion(sets):
    terms = []
    for positions in sets:
        axes, outputs, inputs, m = positions.shape
        for o, i in itertools.product(range(outputs), range(inputs)):
            for a, b in itertools.combinations(range(m), 2):
                far = sum((positions[d, o, i, a] - positions[d, o, i, b]) ** 2 for d in range(axes)) ** 0.5
                terms.append(torch.clamp(1 - far, min=0) / (len(sets) * outputs * inputs * m * (m - 1) / 2))
    return sum(terms)


def test_repulsion_is_the_mean_over_pairs_of_each_set_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(2)))
    dcls(kernel_size=5, kernel_count=4, shared=True)(model).double()
    model.append(Dcls1d(2, 1, 3, 7).double())
    sets = [model[1].P, model[3].P]
    same(repulsion(model)[None], slow_repulsion(sets)[None], sets)


def published(model, form):
    """Return the weights of a net of timm with the edit as the authors would name and order them."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample", r"downsample_layers.\1", key)
        key = re.sub(r"^stages\.(\d)\.blocks", r"stages.\1", key).replace("conv_dw", "dwconv")
        key = key.replace("mlp.fc", "pwconv").replace("head.norm.", "norm.").replace("head.fc", "head")
        turned = form != "bilinear" and key.endswith((".P", ".SIG"))
        state[key] = value.flip(0) if turned else value
    return {"model": state}


@pytest.mark.parametrize("form", ["bilinear", "gauss"])
def test_the_authors_weights_load(form):
    small = {"depths": (1, 2, 1, 1), "dims": (4, 6, 8, 10), "conv_mlp": False, "num_classes": 3}
    edit = dcls(kernel_size=5, kernel_count=3, form=form, shared=True)
    torch.manual_seed(0)
    model, other = (edit(timm.create_model("convnext_tiny", **small)) for _ in range(2))
    state = published(model, form)
    assert any("dwconv.P" in key for key in state["model"])
    other.load_state_dict(checkpoint_filter_fn(state, other))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(other.eval()(x), model.eval()(x))
    with pytest.raises(InputError, match=r"conv_dw\.weight is missing or of another shape.*same options"):
        checkpoint_filter_fn(
            state, dcls(kernel_size=5, kernel_count=4, form=form)(timm.create_model("convnext_tiny", **small))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size = 4 .*odd"),
        ({"kernel_size": 7.0}, "kernel_size = 7.0 .*odd"),
        ({"kernel_count": 0}, "kernel_count = 0 .*from 1"),
        ({"form": "gaus"}, "gaus.*gauss"),
        ({"min_kernel": 1}, "min_kernel = 1 .*from 2"),
        ({"modules": "("}, r"modules = '\(' is no regular expression"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        dcls(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dcls2d(6, 8, 3, 5, groups=4), "groups = 4 does not divide 6"),
        (lambda: Dcls2d(4, 4, 3, (5, 5, 5)), "is not one number, nor 2"),
        (lambda: Dcls1d(4, 4, 3, 0), "kernel_size = 0 .*from 1"),
        (lambda: Dcls1d(4, 4, 3, 5, padding_mode="zero"), "padding_mode.*zero"),
        (lambda: Dcls1d(4, 4, 3, 5)(torch.zeros(4, 9)), r"3 axes.*met \(4, 9\)"),
        (lambda: dense_kernel(torch.ones(1, 1, 1), torch.ones(1, 1, 1, 1), (3,), "gauss"), "'gauss' have widths"),
        (lambda: repulsion(nn.Linear(2, 2)), "two learnable positions"),
    ],
)
def test_what_a_layer_cannot_do_is_explained(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {}, "no convolution of 3 x 3 or more, beyond the first.* in VisionTransformer"),
        ("resnet18", {"modules": "layer9"}, "no convolution whose whole name matches 'layer9'"),
    ],
)
def test_a_net_without_such_convolutions_says_what_it_has(name, options, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(InputError, match=message):
        dcls(**options)(model)


def test_training_moves_positions_to_where_a_tap_is_needed():
    """One element has to go three places to the right to copy a shifted image."""
    torch.manual_seed(0)
    layer = Dcls2d(1, 1, 1, 9, padding=4, bias=False, form="gauss")
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.P)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = F.avg_pool2d(torch.randn(8, 1, 40, 40), 9, 1)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(layer(x)[..., 4:-4, 4:-7], x[..., 4:-4, 7:-4]).backward()
        optimizer.step()
    assert layer.P[1].item() == pytest.approx(3, abs=0.3)
    assert layer.P[0].item() == pytest.approx(0, abs=0.3)


def test_the_task_of_the_check_is_in_pairs_alone():
    images, targets = check.scenes(64, seed=1)
    again, _ = check.scenes(64, seed=1)
    assert torch.equal(images, again)
    assert set(targets.tolist()) == set(range(len(check.MOVES)))
    # Every image has as much of both marks, whatever its class.
    clean, _ = check.scenes(64, seed=1, noise=0.0)
    assert (clean.flatten(2).sum(2) == clean[0].flatten(1).sum(1)).all()
    for image, target in zip(clean, targets):
        rows, columns = check.MOVES[target]
        assert torch.equal(image[1], image[0].roll((rows, columns), (0, 1)))


def test_the_check_runs():
    verdict, folder = quick_run(check)
    assert len(verdict.findings) == 5
    assert verdict.findings[3].outcome == "confirmed"
    assert {row["arm"] for row in verdict.tables["cost of the arms"]} == set(check.ARMS)
    assert (folder / "positions.svg").read_text(encoding="utf-8").startswith("<svg")
