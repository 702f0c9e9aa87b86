import pytest
import torch

from vitrail.errors import InputError
from vitrail.layers.windows import from_windows, real_places, to_windows

CASES = [
    ((4, 6), 2),
    ((4, 6), (2, 3)),
    ((4, 6), (4, 1)),
    ((5, 7), (2, 3)),
    ((5, 7), (3, 2)),
    ((3, 8), (1, 5)),
    ((2, 3), (7, 4)),
    ((1, 1), 3),
]


def slow_windows(x, tall, wide):
    """Take window after window, place after place."""
    height, width, channels = x.shape[1:]
    found = []
    for image in x:
        for top in range(0, height, tall):
            for left in range(0, width, wide):
                window = x.new_zeros(tall, wide, channels)
                for row in range(min(tall, height - top)):
                    for column in range(min(wide, width - left)):
                        window[row, column] = image[top + row, left + column]
                found.append(window)
    return torch.stack(found)


@pytest.mark.parametrize(("size", "window"), CASES)
def test_windows_are_the_slow_loops_and_come_together_again(size, window):
    x = 1 + torch.arange(2.0 * size[0] * size[1] * 3).reshape(2, *size, 3)
    tall, wide = (window, window) if isinstance(window, int) else window
    for given in (x, x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):  # also from (B, C, H, W)
        windows = to_windows(given, window)
        assert torch.equal(windows, slow_windows(x, tall, wide))
        assert torch.equal(from_windows(windows, *size), x)


@pytest.mark.parametrize(("size", "window"), CASES)
def test_real_places_are_those_of_the_map(size, window):
    windows = to_windows(torch.ones(1, *size, 1), window).flatten(1)
    mask = real_places(*size, window)
    if mask is None:
        assert windows.all()
    else:
        assert torch.equal(mask, windows > 0)
        assert mask.any(1).all()
        assert not mask.all()


def test_gradients_pass_once():
    x = torch.randn(1, 5, 7, 2, requires_grad=True)
    weight = torch.randn(1, 5, 7, 2)
    (from_windows(2 * to_windows(x, (2, 3)), 5, 7) * weight).sum().backward()
    assert torch.equal(x.grad, 2 * weight)


def test_windows_as_wide_as_the_map_are_not_copied():
    x = torch.zeros(2, 6, 5, 3)
    assert to_windows(x, (2, 5)).data_ptr() == x.data_ptr()
    assert from_windows(to_windows(x, (2, 5)), 6, 5).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("call", [lambda w: to_windows(torch.zeros(1, 4, 4, 1), w), lambda w: real_places(4, 4, w)])
@pytest.mark.parametrize("window", [0, (2, 0), (-1, 2)])
def test_a_window_without_places_is_refused(call, window):
    with pytest.raises(InputError, match=r"a window of -?\d x \d places is not allowed: give 1 or more"):
        call(window)
