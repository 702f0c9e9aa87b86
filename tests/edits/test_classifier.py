import pytest
import timm
import torch
from torch import nn

from vitrail.edits.classifier import replace_classifiers
from vitrail.errors import InputError
from vitrail.models import create_model


class Marked(nn.Module):
    def __init__(self, features, classes, axis):
        super().__init__()
        self.built = (features, classes, axis)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        features, classes, axis = self.built
        assert x.shape[axis] == features
        return x.narrow(axis, 0, classes) * self.scale


class Surface(nn.Module):
    """A net whose classifier is what it is given."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def get_classifier(self):
        return self.head


@pytest.mark.parametrize(
    ("name", "options", "path", "built"),
    [
        ("small_resnet_nano", {}, "fc", (128, 4, -1)),
        ("vit_tiny_patch16_224", {"depth": 1}, "head", (192, 4, -1)),
        ("resnetv2_50", {"layers": (1, 1, 1, 1)}, "head.fc", (2048, 4, 1)),
    ],
)
def test_the_classifier_of_a_net(name, options, path, built):
    model = create_model(name, num_classes=4, **options).to("meta", torch.bfloat16).eval()
    assert replace_classifiers(model, Marked) is model
    new = model.get_submodule(path)
    assert new.built == built
    assert new.scale.device.type == "meta"
    assert new.scale.dtype == torch.bfloat16
    assert not new.training
    assert model(torch.zeros(2, 3, 224, 224, device="meta", dtype=torch.bfloat16)).shape == (2, 4)


def test_classifiers_side_by_side_are_all_replaced():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=3)
    replace_classifiers(model, Marked)
    assert [head.built for head in model.get_classifier()] == [(192, 3, -1)] * 2
    model = replace_classifiers(Surface(nn.ModuleList(nn.Linear(n, 3) for n in (4, 5))), Marked)
    assert [head.built for head in model.head] == [(4, 3, -1), (5, 3, -1)]


def test_of_a_sequence_the_last_linear_layer_is_replaced():
    body = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 3), nn.Identity()), nn.Dropout())
    model = replace_classifiers(Surface(body), Marked)
    assert isinstance(body[0], nn.Linear)
    assert model.head[1][0].built == (6, 3, -1)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Softsign(), nn.Linear(2, 2)),
        Surface(nn.Sequential(nn.Softsign())),
        Surface(nn.ModuleList([nn.Conv2d(3, 3, 3), nn.Softsign()])),
        Surface(nn.ModuleDict({"a": nn.Softsign(), "b": nn.Linear(2, 2)})),
    ],
)
def test_a_model_without_one_is_refused(model):
    with pytest.raises(InputError, match=r"found no linear classifier in .*Softsign"):
        replace_classifiers(model, Marked)
