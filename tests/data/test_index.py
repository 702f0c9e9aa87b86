"""The index keeps what the split decided, and can be opened from anywhere."""

import csv
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from vitrail.data import index as index_module
from vitrail.data.audit import Audit, audit
from vitrail.data.index import Index, build_index, write_split_csv
from vitrail.data.sources import Record, open_source
from vitrail.errors import DataError, InputError, RunError
from vitrail.training.recipe import DataConfig


class Memory:
    """A source of grey pictures by seed: equal seeds are equal pictures."""

    uri, kind = "memory", "memory"

    def __init__(self, seeds, labels, splits=None, groups=None, multilabel=False):
        self.seeds, self.labels, self.splits, self.groups = seeds, labels, splits, groups
        self.multilabel = multilabel

    def records(self):
        for number, label in enumerate(self.labels):
            split = self.splits[number] if self.splits else None
            group = self.groups[number] if self.groups else None
            labels = label if isinstance(label, tuple) else (label,)
            yield Record(f"{label}/{number}", str(number), labels, group, split)

    def read(self, locator):
        return np.random.default_rng(self.seeds[int(locator)]).integers(0, 256, (9, 7), dtype=np.uint8)

    def stamp(self, locator):
        return "1"


def build(source, tmp_path, **options) -> Index:
    config = DataConfig(**options)
    cache = tmp_path / "a.sqlite"
    cache.unlink(missing_ok=True)
    return build_index(source, audit(source, config, cache), config, tmp_path / "index.arrow")


def simple(n=60, classes="abc", **kwargs):
    return Memory(range(n), [classes[k % len(classes)] for k in range(n)], **kwargs)


def test_rows_targets_and_images(tmp_path):
    index = build(simple(), tmp_path)
    assert index.classes == ("a", "b", "c") and not index.multilabel and len(index) == 60
    assert [len(index.rows(split)) for split in ("train", "val", "test")] == [54, 6, 0]
    assert sorted([*index.rows("train"), *index.rows("val")]) == list(range(60))
    assert index.rows("val").dtype == np.int64
    assert index.counts("val").tolist() == [2, 2, 2] and index.counts("test").tolist() == [0, 0, 0]
    targets = index.targets(np.array([4, 0, 59]))
    assert targets.dtype == np.int64 and targets.tolist() == [1, 0, 2]
    assert index.key(4) == "b/4"
    np.testing.assert_array_equal(index.read(4), index.source.read("4"))
    image = index.load(4)
    assert image.mode == "RGB" and image.size == (7, 9)
    with pytest.raises(InputError, match="did you mean 'train'"):
        index.rows("trian")
    with pytest.raises(IndexError):
        index.key(60)


def test_pickled_and_opened_again(tmp_path):
    index = build(simple(), tmp_path)
    index.rows("train")
    blob = pickle.dumps(Index.open(tmp_path / "index.arrow", open_source(DataConfig())))
    assert len(blob) < 1000  # nothing that was mapped travels to a worker
    other = Index.open(tmp_path / "index.arrow", index.source)
    assert other.classes == index.classes and (other.rows("val") == index.rows("val")).all()
    again = pickle.loads(blob)
    assert again.key(7) == index.key(7) and (again.targets(np.arange(60)) == index.targets(np.arange(60))).all()


def test_several_labels(tmp_path):
    labels = [("a", "b"), ("b",), (), ("c",)] * 20 + [("a", "rare")]
    index = build(Memory(range(81), labels, multilabel=True), tmp_path)
    assert index.multilabel and index.classes == ("a", "b", "c")
    hot = index.targets(np.arange(4))
    assert hot.dtype == np.float32 and hot.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert index.targets(np.array([80])).tolist() == [[1, 0, 0]]
    assert (index.counts("train") + index.counts("val")).tolist() == [21, 40, 20]
    assert index.summary()["dropped_classes"] == {"rare": 1}


def test_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "BATCH", 7)
    index = build(simple(), tmp_path)
    assert [index.key(row) for row in range(60)] == [f"{'abc'[k % 3]}/{k}" for k in range(60)]
    assert index.targets(np.arange(60)).tolist() == [k % 3 for k in range(60)]


# ---- duplicates and groups


def twins(n=90):
    """Each picture three times, over two classes."""
    return Memory([k // 3 for k in range(n)], ["ab"[k // 3 % 2] for k in range(n)])


@pytest.mark.parametrize("mode", ["group", "drop", "ignore"])
def test_duplicates(tmp_path, mode):
    index = build(twins(), tmp_path, near_duplicates=mode, val_fraction=0.3)
    summary = index.summary()
    seeds = [int(index.key(row).split("/")[1]) // 3 for row in range(len(index))]
    sides = {split: {seeds[row] for row in index.rows(split)} for split in ("train", "val")}
    if mode == "drop":
        assert len(index) == 30 and summary["dropped_duplicates"] == 60
        assert [index.key(row) for row in range(2)] == ["a/0", "b/3"]
    else:
        assert len(index) == 90 and summary["dropped_duplicates"] == 0
    assert bool(sides["train"] & sides["val"]) == (mode == "ignore")
    assert summary["leaking_images"] == 0
    assert (len(set(index.groups(np.arange(len(index))).tolist())) == 30) == (mode != "ignore")


def test_user_groups_and_duplicates_are_united(tmp_path):
    # 0 and 1 are twins, 1 and 2 of one patient: all three stay together, and so on for each ten.
    seeds = [k - 1 if k % 10 == 1 else k for k in range(200)]
    groups = [f"p{k // 10}" if k % 10 in (1, 2) else None for k in range(200)]
    index = build(Memory(seeds, ["ab"[k % 2] for k in range(200)], groups=groups), tmp_path, val_fraction=0.4)
    split = {row: name for name in ("train", "val") for row in index.rows(name)}
    for start in range(0, 200, 10):
        assert len({split[start + k] for k in range(3)}) == 1
    found = index.groups(np.arange(200)).reshape(20, 10)
    assert (found[:, :3] == found[:, :1]).all() and len(set(found.ravel().tolist())) == 160


def test_given_splits_are_kept_and_leakage_counted(tmp_path):
    splits = ["train"] * 60 + ["test"] * 30
    seeds = [*range(60), *range(28), 26, 27]  # the last two are twice in the test split itself
    source = Memory(seeds, ["ab"[k % 2] for k in range(90)], splits)
    index = build(source, tmp_path)
    assert index.rows("test").tolist() == list(range(60, 90)) and len(index.rows("val")) == 6
    assert index.summary()["leaking_images"] == 28 + 30
    dropped = build(source, tmp_path, near_duplicates="drop")
    assert dropped.counts("test").sum() == 30  # the official test stays whole, its twins in train go
    assert len(dropped) == 32 + 30 and dropped.summary()["leaking_images"] == 0


def test_small_classes_are_left_out_and_said(tmp_path):
    labels = ["a"] * 20 + ["b"] * 20 + ["twins"] * 10 + ["one"]
    seeds = [*range(40), *[99] * 10, 77]
    index = build(Memory(seeds, labels), tmp_path)
    summary = index.summary()
    assert index.classes == ("a", "b") and len(index) == 40
    assert summary["dropped_classes"] == {"one": 1, "twins": 1} and summary["dropped_images"] == 11
    assert summary["classes"]["a"] == {"train": 18, "val": 2, "test": 0}
    assert build(Memory(seeds, labels), tmp_path, min_per_class=1).classes == ("a", "b", "one", "twins")


# ---- errors


def test_labels_that_differ_between_splits(tmp_path):
    source = Memory(range(8), ["cat", "dog"] * 3 + ["wolf", "cat"], ["train"] * 6 + ["val", "test"])
    with pytest.raises(DataError, match="val has 'wolf', train has 'cat', 'dog'"):
        build(source, tmp_path)
    # Classes of train alone are fine.
    index = build(Memory(range(8), ["cat", "dog"] * 3 + ["cat", "cat"], ["train"] * 6 + ["val", "test"]), tmp_path)
    assert index.counts("val").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (["a"] * 9, "only the class 'a'.*training needs two"),
        (["a"], r"no class .*1 left out with fewer images than data\.min_per_class = 2"),
        (["a", "b"], "no class"),
    ],
)
def test_too_little_to_train_on(tmp_path, labels, match):
    with pytest.raises(DataError, match=match) as error:
        build(Memory(range(len(labels)), labels), tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "index.arrow").exists()


def test_nothing_can_be_held_out(tmp_path):
    source = Memory(range(12), ["a", "b"] * 6, groups=["all"] * 12)
    with pytest.raises(DataError, match=r"left for val.*groups"):
        build(source, tmp_path)


def test_damaged_files(tmp_path):
    index = build(simple(), tmp_path)
    path = tmp_path / "index.arrow"
    blob = path.read_bytes()
    for spoilt in (blob[:100], b"", b"nonsense" * 50):
        path.write_bytes(spoilt)
        with pytest.raises(RunError, match="delete it"):
            Index.open(path, index.source)
    with pytest.raises(RunError, match="cannot read the index"):
        Index.open(tmp_path / "none.arrow", index.source)
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("a", pa.int8())])):
        pass
    with pytest.raises(RunError, match="no index"):
        Index.open(path, index.source)


# ---- the split as a table


def test_split_csv(tmp_path):
    index = build(Memory(range(40), [("x, y",), ("a", "b")] * 20, multilabel=True), tmp_path)
    write_split_csv(index, tmp_path / "split.csv")
    with (tmp_path / "split.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["key", "label", "split"] and len(rows) == 40
    assert [row[1] for row in rows[:2]] == ["x, y", "a|b"]
    assert {number for number, row in enumerate(rows) if row[2] == "val"} == set(index.rows("val").tolist())


def test_deterministic_and_stable(tmp_path):
    first = build(simple(300), tmp_path)
    before = {first.key(row): split for split in ("train", "val") for row in first.rows(split)}
    blob = (tmp_path / "index.arrow").read_bytes()
    build(simple(300), tmp_path)
    assert (tmp_path / "index.arrow").read_bytes() == blob
    more = build(simple(303), tmp_path)
    after = {more.key(row): split for split in ("train", "val") for row in more.rows(split)}
    assert sum(after[key] != split for key, split in before.items()) <= 3
    other = build(simple(300), tmp_path, seed=1)
    assert set(other.rows("val").tolist()) != set(first.rows("val").tolist())


def test_memory_does_not_grow(tmp_path, monkeypatch):
    """What stays per image is some 80 bytes in numpy arrays and nothing in Python objects."""
    monkeypatch.setattr(index_module, "BATCH", 256)
    peaks = []
    for n in (600, 600, 6000):
        config = DataConfig()
        source = simple(n)
        found = audit(source, config, tmp_path / f"{n}.sqlite")
        tracemalloc.start()
        index = build_index(source, Audit(found.path), config, tmp_path / "i.arrow")
        write_split_csv(index, tmp_path / "split.csv")
        index.targets(index.rows("train")[:10])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 5400 * 300


# ---- real data


def test_clip_art(clipart, tmp_path):
    root = tmp_path / "clip"
    for name in ("food", "plants"):
        shutil.copytree(clipart / name, root / name, symlinks=True)
    config = DataConfig(path=str(root), min_per_class=10, max_pixels=1_000_000)
    source = open_source(config)
    index = build_index(source, audit(source, config, tmp_path / "a.sqlite"), config, tmp_path / "i.arrow")
    assert len(index.classes) > 3 and "plants/flowers" in index.classes
    groups = index.groups(np.arange(len(index)))
    assert not set(groups[index.rows("train")]) & set(groups[index.rows("val")])
    assert 0.07 < len(index.rows("val")) / len(index) < 0.13
    assert isinstance(index.load(0), Image.Image)
