import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.errors import InputError
from vitrail.evaluate.paired import holm, paired_bootstrap


def simulated(rng, effect, seeds, images, seed_spread):
    truth = rng.uniform(0.2, 0.9, images)
    ours = rng.random((seeds, images)) < truth + effect + rng.normal(0, seed_spread, (seeds, 1))
    theirs = rng.random((seeds, images)) < truth + rng.normal(0, seed_spread, (seeds, 1))
    return ours, theirs


@pytest.mark.parametrize("seed_spread", [0.0, 0.03])
def test_the_interval_covers_as_often_as_it_says(seed_spread):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(120):
        found = paired_bootstrap(*simulated(rng, 0.05, 3, 400, seed_spread))
        covered += found.low <= 0.05 <= found.high
    # 95 % of 120 is 114; fewer than 105 would come about by chance once in ten thousand times.
    assert covered >= 105


def test_a_large_effect_is_seen_and_none_is_not():
    rng = np.random.default_rng(2)
    clear = paired_bootstrap(*simulated(rng, 0.2, 3, 500, 0.0))
    assert clear.low > 0.05
    assert clear.p < 0.01
    same = rng.random((3, 500)) < 0.7
    none = paired_bootstrap(same, same)
    assert (none.mean, none.low, none.high, none.p) == (0, 0, 0, 1)


def test_the_mean_is_the_mean_and_the_sign_is_ours_less_theirs():
    ours, theirs = np.array([[1, 1, 1, 0]]), np.array([[0, 1, 0, 0]])
    found = paired_bootstrap(ours, theirs)
    assert found.mean == 0.5
    swapped = paired_bootstrap(theirs, ours)
    assert swapped.mean == -0.5
    assert swapped.low == pytest.approx(-found.high, abs=0.26)


def test_images_that_belong_together_count_once():
    rng = np.random.default_rng(3)
    ours, theirs = simulated(rng, 0.05, 1, 100, 0.0)
    groups = np.repeat(np.arange(100), 20)
    copied = paired_bootstrap(np.repeat(ours, 20, 1), np.repeat(theirs, 20, 1), groups)
    once = paired_bootstrap(ours, theirs)
    pretended = paired_bootstrap(np.repeat(ours, 20, 1), np.repeat(theirs, 20, 1))
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.1)
    assert pretended.high - pretended.low < 0.4 * (once.high - once.low)


def test_seeds_that_disagree_widen_the_interval():
    base = np.zeros((3, 300))
    ours = np.repeat([[0.0], [0.1], [0.2]], 300, axis=1)
    found = paired_bootstrap(ours, base)
    assert found.mean == pytest.approx(0.1)
    assert found.low < 0 < found.high  # Student's t of three such values: 0.1 +- 0.25


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=50)
def test_holm_against_its_definition(p_values):
    corrected = holm(p_values)
    ordered = sorted(p_values)
    count = len(p_values)
    for p, got in zip(p_values, corrected, strict=True):
        rank = ordered.index(p)
        # Equal p-values share the largest of their corrected values.
        last = max(place for place, other in enumerate(ordered) if other == p)
        bounds = [min(1, max((count - j) * ordered[j] for j in range(place + 1))) for place in (rank, last)]
        assert got == pytest.approx(bounds[0]) or got == pytest.approx(bounds[1])
        assert got >= p - 1e-12


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="shapes"):
        paired_bootstrap(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(InputError, match="shapes"):
        paired_bootstrap(np.zeros((0, 3)), np.zeros((0, 3)))
