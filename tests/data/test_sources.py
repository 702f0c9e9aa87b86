"""Sources read what users really have, and say why they cannot."""

import gzip
import inspect
import json
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.data.decode import UnreadableImage
from vitrail.data.sources import folder as folder_module
from vitrail.data.sources import open_source
from vitrail.errors import DataError, InputError, MissingExtra
from vitrail.training.recipe import DataConfig


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (value, 0, 0)).save(path)
    return path


def source(path, cache=None, **options):
    return open_source(DataConfig(path=None if path is None else str(path), **options), cache)


def usable(opened):
    return [record for record in opened.records() if record.problem is None]


def problems(opened):
    return {record.key: record.problem for record in opened.records() if record.problem}


# ---- folders


def test_folder_classes_are_the_folders_above_an_image(tmp_path):
    for name in ("cat/1.png", "cat/big/2.PNG", "dog/1.Jpg"):
        picture(tmp_path / name.replace("Jpg", "png")).rename(tmp_path / name)
    opened = source(tmp_path)
    assert opened.kind == "folder" and not opened.multilabel
    assert [(r.key, r.labels) for r in opened.records()] == [
        ("cat/1.png", ("cat",)),
        ("cat/big/2.PNG", ("cat/big",)),
        ("dog/1.Jpg", ("dog",)),
    ]
    assert opened.read("cat/1.png") == (tmp_path / "cat/1.png").read_bytes()


def test_level_is_the_most_folders_that_name_a_class(tmp_path):
    for name in ("a/x/deep/1.png", "a/x/2.png", "a/y/3.png", "a/4.png", "5.png"):
        picture(tmp_path / name)
    opened = source(tmp_path, level=2)
    assert sorted((r.key, r.labels[0]) for r in usable(opened)) == [
        ("a/4.png", "a"),
        ("a/x/2.png", "a/x"),
        ("a/x/deep/1.png", "a/x"),
        ("a/y/3.png", "a/y"),
    ]
    assert set(problems(opened)) == {"5.png"}
    assert [r.labels[0] for r in usable(source(tmp_path, level=1))] == ["a"] * 4


def test_hidden_folders_and_files_are_no_classes(tmp_path):
    for name in ("cat/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "cat/.ipynb_checkpoints/1.png"):
        picture(tmp_path / name)
    for name in (".DS_Store", "cat/._1.png", "cat/Thumbs.db", "cat/notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [r.key for r in source(tmp_path).records()] == ["cat/1.png"]


def test_images_of_no_class_or_of_no_readable_kind_are_reported(tmp_path):
    picture(tmp_path / "cat/1.png")
    picture(tmp_path / "2.png")
    (tmp_path / "cat/3.heic").write_bytes(b"x")
    found = problems(source(tmp_path))
    assert "class folder" in found["2.png"]
    assert ".heic" in found["cat/3.heic"] and "JPEG" in found["cat/3.heic"]


def test_links_do_not_loop_or_lead_out(tmp_path):
    picture(tmp_path / "outside.png")
    root = tmp_path / "root"
    picture(root / "cat/1.png")
    (root / "dog").mkdir()
    (root / "dog/inside.png").symlink_to("../cat/1.png")
    (root / "dog/outside.png").symlink_to(tmp_path / "outside.png")
    (root / "dog/broken.png").symlink_to("nowhere.png")
    (root / "dog/self.png").symlink_to("self.png")
    (root / "dog/loop").symlink_to("..")
    opened = source(root)
    assert [r.key for r in usable(opened)] == ["cat/1.png", "dog/inside.png"]
    found = problems(opened)
    assert set(found) == {"dog/outside.png", "dog/broken.png", "dog/self.png", "dog/loop/"}
    assert "leads out" in found["dog/outside.png"] and "nowhere" in found["dog/broken.png"]


def test_a_root_that_is_a_link_is_followed(tmp_path):
    picture(tmp_path / "real/cat/1.png")
    (tmp_path / "link").symlink_to("real")
    assert [r.key for r in usable(source(tmp_path / "link"))] == ["cat/1.png"]


def test_a_name_that_is_not_utf8_is_reported(tmp_path):
    picture(tmp_path / "cat/1.png")
    try:
        (tmp_path / "cat/1.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xff.png"))
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    picture(tmp_path / "cat/2.png")
    opened = source(tmp_path)
    assert [r.key for r in usable(opened)] == ["cat/2.png"]
    (key,) = problems(opened)
    assert key == "cat/\\xff.png"
    key.encode()


def test_labels_are_composed(tmp_path):
    for form in ("NFC", "NFD"):
        picture(tmp_path / form / unicodedata.normalize(form, "é") / "1.png")
    labels = {r.labels for form in ("NFC", "NFD") for r in usable(source(tmp_path / form))}
    assert labels == {(unicodedata.normalize("NFC", "é"),)}


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_split_trees(tmp_path, val):
    for name in ("train/cat/1.png", f"{val}/cat/2.png", "test/cat/3.png", "extra/cat/4.png", "test/5.png"):
        picture(tmp_path / name)
    opened = source(tmp_path)
    assert {(r.key, r.labels[0], r.split) for r in usable(opened)} == {
        ("train/cat/1.png", "cat", "train"),
        (f"{val}/cat/2.png", "cat", "val"),
        ("test/cat/3.png", "cat", "test"),
    }
    assert set(problems(opened)) == {"extra/cat/4.png", "test/5.png"}


def test_folders_that_only_look_like_splits_are_classes(tmp_path):
    for name in ("train/1.png", "car/1.png"):
        picture(tmp_path / name)
    assert {r.labels[0]: r.split for r in usable(source(tmp_path))} == {"train": None, "car": None}


def test_a_split_tree_without_train_is_refused(tmp_path):
    for name in ("val/cat/1.png", "test/cat/1.png"):
        picture(tmp_path / name)
    with pytest.raises(DataError, match="no train folder"):
        source(tmp_path)


def test_a_tree_deeper_than_the_recursion_limit_is_walked(tmp_path):
    picture(tmp_path / "/".join(["d"] * 150) / "1.png")
    opened = source(tmp_path)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 60)
    try:
        (record,) = opened.records()
    finally:
        sys.setrecursionlimit(limit)
    assert record.labels == ("/".join(["d"] * 150),)


def test_order_is_fixed_and_listing_bounded(tmp_path, monkeypatch):
    names = [f"{n:03}.png" for n in range(25)]
    blob = picture(tmp_path / "seed.png").read_bytes()
    (tmp_path / "root/cat").mkdir(parents=True)
    for name in reversed(names):
        (tmp_path / "root/cat" / name).write_bytes(blob)
    monkeypatch.setattr(folder_module, "LISTING", 4)
    assert [r.key for r in source(tmp_path / "root").records()] == [f"cat/{name}" for name in names]


# ---- what cannot be opened


def test_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="photos") as error:
        source(tmp_path / "photo")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("a.zip", "unpack"),
        ("a.tar.gz", "unpack"),
        ("a.png", "one image"),
        ("a.xyz", "no known kind"),
        ("train-images-idx3-ubyte.gz", "give the folder"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, match):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=match):
        source(tmp_path / name)


def test_empty_folder_and_network_addresses(tmp_path):
    with pytest.raises(DataError, match="no image"):
        source(tmp_path)
    with pytest.raises(InputError, match="download"):
        source("https://example.org/images")
    picture(tmp_path / "1.png")
    with pytest.raises(DataError, match="lies in no class folder"):
        source(tmp_path)


# ---- tables


def table(tmp_path: Path, text: str, name: str = "m.csv") -> Path:
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path):
    path = table(tmp_path, "\ufeffpath,label,who,part\n0.png, cat ,p1,train\n\n1.png,dog,,valid\nmissing.png,dog,p2,\n")
    opened = source(path, group_column="who", split_column="part")
    assert opened.kind == "manifest"
    assert [(r.key, r.labels, r.group, r.split) for r in opened.records()] == [
        ("0.png", ("cat",), "p1", "train"),
        ("1.png", ("dog",), None, "val"),
        ("missing.png", ("dog",), "p2", "train"),
    ]
    assert opened.read("0.png") == (tmp_path / "0.png").read_bytes()
    assert opened.stamp("missing.png") == "" != opened.stamp("0.png")
    with pytest.raises(OSError):
        opened.read("missing.png")


def test_several_labels(tmp_path):
    path = table(tmp_path, "path,label\n0.png,a| b|a\n1.png,\n2.png,b\n")
    opened = source(path, label_separator="|")
    assert opened.multilabel
    assert [r.labels for r in opened.records()] == [("a", "b"), (), ("b",)]
    assert "no label" in problems(source(path))["1.png"]


@pytest.mark.parametrize("name", ["m.tsv", "semicolon.csv"])
def test_other_delimiters(tmp_path, name):
    mark = "\t" if name.endswith("tsv") else ";"
    path = table(tmp_path, f'path{mark}label\n"0.png"{mark}"a, b"\n'.replace("\n0", "\n0"), name)
    assert [r.labels for r in source(path).records()] == [("a, b",)]


def test_paths_are_the_users_own(tmp_path):
    outside = picture(tmp_path / "elsewhere/1.png")
    path = table(
        tmp_path / "in", f"path,label\n../elsewhere/1.png,a\n{outside},b\nhttps://x.org/1.png,c\n/dev/zero,d\n"
    )
    opened = source(path)
    first, second, third, device = opened.records()
    assert opened.read(first.locator) == opened.read(second.locator) == outside.read_bytes()
    assert "download" in third.problem
    with pytest.raises(UnreadableImage, match="regular"):
        opened.read(device.locator)


def test_a_pipe_does_not_hang(tmp_path):
    path = table(tmp_path, "path,label\npipe.png,a\n")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImage, match="regular"):
        source(path).read("pipe.png")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    picture(tmp_path / "0.png")
    columns = {"path": ["0.png", "0.png", None], "label": [3.0, None, 1.0], "tags": [["x", "y"], [], None]}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    opened = source(tmp_path / "m.parquet")
    assert [r.labels for r in usable(opened)] == [("3",)]
    assert set(problems(opened)) == {"0.png", "row 3"}
    several = source(tmp_path / "m.parquet", label_column="tags")
    assert several.multilabel and [r.labels for r in usable(several)] == [("x", "y"), ()]
    with pytest.raises(InputError, match="not paths"):
        source(tmp_path / "m.parquet", path_column="label")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="Parquet"):
        source(tmp_path / "bad.parquet")


def test_missing_column_names_the_nearest(tmp_path):
    path = table(tmp_path, "path,labels\n0.png,a\n")
    with pytest.raises(InputError, match=r"labels.*data\.label_column"):
        source(path)
    with pytest.raises(InputError, match=r"path.*data\.group_column"):
        source(path, label_column="labels", group_column="pat")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"path,label\n0.png,\xff\xfe\n", "UTF-8"),
        (b"path,label,split\n0.png,a,holdout\n", "holdout.*allowed are train"),
        (b"", "column"),
        (b"path,label\n", "no image"),
    ],
)
def test_damaged_tables(tmp_path, content, match):
    (tmp_path / "m.csv").write_bytes(content)
    picture(tmp_path / "0.png")
    with pytest.raises((InputError, DataError), match=match):
        opened = source(tmp_path / "m.csv", split_column="split" if b"split" in content else None)
        list(opened.records())


# ---- IDX


def idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_folder(folder: Path, packed: bool, parts=("train", "t10k"), n: int = 5) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    images = np.arange(n * 4 * 3, dtype=np.uint8).reshape(n, 4, 3)
    for part in parts:
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8) % 2)):
            blob = idx(array)
            name = f"{part}-{name}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(blob))
            else:
                (folder / name).write_bytes(blob)
    return images


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    images = idx_folder(tmp_path / "set", packed)
    opened = source(tmp_path / "set", tmp_path / "cache")
    assert opened.kind == "idx"
    records = list(opened.records())
    assert [(r.key, r.labels[0], r.split) for r in records[4:6]] == [("train/4", "0", "train"), ("t10k/0", "0", "test")]
    again = pickle.loads(pickle.dumps(opened))
    assert len(pickle.dumps(opened)) < 2000
    np.testing.assert_array_equal(again.read("t10k/3"), images[3])
    assert bool(list((tmp_path / "cache").glob("*"))) == packed


def test_idx_one_part_prescribes_no_split(tmp_path):
    idx_folder(tmp_path / "set", False, parts=("train",))
    assert {r.split for r in source(tmp_path / "set").records()} == {None}


def test_idx_is_unpacked_once(tmp_path):
    idx_folder(tmp_path / "set", True)
    source(tmp_path / "set", tmp_path / "cache")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    source(tmp_path / "set", tmp_path / "cache")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == times


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda blob: blob[:-3], "damaged"),
        (lambda blob: blob + b"more", "damaged"),
        (lambda blob: blob[:6], "header"),
        (lambda blob: b"", "not an IDX file"),
        (lambda blob: b"\x00\x00\x0d" + blob[3:], "0x0d"),
        (lambda blob: blob[:4] + struct.pack(">I", 2**32 - 1) + blob[8:], "announces"),
    ],
)
def test_damaged_idx(tmp_path, packed, spoil, match):
    idx_folder(tmp_path / "set", False)
    path = tmp_path / "set/train-images-idx3-ubyte"
    blob = spoil(path.read_bytes())
    path.unlink()
    (path.with_name(path.name + ".gz") if packed else path).write_bytes(gzip.compress(blob) if packed else blob)
    with pytest.raises(DataError, match=match):
        source(tmp_path / "set", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_idx_bomb_is_not_unpacked(tmp_path, monkeypatch):
    idx_folder(tmp_path / "set", True)
    blob = idx(np.zeros((2, 2, 2), np.uint8)) + bytes(50_000_000)
    (tmp_path / "set/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(blob, 9))
    unpacked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda *args: unpacked.append(read(*args)) or unpacked[-1])
    with pytest.raises(DataError, match="unpacks to more"):
        source(tmp_path / "set", tmp_path / "cache")
    assert sum(map(len, unpacked)) < 2_000_000


def test_idx_cut_off_gzip_and_files_that_do_not_match(tmp_path):
    idx_folder(tmp_path / "set", True)
    path = tmp_path / "set/train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="unpacked"):
        source(tmp_path / "set", tmp_path / "cache")
    path.write_bytes(gzip.compress(idx(np.zeros(7, np.uint8))))
    with pytest.raises(DataError, match="5 images but labels"):
        source(tmp_path / "set", tmp_path / "cache")
    path.unlink()
    with pytest.raises(InputError, match="labels"):
        source(tmp_path / "set", tmp_path / "cache")


def test_fashion_mnist(fashion, tmp_path):
    opened = source(fashion, tmp_path)
    first = next(opened.records())
    assert (first.key, first.labels, first.split) == ("train/0", ("9",), "train")
    assert opened.read("t10k/9999").shape == (28, 28)


# ---- shards


def shard(path: Path, samples: dict[str, bytes]) -> Path:
    import io

    with tarfile.open(path, "w") as tar:
        for name, blob in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return path


def test_shards_of_webdataset(tmp_path):
    wds = pytest.importorskip("webdataset")
    blobs = [picture(tmp_path / "p.png", n).read_bytes() for n in range(6)]
    for number in range(3):
        with wds.TarWriter(str(tmp_path / f"shard-{number:03}.tar")) as writer:
            for n in (0, 1):
                label = {0: {"cls": n}, 1: {"json": {"label": f"name {n}"}}, 2: {"txt": f"text {n}"}}[number]
                writer.write({"__key__": f"a/b{number}{n}", "png": blobs[2 * number + n], **label})
    labels = ["0", "1", "name 0", "name 1", "text 0", "text 1"]
    (tmp_path / "p.png").unlink()
    for given in (tmp_path, str(tmp_path / "shard-{000..002}.tar")):
        opened = pickle.loads(pickle.dumps(source(given)))
        records = usable(opened)
        assert opened.kind == "shards" and [r.labels[0] for r in records] == labels
        assert [opened.read(r.locator) for r in records] == blobs
        assert records[0].key == "shard-000.tar/a/b00"
        assert all(opened.stamp(r.locator) for r in records)
    assert len(usable(source(tmp_path / "shard-001.tar"))) == 2
    with pytest.raises(InputError, match=r"1 of 4 shards.*shard-003"):
        source(str(tmp_path / "shard-{000..003}.tar"))
    with pytest.raises(InputError, match="rising"):
        source(str(tmp_path / "shard-{003..000}.tar"))


def test_shards_by_split_and_several_labels(tmp_path):
    blob = picture(tmp_path / "x/p.png").read_bytes()
    for name in ("train-0", "val-0"):
        shard(tmp_path / f"{name}.tar", {"1.png": blob, "1.json": json.dumps({"label": ["a", "b"]}).encode()})
    opened = source(tmp_path)
    assert opened.multilabel
    assert [(r.labels, r.split) for r in opened.records()] == [(("a", "b"), "train"), (("a", "b"), "val")]


def test_damaged_shards(tmp_path):
    blob = picture(tmp_path / "x/p.png").read_bytes()
    members = {"../../1.png": blob, "../../1.cls": b"a", "2.cls": b"a", "3.png": blob, "4.png": blob, "4.json": b"{"}
    whole = shard(tmp_path / "0.tar", members)
    (tmp_path / "1.tar").write_bytes(whole.read_bytes()[:700])
    (tmp_path / "2.tar").write_bytes(b"no tar at all" * 100)
    opened = source(tmp_path)
    (record,) = usable(opened)
    assert opened.read(record.locator) == blob  # a hostile name is a name and nothing else
    found = problems(opened)
    assert "no image" in found["0.tar/2"] and "no label" in found["0.tar/3"] and "label" in found["0.tar/4"]
    assert {"2.tar"} <= set(found) and any(key.startswith("1.tar") for key in found)


# ---- Hugging Face


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "who": datasets.Value("string"),
        }
    )

    def rows(n):
        pictures = [Image.new("RGB", (4, 3), (k, 0, 0)) for k in range(n)]
        kinds = [k % 2 for k in range(n - 1)] + [-1]
        return datasets.Dataset.from_dict({"picture": pictures, "kind": kinds, "who": ["p"] * n}, features=features)

    tables = datasets.DatasetDict({"train": rows(4), "validation": rows(3), "unsupervised": rows(2)})
    tables.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_hugging_face(saved):
    opened = pickle.loads(pickle.dumps(source(saved, group_column="who")))
    assert opened.kind == "hf" and not opened.multilabel
    assert [(r.key, r.labels, r.group, r.split) for r in usable(opened)][:4] == [
        ("train/0", ("cat",), "p", "train"),
        ("train/1", ("dog",), "p", "train"),
        ("train/2", ("cat",), "p", "train"),
        ("validation/0", ("cat",), "p", "val"),
    ]
    found = problems(opened)
    assert "no label" in found["train/3"] and "unsupervised" in found["unsupervised/"]
    assert opened.read("train/2").startswith(b"\x89PNG")
    assert opened.stamp("train/2") == opened.stamp("train/1") != ""


def test_hugging_face_errors(saved, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"data\.group_column"):
        source(saved, group_column="whom")
    monkeypatch.setenv("VITRAIL_OFFLINE", "1")
    with pytest.raises(InputError, match="offline mode is set"):
        source("hf://nobody/nothing-of-the-kind")
    with pytest.raises(InputError, match="names no data set"):
        source("hf://")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"vitrail\[data\]"):
        source("hf://mnist")


# ---- digits, memory


def test_digits():
    opened = source(None)
    records = list(opened.records())
    assert len(records) == 1797 and {r.labels[0] for r in records} == set("0123456789")
    pixels = opened.read(records[0].locator)
    assert pixels.shape == (8, 8) and pixels.dtype == np.uint8 and pixels.max() == 239  # 15 of 16
    assert len(pickle.dumps(opened)) < 200


def peak(opened) -> int:
    tracemalloc.start()
    for _ in opened.records():
        pass
    result = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result


@pytest.mark.parametrize("kind", ["folder", "csv", "shards"])
def test_memory_does_not_grow(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(folder_module, "LISTING", 100)
    blob = b"no image, which a listing does not look at"
    peaks = []
    for n in (300, 3000):
        root = tmp_path / str(n)
        root.mkdir()
        if kind == "folder":
            for name in ("a", "b"):
                (root / name).mkdir()
            for k in range(n):
                (root / "ab"[k % 2] / f"{k:06}.png").write_bytes(blob)
            opened = source(root)
        elif kind == "csv":
            rows = "".join(f"{k}.png,{k % 2}\n" for k in range(n))
            (root / "m.csv").write_text(f"path,label\n{rows}")
            opened = source(root / "m.csv")
        else:
            opened = source(shard(root / "s.tar", {f"{k}.{e}": blob for k in range(n) for e in ("png", "cls")}))
        next(opened.records())
        peaks.append(peak(opened))
    assert peaks[1] < 1.5 * peaks[0] + 50_000
