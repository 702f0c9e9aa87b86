import itertools
import math
import pickle

import numpy as np
import pytest

from vitrail.data.audit import audit
from vitrail.data.index import build_index
from vitrail.data.sources import open_source
from vitrail.data.synthetic import fractals as module
from vitrail.data.synthetic.fractals import (
    NUMPY,
    Fractals,
    FractalSource,
    blur,
    chaos_game,
    colourise,
    compiled,
    diamond_square,
    draw,
    fractal_batches,
    jitter_system,
    resize,
    sample_singular_values,
    sample_system,
)
from vitrail.errors import InputError, MissingExtra
from vitrail.training.recipe import DataConfig

SMALL = Fractals(classes=5, per_class=4, size=24)
MANY = Fractals(classes=5, per_class=4, size=24, instances=4)


# ---- systems


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_singular_values_keep_the_papers_conditions(count):
    for seed in range(60):
        rng = np.random.default_rng([count, seed])
        factor = rng.uniform(0, 3 * count)
        values = sample_singular_values(count, factor, rng)
        first, second = values.T
        assert (first + 2 * second).sum() == pytest.approx(factor)
        assert (second >= -1e-12).all()
        assert (first >= second - 1e-12).all()
        assert (first <= 1 + 1e-12).all()


def test_singular_values_reach_all_that_is_allowed():
    # Of three pairs with a factor of 5, each value comes near both ends of what the conditions leave to it.
    rng = np.random.default_rng(0)
    values = np.stack([sample_singular_values(3, 5.0, rng) for _ in range(3000)])
    for pair in range(3):
        assert values[:, pair, 0].max() > 0.98
        assert values[:, pair, 1].min() < 0.02
        assert values[:, pair, 1].max() > 0.9


def test_systems_contract_by_the_papers_factor():
    counts = set()
    for seed in range(80):
        system = sample_system(np.random.default_rng(seed))
        counts.add(len(system))
        values = np.linalg.svd(system[:, :, :2], compute_uv=False)
        assert values.max() <= 1 + 1e-9
        factor = (values * (1, 2)).sum()
        assert (5 + len(system)) / 2 - 1e-9 <= factor <= (6 + len(system)) / 2 + 1e-9
        assert np.abs(system[:, :, 2]).max() <= 1
    assert counts == {2, 3, 4}


def test_the_linear_parts_are_turned_and_mirrored_every_way():
    systems = np.concatenate([sample_system(np.random.default_rng(seed)) for seed in range(300)])
    left, _, _ = np.linalg.svd(systems[:, :, :2])
    angles = np.arctan2(left[:, 1, 0], left[:, 0, 0]) % math.pi
    assert np.histogram(angles, 4, (0, math.pi))[0].min() > 0.15 * len(angles)
    assert 0.4 < (np.linalg.det(systems[:, :, :2]) > 0).mean() < 0.6


def test_jitter_scales_one_map_and_keeps_contractions():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        system = sample_system(rng)
        jittered = jitter_system(system, rng)
        ratio = jittered / system
        changed = [k for k in range(len(system)) if not np.allclose(ratio[k], 1)]
        assert len(changed) <= 1
        for k in changed:
            assert np.allclose(ratio[k], ratio[k].flat[0])
            assert 0.8 <= ratio[k].flat[0] <= 1.1
        assert np.linalg.svd(jittered[:, :, :2], compute_uv=False).max() <= 1 + 1e-12
    expanding = np.array([[[1.3, 0, 0], [0, 1.3, 0]]])
    assert jitter_system(expanding, np.random.default_rng(0)) is expanding


# ---- rendering


def slow_points(system, uniforms):
    """The chaos game from its definition: matrices, from the fixed point of the first map."""
    x = np.linalg.solve(np.eye(2) - system[0, :, :2], system[0, :, 2])
    weight = np.abs(np.linalg.det(system[:, :, :2]))
    share = np.cumsum(weight / weight.sum())
    points = []
    for u in uniforms:
        k = next((k for k in range(len(system)) if u < share[k]), len(system) - 1)
        x = system[k, :, :2] @ x + system[k, :, 2]
        points.append(x)
    return np.array(points).T


def slow_drawing(points, side, low, high, brush):
    """Every point paints the brush's pixels around its own."""
    painted = np.zeros((side, side))
    for x, y in points.T:
        row = int((x - low[0]) * ((side - 1) / (high[0] - low[0])))
        column = int((y - low[1]) * ((side - 1) / (high[1] - low[1])))
        for i, j in itertools.product(range(3), range(3)):
            r, c = row + i - 1, column + j - 1
            if brush[i, j] and 0 <= r < side and 0 <= c < side:
                painted[r, c] += 1
    return painted / max(painted.max(), 1)


@pytest.mark.parametrize("loops", [NUMPY, compiled()], ids=["numpy", "compiled"])
@pytest.mark.parametrize("seed", range(4))
def test_the_chaos_game_equals_its_definition(loops, seed):
    system = sample_system(np.random.default_rng(seed), maps=(2 + seed, 2 + seed))
    points = chaos_game(system, 300, np.random.default_rng(7), loops)
    assert np.allclose(points, slow_points(system, np.random.default_rng(7).random(300)))


@pytest.mark.parametrize("loops", [NUMPY, compiled()], ids=["numpy", "compiled"])
@pytest.mark.parametrize("side", [5, 16, 31])
def test_a_drawing_equals_its_definition(loops, side):
    rng = np.random.default_rng(side)
    points = rng.normal(size=(2, 400))
    brush = rng.random((3, 3)) < 0.5
    low, high = np.array([-1.0, -0.7]), np.array([0.9, 1.6])  # many points lie outside
    assert np.allclose(draw(points, side, (low, high), brush, loops), slow_drawing(points, side, low, high, brush))


def test_nothing_to_draw_is_black():
    points = np.full((2, 10), 0.5)
    assert draw(points, 8, (np.full(2, 0.5), np.full(2, 0.5)), np.ones((3, 3), bool)).max() == 1
    assert not draw(points, 8, (np.full(2, 5.0), np.full(2, 6.0)), np.ones((3, 3), bool)).any()
    assert not draw(points, 8, (np.zeros(2), np.ones(2)), np.zeros((3, 3), bool)).any()


def test_both_forms_give_the_same_pixels():
    for options in (SMALL, MANY, Fractals(classes=3, size=33, colour=False, background=False, points=700)):
        for number in range(6):
            assert np.array_equal(options.image(number, NUMPY), options.image(number, compiled()))
    hue, saturation, value = np.random.default_rng(0).integers(0, 256, (3, 4000), np.uint8)
    assert np.array_equal(NUMPY.rgb(hue, saturation, value), compiled().rgb(hue, saturation, value))


def test_colours_follow_the_hue_wheel():
    import colorsys

    for hue, saturation, value in np.random.default_rng(1).integers(0, 256, (200, 3), np.uint8):
        expected = np.array(colorsys.hsv_to_rgb(int(hue) / 180 % 1, saturation / 255, value / 255)) * 255
        got = NUMPY.rgb(*(np.array([channel]) for channel in (hue, saturation, value)))[0]
        assert np.abs(got - expected).max() <= 0.5 + 1e-6


def test_hues_run_on_from_a_random_one():
    densities = np.random.default_rng(3).random((20, 30))
    got = colourise(densities, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    start, saturation, value = rng.random() * 255, rng.uniform(0.3, 1) * 255, rng.uniform(0.5, 1) * 255
    assert got.shape == (20, 30, 3)
    for place in itertools.product(range(20), range(30)):
        hue = int(densities[place] * 255 + start) % 256
        one = NUMPY.rgb(*(np.array([channel], np.uint8) for channel in (hue, int(saturation), int(value))))[0]
        assert np.array_equal(got[place], one)
        assert got[place].max() == int(value)


def slow_diamond_square(levels, decay, rng):
    """Point by point; random numbers in the order in which the fast form draws them."""
    side = 2**levels + 1
    a = np.zeros((side, side))
    for i, j in itertools.product((0, side - 1), repeat=2):
        a[i, j] = rng.random()
    for step in range(levels):
        h, most = (side - 1) // 2 ** (step + 1), 0.5 * math.exp(-decay * step)
        for i, j in itertools.product(range(h, side, 2 * h), repeat=2):
            a[i, j] = (a[i - h, j - h] + a[i - h, j + h] + a[i + h, j - h] + a[i + h, j + h]) / 4
            a[i, j] += rng.uniform(-most, most)
        for first, second in ((0, h), (h, 0)):
            for i, j in itertools.product(range(first, side, 2 * h), range(second, side, 2 * h)):
                up, down = (i - h if i else side - 1 - h), (i + h if i < side - 1 else h)
                left, right = (j - h if j else side - 1 - h), (j + h if j < side - 1 else h)
                a[i, j] = (a[up, j] + a[down, j] + a[i, left] + a[i, right]) / 4 + rng.uniform(-most, most)
    return a


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_texture_equals_its_definition(levels):
    fast, slow = (f(levels, 0.6, np.random.default_rng(levels)) for f in (diamond_square, slow_diamond_square))
    assert np.allclose(fast, slow)


def test_blur_is_the_gaussian():
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    sigma = 0.7
    taps = np.array([[math.exp(-(i * i + j * j) / (2 * sigma**2)) for j in (-1, 0, 1)] for i in (-1, 0, 1)])
    padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)), "reflect")
    expected = sum(taps[i, j] * padded[i : i + 9, j : j + 12] for i in range(3) for j in range(3)) / taps.sum()
    assert np.abs(blur(image, sigma) - expected).max() <= 0.51


@pytest.mark.parametrize(("side", "target"), [(6, 6), (6, 9), (9, 4), (1, 3), (7, 1)])
def test_resize_interpolates_between_pixel_centres(side, target):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    at = np.clip((np.arange(target) + 0.5) * side / target - 0.5, 0, side - 1)
    rows = np.stack([[np.interp(at, range(side), image[:, c, k]) for c in range(side)] for k in range(3)])  # (3, c, t)
    expected = np.stack([[np.interp(at, range(side), rows[k, :, t]) for t in range(target)] for k in range(3)])
    # (3, t, t') -> (t, t', 3)
    assert np.abs(resize(image, target) - expected.transpose(1, 2, 0)).max() <= 0.51


def test_images_are_what_the_paper_shows():
    fractals = Fractals(classes=40, per_class=4, size=64)
    images = np.stack([fractals.image(n) for n in range(0, 160, 2)])
    assert images.shape == (80, 64, 64, 3)
    assert images.std((1, 2)).mean() > 20  # neither flat nor the same everywhere
    # On black, what is seen is the fractal: neither dust nor blot.
    plain = Fractals(classes=40, per_class=4, size=64, background=False)
    share = np.array([(plain.image(n) > 0).any(-1).mean() for n in range(0, 160, 2)])
    assert 0.1 < share.mean() < 0.5
    grey = Fractals(classes=4, size=32, background=False, colour=False)
    assert {tuple(pixel) for n in range(4) for pixel in grey.image(n).reshape(-1, 3)} >= {(0, 0, 0), (127, 127, 127)}


def test_a_window_lies_where_the_paper_says(monkeypatch):
    seen = []

    def spy(points, side, window, brush, loops):
        low, high = points.min(1), points.max(1)
        extent = high - low
        seen.append((((window[1] - window[0]) / extent), (window[0] + window[1] - low - high) / 2 / extent))
        return np.zeros((side, side))

    monkeypatch.setattr(module, "draw", spy)
    for number in range(60):
        Fractals(size=16, background=False).image(number)
    zoom, shift = (np.concatenate(parts) for parts in zip(*seen))
    assert 0.5 <= zoom.min() < 0.6
    assert 1.9 < zoom.max() <= 2.0
    assert -0.2 <= shift.min() < -0.17
    assert 0.17 < shift.max() <= 0.2
    seen.clear()
    MANY.image(0)
    assert all(np.allclose(zoom, 1) and np.allclose(shift, 0) for zoom, shift in seen)


def test_jitter_is_of_single_fractals_unless_asked_for(monkeypatch):
    called = []
    monkeypatch.setattr(module, "jitter_system", lambda system, rng: called.append(1) or system)
    MANY.image(0)
    Fractals(size=16, jitter=False).image(0)
    assert not called
    SMALL.image(0)
    Fractals(size=16, instances=2, jitter=True).image(0)
    assert len(called) >= 2


# ---- a function of seed, class and number


def test_an_image_depends_on_seed_class_and_number_alone():
    few, many = Fractals(classes=3, per_class=2, size=16), Fractals(classes=9, per_class=5, size=16)
    assert np.array_equal(few.image(2 * 2 + 1), many.image(2 * 5 + 1))  # number 1 of class 2
    assert not np.array_equal(few.image(0), few.image(1))
    assert not np.array_equal(few.image(0), Fractals(classes=3, per_class=2, size=16, seed=1).image(0))
    assert not np.allclose(few.system(0)[0], few.system(1)[0])


def test_instances_have_their_labels():
    several = Fractals(classes=5, per_class=12, size=24, instances=4)
    seen = {len(several.labels(number)) for number in range(60)}
    assert seen == {1, 2, 3, 4}
    black = Fractals(classes=3, size=48, instances=3, background=False, per_class=20)
    assert all(black.image(number).any() for number in range(8))
    assert {label for number in range(40) for label in several.labels(number)} == set(range(5))


def test_the_source_is_opened_by_address():
    source = open_source(DataConfig(path="fractal_pretraining://classes=12&per_class=3&size=16&seed=4"))
    assert isinstance(source, FractalSource)
    assert source.fractals == Fractals(classes=12, per_class=3, size=16, seed=4)
    records = list(source.records())
    assert len({record.key for record in records}) == 36
    assert records[35].labels == ("11",)
    assert records[3].labels == ("01",)
    assert len(pickle.dumps(source)) < 1000
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.read(records[7].locator), source.read(records[7].locator))
    assert open_source(DataConfig(path=source.uri)).fractals == source.fractals
    assert source.stamp("0") == FractalSource("fractal_pretraining://").stamp("1") != ""


def test_the_address_names_the_options_in_full():
    source = FractalSource("fractal_pretraining://instances=2&jitter=1&colour=0")
    assert source.multilabel
    assert source.fractals == Fractals(instances=2, jitter=True, colour=False)
    assert FractalSource(source.uri).uri == source.uri
    assert FractalSource("fractal_pretraining://").fractals == Fractals()


def test_audit_and_split_of_fractals(tmp_path):
    config = DataConfig(path="fractal_pretraining://classes=4&per_class=10&size=16", val_fraction=0.2)
    source = open_source(config)
    found = audit(source, config, tmp_path / "audit.sqlite")
    index = build_index(source, found, config, tmp_path / "index.arrow")
    assert len(index) == 40
    assert index.classes == ("0", "1", "2", "3")
    assert (index.counts("val") == 2).all()
    assert audit(source, config, tmp_path / "audit.sqlite").summary()["measured"] == 40
    several = DataConfig(path="fractal_pretraining://classes=4&per_class=5&size=16&instances=3")
    source = open_source(several)
    index = build_index(source, audit(source, several, tmp_path / "b.sqlite"), several, tmp_path / "b.arrow")
    assert index.multilabel
    row = int(index.rows("train")[0])
    number = int(index.key(row).split("/")[1])
    assert set(np.flatnonzero(index.targets(np.array([row]))[0])) == set(source.fractals.labels(number))


# ---- the endless stream


def test_the_stream_is_endless_fresh_and_resumable():
    batches = list(itertools.islice(fractal_batches(SMALL, 3), 5))
    assert batches[0]["image"].shape == (3, 3, 24, 24)
    assert batches[0]["image"].dtype == np.uint8
    assert batches[0]["target"].dtype == np.int64
    pixels = {batch["image"][place].tobytes() for batch in batches for place in range(3)}
    finite = {SMALL.image(number).transpose(2, 0, 1).tobytes() for number in range(20)}
    assert len(pixels) == 15
    assert not pixels & finite
    resumed = next(fractal_batches(SMALL, 3, first_batch=3))
    assert np.array_equal(resumed["image"], batches[3]["image"])
    assert np.array_equal(resumed["target"], batches[3]["target"])


def test_processes_share_the_stream():
    joint = list(itertools.islice(fractal_batches(SMALL, 2), 6))
    for rank in range(3):
        own = list(itertools.islice(fractal_batches(SMALL, 2, rank=rank, world=3, first_batch=1), 1))
        assert np.array_equal(own[0]["image"], joint[3 + rank]["image"])


def test_the_stream_has_several_labels():
    batch = next(fractal_batches(MANY, 20))
    assert batch["target"].shape == (20, 5)
    assert set(np.unique(batch["target"])) == {0.0, 1.0}
    assert (batch["target"].sum(1) >= 1).all()
    for row in range(4):
        image, labels = MANY.sample(row)
        assert set(np.flatnonzero(batch["target"][row])) == set(labels)
        assert np.array_equal(batch["image"][row], image.transpose(2, 0, 1))


# ---- errors


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("clases=3", "did you mean 'classes'"),
        ("classes=1", "classes = 1 is not allowed: give a whole number from 2"),
        ("size=4", "from 8"),
        ("size=999999", "give a whole number from 8 to 4096"),
        ("points=2000000000", "from 0 to 100000000"),
        ("instances=0", "from 1"),
        ("seed=-1", "give a whole number"),
        ("size=big", "give a whole number"),
        ("colour=2", "give 0 or 1"),
        ("colour=", "give 0 or 1"),
    ],
)
def test_a_wrong_address_is_explained(address, message):
    with pytest.raises(InputError, match=message):
        FractalSource(f"fractal_pretraining://{address}")


def test_wrong_arguments_are_explained():
    with pytest.raises(InputError, match="0 to 6"):
        sample_singular_values(2, 6.5, np.random.default_rng(0))
    with pytest.raises(InputError, match="one map or more"):
        sample_singular_values(0, 0.0, np.random.default_rng(0))
    for number in (-1, 5):
        with pytest.raises(InputError, match="no class"):
            SMALL.system(number)
    for maps in ((4, 2), (0, 3)):
        with pytest.raises(InputError, match="least and the largest number of maps"):
            sample_system(np.random.default_rng(0), maps)
    for options in ({"size": "16"}, {"size": 16.5}, {"seed": None}):
        with pytest.raises(InputError, match="give a whole number"):
            Fractals(**options)
    for number in (-1, 20):
        for fractals in (SMALL, MANY):
            with pytest.raises(InputError, match="give a number from 0 to 19"):
                fractals.image(number)
    with pytest.raises(InputError, match="in the stream"):
        SMALL.sample(-1)
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "first_batch": -1}, {"batch_size": 1, "rank": 1}):
        with pytest.raises(InputError, match="rank from 0 below world"):
            fractal_batches(SMALL, **wrong)


def test_without_numba_the_same_pixels_come_with_a_warning(monkeypatch):
    def absent(name, extra):
        raise MissingExtra(f"no {name}: run  pip install 'vitrail[{extra}]'")

    expected = SMALL.image(3)
    monkeypatch.setattr(module, "require", absent)
    for cached in (module._loops, compiled):
        cached.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"vitrail\[fast\]"):
            assert np.array_equal(SMALL.image(3), expected)
    finally:
        for cached in (module._loops, compiled):
            cached.cache_clear()


def test_the_check_runs(tmp_path):
    from vitrail.checks.check import Context
    from vitrail.checks.fractal_pretraining import run

    verdict = run(Context(True, (0,), tmp_path))
    assert set(verdict.findings[0].arms) == {"scratch", "scratch_longer", "fractals", "fractals_multi"}
    assert all(0 <= value <= 1 for finding in verdict.findings for arm in finding.arms.values() for value in arm)
    assert verdict.tables["images per second"]
