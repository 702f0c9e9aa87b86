import copy
import math
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers.coord_attn import CoordAttn
from torch import nn

import vitrail
from once import quick_run
from vitrail.app.artefact import Artefact, save
from vitrail.app.build import build_model, count_parameters, model_options
from vitrail.checks import triplet_attention as check
from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import check_parity, export_onnx
from vitrail.edits.triplet_attention import TripletAttention, checkpoint_filter_fn, triplet_attention
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.runs import RunFolder
from vitrail.training.recipe import EditConfig, ModelConfig


def slow_gate(planes, conv, norm, training):
    """Z-pool, convolution, normalisation and sigmoid over planes (B, D, I, J), place by place."""
    batch, depth, rows, columns = planes.shape
    weight, half = conv.weight[0], conv.weight.shape[-1] // 2
    raw = {}
    for b in range(batch):
        for i in range(rows):
            for j in range(columns):
                total = 0.0
                for u in range(-half, half + 1):
                    for v in range(-half, half + 1):
                        if 0 <= i + u < rows and 0 <= j + v < columns:
                            column = [planes[b, d, i + u, j + v] for d in range(depth)]
                            total = total + weight[0, u + half, v + half] * max(column)
                            total = total + weight[1, u + half, v + half] * sum(column) / depth
                raw[b, i, j] = total
    if training:
        mean = sum(raw.values()) / len(raw)
        var = sum((value - mean) ** 2 for value in raw.values()) / len(raw)
    else:
        mean, var = norm.running_mean[0], norm.running_var[0]
    scale = norm.weight[0] / (var + norm.eps) ** 0.5
    return {place: 1 / (1 + torch.exp(-((value - mean) * scale + norm.bias[0]))) for place, value in raw.items()}


def slow_triplet(module, x, training):
    """The mean of the gated branches, turned back, of (B, C, H, W)."""
    cw = slow_gate(x.permute(0, 2, 1, 3), module.cw.conv, module.cw.norm, training)
    hc = slow_gate(x.permute(0, 3, 2, 1), module.hc.conv, module.hc.norm, training)
    hw = slow_gate(x, module.hw.conv, module.hw.norm, training) if module.hw is not None else None
    out = torch.empty_like(x)
    for b, c, h, w in np.ndindex(*x.shape):
        gates = [cw[b, c, w], hc[b, h, c]] + ([hw[b, h, w]] if hw is not None else [])
        out[b, c, h, w] = x[b, c, h, w] * sum(gates) / len(gates)
    return out


def stirred(module):
    """Give normalisations values that differ from their initial ones."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize(
    ("shape", "kernel", "spatial", "training"),
    [
        ((1, 3, 4, 5), 7, True, True),
        ((2, 5, 3, 2), 3, True, False),
        ((2, 2, 1, 3), 3, False, True),
        ((1, 1, 2, 2), 1, True, False),
    ],
)
def test_it_is_the_papers_module(shape, kernel, spatial, training):
    module = stirred(TripletAttention(kernel, spatial=spatial).double()).train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tensors = [x, *module.parameters()]
    pull = torch.randn(shape, dtype=torch.float64)
    expected = slow_triplet(module, x, training)
    slopes = torch.autograd.grad((expected * pull).sum(), tensors)
    got = module(x)
    torch.testing.assert_close(got, expected)
    for slope, expected_slope in zip(torch.autograd.grad((got * pull).sum(), tensors), slopes, strict=True):
        torch.testing.assert_close(slope, expected_slope)


def test_it_begins_as_published():
    torch.manual_seed(0)
    gates = [gate for _ in range(40) for gate in TripletAttention().children()]
    weights = torch.stack([gate.conv.weight for gate in gates])
    # Fan-out of a 7 x 7 convolution to one channel.
    assert weights.std().item() == pytest.approx(math.sqrt(2 / 49), rel=0.03)
    assert all(gate.norm.momentum == 0.01 and gate.norm.eps == 1e-5 and gate.conv.bias is None for gate in gates)
    assert all((gate.norm.weight == 1).all() for gate in gates)
    resnet = triplet_attention()(timm.create_model("resnet18"))
    assert all((part.hw.norm.weight == 0).all() for part in modules_of(resnet))
    assert all((part.cw.norm.weight == 1).all() for part in modules_of(resnet))
    x = torch.randn(2, 4, 5, 6)
    still = TripletAttention(still=True).eval()
    assert torch.equal(still.hw(x), torch.full((2, 1, 5, 6), 0.5))


def modules_of(model):
    return [part for part in model.modules() if isinstance(part, TripletAttention)]


def flow(model, module, side):
    """Return input and output of ``module`` in a pass of ``model``."""
    seen = []
    hook = module.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0].clone(), output.clone())))
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3"), ("small_resnet_nano", "bn2")])
def test_in_a_resnet_it_stands_between_the_last_normalisation_and_the_addition(name, last):
    slim = {"channels": (8, 12, 16, 16), "layers": (1, 1, 1, 1)}
    model = stirred(triplet_attention()(create_model(name, num_classes=3, **slim)))
    block = model.layer2[0]
    _, before = flow(model, getattr(block, last), 32)
    given, gated = flow(model, modules_of(block)[0], 32)
    assert torch.equal(given, before)
    shortcut = flow(model, block.downsample, 32)[1]
    torch.testing.assert_close(flow(model, block, 32)[1], torch.relu(gated + shortcut))


def test_a_seresnet_keeps_its_own_attention():
    model = timm.create_model("seresnet18", num_classes=3)
    own = model.layer1[0].se
    block = triplet_attention()(model).layer1[0]
    assert block.se[0] is own
    assert isinstance(block.se[1], TripletAttention)
    assert (block.se[1].hw.norm.weight == 0).all()


def test_in_mobilenetv2_it_stands_after_every_block():
    model = stirred(triplet_attention()(create_model("mobilenetv2_100", num_classes=3)))
    assert len(modules_of(model)) == 17
    first, strided, residual = model.blocks[0][0], model.blocks[1][0], model.blocks[1][1]
    assert not strided.has_skip
    for block in (first, strided):
        torch.testing.assert_close(flow(model, block, 32)[1], flow(model, modules_of(block)[0], 32)[1])
    given, output = flow(model, residual, 32)
    torch.testing.assert_close(output, given + flow(model, modules_of(residual)[0], 32)[1])


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("convnext_atto", 12),
        ("seresnet18", 8),
        ("mobilenetv4_conv_small_050", 12),
        ("hgnetv2_b0", 1),  # four of its five stages add no shortcut
        ("resnest14d", 4),  # without a drop_path; trains only on more than one image, as it normalises pooled maps
        ("tiny_vit_5m_224", 2),  # its transformer blocks are left alone
        ("visformer_tiny", 7),  # likewise: two branches share a drop_path there
    ],
)
def test_other_nets_of_timm(name, blocks):
    with torch.device("meta"):
        model = timm.create_model(name)
        before, modes = count_parameters(model), [part.training for part in model.modules()]
        assert triplet_attention()(model) is model
    assert all(modes)
    assert all(part.training for part in model.modules())
    found = modules_of(model)
    assert len(found) == blocks
    assert count_parameters(model) - before == 300 * blocks
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    calls = []
    for part in found:
        part.register_forward_hook(lambda module, _inputs, _output: calls.append(module))
    model(torch.zeros(2, 3, 224, 224, device="meta"))
    assert sorted(map(id, calls)) == sorted(map(id, found))


def test_the_weights_and_modes_of_the_net_stay():
    torch.manual_seed(0)
    model = create_model("regnetx_002", num_classes=3)
    model.s1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    triplet_attention()(model)
    after = {key.replace("drop_path.1.", "drop_path."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.training
    assert not any(part.training for part in model.s1.modules())
    assert not any(part._forward_hooks for part in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_other_attention_with_a_shortcut_is_no_block():
    model = create_model("small_resnet_nano", num_classes=3)
    model.layer4.append(CoordAttn(256, has_skip=True))
    assert len(modules_of(triplet_attention()(model))) == 4


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_the_names_of_its_tensors_do_not_depend_on_stochastic_depth(rate):
    model = triplet_attention()(create_model("convnext_atto", num_classes=3, drop_path_rate=rate))
    assert "stages.0.blocks.1.drop_path.0.cw.conv.weight" in model.state_dict()


def test_a_pattern_names_other_places():
    edit = triplet_attention(modules=r"layer[12]", kernel_size=3, spatial=False)
    model = edit(create_model("resnet18", num_classes=2))
    assert len(modules_of(model)) == 2
    assert count_parameters(modules_of(model)[0]) == 2 * (18 + 2)
    assert isinstance(model.layer1[1], TripletAttention)
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 2)


def published_flops(model, side):
    """Multiply-adds as the counter of the paper's figures has them: with normalisations, activations and pooling."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, nn.BatchNorm2d):
            total += 2 * output.numel()
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            total += output.numel()
        elif isinstance(module, nn.MaxPool2d | nn.AdaptiveAvgPool2d):
            total += inputs[0].numel()

    for module in model.modules():
        module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, side, side, device="meta"))
    return total


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", {3: (11.69, 1.823), 7: (11.69, 1.825)}),
        ("resnet50", {3: (25.56, 4.131), 7: (25.56, 4.169)}),
        ("resnet101", {7: (44.56, 7.95)}),
        ("mobilenetv2_100", {3: (3.506, 0.322), 7: (3.51, 0.327)}),
    ],
)
def test_published_sizes(name, published):
    with torch.device("meta"):
        plain = create_model(name, num_classes=1000)
    for kernel, (params, flops) in published.items():
        model = triplet_attention(kernel_size=kernel)(copy.deepcopy(plain))
        half_digit = 0.5 * 10.0 ** -len(str(params).partition(".")[2])
        assert count_parameters(model) / 1e6 == pytest.approx(params, abs=half_digit)
        assert published_flops(model, 224) / 1e9 == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel_size": 4}, "kernel_size = 4"),
        ({"kernel_size": -1}, "kernel_size = -1"),
        ({"kernel_size": 7.0}, "kernel_size = 7.0"),
        ({"modules": "layer[1"}, "no regular expression"),
        ({"modules": 5}, "modules = 5 is no regular expression"),
        ({"modules": ["layer1"]}, "modules = ['layer1'] is no regular expression"),
    ],
)
def test_a_wrong_option_is_refused(options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        triplet_attention(**options)


@pytest.mark.parametrize(
    ("name", "modules", "words"),
    [
        ("ghostnet_100", None, r"no residual block.*in GhostNet"),
        ("vgg11", None, r"no residual block.*in VGG; its modules are: .*Conv2d x"),
        ("vit_tiny_patch16_224", None, r"no residual block.*in VisionTransformer"),
        ("swin_tiny_patch4_window7_224", None, "channels last"),
        ("resnet18", "layer", "no layer whose whole name matches 'layer'"),
        (
            "resnet18",
            "layer9",
            r"no layer whose whole name matches 'layer9' in ResNet; its modules are: .*BasicBlock x8",
        ),
    ],
)
def test_a_net_without_a_place_for_it_says_what_it_has(name, modules, words):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(InputError, match=words):
        triplet_attention(modules=modules)(model)


def test_a_net_that_cannot_be_followed_says_what_to_do():
    model = timm.create_model("convnext_atto")
    model.stem = nn.Linear(3, 40)
    with pytest.raises(InputError, match=r"cannot follow an image through ConvNeXt .*modules="):
        triplet_attention()(model)
    assert model.training


def test_tokens_are_refused_when_met():
    model = triplet_attention(modules=r"blocks\.0")(
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24)
    )
    with pytest.raises(InputError, match=r"\(1, 5, 24\)"):
        model(torch.randn(1, 3, 32, 32))


def test_it_survives_saving_and_export(tmp_path):
    config = ModelConfig(
        name="small_resnet_nano",
        img_size=24,
        edits=[EditConfig(name="triplet_attention", options={"kernel_size": 3})],
    )
    model = stirred(build_model(config, 3)).eval()
    preprocess = Preprocess((24, 24))
    artefact = Artefact(
        model=config.name,
        options=model_options(config, 3),
        edits=[edit.model_dump() for edit in config.edits],
        classes=["a", "b", "c"],
        multilabel=False,
        preprocess=preprocess,
    )
    run = RunFolder(tmp_path / "run")
    save(run, model, artefact)
    loaded = vitrail.load(run)
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(loaded(images), model(images))
    export_onnx(model, preprocess, tmp_path / "model.onnx", classes=artefact.classes)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 26, 3), np.uint8))
    assert check_parity(model, preprocess, tmp_path / "model.onnx", [photo]).max_abs_diff < 1e-4


def test_bf16_autocast_channels_last_and_gradients():
    torch.manual_seed(0)
    model = triplet_attention()(create_model("small_resnet_nano", num_classes=3))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
    images = torch.randn(4, 3, 16, 16)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images)
    assert rough.isfinite().all()
    assert (rough - exact).norm() < 0.05 * exact.norm()
    model.to(memory_format=torch.channels_last)
    last = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, exact, rtol=1e-3, atol=1e-4)
    last.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def as_published(model, branches, inner):
    """The weights of an edited ResNet under the authors' names."""
    for key, value in model.state_dict().items():
        key = re.sub(
            r"\.se\.(cw|hc|hw)\.(conv|norm)\.", lambda m: f".triplet_attention.{branches[m[1]]}.{inner}.{m[2]}.", key
        )
        yield "module." + re.sub(r"(triplet_attention\..*)\.norm\.", r"\1.bn.", key), value


@pytest.mark.parametrize(
    ("branches", "inner"),
    [
        ({"cw": "cw", "hc": "hc", "hw": "hw"}, "conv"),
        ({"cw": "ChannelGateH", "hc": "ChannelGateW", "hw": "SpatialGate"}, "spatial"),
    ],
)
def test_the_authors_resnet_weights_load(branches, inner):
    slim = {"num_classes": 5, "channels": (4, 4, 8, 8)}
    model = triplet_attention()(create_model("resnet18", **slim))
    state = dict(as_published(model, branches, inner))
    assert f"module.layer2.1.triplet_attention.{branches['hc']}.{inner}.bn.running_var" in state
    other = triplet_attention()(create_model("resnet18", **slim))
    other.load_state_dict(checkpoint_filter_fn(state, other))
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


def test_the_authors_mobilenet_weights_load_by_order():
    model = triplet_attention()(create_model("mobilenetv2_100", num_classes=5))
    own = model.state_dict()
    state = {f"module.features.{'0.0' if i == 0 else i}.weight": value for i, value in enumerate(own.values())}
    renamed = checkpoint_filter_fn(state, model)
    assert all(torch.equal(renamed[key], own[key]) for key in own)


def test_weights_of_another_net_are_refused():
    with torch.device("meta"):
        model, small = (triplet_attention(kernel_size=k)(create_model("resnet18", num_classes=5)) for k in (7, 3))
        deep = create_model("resnet34", num_classes=5)
    with pytest.raises(
        InputError, match=r"layer1\.0\.se\.cw\.conv\.weight is missing or of another shape.*kernel_size"
    ):
        checkpoint_filter_fn(small.state_dict(), model)
    with pytest.raises(InputError, match="create the variant of the checkpoint"):
        checkpoint_filter_fn(deep.state_dict(), model)


def test_the_check_runs():
    verdict, folder = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert set(verdict.findings[0].arms) == {"triplet", "base"}
    parameters = next(finding for finding in verdict.findings if "parameters" in finding.claim)
    assert parameters.arms == {"measured": [300.0]}
    assert parameters.outcome == "confirmed"
    rows = {row["model"]: row for row in verdict.tables["cost"]}
    assert rows["resnet50 with triplet attention"]["parameters"] - rows["resnet50"]["parameters"] == 16 * 300
    assert all(0 < row["share_on_bright_pixels"] < 1 for row in verdict.tables["maps"])
    with Image.open(folder / "cams-0.png") as sheet:
        assert sheet.size == (5 * 16, 2 * 16)
