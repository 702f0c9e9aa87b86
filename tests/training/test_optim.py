"""Groups and the learning-rate plan."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import TinyNet
from torch import nn

from vitrail.errors import InputError
from vitrail.methods.supervised.supervised import Supervised
from vitrail.models.factory import create_model
from vitrail.training.optim import Plan, create_optimizer, learning_rate, param_groups, set_learning_rate
from vitrail.training.recipe import OptimConfig


def config(**values):
    return OptimConfig(**{"lr": 0.1, **values})


def treatment(method, settings):
    """Return (decay, scale) by parameter name, each parameter once."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    found = {}
    for group in param_groups(method, settings):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group.get("weight_decay"), group.get("lr_scale", 1.0))
    return found


def test_norms_and_biases_are_not_decayed():
    found = treatment(Supervised(TinyNet()), config(weight_decay=0.3))
    assert {name for name, (decay, _) in found.items() if decay} == {
        "model.conv1.weight",
        "model.conv2.weight",
        "model.head.weight",
    }
    assert len(found) == 8


def test_what_the_model_excepts_is_not_decayed():
    model = create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=2)
    for settings in (config(), config(layer_decay=0.5)):
        found = treatment(Supervised(model), settings)
        assert found["model.pos_embed"][0] == found["model.cls_token"][0] == 0
        assert found["model.blocks.0.mlp.fc1.weight"][0] == settings.weight_decay


def test_layer_decay_falls_from_the_head_down():
    model = create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=3)
    found = treatment(Supervised(model), config(layer_decay=0.5))
    chain = ["model.head.weight", "model.blocks.2.attn.qkv.weight", "model.blocks.1.attn.qkv.weight"]
    scales = [found[name][1] for name in [*chain, "model.blocks.0.attn.qkv.weight", "model.patch_embed.proj.weight"]]
    assert scales == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625])


def test_frozen_parameters_are_left_out():
    method = Supervised(TinyNet())
    method.model.conv1.requires_grad_(False)
    assert len(treatment(method, config())) == 6
    method.requires_grad_(False)
    with pytest.raises(InputError, match="every parameter of the model is frozen"):
        param_groups(method, config())


class WithProjector(Supervised):
    def __init__(self, claims):
        super().__init__(TinyNet())
        self.projector = nn.Linear(4, 4)
        self.claims = claims

    def param_groups(self):
        if not self.claims:
            return None
        return [{"params": self.projector.parameters(), "lr_scale": 10.0, "weight_decay": 0.5}]


@pytest.mark.parametrize("layer_decay", [1.0, 0.9])
def test_what_a_method_adds(layer_decay):
    settings = config(weight_decay=0.3, layer_decay=layer_decay)
    claimed = treatment(WithProjector(True), settings)
    assert claimed["projector.weight"] == claimed["projector.bias"] == (0.5, 10.0)
    default = treatment(WithProjector(False), settings)
    assert default["projector.weight"] == (0.3, 1.0)
    assert default["projector.bias"] == (0.0, 1.0)
    assert len(claimed) == len(default) == 10


def test_scales_are_applied():
    method = WithProjector(True)
    optimizer = create_optimizer(param_groups(method, config()), config())
    set_learning_rate(optimizer, 0.02)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.02, 0.2])


@pytest.mark.parametrize("name", ["sgd", "AdamW", "lamb", "lookahead_adam"])
def test_optimisers_by_name(name):
    settings = config(name=name, momentum=0.8 if name == "sgd" else None)
    optimizer = create_optimizer(param_groups(Supervised(TinyNet()), settings), settings)
    assert isinstance(optimizer, torch.optim.Optimizer)
    if name == "sgd":
        assert optimizer.defaults["momentum"] == 0.8


def test_optimisers_that_do_not_exist_or_do_not_take_it():
    groups = param_groups(Supervised(TinyNet()), config())
    with pytest.raises(InputError, match=r"unknown optimiser \(optim.name\) 'adamww'.*'adamw'"):
        create_optimizer(groups, config(name="adamww"))
    with pytest.raises(InputError, match=r"optim.momentum = 0.9 is given, but the optimiser adamw has none"):
        create_optimizer(groups, config(momentum=0.9))


def test_learning_rate():
    shape = {"peak": 2.0, "warmup": 0.2, "floor": 0.1}
    assert learning_rate(0.1, **shape) == pytest.approx(1.0)
    assert learning_rate(0.2, **shape) == pytest.approx(2.0)
    assert learning_rate(0.6, **shape) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert learning_rate(1.0, **shape) == pytest.approx(0.2)
    assert learning_rate(0.5, peak=1, warmup=0, floor=0) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert learning_rate(1.0, peak=1, warmup=1, floor=0.5) == pytest.approx(0.5)


@given(st.integers(2, 500), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 500)), max_size=5))
def test_a_plan_that_is_bent_never_jumps_and_always_ends(total, bends):
    plan, step = Plan.of(total), 0
    for where, more in bends:
        before = plan
        step += int(where * (plan.total - step))
        if step == before.total:
            break
        plan = plan.bent(step, step + more)
        assert plan.total == step + more
        if more:
            assert all(plan.progress(n) == pytest.approx(before.progress(n)) for n in range(step + 1))
    values = [plan.progress(n) for n in range(plan.total + 1)]
    assert values == sorted(values)
    assert values[-1] == 1
    assert values[0] == 0 or plan.total == 0
