"""What is done to an image before the model sees it, in training, ONNX and serving alike.

Stored with the model as JSON. Needs Pillow and numpy only, so that prediction need not import torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from PIL import Image

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preprocess:
    """Resize (antialiased), centre crop, then ``(pixel / 255 - mean) / std``.

    Args:
        size: height and width that the model sees, in pixels.
        resize: ``"crop"`` scales the shorter side to ``size / crop_pct`` and cuts the centre; ``"squash"`` scales both
            sides to ``size`` and changes the aspect ratio.
        crop_pct: share of the scaled image that the crop keeps, in (0, 1].
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        mean, std: per channel, for pixels in [0, 1].
        background: RGB colour behind transparent pixels, 0 to 255.
    """

    size: tuple[int, int]
    resize: Literal["crop", "squash"] = "crop"
    crop_pct: float = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    background: tuple[int, int, int] = (255, 255, 255)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which an image is scaled before the crop; at least ``size``."""
        target_h, target_w = (round(side / self.crop_pct) for side in self.size)
        if self.resize == "squash":
            return target_h, target_w
        # Compare scales with integers only: the ONNX graph must arrive at the same size.
        if target_h * width >= target_w * height:
            return target_h, max(target_w, (width * target_h + height // 2) // height)
        return max(target_h, (height * target_w + width // 2) // width), target_w

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return the resized and cropped pixels: (H, W, 3), uint8. The image is RGB."""
        height, width = self.resized(image.height, image.width)
        if (width, height) != image.size:
            # Along the rows, then along the columns. In one call Pillow 13 takes the columns of some images first, and
            # earlier versions and the ONNX graph do not; the rounding in between makes that a few grey levels.
            method = RESAMPLING[self.interpolation]
            if height * width > 64 * self.size[0] * self.size[1]:
                return self._middle(image, height, width)
            image = image.resize((width, image.height), method).resize((width, height), method)
        top, left = (height - self.size[0]) // 2, (width - self.size[1]) // 2
        if (height, width) != self.size:
            image = image.crop((left, top, left + self.size[1], top + self.size[0]))
        return np.asarray(image)

    def _middle(self, image: Image.Image, height: int, width: int) -> np.ndarray:
        """Resize only what the crop keeps: of a long and thin image, the rest could fill the memory.

        Not done for every image, as Pillow keeps the box in single precision, which moves it by a hair.
        """
        left, start_x, stop_x, right = _reach(image.width, width, self.size[1])
        top, start_y, stop_y, bottom = _reach(image.height, height, self.size[0])
        image = image.crop((left, top, right, bottom))
        method = RESAMPLING[self.interpolation]
        image = image.resize((self.size[1], image.height), method, box=(start_x, 0, stop_x, image.height))
        return np.asarray(image.resize(self.size[::-1], method, box=(0, start_y, self.size[1], stop_y)))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Return float32 model input (..., 3, H, W) from uint8 pixels (..., H, W, 3)."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the values of ``to_dict``; lists become tuples."""
        arguments: dict[str, Any] = {
            k: tuple(value) if isinstance(value, list) else value for k, value in values.items()
        }
        return cls(**arguments)


def _reach(side: int, resized: int, kept: int) -> tuple[int, float, float, int]:
    """Return what the centre crop needs of one side of an image, in its pixels.

    Args:
        side: of the image.
        resized: what the side is scaled to.
        kept: how much of that the crop keeps.

    Returns:
        First pixel that the filters touch; start and end of the crop, counted from there; pixel after the last touched.
    """
    scale = side / resized
    offset = (resized - kept) // 2
    start, stop = offset * scale, min((offset + kept) * scale, side)
    margin = 3 * max(1.0, scale)  # the bicubic filter's half-width is 2
    first, last = max(0, math.floor(start - margin)), min(side, math.ceil(stop + margin))
    return first, start - first, stop - first, last
