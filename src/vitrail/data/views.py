"""Views: from the bytes of an image and a random number generator to the pixels that a model sees.

The crop is cut from the decoded image and then resized with antialiasing, as in torchvision; torch's uint8 kernel does
what Pillow does to within one grey level, in a third of the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image

from vitrail.data.decode import decode_array
from vitrail.data.preprocess import Preprocess
from vitrail.errors import InputError, unknown

if TYPE_CHECKING:
    from vitrail.training.recipe import AugmentConfig, DataConfig

KINDS = ("train", "weak", "eval")


class View(Protocol):
    """A picklable map from an image to pixels of a fixed size."""

    @property
    def preprocess(self) -> Preprocess:
        """Holds the size of the pixels."""
        ...

    @property
    def background(self) -> tuple[int, int, int]:
        """RGB colour behind transparent pixels."""
        ...

    @property
    def max_pixels(self) -> int:
        """Larger images are refused."""
        ...

    def __call__(self, blob: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return uint8 pixels (H, W, 3); ``blob`` is as for ``decode``, ``rng`` is used up before the return."""
        ...


@dataclass(frozen=True)
class EvalView:
    """What evaluation and prediction see: exactly ``preprocess`` of the decoded image; nothing is random.

    Args:
        preprocess: size, resize and crop.
        background: RGB colour behind transparent pixels, 0 to 255.
        max_pixels: larger images are refused.
    """

    preprocess: Preprocess
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 100_000_000

    def __call__(self, blob: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return uint8 pixels (H, W, 3)."""
        pixels = decode_array(blob, background=self.background, max_pixels=self.max_pixels)
        return _as_evaluated(pixels, self.preprocess)


@dataclass(frozen=True)
class TrainView:
    """A random view: geometry, flip, RandAugment, colour jitter, erasing, in this order.

    Args:
        preprocess: the size to arrive at and the interpolation; the resize too, unless the policy is ``crop``.
        augment: a resolved section of the recipe. ``crop`` is the random resized crop of torchvision; ``shift`` resizes
            as in evaluation, reflects an eighth of each side outwards and cuts at random; ``none`` is as in evaluation.
        background: RGB colour behind transparent pixels, 0 to 255.
        max_pixels: larger images are refused.

    Raises:
        InputError: ``augment`` still says "auto".
    """

    preprocess: Preprocess
    augment: AugmentConfig
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        for field in ("policy", "flip"):
            if getattr(self.augment, field) == "auto":
                raise InputError(f"augment.{field} is still 'auto': resolve the recipe first, or set it to a value")

    def __call__(self, blob: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return uint8 pixels (H, W, 3)."""
        augment, preprocess = self.augment, self.preprocess
        pixels = decode_array(blob, background=self.background, max_pixels=self.max_pixels)
        if augment.policy == "crop":
            height, width = pixels.shape[:2]
            top, left, h, w = crop_box(height, width, augment.scale, augment.ratio, rng)
            crop = pixels[top : top + h, left : left + w]
            pixels = resize(crop, preprocess.size, preprocess.interpolation)
        else:
            pixels = _as_evaluated(pixels, preprocess)
            if augment.policy == "shift":
                pixels = _shift(pixels, rng)
        if rng.random() < float(augment.flip):
            pixels = pixels[:, ::-1]
        if augment.rand_augment:
            pixels = _rand_augment(pixels, augment.rand_augment, preprocess, rng)
        if augment.color_jitter:
            pixels = _color_jitter(pixels, augment.color_jitter, rng)
        if rng.random() < augment.erase:
            pixels = _erase(pixels, preprocess, rng)
        return pixels


def build_views(
    names: Mapping[str, str], preprocess: Preprocess, augment: AugmentConfig, data: DataConfig
) -> dict[str, View]:
    """Return one view per entry of a batch.

    Args:
        names: kind of view by name, as in ``Method.views``: ``"train"`` (all of ``augment``), ``"weak"`` (its crop or
            shift and its flip alone) or ``"eval"``.
        preprocess: size, resize and interpolation.
        augment: the recipe's section, resolved.
        data: the recipe's section, for ``background`` and ``max_pixels``.

    Raises:
        InputError: for an unknown kind, or an ``augment`` that still says "auto".
    """
    weak = augment.model_copy(update={"color_jitter": 0.0, "rand_augment": 0, "erase": 0.0})
    views: dict[str, View] = {}
    for name, kind in names.items():
        if kind not in KINDS:
            raise unknown(f"kind of view for {name!r}", kind, KINDS)
        if kind == "eval":
            views[name] = EvalView(preprocess, data.background, data.max_pixels)
        else:
            chosen = augment if kind == "train" else weak
            views[name] = TrainView(preprocess, chosen, data.background, data.max_pixels)
    return views


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize uint8 pixels (H, W, 3) with antialiasing, to within one grey level of Pillow's ``resize``."""
    if pixels.shape[:2] == size:
        return pixels
    # The copy is contiguous and writable, and with the batch dimension added before the permutation torch sees it as
    # channels-last: it works on interleaved pixels, and what comes back is contiguous as (H, W, 3).
    image = torch.from_numpy(np.array(pixels))[None].permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(image, size=size, mode=interpolation, antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the box of torchvision's ``RandomResizedCrop``: top, left, height, width in pixels.

    Args:
        height, width: of the image.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width / height, uniform in the logarithm.
        rng: used for up to ten tries; if none fits, the largest centre crop within ``ratio`` is taken.
    """
    box = _random_box(height, width, scale, ratio, rng)
    if box is not None:
        return box
    h = max(1, round(width / ratio[0])) if width < ratio[0] * height else height
    w = max(1, round(height * ratio[1])) if width > ratio[1] * height else width
    return (height - h) // 2, (width - w) // 2, h, w


def _random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Draw a box of random area, aspect and place; None after ten that do not fit into the image."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        share, aspect, down, right = rng.random(4).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    return None


def _as_evaluated(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    if pixels.shape[:2] == preprocess.size == preprocess.resized(*pixels.shape[:2]):
        return pixels
    return preprocess(Image.fromarray(pixels))


def _shift(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reflect an eighth of each side outwards and cut the original size at random."""
    for axis in (0, 1):
        side = pixels.shape[axis]
        pad = side // 8
        start = int(rng.random() * (2 * pad + 1)) - pad
        if start:
            places = np.abs(np.arange(start, start + side))
            pixels = pixels.take(np.minimum(places, 2 * (side - 1) - places), axis)
    return pixels


def _mean_colour(preprocess: Preprocess) -> tuple[int, ...]:
    """Return what becomes zero when normalised, the neutral colour to fill with."""
    return tuple(round(255 * value) for value in preprocess.mean)


def _rand_augment(pixels: np.ndarray, magnitude: int, preprocess: Preprocess, rng: np.random.Generator) -> np.ndarray:
    """Apply torchvision's RandAugment (two operations), with random numbers from ``rng``."""
    from torchvision.transforms import v2

    transform = v2.RandAugment(
        num_ops=2,
        magnitude=magnitude,
        interpolation=v2.InterpolationMode(preprocess.interpolation),
        fill=list(_mean_colour(preprocess)),
    )
    # It can draw from torch's global generator only, which is put back as it was. Not torch.manual_seed: that would
    # seed the accelerators too.
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(int(rng.integers(2**63)))
        return np.asarray(transform(Image.fromarray(np.ascontiguousarray(pixels))))
    finally:
        generator.set_state(state)


def _color_jitter(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and saturation by factors within 1 - strength to 1 + strength, in random order."""
    from torchvision.transforms.v2 import functional

    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    for place in rng.permutation(len(changes)):
        image = changes[place](image, 1 + strength * (2 * rng.random() - 1))
    return image.permute(1, 2, 0).numpy()


def _erase(pixels: np.ndarray, preprocess: Preprocess, rng: np.random.Generator) -> np.ndarray:
    """Fill a box of 2 to 33 % of the area, of aspect 0.3 to 3.3, with the mean colour."""
    height, width = pixels.shape[:2]
    box = _random_box(height, width, (0.02, 0.33), (0.3, 3.3), rng)
    if box is None:
        return pixels
    top, left, h, w = box
    pixels = pixels.copy()
    pixels[top : top + h, left : left + w] = _mean_colour(preprocess)
    return pixels
