"""Views: from the bytes of an image and a random number generator to the pixels that a model sees.

The crop is cut from the decoded image and then resized with antialiasing, as in torchvision; torch's uint8 kernel does
what Pillow does to within one grey level, in a third of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vitrail.data.decode import decode_array
from vitrail.data.preprocess import Preprocess
from vitrail.errors import InputError, unknown

if TYPE_CHECKING:
    from vitrail.training.recipe import AugmentConfig, DataConfig

CROPS = ("global_1", "global_2", "local")
KINDS = ("train", "weak", "eval", *CROPS)
SIMPLE_PAD = 4
"""Pixels that the simple random crop reflects outwards, whatever the size."""
BLUR = (0.1, 2.0)
"""Least and greatest standard deviation of 3-Augment's blur, in pixels."""


@dataclass(frozen=True)
class View:
    """A picklable map from images to pixels of a fixed size; a subclass implements ``batch``.

    Args:
        preprocess: the size to arrive at, the resize and the interpolation.
        background: RGB colour behind transparent pixels, 0 to 255.
        max_pixels: larger images are refused.
    """

    preprocess: Preprocess
    background: tuple[int, int, int] = field(default=(255, 255, 255), kw_only=True)
    max_pixels: int = field(default=100_000_000, kw_only=True)

    def __call__(self, blob: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return uint8 pixels (H, W, 3) of an encoded file or an array, as ``decode`` takes them.

        Raises:
            UnreadableImage: as ``decode`` does.
        """
        pixels = decode_array(blob, background=self.background, max_pixels=self.max_pixels)
        return self.batch([pixels], [rng])[0]

    def batch(self, images: Sequence[np.ndarray], rngs: Iterable[np.random.Generator]) -> np.ndarray:
        """Return uint8 pixels (B, H, W, 3), each image by itself as by ``__call__``.

        Args:
            images: decoded, uint8 (h, w, 3), all of one size.
            rngs: one per image; an image is done with its own before the next is taken.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class EvalView(View):
    """What evaluation and prediction see: exactly ``preprocess`` of the decoded image; nothing is random."""

    def batch(self, images: Sequence[np.ndarray], rngs: Iterable[np.random.Generator]) -> np.ndarray:
        """Return uint8 pixels (B, H, W, 3); leaves ``rngs`` alone."""
        return np.stack([self.preprocess(Image.fromarray(image)) for image in images])


@dataclass(frozen=True)
class TrainView(View):
    """A random view: geometry, flip, RandAugment, 3-Augment, colour jitter, erasing, in this order.

    Args:
        augment: a resolved section of the recipe. The policy ``crop`` is the random resized crop of torchvision;
            ``shift`` resizes as in evaluation, reflects an eighth of each side outwards and cuts at random; ``simple``,
            the simple random crop of DeiT III, scales the whole image until it covers the size, reflects four pixels
            outwards and cuts at random; ``none`` is as in evaluation. Every resize is within one grey level of Pillow's
            (bicubic: two).

    Raises:
        InputError: ``augment`` still says "auto".
    """

    augment: AugmentConfig

    def __post_init__(self) -> None:
        for name in ("policy", "flip"):
            if getattr(self.augment, name) == "auto":
                raise InputError(f"augment.{name} is still 'auto': resolve the recipe first, or set it to a value")

    def batch(self, images: Sequence[np.ndarray], rngs: Iterable[np.random.Generator]) -> np.ndarray:
        """Return uint8 pixels (B, H, W, 3)."""
        augment, preprocess = self.augment, self.preprocess
        sources: Iterable[np.ndarray] = images
        if augment.policy == "none":
            sources = _as_evaluated(images, preprocess)
        elif augment.policy == "shift":
            pixels = _as_evaluated(images, preprocess)
            sources = _reflected(pixels, pixels.shape[1] // 8, pixels.shape[2] // 8)
        elif augment.policy == "simple":
            sources = _reflected(_covering(images, preprocess), SIMPLE_PAD, SIMPLE_PAD)
        result = np.empty((len(images), *preprocess.size, 3), np.uint8)
        for pixels, target, rng in zip(sources, result, rngs):
            if augment.policy == "crop":
                top, left, height, width = crop_box(*_size(pixels), augment.scale, augment.ratio, rng)
                crop = pixels[None, top : top + height, left : left + width]
                pixels = resize(crop, preprocess.size, preprocess.interpolation)[0]
            elif augment.policy in ("shift", "simple"):
                pixels = _cut(pixels, preprocess.size, rng)
            if rng.random() < float(augment.flip):
                pixels = pixels[:, ::-1]
            if augment.rand_augment:
                pixels = _rand_augment(pixels, augment.rand_augment, preprocess, rng)
            if augment.three_augment:
                pixels = _three_augment(pixels, rng)
            if augment.color_jitter:
                pixels = _color_jitter(pixels, augment.color_jitter, rng)
            target[:] = pixels
            if rng.random() < augment.erase:
                _erase(target, preprocess, rng)
        return result


@dataclass(frozen=True)
class CropView(View):
    """A random crop with the strong changes of colour that self-supervised training compares: DINO's.

    Crop, flip, jitter of colours with probability 0.8, grey with 0.2, blur and solarising, in this order. The blur's
    standard deviation of 0.1 to 2 pixels is for 224 pixels, and less where the crop is smaller.

    Args:
        scale: least and greatest share of the image's area.
        flip, blur, solarize: probabilities.
    """

    scale: tuple[float, float]
    flip: float = 0.5
    blur: float = 0.5
    solarize: float = 0.0

    def batch(self, images: Sequence[np.ndarray], rngs: Iterable[np.random.Generator]) -> np.ndarray:
        """Return uint8 pixels (B, H, W, 3)."""
        size = self.preprocess.size
        result = np.empty((len(images), *size, 3), np.uint8)
        for pixels, target, rng in zip(images, result, rngs):
            top, left, height, width = crop_box(*_size(pixels), self.scale, (3 / 4, 4 / 3), rng)
            crop = resize(pixels[None, top : top + height, left : left + width], size, self.preprocess.interpolation)[0]
            if rng.random() < self.flip:
                crop = crop[:, ::-1]
            image = Image.fromarray(np.ascontiguousarray(crop))
            if rng.random() < 0.8:
                image = _jitter_colours(image, rng)
            if rng.random() < 0.2:
                image = image.convert("L").convert("RGB")
            if rng.random() < self.blur:
                image = image.filter(ImageFilter.GaussianBlur((0.1 + 1.9 * rng.random()) * min(1.0, max(size) / 224)))
            if rng.random() < self.solarize:
                image = ImageOps.solarize(image)
            target[:] = np.asarray(image)
        return result


def build_views(
    names: Mapping[str, str], preprocess: Preprocess, augment: AugmentConfig, data: DataConfig
) -> dict[str, View]:
    """Return one view per entry of a batch.

    Args:
        names: kind of view by name, as in ``Method.views``: ``"train"`` (all of ``augment``), ``"weak"`` (its geometry
            and its flip alone), ``"eval"``, or DINO's large crops, ``"global_1"`` and ``"global_2"``, and its small
            one, ``"local"``, of 3/7 of the side; of ``augment``, the crops have the flip alone.
        preprocess: size, resize and interpolation.
        augment: the recipe's section, resolved.
        data: the recipe's section, for ``background`` and ``max_pixels``.

    Raises:
        InputError: for an unknown kind, or an ``augment`` that still says "auto".
    """
    weak = augment.model_copy(update={"color_jitter": 0.0, "rand_augment": 0, "three_augment": False, "erase": 0.0})
    views: dict[str, View] = {}
    for name, kind in names.items():
        if kind not in KINDS:
            raise unknown(f"kind of view for {name!r}", kind, KINDS)
        if kind == "eval":
            views[name] = EvalView(preprocess, background=data.background, max_pixels=data.max_pixels)
        elif kind in CROPS:
            if augment.flip == "auto":
                raise InputError("augment.flip is still 'auto': resolve the recipe first, or set it to a value")
            # 96 of 224 pixels, as published.
            height, width = (max(1, round(side * 3 / 7)) for side in preprocess.size)
            small = replace(preprocess, size=(height, width))
            views[name] = CropView(
                small if kind == "local" else preprocess,
                scale=(0.05, 0.4) if kind == "local" else (0.4, 1.0),
                flip=float(augment.flip),
                blur={"global_1": 1.0, "global_2": 0.1, "local": 0.5}[kind],
                solarize=0.2 if kind == "global_2" else 0.0,
                background=data.background,
                max_pixels=data.max_pixels,
            )
        else:
            chosen = augment if kind == "train" else weak
            views[name] = TrainView(preprocess, chosen, background=data.background, max_pixels=data.max_pixels)
    return views


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize uint8 pixels (B, H, W, 3) with antialiasing, to within one grey level of Pillow (bicubic: two)."""
    if pixels.shape[1:3] == size:
        return pixels
    # The copy is contiguous and writable; permuted, torch sees it as channels-last: it then works on interleaved
    # pixels, and what comes back is contiguous as (B, H, W, 3).
    batch = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(batch, size=size, mode=interpolation, antialias=True)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


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


def _as_evaluated(images: Sequence[np.ndarray], preprocess: Preprocess) -> np.ndarray:
    """Resize and crop images of one size as ``preprocess`` does, many in one call: (B, H, W, 3)."""
    height, width = preprocess.resized(*_size(images[0]))
    h, w = preprocess.size
    if height * width > 64 * h * w:  # long and thin: the whole, resized, could fill the memory
        return np.stack([preprocess(Image.fromarray(image)) for image in images])
    top, left = (height - h) // 2, (width - w) // 2
    pixels = resize(np.stack(images), (height, width), preprocess.interpolation)
    return pixels[:, top : top + h, left : left + w]


def _covering(images: Sequence[np.ndarray], preprocess: Preprocess) -> np.ndarray:
    """Resize images of one size until they just cover ``preprocess.size``, and crop nothing: (B, H, W, 3)."""
    whole = replace(preprocess, crop_pct=1.0)
    height, width = whole.resized(*_size(images[0]))
    if height * width > 64 * preprocess.size[0] * preprocess.size[1]:  # long and thin: its middle alone
        return _as_evaluated(images, whole)
    return resize(np.stack(images), (height, width), preprocess.interpolation)


def _reflected(images: np.ndarray, pad_h: int, pad_w: int) -> np.ndarray:
    """Reflect rows and columns outwards, as many on each side."""
    return np.pad(images, ((0, 0), (pad_h, pad_h), (pad_w, pad_w), (0, 0)), mode="reflect")


def _cut(pixels: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Cut a box of ``size`` at random."""
    h, w = size
    height, width = _size(pixels)
    top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
    return pixels[top : top + h, left : left + w]


def _size(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]


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


def _three_augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply one of the three changes of DeiT III, each as often: grey, solarised or blurred."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    choice = int(rng.integers(3))
    if choice == 0:
        image = image.convert("L").convert("RGB")
    elif choice == 1:
        image = ImageOps.solarize(image)
    else:
        image = image.filter(ImageFilter.GaussianBlur(BLUR[0] + (BLUR[1] - BLUR[0]) * rng.random()))
    return np.asarray(image)


def _color_jitter(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and saturation by factors within 1 - strength to 1 + strength, in random order."""
    changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    for place in rng.permutation(len(changes)):
        image = changes[place](image).enhance(1 + strength * (2 * rng.random() - 1))
    return np.asarray(image)


def _jitter_colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness and contrast by up to 40 %, saturation by 20 % and hue by a tenth of its circle."""
    changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for place in rng.permutation(4):
        amount = 2 * rng.random() - 1
        if place == 3:
            hue, saturation, value = image.convert("HSV").split()
            turned = (np.asarray(hue).astype(np.int16) + round(0.1 * 255 * amount)) % 256
            image = Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")
        else:
            image = changes[place](image).enhance(1 + (0.4, 0.4, 0.2)[place] * amount)
    return image


def _erase(pixels: np.ndarray, preprocess: Preprocess, rng: np.random.Generator) -> None:
    """Fill, in place, a box of 2 to 33 % of the area, of aspect 0.3 to 3.3, with the mean colour."""
    box = _random_box(*_size(pixels), (0.02, 0.33), (0.3, 3.3), rng)
    if box is not None:
        top, left, height, width = box
        pixels[top : top + height, left : left + width] = _mean_colour(preprocess)
