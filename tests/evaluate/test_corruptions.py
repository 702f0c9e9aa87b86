import colorsys
import itertools
import time

import numpy as np
import pytest
from scipy import ndimage
from skimage import data

from vitrail.errors import InputError
from vitrail.evaluate import corruptions
from vitrail.evaluate.corruptions import CORRUPTIONS, corrupt, corruption_suite

KINDS = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog
brightness contrast elastic_transform pixelate jpeg_compression"""
WITHOUT_ORDER = ("glass_blur", "snow", "frost", "fog", "elastic_transform")
"""Kinds whose published strengths trade one effect for another, so that pixels may change less at a higher severity."""


@pytest.fixture(scope="module")
def cat():
    from PIL import Image

    return np.asarray(Image.fromarray(data.cat()).resize((224, 224)))


def small(height=32, width=32, seed=0):
    rng = np.random.default_rng(seed)
    return ndimage.gaussian_filter(rng.integers(0, 256, (height, width, 3)).astype(np.uint8), (2, 2, 0))


def test_the_fifteen_kinds_are_there():
    assert list(CORRUPTIONS) == KINDS.split()


@pytest.mark.parametrize("kind", list(CORRUPTIONS))
def test_any_size_gives_pixels_of_that_size_and_leaves_the_image_alone(kind):
    for shape in ((8, 8), (9, 31), (32, 32), (84, 85), (85, 130)):
        image = small(*shape)
        before = image.copy()
        for severity in (1, 5):
            result = corrupt(image, kind, severity, np.random.default_rng(0))
            assert result.shape == image.shape
            assert result.dtype == np.uint8
        assert (image == before).all()
    flat = np.zeros((16, 16, 3), np.uint8)
    assert corrupt(flat, kind, 3, np.random.default_rng(0)).shape == flat.shape


@pytest.mark.parametrize("kind", list(CORRUPTIONS))
def test_the_random_generator_decides(kind, cat):
    results = [corrupt(cat, kind, 3, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (results[0] == results[1]).all()
    random = kind not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert (results[0] != results[2]).any() == random
    assert np.abs(results[0].astype(int) - cat).mean() > 1


@pytest.mark.parametrize("kind", [kind for kind in CORRUPTIONS if kind not in WITHOUT_ORDER])
@pytest.mark.parametrize("side", [32, 224])
def test_severity_grows(kind, side, cat):
    image = cat if side == 224 else np.ascontiguousarray(cat[::7, ::7])
    distances = [
        np.abs(corrupt(image, kind, severity, np.random.default_rng(0)).astype(int) - image).mean()
        for severity in range(1, 6)
    ]
    assert all(a <= b for a, b in itertools.pairwise(distances)), distances
    assert distances[-1] > 1.5 * distances[0]


def test_noise_has_the_published_strength():
    grey = np.full((224, 224, 3), 128, np.uint8)
    for severity, sigma in enumerate((0.08, 0.12), 1):
        noisy = corrupt(grey, "gaussian_noise", severity, np.random.default_rng(0))
        assert noisy.std() / 255 == pytest.approx(sigma, rel=0.02)
        assert noisy.mean() == pytest.approx(128, abs=0.5)
    for severity, photons in enumerate((60, 25), 1):
        noisy = corrupt(grey, "shot_noise", severity, np.random.default_rng(0))
        assert noisy.std() / 255 == pytest.approx(np.sqrt(128 / 255 / photons), rel=0.05)
    salted = corrupt(grey, "impulse_noise", 5, np.random.default_rng(0))
    assert (salted == 0).mean() == pytest.approx(0.135, rel=0.03)
    assert (salted == 255).mean() == pytest.approx(0.135, rel=0.03)


def test_brightness_is_that_of_hue_saturation_value():
    image = small(12, 12)
    image[0, 0] = 0
    result = corrupt(image, "brightness", 4, np.random.default_rng(0))
    for y, x in itertools.product(range(12), repeat=2):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[y, x] / 255))
        expected = np.array(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))) * 255
        assert np.abs(result[y, x] - expected).max() <= 1


def test_gaussian_is_scipys():
    image = small(40, 56).astype(np.float32)
    for sigma in (0.4, 1.5, 6):
        expected = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="reflect", truncate=8)
        # At 0.4 pixels a sampled Gaussian is not quite the band-limited one.
        assert np.abs(corruptions._gaussian(image, sigma) - expected).max() < (6 if sigma < 1 else 0.6)


def test_convolution_is_scipys():
    image = small(20, 30).astype(np.float32)
    kernel = np.random.default_rng(0).random((9, 9))
    expected = np.stack([ndimage.convolve(image[..., c], kernel, mode="mirror") for c in range(3)], axis=-1)
    assert np.allclose(corruptions._convolve(image, kernel), expected, rtol=1e-4, atol=1e-2)


def test_motion_leaves_a_trail_in_one_direction():
    image = np.zeros((41, 41, 3), np.float32)
    image[20, 20] = 1
    trail = corruptions._motion(image, 6, 3, 0.0)[..., 0]
    assert trail.sum() == pytest.approx(1, rel=1e-5)
    assert (trail[:20] == 0).all()
    assert (trail[21:] == 0).all()
    values = trail[20][trail[20] > 0]
    assert len(values) == 13
    assert values[0] == values.min() or values[-1] == values.min()
    weights = np.exp(-np.square(np.arange(13)) / 18)
    assert np.sort(values)[::-1] == pytest.approx(weights / weights.sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("image", "kind", "severity", "words"),
    [
        (small(), "gausian_noise", 1, "did you mean 'gaussian_noise'"),
        (small(), "snow", 0, "give 1, 2, 3, 4 or 5"),
        (small(7, 20), "snow", 1, "at least 8 pixels"),
        (small().astype(np.float32), "snow", 1, "uint8"),
        (small()[..., 0], "snow", 1, "shape"),
    ],
)
def test_what_cannot_be_corrupted_is_explained(image, kind, severity, words):
    with pytest.raises(InputError, match=words):
        corrupt(image, kind, severity, np.random.default_rng(0))


# ---- the suite


def batches(n, size=10):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    pixels[..., :] = pixels[:, :1, :1, :]  # flat colours, which the "model" tells apart by brightness
    targets = (pixels.mean(axis=(1, 2, 3)) > 127).astype(np.int64)

    def images():
        for start in range(0, n, size):
            part = slice(start, start + size)
            yield pixels[part], targets[part], np.arange(n)[part]

    return images


def predict(pixels):
    light = pixels.mean(axis=(1, 2, 3)) - 127
    return np.stack([-light, light], axis=1)


def test_suite_measures_all_kinds_on_all_images():
    result = corruption_suite(predict, batches(30), severities=(1, 5))
    assert result["complete"]
    assert result["images"] == 30
    assert result["metric"] == "top1"
    assert set(result["per_kind"]) == set(CORRUPTIONS)
    assert all(set(values) == {"1", "5"} for values in result["per_kind"].values())
    assert result["clean"] == 1
    means = [np.mean(list(values.values())) for values in result["per_kind"].values()]
    assert result["mean"] == pytest.approx(np.mean(means))
    assert result["per_kind"]["contrast"]["1"] == 1
    assert result["per_kind"]["brightness"]["5"] < 1
    assert corruption_suite(predict, batches(30, size=7), severities=(1, 5)) == result  # batches do not matter


def test_every_image_gets_noise_of_its_own():
    seen = []

    def images():
        yield np.full((3, 8, 8, 3), 128, np.uint8), np.zeros(3, np.int64), np.array([5, 6, 7])

    corruption_suite(lambda pixels: (seen.append(pixels), np.zeros((len(pixels), 2)))[1], images, severities=[3])
    noisy = seen[0]
    assert (noisy[0] != noisy[1]).any()
    assert (noisy[1] != noisy[2]).any()
    expected = CORRUPTIONS["gaussian_noise"](np.full((8, 8, 3), 128, np.uint8), 3, np.random.default_rng((0, 0, 3, 6)))
    assert (noisy[1] == expected).all()


def test_suite_counts_labels_where_there_are_several():
    def images():
        for pixels, targets, rows in batches(20)():
            yield pixels, np.eye(2, dtype=np.float32)[targets], rows

    result = corruption_suite(predict, images, severities=[3])
    assert result["metric"] == "micro_f1"
    assert result["clean"] == 1


class Clock:
    """A clock on which only predicting costs time."""

    def __init__(self, cost):
        self.now, self.cost = 100.0, cost

    def monotonic(self):
        return self.now

    def predict(self, pixels):
        self.now += self.cost * len(pixels)
        return predict(pixels)


def run_until(monkeypatch, seconds, n=200, cost=0.001, severities=(1, 3, 5)):
    clock = Clock(cost)
    monkeypatch.setattr(corruptions, "time", clock)
    result = corruption_suite(clock.predict, batches(n), severities=severities, deadline=100 + seconds)
    return result, clock.now - 100


def test_suite_takes_fewer_images_when_time_is_short(monkeypatch):
    result, spent = run_until(monkeypatch, 4.3)  # 46 ms per image: 93 of them
    assert spent <= 4.3
    assert 91 <= result["images"] <= 93
    assert result["severities"] == [1, 3, 5]
    assert not result["complete"]


def test_suite_takes_one_severity_when_time_is_shorter(monkeypatch):
    result, spent = run_until(monkeypatch, 1.2)  # 26 images with three severities
    assert spent <= 1.2
    assert result["severities"] == [3]
    assert result["images"] > 64
    assert all(set(values) == {"3"} for values in result["per_kind"].values())
    assert not result["complete"]


def test_suite_gives_what_it_has_when_there_is_hardly_any_time(monkeypatch):
    result, spent = run_until(monkeypatch, 0.1)
    assert spent <= 0.12
    assert 0 < len(result["per_kind"]) < 15
    assert result["images"] == 4
    assert not result["complete"]


def test_suite_without_time_or_images_is_empty(monkeypatch):
    result, _ = run_until(monkeypatch, -1.0)
    assert result["per_kind"] == {}
    assert result["mean"] is None
    assert not result["complete"]
    nothing = corruption_suite(predict, lambda: iter(()), deadline=time.monotonic() + 1)
    assert nothing["images"] == 0
    assert not nothing["complete"]


def test_suite_with_time_to_spare_is_complete(monkeypatch):
    result, _ = run_until(monkeypatch, 1000.0, n=20)
    assert result["complete"]
    assert result["images"] == 20


@pytest.mark.parametrize("severities", [(), (0,), (1, 6)])
def test_suite_refuses_other_severities(severities):
    with pytest.raises(InputError, match="severity"):
        corruption_suite(predict, batches(4), severities=severities)
