"""Checkpoints: atomic, verified, bounded in number."""

import errno
import os
import resource
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.errors import RunError
from vitrail.training.checkpoint import Checkpoints


def state(value=0.0):
    return {"method": {"a": torch.full((300, 7), value), "b": torch.arange(5)}, "progress": "{}", "ema": None}


def never(text):
    raise AssertionError(text)


def test_keeps_the_last_two_and_what_is_asked(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints")
    assert kept.latest(never) is None
    for step in range(6):
        kept.save(step, state(step), also=[1])
    assert kept.steps() == [5, 4, 1]
    assert kept.latest(never)["method"]["a"][0, 0] == 5
    assert sorted(path.name for path in kept.folder.iterdir()) == [f"step-0000000{step}.pt" for step in (1, 4, 5)]


@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_changes_what_is_read(tmp_path_factory, place, bit):
    kept = Checkpoints(tmp_path_factory.mktemp("flip"))
    kept.save(1, state(1.0))
    content = bytearray(kept.path(1).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    kept.path(1).write_bytes(bytes(content))
    try:
        read = kept.load(1)
    except RunError as error:
        assert "is damaged" in str(error)
    else:  # padding between the tensors, or a date
        assert torch.equal(read["method"]["a"], state(1.0)["method"]["a"])
        assert torch.equal(read["method"]["b"], state(1.0)["method"]["b"])


@pytest.mark.parametrize("size", [0, 1, 500, 4000])
def test_truncated(tmp_path, size):
    kept = Checkpoints(tmp_path)
    kept.save(1, state(1.0))
    kept.save(2, state(2.0))
    kept.path(2).write_bytes(kept.path(2).read_bytes()[:size])
    told = []
    assert kept.latest(told.append)["method"]["a"][0, 0] == 1
    assert "step-00000002.pt is damaged" in told[0]


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    kept = Checkpoints(tmp_path)
    torch.save({"method": Evil()}, kept.path(3))
    with pytest.raises(RunError, match="is damaged"):
        kept.load(3)
    assert not (tmp_path / "ran").exists()


def assert_intact(kept):
    assert kept.steps() == [1]
    assert kept.latest(never)["method"]["a"][0, 0] == 1
    assert [path.name for path in kept.folder.iterdir()] == ["step-00000001.pt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk(tmp_path, monkeypatch, code):
    kept = Checkpoints(tmp_path)
    kept.save(1, state(1.0))

    class Full:
        def write(self, data):
            raise OSError(code, os.strerror(code))

        def flush(self):
            pass

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda values, file: save(values, Full()))
    with pytest.raises(RunError, match=r"cannot write .*step-00000002.pt: .*intact"):
        kept.save(2, state(2.0))
    monkeypatch.undo()
    assert_intact(kept)


def test_a_file_that_may_not_grow(tmp_path):
    """The system itself refuses, in the middle of the file."""
    kept = Checkpoints(tmp_path)
    kept.save(1, state(1.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*step-00000002.pt: File too large.*intact"):
            kept.save(2, state(2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert_intact(kept)
