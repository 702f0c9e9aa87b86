import math

import pytest
import torch

from exact import moved, normal
from vitrail.errors import InputError
from vitrail.layers import aft
from vitrail.layers.aft import AFTConv, AFTFull, AFTLocal, AFTSimple, PairBias, WindowBias, weighted_mean

GRID = [
    ("simple", (1, 9)),
    ("full", (1, 9)),
    ("free", (3, 3)),
    ("local", (1, 10)),
    ("narrow", (1, 9)),
    ("conv", (1, 11)),
    ("conv", (3, 4)),
    ("wide", (4, 3)),
    ("single", (2, 5)),
]


def layer_of(kind, grid, causal, dim=6):
    torch.manual_seed(0)
    length = grid[0] * grid[1]
    layer = {
        "simple": lambda: AFTSimple(dim, causal=causal),
        "full": lambda: AFTFull(dim, length, rank=4, causal=causal),
        "free": lambda: AFTFull(dim, length, rank=None, causal=causal),
        "local": lambda: AFTLocal(dim, length, window=5, rank=3, causal=causal),
        "narrow": lambda: AFTLocal(dim, length, window=1, rank=3, causal=causal),
        "conv": lambda: AFTConv(dim, 3, 3, causal=causal),
        "wide": lambda: AFTConv(dim, 2, (3, 7), causal=causal),
        "single": lambda: AFTConv(dim, 6, 1, causal=causal),
    }[kind]()
    return moved(layer)


# ---- a slow loop, from the paper


def slow_bias(layer, t, s, grid):
    """Return w_ts of every head."""
    bias = getattr(layer, "bias", None)
    if bias is None:
        return torch.zeros(1, dtype=torch.float64)
    if isinstance(bias, PairBias):
        if bias.window is not None and abs(t - s) >= bias.window:
            return torch.zeros(1, dtype=torch.float64)
        return (bias.weight[t, s] if bias.rank is None else bias.u[t] @ bias.v[s])[None]
    height, width = bias.kernel_size
    row, column = s // grid[1] - t // grid[1] + height // 2, s % grid[1] - t % grid[1] + width // 2
    if not (0 <= row < height and 0 <= column < width):
        return torch.zeros(layer.heads, dtype=torch.float64)
    raw = bias.weight
    scaled = (raw - raw.mean(1, keepdim=True)) / (raw.var(1, keepdim=True, correction=0) + 1e-12).sqrt()
    return bias.gain * scaled[:, row * width + column] + bias.shift


def slow(layer, x, grid):
    """Sum over all positions, one pair after the other."""
    _, length, dim = x.shape
    query, key, value = layer.qkv(x).split(layer.parts, -1)
    share = dim // key.shape[-1]  # channels with the same key
    outputs = []
    for t in range(length):
        seen = range(t + 1) if layer.causal else range(length)
        above, below = 0, 0
        logits = [
            key[:, s].repeat_interleave(share, -1)
            + slow_bias(layer, t, s, grid).repeat_interleave(dim // layer.heads).expand(dim)
            for s in seen
        ]
        largest = torch.stack(logits).detach().amax(0)
        for s, logit in zip(seen, logits):
            above = above + (logit - largest).exp() * value[:, s]
            below = below + (logit - largest).exp()
        outputs.append(torch.sigmoid(query[:, t]) * above / below)
    return layer.proj(torch.stack(outputs, 1))


def same(ours, theirs, given, rtol=1e-8):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    weight = normal(*ours.shape, seed=9)
    found, wanted = (torch.autograd.grad((y * weight).sum(), given) for y in (ours, theirs))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kind", "grid"), GRID)
@pytest.mark.parametrize("chunk", [256, 4])
def test_a_layer_is_the_slow_loop(chunk, kind, grid, causal, monkeypatch):
    monkeypatch.setattr(aft, "CHUNK", chunk)
    layer = layer_of(kind, grid, causal)
    x = normal(2, grid[0] * grid[1], 6).requires_grad_()
    same(layer(x, grid), slow(layer, x, grid), [x, *layer.parameters()])


@pytest.mark.parametrize("kind", ["simple", "local", "conv"])
def test_chunks_beyond_the_reach_count_as_a_whole(kind, monkeypatch):
    monkeypatch.setattr(aft, "CHUNK", 2)
    layer = layer_of(kind, (1, 17), causal=False)
    x = normal(1, 17, 6)
    torch.testing.assert_close(layer(x), slow(layer, x, (1, 17)), rtol=1e-9, atol=1e-10)
    if kind == "conv":  # a window on a row, by its blocks
        query, keys, values = layer._projected(x)
        mean = weighted_mean(keys, values, layer.block((1, 17)), reach=layer.reach((1, 17)))
        torch.testing.assert_close(layer._answered(query, mean), layer(x), rtol=1e-9, atol=1e-10)


def test_blocks_are_asked_for_what_a_bias_reaches_alone(monkeypatch):
    monkeypatch.setattr(aft, "CHUNK", 4)
    asked = []

    def block(rows, columns):
        asked.append((rows.start, columns.start, columns.stop))
        return torch.zeros(1, rows.stop - rows.start, columns.stop - columns.start)

    keys, values = torch.randn(2, 1, 1, 16, 3).unbind(0)
    # From position 8 a reach of 5 goes to 4 and to 12; one of 6 goes to 3.
    with torch.no_grad():
        weighted_mean(keys, values, block, reach=5)
        assert asked == [(0, 0, 8), (4, 0, 12), (8, 4, 16), (12, 8, 16)]
        asked.clear()
        weighted_mean(keys, values, block, reach=6, causal=True)
    assert asked == [(0, 0, 4), (4, 4, 8), (4, 0, 4), (8, 8, 12), (8, 0, 8), (12, 12, 16), (12, 4, 12)]


# ---- large keys


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kind", "grid"), [("simple", (1, 12)), ("full", (1, 12)), ("local", (1, 12)), ("wide", (3, 4))]
)
def test_keys_of_ten_thousand_give_the_right_answer_and_gradients(kind, grid, causal, monkeypatch):
    monkeypatch.setattr(aft, "CHUNK", 8)
    layer = layer_of(kind, grid, causal)
    keys, values = (
        normal(2, layer.heads, 12, layer.parts[1] // layer.heads),
        normal(2, layer.heads, 12, 6 // layer.heads, seed=1),
    )
    # Ties and near ties between large keys are where gradients are.
    keys = keys.sign() * (keys.abs() > 0.5) * 1e4 + normal(*keys.shape, seed=2)
    keys = keys.float().double()
    found = []
    for kind_of in (torch.float64, torch.float32):
        layer = layer.to(kind_of)
        given = [keys.to(kind_of).requires_grad_(), values.to(kind_of).requires_grad_()]
        mean = layer.mixed(*given, grid).expand(-1, -1, 12, -1)
        weight = normal(*mean.shape, seed=3).to(kind_of)
        found.append([mean, *torch.autograd.grad((mean * weight).sum(), given)])
    largest = found[0][0].abs().max()
    assert largest > 0.5
    assert float(found[0][1].abs().max()) > 1e-2
    for exact, single in zip(*found, strict=True):
        assert single.isfinite().all()
        torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=2e-4)


def test_early_positions_do_not_vanish_beside_later_keys():
    layer = AFTSimple(3, causal=True).double()
    keys = torch.tensor([-1e4, 0.0, 1e4, 0.0, -1e4, 1e4])[None, None, :, None].double()
    values = torch.arange(1.0, 7.0, dtype=torch.float64)[None, None, :, None]
    mean = layer.mixed(keys, values, (1, 6)).flatten()
    torch.testing.assert_close(mean, torch.tensor([1, 2, 3, 3, 3, 4.5], dtype=torch.float64))


def test_large_biases_are_stable_too():
    for causal in (False, True):
        layer = AFTConv(4, 2, 3, causal=causal)
        with torch.no_grad():
            layer.bias.shift.copy_(torch.tensor([200.0, -60.0]))
        x = torch.randn(1, 30, 4)
        assert layer(x, (5, 6)).isfinite().all()
        exact = layer.double()(x.double(), (5, 6))
        torch.testing.assert_close(layer.float()(x, (5, 6)), exact.float(), rtol=1e-4, atol=1e-5)


# ---- step by step


@pytest.mark.parametrize(("kind", "grid"), GRID)
def test_steps_are_the_whole(kind, grid):
    layer = layer_of(kind, grid, causal=True)
    with torch.no_grad():
        layer.qkv.weight[6 : 6 + layer.parts[1]] *= 30
    x, state, outputs, kept = normal(2, grid[0] * grid[1], 6), None, [], []
    for t in range(x.shape[1]):
        output, state = layer.step(x[:, t], state, grid)
        outputs.append(output)
        kept.append(state.keys.shape[2])
    torch.testing.assert_close(torch.stack(outputs, 1), layer(x, grid), rtol=1e-9, atol=1e-10)
    assert state.time == x.shape[1]
    reach = {"simple": 0, "local": 4, "narrow": 0, "wide": 5, "single": 0}.get(kind)
    if kind == "conv":
        reach = 1 if grid[0] == 1 else 5
    if reach is not None:
        assert max(kept) == reach


# ---- biases


def test_a_window_has_the_mean_and_deviation_it_has_learnt():
    for causal, count in ((False, 15), (True, 8)):
        bias = moved(WindowBias(2, (3, 5), causal=causal))
        taps = bias.taps()
        assert taps.shape == (2, count)
        torch.testing.assert_close(taps.mean(1), bias.shift)
        torch.testing.assert_close(taps.std(1, correction=0), bias.gain.abs())


def test_layers_begin_as_published():
    torch.manual_seed(0)
    conv, full, free = AFTConv(32, 16, 11), AFTFull(32, 64, rank=64), AFTFull(32, 64, rank=None)
    assert (conv.bias.taps() == 0).all()
    assert float(conv.bias.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    for weight in (full.bias.u, full.bias.v, free.bias.weight):
        assert float(weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert AFTFull(32, 9).bias.u.shape == (9, 128)
    assert AFTLocal(32, 9, window=3).bias.v.shape == (9, 64)
    assert (conv.qkv.out_features, full.qkv.out_features) == (32 + 16 + 32, 96)


def test_factors_are_interpolated_for_another_plane():
    layer = AFTFull(4, (4, 5), rank=2, prefix=1).double()
    with torch.no_grad():
        rows = torch.arange(4.0, dtype=torch.float64).repeat_interleave(5)
        layer.bias.u.copy_(torch.cat([torch.tensor([7.0]), rows])[:, None].expand(-1, 2))
        layer.bias.v.fill_(1)
    part = slice(0, 1 + 8 * 3)
    bias = layer.block((8, 3))(part, part)[0]
    torch.testing.assert_close(bias[0], torch.full_like(bias[0], 14))
    by_row = bias[1:, 0].view(8, 3)
    torch.testing.assert_close(by_row, by_row[:, :1].expand(-1, 3))
    assert (by_row[1:, 0] > by_row[:-1, 0]).all()
    assert layer(normal(1, 25, 4), (8, 3)).shape == (1, 25, 4)
    assert layer.reach((8, 3)) == 25


def test_a_shorter_sequence_has_the_first_biases():
    layer = layer_of("local", (1, 10), causal=True)
    x = normal(1, 10, 6)
    torch.testing.assert_close(layer(x[:, :7]), layer(x)[:, :7])
    torch.testing.assert_close(layer(x, (2, 5)), layer(x))


def test_low_precision_is_summed_in_single():
    torch.manual_seed(0)
    layer, x = AFTConv(8, 2, 3), torch.randn(2, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        query, keys, values = layer._projected(x)
        assert (query.dtype, keys.dtype, values.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        out = layer(x, (4, 5))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, (4, 5)), rtol=0.05, atol=0.02)


def test_nothing_of_a_mean_depends_on_the_shift():
    keys, values = normal(1, 1, 5, 2), normal(1, 1, 5, 2, seed=1)
    torch.testing.assert_close(weighted_mean(keys + 300, values), weighted_mean(keys, values))
    uniform = weighted_mean(torch.zeros_like(keys), values)
    torch.testing.assert_close(uniform, values.mean(2, keepdim=True))
    assert math.isclose(
        float(aft.sums(keys, values).weight.max()), float((keys - keys.amax(2, True)).exp().sum(2).max())
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AFTConv(6, 4, 3), "heads = 4 does not divide a width of 6"),
        (lambda: AFTConv(6, 0, 3), "heads = 0 does not divide a width of 6"),
        (lambda: AFTConv(6, 2, 4), "kernel_size = 4 .*odd"),
        (lambda: AFTConv(6, 2, (3, -1)), r"kernel_size = \(3, -1\) .*odd"),
        (lambda: AFTConv(6, 2, (3,)), r"kernel_size = \(3,\) .*odd side of 1 or more, or two"),
        (lambda: AFTFull(6, 0), "length = 0 .*1 or more"),
        (lambda: AFTFull(6, 4, rank=0), "rank = 0 .*1 or more"),
        (lambda: AFTLocal(6, 4, window=0), "window = 0 .*1 or more"),
        (lambda: AFTFull(6, 4)(torch.zeros(1, 5, 6)), "5 positions is too long: there are biases for 4"),
        (lambda: AFTFull(6, (2, 2), rank=None)(torch.zeros(1, 6, 6), (2, 3)), r"for \(2, 2\) places alone"),
        (lambda: AFTSimple(6).step(torch.zeros(1, 6), None, (1, 4)), "causal = True"),
    ],
)
def test_what_a_layer_does_not_take_is_explained(build, message):
    with pytest.raises(InputError, match=message):
        build()
