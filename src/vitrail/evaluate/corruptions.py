"""Common corruptions: how accuracy holds when images are noisy, blurred, snowed on or badly compressed.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019). Kinds
and strengths are those of ImageNet-C and CIFAR-C; images with a shorter side below 85 pixels (the geometric mean of 32
and 224) take CIFAR-C's strengths, and lengths in pixels scale with the image from 32 or 224. Figures are comparable
among models measured here, not with the published benchmarks, because of what departs from them:

* frost overlays a generated texture of ice, where the original has six photographs;
* blurs reflect at the border; the elastic transform resamples once where the original does twice;
* the 8-bit images that ImageNet-C stores as JPEG of quality 85 are not compressed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import scipy.fft
from PIL import Image
from scipy.ndimage import map_coordinates

from vitrail.errors import InputError, unknown

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
"""(pixels uint8 (H, W, 3), severity 1 to 5, random numbers) -> pixels uint8 (H, W, 3)."""

_SMALL = 85
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def gaussian_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Add normal noise."""
    scale, _ = _strength(image, severity, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))
    return _pixels(_unit(image) + np.float32(scale) * rng.standard_normal(image.shape, dtype=np.float32))


def shot_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Count photons: Poisson noise."""
    photons, _ = _strength(image, severity, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3))
    return _pixels(rng.poisson(_unit(image) * photons).astype(np.float32) / photons)


def impulse_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Set a share of the values to black or white."""
    share, _ = _strength(image, severity, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))
    draw = rng.random(image.shape, dtype=np.float32)
    result = image.copy()
    result[draw < share] = 255
    result[draw < share / 2] = 0
    return result


def defocus_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Blur with a disk."""
    (radius, alias), scale = _strength(
        image,
        severity,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    )
    radius *= scale
    reach = int(radius) + 2
    axis = np.arange(-reach, reach + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float32)
    # The edge of the disk is softened by a small Gaussian, which at CIFAR-C's radii is most of the blur.
    soft = np.exp(-np.square(np.arange(-2, 3) if radius > 8 else np.arange(-1, 2)) / (2 * alias**2))
    soft /= soft.sum()
    kernel = np.apply_along_axis(np.convolve, 0, np.apply_along_axis(np.convolve, 1, disk, soft, "same"), soft, "same")
    return _pixels(_convolve(_unit(image), kernel / kernel.sum()))


def glass_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Blur, let every pixel take the value of a near one, blur.

    The paper swaps neighbours; the published code writes through views of one array and so copies them, as done here.
    """
    (sigma, reach, rounds), scale = _strength(
        image,
        severity,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    )
    reach = max(1, round(reach * scale))
    values = _gaussian(_unit(image), sigma * scale)
    height, width = image.shape[:2]
    for _ in range(rounds):
        step = rng.integers(-reach, reach, (2, height, width))
        y = np.clip(np.arange(height)[:, None] + step[0], 0, height - 1)
        x = np.clip(np.arange(width) + step[1], 0, width - 1)
        values = values[y, x]
    return _pixels(_gaussian(values, sigma * scale))


def motion_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Blur along a line at up to 45 degrees from the horizontal."""
    (radius, sigma), scale = _strength(
        image,
        severity,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    )
    return _pixels(_motion(_unit(image), radius * scale, sigma * scale, rng.uniform(-45, 45)))


def zoom_blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Average the image with enlargements of its centre."""
    (step, count), _ = _strength(
        image,
        severity,
        ((0.01, 6), (0.01, 11), (0.01, 16), (0.01, 21), (0.01, 26)),
        ((0.01, 11), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)),
    )
    picture = Image.fromarray(image)
    total = 2 * image.astype(np.uint16)  # the plain image counts once more, as a zoom of 1
    for i in range(1, count):
        total += _enlarge(picture, 1 + step * i)
    return _pixels(total.astype(np.float32) / np.float32(255 * (count + 1)))


def snow(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Let bright flakes fall through a whitened image."""
    (mean, spread, zoom, floor, radius, sigma, keep), scale = _strength(
        image,
        severity,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    )
    layer = rng.normal(mean, spread, image.shape[:2]).astype(np.float32)
    layer = _enlarge(Image.fromarray(layer), max(1.0, zoom * scale))
    layer = np.clip(np.where(layer < floor, 0, layer), 0, 1)[..., None]
    layer = _motion(layer, radius * scale, sigma * scale, rng.uniform(-135, -45))
    values = _unit(image)
    pale = np.maximum(values, (values @ _LUMA)[..., None] * np.float32(1.5) + np.float32(0.5))
    return _pixels(np.float32(keep) * values + np.float32(1 - keep) * pale + layer + layer[::-1, ::-1])


def frost(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Overlay ice. The texture is generated, with the bluish white and the fern-like ridges of frost on glass."""
    (keep, ice), _ = _strength(
        image,
        severity,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    )
    height, width = image.shape[:2]
    # Needles are the zero crossings of fractal fields, as bright lines; a coarse field gathers them in patches.
    needles = np.zeros((height, width), np.float32)
    for decay in (1.5, 1.4, 1.3, 1.2):
        field = _plasma((height, width), decay, rng)
        distance = np.abs(field - np.median(field))
        needles += np.exp(-np.square(distance / np.float32(0.05)))
    patch = np.clip(_plasma((height, width), 2.0, rng) * 1.6 - 0.3, 0, 1)
    texture = patch * (0.35 + 0.65 * np.minimum(needles, 1)) + 0.1 * needles / 4
    tint = np.array([0.84, 0.93, 1.0], np.float32)
    return _pixels(np.float32(keep) * _unit(image) + np.float32(ice) * texture[..., None].astype(np.float32) * tint)


def fog(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Mix with a fractal haze."""
    (amount, decay), _ = _strength(
        image,
        severity,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    )
    values = _unit(image)
    top = float(values.max())
    haze = _plasma(image.shape[:2], decay, rng)[..., None]
    return _pixels((values + np.float32(amount) * haze) * np.float32(top / (top + amount)))


def brightness(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Raise the value in hue-saturation-value space, which scales the three channels alike."""
    more, _ = _strength(image, severity, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))
    values = _unit(image)
    level = values.max(axis=2, keepdims=True)
    lifted = np.minimum(level + np.float32(more), 1)
    return _pixels(np.where(level > 0, values * (lifted / np.maximum(level, 1e-6)), lifted))


def contrast(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Move every pixel towards the mean of its channel."""
    keep, _ = _strength(image, severity, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))
    values = _unit(image)
    mean = values.mean(axis=(0, 1), keepdims=True)
    return _pixels((values - mean) * np.float32(keep) + mean)


def elastic_transform(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Shear the image a little and stretch small regions of it."""
    (amount, sigma, shear), _ = _strength(  # in parts of the image's side
        image,
        severity,
        ((0, 0.01, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    )
    height, width = image.shape[:2]
    # 244 instead of 224 in the published strengths of ImageNet-C, kept.
    side = min(height, width) * (1 if min(height, width) < _SMALL else 244 / 224)
    centre, third = np.array([width // 2, height // 2]), min(height, width) // 3
    corners = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + rng.uniform(-shear * side, shear * side, (3, 2))
    # Coordinates in the source for each result pixel: the map that takes the moved corners back.
    back = np.linalg.solve(np.c_[moved, np.ones(3)], corners.astype(np.float64)).astype(np.float32)  # (3, 2)
    offset = [
        _gaussian(rng.uniform(-1, 1, (height, width)).astype(np.float32), sigma * side) * np.float32(amount * side)
        for _ in range(2)
    ]
    x = np.arange(width, dtype=np.float32) + offset[0]
    y = np.arange(height, dtype=np.float32)[:, None] + offset[1]
    places = np.stack([y * back[1, 1] + x * back[0, 1] + back[2, 1], y * back[1, 0] + x * back[0, 0] + back[2, 0]])
    values = _unit(image)
    return _pixels(
        np.stack([map_coordinates(values[..., c], places, order=1, mode="reflect") for c in range(3)], axis=-1)
    )


def pixelate(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Shrink and enlarge by boxes."""
    keep, _ = _strength(image, severity, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((int(width * keep), int(height * keep)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Compress to JPEG of low quality."""
    quality, _ = _strength(image, severity, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7))
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}


def corrupt(image: np.ndarray, kind: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Return a corrupted copy of an image.

    Args:
        image: uint8 (H, W, 3), at least 8 pixels on a side.
        kind: a name in ``CORRUPTIONS``.
        severity: 1 to 5.
        rng: source of all randomness.

    Raises:
        InputError: an unknown kind, a severity out of range, or an image of another type, shape or size.
    """
    if kind not in CORRUPTIONS:
        raise unknown("corruption", kind, CORRUPTIONS)
    _check_severities([severity])
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 8:
        raise InputError(
            f"cannot corrupt an image of type {image.dtype} and shape {image.shape}: "
            "give uint8 pixels (H, W, 3) with at least 8 pixels on a side"
        )
    return CORRUPTIONS[kind](image, severity, rng)


_MIN_IMAGES = 48
"""Fewer images than this say little; rather measure one severity than fewer images."""


def corruption_suite(
    predict: Callable[[np.ndarray], np.ndarray],
    images: Callable[[], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]],
    *,
    severities: Sequence[int] = (1, 3, 5),
    deadline: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure accuracy under each corruption, on as many images as the deadline allows.

    All kinds and severities see the same images, so a shorter measurement stays a fair comparison: a few images are
    timed first, then the severities (all, or the middle one alone) and the number of images are chosen to fit.

    Args:
        predict: pixels as the model sees them before normalisation, uint8 (B, H, W, 3), to logits (B, C).
        images: called once; yields (pixels, targets, rows) in an order without meaning, since it may be cut short.
            Targets are class numbers (B,), or zeros and ones (B, C).
        severities: from 1 to 5.
        deadline: value of ``time.monotonic`` at which to be done.
        seed: with an image's row, the kind and the severity it determines the random numbers.

    Returns:
        ``mean`` (over kinds, each averaged over severities), ``per_kind`` {kind: {severity: accuracy}} with
        severities as strings, ``clean`` (accuracy of the same images as they are), ``metric`` (``"top1"``, or
        ``"micro_f1"`` if multi-label), ``images``, ``severities``, and ``complete``: nothing was left out. Without time
        for a few images ``per_kind`` holds the kinds that were measured, and ``mean`` is None if none was.
    """
    _check_severities(severities)
    if not severities:
        raise InputError("no severity to measure corruptions at: give some of 1 to 5")
    chosen = asked = list(dict.fromkeys(severities))
    cells: dict[tuple[str, int], list[float]] = {}
    clean = [0.0, 0.0]
    measured, seconds, complete, multilabel = 0, 0.0, True, False
    with ThreadPoolExecutor() as pool:
        for pixels, targets, rows in _pieces(images()):
            if deadline is not None and measured:
                left = deadline - time.monotonic()
                each = seconds / measured  # per image, all cells
                if chosen is asked and len(asked) > 1 and measured + left / each < _MIN_IMAGES:
                    chosen, complete = [sorted(asked)[len(asked) // 2]], False
                    cells = {cell: sums for cell, sums in cells.items() if cell[1] == chosen[0]}
                    seconds, each = seconds / len(asked), each / len(asked)
                if left < each * len(pixels):
                    complete = False
                    pixels, targets, rows = (part[: max(0, int(left / each))] for part in (pixels, targets, rows))
                    if len(pixels) == 0:
                        break
            started = time.monotonic()
            fresh: dict[tuple[str, int], list[float]] = {}
            for number, kind in enumerate(CORRUPTIONS):
                for severity in chosen:
                    if deadline is not None and time.monotonic() > deadline:
                        break
                    seeds = [(seed, number, severity, int(row)) for row in rows]
                    changed = pool.map(partial(_corrupted, CORRUPTIONS[kind], severity), pixels, seeds)
                    fresh[kind, severity] = _hits(predict(np.stack(list(changed))), targets)
            whole = len(fresh) == len(CORRUPTIONS) * len(chosen)
            complete = complete and whole
            if not whole and measured:  # all cells must speak of the same images
                break
            multilabel = targets.ndim == 2
            for cell, counts in fresh.items():
                cells[cell] = [a + b for a, b in zip(cells.get(cell, (0.0, 0.0)), counts)]
            clean = [a + b for a, b in zip(clean, _hits(predict(pixels), targets))]
            measured += len(pixels)
            seconds += time.monotonic() - started
            if not whole:
                break
    per_kind: dict[str, dict[str, float]] = {}
    for (kind, severity), (hits, total) in cells.items():
        per_kind.setdefault(kind, {})[str(severity)] = hits / max(1.0, total)
    means = [sum(values.values()) / len(values) for values in per_kind.values()]
    return {
        "mean": sum(means) / len(means) if means else None,
        "clean": clean[0] / max(1.0, clean[1]) if measured else None,
        "per_kind": per_kind,
        "metric": "micro_f1" if multilabel else "top1",
        "images": measured if per_kind else 0,
        "severities": chosen,
        "complete": complete and measured > 0,
    }


def _corrupted(function: Corruption, severity: int, image: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    return function(image, severity, np.random.default_rng(seed))


def _pieces(batches: Iterator[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield a first piece of four images, to be timed, then pieces of up to 16."""
    size = 4
    for batch in batches:
        start = 0
        while start < len(batch[0]):
            yield tuple(part[start : start + size] for part in batch)
            start, size = start + size, 16


def _hits(logits: np.ndarray, targets: np.ndarray) -> list[float]:
    """Return numerator and denominator of top-1, or of micro F1 if multi-label."""
    if targets.ndim == 1:
        return [float((logits.argmax(axis=1) == targets).sum()), float(len(targets))]
    said, true = logits > 0, targets > 0.5
    return [2.0 * float((said & true).sum()), float(said.sum() + true.sum())]


def _check_severities(severities: Sequence[int]) -> None:
    for severity in severities:
        if severity not in (1, 2, 3, 4, 5):
            raise InputError(f"severity {severity!r} of a corruption is not allowed: give 1, 2, 3, 4 or 5")


def _strength(image: np.ndarray, severity: int, small: Sequence[Any], large: Sequence[Any]) -> tuple[Any, float]:
    """Return the published strength, and the factor for its lengths in pixels."""
    side = min(image.shape[:2])
    return (small[severity - 1], side / 32) if side < _SMALL else (large[severity - 1], side / 224)


def _unit(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / np.float32(255)


def _pixels(values: np.ndarray) -> np.ndarray:
    return (np.clip(values, 0, 1) * np.float32(255)).round().astype(np.uint8)


def _enlarge(image: Image.Image, zoom: float) -> np.ndarray:
    """Return the image's centre, enlarged to the whole."""
    across, down = image.width / zoom, image.height / zoom
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, left + across, top + down)
    return np.asarray(image.resize(image.size, Image.Resampling.BILINEAR, box=box))


def _gaussian(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur over the first two axes, reflecting at the border: a product of cosine transforms, fast for any sigma."""
    height, width = values.shape[:2]
    squares = (np.arange(height)[:, None] / height) ** 2 + (np.arange(width) / width) ** 2
    damping = np.exp(-squares * (np.pi * sigma) ** 2 / 2).astype(np.float32)
    damping = damping.reshape(height, width, *[1] * (values.ndim - 2))
    return scipy.fft.idctn(scipy.fft.dctn(values, axes=(0, 1)) * damping, axes=(0, 1))


def _convolve(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve (H, W, 3) with a square kernel of odd size, reflecting at the border."""
    reach = len(kernel) // 2
    padded = np.pad(values, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    shape = [scipy.fft.next_fast_len(side, real=True) for side in padded.shape[:2]]
    spectrum = scipy.fft.rfft2(kernel.astype(np.float32), shape)[..., None]
    result = scipy.fft.irfft2(scipy.fft.rfft2(padded, shape, axes=(0, 1)) * spectrum, shape, axes=(0, 1))
    return result[2 * reach : 2 * reach + values.shape[0], 2 * reach : 2 * reach + values.shape[1]]


def _motion(values: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """Blur (H, W, C) along a line with half of a Gaussian, repeating the border: what moves leaves a trail."""
    count = 2 * max(1, int(np.ceil(radius))) + 1
    weights = np.exp(-np.square(np.arange(count)) / (2 * max(sigma, 1e-3) ** 2))
    weights /= weights.sum()
    height, width = values.shape[:2]
    padded = np.pad(values, ((count, count), (count, count), (0, 0)), mode="edge")
    result = np.zeros_like(values)
    for i, weight in enumerate(weights):
        top = count + round(i * np.sin(np.deg2rad(degrees)))
        left = count + round(i * np.cos(np.deg2rad(degrees)))
        result += np.float32(weight) * padded[top : top + height, left : left + width]
    return result


def _plasma(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> np.ndarray:
    """Return a fractal height map (H, W) in [0, 1]: noise on ever finer grids, each weaker by ``decay`` squared.

    The original's diamond-square has the same steps and spectrum: it draws a random factor between plus and minus its
    amplitude and then multiplies by that amplitude again.
    """
    side, amplitude = 2, 1.0
    field = rng.uniform(-1, 1, (side, side)).astype(np.float32)
    while side < max(shape):
        side *= 2
        amplitude /= decay**2
        field = np.asarray(Image.fromarray(field).resize((side, side), Image.Resampling.BILINEAR))
        field = field + np.float32(amplitude) * rng.uniform(-1, 1, (side, side)).astype(np.float32)
    field = field[: shape[0], : shape[1]]
    field = field - field.min()
    return field / max(float(field.max()), 1e-6)
