import itertools

import numpy as np
import pytest

from vitrail.compress.allocate import Limit, allocate
from vitrail.errors import InputError, VitrailError


def brute_force(objective, limits):
    """Every choice there is; the least objective among those that keep all limits."""
    best = None
    for choice in itertools.product(*(range(len(options)) for options in objective)):
        if all(sum(costs[k] for costs, k in zip(limit.costs, choice)) <= limit.most + 1e-9 for limit in limits):
            value = sum(options[k] for options, k in zip(objective, choice))
            best = value if best is None else min(best, value)
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("limited", [1, 2, 3])
def test_equals_brute_force(seed, limited):
    rng = np.random.default_rng([seed, limited])
    counts = rng.integers(1, 5, rng.integers(1, 7)).tolist()
    objective = [rng.normal(size=count).tolist() for count in counts]
    limits = []
    for number in range(limited):
        costs = [(rng.uniform(0, 1, count) * 10.0 ** rng.integers(-3, 7)).tolist() for count in counts]
        low, high = sum(map(min, costs)), sum(map(max, costs))
        limits.append(Limit(f"cost {number}", costs, low + rng.uniform(0.2, 0.9) * (high - low)))
    expected = brute_force(objective, limits)
    if expected is None:
        with pytest.raises(VitrailError, match="no choice keeps all"):
            allocate(objective, limits)
        return
    choice = allocate(objective, limits)
    assert sum(options[k] for options, k in zip(objective, choice)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for limit in limits:
        assert sum(costs[k] for costs, k in zip(limit.costs, choice)) <= limit.most * (1 + 1e-9)


def test_a_limit_may_be_met_exactly():
    sizes = [[0.1, 0.2], [0.1, 0.2], [0.1, 0.2]]
    assert sum(allocate([[1.0, 0.0]] * 3, [Limit("bytes", sizes, 0.1 + 0.2 + 0.2)])) == 2
    assert allocate([[1.0, 0.0]] * 3, [Limit("bytes", sizes, 0.3)]) == [0, 0, 0]


def test_small_losses_are_not_lost_in_the_tolerance():
    # 1e-6 apart beside a loss of 1: a gap of 1e-4, the solver's usual one, would take either.
    objective = [[1.0, 2.0]] + [[1e-6, 0.0]] * 4
    choice = allocate(objective, [Limit("bytes", [[1.0, 0.0]] * 5, 5.0)])
    assert choice == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e6])
def test_losses_of_any_size_are_told_apart(size):
    objective = [[size * loss, 0.0] for loss in (3.0, 1.0, 2.0, 2.9)]
    assert allocate(objective, [Limit("bytes", [[0.0, 1.0]] * 4, 2.0)]) == [1, 0, 0, 1]


def test_a_limit_missed_by_a_hair_is_not_kept():
    # Less than the solver's tolerance, which takes all three.
    sizes = [[0.0, 1.0]] * 3
    choice = allocate([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]], [Limit("bytes", sizes, 3.0 - 1e-7)])
    assert choice == [0, 1, 1]


def test_without_a_limit_each_layer_takes_its_best():
    assert allocate([[3.0, 1.0, 2.0], [0.0], [5.0, 4.0]], []) == [1, 0, 1]


def test_what_cannot_be_kept_is_named_with_the_least():
    with pytest.raises(VitrailError, match=r"bytes of at most 3 cannot be kept: the least is 4"):
        allocate([[0.0, 1.0], [0.0]], [Limit("bytes", [[2.0, 9.0], [2.0]], 3.0)])
    both = [Limit("bytes", [[0.0, 1.0]], 0.5), Limit("bitops", [[1.0, 0.0]], 0.5)]
    with pytest.raises(VitrailError, match=r"bytes <= 0.5, bitops <= 0.5"):
        allocate([[0.0, 0.0]], both)


@pytest.mark.parametrize(
    ("objective", "costs", "message"),
    [
        ([], [], "nothing to allocate"),
        ([[1.0]], [[1.0, 2.0]], "objective's shape"),
        ([[np.nan]], [[1.0]], "not finite"),
    ],
)
def test_tables_that_do_not_fit_are_refused(objective, costs, message):
    with pytest.raises(InputError, match=message):
        allocate(objective, [Limit("bytes", costs, 1.0)])
