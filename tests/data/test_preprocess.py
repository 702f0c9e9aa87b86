import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.data.preprocess import RESAMPLING, Preprocess


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def whole(preprocess, image):
    """Resize the whole image, then cut the centre."""
    height, width = preprocess.resized(image.height, image.width)
    method = RESAMPLING[preprocess.interpolation]
    image = image.resize((width, image.height), method).resize((width, height), method)
    top, left = (height - preprocess.size[0]) // 2, (width - preprocess.size[1]) // 2
    return np.asarray(image)[top : top + preprocess.size[0], left : left + preprocess.size[1]]


@settings(max_examples=200)
@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1.0, 0.95, 0.875]),
    st.sampled_from(["crop", "squash"]),
    st.sampled_from(["bilinear", "bicubic"]),
)
def test_shape_range_and_pixels(height, width, h, w, crop_pct, resize, interpolation):
    preprocess = Preprocess((h, w), resize, crop_pct, interpolation)
    resized = preprocess.resized(height, width)
    assert resized[0] >= h and resized[1] >= w
    if resize == "crop":  # one side fits exactly, and the aspect ratio is kept to half a pixel
        target = round(h / crop_pct), round(w / crop_pct)
        assert resized[0] == target[0] or resized[1] == target[1]
        scale = max(target[0] / height, target[1] / width)
        assert abs(resized[0] - height * scale) <= 0.5 + 1e-9 and abs(resized[1] - width * scale) <= 0.5 + 1e-9
    image = noise(height, width)
    result = preprocess(image)
    assert result.shape == (h, w, 3) and result.dtype == np.uint8
    assert np.abs(result.astype(int) - whole(preprocess, image)).max() <= (2 if interpolation == "bicubic" else 1)


@pytest.mark.parametrize("size", [(20, 3000), (3000, 20), (7, 2000), (2000, 7)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_long_thin_images_have_the_same_pixels(size, interpolation):
    preprocess = Preprocess((32, 24), crop_pct=0.875, interpolation=interpolation)
    assert np.prod(preprocess.resized(*size)) > 64 * 32 * 24, "not the case that this test is for"
    image = noise(*size)
    assert np.abs(preprocess(image).astype(int) - whole(preprocess, image)).max() <= 2


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1), (1, 1)])
def test_extreme_images_need_little_memory(size):
    """The whole, resized, would be 224 x 448,000,000 pixels."""
    result = Preprocess((224, 224))(Image.new("RGB", size[::-1], (10, 20, 30)))
    assert result.shape == (224, 224, 3) and (result == (10, 20, 30)).all()


def test_normalise():
    preprocess = Preprocess((4, 4))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    expected = (pixels / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)
    result = preprocess.normalise(pixels)
    assert result.shape == (2, 3, 4, 4) and result.dtype == np.float32
    np.testing.assert_allclose(result, expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_json_round_trip():
    preprocess = Preprocess((32, 24), "squash", 0.9, "bicubic", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), (1, 2, 3))
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


def test_prediction_needs_no_torch():
    code = "import sys, vitrail.data.preprocess, vitrail.data.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
