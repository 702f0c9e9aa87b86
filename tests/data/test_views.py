import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from vitrail.data import views as views_module
from vitrail.data.decode import UnreadableImage, decode
from vitrail.data.preprocess import RESAMPLING, Preprocess
from vitrail.data.views import EvalView, TrainView, build_views, crop_box, resize
from vitrail.errors import InputError
from vitrail.training.recipe import AugmentConfig, DataConfig

PREPROCESS = Preprocess((32, 24))


def rng(seed=0):
    return np.random.default_rng(seed)


def photo(height, width, seed=0):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + 3 * c + seed) + y / (4 + c)) for c in range(3)]
    noise = rng(seed).normal(0, 12, (height, width, 3))
    return np.clip(127 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def train(policy="none", flip=0.0, preprocess=PREPROCESS, **options):
    return TrainView(preprocess, AugmentConfig(policy=policy, flip=flip, **options))


def gap(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("interpolation", "levels"), [("bilinear", 1), ("bicubic", 2)])
def test_crop_is_pillow_s_crop_and_resize(seed, interpolation, levels):
    """The pixels of the quick way equal decode, crop, resize, flip by Pillow for the same box."""
    height, width = rng(seed).integers(20, 400, 2).tolist()
    blob = jpeg(photo(height, width, seed))
    preprocess = Preprocess((48, 40), interpolation=interpolation)
    view = train("crop", flip=1.0, preprocess=preprocess, scale=(0.1, 1.0))
    top, left, h, w = crop_box(height, width, (0.1, 1.0), (0.75, 4 / 3), rng(seed))
    crop = decode(blob).crop((left, top, left + w, top + h))
    method = RESAMPLING[interpolation]
    expected = np.asarray(crop.resize((40, h), method).resize((40, 48), method))[:, ::-1]
    assert gap(view(blob, rng(seed)), expected) <= levels


@settings(max_examples=150)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(0, 9),
)
def test_resize_is_pillow_s_even_on_noise(source, size, seed):
    noise = rng(seed).integers(0, 256, (*source, 3), dtype=np.uint8)
    for name, levels in (("bilinear", 1), ("bicubic", 2)):
        method = RESAMPLING[name]
        expected = Image.fromarray(noise).resize((size[1], source[0]), method).resize(size[::-1], method)
        result = resize(noise[None], size, name)
        assert result.shape == (1, *size, 3) and result.flags.c_contiguous
        assert gap(result[0], expected) <= levels


def reference_box(height, width, scale, ratio, numbers):
    """torchvision's RandomResizedCrop.get_params, written out, with its four draws given as shares."""
    for share, aspect, down, right in numbers:
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = np.exp(np.log(ratio[0]) + aspect * (np.log(ratio[1]) - np.log(ratio[0])))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@settings(max_examples=300)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32), st.sampled_from([0.08, 0.35, 0.9]))
def test_crop_box_follows_the_reference_and_stays_inside(height, width, seed, least):
    numbers = rng(seed).random((10, 4))
    top, left, h, w = crop_box(height, width, (least, 1.0), (0.75, 4 / 3), rng(seed))
    assert top >= 0 and left >= 0 and 1 <= h <= height - top and 1 <= w <= width - left
    expected = reference_box(height, width, (least, 1.0), (0.75, 4 / 3), numbers)
    assert (top, left, h, w) == expected


def test_crop_box_has_torchvision_s_distribution():
    from torchvision.transforms import v2

    transform = v2.RandomResizedCrop(8, scale=(0.2, 0.8))
    image = torch.zeros(3, 60, 100)
    theirs = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in _params(transform, image, 600)])
    random = rng()
    ours = np.array([crop_box(60, 100, (0.2, 0.8), (0.75, 4 / 3), random) for _ in range(600)])
    spread = theirs.std(0) / np.sqrt(600)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 6 * spread).all()
    assert (np.abs(ours.std(0) / theirs.std(0) - 1) < 0.25).all()


def _params(transform, image, count):
    return [transform.make_params([image]) for _ in range(count)]


def test_thin_images_fall_back_to_the_centre():
    assert crop_box(3, 3000, (0.5, 1.0), (0.75, 4 / 3), rng()) == (0, 1498, 3, 4)
    assert crop_box(3000, 3, (0.5, 1.0), (0.75, 4 / 3), rng()) == (1498, 0, 4, 3)


@pytest.mark.parametrize("preprocess", [PREPROCESS, Preprocess((24, 24), resize="squash", interpolation="bicubic")])
def test_eval_is_exactly_preprocess_of_decode(preprocess):
    for blob in (jpeg(photo(50, 70)), photo(50, 70), photo(50, 70)[..., 0]):
        result = EvalView(preprocess)(blob, rng())
        assert result.dtype == np.uint8 and result.shape == (*preprocess.size, 3)
        assert np.array_equal(result, preprocess(decode(blob)))


@pytest.mark.parametrize("size", [(50, 70), (32, 24), (1, 9), (2, 4000), (4000, 2)])
def test_none_is_as_in_evaluation(size):
    for preprocess in (PREPROCESS, Preprocess((16, 16), crop_pct=0.875), Preprocess((16, 20), resize="squash")):
        expected = preprocess(Image.fromarray(photo(*size)))
        assert gap(train(preprocess=preprocess)(photo(*size), rng()), expected) <= 1


def test_shift_is_a_window_of_the_reflected_image():
    image = photo(32, 24)
    padded = np.pad(image, ((4, 4), (3, 3), (0, 0)), "reflect")
    windows = {padded[t : t + 32, w : w + 24].tobytes(): (t, w) for t in range(9) for w in range(7)}
    view = train("shift")
    random = rng()
    seen = {windows[view(image, random).tobytes()] for _ in range(900)}
    assert len(seen) == 63  # every offset occurs, and nothing else


def test_flip_has_its_probability():
    image = photo(32, 24)
    random = rng()
    flips = [np.array_equal(train(flip=0.3)(image, random), image[:, ::-1]) for _ in range(600)]
    assert 0.23 < np.mean(flips) < 0.37
    assert np.array_equal(train(flip=1.0)(image, random), image[:, ::-1])


@pytest.mark.parametrize(
    "options",
    [
        {"color_jitter": 0.4},
        {"rand_augment": 9},
        {"erase": 1.0},
        {"policy": "crop", "flip": 0.5},
        {"three_augment": True},
    ],
)
def test_only_the_generator_decides(options):
    view = train(**options)
    blob = jpeg(photo(60, 50))
    first = view(blob, rng(3))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert np.array_equal(view(blob, rng(3)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert any(not np.array_equal(view(blob, rng(seed)), first) for seed in range(4, 9))
    assert first.shape == (32, 24, 3) and first.dtype == np.uint8


def test_color_jitter_stays_within_its_factors():
    grey = np.full((32, 24, 3), 100, np.uint8)  # contrast and saturation leave a plain grey alone
    values = {int(train(color_jitter=0.5)(grey, rng(seed))[0, 0, 0]) for seed in range(300)}
    assert 49 <= min(values) < 60 and 140 < max(values) <= 151


def test_erase_fills_a_box_with_the_mean_colour():
    image = np.zeros((32, 24, 3), np.uint8)
    random = rng()
    for _ in range(200):
        result = train(erase=1.0)(image, random)
        erased = (result == np.rint(255 * np.array(PREPROCESS.mean)).astype(np.uint8)).all(-1)
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        assert erased.sum() == len(rows) * len(columns), "not a box"
        assert 0.01 < erased.mean() < 0.36
    assert not image.any(), "the source was painted on"


@pytest.mark.parametrize("policy", ["crop", "shift", "simple", "none"])
@pytest.mark.parametrize("size", [(32, 24), (40, 30)])
def test_a_batch_is_its_images_one_by_one(policy, size):
    images = [photo(*size, seed) for seed in range(5)]
    view = train(policy, flip=0.5, erase=0.5, color_jitter=0.2, three_augment=True)
    together = view.batch(images, [rng(seed) for seed in range(5)])
    for seed, image in enumerate(images):
        assert np.array_equal(view(image, rng(seed)), together[seed])


def test_read_only_pixels_are_fine_and_untouched():
    image = photo(40, 30)
    image.flags.writeable = False
    before = image.copy()
    for policy in ("crop", "shift", "simple", "none"):
        train(policy, flip=0.5, erase=1.0, color_jitter=0.3, rand_augment=5, three_augment=True)(image, rng())
    EvalView(PREPROCESS)(image, rng())
    assert np.array_equal(image, before)


def test_build_views():
    changes = {"color_jitter": 0.4, "rand_augment": 9, "three_augment": True, "erase": 0.2}
    augment = AugmentConfig(policy="shift", flip=0.5, **changes)
    data = DataConfig(background=(1, 2, 3), max_pixels=12345)
    views = build_views({"image": "train", "calm": "weak", "plain": "eval"}, PREPROCESS, augment, data)
    assert views["image"].augment == augment
    assert views["calm"].augment == AugmentConfig(policy="shift", flip=0.5)
    assert isinstance(views["plain"], EvalView)
    assert all((view.background, view.max_pixels) == ((1, 2, 3), 12345) for view in views.values())
    assert pickle.loads(pickle.dumps(views)) == views
    assert augment.rand_augment == 9
    with pytest.raises(UnreadableImage, match="12345"):
        views["plain"](np.zeros((200, 200), np.uint8), rng())


def test_errors():
    augment = AugmentConfig(policy="crop", flip=0.5)
    with pytest.raises(InputError, match="kind of view for 'image' 'trian': did you mean 'train'"):
        build_views({"image": "trian"}, PREPROCESS, augment, DataConfig())
    for undecided in (AugmentConfig(flip=0.5), AugmentConfig(policy="crop")):
        with pytest.raises(InputError, match="still 'auto'"):
            build_views({"image": "train"}, PREPROCESS, undecided, DataConfig())


def test_a_simple_crop_is_a_window_of_the_whole_image():
    """The image is scaled until it covers the size; nothing else of it is lost before the cut."""
    preprocess = Preprocess((12, 12), crop_pct=0.8)  # the share that evaluation keeps does not matter
    image = photo(24, 32)
    scaled = Image.fromarray(image).resize((16, 24), RESAMPLING["bilinear"]).resize((16, 12), RESAMPLING["bilinear"])
    padded = np.pad(np.asarray(scaled), ((4, 4), (4, 4), (0, 0)), "reflect").astype(int)
    places = [(top, left) for top in range(9) for left in range(13)]
    windows = np.stack([padded[top : top + 12, left : left + 12] for top, left in places])
    view, random, seen = train("simple", preprocess=preprocess), rng(), set()
    for _ in range(500):
        gaps = np.abs(windows - view(image, random)).max((1, 2, 3))
        assert gaps.min() <= 1
        seen.add(places[int(gaps.argmin())])
    assert len(seen) > 100 and {0, 8} <= {top for top, _ in seen} and {0, 12} <= {left for _, left in seen}


def test_a_simple_crop_of_a_thin_image_fits_the_memory():
    view = train("simple", preprocess=Preprocess((16, 16)))
    assert view(photo(2, 4000), rng()).shape == (16, 16, 3)
    squashed = train("simple", preprocess=Preprocess((16, 20), resize="squash"))
    assert squashed(photo(30, 90), rng()).shape == (16, 20, 3)


def test_three_augment_is_grey_solarised_or_blurred():
    image = photo(32, 24)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    solarised = np.where(image < 128, image, 255 - image)
    view, random, counts = train(three_augment=True), rng(), {"grey": 0, "solarised": 0, "blurred": 0}
    for _ in range(600):
        found = view(image, random)
        if np.array_equal(found, grey[..., None].repeat(3, -1)):
            counts["grey"] += 1
        elif np.array_equal(found, solarised):
            counts["solarised"] += 1
        else:
            counts["blurred"] += 1
    assert all(160 < count < 240 for count in counts.values())


def test_three_augment_blurs_as_published():
    point = np.zeros((32, 24, 3), np.uint8)
    point[16, 12] = 255
    expected = [np.asarray(Image.fromarray(point).filter(ImageFilter.GaussianBlur(radius))) for radius in (0.1, 2.0)]
    peaks = [int(value[16, 12, 0]) for value in expected]
    view, random = train(three_augment=True), rng()
    found = [int(view(point, random)[16, 12, 0]) for _ in range(600)]
    blurred = [value for value in found if value not in (0, 255)]  # solarised it is black, and grey it stays white
    assert peaks[1] <= min(blurred) <= peaks[1] + 1 and peaks[0] - 9 <= max(blurred) <= peaks[0]


def test_three_augment_comes_after_the_flip_and_before_the_jitter():
    seen = []
    names = ("_three_augment", "_color_jitter")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(views_module, name, lambda pixels, *_, name=name: seen.append(name) or pixels)
        train(three_augment=True, color_jitter=0.3)(photo(32, 24), rng())
    assert tuple(seen) == names
