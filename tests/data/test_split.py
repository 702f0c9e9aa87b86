"""The split: everything assigned once, groups whole, classes in proportion, few moved by an addition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from vitrail.data.split import NONE, TEST, TRAIN, VAL, assign_splits, rank
from vitrail.errors import InputError


def one_hot(labels) -> csr_array:
    labels = np.asarray(labels)
    shape = (len(labels), int(labels.max()) + 1)
    return csr_array((np.ones(len(labels)), (np.arange(len(labels)), labels)), shape=shape)


def ranks(n: int, seed: int = 0) -> np.ndarray:
    return np.array([rank(f"image {k}", seed) for k in range(n)])


def assign(targets, groups=None, given=None, val=0.1, test=0.0, seed=0, order=None):
    n = targets.shape[0]
    return assign_splits(
        targets,
        np.arange(n) if groups is None else np.asarray(groups),
        ranks(n, seed) if order is None else order,
        np.full(n, NONE, np.int8) if given is None else np.asarray(given, np.int8),
        val_fraction=val,
        test_fraction=test,
    )


cases = st.integers(2, 150).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 4), min_size=n, max_size=n),
        st.lists(st.integers(0, max(1, n // 2)), min_size=n, max_size=n),
        st.lists(st.sampled_from([NONE, NONE, NONE, TRAIN, VAL, TEST]), min_size=n, max_size=n),
        st.booleans(),
        st.sampled_from([0.05, 0.1, 0.3, 0.5]),
        st.sampled_from([0.0, 0.1, 0.4]),
        st.integers(0, 3),
    )
)


@settings(max_examples=150)
@given(cases)
def test_invariants(case):
    labels, groups, given_splits, has_given, val, test, seed = case
    given_splits = np.array(given_splits if has_given else [NONE] * len(labels))
    groups = np.array(groups)
    splits = assign(one_hot(labels), groups, given_splits, val, test, seed)
    assert set(splits.tolist()) <= {TRAIN, VAL, TEST}
    assert (splits == assign(one_hot(labels), groups, given_splits, val, test, seed)).all()
    fixed = np.isin(given_splits, (VAL, TEST))
    assert (splits[fixed] == given_splits[fixed]).all()
    for group in np.unique(groups):  # among images whose split is drawn, no group straddles
        assert len(set(splits[(groups == group) & ~fixed].tolist())) <= 1
    if not has_given:  # every class is trained on
        assert set(np.array(labels)[splits == TRAIN]) == set(labels)
    if (given_splits == VAL).any():
        assert not (splits[~fixed] == VAL).any()
    if (given_splits == TEST).any() or test == 0:
        assert not (splits[~fixed] == TEST).any()


@settings(max_examples=60)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=8), st.sampled_from([0.05, 0.1, 0.25]), st.integers(0, 5))
def test_single_images_are_stratified_to_one(sizes, fraction, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    splits = assign(one_hot(labels), val=fraction, seed=seed)
    held = np.bincount(labels[splits == VAL], minlength=len(sizes))
    for size, count in zip(sizes, held):
        assert 1 <= count < size
        assert count == 1 or abs(count - fraction * size) < 1
    exact = round(fraction * sum(sizes))
    if all(size * fraction >= 1 for size in sizes):
        assert held.sum() == exact


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=3, max_size=60), st.integers(0, 5))
def test_groups_of_varied_size_come_near_the_share(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    splits = assign(one_hot(np.zeros(len(groups), int)), groups, val=0.2, seed=seed)
    held = int((splits == VAL).sum())
    quota = round(0.2 * len(groups))
    assert held > 0 and (splits == TRAIN).any()
    # Off by half of the smallest group at most, unless one group had to go all the same.
    assert abs(held - quota) <= max(sizes) / 2 or held == min(sizes)
    if 1 in sizes and sizes.count(1) >= quota:
        assert held == max(quota, 1)


def test_a_large_group_does_not_swallow_the_validation_images():
    groups = np.concatenate([np.zeros(600, int), np.arange(1, 401)])
    splits = assign(one_hot(np.zeros(1000, int)), groups)
    assert (splits == VAL).sum() == 100 and set(splits[:600]) == {TRAIN}


def test_adding_images_moves_few_others():
    labels = np.arange(1000) % 10
    before = assign(one_hot(labels))
    labels = np.append(labels, [0, 3])
    after = assign(one_hot(labels))
    assert (before != after[:1000]).sum() <= 3


def test_seed_and_key_decide():
    labels = np.arange(400) % 4
    a, b = assign(one_hot(labels), seed=0), assign(one_hot(labels), seed=1)
    assert (a != b).sum() > 40
    order = np.random.default_rng(0).permutation(400)
    moved = assign(one_hot(labels[order]), order=ranks(400)[order])
    assert (moved == a[order]).all()


def test_official_test_stays_and_validation_comes_from_train():
    labels = np.arange(600) % 6
    given_splits = np.repeat([TRAIN, TEST], [500, 100])
    splits = assign(one_hot(labels), given=given_splits, test=0.3)
    assert (splits[500:] == TEST).all() and (splits == TEST).sum() == 100
    assert (splits == VAL).sum() == 50


def test_a_group_over_given_splits_keeps_them():
    groups = np.zeros(4, int)
    splits = assign(one_hot([0, 0, 0, 0]), groups, [TRAIN, TEST, VAL, NONE])
    assert splits.tolist() == [TRAIN, TEST, VAL, TRAIN]


def test_test_share_and_validation_share_are_of_all():
    labels = np.arange(1000) % 10
    splits = assign(one_hot(labels), val=0.1, test=0.2)
    assert [(splits == s).sum() for s in (TRAIN, VAL, TEST)] == [700, 100, 200]
    with pytest.raises(InputError, match="below 1"):
        assign(one_hot(labels), val=0.5, test=0.5)


def test_small_classes_have_both_sides_and_single_groups_train():
    splits = assign(one_hot([0, 0, 1, 1, 1, 2, 2]), [0, 1, 2, 3, 4, 5, 5])
    held = [int((splits[part] == VAL).sum()) for part in (slice(0, 2), slice(2, 5), slice(5, 7))]
    assert held == [1, 1, 0]


def test_several_labels_are_shared_out():
    rng = np.random.default_rng(0)
    hot = rng.random((2000, 8)) < np.array([0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005])
    splits = assign(csr_array(hot.astype(float)), val=0.2)
    share = hot[splits == VAL].sum(0) / hot.sum(0)
    assert abs((splits == VAL).mean() - 0.2) < 0.02
    assert (abs(share - 0.2) < np.maximum(0.03, 2 / hot.sum(0))).all()
    unlabelled = ~hot.any(1)
    assert abs((splits[unlabelled] == VAL).mean() - 0.2) < 0.02


def test_no_class_is_emptied_by_its_neighbours():
    """Class 2 is only in images that the rarer classes 0 and 1 would like to hold out."""
    hot = np.array([[1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0]])
    splits = assign(csr_array(hot), val=0.5, order=np.array([0, 9, 1, 8]))
    assert splits.tolist() == [VAL, TRAIN, TRAIN, VAL]


def test_no_images():
    assert assign(csr_array((0, 3))).shape == (0,)
