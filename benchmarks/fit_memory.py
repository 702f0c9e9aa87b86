"""Peak memory of a whole `vitrail fit` at 6,000 and at 60,000 images.

    python benchmarks/fit_memory.py [/usr/share/datasets/fashion-mnist]

Each size is a class-per-folder tree of PNG files made from Fashion-MNIST, and a process of its own that trains for the
same number of steps. Nothing that grows with the data should sit in memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from vitrail.data.sources import open_source
from vitrail.training.recipe import DataConfig

STEPS, BATCH = 100, 64


def write_tree(source_path: Path, folder: Path, count: int) -> None:
    """Write ``count`` images, their number in a corner pixel so that no two are equal."""
    source = open_source(DataConfig(path=str(source_path)))
    for number, record in zip(range(count), source.records()):
        place = folder / record.labels[0]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.read(record.locator)).save(place / f"{number}.png", compress_level=1)


def peak_mb(images: Path, out: Path, count: int) -> float:
    """Return the largest resident set of the command, in MB."""
    epochs = STEPS * BATCH / (0.9 * count)
    settings = [f"train.epochs={epochs}", f"train.batch_size={BATCH}", "deploy.openvino=false", "deploy.compile=false"]
    settings += ["data.near_duplicates=ignore", "data.val_fraction=0.1"]
    command = [sys.executable, "-m", "vitrail", "fit", str(images), "--out", str(out)]
    process = subprocess.Popen(
        [*command, *(part for s in settings for part in ("--set", s))], stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"vitrail fit ended with status {status}")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?", default=Path("/usr/share/datasets/fashion-mnist"))
    options = parser.parse_args()
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (6_000, 60_000):
            tree = Path(folder) / str(count)
            write_tree(options.source, tree, count)
            peaks[count] = peak_mb(tree, Path(folder) / f"run-{count}", count)
            print(f"{count:6} images: peak of {peaks[count]:.0f} MB", flush=True)
    print(f"ratio {peaks[60_000] / peaks[6_000]:.3f}")
