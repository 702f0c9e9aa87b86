import copy
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vitrail
from once import quick_run
from vitrail.app.artefact import Artefact, save
from vitrail.app.build import build_model, model_options
from vitrail.checks import xnor as check
from vitrail.data.preprocess import Preprocess
from vitrail.edits.binary_convolution import binary_convolution
from vitrail.errors import InputError
from vitrail.layers.binary import BinaryConv2d, PackedConv2d, pack
from vitrail.models import create_model
from vitrail.runs import RunFolder
from vitrail.training.recipe import EditConfig, ModelConfig


def binary_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryConv2d)}


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 19), ("mobilenetv2_100", 34), ("vgg11", 9), ("convnext_atto", 27)]
)
def test_all_but_the_first_and_the_last_layer_become_binary(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels > m.groups]
    binary_convolution()(model)
    found = binary_layers(model)
    assert len(found) == count
    assert set(found) == set(convolutions[1:])


def test_a_classifier_that_is_a_convolution_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    assert list(binary_layers(binary_convolution()(model))) == ["1"]


def test_it_keeps_weights_and_options():
    model = create_model("small_resnet_nano", num_classes=3)
    weight = model.layer2[0].conv1.weight
    edited = binary_convolution(inputs=False)(copy.deepcopy(model)).layer2[0].conv1
    assert torch.equal(edited.weight, weight)
    assert edited.stride == (2, 2)
    assert not edited.inputs
    assert not binary_convolution(scaled=False)(model).layer2[0].conv1.scaled


def test_a_pattern_chooses_layers():
    model = binary_convolution(modules=r"conv1|layer2\..*1|layer1\.0\.conv")(
        create_model("small_resnet_nano", num_classes=3)
    )
    assert list(binary_layers(model)) == ["conv1", "layer2.0.conv1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inputs": 1}, "inputs = 1"),
        ({"scaled": "no"}, "scaled = 'no'"),
        ({"packed": None}, "packed = None"),
        ({"modules": "layer[1"}, "no regular expression"),
        ({"modules": 3}, "modules = 3 is no regular expression"),
    ],
)
def test_a_wrong_option_is_refused(options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        binary_convolution(**options)


def test_what_cannot_be_binary_is_refused():
    with pytest.raises(InputError, match=r"no plain convolution of several channels between .* in VisionTransformer"):
        with torch.device("meta"):
            vit = timm.create_model("vit_tiny_patch16_224")
        binary_convolution()(vit)
    with pytest.raises(InputError, match="whose whole name matches 'x'"):
        binary_convolution(modules="x")(create_model("small_resnet_nano", num_classes=3))


def test_an_edited_net_learns_in_bf16_and_float():
    for precision in (False, True):
        torch.manual_seed(0)
        model = binary_convolution()(create_model("small_resnet_nano", num_classes=2)).train()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        x, y = torch.randn(8, 3, 12, 12), torch.arange(8) % 2
        losses = []
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision):
                loss = F.cross_entropy(model(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert math.isfinite(losses[-1])
        assert losses[-1] < 0.8 * losses[0]


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert set(verdict.findings[0].arms) == {"bwn", "narrow"}
    assert [finding.outcome for finding in verdict.findings[4:6]] == ["confirmed", "confirmed"]
    sizes = {row["arm"]: row["bytes"] for row in verdict.tables["arms"]}
    assert sizes["narrow"] <= sizes["bwn"] < sizes["xnor"] < 0.1 * sizes["full precision"]
    assert {row["convolution"] for row in verdict.tables["time"]} == {"fp32", "xnor", "xnor without K"}
    assert verdict.tables["alexnet"][1]["float_bytes"] == pytest.approx(4 * 62.4e6, rel=0.01)


def test_an_artefact_keeps_a_packed_model(tmp_path):
    edit = EditConfig(name="xnor", options={"packed": True})
    config = ModelConfig(name="small_resnet_nano", img_size=16, edits=[edit])
    model = pack(binary_convolution()(create_model("small_resnet_nano", num_classes=3)))
    artefact = Artefact(
        model=config.name,
        options=model_options(config, 3),
        edits=[edit.model_dump()],
        classes=["a", "b", "c"],
        multilabel=False,
        preprocess=Preprocess((16, 16)),
    )
    run = RunFolder(tmp_path / "run")
    save(run, model, artefact)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(vitrail.load(run)(x), model(x))
    assert isinstance(build_model(config, 3).layer1[0].conv2, PackedConv2d)
