import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data.cache import PixelCache
from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import EvalView, build_views
from vitrail.errors import DataError, InputError, RunError
from vitrail.training.recipe import AugmentConfig, DataConfig

PREPROCESS = Preprocess((16, 12))


class FakeIndex:
    """What the loader asks of an index, over a list of blobs."""

    def __init__(self, blobs, multilabel=False):
        self.blobs, self.multilabel = blobs, multilabel

    def __len__(self):
        return len(self.blobs)

    def key(self, row):
        return f"image {row}"

    def targets(self, rows):
        rows = np.asarray(rows)
        return (rows[:, None] % np.arange(2, 5) == 0).astype(np.float32) if self.multilabel else rows % 3

    def read(self, row):
        blob = self.blobs[row]
        if isinstance(blob, Exception):
            raise blob
        if isinstance(blob, bytes) and blob == b"die":
            os._exit(3)
        return blob


class Counting(FakeIndex):
    def __init__(self, blobs):
        super().__init__(blobs)
        self.reads = []

    def read(self, row):
        self.reads.append(row)
        return super().read(row)


def pictures(count, kinds=("JPEG", "PNG", "array", "tiny")):
    blobs = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        random = np.random.default_rng(number)
        height, width = (9, 11) if kind == "tiny" else random.integers(14, 40, 2).tolist()
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if kind in ("JPEG", "PNG"):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, kind)
            blobs.append(file.getvalue())
        else:
            blobs.append(pixels[..., 0] if kind == "tiny" else pixels)
    return blobs


def views(names=None, **options):
    augment = AugmentConfig(**({"policy": "crop", "flip": 0.5, "color_jitter": 0.3, "erase": 0.3} | options))
    return build_views(names or {"image": "train", "calm": "weak"}, PREPROCESS, augment, DataConfig())


def load(index, rows=None, looks=None, *, batch_size=8, shuffle=True, **options):
    rows = np.arange(len(index)) if rows is None else rows
    return make_loader(index, rows, looks or views(), batch_size=batch_size, shuffle=shuffle, **options)


def assert_same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys() and a["failed"] == b["failed"]
        assert all(torch.equal(a[name], b[name]) for name in a if name != "failed")


def test_what_a_batch_holds():
    index = FakeIndex(pictures(19))
    loader = load(index)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    for batch in batches:
        count = len(batch["row"])
        assert set(batch) == {"image", "calm", "target", "row", "failed"}
        assert batch["image"].shape == (count, 3, 16, 12) and batch["image"].dtype == torch.uint8
        assert batch["target"].dtype == batch["row"].dtype == torch.int64
        assert batch["target"].tolist() == [row % 3 for row in batch["row"].tolist()]
        assert batch["failed"] == []
    assert sorted(torch.cat([batch["row"] for batch in batches]).tolist()) == list(range(19))
    assert [len(batch["row"]) for batch in batches] == [8, 8, 3]
    assert_same(loader, batches)


def test_multilabel_targets():
    batch = next(iter(load(FakeIndex(pictures(8), multilabel=True))))
    assert batch["target"].dtype == torch.float32 and batch["target"].shape == (8, 3)


def test_each_sample_is_its_view_with_its_own_random_numbers():
    """A sample's pixels do not depend on its neighbours, its place or the epoch's length."""
    index = FakeIndex(pictures(24))
    whole = {
        row: (image, calm)
        for batch in load(index, seed=5, epoch=2)
        for row, image, calm in zip(batch["row"].tolist(), batch["image"], batch["calm"])
    }
    for row in (0, 3, 7, 22):
        alone = next(iter(load(index, np.array([row]), seed=5, epoch=2)))
        assert torch.equal(alone["image"][0], whole[row][0]) and torch.equal(alone["calm"][0], whole[row][1])
    other = {
        "epoch": load(index, np.array([7]), seed=5, epoch=3),
        "seed": load(index, np.array([7]), seed=6, epoch=2),
        "name": load(index, np.array([7]), views({"another": "train"}), seed=5, epoch=2),
    }
    for name, loader in other.items():
        batch = next(iter(loader))
        pixels = batch["another" if name == "name" else "image"][0]
        assert not torch.equal(pixels, whole[7][0]), name


def test_the_random_stream_is_fixed():
    """Golden numbers: a run is reproduced by another version of Python, numpy or this library."""
    index = FakeIndex([np.arange(16 * 12 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 12, 3)] * 40)
    loader = load(index, looks=views({"image": "train"}, policy="shift", color_jitter=0.0, erase=0.0), seed=3, epoch=1)
    batch = next(iter(loader))
    assert batch["row"].tolist() == GOLDEN_ROWS
    assert batch["image"][:, 0, 0, 0].tolist() == GOLDEN_PIXELS


GOLDEN_ROWS = [5, 12, 18, 8, 10, 13, 27, 17]
GOLDEN_PIXELS = [36, 69, 69, 105, 3, 30, 3, 30]


def test_evaluation_is_in_order_and_plain():
    index = FakeIndex(pictures(10))
    rows = np.array([4, 2, 9, 0])
    (batch,) = load(index, rows, {"image": EvalView(PREPROCESS)}, shuffle=False)
    assert batch["row"].tolist() == [4, 2, 9, 0]
    for row, image in zip(rows, batch["image"]):
        expected = EvalView(PREPROCESS)(index.read(row), np.random.default_rng())
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(workers, tmp_path):
    index = FakeIndex([*pictures(37), b"broken"])
    state = torch.get_rng_state()
    assert_same(load(index), load(index, workers=workers))
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator was drawn from"
    if workers == 2:
        cache = PixelCache(tmp_path / "pixels.bin", 10, rows=len(index), fingerprint="")
        for _ in range(2):
            assert_same(load(index), load(index, workers=workers, cache=cache))
        assert cache.used() > 0


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_a_joint_batch_by_stride(world, drop_last):
    index = FakeIndex(pictures(25))
    joint = list(load(index, drop_last=drop_last))
    parts = [list(load(index, rank=rank, world=world, drop_last=drop_last)) for rank in range(world)]
    assert all(len(part) == len(joint) == (3 if drop_last else 4) for part in parts)
    for number, batch in enumerate(joint):
        for rank in range(world):
            part = parts[rank][number]
            for name in ("image", "calm", "row", "target"):
                assert torch.equal(part[name], batch[name][rank::world])


def test_first_batch_skips_without_reading():
    index = Counting(pictures(30))
    whole = list(load(index))
    for first in range(5):
        index.reads.clear()
        rest = load(index, first_batch=first)
        assert len(rest) == 4 - first
        assert_same(rest, whole[first:])
        assert len(index.reads) == sum(len(batch["row"]) for batch in whole[first:])


def test_two_views_need_one_read():
    index = Counting(pictures(8))
    list(load(index))
    assert sorted(index.reads) == list(range(8))


def test_order_is_a_function_of_seed_and_epoch():
    index = FakeIndex(pictures(40))

    def order(**options):
        return torch.cat([batch["row"] for batch in load(index, looks={"image": EvalView(PREPROCESS)}, **options)])

    assert torch.equal(order(seed=1, epoch=1), order(seed=1, epoch=1))
    distinct = [tuple(order(seed=seed, epoch=epoch).tolist()) for seed in (-1, 0, 1) for epoch in range(3)]
    assert len(set(distinct)) == 9
    assert order(shuffle=False).tolist() == list(range(40))


def test_weights_draw_with_replacement():
    index = FakeIndex([np.zeros((16, 12), np.uint8)] * 100)
    weights = np.where(np.arange(100) < 50, 3.0, 1.0)
    weights[:5] = 0
    looks = {"image": EvalView(PREPROCESS)}
    rows = np.concatenate([b["row"] for e in range(60) for b in load(index, looks=looks, epoch=e, weights=weights)])
    assert len(rows) == 6000
    assert not (rows < 5).any()
    assert abs((rows < 50).mean() - 135 / 185) < 0.03
    assert_same(load(index, looks=looks, weights=weights), load(index, looks=looks, weights=weights))


def test_unreadable_images_are_left_out_and_named():
    blobs = pictures(20)
    blobs[3], blobs[4], blobs[11], blobs[12] = b"no image", b"", OSError("gone"), DataError("shard lost")
    index = FakeIndex(blobs)
    batches = list(load(index))
    assert sorted(key for batch in batches for key in batch["failed"]) == [f"image {r}" for r in (11, 12, 3, 4)]
    good = FakeIndex([blob if isinstance(blob, np.ndarray | bytes) else b"" for blob in blobs])
    for batch in batches:
        assert not {3, 4, 11, 12} & set(batch["row"].tolist())
        assert len(batch["image"]) == len(batch["calm"]) == len(batch["row"]) == len(batch["target"])
    assert_same(batches, load(good))


def test_a_batch_of_failures_is_empty():
    batches = list(load(FakeIndex([b"bad"] * 5), batch_size=4))
    assert [len(batch["failed"]) for batch in batches] == [4, 1]
    for batch in batches:
        assert batch["image"].shape == (0, 3, 16, 12) and len(batch["row"]) == len(batch["target"]) == 0


def test_a_process_without_a_sample_in_the_last_batch_gets_an_empty_one():
    parts = [list(load(FakeIndex(pictures(9)), rank=rank, world=2)) for rank in range(2)]
    assert [len(part[-1]["row"]) for part in parts] == [1, 0]
    assert parts[1][-1]["image"].shape == (0, 3, 16, 12)


def test_no_rows():
    assert list(load(FakeIndex(pictures(3)), np.array([], np.int64))) == []


def test_the_cache_changes_nothing_and_saves_decoding(tmp_path):
    index = Counting(pictures(30, ("JPEG", "PNG")))
    plain = list(load(index)), list(load(index, epoch=1))
    cache = PixelCache(tmp_path / "pixels.bin", 10, rows=30, fingerprint="")
    assert_same(load(index, cache=cache), plain[0])
    index.reads.clear()
    assert_same(load(index, epoch=1, cache=cache), plain[1])
    assert index.reads == []
    (tmp_path / "small").mkdir()
    size = 1400 * 1000 * 3  # of a bound of 5 MB, so one fits
    large = FakeIndex([io_bytes(np.full((1000, 1400, 3), value, np.uint8)) for value in (1, 2)])
    cache = PixelCache(tmp_path / "small" / "pixels.bin", 5, rows=2, fingerprint="")
    for _ in range(2):
        assert_same(load(large, cache=cache), load(large))
    assert cache.used() == size


def io_bytes(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_arrays_of_one_size_go_together_or_alone_alike():
    """Grouping small arrays is only a matter of speed."""
    arrays = [np.random.default_rng(n).integers(0, 256, (10, 10), dtype=np.uint8) for n in range(16)]
    odd = [array if n % 2 else array[:, :9] for n, array in enumerate(arrays)]
    for policy in ("shift", "crop", "none"):
        looks = views({"image": "train"}, policy=policy)
        (mixed,) = load(FakeIndex(odd), looks=looks, batch_size=16, shuffle=False)
        (same,) = load(FakeIndex(arrays), looks=looks, batch_size=16, shuffle=False)
        assert torch.equal(mixed["image"][1::2], same["image"][1::2])
        assert not torch.equal(mixed["image"][::2], same["image"][::2])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_that_dies_is_one_clear_error():
    index = FakeIndex([*pictures(12), b"die", *pictures(3)])
    looks = {"image": EvalView(PREPROCESS)}
    with pytest.raises(RunError, match=r"loader worker died.*train.workers") as caught:
        list(load(index, looks=looks, batch_size=4, shuffle=False, workers=1))
    assert "\n" not in str(caught.value)


def test_stopping_early_leaves_no_worker():
    batches = iter(load(FakeIndex(pictures(32)), batch_size=2, workers=1))
    next(batches)
    worker = _workers()
    assert worker
    batches.close()
    assert not _workers() & worker


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_reader_leaves_neither_workers_nor_their_server(tmp_path):
    program = tmp_path / "reader.py"
    program.write_text(
        "import multiprocessing, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_loader import FakeIndex, load, pictures\n"
        "if __name__ == '__main__':\n"
        "    batches = iter(load(FakeIndex(pictures(32)), batch_size=2, workers=1))\n"
        "    next(batches)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as reader:
        (worker,) = (int(pid) for pid in reader.stdout.readline().split())
        server = int(_status(worker)[1])
        assert server != reader.pid
        reader.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (_runs(worker) or _runs(server)):
        time.sleep(0.1)
    assert not _runs(worker)
    assert not _runs(server)


def _status(pid):
    """State and parent of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]


def _runs(pid):
    try:
        return _status(pid)[0] != "Z"  # ended, and nobody has asked how
    except (FileNotFoundError, ProcessLookupError):
        return False


def _workers():
    import multiprocessing

    return {child.pid for child in multiprocessing.active_children()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"rank": 2, "world": 2}, "rank = 2 of world = 2"),
        ({"workers": -1}, "train.workers = -1"),
        ({"epoch": -1}, "epoch = -1"),
        ({"first_batch": 4}, "first_batch = 4 is not in 0 to 3"),
        ({"rows": np.array([3, 20])}, "from 0 to 19"),
        ({"rows": np.array([-1])}, "from 0 to 19"),
        ({"rows": np.array([[1]])}, "from 0 to 19"),
        ({"weights": np.ones(3)}, "20 numbers"),
        ({"weights": -np.ones(20)}, "20 numbers"),
        ({"weights": np.zeros(20)}, "20 numbers"),
        ({"weights": np.full(20, np.nan)}, "20 numbers"),
        ({"weights": np.ones(20), "shuffle": False}, "shuffle=True"),
        ({"looks": {"row": EvalView(PREPROCESS)}}, "none named target"),
        ({"looks": {"a": EvalView(PREPROCESS), "b": EvalView(PREPROCESS, max_pixels=9)}}, "differ in background"),
    ],
)
def test_errors(options, words):
    with pytest.raises(InputError, match=words):
        load(FakeIndex(pictures(20)), **options)


def test_a_cache_of_another_index(tmp_path):
    cache = PixelCache(tmp_path / "pixels.bin", 1, rows=7, fingerprint="")
    with pytest.raises(InputError, match="for 7 images, the index has 20"):
        load(FakeIndex(pictures(20)), cache=cache)


MEMORY = """
import resource, sys
import numpy as np
import simplejpeg
from vitrail.data.cache import PixelCache
from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import TrainView
from vitrail.training.recipe import AugmentConfig

class Endless:
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def key(self, row): return str(row)
    def targets(self, rows): return np.asarray(rows) % 2
    def read(self, row): return simplejpeg.encode_jpeg(np.full((48, 48, 3), row % 256, np.uint8))

view = TrainView(Preprocess((32, 32)), AugmentConfig(policy="crop", flip=0.5))
for count in (300, 2300):
    index = Endless(count)
    cache = PixelCache(f"{sys.argv[1]}/{count}", 200, rows=count, fingerprint="")
    for epoch in range(2):
        loader = make_loader(index, np.arange(count), {"image": view}, batch_size=64, shuffle=True, cache=cache)
        for batch in loader:
            pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_images(tmp_path):
    """2,000 images more are 14 MB more of pixels, of which none stays in memory."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    few, many = (int(line) for line in output.split())
    assert many - few < 5_000, "kilobytes"
