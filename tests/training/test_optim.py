"""Groups and the learning-rate plan."""

import copy
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


class Halving(torch.optim.SGD):
    """SGD that goes half as far, to be told from the recipe's optimiser."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)
        super().step(closure)


class OwnSettings(nn.Module):
    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.ones(2, 2))
        self.frame = nn.Parameter(torch.ones(2, 2))

    def param_groups(self):
        return [
            {"params": self.places, "lr_scale": 5.0, "weight_decay": 0.0},
            {"params": [self.frame], "optimizer": Halving, "momentum": 0.5},
        ]


def with_own_settings():
    model = TinyNet()
    model.own = OwnSettings()
    return Supervised(model)


def test_what_a_module_of_the_model_asks_for():
    method = with_own_settings()
    found = treatment(method, config(weight_decay=0.3))
    assert found["model.own.places"] == (0.0, 5.0)
    assert len(found) == 10
    method.model.own.places.requires_grad_(False)
    assert len(treatment(method, config())) == 9


def test_a_group_with_an_optimiser_of_its_own():
    def stepped(name, count, state=None):
        method, settings = with_own_settings(), config(name=name, weight_decay=0.0)
        optimizer = create_optimizer(param_groups(method, settings), settings)
        assert {group["lr"] for group in optimizer.param_groups} == {0.1}
        if state is not None:
            method.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        set_learning_rate(optimizer, 0.01)
        for _ in range(count):
            for parameter in method.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in method.parameters())
        return method, optimizer

    method, optimizer = stepped("adamw", 2)
    assert torch.allclose(method.model.own.places, torch.full((2, 2), 1 - 2 * 0.05))  # Adam's steps are of lr
    # Half gradients with momentum 0.5: 0.5, then 0.5 + 0.25.
    assert torch.allclose(method.model.own.frame, torch.full((2, 2), 1 - 0.01 * 1.25))
    assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in method.parameters()}
    # Two steps, stored, and one more are three.
    resumed, _ = stepped("adamw", 1, copy.deepcopy((method.state_dict(), optimizer.state_dict())))
    whole, _ = stepped("adamw", 3)
    for name in ("own.frame", "own.places"):
        assert torch.equal(resumed.model.get_parameter(name), whole.model.get_parameter(name))
    # Nothing else to train: then it is the only optimiser.
    method.requires_grad_(False)
    method.model.own.frame.requires_grad_(True)
    assert isinstance(create_optimizer(param_groups(method, config()), config()), Halving)


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
