import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest

from vitrail.data import cache as module
from vitrail.data.cache import PixelCache
from vitrail.errors import InputError


def image(seed, height=20, width=30):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def open_cache(folder, bound_mb=1, rows=100, fingerprint="a"):
    return PixelCache(folder / "cache" / "pixels.bin", bound_mb, rows=rows, fingerprint=fingerprint)


def test_what_goes_in_comes_out(tmp_path):
    cache = open_cache(tmp_path)
    sizes = [(1, 1), (20, 30), (3, 200), (64, 64)]
    for row, size in enumerate(sizes):
        assert cache.get(row) is None
        assert cache.put(row, image(row, *size))
        assert not cache.put(row, image(99, *size)), "stored twice"
    for row, size in enumerate(sizes):
        assert np.array_equal(cache.get(row), image(row, *size))
    assert cache.used() == sum(3 * h * w for h, w in sizes)
    assert cache.put(50, image(1)[::-1, ::2]) and np.array_equal(cache.get(50), image(1)[::-1, ::2])


def test_shared_by_objects_pickled_and_opened_again(tmp_path):
    first = open_cache(tmp_path)
    second, third = open_cache(tmp_path), pickle.loads(pickle.dumps(first))
    first.put(3, image(3))
    for cache in (second, third):
        assert np.array_equal(cache.get(3), image(3))
        assert not cache.put(3, image(4))
    assert len(pickle.dumps(first)) < 2000


def test_bounded(tmp_path):
    cache = open_cache(tmp_path, bound_mb=1)
    size = image(0, 300, 400).nbytes
    stored = [cache.put(row, image(row, 300, 400)) for row in range(6)]
    assert stored == [True, True, False, False, False, False]
    assert cache.put(7, image(7)), "a smaller one still fits"
    assert 2 * size <= cache.used() <= 2**20
    assert cache.path.stat().st_size < 2**20 + 4096
    assert cache.get(3) is None and np.array_equal(cache.get(1), image(1, 300, 400))


@pytest.mark.parametrize("change", [{"fingerprint": "b"}, {"rows": 101}, {"bound_mb": 2}])
def test_started_afresh_when_the_index_changes(tmp_path, change):
    old = open_cache(tmp_path)
    old.put(0, image(0))
    new = open_cache(tmp_path, **change)
    assert new.get(0) is None and new.used() == 0
    assert np.array_equal(old.get(0), image(0)), "who still uses the old file keeps it"


def test_started_afresh_after_the_machine_went_down(tmp_path, monkeypatch):
    open_cache(tmp_path).put(0, image(0))
    assert open_cache(tmp_path).get(0) is not None
    monkeypatch.setattr(module, "_boot", lambda: "another")
    assert open_cache(tmp_path).get(0) is None


@pytest.mark.parametrize("damage", [b"", b"x" * 10, b"x" * 5000])
def test_a_damaged_file_is_started_afresh(tmp_path, damage):
    path = open_cache(tmp_path).path
    path.write_bytes(damage)
    cache = open_cache(tmp_path)
    assert cache.get(0) is None and cache.put(0, image(0)) and np.array_equal(cache.get(0), image(0))


@pytest.mark.parametrize("writes", range(5))
def test_killed_at_any_write_leaves_no_half_image(tmp_path, writes):
    """A process dies after its first, second ... write of an entry."""
    cache = open_cache(tmp_path)
    cache.put(0, image(0))
    child = multiprocessing.get_context("fork").Process(target=_die_after, args=(cache, writes))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    after = open_cache(tmp_path)
    assert after.get(1) is None or np.array_equal(after.get(1), image(1))
    assert np.array_equal(after.get(0), image(0))
    assert after.put(2, image(2)) and np.array_equal(after.get(2), image(2))
    again = after.get(1)
    assert again is None or np.array_equal(again, image(1))


def _die_after(cache, writes):
    true, done = os.pwrite, 0

    def write(file, data, offset):
        nonlocal done
        if done == writes:
            true(file, bytes(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return true(file, data, offset)

    os.pwrite = write
    cache.put(1, image(1))


def test_a_full_disk_is_no_error(tmp_path, monkeypatch):
    cache = open_cache(tmp_path)
    true = os.pwrite

    def full(file, data, offset):
        if len(data) > 100:
            raise OSError(28, "No space left on device")
        return true(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    assert not cache.put(0, image(0))
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: true(file, bytes(data)[:200], offset))
    assert not cache.put(1, image(1))
    monkeypatch.undo()
    assert cache.get(0) is None and cache.get(1) is None and cache.put(2, image(2))


def test_many_processes_write_at_once(tmp_path):
    cache = open_cache(tmp_path, rows=60)
    children = [multiprocessing.get_context("fork").Process(target=_fill, args=(cache, start)) for start in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    for row in range(60):
        assert np.array_equal(cache.get(row), image(row))
    assert cache.used() == 60 * image(0).nbytes


def _fill(cache, start):
    used = cache.used

    def slow():  # leaves the others time to take the same place
        found = used()
        time.sleep(0.001)
        return found

    cache.used = slow
    for row in np.random.default_rng(start).permutation(60).tolist():
        found = cache.get(row)
        if found is None:
            cache.put(row, image(row))
        elif not np.array_equal(found, image(row)):
            os._exit(1)


def test_errors(tmp_path):
    with pytest.raises(InputError, match="cache_mb = 0"):
        open_cache(tmp_path, bound_mb=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the cache"):
        PixelCache(tmp_path / "file" / "pixels.bin", 1, rows=3, fingerprint="")
