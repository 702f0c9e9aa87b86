"""What must meet a constraint does so after every step, and in the moving average of the weights."""

import pytest
import torch
from small_runs import PREPROCESS, MemoryIndex, TinyNet, folder, recipe
from torch import nn

from vitrail.edits.grassmann_classes import GrassmannHead, drift
from vitrail.edits.unit_sphere_classes import UnitSphereHead
from vitrail.methods.supervised.supervised import Supervised
from vitrail.training.train import train


class Interrupted(Exception):
    pass


class Watched(Supervised):
    """Notes what a step finds, and stops before the step ``stop``."""

    def __init__(self, model, stop=None):
        super().__init__(model, smoothing=0.0)
        self.stop, self.steps, self.met = stop, 0, []

    def after_step(self):
        self.steps += 1
        if self.steps == self.stop:
            raise Interrupted
        self.met.append(off(self.model.head))


def off(head):
    if isinstance(head, GrassmannHead):
        return drift(head.weight)
    return float((head.weight.detach().norm(dim=1) - 1).abs().max())


def watched(kind, **options):
    torch.manual_seed(0)
    model = TinyNet()
    model.head = GrassmannHead(8, 3, k=2) if kind is GrassmannHead else UnitSphereHead(8, 3, embed_dim=4)
    return Watched(model, **options)


def run(method, path, **overrides):
    settings = {"optim__lr": 0.05, "train__ema": 0.5, "train__checkpoint_seconds": 0.001, **overrides}
    return train(method, MemoryIndex(64, 16), PREPROCESS, recipe(**settings), folder(path))


@pytest.mark.parametrize("kind", [GrassmannHead, UnitSphereHead])
def test_each_step_and_the_moving_average_meet_the_constraint(kind, tmp_path):
    method = watched(kind)
    ours = run(method, tmp_path / "whole")
    assert len(method.met) == 8
    assert max(method.met) < 1e-5
    assert off(ours.model.head) < 1e-5
    assert isinstance(ours.model.head, kind)
    # The average is another net than the last one, which is what a run without it ships.
    last = run(watched(kind), tmp_path / "last", train__ema=0.0)
    assert not torch.allclose(last.model.head.weight, ours.model.head.weight, atol=1e-3)


@pytest.mark.parametrize("kind", [GrassmannHead, UnitSphereHead])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(kind, tmp_path):
    whole = run(watched(kind), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(watched(kind, stop=6), tmp_path / "cut")
    resumed = run(watched(kind), tmp_path / "cut")
    assert resumed.steps == whole.steps
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_module_of_the_method_is_constrained_too(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def constrain(self):
            self.calls += 1

    method = watched(GrassmannHead)
    method.extra = Counting()
    run(method, tmp_path)
    assert method.extra.calls == 8
