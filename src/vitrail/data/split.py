"""Which images are trained on and which are held out: stratified, deterministic, no group on two sides.

Every image has a rank, a hash of its key and the seed, and each class gives its first groups in that order to the
held-out side. So an image that is added moves few others: its own group, and those at the edge of a quota.

Several labels per image follow Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data" (2011):
classes are served from the rarest to the most frequent, and all groups that hold a class are decided with it. What
differs: the order within a class is the rank, so that the split is stable, instead of the largest need first.
"""

from __future__ import annotations

import hashlib

import numpy as np
from scipy.sparse import csr_array, hstack

from vitrail.errors import InputError

NONE, TRAIN, VAL, TEST = -1, 0, 1, 2
SPLITS = ("train", "val", "test")


def rank(key: str, seed: int) -> int:
    """Return the place of an image in the order in which images are held out: a hash of 63 bits."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def assign_splits(
    targets: csr_array,
    groups: np.ndarray,
    ranks: np.ndarray,
    given: np.ndarray,
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
) -> np.ndarray:
    """Return the split of every image: (N,) int8, ``TRAIN``, ``VAL`` or ``TEST``.

    A given split stands. Validation images are taken from those that are given as train or not at all, unless the data
    has its own; so are test images, when a share is asked for. Per class the share is met to within one image, or as
    near as the sizes of its groups allow; a class with two groups or more has images on both sides of a cut.

    Args:
        targets: (N, C), nonzero where an image has a class.
        groups: (N,) integers; images of one group stay together, among those that no split is given for.
        ranks: (N,) integers from ``rank``.
        given: (N,) int8, ``NONE`` or a split that the data prescribes.
        val_fraction, test_fraction: shares of the images that may be taken, their sum below 1.

    Raises:
        InputError: the shares leave nothing to train on.
    """
    if val_fraction + test_fraction >= 1:
        raise InputError(
            f"data.val_fraction = {val_fraction:g} and data.test_fraction = {test_fraction:g} leave nothing to train "
            "on: their sum must be below 1"
        )
    splits = np.where(given == NONE, TRAIN, given).astype(np.int8)
    taken = 0.0
    for split, fraction, others in ((TEST, test_fraction, 2), (VAL, val_fraction, 1)):
        if fraction == 0 or (given == split).any():
            continue
        pool = np.flatnonzero(splits == TRAIN)
        # The share is one of all that could be taken, of which the test images are gone by now.
        held = _hold_out(targets[pool], groups[pool], ranks[pool], fraction / (1 - taken), others)
        splits[pool[held]] = split
        taken += fraction
    return splits


def _hold_out(targets: csr_array, groups: np.ndarray, ranks: np.ndarray, fraction: float, others: int) -> np.ndarray:
    """Return which images to hold out; a class keeps ``others`` groups at least for the other sides."""
    if not len(groups):
        return np.zeros(0, bool)
    _, group = np.unique(groups, return_inverse=True)
    count = int(group.max()) + 1
    group_rank = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(group_rank, group, ranks)
    # Images without a label are one more class, to be shared out like the others.
    unlabelled = (np.diff(targets.indptr) == 0).astype(np.int64)
    marks = hstack([(targets != 0).astype(np.int64), csr_array(unlabelled[:, None])], format="csr")
    member = csr_array((np.ones(len(group), np.int64), (group, np.arange(len(group)))), shape=(count, len(group)))
    sizes = csr_array(member @ marks)  # (groups, classes): images of each class in each group
    by_class = sizes.tocsc()
    totals = np.asarray(sizes.sum(0)).ravel()
    groups_per_class = np.diff(by_class.indptr)
    quotas = _quotas(totals, groups_per_class > others, fraction)

    room = totals - np.minimum(totals, 1)  # what may leave, so that a class keeps an image
    held = np.zeros(count, bool)
    decided = np.zeros(count, bool)
    have = np.zeros(len(totals), np.int64)

    def take(number: int) -> bool:
        """Hold out a group, unless that empties a class."""
        part = slice(sizes.indptr[number], sizes.indptr[number + 1])
        classes, images = sizes.indices[part], sizes.data[part]
        if (have[classes] + images > room[classes]).any():
            return False
        have[classes] += images
        held[number] = True
        return True

    for label in np.lexsort((np.arange(len(totals)), groups_per_class)):
        part = slice(by_class.indptr[label], by_class.indptr[label + 1])
        members, images = by_class.indices[part], by_class.data[part]
        is_open = ~decided[members]
        members, images = members[is_open], images[is_open]
        decided[members] = True
        order = np.argsort(group_rank[members], kind="stable")
        for place in order:
            if have[label] >= quotas[label]:
                break
            if have[label] + images[place] <= quotas[label]:
                take(int(members[place]))
        missing = quotas[label] - have[label]
        if missing <= 0:
            continue
        # Only groups too large for the rest are left. The smallest may still come nearer, or be the only one at all.
        for place in np.lexsort((group_rank[members], images)):
            if held[members[place]]:
                continue
            nearer = images[place] - missing < missing
            if (nearer or not have[label]) and take(int(members[place])):
                break
            if not nearer and have[label]:
                break
    return held[group]


def _quotas(totals: np.ndarray, divisible: np.ndarray, fraction: float) -> np.ndarray:
    """Return how many images of each class to hold out: they add up to the share of all by largest remainders."""
    exact = totals * fraction
    quotas = np.floor(exact).astype(np.int64)
    least = divisible.astype(np.int64)
    most = np.where(divisible, totals - 1, 0)
    missing = round(float(totals.sum() * fraction)) - int(quotas.sum())
    for label in np.argsort(quotas - exact, kind="stable")[: max(missing, 0)]:
        quotas[label] += 1
    return np.clip(quotas, least, np.maximum(most, least))
