"""Shared fixtures: seeded, offline, one thread per worker so that parallel tests do not fight over the cores."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, and none fails for being slow on a busy machine.
settings.register_profile("vitrail", deadline=None, derandomize=True)
settings.load_profile("vitrail")

CLIPART = Path("/usr/share/openclipart/png")
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import random
    import sys

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may use the global generator
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def clipart() -> Path:
    if not CLIPART.is_dir():
        pytest.skip("needs the Debian package openclipart-png")
    return CLIPART


@pytest.fixture(scope="session")
def fashion() -> Path:
    if not FASHION.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    return FASHION


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs the Debian package chromium")
    return found


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-per-folder tree: 3 classes of 24 small pictures that a small net tells apart in a few steps."""
    from PIL import Image, ImageDraw

    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for name in ("circle", "cross", "square"):
        (root / name).mkdir()
        for number in range(24):
            image = Image.fromarray(rng.integers(0, 90, (40, 48, 3), dtype=np.uint8))
            draw = ImageDraw.Draw(image)
            x, y, r = *rng.integers(12, 28, 2).tolist(), int(rng.integers(6, 11))
            colour = tuple(rng.integers(150, 255, 3).tolist())
            if name == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            elif name == "square":
                draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
            else:
                draw.line((x - r, y - r, x + r, y + r), fill=colour, width=4)
                draw.line((x - r, y + r, x + r, y - r), fill=colour, width=4)
            image.save(root / name / f"{number:02}.png")
    return root
