"""The measured probe."""

import pytest
import torch
from small_runs import PREPROCESS, TinyNet, method, recipe

from vitrail.errors import RunError
from vitrail.methods.supervised.supervised import Supervised
from vitrail.training import probe
from vitrail.training.probe import largest_batch, measure_step


def test_measuring_leaves_no_trace():
    trained = method(drop=0.5)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    measured = measure_step(trained, recipe(train__accumulate=2, train__precision="bf16"), PREPROCESS, 8, steps=2)
    assert measured.batch_size == 8
    assert measured.seconds_per_image > 0
    assert measured.peak_bytes > 10**6
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in trained.parameters())


class Hungry(Supervised):
    """Runs out of memory beyond some batch size, in torch's words."""

    most = 40

    def loss(self, batch):
        if len(batch["target"]) > self.most:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return super().loss(batch)


@pytest.mark.parametrize(("most", "found"), [(1, 1), (2, 2), (40, 32), (10**6, 128)])
def test_largest_batch(most, found):
    trained = Hungry(TinyNet(norm=False))
    trained.most = most
    assert largest_batch(trained, recipe(), PREPROCESS, limit=128, step_seconds=1e9).batch_size == found


def test_not_even_one_image_fits():
    trained = Hungry(TinyNet())
    trained.most = 0
    with pytest.raises(RunError, match=r"out of memory with a single image of 8x8 pixels; choose a smaller model.name"):
        largest_batch(trained, recipe(), PREPROCESS)


def test_other_failures_are_not_hidden():
    class Broken(Supervised):
        def loss(self, batch):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        largest_batch(Broken(TinyNet()), recipe(), PREPROCESS)


def test_memory_that_would_run_out_is_foreseen(monkeypatch):
    """A process that takes too much memory is killed, so the next size must be foreseen."""

    def measured(method, recipe, preprocess, size, steps):
        return probe.Measured(size, 0.001, 10**9 + size * 10**6)

    monkeypatch.setattr(probe, "measure_step", measured)
    monkeypatch.setattr(probe, "free_memory", lambda: 100 * 10**6)
    assert largest_batch(method(), recipe(), PREPROCESS).batch_size == 64
    monkeypatch.setattr(probe, "free_memory", lambda: None)
    assert largest_batch(method(), recipe(), PREPROCESS, step_seconds=0.1).batch_size == 64


def test_free_memory():
    free = probe.free_memory()
    assert free is None or free > 10**7
