import itertools

import numpy as np
import pytest
import torch

from vitrail.data.synthetic.shapes import NAMES, RADIUS, _inside, batches, scene
from vitrail.errors import InputError


def test_a_scene_is_its_numbers_alone():
    one, again = scene(5, seed=2), scene(5, seed=2)
    for name in ("image", "mask", "boxes", "labels"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert not np.array_equal(one.image, scene(6, seed=2).image)
    assert not np.array_equal(one.image, scene(5, seed=3).image)
    assert not np.array_equal(scene(6, seed=2).image, scene(5, seed=3).image)


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (16, 90)])
def test_boxes_and_masks_are_of_the_same_shapes(size):
    seen = set()
    for number in range(20):
        one = scene(number, size=size, most=4)
        assert one.image.shape == (*size, 3)
        assert 1 <= len(one.labels) == len(one.boxes) <= 4
        left = one.mask.copy()
        for (x1, y1, x2, y2), label in zip(one.boxes.astype(int), one.labels):
            inside = one.mask[y1:y2, x1:x2] == label
            assert inside.any(0).all() or inside[:, [0, -1]].any(0).all()
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            assert max(x2 - x1, y2 - y1) <= 2 * RADIUS[1] * min(size) + 1
            left[y1:y2, x1:x2][inside] = 0
            seen.add(int(label))
        assert not left.any()
    assert seen == {1, 2, 3}


@pytest.mark.parametrize(("name", "share"), [("disc", np.pi), ("square", 2.0), ("triangle", 3 * 3**0.5 / 4)])
def test_shapes_have_their_area_and_corners_on_the_circle(name, share):
    rows, columns = np.mgrid[-100:101, -100:101].astype(float)
    for turn in (0.0, 0.7):
        inside = _inside(name, rows, columns, 80.0, turn)
        assert inside.sum() / 80**2 == pytest.approx(share, rel=0.01)
        assert np.hypot(rows, columns)[inside].max() == pytest.approx(80, abs=1.5)
        assert abs(rows[inside].mean()) < 0.5


def test_a_shape_is_coloured_and_the_ground_is_not():
    one = scene(0)
    spread = np.ptp(one.image.astype(int), axis=2)
    assert spread[one.mask > 0].min() > 180
    assert spread[one.mask == 0].max() < 90


def test_batches_go_on_from_scene_to_scene():
    stream = list(itertools.islice(batches(2, seed=1, size=(20, 24)), 2))
    images, masks, targets = stream[1]
    assert images.shape == (2, 3, 20, 24)
    assert -1 <= images.min() < images.max() <= 1
    third = scene(3, 1, (20, 24))
    torch.testing.assert_close((images[1] + 1) * 127.5, torch.from_numpy(third.image).permute(2, 0, 1).float())
    assert torch.equal(masks[1], torch.from_numpy(third.mask).long())
    assert torch.equal(targets[1]["boxes"], torch.from_numpy(third.boxes))
    assert int(masks.max()) < len(NAMES)


@pytest.mark.parametrize("wrong", [{"size": (15, 64)}, {"most": 0}, {"number": -1}, {"seed": -1}])
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(InputError, match="16 pixels or more"):
        scene(**{"number": 0, **wrong})
