"""The audit finds what is there, keeps it, and survives whatever the files hold."""

import io
import json
import os
import shutil
import sqlite3
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.data import audit as audit_module
from vitrail.data.audit import Audit, audit, short_list, suspicious_names
from vitrail.data.sources import Record, open_source
from vitrail.errors import InputError, RunError
from vitrail.training.recipe import DataConfig


def scene(seed: int, size=(80, 60)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(coarse, fine, 0.3)


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


class Memory:
    """A source of grey arrays or encoded files held in a list."""

    uri, kind, multilabel = "memory", "memory", False

    def __init__(self, items, labels=None, splits=None):
        self.items, self.labels, self.splits = items, labels, splits
        self.reads = []

    def records(self):
        for number in range(len(self.items)):
            label = self.labels[number] if self.labels else str(number % 2)
            labels = label if isinstance(label, tuple) else (label,)
            yield Record(f"key {number}", str(number), labels, split=self.splits[number] if self.splits else None)

    def read(self, locator):
        self.reads.append(locator)
        item = self.items[int(locator)]
        if isinstance(item, Exception):
            raise item
        return item

    def stamp(self, locator):
        return "1"


def run(path, cache, **options):
    config = DataConfig(path=str(path), **options)
    return audit(open_source(config), config, cache)


def keys(groups):
    return [[member["key"] for member in group] for group in groups]


@pytest.fixture
def tree(tmp_path):
    """A split tree with everything that goes wrong."""
    root = tmp_path / "data"
    for number in range(6):
        save(scene(number), root / f"train/cat/{number}.png")
        save(scene(100 + number), root / f"train/dog/{number}.png")
    save(scene(200), root / "test/cat/new.png")
    save(scene(0), root / "test/cat/leak.bmp")  # the same pixels in another file
    save(scene(101), root / "test/dog/near.jpg", quality=80)
    shutil.copy(root / "train/cat/3.png", root / "train/dog/conflict.png")
    save(Image.new("RGB", (9, 9), "white"), root / "train/cat/blank.png")
    save(Image.new("L", (7, 7), 255), root / "train/cat/white.png")
    (root / "train/cat/empty.png").touch()
    whole = save(scene(300), tmp_path / "x.jpg").read_bytes()
    (root / "train/dog/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train/dog/text.png").write_text("no image")
    save(scene(1), root / "train/loose.png")
    return root


def test_findings(tree, tmp_path):
    seen = []
    config = DataConfig(path=str(tree))
    found = audit(open_source(config), config, tmp_path / "a.sqlite", lambda done, total: seen.append((done, total)))
    summary = found.summary()
    json.dumps(summary, allow_nan=False)

    assert (summary["images"], summary["readable"]) == (22, 18)
    assert seen[-1] == (22, 22) and seen == sorted(seen)
    reasons = dict(found.unreadable())
    assert set(reasons) == {"train/cat/empty.png", "train/dog/cut.jpg", "train/dog/text.png"}
    assert "zero bytes" in reasons["train/cat/empty.png"] and "truncated" in reasons["train/dog/cut.jpg"]
    assert [key for key, _ in found.left_out()] == ["train/loose.png"]
    assert list(found.blank()) == ["train/cat/blank.png", "train/cat/white.png"]

    assert keys(found.groups("exact")) == [
        ["test/cat/leak.bmp", "train/cat/0.png"],
        ["train/cat/3.png", "train/dog/conflict.png"],
    ]
    near = [*keys(found.groups("exact")), ["test/dog/near.jpg", "train/dog/1.png"]]
    assert sorted(keys(found.groups("near"))) == sorted(near)
    assert keys(found.leaks()) == [["test/cat/leak.bmp", "train/cat/0.png"], ["test/dog/near.jpg", "train/dog/1.png"]]
    assert keys(found.leaks("exact")) == [["test/cat/leak.bmp", "train/cat/0.png"]]
    assert keys(found.conflicts()) == [["train/cat/3.png", "train/dog/conflict.png"]]

    assert summary["unreadable"]["count"] == 3 and summary["left_out"]["count"] == 1 and summary["blank"]["count"] == 2
    exact = {name: summary["exact_duplicates"][name] for name in ("groups", "images", "largest")}
    assert exact == {"groups": 2, "images": 4, "largest": 2}
    assert summary["near_duplicates"]["groups"] == 3
    assert summary["leakage"]["near"]["groups"] == 2 and summary["conflicts"]["exact"]["groups"] == 1
    assert summary["classes"] == {"cat": 10, "dog": 8} and summary["splits"] == {"test": 3, "train": 15}
    assert summary["sizes"]["width"] == {"min": 7, "median": 80, "max": 80}
    assert summary["sizes"]["histogram"] == {"4-7": 1, "8-15": 1, "32-63": 16}
    assert summary["modes"] == {"RGB": 17, "L": 1}
    assert found.locators(["train/cat/0.png", "unknown"]) == {"train/cat/0.png": "train/cat/0.png"}


def test_examples_are_capped(tmp_path):
    blob = io.BytesIO()
    scene(0).save(blob, "PNG")
    source = Memory([blob.getvalue()] * 50 + [b"x"] * 50)
    summary = audit(source, DataConfig(), tmp_path / "a.sqlite").summary()
    assert summary["unreadable"]["count"] == 50 and len(summary["unreadable"]["examples"]) == audit_module.EXAMPLES
    (group,) = summary["exact_duplicates"]["examples"]
    assert summary["exact_duplicates"]["images"] == 50 and len(group) == audit_module.EXAMPLES


# ---- the cache


def test_unchanged_files_are_not_read_again(tree, tmp_path, monkeypatch):
    cache = tmp_path / "a.sqlite"
    first = run(tree, cache).summary()
    assert first["measured"] == 21
    before = cache.read_bytes()
    assert run(tree, cache).summary() == first
    assert cache.read_bytes() == before  # nothing is written, so that processes can share it

    save(scene(500), tree / "train/dog/added.png")
    save(scene(501), tree / "train/cat/5.png")
    os.utime(tree / "train/cat/4.png", ns=(1, 1))  # touched, the bytes are as before
    (tree / "train/dog/5.png").unlink()
    second = run(tree, cache)
    assert second.summary()["measured"] == 2 + 0
    assert second.summary()["images"] == 22
    fresh = run(tree, tmp_path / "fresh.sqlite")
    assert list(second.rows()) == list(fresh.rows())
    connection = sqlite3.connect(cache)
    assert connection.execute("SELECT count(*) FROM content").fetchone()[0] == 21
    connection.close()


def test_a_pass_that_is_interrupted_goes_on(tmp_path):
    items = [np.random.default_rng(n).integers(0, 256, (9, 9), dtype=np.uint8) for n in range(2000)]
    source = Memory(items)

    def stop(done, total):
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(source, DataConfig(), tmp_path / "a.sqlite", stop)
    read = len(source.reads)
    assert read < 2000
    found = audit(source, DataConfig(), tmp_path / "a.sqlite")
    assert found.summary()["measured"] <= 2000 - 300
    assert found.summary()["readable"] == 2000


@pytest.mark.parametrize("spoil", ["garbage", "middle", "empty", "other data", "other settings"])
def test_a_cache_that_cannot_serve_is_begun_anew(tree, tmp_path, spoil):
    cache = tmp_path / "a.sqlite"
    expected = list(run(tree, cache).rows())
    if spoil == "garbage":
        cache.write_bytes(b"no database" * 1000)
    elif spoil == "middle":
        blob = bytearray(cache.read_bytes())
        blob[4096:12000] = bytes(12000 - 4096)
        cache.write_bytes(blob)
    elif spoil == "empty":
        cache.write_bytes(b"")
    elif spoil == "other data":
        shutil.copytree(tree, tmp_path / "copy")
        tree = tmp_path / "copy"
    options = {"background": (0, 0, 0)} if spoil == "other settings" else {}
    found = run(tree, cache, **options)
    assert found.summary()["measured"] == 21
    assert [row.key for row in found.rows()] == [row.key for row in expected]
    wanted = {"garbage": "damaged", "middle": "damaged", "empty": "new"}.get(spoil, "other")
    assert wanted in found.summary()["cache"]


def test_errors_about_the_cache(tree, tmp_path):
    with pytest.raises(RunError, match="no audit"):
        Audit(tmp_path / "none.sqlite").summary()
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(RunError, match="damaged"):
        Audit(tmp_path / "bad.sqlite").summary()
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(RunError, match="cannot write the audit"):
        run(tree, tmp_path / "folder.sqlite")


def test_missing_files_are_looked_for_again(tmp_path):
    (tmp_path / "m.csv").write_text("path,label\n1.png,a\n2.png,b\n")
    save(scene(1), tmp_path / "1.png")
    found = run(tmp_path / "m.csv", tmp_path / "a.sqlite")
    assert list(found.unreadable()) == [("2.png", "the file does not exist")]
    save(scene(2), tmp_path / "2.png")
    found = run(tmp_path / "m.csv", tmp_path / "a.sqlite")
    assert list(found.unreadable()) == [] and len(list(found.rows())) == 2


def test_a_path_listed_twice_is_measured_once(tmp_path):
    (tmp_path / "m.csv").write_text("path,label\n1.png,a\n1.png,b\n2.png,b\n")
    for number in (1, 2):
        save(scene(number), tmp_path / f"{number}.png")
    found = run(tmp_path / "m.csv", tmp_path / "a.sqlite")
    assert keys(found.conflicts()) == [["1.png", "1.png"]]


# ---- whatever a source does


def test_nothing_stops_the_pass(tmp_path):
    items = [
        np.zeros((4, 4), np.float32),
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 4, 7), np.uint8),
        np.zeros((2000, 2000), np.uint8),
        ValueError("odd"),
        PermissionError(13, "Permission denied"),
        MemoryError(),
        b"",
        np.full((5, 5, 3), 9, np.uint8),
        np.eye(6, dtype=np.uint8)[::-1] * 200,
    ]
    found = audit(Memory(items), DataConfig(max_pixels=1_000_000), tmp_path / "a.sqlite")
    reasons = dict(found.unreadable())
    assert set(reasons) == {f"key {n}" for n in range(8)}
    assert reasons["key 5"] == "Permission denied" and "odd" in reasons["key 4"] and "max_pixels" in reasons["key 3"]
    assert [row.key for row in found.rows()] == ["key 8", "key 9"]


def test_arrays_and_files_with_the_same_pixels_are_equal_within_a_kind(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
    others = [grey.copy(), grey.T.copy(), grey.reshape(10, 12), grey + np.uint8(1)]
    found = audit(Memory([grey, *others]), DataConfig(), tmp_path / "a.sqlite")
    assert keys(found.groups("exact")) == [["key 0", "key 1"]]


def test_blank_images_are_no_near_duplicates(tmp_path):
    """A pattern of one grey level is noise, however alike it looks once it is scaled."""
    images = [np.full((side, side), 254, np.uint8) for side in (32, 64)]
    for image in images:
        image[: len(image) // 2, : len(image) // 4] += 1
    found = audit(Memory(images), DataConfig(), tmp_path / "a.sqlite")
    assert len(list(found.blank())) == 2 and not list(found.groups())


def test_names_and_problems(tmp_path):
    pictures = [np.random.default_rng(n).integers(0, 256, (9, 9), dtype=np.uint8) for n in range(6)]
    labels = ["cat", "dog", "Cat ", "owl", "dog", "cat"]
    splits = ["train", "train", "train", "train", "test", "val"]
    source = Memory(pictures, labels, splits)
    summary = audit(source, DataConfig(), tmp_path / "a.sqlite").summary()
    assert summary["suspicious_names"] == [["Cat ", "cat"]]
    assert any("of train that test lacks" in text and "'owl'" in text for text in summary["problems"])
    one = audit(Memory(pictures, ["cat"] * 6), DataConfig(), tmp_path / "b.sqlite").summary()
    assert any("training needs two" in text for text in one["problems"])
    strange = audit(
        Memory(pictures, [*labels[:4], "fox", "cat"], splits), DataConfig(), tmp_path / "c.sqlite"
    ).summary()
    assert any("classes of test that train lacks: 'fox'" in text for text in strange["problems"])


def test_suspicious_names():
    names = ["traffic light", "traffic_light", "Traffic-Light", "a", "A", "b", "ﬁg", "fig", "class 1", "class 11"]
    assert suspicious_names(names) == [["A", "a"], ["Traffic-Light", "traffic light", "traffic_light"], ["fig", "ﬁg"]]
    assert short_list("gfedcba") == "'a', 'b', 'c', 'd', 'e', ... (7 in all)"


def test_embeddings(tmp_path):
    pictures = [np.random.default_rng(n).integers(0, 256, (9, 9), dtype=np.uint8) for n in range(150)]
    source = Memory(pictures)

    def embed(images):
        vectors = np.stack([np.asarray(image, np.float32)[..., 0].ravel() for image in images])
        assert all(image.mode == "RGB" for image in images)
        vectors -= 127
        twin = (np.asarray(pictures[140], np.float32).ravel() - 127)[None]
        is_first = (vectors == np.asarray(pictures[3], np.float32).ravel() - 127).all(1)
        return np.where(is_first[:, None], 5 * twin, vectors)

    config = DataConfig(embedding_duplicates=True)
    with pytest.raises(InputError, match="embed="):
        audit(source, config, tmp_path / "a.sqlite")
    found = audit(source, config, tmp_path / "a.sqlite", embed=embed)
    assert keys(found.groups()) == [["key 3", "key 140"]]
    assert "cosine" in found.summary()["near_duplicates"]["method"]
    # Turned off again, the groups are drawn anew.
    assert not list(audit(source, DataConfig(), tmp_path / "a.sqlite").groups())


def test_memory_does_not_grow(tmp_path):
    """What stays per image is some 60 bytes in numpy arrays and nothing in Python objects."""

    class Endless(Memory):
        def __init__(self, n):
            self.n = n

        def records(self):
            for number in range(self.n):
                yield Record(f"a rather long key of an image, number {number}", str(number), (str(number % 3),))

        def read(self, locator):
            return np.random.default_rng(int(locator)).integers(0, 256, (8, 8), dtype=np.uint8)

    peaks = []
    for n in (600, 600, 6000):  # the first one pays for caches and imports
        tracemalloc.start()
        found = audit(Endless(n), DataConfig(), tmp_path / f"{n}.sqlite")
        found.summary()
        assert sum(1 for _ in found.rows()) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        (tmp_path / f"{n}.sqlite").unlink()
    assert peaks[2] < peaks[1] + 5400 * 250  # a record alone would take more


# ---- real data


def test_digits_have_no_false_duplicates(tmp_path):
    config = DataConfig()
    summary = audit(open_source(config), config, tmp_path / "a.sqlite").summary()
    assert summary["readable"] == 1797
    assert summary["near_duplicates"]["largest"] <= 3 and summary["near_duplicates"]["images"] < 20


def test_fashion_mnist_groups_stay_small(fashion, tmp_path):
    """Of 12,000 look-alike garments few are the same picture."""
    config = DataConfig(path=str(fashion))
    source = open_source(config, tmp_path)
    records = [record for number, record in enumerate(source.records()) if number % 6 == 0]
    source.records = lambda: iter(records)
    summary = audit(source, config, tmp_path / "a.sqlite").summary()
    assert summary["readable"] > 11_000
    assert summary["near_duplicates"]["largest"] <= 5 and summary["near_duplicates"]["images"] < 60


def test_clip_art(clipart, tmp_path):
    """Food and icons of the clip-art tree: links, images beyond the limit of pixels, many twins."""
    root = tmp_path / "clip"
    root.mkdir()
    for name in ("food", "tools"):
        shutil.copytree(clipart / name, root / name, symlinks=True)
    found = run(root, tmp_path / "a.sqlite", max_pixels=1_000_000)
    summary = found.summary()
    assert any("salami" in key and "max_pixels" in reason for key, reason in found.unreadable())
    assert any("leads out" in reason or "nowhere" in reason for _, reason in found.left_out())
    assert summary["exact_duplicates"]["groups"] > 10
    assert summary["near_duplicates"]["images"] >= summary["exact_duplicates"]["images"]
    assert summary["near_duplicates"]["largest"] < 20
