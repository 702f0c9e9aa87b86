"""Killed at any moment, a run goes on to the same bits."""

import json
import os
import signal
import warnings

import pytest
import torch
from small_runs import PREPROCESS, MemoryIndex, TinyNet, folder, recipe

from vitrail.errors import RunError
from vitrail.methods.supervised.supervised import Supervised
from vitrail.training import checkpoint
from vitrail.training.train import train

INDEX = MemoryIndex(77, 21)
OPTIONS = {
    "train__epochs": 3,
    "train__ema": 0.9,
    "train__accumulate": 2,
    "train__checkpoint_seconds": 0.0,
    "augment__mixup": 0.2,
    "augment__cutmix": 1.0,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork


class Killed(Supervised):
    """Kills its process after some step."""

    def __init__(self, step=None):
        torch.manual_seed(0)
        super().__init__(TinyNet(drop=0.3))
        self.step, self.steps = step, 0

    def after_step(self):
        self.steps += 1
        if self.steps == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(path, trained, workers=0, events=None, **options):
    options = {**OPTIONS, "train__workers": workers, **options}
    return train(trained, INDEX, PREPROCESS, recipe(**options), folder(path), events=events)


def in_child(work):
    """Run ``work`` in a fork and return the signal that ended it, 0 if none did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def untimed(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, its final state, its history."""
    path = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    result = run(path, Killed())
    return path, result


def assert_same(path, result, whole):
    other_path, other = whole
    assert result.steps == other.steps
    for name, value in other.method.state_dict().items():
        assert torch.equal(result.method.state_dict()[name], value), name
    name = f"step-{other.steps:08}.pt"
    mine, theirs = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (path, other_path))
    for part in ("method", "ema"):
        for key, value in theirs[part].items():
            assert torch.equal(mine[part][key], value), key
    for number, state in theirs["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(mine["optimizer"]["state"][number][key], value), key
    assert untimed(path) == untimed(other_path)
    assert result.figures == other.figures


def test_killed_again_and_again(tmp_path, whole):
    """Before the first checkpoint, in the middle of an epoch, at its end, in the last step."""
    for step in (1, 3, 3, 5):
        assert in_child(lambda step=step: run(tmp_path, Killed(step))) == signal.SIGKILL
    assert_same(tmp_path, run(tmp_path, Killed()), whole)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 0)])
def test_killed_with_loader_workers(tmp_path, whole, first, then):
    assert in_child(lambda: run(tmp_path, Killed(8), workers=first)) == signal.SIGKILL
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps()[0] == 7
    assert in_child(lambda: run(tmp_path, Killed(), workers=then)) == 0
    assert_same(tmp_path, run(tmp_path, Killed()), whole)


def test_killed_while_a_checkpoint_is_written(tmp_path, whole, monkeypatch):
    def torn(state, file):
        file.write(b"PK" * 1000)
        file.flush()
        if json.loads(state["progress"])["step"] == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        file.seek(0)
        file.truncate()
        torch.save(state, file)

    monkeypatch.setattr(checkpoint, "_write", torn)
    assert in_child(lambda: run(tmp_path, Killed())) == signal.SIGKILL
    monkeypatch.undo()
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps()[0] == 5
    assert_same(tmp_path, run(tmp_path, Killed()), whole)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_killed_with_patience(tmp_path):
    """Best validation and patience are taken up too."""
    options = {"train__epochs": 30, "train__patience": 3, "optim__lr": 0.001, "train__checkpoint_seconds": 60.0}
    whole = run(tmp_path / "whole", Killed(), **options)
    assert in_child(lambda: run(tmp_path / "cut", Killed(whole.steps - 7), **options)) == signal.SIGKILL
    cut = run(tmp_path / "cut", Killed(), **options)
    assert (cut.steps, cut.stopped, cut.figures) == (whole.steps, "patience", whole.figures)
    for name, value in whole.method.state_dict().items():
        assert torch.equal(cut.method.state_dict()[name], value), name


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole, damage):
    assert in_child(lambda: run(tmp_path, Killed(8))) == signal.SIGKILL
    newest = tmp_path / "checkpoints" / "step-00000007.pt"
    spoil(newest, damage)
    told = []
    result = run(tmp_path, Killed(), events=told.append)
    warnings = [event["text"] for event in told if event["event"] == "warning"]
    assert len(warnings) == 1
    assert "step-00000007.pt is damaged" in warnings[0]
    assert next(event for event in told if event["event"] == "start")["step"] == 6
    assert_same(tmp_path, result, whole)


def spoil(path, damage):
    content = bytearray(path.read_bytes())
    if damage == "flip":
        # So many that some are content: between small tensors lie headers and padding, whose bits mean nothing.
        middle = len(content) // 2
        content[middle : middle + 1000] = bytes(value ^ 16 for value in content[middle : middle + 1000])
    path.write_bytes({"flip": bytes(content), "truncate": bytes(content[:-700]), "empty": b""}[damage])


def test_all_checkpoints_damaged(tmp_path):
    assert in_child(lambda: run(tmp_path, Killed(8))) == signal.SIGKILL
    for path in (tmp_path / "checkpoints").iterdir():
        spoil(path, "empty")
    with pytest.raises(RunError, match=r"all checkpoints in .*checkpoints are damaged; put a copy back, or delete"):
        run(tmp_path, Killed())


def test_a_damaged_best_checkpoint_ships_the_last(tmp_path):
    options = {"train__epochs": 30, "train__patience": 3, "optim__lr": 0.001}
    result = run(tmp_path, Killed(), **options)
    best = next(line["step"] for line in result.history if line.get("top1") == result.figures["top1"])
    spoil(tmp_path / "checkpoints" / f"step-{best:08}.pt", "flip")
    told = []
    again = run(tmp_path, Killed(), events=told.append, **options)
    assert "the last weights ship instead of the best" in told[0]["text"]
    assert again.figures["top1"] == result.history[-1]["top1"]
