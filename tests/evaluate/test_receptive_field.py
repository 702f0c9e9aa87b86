import numpy as np
import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.evaluate.receptive_field import contributions, field_plot, run, square_with


class Stack(nn.Module):
    """Convolutions of ones, so that what a pixel adds can be counted."""

    def __init__(self, side, depth=1):
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(1, 1, side, padding=side // 2, bias=False) for _ in range(depth)))
        for conv in self.body:
            nn.init.ones_(conv.weight)

    def forward_features(self, x):
        return self.body(x)


def batches(*sizes, channels=1):
    return lambda: ((torch.full((count, channels, side, side), 0.5), torch.zeros(count)) for count, side in sizes)


def test_contributions_count_the_ways_from_a_pixel_to_the_middle():
    field = contributions(Stack(3, depth=2).eval(), torch.ones(2, 1, 9, 9))
    row = torch.tensor([0, 0, 1, 2, 3, 2, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(field, 2 * row[:, None] * row)


def test_only_what_raises_the_features_counts():
    net = Stack(3)
    with torch.no_grad():
        net.body[0].weight[0, 0, 0] = -1.0
    field = contributions(net.eval(), torch.ones(1, 1, 5, 5))
    assert field[1].sum() == 0 and field[2, 1:4].tolist() == [1, 1, 1]
    assert contributions(net, -torch.ones(1, 1, 5, 5)).sum() == 0


def test_squares_hold_their_share():
    field = np.zeros((7, 7))
    field[3, 3], field[2, 3], field[0, 0] = 5, 3, 2
    assert [square_with(field, share) for share in (0.2, 0.5, 0.51, 0.8, 0.81, 1.0)] == [1, 1, 3, 3, 7, 7]
    wide = np.ones((3, 9))
    assert square_with(wide, 0.3) == 3
    assert square_with(wide, 1.0) == 9


def test_a_larger_kernel_sees_a_larger_area():
    areas = {}
    for side in (3, 9):
        model = Stack(side).train()
        result = run(model, batches((2, 21), (1, 21)), thresholds=(0.5, 0.99))
        assert model.training
        assert [row["share"] for row in result.table] == [0.5, 0.99]
        assert result.table[1]["side"] == side
        assert result.table[1]["area"] == pytest.approx(side**2 / 441)
        assert "3 images of 21 x 21" in result.notes[0]
        areas[side] = result.table[0]["area"]
    assert areas[9] > areas[3]
    assert run(Stack(3), batches((1, 8)), side=21).table[-1]["area"] == pytest.approx(9 / 441)


def test_parameters_get_no_gradients():
    model = Stack(3)
    with torch.no_grad():
        run(model, batches((1, 8)))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert field_plot(np.zeros((4, 4))) == ""


class Flat(Stack):
    def forward_features(self, x):
        return x.flatten(1)


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (Flat(3), batches((1, 8)), {}, r"Flat has no features \(B, C, h, w\)"),
        (nn.Conv2d(1, 1, 3), batches((1, 8)), {}, "Conv2d has no features"),
        (Stack(3), batches(), {}, "got no images"),
        (Stack(3), batches((1, 8)), {"thresholds": (0.5, 1.2)}, r"\(0.5, 1.2\) are not allowed.*\(0, 1\]"),
        (Stack(3), batches((1, 8)), {"thresholds": ()}, "thresholds"),
    ],
)
def test_what_cannot_be_measured_is_explained(model, data, options, message):
    with pytest.raises(InputError, match=message):
        run(model, data, **options)
