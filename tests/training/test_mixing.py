"""Mixup and cutmix against a loop over the images."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitrail.training.mixing import mix
from vitrail.training.recipe import AugmentConfig


def batch(size, classes=4, height=6, width=9):
    generator = torch.Generator().manual_seed(size)
    return {
        "image": torch.randn(size, 3, height, width, generator=generator),
        "target": torch.randint(0, classes, (size,), generator=generator),
        "row": torch.arange(size),
    }


def mixed(given, seed=0, names=("image",), **augment):
    return mix(given, names, AugmentConfig(**augment), 4, np.random.default_rng(seed))


@given(size=st.integers(2, 9), seed=st.integers(0, 50))
def test_mixup(size, seed):
    before = batch(size)
    after = mixed(before, seed, mixup=0.4)
    for i in range(size):
        j = (i + size // 2) % size
        target = after["target"][i]
        assert target.sum() == pytest.approx(1)
        a, b = before["target"][i], before["target"][j]
        if a != b:
            keep = target[a]
            expected = keep * before["image"][i] + (1 - keep) * before["image"][j]
            torch.testing.assert_close(after["image"][i], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(after["row"], before["row"])


@given(size=st.integers(2, 9), seed=st.integers(0, 50))
def test_cutmix(size, seed):
    before = batch(size)
    images = before["image"].clone()
    after = mixed(before, seed, cutmix=1.0)
    assert torch.equal(before["image"], images)
    for i in range(size):
        j = (i + size // 2) % size
        own = (after["image"][i] == images[i]).all(0)
        other = (after["image"][i] == images[j]).all(0)
        assert (own ^ other).all()
        rows, columns = torch.where(other)
        if len(rows):  # what was pasted is one box
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        a, b = before["target"][i], before["target"][j]
        if a != b:
            assert after["target"][i, a] == pytest.approx(own.float().mean().item(), abs=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_agree_with_one(world):
    before = batch(16)
    whole = mixed(before, 3, mixup=0.3, cutmix=1.0)
    for rank in range(world):
        share = mixed({name: values[rank::world] for name, values in before.items()}, 3, mixup=0.3, cutmix=1.0)
        for name, values in share.items():
            assert torch.equal(values, whole[name][rank::world])


def test_both_methods_take_turns_and_several_labels_pass():
    before = batch(8)
    before["target"] = torch.nn.functional.one_hot(before["target"], 4).float()
    cut = [bool((mixed(before, seed, mixup=0.5, cutmix=0.5)["image"] == before["image"]).any()) for seed in range(60)]
    assert 15 < sum(cut) < 45


def test_only_the_named_entries_are_mixed():
    before = batch(8) | {"weak": batch(8)["image"] + 1}
    after = mixed(before, mixup=0.5)
    assert after["weak"] is before["weak"]
    assert not torch.equal(after["image"], before["image"])
