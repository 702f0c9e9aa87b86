import itertools

import numpy as np
import pytest
import torch

from vitrail.data.synthetic.puzzles import (
    END,
    MOVES,
    START,
    WAIT,
    WALL,
    draw_maze,
    maze_batches,
    parity_batches,
    sorting_batches,
)
from vitrail.errors import InputError


def test_parity_counts_the_signs_below_zero():
    batch = next(parity_batches(13, 6))
    assert batch["image"].dtype == torch.float32
    assert batch["target"].dtype == torch.int64
    assert batch["image"].shape == batch["target"].shape == (6, 13)
    assert set(batch["image"].flatten().tolist()) == {-1.0, 1.0}
    for signs, target in zip(batch["image"].tolist(), batch["target"].tolist()):
        below = 0
        for sign, odd in zip(signs, target):
            below += sign < 0
            assert odd == below % 2


def test_sorting_gives_places_from_the_smallest_on():
    batch = next(sorting_batches(9, 5))
    assert batch["image"].dtype == torch.float32
    assert batch["target"].dtype == torch.int64
    for values, places in zip(batch["image"].tolist(), batch["target"].tolist()):
        assert [values[place] for place in places] == sorted(values)
    values = torch.cat([batch["image"].flatten() for batch in itertools.islice(sorting_batches(30, 40), 2)])
    assert float(values.mean()) == pytest.approx(0, abs=0.1)
    assert float(values.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("side", [5, 7, 15, 39])
def test_a_maze_has_one_way_and_the_moves_follow_it(side):
    image, moves = draw_maze(side, np.random.default_rng(side))
    assert image.shape == (side, side, 3)
    assert image.dtype == np.uint8
    ways = (image != WALL).any(-1)
    cells = (side // 2) ** 2
    assert ways[1::2, 1::2].all()
    assert not ways[::2, ::2].any()
    # A tree: as many openings as cells, less one, and every cell is reached from the start.
    assert ways.sum() == 2 * cells - 1
    (start,), (end,) = (np.argwhere((image == colour).all(-1)).tolist() for colour in (START, END))
    reached, front = {tuple(start)}, [tuple(start)]
    for row, column in front:
        for down, right in MOVES:
            place = (row + down, column + right)
            if ways[place] and place not in reached:
                reached.add(place)
                front.append(place)
    assert len(reached) == ways.sum()
    place, seen = start, [tuple(start)]
    for move in moves:
        place = [place[0] + MOVES[move][0], place[1] + MOVES[move][1]]
        assert ways[tuple(place)]
        seen.append(tuple(place))
    assert place == end
    assert len(set(seen)) == len(seen)


def test_moves_are_numbered_as_published():
    assert MOVES == ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right; 4 waits
    assert WAIT == 4


def test_routes_are_cut_or_wait():
    image, moves = draw_maze(9, np.random.default_rng([3, 2, 0]))  # the first maze of seed 3
    for length in (1, 3, 40):
        for signed in (True, False):
            batch = next(maze_batches(9, length, 1, signed=signed, seed=3))
            expected = [*moves[:length].tolist(), *[4] * max(length - len(moves), 0)]
            assert batch["target"].tolist() == [expected]
            pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
            torch.testing.assert_close(batch["image"][0], 2 * pixels - 1 if signed else pixels)
            assert batch["target"].dtype == torch.int64


def test_mazes_differ_and_their_ends_lie_anywhere():
    batch = next(maze_batches(7, 12, 60))
    assert len({tuple(image.flatten().tolist()) for image in batch["image"]}) == 60
    assert len({tuple(route) for route in batch["target"].tolist()}) > 30
    starts = {tuple(np.argwhere((image.numpy() == [[[1]], [[-1]], [[-1]]]).all(0))[0]) for image in batch["image"]}
    assert len(starts) == 9


@pytest.mark.parametrize(
    "stream",
    [
        lambda **k: parity_batches(5, 2, **k),
        lambda **k: sorting_batches(5, 2, **k),
        lambda **k: maze_batches(5, 4, 2, **k),
    ],
)
def test_a_stream_goes_on_where_it_was_stopped_and_seeds_differ(stream):
    first, second, third = itertools.islice(stream(), 3)
    again = next(stream(first_batch=2))
    assert all(torch.equal(third[name], again[name]) for name in third)
    assert not torch.equal(first["image"], second["image"])
    assert not torch.equal(first["image"], next(stream(seed=1))["image"])


@pytest.mark.parametrize(
    ("open_stream", "message"),
    [
        (lambda: parity_batches(0, 2), "bits = 0 .*1 or more"),
        (lambda: sorting_batches(0, 2), "numbers = 0 .*1 or more"),
        (lambda: maze_batches(8, 4, 2), "side = 8 .*odd number"),
        (lambda: maze_batches(3, 4, 2), "side = 3 .*from 5"),
        (lambda: maze_batches(9, 0, 2), "route = 0 .*1 move"),
        (lambda: parity_batches(4, 0), "batch_size = 0"),
        (lambda: sorting_batches(4, 1, first_batch=-1), "first_batch = -1"),
    ],
)
def test_numbers_out_of_range_are_explained(open_stream, message):
    with pytest.raises(InputError, match=message):
        open_stream()
