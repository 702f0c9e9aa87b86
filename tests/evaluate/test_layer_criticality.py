import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.evaluate import layer_criticality as code
from vitrail.evaluate.layer_criticality import (
    MAX_NAMED,
    compare,
    comparison_plot,
    decision_change,
    layers_of,
    profile_plot,
    run,
)
from vitrail.evaluate.suite import Result

CLASSES = 4


class Net(nn.Module):
    """Two layers that matter, one whose output is thrown away, and a normalisation."""

    def __init__(self, *, odd=False):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.idle = nn.Linear(8, 8)
        self.last = nn.Linear(8, CLASSES)
        self.broken = odd

    def forward(self, x):
        x = self.norm(self.first(x.flatten(1)).relu())
        if self.broken and float(self.idle.weight.detach().abs().sum()) == 0:
            raise RuntimeError("a fault within the model")
        return self.last(x + 0 * self.idle(x))


def net(seed=0, **options):
    torch.manual_seed(seed)
    model = Net(**options)
    with torch.no_grad():
        model.last.weight.mul_(5)
        for buffer in (model.norm.running_mean, model.norm.running_var):
            buffer.uniform_(0.5, 1.5)
    return model


def images(count=10, seed=0):
    return torch.randn(count, 6, 1, 1, generator=torch.Generator().manual_seed(seed))


def data(labels=None, sizes=(4, 6)):
    x = images(sum(sizes))
    targets = torch.arange(sum(sizes)) % CLASSES if labels is None else labels

    def start():
        at = 0
        for size in sizes:
            yield x[at : at + size], targets[at : at + size]
            at += size

    return start


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def slow_change(before, after, multilabel=False):
    """One less the cosine of the angle between two probability vectors."""

    def probabilities(logits):
        if multilabel:
            return [1 / (1 + math.exp(-x)) for x in logits]
        top = [math.exp(x) for x in logits]
        return [x / sum(top) for x in top]

    p, q = probabilities(before), probabilities(after)
    return 1 - sum(a * b for a, b in zip(p, q)) / math.sqrt(sum(a * a for a in p) * sum(b * b for b in q))


# ---- the mathematics


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize(("count", "classes"), [(1, 2), (3, 5), (7, 1)])
def test_change_is_the_slow_formula(multilabel, count, classes):
    before, after = (3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    expected = [slow_change(a, b, multilabel) for a, b in zip(before.tolist(), after.tolist())]
    found = decision_change(before, after, multilabel=multilabel)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_change_runs_from_none_to_all():
    sure, other = torch.tensor([[50.0, 0, 0]]), torch.tensor([[0, 0, 50.0]])
    assert decision_change(sure, sure).item() == 0
    assert decision_change(sure, other).item() == pytest.approx(1, abs=1e-6)
    assert decision_change(sure, torch.full((1, 3), float("nan"))).item() == 1
    # A shift of all logits is no change; the size of the change does not depend on which class it is.
    assert decision_change(sure, sure + 3).item() == pytest.approx(0, abs=1e-6)


def by_hand(model, name, values, x, targets):
    """Set a layer's tensors in a copy, and measure image by image."""
    twin = net()
    twin.load_state_dict(model.state_dict())
    own = dict(twin.get_submodule(name).named_parameters()) | dict(twin.get_submodule(name).named_buffers())
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)
        before, after = model.eval()(x), twin.eval()(x)
    change = np.mean([slow_change(a, b) for a, b in zip(before.tolist(), after.tolist())])
    changed = np.mean((before.argmax(1) != after.argmax(1)).numpy())
    return change, changed, np.mean((after.argmax(1) == targets).numpy())


def test_random_values_come_from_untrained_twins():
    model, seeds = net(1), (3, 5, 8)
    result = run(model, data(), seeds=seeds, fresh=Net, norms=True)
    targets = torch.arange(10) % CLASSES
    assert [row["layer"] for row in result.table] == ["first", "norm", "idle", "last"]
    for row in result.table:
        found = []
        for seed in seeds:
            torch.manual_seed(seed)
            layer = Net().get_submodule(row["layer"])
            values = dict(layer.named_parameters()) | dict(layer.named_buffers())
            found.append(by_hand(model, row["layer"], values, images(), targets))
        change, changed, top1 = np.array(found).T
        assert row["criticality"] == pytest.approx(change.mean(), abs=1e-6)
        assert row["spread"] == pytest.approx(change.std(ddof=1), abs=1e-6)
        assert row["changed"] == pytest.approx(changed.mean())
        assert row["top1"] == pytest.approx(top1.mean())
    assert result.table[0]["criticality"] > 0.05
    assert result.table[2]["criticality"] == pytest.approx(0, abs=1e-6)
    assert "3 random draws" in result.notes[0]


def test_each_layer_draws_by_itself_without_a_twin():
    model = net(1)
    one, again, other = (run(model, data(), seeds=seeds).table for seeds in ((0,), (0,), (1,)))
    assert one == again
    assert one[0]["criticality"] != other[0]["criticality"]
    assert [row["layer"] for row in one] == ["first", "idle", "last"]
    assert [row["parameters"] for row in one] == [56, 72, 36]
    draws = []
    for name in ("first", "last"):
        with_hook = {
            key: value.clone() for key, value in code._source("random", 0, None, None)(name, model.idle).items()
        }
        draws.append(with_hook["weight"])
    assert not torch.equal(*draws)  # layers of one shape draw different values


@pytest.mark.parametrize("to", ["zero", "initial"])
def test_a_reset_takes_the_given_values(to):
    model, start = net(1), net(2).state_dict()
    result = run(model, data(), to=to, initial=start if to == "initial" else None, norms=True)
    for row in result.table:
        own = model.get_submodule(row["layer"])
        values = (
            {key: torch.zeros_like(value) for key, value in own.named_parameters()}
            if to == "zero"
            else {key: start[f"{row['layer']}.{key}"] for key in own.state_dict()}
        )
        change, changed, top1 = by_hand(model, row["layer"], values, images(), torch.arange(10) % CLASSES)
        assert (row["criticality"], row["spread"]) == (pytest.approx(change, abs=1e-6), 0)
        assert (row["changed"], row["top1"]) == (pytest.approx(changed), pytest.approx(top1))
    unchanged = net(1).eval()(images()).argmax(1) == torch.arange(10) % CLASSES
    assert f"answers {unchanged.float().mean():.1%} rightly" in result.notes[0]


def test_batches_of_any_size_count_every_image_once():
    whole, parts = (run(net(1), data(sizes=sizes), seeds=(0,)).table for sizes in ((10,), (1, 7, 2)))
    for one, other in zip(whole, parts):
        assert one["criticality"] == pytest.approx(other["criticality"], abs=1e-6)
        assert one["changed"] == pytest.approx(other["changed"])


@pytest.mark.parametrize("name", ["first", "last"])
def test_several_labels_per_image(name):
    labels = (torch.eye(CLASSES)[torch.arange(10) % CLASSES] + torch.eye(CLASSES)[0]).clamp(max=1)
    model = net(1).eval()
    row = next(row for row in run(model, data(labels), to="zero").table if row["layer"] == name)
    with torch.no_grad():
        before = model(images())
        for parameter in model.get_submodule(name).parameters():
            parameter.zero_()
        after = model(images())
    change = np.mean([slow_change(a, b, True) for a, b in zip(before.tolist(), after.tolist())])
    assert row["criticality"] == pytest.approx(change, abs=1e-6)
    assert row["changed"] == pytest.approx(float(((before > 0) != (after > 0)).any(1).float().mean()))
    assert row["top1"] == pytest.approx(float((labels[torch.arange(10), after.argmax(1)] > 0).float().mean()))


# ---- the model is left as it was


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_restored(training):
    model = net(1).train(training)
    model.idle.train(not training)
    before, modes, held = snapshot(model), [m.training for m in model.modules()], list(map(id, model.parameters()))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for options in ({"fresh": Net}, {}, {"to": "zero"}):
        run(model, data(), norms=True, **options)
    assert same(snapshot(model), before)
    assert [m.training for m in model.modules()] == modes
    assert list(map(id, model.parameters())) == held
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_restored_after_a_fault():
    model = net(1, odd=True).train()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="within the model"):
        run(model, data(), to="zero")
    assert same(snapshot(model), before) and model.training


def test_one_layer_is_kept_aside_at_a_time():
    model, largest = net(1), []

    def watch(module, inputs):
        start = net(1).state_dict()
        largest.append(sum(not torch.equal(value, start[key]) for key, value in model.state_dict().items()))

    model.first.register_forward_pre_hook(watch)
    run(model, data(), to="zero")
    assert max(largest) == 2  # weight and bias of one layer


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_takes_timms_models(name):
    options = {"img_size": 32} if name.startswith("vit") else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options)
    x = torch.randn(1, 3, 32, 32)
    result = run(model, lambda: iter([(x, torch.zeros(1, dtype=torch.long))]), seeds=(0,))
    named = {row["layer"] for row in result.table}
    wanted = {"resnet10t": "layer4.0.conv2", "vit_tiny_patch16_224": "blocks.11.mlp.fc2"}
    assert wanted.get(name, "stages.3.blocks.1.mlp.fc1") in named
    assert model.get_classifier() is model.get_submodule(result.table[-1]["layer"])
    if name.startswith("vit"):
        assert "(model)" in result.notes[1]  # the class token draws only in a twin


def test_layers_are_those_that_own_a_matrix():
    model = timm.create_model("resnet18", num_classes=2)
    assert len(layers_of(model)) == 21  # 17 convolutions, 3 projections, the classifier
    assert len(layers_of(model, norms=True)) == 41


# ---- side by side, and charts


def profile(values, layers=("stem", "body", "head")):
    return Result("x", [{"layer": name, "criticality": value} for name, value in zip(layers, values)])


def test_profiles_stand_side_by_side():
    other = profile((0.3, 0.1, 0.9), layers=("head", "stem", "body"))
    result = compare({"plain": profile((0.1, 0.5, 0.7)), "robust": other})
    assert result.table == [
        {"layer": "stem", "plain": 0.1, "robust": 0.1, "range": 0.0},
        {"layer": "body", "plain": 0.5, "robust": 0.9, "range": pytest.approx(0.4)},
        {"layer": "head", "plain": 0.7, "robust": 0.3, "range": pytest.approx(0.4)},
    ]
    assert "plain: mean criticality 43.3%." in result.notes
    assert "plain and robust order the layers with a rank correlation of 0.50." in result.notes
    (figure,) = result.figures.values()
    assert figure.count("<svg") == 1 and "var(--c1)" in figure and ">robust<" in figure and "#0" not in figure
    flat = compare({"plain": profile((0.1, 0.5, 0.7)), "flat": profile((0.5, 0.5, 0.5))})
    assert len(flat.notes) == 2  # an order of equal values says nothing


def test_charts_name_few_layers_and_not_many():
    few = profile_plot(["conv_of_a_very_long_name_indeed_1", "fc"], np.array([[0.1, 0.9], [0.3, 0.7]]))
    assert ">fc<" in few and "var(--c1)" in few and "…" in few
    many = [f"layer{i}" for i in range(MAX_NAMED + 1)]
    values = np.full((1, len(many)), 0.5)
    assert "layer7" not in profile_plot(many, values) and "from the input" in profile_plot(many, values)
    assert "layer7" not in comparison_plot(many, ["a"], values) and ">a<" in comparison_plot(many, ["a"], values)
    assert profile_plot([], np.zeros((1, 0))) == comparison_plot([], [], np.zeros((0, 0))) == ""


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "randomm"}, "'random'"),
        ({"to": "initial"}, "give both or neither"),
        ({"initial": {}}, "give both or neither"),
        ({"to": "initial", "initial": {}}, "lack 'first.weight'"),
        ({"seeds": ()}, "no seeds: give at least one"),
        ({"fresh": lambda: nn.Linear(2, 2)}, "twin has no layer 'first'"),
        ({"to": "initial", "initial": {"first.weight": torch.ones(1), "first.bias": torch.ones(8)}}, "of shape"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    model = net(1)
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        run(model, data(), **options)
    assert same(snapshot(model), before)


def test_models_and_data_that_do_not_fit_are_explained():
    with pytest.raises(InputError, match="no images"):
        run(net(), lambda: iter(()))
    with pytest.raises(InputError, match="no layer that could be reset"):
        run(nn.Flatten(), data())
    with pytest.raises(InputError, match=r"returns \(4, 6, 1, 8\): give a classifier"):
        run(nn.Sequential(nn.Linear(1, 8)), data())
    with pytest.raises(InputError, match=r"1 profile\(s\): give two or more"):
        compare({"a": profile((0, 0, 0))})
    with pytest.raises(InputError, match=r"'a' and 'b' are of different layers \(first: 'body'"):
        compare({"a": profile((0, 0, 0)), "b": profile((0, 0, 0), layers=("stem", "trunk", "head"))})
