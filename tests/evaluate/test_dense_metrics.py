import math

import pytest
import torch

from vitrail.errors import InputError
from vitrail.evaluate.dense import average_precision, class_iou, confusion, mean_iou

# ---- pixels


def test_the_confusion_counts_each_pixel():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 4, (2, 7, 5), generator=generator)
    labels = torch.randint(0, 4, (2, 7, 5), generator=generator)
    labels[0, :2] = 255
    counts = torch.zeros(4, 4, dtype=torch.int64)
    for said, true in zip(predicted.flatten().tolist(), labels.flatten().tolist()):
        if true != 255:
            counts[true, said] += 1
    assert torch.equal(confusion(predicted, labels, 4), counts)
    for label in range(4):
        both = int(((predicted == label) & (labels == label)).sum())
        either = int((((predicted == label) & (labels != 255)) | (labels == label)).sum())
        assert float(class_iou(counts)[label]) == pytest.approx(both / either)


def test_a_class_that_is_not_there_has_no_part_in_the_mean():
    labels = torch.tensor([[0, 0, 1, 1]])
    counts = confusion(torch.tensor([[0, 1, 1, 1]]), labels, 3)
    assert math.isnan(class_iou(counts)[2])
    assert mean_iou(counts) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "do not fit"),
        (torch.tensor([0, 3]), torch.tensor([0, 1]), "class 3"),
        (torch.tensor([0, 1]), torch.tensor([-1, 1]), "class -1"),
    ],
)
def test_what_is_no_class_is_refused(predicted, labels, message):
    with pytest.raises(InputError, match=message):
        confusion(predicted, labels, 3)


# ---- boxes


def boxes_of(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def detections(rows, scores, labels=None):
    return {
        "boxes": boxes_of(*rows),
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels or [1] * len(rows), dtype=torch.int64),
    }


def target(rows, labels=None):
    return {"boxes": boxes_of(*rows), "labels": torch.tensor(labels or [1] * len(rows), dtype=torch.int64)}


A, B, C = (0, 0, 10, 10), (20, 20, 40, 40), (50, 0, 60, 10)


def test_perfect_boxes_are_all_of_it():
    assert average_precision([detections([A, B], [0.9, 0.2])], [target([A, B])]) == 1


def test_the_order_of_scores_goes_over_all_images():
    found = [detections([A, C], [0.9, 0.5]), detections([B], [0.7])]
    # By score: right, right, wrong of three true boxes: two thirds of the recalls at precision 1.
    assert average_precision(found, [target([A, B]), target([B])]) == pytest.approx(67 / 101)
    found[0]["scores"] = torch.tensor([0.5, 0.9])
    # Wrong, right, right: up to two thirds at precision 2 / 3.
    assert average_precision(found, [target([A, B]), target([B])]) == pytest.approx(67 / 101 * 2 / 3)


def test_a_box_is_taken_once():
    found = [detections([A, A], [0.9, 0.8])]
    assert average_precision(found, [target([A])]) == 1
    assert average_precision(found, [target([A, B])]) == pytest.approx(51 / 101)


def test_a_detection_takes_the_box_that_it_overlaps_most():
    near = (0, 0, 10, 9)
    # The second overlaps A alone by as much.
    found = [detections([near, (0, 0, 10, 10.8)], [0.9, 0.8])]
    assert average_precision(found, [target([A, near])], iou=0.85) == 1


def test_the_overlap_counts():
    found = [detections([(0, 0, 10, 5)], [0.9])]
    assert average_precision(found, [target([A])], iou=0.5) == 1
    assert average_precision(found, [target([A])], iou=0.51) == 0


def test_classes_count_alike():
    found = [detections([A, B], [0.9, 0.8], [1, 2])]
    assert average_precision(found, [target([A, B], [1, 1])]) == pytest.approx(51 / 101)
    assert average_precision(found, [target([A, A, B], [1, 1, 2])]) == pytest.approx((51 / 101 + 1) / 2)


def test_no_detection_is_no_precision():
    assert average_precision([detections([], [])], [target([A])]) == 0


@pytest.mark.parametrize(
    ("found", "truth", "iou", "message"),
    [([], [target([A])], 0.5, "0 images"), ([], [], 0.0, "overlap"), ([], [], 0.5, "no true box")],
)
def test_what_cannot_be_measured_is_refused(found, truth, iou, message):
    with pytest.raises(InputError, match=message):
        average_precision(found, truth, iou)
