import itertools
import math

import pytest
import torch
from torch import nn

from vitrail.errors import VitrailError
from vitrail.evaluate.sliding_window import sliding_window, window_starts, window_weights


def slow(model, images, window, overlap, blend):
    """Every place of every image: the weighted mean over the windows that cover it."""
    sides = images.shape[2:]
    full = [max(side, size) for side, size in zip(sides, window, strict=True)]
    low = [(after - side) // 2 for after, side in zip(full, sides, strict=True)]
    padded = images.new_zeros(*images.shape[:2], *full)
    padded[(..., *(slice(k, k + side) for k, side in zip(low, sides, strict=True)))] = images
    along = []
    for side, size in zip(full, window, strict=True):
        step, starts = max(1, int(size * (1 - overlap))), [0]
        while starts[-1] + size < side:
            starts.append(min(starts[-1] + step, side - size))
        along.append(starts)
    weights = torch.ones(window)
    for place in itertools.product(*map(range, window)):
        for k, size in zip(place, window, strict=True):
            if blend == "gaussian":
                weights[place] *= math.exp(-((k - (size - 1) / 2) ** 2) / (2 * (0.125 * size) ** 2))
    weights = weights.clamp(min=max(1e-3, weights.min().item()))
    above, below = 0, 0
    for starts in itertools.product(*along):
        part = (..., *(slice(k, k + size) for k, size in zip(starts, window, strict=True)))
        outputs = model(padded[part])
        sums, counts = torch.zeros(len(images), outputs.shape[1], *full), torch.zeros(full)
        sums[part], counts[part] = outputs * weights, weights
        above, below = above + sums, below + counts
    return (above / below)[(..., *(slice(k, k + side) for k, side in zip(low, sides, strict=True)))]


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
@pytest.mark.parametrize(
    ("sides", "window"), [((9, 13), (4, 6)), ((6, 5), (6, 5)), ((3, 10), (6, 5)), ((7, 5, 6), (3, 5, 4)), ((11,), (4,))]
)
def test_it_is_the_mean_of_the_windows_that_see_a_place(sides, window, overlap, blend):
    torch.manual_seed(0)
    model = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(sides)](2, 3, 3, padding=1)
    images = torch.randn(2, 2, *sides)
    found = sliding_window(model, images, window, overlap=overlap, blend=blend, batch_size=3)
    assert found.shape == (2, 3, *sides)
    torch.testing.assert_close(found, slow(model, images, window, overlap, blend).detach(), rtol=1e-5, atol=1e-6)


def test_windows_end_with_the_image_and_none_is_idle():
    assert window_starts((10,), (4,), 0.25) == [(0,), (3,), (6,)]
    assert window_starts((9,), (4,), 0.25) == [(0,), (3,), (5,)]
    assert window_starts((4, 5), (4, 4), 0.99) == [(0, 0), (0, 1)]


def test_the_corners_of_a_window_count_a_little():
    weights = window_weights((64, 64), "gaussian")
    assert weights.min() == pytest.approx(1e-3)
    assert weights.argmax() in (31 * 64 + 31, 31 * 64 + 32, 32 * 64 + 31, 32 * 64 + 32)


def test_few_windows_are_in_flight():
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            assert not torch.is_grad_enabled()
            return x.bfloat16()

    found = sliding_window(Model(), torch.rand(3, 1, 8, 8), (4, 4), overlap=0, batch_size=5)
    assert seen == [5, 5, 2]
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": (4,)}, r"images \(1, 1, 8, 8\) and window = \(4,\) do not fit"),
        ({"window": (4, 0)}, r"one side of 1 or more"),
        ({"overlap": 1.0}, r"overlap = 1.0"),
        ({"sigma": 0}, "sigma = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"blend": "median"}, "'median'.*gaussian and constant"),
        ({"model": nn.MaxPool2d(2)}, r"makes \(4, 1, 2, 2\) of windows \(4, 1, 4, 4\)"),
    ],
)
def test_what_does_not_fit_is_explained(arguments, message):
    given = {"model": nn.Identity(), "images": torch.zeros(1, 1, 8, 8), "window": (4, 4), **arguments}
    with pytest.raises(VitrailError, match=message):
        sliding_window(given.pop("model"), given.pop("images"), given.pop("window"), **given)
