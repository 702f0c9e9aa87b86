"""Pictures of shapes with their masks and boxes, without files and without end: dense tasks to learn in seconds.

Discs, squares and triangles, turned, scaled and coloured at random, lie apart on a random texture of greys. Colour
tells that there is a shape, and its outline alone which. A scene is a pure function of (seed, number).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import InputError

Array = np.ndarray
NAMES = ("background", "disc", "square", "triangle")
"""Of the classes, by their number."""
CORNERS = {"square": 4, "triangle": 3}
RADIUS = (0.18, 0.3)
"""Of the circle around a shape, as a share of the image's shorter side."""
TRIES = 20
"""To find a place for a shape that is apart from the others; then it is left out."""


@dataclass(frozen=True)
class Scene:
    """An image with what is in it.

    Attributes:
        image: uint8 (H, W, 3).
        mask: class of each pixel, uint8 (H, W).
        boxes: (N, 4), float32: left, top, right and bottom edge, in pixels.
        labels: class of each box, int64 (N,), from 1.
    """

    image: Array
    mask: Array
    boxes: Array
    labels: Array


def scene(number: int, seed: int = 0, size: tuple[int, int] = (64, 64), most: int = 3) -> Scene:
    """Draw a scene.

    Args:
        number: of the scene, from 0.
        seed: of all scenes, from 0.
        size: height and width in pixels, from 16.
        most: shapes in it: 1 to as many, fewer where there is no place.

    Raises:
        InputError: a size or a number that is not allowed.
    """
    if min(size) < 16 or most < 1 or number < 0 or seed < 0:
        raise InputError(
            f"size = {size}, most = {most}, number = {number}, seed = {seed} are not allowed together: give 16 pixels "
            "or more, one shape or more, and numbers from 0"
        )
    rng = np.random.default_rng((seed, number))
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32) + np.float32(0.5)
    image = _texture(rows / min(size), columns / min(size), rng)
    mask = np.zeros(size, np.uint8)
    boxes, labels = [], []
    circles: list[tuple[float, float, float]] = []
    for _ in range(rng.integers(1, most + 1)):
        radius = rng.uniform(*RADIUS) * min(size)
        circle = _place(radius, circles, size, rng)
        if circle is None:
            break
        circles.append(circle)
        label = int(rng.integers(1, len(NAMES)))
        inside = _inside(NAMES[label], rows - circle[0], columns - circle[1], radius, rng.uniform(0, 2 * np.pi))
        image[inside] = rng.permutation((0.0, rng.uniform(0, 255), 255.0)) + _noise((int(inside.sum()), 3), rng)
        mask[inside] = label
        tall, wide = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        boxes.append((wide[0], tall[0], wide[-1] + 1, tall[-1] + 1))
        labels.append(label)
    pixels = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return Scene(pixels, mask, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64))


def batches(
    batch_size: int, seed: int = 0, size: tuple[int, int] = (64, 64), most: int = 3, first: int = 0
) -> Iterator[tuple[Tensor, Tensor, list[dict[str, Tensor]]]]:
    """Yield batches without end, no scene twice.

    Args:
        batch_size: B.
        seed, size, most: as for ``scene``.
        first: number of the first scene.

    Yields:
        Images (B, 3, H, W) from -1 to 1; masks (B, H, W), int64; and for each image its ``boxes`` and ``labels``, as
        torchvision's detectors take them.
    """
    for start in count(first, batch_size):
        scenes = [scene(number, seed, size, most) for number in range(start, start + batch_size)]
        images = torch.from_numpy(np.stack([one.image for one in scenes])).permute(0, 3, 1, 2).contiguous()
        masks = torch.from_numpy(np.stack([one.mask for one in scenes])).long()
        targets = [{"boxes": torch.from_numpy(one.boxes), "labels": torch.from_numpy(one.labels)} for one in scenes]
        yield images.float() / 127.5 - 1, masks, targets


def _texture(rows: Array, columns: Array, rng: np.random.Generator) -> Array:
    """Return a mixture of two greys (H, W, 3), which three random waves make."""
    waves = np.zeros_like(rows)
    for _ in range(3):
        down, across = rng.normal(0, 12, 2)
        waves += np.sin(down * rows + across * columns + rng.uniform(0, 2 * np.pi))
    share = (0.5 + waves / 6)[..., None]
    one, other = rng.uniform(0, 256, 2)
    return share * one + (1 - share) * other + _noise((*rows.shape, 3), rng)


def _noise(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return 8 * rng.standard_normal(shape, np.float32)


def _place(
    radius: float, others: list[tuple[float, float, float]], size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, float, float] | None:
    """Return row and column of a centre, and the radius, of a circle inside the image and apart from the others."""
    for _ in range(TRIES):
        row, column = rng.uniform(radius, np.array(size) - radius)
        if all(np.hypot(row - y, column - x) > radius + r + 1 for y, x, r in others):
            return float(row), float(column), radius
    return None


def _inside(name: str, rows: Array, columns: Array, radius: float, turn: float) -> Array:
    """Return which places, given from the centre, belong to the shape; its corners are on the circle."""
    if name == "disc":
        return np.hypot(rows, columns) <= radius
    corners = CORNERS[name]
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    depth = np.cos(angles)[:, None, None] * rows + np.sin(angles)[:, None, None] * columns
    return depth.max(0) <= radius * np.cos(np.pi / corners)
