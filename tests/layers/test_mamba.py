"""Mamba's mixers against loops written from the papers, their initial values, streams and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.errors import InputError
from vitrail.layers.mamba import SS2D, BidirectionalMamba, Mamba, MambaBlock, bidirectional_keys, initial_steps, rates
from vitrail.layers.scan.orders import raster


def path_by_loop(path, x, z):
    """Algorithm 2 of Mamba for x and z (L, D), place by place; z None is no gate."""
    length = x.shape[0]
    taps = path.conv1d.weight.shape[2]
    rates = -path.A_log.exp()
    state = torch.zeros_like(rates)
    outputs = []
    for place in range(length):
        seen = path.conv1d.bias
        for tap in range(taps):
            before = place - (taps - 1) + tap
            if before >= 0:
                seen = seen + path.conv1d.weight[:, 0, tap] * x[before]
        seen = seen / (1 + (-seen).exp())
        found = path.x_proj.weight @ seen
        step = path.dt_proj.weight @ found[: path.rank] + path.dt_proj.bias
        step = (1 + step.exp()).log()
        enter, leave = found[path.rank : path.rank + path.states], found[path.rank + path.states :]
        state = (step[:, None] * rates).exp() * state + (step * seen)[:, None] * enter[None]
        y = (state * leave[None]).sum(1) + path.D * seen
        outputs.append(y if z is None else y * z[place] / (1 + (-z[place]).exp()))
    return torch.stack(outputs)


def mamba_by_loop(mixer, x):
    outputs = []
    for sequence in x:
        inside, gate = (sequence @ mixer.in_proj.weight.T).chunk(2, 1)
        outputs.append(path_by_loop(mixer, inside, gate) @ mixer.out_proj.weight.T)
    return torch.stack(outputs)


def stirred(module):
    """Move all parameters off their first values, some of which are ones and zeros."""
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module


def same_values_and_gradients(module, x, expected):
    """``expected`` by slow means; compare it with module(x), and the gradients of all."""
    y = module(x)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    wanted = [x, *module.parameters()]
    ours = torch.autograd.grad((y * weight).sum(), wanted)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("length", "width", "rank"), [(1, 4, None), (2, 4, 3), (7, 3, 1), (9, 1, None)])
def test_mamba_is_the_loop_of_the_paper(length, width, rank):
    torch.manual_seed(0)
    mixer = stirred(Mamba(6, states=3, width=width, rank=rank).double())
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    same_values_and_gradients(mixer, x, mamba_by_loop(mixer, x))


@pytest.mark.parametrize("length", [1, 6])
def test_both_directions_are_two_loops_and_their_mean(length):
    torch.manual_seed(0)
    mixer = stirred(BidirectionalMamba(6, states=3).double())
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    outputs = []
    for sequence in x:
        inside, gate = (sequence @ mixer.in_proj.weight.T).chunk(2, 1)
        there = path_by_loop(mixer, inside, gate)
        back = path_by_loop(mixer.back, inside.flip(0), gate.flip(0)).flip(0)
        outputs.append((there + back) / 2 @ mixer.out_proj.weight.T)
    same_values_and_gradients(mixer, x, torch.stack(outputs))


@pytest.mark.parametrize("cuts", [(1,) * 7, (3, 4), (5, 1, 1), (7,)])
def test_a_stream_in_any_pieces_is_the_whole(cuts):
    torch.manual_seed(0)
    mixer = stirred(Mamba(5, states=3).double())
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    memory, outputs = None, []
    for piece in x.split(cuts, 1):
        y, memory = mixer.stream(piece, memory)
        outputs.append(y)
        assert memory.places.shape == (2, 10, 3)
        assert memory.state.shape == (2, 10, 3)
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x))


def test_a_later_place_changes_nothing_before_it():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 6, requires_grad=True)
    gradient = torch.autograd.grad(Mamba(6)(x)[:, 3].sum(), x)[0]
    assert gradient[:, :4].abs().sum(-1).min() > 0
    assert gradient[:, 4:].abs().max() == 0


def test_mamba_begins_as_published():
    torch.manual_seed(0)
    mixer = Mamba(64, states=5)
    assert mixer.rank == 4
    assert Mamba(65).rank == 5
    steps = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.1 + 1e-6
    # Even in the logarithm, not in the step.
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.3
    assert 0.45 < mixer.dt_proj.weight.abs().max() <= 0.5
    torch.testing.assert_close(mixer.A_log[3].exp(), torch.arange(1.0, 6))
    assert torch.equal(mixer.D, torch.ones(128))
    assert mixer.in_proj.bias is None
    assert mixer.out_proj.bias is None
    assert F.softplus(initial_steps(100, smallest=1e-6, largest=1e-5)).min() > 0.99e-4  # the floor
    torch.testing.assert_close(F.softplus(initial_steps(3, smallest=2.0, largest=2.0)), torch.full((3,), 2.0))


def plane_by_loop(mixer, x, orders):
    """VMamba's SS2D for one image x (H, W, C)."""
    height, width, _ = x.shape
    inside = x @ mixer.in_proj.weight.T
    gate = None
    if mixer.gate:
        inside, gate = inside.chunk(2, -1)
    inside = F.silu(mixer.conv2d(inside.permute(2, 0, 1)[None])[0]).permute(1, 2, 0).reshape(height * width, -1)
    channels = inside.shape[1]
    total = torch.zeros_like(inside)
    for way, order in enumerate(orders):
        part = slice(way * channels, (way + 1) * channels)
        rates = -mixer.A_logs[part].exp()
        state = torch.zeros_like(rates)
        for place in order:
            seen = inside[place]
            found = mixer.x_proj_weight[way] @ seen
            delta, enter, leave = found.split((mixer.rank, mixer.states, mixer.states))
            step = F.softplus(mixer.dt_projs_weight[way] @ delta + mixer.dt_projs_bias[way])
            state = (step[:, None] * rates).exp() * state + (step * seen)[:, None] * enter
            total = total.index_add(0, torch.tensor([place]), ((state * leave).sum(1) + mixer.Ds[part] * seen)[None])
    y = F.layer_norm(total, (channels,), mixer.out_norm.weight, mixer.out_norm.bias).reshape(height, width, -1)
    if gate is not None:
        y = y * F.silu(gate)
    return y @ mixer.out_proj.weight.T


@pytest.mark.parametrize(("height", "width", "gate"), [(1, 1, True), (3, 2, True), (2, 4, False)])
def test_a_plane_is_scanned_in_four_directions(height, width, gate):
    torch.manual_seed(0)
    mixer = stirred(SS2D(4, states=2, expand=1.5, gate=gate).double())
    x = torch.randn(2, height, width, 4, dtype=torch.float64, requires_grad=True)
    rows = [i * width + j for i in range(height) for j in range(width)]
    columns = [i * width + j for j in range(width) for i in range(height)]
    orders = [rows, columns, rows[::-1], columns[::-1]]
    same_values_and_gradients(mixer, x, torch.stack([plane_by_loop(mixer, image, orders) for image in x]))


def test_a_plane_is_scanned_in_the_orders_that_are_given():
    torch.manual_seed(0)
    mixer = stirred(SS2D(4, states=2, orders=lambda shape: [raster(shape)[::-1]]).double())
    assert mixer.x_proj_weight.shape[0] == 1
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    same_values_and_gradients(mixer, x, plane_by_loop(mixer, x[0], [range(5, -1, -1)])[None])


def test_a_plane_begins_as_published():
    torch.manual_seed(0)
    mixer = SS2D(64, states=5)
    assert mixer.x_proj_weight.shape == (4, 4 + 10, 128)
    assert 0.9 * 128**-0.5 < mixer.x_proj_weight.abs().max() <= 128**-0.5
    assert 0.45 < mixer.dt_projs_weight.abs().max() <= 0.5
    assert F.softplus(mixer.dt_projs_bias).min() >= 1e-3
    torch.testing.assert_close(mixer.A_logs[300].exp(), torch.arange(1.0, 6))


def test_a_scan_can_be_set_in_the_place_of_ours():
    torch.manual_seed(0)
    calls = []

    def scan(u, *arguments, **options):
        calls.append(sorted(options))
        return torch.zeros_like(u), options.get("state")

    for mixer, x, wanted in ((Mamba(4), torch.randn(1, 5, 4), 1), (SS2D(4), torch.randn(1, 2, 2, 4), 1)):
        mixer.scan = scan
        mixer(x)
        assert len(calls) == wanted
        calls.clear()


def test_published_names_of_both_directions():
    mixer = BidirectionalMamba(4)
    names = [
        "A_b_log",
        "D_b",
        "conv1d_b.weight",
        "conv1d_b.bias",
        "x_proj_b.weight",
        "dt_proj_b.weight",
        "dt_proj_b.bias",
    ]
    theirs = {f"layers.0.mixer.{name}": torch.zeros(1) for name in [*names, "A_log", "D", "conv1d.weight"]}
    ours = bidirectional_keys(theirs)
    assert len(ours) == len(theirs)
    assert {name.removeprefix("layers.0.mixer.") for name in ours} <= set(mixer.state_dict())
    assert "layers.0.mixer.back.D" in ours


def test_low_precision_keeps_its_rates_and_states():
    torch.manual_seed(0)
    mixer = Mamba(8, states=4)
    x = torch.randn(1, 20, 8)
    expected = mixer(x)
    assert mixer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert rates(mixer.A_log).dtype == torch.float32
    assert torch.equal(rates(mixer.A_log), -mixer.A_log.float().exp())
    torch.testing.assert_close(mixer(x.bfloat16()).float(), expected, atol=0.02, rtol=0.05)
    plane = SS2D(8, states=4)
    assert plane.bfloat16()(torch.randn(1, 3, 3, 8).bfloat16()).dtype == torch.bfloat16


def test_a_block_adds_what_its_mixer_makes_of_the_normed_input():
    block = MambaBlock(nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(block(x), x + block.mixer(F.layer_norm(x, (4,))))
    dropped = MambaBlock(nn.Linear(4, 4), nn.LayerNorm(4), drop_path=0.999999).train()
    assert torch.equal(dropped(x), x)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Mamba(8, states=0), "states = 0"),
        (lambda: Mamba(8, width=0), "width = 0"),
        (lambda: SS2D(8, width=2), "odd"),
        (lambda: BidirectionalMamba(8).stream(torch.zeros(1, 2, 8)), "whole sequence"),
    ],
)
def test_wrong_sizes_are_refused(make, told):
    with pytest.raises(InputError, match=told):
        make()
