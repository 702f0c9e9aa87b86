"""Puzzles to think about, without files and without end: cumulative parity, sorting, mazes.

Darlow, Regan, Risi, Seely and Jones, "Continuous Thought Machines" (2025), arXiv 2505.05522, and the authors' code
(SakanaAI/continuous-thought-machines), whose tasks these are. Batches are ``{"image", "target"}``, as a method takes
them, and each is a function of (seed, its number): a loop that was stopped goes on with ``first_batch``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import InputError

Array = np.ndarray
Cell = tuple[int, int]
PARITY, SORTING, MAZES = range(3)
"""What a stream of random numbers is for."""
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Up, down, left, right, numbered from 0."""
WAIT = 4
"""The move after the last."""
WALL, WAY, START, END = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0)
"""Colours of a maze."""

Puzzle = Callable[[np.random.Generator], tuple[Array, Array]]


def _batches(puzzle: Puzzle, batch_size: int, key: tuple[int, int], first_batch: int) -> Iterator[dict[str, Tensor]]:
    if batch_size < 1 or first_batch < 0:
        raise InputError(
            f"batch_size = {batch_size}, first_batch = {first_batch} are not allowed: give 1 or more, and 0 or more"
        )
    return (
        dict(zip(("image", "target"), _stacked(puzzle, batch_size, np.random.default_rng([*key, number]))))
        for number in itertools.count(first_batch)
    )


def _stacked(puzzle: Puzzle, batch_size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    samples = [puzzle(rng) for _ in range(batch_size)]
    return (torch.from_numpy(np.stack(parts)) for parts in zip(*samples))


# ---- parity and sorting ----------------------------------------------------------------------------------------------


def parity_batches(bits: int, batch_size: int, *, seed: int = 0, first_batch: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield signs and, for each place, whether an odd number of those up to it are below zero.

    Args:
        bits: N, 1 or more.
        batch_size: B.
        seed: of the stream.
        first_batch: batches to skip.

    Yields:
        ``image``: float32 (B, N), -1 or 1; ``target``: int64 (B, N), 1 for odd.

    Raises:
        InputError: a number out of range.
    """
    if bits < 1:
        raise InputError(f"bits = {bits} is not allowed: give 1 or more")

    def puzzle(rng: np.random.Generator) -> tuple[Array, Array]:
        below = rng.integers(0, 2, bits)
        return (1 - 2 * below).astype(np.float32), below.cumsum() % 2

    return _batches(puzzle, batch_size, (seed, PARITY), first_batch)


def sorting_batches(
    numbers: int, batch_size: int, *, seed: int = 0, first_batch: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Yield normal numbers, and their places from the smallest to the largest.

    Args:
        numbers: N, 1 or more.
        batch_size, seed, first_batch: as ``parity_batches``.

    Yields:
        ``image``: float32 (B, N); ``target``: int64 (B, N), a permutation.

    Raises:
        InputError: a number out of range.
    """
    if numbers < 1:
        raise InputError(f"numbers = {numbers} is not allowed: give 1 or more")

    def puzzle(rng: np.random.Generator) -> tuple[Array, Array]:
        values = rng.standard_normal(numbers, np.float32)
        return values, values.argsort()

    return _batches(puzzle, batch_size, (seed, SORTING), first_batch)


# ---- mazes -----------------------------------------------------------------------------------------------------------


def draw_maze(side: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw a maze in which one way leads from any cell to any other, by a depth-first walk, and the way to be found.

    Args:
        side: S, pixels, odd and from 5: cells and the walls between them are a pixel each.
        rng: random numbers.

    Returns:
        uint8 (S, S, 3), walls black, ways white, the start red and the end green, two different cells; and the moves
        from start to end, a pixel each, numbers of ``MOVES``.

    Raises:
        InputError: a side that mazes cannot have.
    """
    if side < 5 or side % 2 == 0:
        raise InputError(f"side = {side} is not allowed for a maze: give an odd number of pixels from 5")
    cells = side // 2
    image = np.full((side, side, 3), WALL, np.uint8)
    root = (int(rng.integers(cells)), int(rng.integers(cells)))
    parents, trail = {root: root}, [root]
    image[2 * root[0] + 1, 2 * root[1] + 1] = WAY
    while trail:
        row, column = trail[-1]
        beside = [(row + down, column + right) for down, right in MOVES]
        free = [cell for cell in beside if min(cell) >= 0 and max(cell) < cells and cell not in parents]
        if not free:
            trail.pop()
            continue
        cell = free[int(rng.integers(len(free)))]
        parents[cell] = (row, column)
        trail.append(cell)
        image[row + cell[0] + 1, column + cell[1] + 1] = WAY
        image[2 * cell[0] + 1, 2 * cell[1] + 1] = WAY
    first, last = (divmod(int(place), cells) for place in rng.choice(cells * cells, 2, replace=False))
    image[2 * first[0] + 1, 2 * first[1] + 1] = START
    image[2 * last[0] + 1, 2 * last[1] + 1] = END
    cells_passed = _between(parents, first, last)
    moves = [
        MOVES.index((after[0] - before[0], after[1] - before[1])) for before, after in itertools.pairwise(cells_passed)
    ]
    return image, np.repeat(np.array(moves, np.int64), 2)


def _between(parents: dict[Cell, Cell], first: Cell, last: Cell) -> list[Cell]:
    """Return the cells of a tree from one to another, both included."""
    up, down = _to_root(parents, first), _to_root(parents, last)
    shared = set(down)
    top = next(place for place, cell in enumerate(up) if cell in shared)
    return [*up[: top + 1], *reversed(down[: down.index(up[top])])]


def _to_root(parents: dict[Cell, Cell], cell: Cell) -> list[Cell]:
    path = [cell]
    while parents[cell] != cell:
        cell = parents[cell]
        path.append(cell)
    return path


def maze_batches(
    side: int, route: int, batch_size: int, *, signed: bool = True, seed: int = 0, first_batch: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Yield mazes, and the first moves from start to end, with ``WAIT`` after the last.

    Args:
        side: as ``draw_maze``. Published: 39 and 99.
        route: P, moves that are asked for, 1 or more. Published: 50 and 100.
        batch_size, seed, first_batch: as ``parity_batches``.
        signed: pixels from -1 to 1; otherwise from 0 to 1.

    Yields:
        ``image``: float32 (B, 3, S, S); ``target``: int64 (B, P), 0 to 4 for up, down, left, right and wait.

    Raises:
        InputError: a number out of range.
    """
    if route < 1:
        raise InputError(f"route = {route} is not allowed: give 1 move or more")
    draw_maze(side, np.random.default_rng(0))  # refuse a wrong side now, not at the first batch

    def puzzle(rng: np.random.Generator) -> tuple[Array, Array]:
        image, moves = draw_maze(side, rng)
        pixels = image.transpose(2, 0, 1).astype(np.float32) / 255
        target = np.full(route, WAIT)
        target[: len(moves)] = moves[:route]
        return (2 * pixels - 1 if signed else pixels), target

    return _batches(puzzle, batch_size, (seed, MAZES), first_batch)
