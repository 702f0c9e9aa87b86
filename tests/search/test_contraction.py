from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.search import contraction
from vitrail.search.contraction import (
    Candidate,
    Factors,
    Limits,
    Step,
    contract,
    limits_between,
    parameters,
    propose,
    throughput,
)

SMALL = Factors((16, 32, 48), (1, 2, 2), (4, 4, 3), conv_ratio=2.0, mlp_ratio=3.0, head_dim=16)


def size(factors):
    """Return a cost that every notch lowers."""
    widths = sum(w * n for w, n in zip(factors.embed_dims, factors.depths))
    return widths * (factors.conv_ratio + factors.mlp_ratio) + sum(factors.window_sizes[1:]) + factors.head_dim


def speed(factors):
    return 1e4 / size(factors)


def test_the_published_family_has_these_factors():
    with torch.device("meta"):
        smallest = replace(Factors(), embed_dims=(64, 128, 160, 320))
        assert parameters("tiny_vit_21m_224", smallest) == 5_392_764


def test_every_factor_is_lowered_by_one_notch():
    assert SMALL.smaller() == [
        replace(SMALL, embed_dims=(16, 16, 48)),
        replace(SMALL, depths=(1, 1, 2)),
        replace(SMALL, window_sizes=(4, 2, 3)),
        replace(SMALL, embed_dims=(16, 32, 32)),
        replace(SMALL, depths=(1, 2, 1)),
        replace(SMALL, window_sizes=(4, 4, 2)),
        replace(SMALL, conv_ratio=1.0),
        replace(SMALL, mlp_ratio=2.0),
        replace(SMALL, head_dim=8),
    ]
    assert Factors((8, 8), (1, 1), (1, 1), conv_ratio=1.0, mlp_ratio=1.5, head_dim=8).smaller() == []
    narrow = replace(SMALL, embed_dims=(40, 48, 48))
    assert {net.embed_dims for net in narrow.smaller()} == {(40, 48, 48), (24, 48, 48)}


def test_the_factors_make_the_net():
    model = create_model("tinyvit_nano", num_classes=3, **SMALL.options())
    assert [stage.blocks[0].num_heads for stage in model.stages[1:]] == [2, 3]
    assert [len(stage.blocks) for stage in model.stages] == [1, 2, 2]
    assert [stage.blocks[0].window_size for stage in model.stages[1:]] == [4, 3]
    assert model.stages[2].blocks[0].mlp.fc1.out_features == 3 * 48
    assert model.stages[0].blocks[0].conv1.conv.out_channels == 2 * 16
    assert model.num_features == 48
    assert throughput("tinyvit_nano", SMALL, size=16, batch=2, rounds=1) > 0


def test_throughput_is_images_over_the_fastest_pass(monkeypatch):
    clock = iter([0.0, 4.0, 4.0, 6.0, 6.0, 9.0])
    monkeypatch.setattr(contraction, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert throughput("tinyvit_nano", SMALL, size=16, batch=3, rounds=3) == 1.5


def test_limits_fall_by_equal_factors():
    found = limits_between(Limits(800, 10.0), Limits(100, 80.0), 3)
    assert [(round(one.params), round(one.throughput)) for one in found] == [(400, 20), (200, 40), (100, 80)]
    kept = limits_between(Limits(50, 90.0), Limits(100, 80.0), 2)[0]
    assert (round(kept.params), round(kept.throughput)) == (100, 80)
    assert limits_between(Limits(100, 90.0), Limits(25), 2) == [Limits(50), Limits(25)]


@pytest.mark.parametrize(("limits", "asked"), [(Limits(500), "params"), (Limits(1e9, 1e4 / 500), "speed")])
def test_candidates_are_the_first_nets_within_the_limits(limits, asked):
    found = propose(SMALL, limits, size, speed, 6, np.random.default_rng(0))
    assert len(set(found)) == len(found) == 6, asked
    # All nets that lowering notch by notch, as far as the limits are not kept, can end at.
    ends, seen, open_ends = set(), set(), [SMALL]
    while open_ends:
        net = open_ends.pop()
        if net in seen:
            continue
        seen.add(net)
        if size(net) <= limits.params and speed(net) >= limits.throughput:
            ends.add(net)
        else:
            open_ends += net.smaller()
    assert set(found) <= ends
    assert propose(SMALL, limits, size, speed, 6, np.random.default_rng(0)) == found
    assert propose(SMALL, limits, size, speed, 6, np.random.default_rng(1)) != found


def test_what_is_too_large_is_not_timed():
    timed = []

    def slow(factors):
        timed.append(factors)
        return speed(factors)

    propose(SMALL, Limits(500, 1.0), size, slow, 4, np.random.default_rng(0))
    assert timed
    assert all(size(net) <= 500 for net in timed)


def test_a_net_within_the_limits_is_its_own_only_candidate():
    assert propose(SMALL, Limits(1e9), size, speed, 4, np.random.default_rng(0)) == [SMALL]


def test_each_step_begins_at_the_best_of_the_one_before():
    begun, scored = [], []

    def score(factors):
        scored.append(factors)
        return sum(factors.depths) + factors.mlp_ratio / 10

    target = Limits(size(SMALL) / 4, 4 * speed(SMALL))
    steps = contract(SMALL, target, size, speed, score, steps=2, candidates=5, seed=3)
    assert [step.limits for step in steps] == limits_between(Limits(size(SMALL), speed(SMALL)), target, 2)
    assert [one.factors for step in steps for one in step.candidates] == scored
    for step in steps:
        assert all(size(one.factors) <= step.limits.params for one in step.candidates)
        assert all(speed(one.factors) >= step.limits.throughput for one in step.candidates)
        assert step.best.score == max(one.score for one in step.candidates) == score(step.best.factors)
    rng = np.random.default_rng(3)
    for step, start in zip(steps, (SMALL, steps[0].best.factors)):
        begun.append(propose(start, step.limits, size, speed, 5, rng))
    assert begun == [[one.factors for one in step.candidates] for step in steps]


def test_no_number_is_worse_than_any():
    nan, low, high = (Candidate(SMALL, score) for score in (float("nan"), -1.0, 2.0))
    assert Step(Limits(1), [nan, low, high, Candidate(Factors(), 2.0)]).best is high
    assert Step(Limits(1), [nan, low]).best is low


@pytest.mark.parametrize(
    ("fire", "message"),
    [
        (partial(Factors, (8, 16), (1,), (4, 4)), r"depths = \(1,\).*one of each for every stage"),
        (partial(Factors, (32,), (0,), (4,)), "a factor of 0 is not allowed: give 1 or more"),
        (partial(Factors, (32, 48), (1, 1), (4, 4)), "head_dim = 32 does not divide a width of 48"),
        (partial(limits_between, Limits(9), Limits(3), 0), "steps = 0 to params = 3"),
        (partial(limits_between, Limits(9), Limits(0.5), 1), "steps = 1 to params = 0.5"),
        (partial(contract, SMALL, Limits(9), size, speed, size, candidates=0), "candidates = 0 is not allowed"),
        (partial(contract, SMALL, Limits(9), size, speed, size), "no net of at most .* give wider limits"),
    ],
)
def test_what_cannot_be_contracted_is_explained(fire, message):
    with pytest.raises(InputError, match=message):
        fire()
