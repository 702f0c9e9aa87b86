import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.compress import adaquant as module
from vitrail.compress.adaquant import adaquant, compress
from vitrail.compress.compressor import Budget
from vitrail.compress.quantize.adaround import SoftRounding, adaround
from vitrail.compress.quantize.capture import capture, mean_ranges, within
from vitrail.compress.quantize.folding import fold_batch_norms
from vitrail.compress.quantize.layers import FixedQuantLayer, LayerFacts, QuantLayer, fix, trace, weight_bytes
from vitrail.compress.quantize.quantiser import AffineQuantiser, channel_range, round_ste
from vitrail.errors import InputError, VitrailError
from vitrail.models.factory import create_model

ANY = Budget(bytes=1e9)
QUICK = {"steps": 5, "batch_size": 16, "bias_steps": 0}


def quadrants(count, seed=0):
    """Images with one bright quadrant, and which one it is."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator) * 0.6
    target = torch.randint(0, 4, (count,), generator=generator)
    for image, place in zip(images, target.tolist()):
        row, column = divmod(place, 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.5
    return images, target


def batches_of(images, target, size=16):
    def start():
        for place in range(0, len(images), size):
            yield images[place : place + size], target[place : place + size]

    return start


@pytest.fixture(scope="module")
def trained():
    """A small net with plain, grouped and pointwise convolutions, that knows its task."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 12, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 4),
    )
    images, target = quadrants(256)
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(60):
        rows = slice(64 * (step % 4), 64 * (step % 4) + 64)
        loss = F.cross_entropy(net(images[rows]), target[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


@pytest.fixture(scope="module")
def calibration():
    return batches_of(*quadrants(48, 1))


def accuracy(net, images, target):
    with torch.no_grad():
        return float((net(images).argmax(1) == target).float().mean())


# ---- the quantiser


def slow_quantiser(x, low, span, bits):
    """Plain autograd with straight-through rounding, as the paper's equations stand."""
    scale = span.clamp(1e-6, 1e5) / (2**bits - 1)
    zero = round_ste(-low / scale).clamp(0, 2**bits - 1)
    return (round_ste((x / scale + zero).clamp(0, 2**bits - 1)) - zero) * scale


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantiser_equals_the_definition_with_its_gradients(bits, per_channel):
    x = torch.randn(5, 4, 3, dtype=torch.float64) * 2 + 0.4
    low, high = channel_range(x) if per_channel else (x.amin().reshape(1), x.amax().reshape(1))
    quantiser = AffineQuantiser(bits, 0.7 * low, 0.8 * high).double()  # some is clipped
    mine, slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    parameters = [quantiser.low.detach().clone().requires_grad_(), quantiser.span.detach().clone().requires_grad_()]
    weight = torch.randn_like(x)
    got, expected = quantiser(mine), slow_quantiser(slow, *parameters, bits)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(got, expected, atol=1e-12)
    assert torch.allclose(mine.grad, slow.grad, atol=1e-12)
    assert torch.allclose(quantiser.low.grad, parameters[0].grad, atol=1e-10)
    assert torch.allclose(quantiser.span.grad, parameters[1].grad, atol=1e-10)
    assert 0 < (mine.grad == 0).double().mean() < 0.9
    assert len(got[0].unique()) <= 2**bits


def test_zero_is_on_the_grid_and_the_range_holds_it():
    for low, high in ((0.5, 2.0), (-3.0, -1.0), (-0.3, 0.9), (0.0, 0.0)):
        quantiser = AffineQuantiser(3, torch.tensor([low]), torch.tensor([high]))
        assert quantiser(torch.zeros(1)).item() == 0
        assert quantiser.low.item() <= 0 <= (quantiser.low + quantiser.span).item()
    quantiser = AffineQuantiser(8, torch.tensor([-1.0]), torch.tensor([3.0]))
    x = torch.linspace(-1, 3, 100)
    assert (quantiser(x) - x).abs().max() <= 4 / 255 / 2 + 1e-6


# ---- layers, folding, capture


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
        (nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 5)),
        (nn.Linear(5, 3), (2, 6, 5)),
        (nn.Conv1d(3, 4, 2), (2, 3, 9)),
    ],
)
@pytest.mark.parametrize("bits", [2, 8])
def test_a_quantised_layer_and_its_constants_agree(layer, shape, bits):
    x = torch.randn(shape)
    quantised = QuantLayer(copy.deepcopy(layer), bits, x.amin(), x.amax())
    plain = copy.deepcopy(layer)
    low, high = layer.weight.flatten(1).amin(1), layer.weight.flatten(1).amax(1)
    with torch.no_grad():
        for channel in range(len(low)):
            span = (high[channel].clamp(min=0) - low[channel].clamp(max=0)).double()
            one = layer.weight[channel].double()
            plain.weight[channel] = slow_quantiser(one, low[channel].clamp(max=0).double(), span, bits).float()
        given = slow_quantiser(x, x.amin().clamp(max=0), x.amax().clamp(min=0) - x.amin().clamp(max=0), bits)
        expected = plain(given)
        assert torch.allclose(quantised(x), expected, atol=1e-5)
        fixed = FixedQuantLayer(quantised)
        assert torch.allclose(fixed(x), expected, atol=1e-5)
    stored = fixed.integers()
    assert stored.min() >= 0
    assert stored.max() <= 2**bits - 1
    assert torch.allclose((stored - fixed.weight_zero) * fixed.weight_scale, fixed.layer.weight, atol=1e-6)
    assert fixed.weight.shape == layer.weight.shape  # what a network asks of the layer is answered
    with pytest.raises(AttributeError, match="nothing"):
        _ = fixed.nothing


@pytest.mark.parametrize("name", ["small_resnet_nano", "tf_efficientnet_lite0", "resnet18"])
def test_folding_changes_nothing_that_is_computed(name):
    torch.manual_seed(0)
    net = create_model(name, num_classes=7)
    with torch.no_grad():
        net.train()(torch.randn(8, 3, 32, 32))  # statistics other than zero and one
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.copy_(torch.randn_like(norm.weight) + 0.3)  # of both signs
            norm.bias.copy_(torch.randn_like(norm.bias))
        net.eval()
        images = torch.randn(2, 3, 32, 32)
        folded, statistics = fold_batch_norms(net, images)
        expected = net(images)
        assert torch.allclose(folded(images), expected, atol=1e-3 * float(expected.abs().max()))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(statistics) == len(norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    gamma, beta = next(iter(statistics.values()))
    assert torch.equal(gamma, norms[0].weight.abs())
    assert torch.equal(beta, norms[0].bias)


def test_a_layer_whose_output_goes_two_ways_is_not_folded():
    class Fork(nn.Module):
        def __init__(self, by_module):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.other = nn.ReLU() if by_module else torch.relu
            self.norm.running_mean.fill_(0.5)

        def forward(self, x):
            x = self.conv(x)
            return (self.norm(x) + self.other(x)).mean((2, 3))

    for by_module in (True, False):
        net = Fork(by_module).eval()
        images = torch.randn(2, 3, 4, 4)
        folded, statistics = fold_batch_norms(net, images)
        assert not statistics
        assert torch.equal(folded(images), net(images))


def test_trace_lists_layers_in_the_order_of_their_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.shared = nn.Linear(6, 2), nn.Conv2d(4, 4, 1)
            self.first = nn.Conv2d(3, 4, 3, padding=1, groups=1)
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.shared(self.shared(self.first(x))).mean(1)[:, 0])

    batches = batches_of(torch.randn(3, 3, 5, 6), torch.zeros(3, dtype=torch.int64))
    found = trace(Twice(), batches)
    assert [layer.name for layer in found] == ["first", "last"]
    assert found[0] == LayerFacts("first", 3 * 5 * 6, 4 * 3 * 9 * 5 * 6)
    assert found[1] == LayerFacts("last", 6, 12)


def test_trace_counts_what_the_flop_counter_counts():
    from vitrail.app.build import count_flops

    net = create_model("tf_efficientnet_lite0", num_classes=10).eval()
    batches = batches_of(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    assert sum(layer.macs for layer in trace(net, batches)) == count_flops(net, (32, 32))


def test_capture_returns_inputs_and_outputs_of_all_images(trained, calibration):
    images = torch.cat([x for x, _ in calibration()])
    with torch.no_grad():
        inside = [images]
        for part in trained:
            inside.append(part(inside[-1]))
    found = capture(trained, ["0", "6"], calibration)
    assert torch.allclose(found["0"], images)
    assert torch.allclose(found["6"], inside[6], atol=1e-6)
    assert torch.allclose(capture(trained, ["3"], calibration, outputs=True)["3"], inside[4], atol=1e-6)
    assert not any(part._forward_hooks for part in trained)
    ranges = mean_ranges(trained, ["3"], calibration)["3"]
    assert float(ranges[0]) == pytest.approx(float(inside[3].flatten(1).amin(1).mean()), abs=1e-6)
    assert float(ranges[1]) == pytest.approx(float(inside[3].flatten(1).amax(1).mean()), rel=1e-6)


def test_capture_ends_a_pass_with_the_last_layer(trained, calibration):
    called = []
    handle = trained[10].register_forward_hook(lambda *_: called.append(1))
    capture(trained, ["0", "3"], calibration)
    handle.remove()
    assert not called


def test_groups_hold_no_more_than_they_may():
    layers = [LayerFacts(str(n), size, 1) for n, size in enumerate((10, 20, 90, 5, 5))]
    groups = list(within(layers, 3, 4 * 3 * 30))
    assert [[layer.inputs for layer in group] for group in groups] == [[10, 20], [90], [5, 5]]


# ---- AdaQuant and AdaRound


def slow_adaquant(layer, inputs, targets, steps, batch_size, seed):
    """Four optimisers, as published, on the plain form of the layer."""
    weight, bias = layer.layer.weight.detach().clone(), layer.layer.bias.detach().clone()
    ranges = [p.detach().clone() for q in (layer.weight_quantiser, layer.input_quantiser) for p in (q.low, q.span)]
    for tensor in (weight, bias, *ranges):
        tensor.requires_grad_()
    optimisers = [
        torch.optim.Adam([weight], 1e-5),
        torch.optim.Adam([bias], 1e-3),
        torch.optim.Adam(ranges[:2], 1e-3),
        torch.optim.Adam(ranges[2:], 1e-1),
    ]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randperm(len(inputs), generator=generator)[:batch_size]
        given = slow_quantiser(inputs[rows], *ranges[2:], layer.bits)
        out = F.conv2d(given, slow_quantiser(weight, *ranges[:2], layer.bits), bias, padding=1)
        for optimiser in optimisers:
            optimiser.zero_grad()
        (out - targets[rows]).pow(2).mean().backward()
        for optimiser in optimisers:
            optimiser.step()
    return weight, bias, ranges


def test_adaquant_equals_four_optimisers_and_helps():
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    inputs = torch.randn(40, 4, 6, 6, dtype=torch.float64)
    targets = conv(inputs).detach()
    layer = QuantLayer(copy.deepcopy(conv), 4, inputs.amin(), inputs.amax())
    before = F.mse_loss(layer(inputs), targets).item()
    weight, bias, ranges = slow_adaquant(layer, inputs, targets, 12, 16, 3)
    adaquant(layer, inputs, targets, steps=12, batch_size=16, seed=3)
    assert torch.allclose(layer.layer.weight, weight, atol=1e-9)
    assert torch.allclose(layer.layer.bias, bias, atol=1e-9)
    got = [p for q in (layer.weight_quantiser, layer.input_quantiser) for p in (q.low, q.span)]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(got, ranges))
    adaquant(layer, inputs, targets, steps=60, batch_size=32)
    assert F.mse_loss(layer(inputs), targets).item() < 0.8 * before


def test_soft_rounding_begins_at_the_weight_and_ends_at_a_neighbour():
    torch.manual_seed(0)
    layer = QuantLayer(nn.Conv2d(3, 4, 3), 4, torch.tensor(-1.0), torch.tensor(1.0))
    rounding = SoftRounding(layer)
    quantiser = layer.weight_quantiser
    low, high = -quantiser.zero * quantiser.scale, (15 - quantiser.zero) * quantiser.scale
    assert torch.allclose(rounding(), torch.clamp(layer.layer.weight, low, high), atol=1e-4)
    assert torch.allclose(rounding(hard=True), layer.quantised_weight(), atol=1e-6)
    with torch.no_grad():
        rounding.choice.fill_(9.0)
    up = rounding(hard=True)
    most = (15 - layer.weight_quantiser.zero) * layer.weight_quantiser.scale
    exact = layer.layer.weight / layer.weight_quantiser.scale
    assert torch.allclose(up, torch.minimum((exact.floor() + 1) * layer.weight_quantiser.scale, most), atol=1e-6)
    assert rounding.penalty(2).item() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        rounding.choice.zero_()  # half-way
    assert rounding.penalty(5).item() == pytest.approx(up.numel(), rel=1e-6)
    half = (layer.layer.weight / layer.weight_quantiser.scale).floor() + 0.5
    inner = (half < 15 - quantiser.zero) & (half > -quantiser.zero)
    assert torch.allclose(rounding()[inner], (half * layer.weight_quantiser.scale)[inner], atol=1e-6)


def test_adaround_beats_the_nearest_value():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    basis = torch.randn(4, 4)
    inputs = torch.einsum("nchw,cd->ndhw", torch.randn(48, 4, 5, 5), basis)  # correlated, so that rounding interacts
    targets = conv(inputs).detach()
    layer = QuantLayer(copy.deepcopy(conv), 3, inputs.amin(), inputs.amax())
    layer.input_quantiser = nn.Identity()
    before = F.mse_loss(layer(inputs), targets).item()
    nearest = layer.quantised_weight().detach()
    adaround(layer, inputs, targets, steps=150, batch_size=32, seed=0)
    assert F.mse_loss(layer(inputs), targets).item() < 0.9 * before
    moved = (layer.quantised_weight() - nearest).abs() / layer.weight_quantiser.scale
    assert moved.max() < 1.01  # rounded to one neighbour or the other
    assert moved.max() > 0.99
    assert torch.allclose(layer.layer.weight, layer.quantised_weight(), atol=1e-6)


# ---- the whole


def test_the_model_stays_and_what_comes_out_is_plain(trained, calibration):
    before = copy.deepcopy(trained.state_dict())
    images, target = quadrants(200, 2)
    result = compress(trained, calibration, ANY, bits=(8,), **QUICK)
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert not any(isinstance(part, QuantLayer) for part in result.model.modules())
    assert not any(parameter.requires_grad for parameter in result.model.parameters())
    fixed = [part for part in result.model.modules() if isinstance(part, FixedQuantLayer)]
    assert [entry["name"] for entry in result.report["layers"]] == ["0", "3", "6", "10"]
    assert len(fixed) == 4
    assert accuracy(result.model, images, target) >= accuracy(trained, images, target) - 0.02
    assert accuracy(trained, images, target) > 0.9
    assert result.report["bytes_before"] == sum(
        t.numel() * t.element_size() for t in [*trained.parameters(), *trained.buffers()]
    )
    weights = {"0": (216, 8), "3": (144, 8), "6": (96, 12), "10": (192, 4)}
    stored = sum(numbers + channels * 5 for numbers, channels in weights.values())
    rest = 4 * (8 + 8 + 12 + 4) + 8 * 4  # biases after folding; a scale and a zero point for each input
    assert result.report["bytes"] == stored + rest
    assert result.report["folded"] == 3


@pytest.mark.parametrize("layerwise", ["none", "adaround", "adaquant"])
@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_every_way_to_optimise_keeps_the_grid_and_never_does_worse(trained, calibration, layerwise, order):
    result = compress(trained, calibration, ANY, bits=(3,), layerwise=layerwise, order=order, **QUICK)
    for part in result.model.modules():
        if isinstance(part, FixedQuantLayer):
            assert part.bits == 3
            assert all(len(channel.unique()) <= 8 for channel in part.layer.weight)
    for entry in result.report["layers"]:
        assert entry["error"] <= entry["error_before"]
        assert (entry["error"] < entry["error_before"]) <= (layerwise != "none")
    if layerwise == "adaquant":
        assert any(entry["error"] < entry["error_before"] for entry in result.report["layers"])


def test_a_layer_that_got_worse_stays_as_it_was(trained, calibration, monkeypatch):
    def harm(layer, *_, **__):
        with torch.no_grad():
            layer.layer.weight.add_(1)

    plain = compress(trained, calibration, ANY, bits=(4,), layerwise="none", **QUICK)
    monkeypatch.setattr(module, "adaquant", harm)
    harmed = compress(trained, calibration, ANY, bits=(4,), **QUICK)
    images, _ = quadrants(8)
    assert torch.equal(plain.model(images), harmed.model(images))


def test_sequential_layers_see_what_quantised_ones_put_out(trained, calibration, monkeypatch):
    seen = {}

    def spy(self, name, width, given, exact):
        seen[name] = given, exact
        return original(self, name, width, given, exact)

    original = module._Work.quantise
    monkeypatch.setattr(module._Work, "quantise", spy)
    compress(trained, calibration, ANY, bits=(2,), layerwise="none", order="sequential", **QUICK)
    assert torch.equal(*seen["0"])
    assert all(not torch.allclose(*seen[name]) for name in ("3", "6", "10"))


def test_bits_follow_a_budget_of_bytes(trained, calibration):
    sizes = {bits: compress(trained, calibration, ANY, bits=(bits,), **QUICK).report["bytes"] for bits in (8, 2)}
    for share in (0.0, 0.5):
        allowed = sizes[2] + share * (sizes[8] - sizes[2])
        report = compress(trained, calibration, Budget(bytes=allowed), bits=(8, 4, 2), **QUICK).report
        assert report["bytes"] <= math.ceil(allowed)
        assert report["bytes"] >= allowed - 250  # no more is left than what a layer could have had
    assert {entry["bits"] for entry in report["layers"]} > {8}
    assert all(entry["loss"] >= 0 for entry in report["layers"])
    with pytest.raises(VitrailError, match="cannot be kept: the least is"):
        compress(trained, calibration, Budget(bytes=sizes[2] - 50), bits=(8, 2), **QUICK)


def test_bits_go_to_the_layers_that_lose_most(trained, calibration, monkeypatch):
    # Layer 6 alone loses anything by fewer bits.
    seen = []

    def measure(network, batches, by_accuracy):
        seen.append([network.get_submodule(name).bits for name in ("0", "3", "6", "10")])
        return 1.0 + 10.0 * (network.get_submodule("6").bits == 4)

    monkeypatch.setattr(module, "_measure", measure)
    report = compress(trained, calibration, Budget(bytes=900), bits=(8, 4), **QUICK).report
    assert {entry["name"]: entry["bits"] for entry in report["layers"]}["6"] == 8
    assert seen == [[8] * 4, [4, 8, 8, 8], [8, 4, 8, 8], [8, 8, 4, 8], [8, 8, 8, 4]]  # one layer at a time
    assert report["bytes"] <= 900
    losses = {entry["name"]: entry["loss"] for entry in report["layers"] if entry["bits"] == 4}
    assert losses
    assert set(losses.values()) == {1e-6}


def test_bitops_are_kept(trained, calibration):
    most = compress(trained, calibration, ANY, bits=(8,), **QUICK).report["bitops"]
    macs = sum(layer.macs for layer in trace(trained, calibration))
    assert most == 64 * macs
    report = compress(trained, calibration, Budget(bitops=0.5 * most), bits=(8, 4), **QUICK).report
    assert 0.2 * most < report["bitops"] <= 0.5 * most


def test_a_drop_of_accuracy_is_kept_at_the_fewest_bytes(trained, calibration):
    images, target = (torch.cat(parts) for parts in zip(*calibration()))
    loose = compress(trained, calibration, Budget(drop=0.5), bits=(8, 1), **QUICK)
    tight = compress(trained, calibration, Budget(drop=0.0), bits=(8, 1), **QUICK)
    assert loose.report["bytes"] < tight.report["bytes"]
    assert accuracy(tight.model, images, target) >= accuracy(trained, images, target)
    with pytest.raises(VitrailError, match="cannot be kept: with the most bits"):
        compress(trained, calibration, Budget(drop=0.0), bits=(1,), layerwise="none", **QUICK)


def test_tuning_that_would_break_the_drop_is_taken_back(trained, calibration, monkeypatch):
    def harm(network, *_):
        with torch.no_grad():
            network[10].layer.bias[0] += 100

    def spoil(self, network, chosen):
        network[10].layer.bias.data[0] += 100
        self.errors = dict.fromkeys(self.errors, (9.0, 9.0))

    plain = compress(trained, calibration, Budget(drop=0.01), bits=(8,), **QUICK, retune_norms=False)
    told = []
    monkeypatch.setattr(module, "_retune_norms", harm)
    kept = compress(trained, calibration, Budget(drop=0.01), bits=(8,), **QUICK, tell=told.append)
    images, _ = quadrants(8)
    assert torch.equal(plain.model(images), kept.model(images))
    assert "taken back" in told[-1]
    without = compress(trained, calibration, ANY, bits=(8,), **QUICK)
    assert not torch.equal(plain.model(images), without.model(images))
    monkeypatch.setattr(module._Work, "sequential", spoil)
    ordered = compress(trained, calibration, Budget(drop=0.01), bits=(8,), order="sequential", **QUICK)
    assert ordered.report["layers"] == plain.report["layers"]


def test_a_sequence_alone_is_optimised_once(trained, calibration, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "adaquant", lambda *_, **__: calls.append(1))
    compress(trained, calibration, ANY, bits=(4,), order="sequential", keep_edges=True, **QUICK)
    assert len(calls) == 4
    compress(trained, calibration, ANY, bits=(8, 4), order="sequential", **QUICK)
    assert len(calls) == 4 + 3 * 4


def test_empty_batches_change_nothing(trained, calibration):
    def with_empty():
        for images, target in calibration():
            yield images[:0], target[:0]
            yield images, target

    options = {**QUICK, "bias_steps": 3, "bits": (4,)}
    images, _ = quadrants(8)
    plain, other = (compress(trained, source, ANY, **options).model(images) for source in (calibration, with_empty))
    assert torch.equal(plain, other)


def test_edges_keep_eight_bits(trained, calibration):
    report = compress(trained, calibration, ANY, bits=(4,), keep_edges=True, **QUICK).report
    assert [entry["bits"] for entry in report["layers"]] == [8, 4, 4, 8]


def test_norms_are_estimated_anew(trained, calibration):
    images = torch.cat([x for x, _ in calibration()])
    network, statistics = fold_batch_norms(trained, images)
    for layer in trace(network, calibration):
        source = network.get_submodule(layer.name)
        low, high = mean_ranges(network, [layer.name], calibration)[layer.name]
        network[int(layer.name)] = QuantLayer(source, 2, low, high)
    stored = [((part.quantised_weight() / part.weight_quantiser.scale) + part.weight_quantiser.zero).round()
              for part in network if isinstance(part, QuantLayer)]  # fmt: skip
    module._retune_norms(network, batches_of(images, torch.zeros(48), 48), statistics)
    for name, (gamma, beta) in statistics.items():
        out = capture(network, [name], batches_of(images, images[:, 0, 0, 0]), outputs=True)[name]
        assert torch.allclose(out.mean((0, 2, 3)), beta, atol=1e-3)
        assert torch.allclose(out.var((0, 2, 3), correction=0).sqrt(), gamma, rtol=0.02, atol=1e-3)
    after = [((part.quantised_weight() / part.weight_quantiser.scale) + part.weight_quantiser.zero).round()
             for part in network if isinstance(part, QuantLayer)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(stored, after))


def test_batches_of_any_size_count_by_their_images():
    norm = module._Norm(torch.ones(2), torch.zeros(2))
    x = torch.randn(10, 2, 4)
    with torch.no_grad():
        out = norm(x[:8])
        norm(x[8:])
    assert torch.allclose(out.mean((0, 2)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(norm.mean / norm.images, x.mean((0, 2)), atol=1e-6)


def test_biases_are_tuned_to_the_teachers_answers(trained, calibration):
    images = torch.cat([x for x, _ in calibration()])

    def divergence(net):
        with torch.no_grad():
            return float(F.kl_div(net(images).log_softmax(1), trained(images).softmax(1), reduction="batchmean"))

    options = {**QUICK, "layerwise": "none", "retune_norms": False, "bits": (2,)}
    plain = compress(trained, calibration, ANY, **options)
    tuned = compress(trained, calibration, ANY, **{**options, "bias_steps": 60})
    assert divergence(tuned.model) < 0.95 * divergence(plain.model)
    assert torch.equal(plain.model[10].layer.bias, tuned.model[10].layer.bias)
    assert not torch.equal(plain.model[3].layer.bias, tuned.model[3].layer.bias)
    assert torch.equal(plain.model[3].layer.weight, tuned.model[3].layer.weight)


def test_one_step_of_bias_tuning_is_the_published_one(trained, calibration):
    network, _ = fold_batch_norms(trained, next(calibration())[0])
    teacher = copy.deepcopy(network)
    with torch.no_grad():
        network[0].weight.mul_(1.5)
    network.requires_grad_(False)
    slow = copy.deepcopy(network).requires_grad_()
    images = next(calibration())[0]
    p, q = teacher(images).softmax(1).detach(), slow(images).softmax(1)
    (p * (p / q).log()).mean().backward()
    expected = slow[3].bias - 0.1 * slow[3].bias.grad
    module._tune_biases(network, teacher, calibration, "10", 1)
    assert torch.allclose(network[3].bias, expected, atol=1e-6)


def test_labels_that_are_several_are_measured(trained):
    images, target = quadrants(32)
    several = batches_of(images, F.one_hot(target, 4).float())
    with torch.no_grad():
        logits = trained(images)
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(target, 4).float())
    assert module._measure(trained, several, False) == pytest.approx(float(expected), rel=1e-5)
    wrong = float((logits.argmax(1) != target).float().mean())
    assert module._measure(trained, several, True) == pytest.approx(wrong)
    assert module._measure(trained, batches_of(images, target), True) == pytest.approx(wrong)
    one = module._measure(trained, batches_of(images, target, 5), False)
    assert one == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-5)


def test_a_transformer_is_quantised_too():
    torch.manual_seed(0)
    net = create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, embed_dim=24, depth=2, num_heads=2).eval()
    images = torch.randn(12, 3, 32, 32)
    batches = batches_of(images, torch.zeros(12, dtype=torch.int64), 6)
    result = compress(net, batches, ANY, bits=(8,), steps=3, batch_size=6, bias_steps=1)
    names = [entry["name"] for entry in result.report["layers"]]
    assert names[0] == "patch_embed.proj"
    assert "blocks.1.attn.qkv" in names
    assert names[-1] == "head"
    assert result.report["folded"] == 0
    assert (result.model(images) - net(images)).abs().max() < 0.1 * net(images).abs().max() + 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_it_exports_to_onnx(trained, calibration, tmp_path, bits):
    import onnx
    import onnxruntime

    from vitrail.data.preprocess import Preprocess
    from vitrail.deploy.export import export_onnx
    from vitrail.deploy.interface import IMAGE, LOGITS

    result = compress(trained, calibration, ANY, bits=(bits,), **QUICK)
    preprocess = Preprocess((8, 8), "squash", 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3, (255,) * 3)
    path = tmp_path / "model.onnx"
    export_onnx(result.model, preprocess, path, classes=list("abcd"))
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert ({"QuantizeLinear", "DequantizeLinear"} <= kinds) == (bits == 8)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    got = session.run([LOGITS], {IMAGE: pixels})[0]
    with torch.no_grad():
        expected = result.model(torch.from_numpy(preprocess.normalise(pixels))).numpy()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


def test_fixed_layers_survive_saving(trained, calibration):
    first = compress(trained, calibration, ANY, bits=(4,), **QUICK).model
    second = compress(trained, calibration, ANY, bits=(4,), layerwise="none", bias_steps=0).model
    images, _ = quadrants(4)
    assert not torch.equal(first(images), second(images))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": ()}, "bits is empty"),
        ({"bits": (0,)}, "from 1 to 16"),
        ({"bits": (4.5,)}, "4.5 bits are not allowed"),
        ({"bits": ("8",)}, "give a whole number"),
        ({"bits": 8}, "give a list of widths"),
        ({"bits": "84"}, "give a list of widths"),
        ({"layerwise": "round"}, "one of adaquant, adaround, none"),
        ({"order": "random"}, "one of parallel, sequential"),
        ({"steps": 0}, "steps = 0 is not allowed: give a whole number from 1"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"bias_steps": -1}, "bias_steps = -1 is not allowed: give a whole number from 0"),
        ({"seed": -3}, "seed = -3"),
    ],
)
def test_wrong_options_are_explained(trained, calibration, options, message):
    with pytest.raises(InputError, match=message):
        compress(trained, calibration, ANY, **options)


def test_what_cannot_be_compressed_is_explained(trained, calibration):
    with pytest.raises(InputError, match="budget of flops"):
        compress(trained, calibration, Budget(flops=1e6))
    with pytest.raises(InputError, match="budget of latency_ms"):
        compress(trained, calibration, Budget(latency_ms=1, bytes=1e6))
    with pytest.raises(InputError, match="at least one batch"):
        compress(trained, lambda: iter(()), ANY)
    with pytest.raises(InputError, match="a list, which cannot be started again"):
        compress(trained, list(calibration()), ANY)
    once = iter(list(calibration()))
    with pytest.raises(InputError, match="came once and then no more"):
        compress(trained, lambda: once, ANY)
    images, target = quadrants(8)
    with pytest.raises(InputError, match=r"torch.uint8 of shape \(8, 3, 8, 8\): give normalised floats"):
        compress(trained, batches_of(images.to(torch.uint8), target), ANY)
    with pytest.raises(InputError, match=r"bytes = '10' is not allowed"):
        Budget(bytes="10")
    with pytest.raises(InputError, match="Flatten has no convolution or linear layer"):
        compress(nn.Flatten(), calibration, ANY)
    with pytest.raises(InputError, match=r"from \d to \d, and the network tells 4 classes apart"):
        compress(trained, batches_of(images, target + 3), ANY, bits=(8, 4), **QUICK)
    with pytest.raises(InputError, match="of 5 labels, and the network knows 4"):
        compress(trained, batches_of(images, torch.zeros(8, 5)), Budget(drop=0.1), bits=(8,), **QUICK)
    with pytest.raises(InputError, match="the network answers with numbers that are not finite"):
        compress(trained, batches_of(images / 0, target), ANY, **QUICK)
    images[6:] /= 0
    with pytest.raises(InputError, match="layer 0 is given numbers that are not finite"):
        compress(trained, batches_of(images, target, 4), ANY, **QUICK)
    with pytest.raises(InputError, match="no convolution or linear layer"):
        compress(nn.Sequential(nn.Flatten(), nn.LayerNorm(192)), calibration, ANY)


def test_bytes_count_integers_scales_and_zero_points():
    weight = torch.zeros(6, 5, 3, 3)
    assert weight_bytes(weight, 4) == 270 / 2 + 6 * 4 + 6 / 2
    assert fix(nn.Sequential(nn.ReLU()))[0](torch.tensor(-1.0)) == 0


def test_the_check_runs(tmp_path):
    from vitrail.checks.adaquant import run
    from vitrail.checks.check import Context

    verdict = run(Context(True, (0,), tmp_path))
    assert set(verdict.findings[0].arms) == {
        "float, less one point",
        "min-max",
        "AdaRound",
        "AdaQuant",
        "AdaQuant, tuned",
    }
    assert all(-0.02 < value <= 1 for finding in verdict.findings for arm in finding.arms.values() for value in arm)
    assert verdict.tables


def test_the_check_leaves_out_what_cannot_be_read(tmp_path):
    from PIL import Image

    from vitrail.checks.adaquant import _readable

    (tmp_path / "a.png").write_bytes(b"no image")
    Image.new("RGB", (3, 2)).save(tmp_path / "b.png")
    assert [image.size for image in _readable(sorted(tmp_path.iterdir()))] == [(3, 2)]
