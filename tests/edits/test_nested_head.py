import pytest
import timm
import torch
from torch import nn

from vitrail.edits.nested_head import checkpoint_filter_fn, nested_embeddings, nested_head, nested_logits
from vitrail.edits.surgery import replace_modules
from vitrail.errors import InputError
from vitrail.layers.nested import NestedLinear, nested_classifier
from vitrail.models import create_model

NETS = [
    ("small_resnet_nano", {}, 128),
    ("mobilenetv2_035", {}, 1280),
    ("convnext_atto", {"depths": (1, 1, 1, 1)}, 320),
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 192),
    ("swin_nano", {}, 128),
]


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("name", "options", "width"), NETS)
def test_any_classifier_becomes_nested_and_answers_as_before(name, options, width, independent):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    assert nested_head(independent=independent)(model) is model
    head = model.get_classifier()
    assert isinstance(head, NestedLinear)
    assert head.dims[0] == 8
    assert head.dims[-1] == width
    assert not head.training
    torch.testing.assert_close(model(x), before)
    embedding = model.forward_head(model.forward_features(x), pre_logits=True)
    for dim in (8, 64, width):
        torch.testing.assert_close(nested_logits(model, x, dim), head.logits(embedding, dim))
        cut = nested_embeddings(model, x, dim)
        torch.testing.assert_close(cut, embedding[:, :dim] / embedding[:, :dim].norm(dim=1, keepdim=True))
    torch.testing.assert_close(nested_embeddings(model, x), nested_embeddings(model, x, width))


def test_weights_stay_and_independent_ones_are_new():
    model = create_model("small_resnet_nano", num_classes=4)
    weight, bias = model.fc.weight, model.fc.bias
    nested_head(dims=[3, 50], independent=True)(model)
    assert model.fc.weight is weight
    assert model.fc.bias is bias
    assert [tuple(layer.weight.shape) for layer in model.fc.smaller] == [(4, 3), (4, 50)]
    assert model.fc.dims == (3, 50, 128)
    for layer in model.fc.smaller:  # as nn.Linear begins, which the published head does
        assert float(layer.weight.detach().abs().max()) <= layer.in_features**-0.5
        assert layer.weight.any()


def test_type_and_device_are_those_of_the_classifier():
    model = nested_head(independent=True)(create_model("small_resnet_nano", num_classes=4).bfloat16().to("meta"))
    assert {(value.dtype, value.device.type) for value in model.fc.parameters()} == {(torch.bfloat16, "meta")}


def test_a_classifier_that_another_edit_wrapped_is_found():
    model = replace_modules(
        create_model("small_resnet_nano", num_classes=4),
        lambda _, m: isinstance(m, nn.Linear),
        lambda m: nn.Sequential(m, nn.Identity()),
        what="linear",
    )
    nested_head(independent=True)(model)
    assert isinstance(model.fc[0], NestedLinear)
    assert nested_logits(model, torch.randn(1, 3, 16, 16), 8).shape == (1, 4)


@pytest.mark.parametrize("independent", [False, True])
def test_the_authors_weights_load(independent):
    dims, model = (
        (8, 16, 128),
        nested_head(dims=(8, 16), independent=independent)(create_model("small_resnet_nano", num_classes=1000)),
    )
    theirs = {f"module.{key}": value + 1 for key, value in model.state_dict().items() if not key.startswith("fc.")}
    for number, dim in enumerate(dims if independent else dims[-1:]):
        theirs[f"module.fc.nesting_classifier_{number}.weight"] = torch.full((1000, dim), float(dim))
        theirs[f"module.fc.nesting_classifier_{number}.bias"] = torch.full((1000,), float(dim))
    model.load_state_dict(checkpoint_filter_fn(theirs, model), strict=True)
    assert model.fc.weight[0, 0] == model.fc.bias[0] == 128
    for level, layer in enumerate(model.fc.smaller):
        assert layer.weight[0, 0] == layer.bias[0] == dims[level]
    torch.testing.assert_close(model.bn1.weight.detach(), theirs["module.bn1.weight"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nested_head(dims=[8, 8]), r"nested_head: dims = \[8, 8\] .*growing"),
        (lambda: nested_head(dims=[]), r"dims = \[\]"),
        (
            lambda: nested_head(dims=[200])(create_model("small_resnet_nano", num_classes=4)),
            r"dims = \[200\] .*width, 128",
        ),
        (lambda: nested_head()(create_model("small_resnet_nano", num_classes=0)), "no single linear .*Identity"),
        (lambda: nested_head()(nn.Sequential(nn.Softsign())), "classifier in Sequential; .*Softsign"),
        (
            lambda: nested_head()(nested_head()(create_model("small_resnet_nano", num_classes=1000))),
            "nested already: edit it once",
        ),
        (lambda: nested_logits(nn.Linear(2, 2), torch.zeros(1, 2), 2), "Linear is not nested"),
        (
            lambda: nested_embeddings(
                nested_head()(create_model("small_resnet_nano", num_classes=1000)), torch.zeros(1, 3, 8, 8), 9
            ),
            "9",
        ),
        (lambda: checkpoint_filter_fn({"a.blur_filter": torch.zeros(1)}, nn.Linear(2, 2)), "blurred strides"),
        (
            lambda: checkpoint_filter_fn({}, nested_head()(create_model("small_resnet_nano", num_classes=1000))),
            "fc.weight is missing",
        ),
        (lambda: nested_head()(timm.create_model("test_vit", num_classes=0)), "no single linear"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_model_can_be_reset_to_a_plain_classifier():
    model = nested_head()(create_model("small_resnet_nano", num_classes=4))
    model.reset_classifier(3)
    assert nested_classifier(model) is None
