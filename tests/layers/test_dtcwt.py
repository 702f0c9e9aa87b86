import math

import pytest
import torch

from exact import normal
from vitrail.layers.dtcwt import DualTree

# Kingsbury's near-symmetric filters of 13 and 19 taps, up to the middle one, as they are tabulated.
LOW = [-0.0017578125, 0, 0.022265625, -0.046875, -0.0482421875, 0.296875, 0.55546875]
LOW_BACK = [
    7.062639508928571e-05,
    0,
    -0.0013419015066964285,
    -0.0018833705357142855,
    0.007156808035714285,
    0.023856026785714284,
    -0.05564313616071428,
    -0.05168805803571428,
    0.29975760323660716,
    0.5594308035714286,
]


def symmetric(half):
    return half + half[-2::-1]


def modulated(taps):
    return [tap * (-1) ** (number - len(taps) // 2) for number, tap in enumerate(taps)]


ANALYSIS = symmetric(LOW), modulated(symmetric(LOW_BACK))
SYNTHESIS = symmetric(LOW_BACK), modulated(symmetric(LOW))


def filtered(x, taps, axis):
    """Filter along an axis, which goes on as in mirrors at both ends."""
    x = x.movedim(axis, 0)
    rows = []
    for place in range(len(x)):
        total = 0
        for number, tap in enumerate(taps):
            source = place + number - len(taps) // 2
            while not 0 <= source < len(x):
                source = -1 - source if source < 0 else 2 * len(x) - 1 - source
            total = total + tap * x[source]
        rows.append(total)
    return torch.stack(rows).movedim(0, axis)


def slow_analysis(x):
    """Take a map (H, W, C) apart."""
    if len(x) % 2:
        x = torch.cat((x, x[-1:]))
    if x.shape[1] % 2:
        x = torch.cat((x, x[:, -1:]), 1)
    low, high = (filtered(x, taps, 1) for taps in ANALYSIS)
    tall, both, wide = filtered(low, ANALYSIS[1], 0), filtered(high, ANALYSIS[1], 0), filtered(high, ANALYSIS[0], 0)
    bands = {}
    for band, degrees in ((tall, (15, 165)), (both, (45, 135)), (wide, (75, 105))):
        a, b, c, d = band[::2, ::2], band[::2, 1::2], band[1::2, ::2], band[1::2, 1::2]
        for sign, degree in zip((-1, 1), degrees):
            bands[degree] = torch.stack((a + sign * d, b - sign * c), -1) / math.sqrt(2)
    return filtered(low, ANALYSIS[0], 0), torch.stack([bands[degree] for degree in sorted(bands)])


def slow_synthesis(low, high):
    """Put a map together from (2 h, 2 w, C) and (6, h, w, C, 2)."""
    bands = []
    for one, other in ((0, 5), (1, 4), (2, 3)):
        band = torch.zeros_like(low)
        for row in range(high.shape[1]):
            for column in range(high.shape[2]):
                (p, q), (r, s) = (high[number, row, column].unbind(-1) for number in (one, other))
                for (down, across), value in {(0, 0): p + r, (0, 1): q + s, (1, 0): q - s, (1, 1): r - p}.items():
                    band[2 * row + down, 2 * column + across] = value / math.sqrt(2)
        bands.append(band)
    tall, both, wide = bands
    left = filtered(low, SYNTHESIS[0], 0) + filtered(tall, SYNTHESIS[1], 0)
    right = filtered(wide, SYNTHESIS[0], 0) + filtered(both, SYNTHESIS[1], 0)
    return filtered(left, SYNTHESIS[0], 1) + filtered(right, SYNTHESIS[1], 1)


def same(ours, theirs, given):
    """Compare values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given, retain_graph=True),
        torch.autograd.grad((theirs * weight).sum(), given, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("size", [(2, 4), (6, 10), (5, 3), (1, 2)])
def test_both_directions_are_the_slow_loops(size):
    transform = DualTree((4, 4))
    x = normal(2, *size, 2).requires_grad_()
    low, high = transform(x)
    slow = [slow_analysis(one) for one in x]
    same(low, torch.stack([one for one, _ in slow]), [x])
    same(high, torch.stack([one for _, one in slow], 1), [x])
    low, high = normal(*low.shape, seed=1).requires_grad_(), normal(*high.shape, seed=2).requires_grad_()
    ours = transform.inverse(low, high)
    same(ours, torch.stack([slow_synthesis(*one) for one in zip(low, high.unbind(1))]), [low, high])
    torch.testing.assert_close(transform.inverse(low, high, size), ours[:, : size[0], : size[1]])


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 9), (14, 14), (33, 20)])
def test_a_map_comes_together_again_with_and_without_kept_matrices(size):
    x = torch.randn(2, *size, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for kept in (size, (16, 30)):
        transform = DualTree(kept)
        low, high = transform(x)
        again = transform.inverse(low, high, size)
        assert float((again - x).abs().max()) < 1e-5
        results.append(high)
    torch.testing.assert_close(*results)
    double = DualTree(size).double()
    again = double.inverse(*double(x.double()), size)
    torch.testing.assert_close(again, x.double(), rtol=0, atol=1e-13)


def test_a_matrix_of_another_length_is_not_taken_for_the_kept_one():
    x = torch.randn(1, 8, 8, 1)
    for kept in (4, 16):  # whose matrices have a side of 8, too
        low, high = DualTree((kept, kept))(x)
        torch.testing.assert_close(low, DualTree((8, 8))(x)[0])
        assert high.shape == (6, 1, 4, 4, 1, 2)


def test_bands_are_those_of_their_directions():
    transform, places = DualTree((32, 32)), torch.arange(32.0)
    # Radians from place to place, across and down: crests lie along the direction, or near it.
    waves = [(0.7, 2.3), (2.2, 2.2), (2.3, 0.7), (-2.3, 0.7), (-2.2, 2.2), (-0.7, 2.3)]
    for number, (across, down) in enumerate(waves):
        wave = torch.cos(across * places[None, :] + down * places[:, None])
        power = transform(wave[None, ..., None])[1].square().sum((1, 2, 3, 4, 5))
        assert int(power.argmax()) == number


def test_it_stays_exact_under_autocast_and_in_half_precision():
    x = torch.randn(1, 6, 8, 2, generator=torch.Generator().manual_seed(0))
    transform = DualTree((6, 8))
    with torch.autocast("cpu", torch.bfloat16):
        low, high = transform(x)
        again = transform.inverse(low, high)
    assert float((again - x).abs().max()) < 1e-5
    half = x.bfloat16()
    again = transform.bfloat16().inverse(*transform(half))
    assert again.dtype == torch.float32
    assert float((again - half.float()).abs().max()) < 1e-5
    assert not transform.state_dict()
