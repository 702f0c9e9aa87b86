"""Fractal images for pretraining, without files and without end.

Anderson and Farrell, "Improving Fractal Pre-training" (WACV 2022), https://arxiv.org/abs/2110.03091. A class is an
iterated function system (IFS): a few contracting affine maps, sampled by their singular values (section 3.2). An image
is its attractor, drawn by the chaos game with a random brush, in random colours on a random texture; parameters, window
and orientation are jittered (section 3.3). With several fractals in an image and their classes as labels the task is
multi-instance prediction (section 4.2).

An image is a pure function of (seed, class, number), or of (seed, number) with several instances. That is where we
depart from the published code, which keeps a cache of rendered fractals and renders every second one anew: here each
is rendered, with random numbers of its own. So images need no storage, and any number of processes draws the same.

Shapes: N maps of a system, P points of an orbit, S pixels of a side.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import numpy as np
from scipy.ndimage import correlate1d

from vitrail.data.sources.base import Record
from vitrail.errors import InputError, MissingExtra, require, unknown

if TYPE_CHECKING:
    from vitrail.training.recipe import DataConfig

Array = np.ndarray
SLUG = "fractal_pretraining"
VERSION = "2"
"""Of the pixels; changes when the same address gives other images."""
CODE, IMAGE, LABELS, STREAM, STREAM_LABELS = range(5)
"""What a stream of random numbers is for."""
JITTER = (0.8, 1.1)
"""Factor on one of the maps (section 3.3)."""
ZOOM = (0.5, 2.0)
"""Side of the window, relative to the fractal's, by axis."""
SHIFT = 0.2
"""Largest displacement of the window, as a share of the fractal's extent."""
INSTANCE_SIDE = (0.15, 0.6)
"""Side of one of several fractals, as a share of the image's."""
BLUR = (0.5, 1.0)
"""Standard deviation of the blur, in pixels."""
RANGES = {
    "classes": (2, 10**6),
    "per_class": (1, 10**9),
    "instances": (1, 100),
    "size": (8, 4096),
    "points": (0, 10**8),
    "seed": (0, 2**31 - 1),
}
"""What the options may be: as much as a machine can hold of an image and its orbit, or of the names of the classes."""


# ---- iterated function systems


def sample_singular_values(count: int, factor: float, rng: np.random.Generator) -> Array:
    """Sample pairs of singular values (count, 2) with the sum over pairs of s1 + 2 s2 equal to ``factor``.

    Each pair has 1 >= s1 >= s2 >= 0. One value is drawn after the other, uniformly between the bounds that leave a
    solution to the rest (section 3.2).

    Args:
        count: number of pairs, from 1.
        factor: the sigma-factor, from 0 to 3 ``count``.
        rng: random numbers.

    Raises:
        InputError: the factor cannot be reached.
    """
    if count < 1 or not 0 <= factor <= 3 * count:
        raise InputError(
            f"sigma-factor = {factor:g} is not allowed for {count} maps: give one map or more, and 0 to {3 * count}"
        )
    values = np.empty((count, 2))
    left = factor
    for pair in range(count - 1):
        rest = 3 * (count - 1 - pair)  # the most that the pairs to come can take
        first = rng.uniform(max(0.0, (left - rest) / 3), min(1.0, left))
        second = rng.uniform(max(0.0, (left - rest - first) / 2), min(first, (left - first) / 2))
        values[pair] = first, second
        left -= first + 2 * second
    second = rng.uniform(max(0.0, (left - 1) / 2), left / 3)
    values[-1] = left - 2 * second, second
    return values


def sample_system(
    rng: np.random.Generator,
    maps: tuple[int, int] = (2, 4),
    sigma: tuple[float, float] | None = None,
    offset: float = 1.0,
) -> Array:
    """Sample an IFS code: the affine maps (N, 2, 3), each a contraction.

    Args:
        rng: random numbers.
        maps: least and largest number of maps N, from 1.
        sigma: range of the sigma-factor; by default the paper's, (5 + N) / 2 to (6 + N) / 2, in which fractals are
            neither dust nor blots.
        offset: translations are drawn from -offset to offset.

    Raises:
        InputError: numbers of maps that are none, or a sigma-factor that they cannot have.
    """
    if not 1 <= maps[0] <= maps[1]:
        raise InputError(f"maps = {maps} is not allowed: give the least and the largest number of maps, from 1")
    count = int(rng.integers(maps[0], maps[1] + 1))
    low, high = sigma or ((5 + count) / 2, (6 + count) / 2)
    # Orthogonal factors: rotations, each with random signs of its axes.
    signs = np.sign(rng.random((2 * count, 2, 1)) - 0.5) * np.eye(2)
    angle = rng.uniform(-np.pi, np.pi, 2 * count)
    rotation = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(-1, 2, 2)
    left, right = np.split(rotation @ signs, 2)
    values = sample_singular_values(count, rng.uniform(low, high), rng)
    system = np.empty((count, 2, 3))
    system[:, :, :2] = (left * values[:, None, :]) @ right
    system[:, :, 2] = rng.uniform(-offset, offset, (count, 2))
    return system


def jitter_system(system: Array, rng: np.random.Generator) -> Array:
    """Return the system with one of its maps, translation included, scaled by a factor of ``JITTER``.

    A factor that makes the map expand is drawn again, four times at most; then the system stays as it is.
    """
    for _ in range(4):
        jittered = system.copy()
        jittered[rng.integers(0, len(system))] *= rng.uniform(*JITTER)
        if np.linalg.svd(jittered[:, :, :2], compute_uv=False).max() <= 1:
            return jittered
    return system


# ---- the chaos game: each loop in two forms that give the same bits


@dataclass(frozen=True)
class _Loops:
    """The parts of rendering that are slow in Python."""

    orbit: Callable[[Array, Array, Array], Array]
    """(maps (N, 2, 3), cumulative probabilities (N,), uniforms (P,)) -> points (2, P)."""
    count: Callable[[Array, float, float, float, float, int], Array]
    """(points (2, P), least x and y seen, pixels per unit in x and y, S) -> points per pixel (S + 2, S + 2)."""
    rgb: Callable[[Array, Array, Array], Array]
    """(hue, saturation, value: uint8 (n,) each) -> uint8 (n, 3)."""


def _orbit(system: Array, cumulative: Array, uniforms: Array) -> Array:
    """Start at the fixed point of the first map, which lies in the attractor, and apply random maps."""
    last = len(cumulative) - 1
    points = np.empty((2, len(uniforms)))
    a, b, e = system[0, 0, 0], system[0, 0, 1], system[0, 0, 2]
    c, d, f = system[0, 1, 0], system[0, 1, 1], system[0, 1, 2]
    scale = 1 / (1 + (a * d - b * c) - a - d)
    x, y = scale * ((1 - d) * e + b * f), scale * ((1 - a) * f + c * e)
    for place in range(len(uniforms)):
        k = 0
        while k < last and uniforms[place] >= cumulative[k]:
            k += 1
        before = x
        x = system[k, 0, 0] * x + system[k, 0, 1] * y + system[k, 0, 2]
        y = system[k, 1, 0] * before + system[k, 1, 1] * y + system[k, 1, 2]
        points[0, place] = x
        points[1, place] = y
    return points


def _count(points: Array, x: float, y: float, x_scale: float, y_scale: float, side: int) -> Array:
    """Count points per pixel, with a margin of one pixel for a brush to reach in from outside."""
    counts = np.zeros((side + 2, side + 2), np.int32)
    for place in range(points.shape[1]):
        row = int((points[0, place] - x) * x_scale)
        column = int((points[1, place] - y) * y_scale)
        if -1 <= row <= side and -1 <= column <= side:
            counts[row + 1, column + 1] += 1
    return counts


def _rgb(hue: Array, saturation: Array, value: Array) -> Array:
    """Convert colours; the hue wheel has 180 steps, so that 180 to 255 go round again.

    That is the convention of the image library behind the published code, which fills all 256 steps.
    """
    colours = np.empty((len(hue), 3), np.uint8)
    for place in range(len(hue)):
        sector = hue[place] // 30
        part = hue[place] / 30.0 - sector
        s, v = saturation[place] / 255.0, float(value[place])
        low, falling, rising = v * (1 - s), v * (1 - s * part), v * (1 - s * (1 - part))
        which = sector % 6
        if which == 0:
            red, green, blue = v, rising, low
        elif which == 1:
            red, green, blue = falling, v, low
        elif which == 2:
            red, green, blue = low, v, rising
        elif which == 3:
            red, green, blue = low, falling, v
        elif which == 4:
            red, green, blue = rising, low, v
        else:
            red, green, blue = v, low, falling
        colours[place, 0], colours[place, 1], colours[place, 2] = np.rint(red), np.rint(green), np.rint(blue)
    return colours


def _numpy_orbit(system: Array, cumulative: Array, uniforms: Array) -> Array:
    a, b, e, c, d, f = system[0].ravel().tolist()
    scale = 1 / (1 + (a * d - b * c) - a - d)
    x, y = scale * ((1 - d) * e + b * f), scale * ((1 - a) * f + c * e)
    maps = system.reshape(-1, 6).tolist()
    points = []
    for k in np.searchsorted(cumulative[:-1], uniforms, "right").tolist():
        a, b, e, c, d, f = maps[k]
        x, y = a * x + b * y + e, c * x + d * y + f
        points.append((x, y))
    return np.array(points, float).reshape(-1, 2).T


def _numpy_count(points: Array, x: float, y: float, x_scale: float, y_scale: float, side: int) -> Array:
    row, column = ((points[0] - x) * x_scale).astype(np.int64), ((points[1] - y) * y_scale).astype(np.int64)
    inside = (row >= -1) & (row <= side) & (column >= -1) & (column <= side)
    row, column = row[inside] + 1, column[inside] + 1
    flat = np.bincount(row * (side + 2) + column, minlength=(side + 2) ** 2)
    return flat.reshape(side + 2, side + 2).astype(np.int32)


def _numpy_rgb(hue: Array, saturation: Array, value: Array) -> Array:
    sector = hue // 30
    part = hue / 30.0 - sector
    s, v = saturation / 255.0, value.astype(float)
    low, falling, rising = v * (1 - s), v * (1 - s * part), v * (1 - s * (1 - part))
    which = sector % 6
    red = np.choose(which, [v, falling, low, low, rising, v])
    green = np.choose(which, [rising, v, v, falling, low, low])
    blue = np.choose(which, [low, low, rising, v, v, falling])
    return np.rint(np.stack([red, green, blue], -1)).astype(np.uint8)


NUMPY = _Loops(_numpy_orbit, _numpy_count, _numpy_rgb)


@cache
def compiled() -> _Loops:
    """Return the loops compiled by numba; the machine code is kept beside this file.

    Raises:
        MissingExtra: numba is not installed.
    """
    # Without Python's lock, so that threads render side by side.
    jit = require("numba", "fast").njit(cache=True, nogil=True)
    return _Loops(jit(_orbit), jit(_count), jit(_rgb))


@cache
def _loops() -> _Loops:
    try:
        return compiled()
    except MissingExtra as error:
        warnings.warn(f"fractals are rendered some ten times slower, with the same pixels: {error}", stacklevel=2)
        return NUMPY


def chaos_game(system: Array, points: int, rng: np.random.Generator, loops: _Loops | None = None) -> Array:
    """Return points (2, P) of the attractor; a map is chosen with a probability proportional to its determinant.

    Args:
        system: affine maps (N, 2, 3), contractions.
        points: their number P.
        rng: random numbers.
        loops: ``compiled()`` or ``NUMPY``; by default the first that can be had.
    """
    weight = np.abs(system[:, 0, 0] * system[:, 1, 1] - system[:, 0, 1] * system[:, 1, 0])
    total = weight.sum()
    # Maps to a line have no area; the paper's factor makes that an event of measure zero.
    cumulative = np.cumsum(weight / total if total > 0 else np.full(len(system), 1 / len(system)))
    return (loops or _loops()).orbit(system, cumulative, rng.random(points))


def draw(points: Array, side: int, window: tuple[Array, Array], brush: Array, loops: _Loops | None = None) -> Array:
    """Return an image (S, S), 0 to 1: how often each pixel was painted, relative to the most painted one.

    Args:
        points: (2, P); the first coordinate runs down the image.
        side: S, pixels.
        window: the least and the largest corner of what is seen, (2,) each.
        brush: (3, 3) of booleans: the pixels around its own that a point paints.
        loops: as in ``chaos_game``.
    """
    low, extent = window[0], window[1] - window[0]
    x_scale, y_scale = (side - 1) / np.where(extent > 0, extent, 1.0)
    counts = (loops or _loops()).count(points, low[0], low[1], x_scale, y_scale, side)
    painted = np.zeros((side, side), np.int32)
    for row, column in np.argwhere(brush):
        # A brush pixel one below its point shows the count of the point one above.
        painted += counts[2 - row : 2 - row + side, 2 - column : 2 - column + side]
    return painted / max(int(painted.max()), 1)


# ---- colour


def colourise(densities: Array, rng: np.random.Generator, loops: _Loops | None = None) -> Array:
    """Return colours, uint8 (..., 3), for densities from 0 to 1: hues from a random one on, 255 steps of the wheel on.

    Saturation and value are random, and the same everywhere.
    """
    start, saturation, value = rng.random() * 255, rng.uniform(0.3, 1) * 255, rng.uniform(0.5, 1) * 255
    hues = (densities * 255 + start).astype(np.int64) & 255
    all_hues = np.arange(256, dtype=np.uint8)
    flat = (np.full(256, channel, np.uint8) for channel in (saturation, value))
    return (loops or _loops()).rgb(all_hues, *flat)[hues]


def diamond_square(levels: int, decay: float, rng: np.random.Generator) -> Array:
    """Return a random surface (2^levels + 1, 2^levels + 1) by midpoint displacement, from random corners in [0, 1].

    A step moves the midpoint of a diamond or a square off the mean of its four neighbours by up to
    ``exp(-decay * step) / 2``. Beyond the border the surface repeats.
    """
    side = 2**levels + 1
    surface = np.zeros((side, side))
    surface[:: side - 1, :: side - 1] = rng.random((2, 2))
    for step in range(levels):
        half = (side - 1) >> (step + 1)
        most = 0.5 * math.exp(-decay * step)

        def place(*neighbours: Array, most: float = most) -> Array:
            mean = sum(neighbours[1:], neighbours[0]) / 4
            return mean + rng.uniform(-most, most, mean.shape)

        corners = surface[:: 2 * half, :: 2 * half]
        centres = place(corners[:-1, :-1], corners[:-1, 1:], corners[1:, :-1], corners[1:, 1:])
        surface[half :: 2 * half, half :: 2 * half] = centres
        # Midpoints of the sides: in the rows of corners, then in those of centres.
        around = np.concatenate([centres[-1:], centres, centres[:1]])
        surface[:: 2 * half, half :: 2 * half] = place(around[:-1], around[1:], corners[:, :-1], corners[:, 1:])
        around = np.concatenate([centres[:, -1:], centres, centres[:, :1]], 1)
        surface[half :: 2 * half, :: 2 * half] = place(corners[:-1], corners[1:], around[:, :-1], around[:, 1:])
    return surface


def background(side: int, rng: np.random.Generator, loops: _Loops | None = None) -> Array:
    """Return a random coloured texture, uint8 (S, S, 3)."""
    surface = diamond_square(max(1, math.ceil(math.log2(side))), rng.uniform(0.4, 0.8), rng)[:side, :side]
    scale = np.array([rng.uniform(0.25, 1), rng.uniform(0.1, 0.3), rng.uniform(0.3, 0.6)]) * 255
    shift = np.array([rng.random(), rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)]) * 255
    flat = surface.ravel()
    hue = ((flat * scale[0] + shift[0]).astype(np.int64) & 255).astype(np.uint8)
    saturation, value = (np.clip(flat * scale[i] + shift[i], 0, 255).astype(np.uint8) for i in (1, 2))
    return (loops or _loops()).rgb(hue, saturation, value).reshape(side, side, 3)


def blur(image: Array, sigma: float) -> Array:
    """Return a uint8 image (H, W, 3) after a Gaussian of 3 x 3 taps, mirrored at its border."""
    side = math.exp(-0.5 / sigma**2)
    taps = np.array([side, 1, side]) / (1 + 2 * side)
    smooth = correlate1d(correlate1d(image.astype(np.float32), taps, 0, mode="mirror"), taps, 1, mode="mirror")
    return np.rint(smooth).astype(np.uint8)


def resize(image: Array, side: int) -> Array:
    """Return a uint8 image (S', S', 3) by bilinear interpolation between pixel centres, without smoothing first."""
    for axis in (0, 1):
        length = image.shape[axis]
        at = np.clip((np.arange(side) + 0.5) * (length / side) - 0.5, 0, length - 1)
        low = np.minimum(at.astype(np.int64), max(length - 2, 0))
        part = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        first, second = image.take(low, axis), image.take(np.minimum(low + 1, length - 1), axis)
        image = first * (1 - part) + second * part
    return np.rint(image).astype(np.uint8)


# ---- images


@dataclass(frozen=True)
class Fractals:
    """What is rendered; every field is an option of a source's address.

    Attributes:
        classes: IFS codes, from 2.
        per_class: images of each class in a source; with several instances ``classes * per_class`` in all.
        instances: fractals in an image at most; 1 is multi-class prediction, more (the paper takes 5) multi-instance
            prediction with a label for each class seen.
        size: side in pixels, from 8.
        points: of an orbit; 0 takes 100,000 at the paper's 224 pixels and in proportion to the area at others.
        colour: paint in colours; else in grey, without shades.
        background: on a random texture; else on black.
        jitter: vary the maps; by default, as published, where there is one instance.
        seed: of codes and images.
    """

    classes: int = 1000
    per_class: int = 100
    instances: int = 1
    size: int = 224
    points: int = 0
    colour: bool = True
    background: bool = True
    jitter: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not (isinstance(value, (int, np.integer)) and least <= value <= most):
                raise InputError(
                    f"{SLUG}: {name} = {value!r} is not allowed: give a whole number from {least} to {most}"
                )

    def __len__(self) -> int:
        """Return the number of images of a source."""
        return self.classes * self.per_class

    def system(self, number: int) -> Array:
        """Return the IFS code of a class: (N, 2, 3)."""
        if not 0 <= number < self.classes:
            raise InputError(f"{SLUG}: there is no class {number}: give a number from 0 to {self.classes - 1}")
        return sample_system(np.random.default_rng([self.seed, CODE, number]))

    def labels(self, number: int) -> tuple[int, ...]:
        """Return the classes of the fractals in image ``number`` of a source, in the order in which they are painted.

        With one instance the images of a class follow each other.

        Raises:
            InputError: there is no such image.
        """
        if not 0 <= number < len(self):
            raise InputError(f"{SLUG}: there is no image {number}: give a number from 0 to {len(self) - 1}")
        if self.instances == 1:
            return (number // self.per_class,)
        return self._draw_labels([self.seed, LABELS, number])

    def image(self, number: int, loops: _Loops | None = None) -> Array:
        """Return image ``number`` of a source: uint8 (S, S, 3)."""
        labels = self.labels(number)
        if self.instances == 1:
            return self.render(labels, [self.seed, IMAGE, labels[0], number % self.per_class], loops)
        return self.render(labels, [self.seed, IMAGE, number], loops)

    def sample(self, number: int, loops: _Loops | None = None) -> tuple[Array, tuple[int, ...]]:
        """Return image ``number``, from 0, of an endless stream, with random classes; it is none of a source's."""
        if number < 0:
            raise InputError(f"{SLUG}: there is no image {number} in the stream: give a number from 0")
        labels = self._draw_labels([self.seed, STREAM_LABELS, number])
        return self.render(labels, [self.seed, STREAM, number], loops), labels

    def _draw_labels(self, key: list[int]) -> tuple[int, ...]:
        rng = np.random.default_rng(key)
        count = rng.integers(1, self.instances + 1)
        return tuple(rng.integers(0, self.classes, count).tolist())

    def render(self, labels: tuple[int, ...], key: list[int], loops: _Loops | None = None) -> Array:
        """Render the fractals of these classes into one image, uint8 (S, S, 3), with random numbers from ``key``."""
        rng = np.random.default_rng(key)
        shape = (self.size, self.size, 3)
        image = background(self.size, rng, loops) if self.background else np.zeros(shape, np.uint8)
        for label in labels:
            if self.instances == 1:
                drawing = self._draw(label, self.size, rng, loops, move=True)
                seen = np.greater(drawing, 0)
                image[seen] = self._colours(drawing[seen], rng, loops)
            else:
                # As published: drawn at half of the image's size and coloured, then brought to that of the instance.
                drawing = self._draw(label, self.size // 2, rng, loops, move=False)
                colours = self._colours(drawing, rng, loops)
                colours[drawing == 0] = 0
                side = max(int(rng.uniform(*INSTANCE_SIDE) * self.size), 1)
                row, column = rng.integers(-(side // 2), self.size - side // 2, 2)
                top, left = max(row, 0), max(column, 0)
                front = resize(colours, side)[top - row : self.size - row, left - column : self.size - column]
                seen = np.any(front, -1)
                image[top : top + front.shape[0], left : left + front.shape[1]][seen] = front[seen]
        return blur(image, rng.uniform(*BLUR)) if rng.random() < 0.5 else image

    def _draw(self, label: int, side: int, rng: np.random.Generator, loops: _Loops | None, *, move: bool) -> Array:
        """Draw one fractal, (side, side) of densities from 0 to 1; ``move`` varies the window that is seen."""
        system = self.system(label)
        if self.jitter if self.jitter is not None else self.instances == 1:
            system = jitter_system(system, rng)
        # In proportion to the area, so that a fractal is as dense at any size; the published code takes 100,000.
        count = self.points or max(round(100_000 * (self.size / 224) ** 2), 1000)
        points = chaos_game(system, count, rng, loops)
        low, high = points.min(1), points.max(1)
        if move:
            extent = high - low
            centre = (high + low) / 2 + extent * rng.uniform(-SHIFT, SHIFT, 2)
            extent = extent * rng.uniform(*ZOOM, 2) / 2
            low, high = centre - extent, centre + extent
        drawing = draw(points, side, (low, high), rng.random((3, 3)) < 0.5, loops)
        transpose, *flips = rng.random(3) < 0.5
        if transpose:
            drawing = drawing.T
        return drawing[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]

    def _colours(self, densities: Array, rng: np.random.Generator, loops: _Loops | None) -> Array:
        """Return what densities are painted with, uint8 (..., 3)."""
        return colourise(densities, rng, loops) if self.colour else np.full((*densities.shape, 3), 127, np.uint8)


class FractalSource:
    """The images of an address ``fractal_pretraining://classes=1000&per_class=100``, rendered when they are read.

    Args:
        address: options of ``Fractals`` by name, joined by ``&``; what is left out has its default.
        config: not needed: an address says all.

    Raises:
        InputError: an option that does not exist, or a value it cannot have.
    """

    kind = "fractals"

    def __init__(self, address: str, config: DataConfig | None = None) -> None:
        self.fractals = parse_address(address)
        given = ((name, value) for name, value in asdict(self.fractals).items() if value is not None)
        self.uri = f"{SLUG}://" + "&".join(f"{name}={int(value)}" for name, value in given)
        self.multilabel = self.fractals.instances > 1

    def records(self) -> Iterator[Record]:
        """Yield all images; nothing is rendered."""
        width = len(str(self.fractals.classes - 1))
        names = [f"{number:0{width}d}" for number in range(self.fractals.classes)]
        for number in range(len(self.fractals)):
            labels = tuple(names[label] for label in sorted(set(self.fractals.labels(number))))
            yield Record(f"fractals/{number:0{len(str(len(self.fractals)))}d}", str(number), labels)

    def read(self, locator: str) -> Array:
        """Render the image: uint8 (S, S, 3)."""
        return self.fractals.image(int(locator))

    def stamp(self, locator: str) -> str:
        """Return the renderer's version: all else that an image depends on is in the address."""
        return f"fractals-{VERSION}"


def parse_address(address: str) -> Fractals:
    """Return the options of an address."""
    kinds = {entry.name: entry for entry in fields(Fractals)}
    values: dict[str, Any] = {}
    for name, text in parse_qsl(address.partition("://")[2], keep_blank_values=True):
        if name not in kinds:
            raise unknown(f"option of {SLUG}", name, kinds)
        switch = "bool" in str(kinds[name].type)
        if not text.isdigit() or (switch and text not in "01"):
            raise InputError(
                f"{SLUG}: {name} = {text!r} is not allowed: give {'0 or 1' if switch else 'a whole number'}"
            )
        values[name] = bool(int(text)) if switch else int(text)
    return Fractals(**values)


def fractal_batches(
    fractals: Fractals, batch_size: int, *, first_batch: int = 0, rank: int = 0, world: int = 1
) -> Iterator[dict[str, Array]]:
    """Yield batches of ever new images for a pretraining loop.

    A batch is ``{"image": uint8 (B, 3, S, S), "target": int64 (B,), or float32 (B, C) with several instances}`` and a
    function of (options, its number). So a run that was stopped goes on with ``first_batch``.

    Args:
        fractals: what is rendered; ``per_class`` has no meaning here.
        batch_size: B, images of one process.
        first_batch: batches of this process to skip.
        rank, world: this process and their number: process r takes batches r, r + world, r + 2 world ...

    Raises:
        InputError: for arguments out of their range.
    """
    if batch_size < 1 or first_batch < 0 or not 0 <= rank < world:
        raise InputError(
            f"batch_size = {batch_size}, first_batch = {first_batch}, rank = {rank}, world = {world} are not allowed: "
            "give batch_size from 1, first_batch from 0, and a rank from 0 below world"
        )
    return _batches(fractals, batch_size, first_batch * world + rank, world)


def _batches(fractals: Fractals, batch_size: int, number: int, step: int) -> Iterator[dict[str, Array]]:
    while True:
        samples = [fractals.sample(number * batch_size + place) for place in range(batch_size)]
        images = np.stack([image for image, _ in samples]).transpose(0, 3, 1, 2)
        if fractals.instances == 1:
            target = np.array([labels[0] for _, labels in samples], np.int64)
        else:
            target = np.zeros((batch_size, fractals.classes), np.float32)
            for row, (_, labels) in enumerate(samples):
                target[row, list(labels)] = 1
        yield {"image": np.ascontiguousarray(images), "target": target}
        number += step
