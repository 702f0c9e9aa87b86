"""Near duplicates are found, and look-alikes are left alone."""

import io

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from vitrail.data import duplicates
from vitrail.data.duplicates import candidate_pairs, find, look, look_at_grey, perceptual_hash, same_picture, unite


def scene(seed: int, size: int = 160) -> Image.Image:
    """A picture with coarse and fine detail and colour."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size))
    for cells, weight in ((3, 0.5), (8, 0.5), (24, 0.4)):
        layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image = Image.blend(image, layer.resize((size, size), Image.Resampling.BICUBIC), weight)
    return image


def symmetric(seed: int) -> Image.Image:
    """A flat, mirror-symmetric emblem, whose DCT is mostly zeros."""
    rng = np.random.default_rng(seed)
    half = np.repeat(np.repeat(rng.random((6, 3)) < 0.5, 20, 0), 20, 1)
    grey = np.where(np.concatenate([half, half[:, ::-1]], 1), 30, 220).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


CHANGES = {
    "jpeg 85": lambda image: jpeg(image, 85),
    "jpeg 50": lambda image: jpeg(image, 50),
    "half size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "double size": lambda image: image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.85),
    "grey": lambda image: image.convert("L").convert("RGB"),
}


def described(images):
    looks = [look(image) for image in images]
    signatures = np.stack([np.frombuffer(found.signature, np.uint8) for found in looks])
    return perceptual_hash(np.stack([found.grey for found in looks])), signatures


@pytest.mark.parametrize("make", [scene, symmetric])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_others_not(make, change):
    originals = [make(seed) for seed in range(12)]
    images = originals + [CHANGES[change](image) for image in originals]
    hashes, signatures = described(images)
    parent = np.arange(24)
    duplicates.near_duplicates(hashes, signatures, np.zeros(24, np.float32), parent)
    assert find(parent, np.arange(24)).tolist() == [*range(12), *range(12)]


def test_another_colour_or_aspect_is_another_picture():
    red = np.zeros((60, 60, 3), np.uint8)
    red[15:45, 20:40] = (200, 30, 30)
    blue = np.zeros((60, 60, 3), np.uint8)
    blue[15:45, 20:40] = (40, 70, 255)
    hashes, signatures = described([Image.fromarray(red), Image.fromarray(blue)])
    assert not same_picture(signatures[:1], signatures[1:]).any()
    hashes, signatures = described([scene(0), scene(0)])
    parent = np.arange(2)
    duplicates.near_duplicates(hashes, signatures, np.array([0, 0.3]), parent)
    assert parent.tolist() == [0, 1]
    duplicates.near_duplicates(hashes, signatures, np.array([0, 0.05]), parent)
    assert find(parent, np.arange(2)).tolist() == [0, 0]


def test_hash_is_phash_but_for_the_threshold():
    """The coefficients are those that imagehash takes the signs of: rotate its hash's threshold to ours and compare."""
    images = [scene(seed) for seed in range(40)]
    distances = np.array(
        [[imagehash.phash(a) - imagehash.phash(b) for b in images[:20]] for a in images[20:]], np.float64
    )
    ours = described(images)[0]
    mine = np.bitwise_count(ours[20:, None] ^ ours[None, :20]).astype(np.float64)
    assert np.corrcoef(distances.ravel(), mine.ravel())[0, 1] > 0.7


def test_hash_of_flat_pictures_is_zero():
    assert perceptual_hash(np.full((2, 32, 32), 200, np.uint8)).tolist() == [0, 0]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 120))
def test_candidates_equal_brute_force(seed, n):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    for _ in range(n):  # make some of them close
        a, b = rng.integers(0, n, 2)
        hashes[a] = hashes[b] ^ np.bitwise_or.reduce(
            np.uint64(1) << rng.integers(0, 64, rng.integers(0, 7)).astype(np.uint64)
        )
    found = [tuple(sorted(pair)) for a, b in candidate_pairs(hashes) for pair in zip(a.tolist(), b.tolist())]
    close = np.argwhere(np.triu(np.bitwise_count(hashes[:, None] ^ hashes) <= duplicates.HASH_DISTANCE, 1))
    assert sorted(found) == sorted(map(tuple, close.tolist()))


def test_candidates_of_thousands_of_equals_are_bounded():
    pairs = sum(len(a) for a, _ in candidate_pairs(np.zeros(3000, np.uint64), window=10))
    assert pairs <= 3000 * 10


def slow_same(a: np.ndarray, b: np.ndarray) -> bool:
    correlation = np.corrcoef(a[:256].astype(float), b[:256].astype(float))[0, 1]
    chroma = [side[256:].astype(int) for side in (a, b)]
    grey = any(max(abs(side - 128)) <= 4 for side in chroma)
    alike = max(abs(chroma[0] - chroma[1])) <= duplicates.CHROMA_DIFFERENCE
    return bool(correlation >= duplicates.CORRELATION and (grey or alike))


def test_same_picture_against_the_formula():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (200, duplicates.SIGNATURE_BYTES)).astype(np.int64)
    noise = rng.integers(0, 22, (200, 1)) * rng.standard_normal(base.shape)
    other = np.clip(base + np.rint(noise), 0, 255).astype(np.uint8)
    base = base.astype(np.uint8)
    expected = [slow_same(a, b) for a, b in zip(base, other)]
    assert 10 < sum(expected) < 190
    assert same_picture(base, other).tolist() == expected


def test_sketches_rule_out_no_pair():
    """What the signatures confirm, the sketches let through: the bound holds over random pairs near the threshold."""
    rng = np.random.default_rng(1)
    wave = np.cos(np.pi * (2 * np.arange(16) + 1) * np.arange(4)[:, None] / 32)  # where the sketches look

    def smooth(size: np.ndarray) -> np.ndarray:
        values = np.einsum("nuv,ui,vj->nij", rng.standard_normal((500, 4, 4)), wave, wave).reshape(500, 256)
        return size * values / values.std(1, keepdims=True)

    base = np.full((1000, 288), 128.0)
    base[:500, :256] += smooth(np.full((500, 1), 35.0))
    base[500:, :256] = base[:500, :256] + smooth(rng.uniform(0.5, 6, (500, 1)))
    base, other = np.split(np.rint(base).clip(0, 255).astype(np.uint8), 2)
    signatures = np.concatenate([base, other])
    parent = np.arange(1000)
    duplicates.near_duplicates(
        np.arange(1000, dtype=np.uint64) % 500 << np.uint64(20), signatures, np.zeros(1000), parent
    )
    found = find(parent, np.arange(500, 1000)) == np.arange(500)
    same = same_picture(base, other)
    assert 50 < same.sum() < 500
    assert (found == same).all()


@pytest.mark.parametrize("shape", [(28, 28), (8, 8), (40, 70), (64, 33), (1, 5)])
def test_grey_stacks_are_described_like_single_images(shape):
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)) for _ in range(6)]
    pixels = np.stack([np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC)) for image in coarse])
    pixels[0] = 7
    for together, alone in zip(look_at_grey(pixels), (look(Image.fromarray(p).convert("RGB")) for p in pixels)):
        assert abs(together.grey.astype(int) - alone.grey).max() <= 2
        first, second = (np.frombuffer(found.signature, np.uint8).astype(int) for found in (together, alone))
        assert abs(first - second).max() <= 2
        assert together.blank == alone.blank


def test_blank():
    assert look(Image.new("RGB", (50, 40), (10, 200, 30))).blank
    assert not look(scene(0)).blank
    speck = Image.new("RGB", (400, 400), (255, 255, 255))
    speck.putpixel((3, 3), (0, 0, 0))  # too small to survive the reduction
    assert not look(speck).blank


@settings(max_examples=50)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
def test_unite_against_sets(n, pairs):
    pairs = [(a % n, b % n) for a, b in pairs]
    parent = np.arange(n)
    half = len(pairs) // 2
    for part in (pairs[:half], pairs[half:]):
        a, b = np.array(part, np.int64).reshape(-1, 2).T
        unite(parent, a, b)
    sets = {k: {k} for k in range(n)}
    for a, b in pairs:
        joined = sets[a] | sets[b]
        sets.update(dict.fromkeys(joined, joined))
    assert find(parent, np.arange(n)).tolist() == [min(sets[k]) for k in range(n)]


def test_embedding_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((5000, 16)).astype(np.float32)
    vectors[4999], vectors[2500] = vectors[3], vectors[2499]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    parent = np.arange(5000)
    duplicates.embedding_duplicates(vectors, parent, 0.999)
    roots = find(parent, np.arange(5000))
    assert np.flatnonzero(roots != np.arange(5000)).tolist() == [2500, 4999]
    assert (roots[2500], roots[4999]) == (2499, 3)
