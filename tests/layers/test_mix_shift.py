import pytest
import torch

from vitrail.errors import InputError
from vitrail.layers.mix_shift import MIX_SIZES, SHIFTS, MixShift


def slow_mix_shift(layer, x, mix_sizes, shifts):
    """Mix-shift of one map (H, W, C), place by place, channel by channel."""
    height, width, dim = x.shape
    run = -(-dim // len(shifts))
    out = []
    for channel in range(dim):
        group = channel // run
        inside, size, shift = channel - group * run, mix_sizes[group], shifts[group]
        plane = []
        for y in range(height):
            for c in range(width):
                total = layer.across[group].bias[inside] + layer.down[group].bias[inside]
                for i in range(size):
                    for j in range(size):
                        row, column = y + i - size // 2, c + j - size // 2
                        if 0 <= row < height and 0 <= column < width:
                            total = (
                                total
                                + layer.across[group].weight[inside, 0, i, j]
                                * x[row, (column - shift) % width, channel]
                                + layer.down[group].weight[inside, 0, i, j] * x[(row - shift) % height, column, channel]
                            )
                plane.append(total)
        out.append(torch.stack(plane).reshape(height, width))
    return torch.stack(out, -1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 2), (3, 5)])
@pytest.mark.parametrize(
    ("dim", "mix_sizes", "shifts"), [(5, (1, 3, 1, 5, 3), SHIFTS), (7, (3, 1, 5), (0, -1, 3)), (3, (3,), (1,))]
)
def test_it_is_the_slow_loop(dim, mix_sizes, shifts, height, width):
    torch.manual_seed(0)
    layer = MixShift(dim, mix_sizes, shifts).double()
    x = torch.randn(2, height, width, dim, dtype=torch.float64, requires_grad=True)
    ours = layer(x)
    theirs = torch.stack([slow_mix_shift(layer, image, mix_sizes, shifts) for image in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight, given = torch.randn_like(ours), [x, *layer.parameters()]
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_group_looks_the_farther_the_larger_its_region():
    distances = [shift - SHIFTS[0] for shift in SHIFTS]
    assert distances == [0, 1, 2, 3, 4]
    for sizes in MIX_SIZES:
        assert list(sizes) == sorted(sizes)
        assert sizes[0] == 1
    assert [max(sizes) for sizes in MIX_SIZES] == [7, 7, 7, 7]
    assert [sum(sizes) for sizes in MIX_SIZES] == [17, 19, 23, 29]


def test_channels_are_cut_into_runs_of_which_the_last_may_be_shorter():
    assert MixShift(96).groups == [20, 20, 20, 20, 16]
    assert MixShift(128).groups == [26, 26, 26, 26, 24]
    assert MixShift(96).groups == [len(part) for part in torch.zeros(96).chunk(5)]


@pytest.mark.parametrize(
    ("dim", "mix_sizes", "shifts", "message"),
    [
        (5, (1, 3), SHIFTS, r"mix_sizes = \(1, 3\) and shifts = .* for 2 and 5 groups"),
        (5, (), (), "for 0 and 0 groups"),
        (16, (1,) * 5, SHIFTS, "16 channels cannot be cut into 5 groups of 4: .* such as 20"),
        (5, (1, 2, 3, 3, 3), SHIFTS, "mix_sizes = 2 is not allowed: give odd"),
        (5, (1, 3, 3, 3, -1), SHIFTS, "mix_sizes = -1"),
    ],
)
def test_groups_that_do_not_fit_are_explained(dim, mix_sizes, shifts, message):
    with pytest.raises(InputError, match=message):
        MixShift(dim, mix_sizes, shifts)
