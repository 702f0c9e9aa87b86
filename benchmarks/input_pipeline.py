"""Images per second from JPEG bytes to batches, as ratios to torchvision v2 on Pillow, in one process.

    python benchmarks/input_pipeline.py [--size 500x375] [--rounds 7] [--json]

Every arm decodes the same photos, cuts a random resized crop of 224 pixels with antialiasing and flips half of them.
The arms take turns, and a ratio is the median over the rounds, as the clock of a shared machine drifts. Only arms with
"float" end in normalised floats; the others leave that to the device.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from vitrail.data.cache import PixelCache
from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import build_views
from vitrail.training.recipe import AugmentConfig, DataConfig

SCALE, RATIO, SIDE = (0.35, 1.0), (3 / 4, 4 / 3), 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Blobs:
    """An index over blobs in memory."""

    def __init__(self, blobs: list) -> None:
        self.blobs = blobs

    def __len__(self) -> int:
        return len(self.blobs)

    def key(self, row: int) -> str:
        return str(row)

    def targets(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(rows) % 10

    def read(self, row: int) -> bytes | np.ndarray:
        return self.blobs[row]


def photos(size: tuple[int, int]) -> list[bytes]:
    """JPEG files, quality 90, of the photos that scikit-image brings along."""
    blobs = []
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        file = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        blobs.append(file.getvalue())
    return blobs


def transform_arm(blobs: list[bytes], transform: Callable, batch: int = 32) -> Callable[[], int]:
    """Decode with Pillow, transform, stack into batches: what a usual data set and loader do."""

    def epoch() -> int:
        for start in range(0, len(blobs), batch):
            images = [transform(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in blobs[start : start + batch]]
            torch.stack([torch.as_tensor(np.asarray(image)) for image in images])
        return len(blobs)

    return epoch


def loader_arm(blobs: list, policy: str, side: int, batch: int = 32, cache: Path | None = None) -> Callable[[], int]:
    """Iterate Vitrail's loader; with a cache, all pixels are stored beforehand."""
    augment = AugmentConfig(policy=policy, scale=SCALE, ratio=RATIO, flip=0.5)
    views = build_views({"image": "train"}, Preprocess((side, side)), augment, DataConfig())
    index, rows = Blobs(blobs), np.arange(len(blobs))
    store = None if cache is None else PixelCache(cache, 1024, rows=len(blobs), fingerprint="")

    def epoch() -> int:
        batches = make_loader(index, rows, views, batch_size=batch, shuffle=True, cache=store)
        return sum(len(one["row"]) for one in batches)

    if store is not None:
        epoch()
    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="500x375", help="width x height of the photos (500x375)")
    parser.add_argument("--images", type=int, default=48, help="photos per arm and round (48)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, height = (int(side) for side in options.size.split("x"))
    blobs = (photos((width, height)) * options.images)[: options.images]
    tiny = list(np.random.default_rng(0).integers(0, 256, (2048, 28, 28), dtype=np.uint8))
    crop = [v2.RandomResizedCrop(SIDE, SCALE, RATIO, antialias=True), v2.RandomHorizontalFlip(), v2.ToImage()]
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    reference = "torchvision v2 on Pillow, float"
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            reference: transform_arm(blobs, v2.Compose(crop + normalise)),
            "torchvision v2 on Pillow, uint8": transform_arm(blobs, v2.Compose(crop)),
            "timm, uint8": transform_arm(
                blobs,
                create_transform(
                    SIDE, is_training=True, use_prefetcher=True, scale=SCALE, ratio=RATIO, color_jitter=None,
                    interpolation="bilinear",
                ),
            ),
            "vitrail": loader_arm(blobs, "crop", SIDE),
            "vitrail, second epoch from the cache": loader_arm(blobs, "crop", SIDE, cache=Path(folder) / "pixels"),
            "vitrail, 28x28 arrays shifted at 32": loader_arm(tiny, "shift", 32, batch=128),
        }  # fmt: skip
        speeds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(options.rounds + 1):
            for name, epoch in arms.items():
                start = time.perf_counter()
                count = epoch()
                speeds[name].append(count / (time.perf_counter() - start))
    results = {}
    for name, values in speeds.items():
        # The first round warms up. The ratio is taken round by round, so that a drift hits both its sides.
        ratio = statistics.median(a / b for a, b in zip(values[1:], speeds[reference][1:], strict=True))
        results[name] = {"images_per_second": round(statistics.median(values[1:])), "ratio": round(ratio, 2)}
    if options.json:
        print(json.dumps({"size": options.size, "rounds": options.rounds, "arms": results}, indent=2))
        return
    for name, result in results.items():
        print(f"{name:40} {result['images_per_second']:7,} images/s  {result['ratio']:7.2f}x")


if __name__ == "__main__":
    main()
