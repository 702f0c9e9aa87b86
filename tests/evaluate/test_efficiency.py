"""The model of efficiency in figures worked out by hand, and what is measured of nets with a clock of our own."""

import json
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.app.build import count_flops
from vitrail.errors import InputError
from vitrail.evaluate import efficiency as module
from vitrail.evaluate.efficiency import (
    Machine,
    Operator,
    Profile,
    efficiency,
    efficiency_gap_plot,
    latency,
    profile_models,
    summary,
    waterline_plot,
)
from vitrail.models import create_model

MACHINE = Machine(peak=100.0, bandwidth=20.0)
ABOVE = Operator("a", "convolution", macs=400, read=30, written=10, seconds=12.0)
BELOW = Operator("b", "relu", macs=0, read=60, written=40, seconds=7.0)
ON = Operator("c", "addmm", macs=50, read=15, written=5, seconds=1.0)
NET = Profile("net", 2, 40.0, MACHINE, (ABOVE, BELOW, ON))


@pytest.fixture(autouse=True)
def _a_small_machine(monkeypatch):
    monkeypatch.setattr(module, "SIDES", {"cpu": (8, 16)})
    monkeypatch.setattr(module, "COPIED", {"cpu": 1 << 12})


class Clock:
    """Goes on by one second at each look, and by what a test adds."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        self.time += 1
        return self.time


# ---- the model


def test_latency_is_operations_over_peak_and_efficiency():
    assert latency(400, 100.0) == 8.0
    assert latency(400, 100.0, 0.25) == 32.0
    assert efficiency(400, 32.0, 100.0) == 0.25


def test_the_papers_table_obeys_the_model():
    # ConvNeXt Tiny: 7.4 G multiply-adds, 1,587.8 images a second, 30.6 % of the peak; ConvFirst Tiny: 3.2 G, 5,311.0.
    peak = 2 * 7.4e9 * 1587.8 / 0.306
    assert efficiency(3.2e9, 1 / 5311.0, peak) == pytest.approx(0.447, rel=0.02)


def test_an_operator_waits_below_the_waterline():
    assert MACHINE.balance == 5.0
    assert (ABOVE.bytes, ABOVE.intensity) == (40, 20.0)
    assert [o.attainable(MACHINE) for o in (ABOVE, BELOW, ON)] == [8.0, 5.0, 1.0]
    assert [o.waits_for_memory(MACHINE) for o in (ABOVE, BELOW, ON)] == [False, True, False]
    assert Operator("", "nothing", 0, 0, 0, 1.0).intensity == 0.0


def test_a_profile_adds_its_operators_up():
    assert NET.macs == 450
    assert (NET.ideal, NET.attainable) == (9.0, 14.0)
    assert NET.efficiency == pytest.approx(9 / 40)
    assert NET.gap == pytest.approx(40 / 9)
    assert NET.unattributed == 20.0
    assert NET.memory_bound == pytest.approx(5 / 14)


def test_its_figures_are_plain_milliseconds():
    row = summary(NET)
    assert (row["ideal_ms"], row["attainable_ms"], row["actual_ms"], row["unattributed_ms"]) == (9e3, 14e3, 40e3, 20e3)
    assert (row["model"], row["batch"], row["gmacs"]) == ("net", 2, 450 / 1e9)
    plain = json.loads(json.dumps(NET.to_dict()))
    assert (plain["operations_per_second"], plain["bytes_per_second"]) == (100.0, 20.0)
    first = plain["operators"][0]
    assert (first["layer"], first["operator"], first["macs"]) == ("a", "convolution", 400)
    assert (first["bytes_read"], first["bytes_written"], first["operations_per_byte"]) == (30, 10, 20.0)
    assert (first["ideal_ms"], first["attainable_ms"], first["measured_ms"]) == (8e3, 8e3, 12e3)
    assert [o["waits_for_memory"] for o in plain["operators"]] == [False, True, False]


# ---- what is measured


class Net(nn.Module):
    """A convolution, an activation in place, a product, and views that cost nothing."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.body(x).flatten(2).transpose(1, 2)
        x = x + x.new_ones(1).expand(x.shape[-1])
        return self.head(x.mean(1))


def test_operators_are_named_counted_and_timed():
    (found,) = profile_models({"net": Net()}, (3, 2), batch=2, rounds=1, clock=Clock())
    rows = [(o.layer, o.name, o.macs, o.read, o.written, o.seconds) for o in found.operators]
    places = 2 * 3 * 2
    assert rows == [
        ("body.0", "convolution", places * 8 * 2 * 9, 4 * (places * 4 + 8 * 2 * 9 + 8), 4 * places * 8, 1.0),
        ("body.1", "relu_", 0, 4 * places * 8, 4 * places * 8, 1.0),
        ("", "new_ones", 0, 4 * places * 8, 4, 1.0),
        ("", "add", 0, 4 * (places * 8 + 1), 4 * places * 8, 1.0),
        ("", "mean", 0, 4 * places * 8, 4 * 2 * 8, 1.0),
        ("head", "addmm", 2 * 8 * 5, 4 * (5 + 2 * 8 + 8 * 5), 4 * 2 * 5, 1.0),
    ]
    assert found.seconds == 1.0
    assert (found.name, found.batch, found.unknown) == ("net", 2, ())


def test_the_machine_is_measured_in_operations_and_bytes():
    (found,) = profile_models({"net": Net()}, (3, 2), rounds=2, clock=Clock())
    # every work takes a second of this clock, so that the larger product is the faster
    assert found.machine == Machine(peak=2 * 16**3, bandwidth=2 * (1 << 12))


class Slow(nn.Module):
    """Takes, in turn, the seconds that it is given."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.layer, self.clock, self.seconds = nn.Linear(2, 2), clock, iter(seconds)

    def forward(self, x):
        self.clock.time += next(self.seconds)
        return self.layer(x.mean((2, 3))[:, :2])


def test_medians_are_taken_and_the_first_round_warms_up():
    clock = Clock()
    # unobserved and observed passes alternate; those of the first round are 900 and 0
    slow = Slow(clock, [900, 0, 5, 0, 70, 0, 6, 0])
    (found,) = profile_models({"slow": slow}, (2, 2), rounds=3, clock=clock)
    assert found.seconds == 1 + 6


def test_models_take_turns():
    order = []

    class Told(Net):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append(self.name)
            return super().forward(x)

    told = []
    profile_models({"a": Told("a"), "b": Told("b")}, {"a": (3, 2), "b": (2, 3)}, rounds=2, tell=told.append)
    assert order == ["a", "a", "b", "b"] * 3
    assert told == ["round 0 of 2", "round 1 of 2", "round 2 of 2"]


@pytest.mark.parametrize("name", ["convfirst_nano", "small_resnet_nano", "test_vit", "rmt_nano"])
def test_multiply_adds_are_those_of_a_count(name):
    model = create_model(name, num_classes=7, img_size=32)
    with torch.device("meta"):
        expected = count_flops(create_model(name, num_classes=7, img_size=32), (32, 32))
    (found,) = profile_models({name: model}, (32, 32), batch=3, rounds=1)
    assert found.macs == 3 * expected
    names = {layer for layer, _ in model.named_modules()}
    assert {operator.layer for operator in found.operators} <= names
    assert all(operator.bytes for operator in found.operators)


@torch.library.custom_op("vitrail_test::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    """Give twice what it takes."""
    return x * 2


class Mysterious(Net):
    def forward(self, x):
        return super().forward(mystery(F.relu(x)))


def test_what_nobody_counts_is_named():
    (found,) = profile_models({"odd": Mysterious()}, (2, 2), rounds=1)
    assert found.unknown == ("vitrail_test.mystery",)
    assert [o.name for o in found.operators][:3] == ["relu", "mystery", "convolution"]


def test_models_are_left_as_they_were():
    model = Net().train()
    model.head.eval()
    profile_models({"net": model}, (2, 2), rounds=1)
    assert model.training
    assert model.body[0].training
    assert not model.head.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_models_predict_and_keep_no_gradients():
    seen = []

    class Looks(Net):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    profile_models({"net": Looks().train()}, (2, 2), rounds=1)
    assert set(seen) == {(False, False)}


class Changing(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x if self.calls % 4 else x + 1)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ({}, {}, "no models to profile"),
        ({"net": Net()}, {"batch": 0}, "batch = 0 .*1 or more"),
        ({"net": Net()}, {"rounds": 0}, "rounds = 0 .*1 or more"),
        ({"net": Net(), "other": Net().double()}, {}, "of one type"),
        ({"none": nn.ReLU()}, {}, "need parameters"),
        ({"net": nn.Conv2d(3, 3, 5)}, {}, "net does not take 1 images of 3 x 2 pixels .*give another size"),
        ({"net": Changing()}, {"rounds": 3}, "net does not run the same operators"),
    ],
)
def test_what_cannot_be_measured_is_explained(models, options, message):
    with pytest.raises(InputError, match=message):
        profile_models(models, (3, 2), **options)


# ---- plots


def texts(svg):
    return {element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")}


def test_the_gap_is_drawn_per_image():
    other = Profile("other", 1, 30.0, MACHINE, (BELOW, ON))
    _, figure = efficiency_gap_plot.__wrapped__([NET, other])
    (axes,) = figure.axes
    points = [tuple(map(float, marks.get_offsets()[0])) for marks in axes.collections]
    assert points == [(4500, 0), (7000, 0), (20000, 0), (1000, 1), (6000, 1), (30000, 1)]
    found = texts(efficiency_gap_plot([NET, other]))
    assert {"net", "other", "ideal", "attainable", "actual", "22.5% of peak", "3.3% of peak"} <= found
    assert efficiency_gap_plot([]) == ""


def test_the_area_under_the_waterline_is_the_attainable_latency():
    _, figure = waterline_plot.__wrapped__(NET)
    (axes,) = figure.axes
    water, arithmetic = (patch.get_data() for patch in axes.patches)
    widths = [b - a for a, b in zip(water.edges, water.edges[1:])]
    assert widths == pytest.approx([40e-6, 100e-6, 20e-6])
    assert list(arithmetic.values) == [20, 0, 5]
    assert list(water.values) == [20, 5, 5]
    assert list(water.baseline) == [20, 0, 5]
    area = sum(width * 1e6 * height for width, height in zip(widths, water.values))
    assert area / MACHINE.peak == pytest.approx(NET.attainable)
    assert {"waiting for memory", "arithmetic", "5"} <= texts(waterline_plot(NET))
    assert "net: 1.4e+04 ms attainable, 36% of it waiting" in texts(waterline_plot(NET))
    assert waterline_plot(Profile("empty", 1, 1.0, MACHINE, ())) == ""
