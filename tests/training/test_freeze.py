import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.training.freeze import freeze, thaw


def test_the_first_layers_keep_their_weights_and_the_head_learns():
    model = create_model("tf_efficientnet_lite0", num_classes=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model, 0.5)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimiser.step()
    thaw(model)
    after = model.state_dict()
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "classifier.weight" in changed
    assert "blocks.6.0.conv_pw.weight" in changed
    assert not any(name.startswith(("conv_stem", "blocks.0", "blocks.1", "blocks.2")) for name in changed)
    assert not any("running" in name for name in changed)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_everything_still_trains_the_head():
    model = create_model("small_resnet_nano", num_classes=3)
    freeze(model, 1.0)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("name", "options"), [("deit_tiny_distilled_patch16_224", {}), ("groupmamba_nano", {"distilled": True})]
)
def test_both_heads_of_a_distilled_net_learn(name, options):
    model = create_model(name, num_classes=3, **options)
    freeze(model, 1.0)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]


def test_the_function_is_that_of_evaluation():
    model = create_model("small_resnet_nano", num_classes=3).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    freeze(model.train(), 0.3)
    assert torch.allclose(model(images), expected, atol=1e-5)
    thaw(model)
    assert torch.allclose(model.eval()(images), expected, atol=1e-6)


def test_nothing_is_done_for_nothing():
    model = create_model("small_resnet_nano", num_classes=3)
    freeze(model, 0.0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_a_model_without_groups_is_refused():
    with pytest.raises(InputError, match=r"train\.freeze"):
        freeze(nn.Linear(2, 2), 0.5)
