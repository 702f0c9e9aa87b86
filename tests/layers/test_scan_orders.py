"""Scan orders are permutations that read a grid as they say, and what is read goes back to its place."""

import itertools

import numpy as np
import pytest
import torch

from vitrail.errors import InputError
from vitrail.layers.scan import orders

SHAPES = [(1,), (1, 1), (1, 5), (5, 1), (3, 4), (4, 3), (2, 3, 4), (3, 1, 5), (2, 3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_order_is_a_permutation_with_an_inverse(shape):
    for axes in itertools.permutations(range(len(shape))):
        window = tuple(range(2, 2 + len(shape)))
        for order in (orders.raster(shape, axes), orders.snake(shape, axes), orders.windows(shape, window, axes)):
            assert sorted(order) == list(range(np.prod(shape)))
            assert (order[orders.inverse(order)] == np.arange(len(order))).all()


def test_a_raster_reads_line_after_line():
    assert orders.raster((2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert orders.raster((2, 3), (1, 0)).tolist() == [0, 3, 1, 4, 2, 5]
    assert orders.raster((2, 2, 3), (1, 2, 0)).tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]


def test_a_snake_turns_at_the_end_of_a_line():
    assert orders.snake((3, 3)).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert orders.snake((2, 3), (1, 0)).tolist() == [0, 3, 4, 1, 2, 5]


@pytest.mark.parametrize("shape", SHAPES)
def test_neighbours_follow_each_other_in_a_snake(shape):
    for axes in itertools.permutations(range(len(shape))):
        order = orders.snake(shape, axes)
        places = np.stack(np.unravel_index(order, shape))
        assert (np.abs(np.diff(places)).sum(0) == 1).all()
        # The fastest axis is the one that moves first.
        if len(order) > 1 and shape[axes[-1]] > 1:
            assert np.diff(places)[axes[-1], 0] == 1


def test_windows_are_read_one_after_the_other():
    assert orders.windows((3, 4), (2, 2)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
    # By columns: of windows, and of the places in them.
    assert orders.windows((3, 4), (2, 3), (1, 0)).tolist() == [0, 4, 1, 5, 2, 6, 8, 9, 10, 3, 7, 11]


def test_four_directions_of_a_plane_and_six_of_a_volume():
    rows, columns, rows_back, columns_back = orders.cross((2, 3))
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert columns.tolist() == [0, 3, 1, 4, 2, 5]
    assert rows_back.tolist() == rows[::-1].tolist()
    assert columns_back.tolist() == columns[::-1].tolist()
    assert len({tuple(order) for order in orders.cross((2, 3, 4))}) == 6


def test_an_order_cannot_be_changed_by_who_gets_it():
    with pytest.raises(ValueError, match="read-only"):
        orders.raster((2, 3))[0] = 5


def test_what_is_read_and_put_back_adds_up_with_its_gradient():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    ways = orders.cross((3, 4))
    read = orders.cross_scan(x, ways)
    for step in range(12):
        for way, order in enumerate(ways):
            assert torch.equal(read[:, way, step], x[:, order[step]])
    weight = torch.randn(4, 12, 1, dtype=torch.float64)
    merged = orders.cross_merge(read * weight, ways)
    expected = torch.zeros_like(x)
    for way, order in enumerate(ways):
        for step in range(12):
            expected[:, order[step]] += x[:, order[step]] * weight[way, step]
    torch.testing.assert_close(merged, expected)
    assert torch.autograd.gradcheck(lambda x: orders.cross_merge(orders.cross_scan(x, ways) * weight, ways), (x,))
    assert torch.autograd.gradgradcheck(lambda x: orders.rearrange(x, ways[1]) ** 2, (x,))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: orders.raster(()), "has no places"),
        (lambda: orders.snake((0, 3)), "has no places"),
        (lambda: orders.raster((2, 3), (0, 0)), "must name each of the 2 axes"),
        (lambda: orders.windows((2, 3), (2,)), "give 2 sides"),
        (lambda: orders.windows((2, 3), (2, 0)), "give 2 sides"),
        (lambda: orders.rearrange(torch.zeros(1, 5, 2), orders.raster((2, 3))), "L = 6"),
    ],
)
def test_wrong_grids_are_refused(make, told):
    with pytest.raises(InputError, match=told):
        make()
