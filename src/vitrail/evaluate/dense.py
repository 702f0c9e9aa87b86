"""How well pixels are classified and boxes are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitrail.errors import InputError

IGNORED = 255
"""Label of a pixel that does not count, as data sets of masks have it."""


def confusion(predicted: Tensor, labels: Tensor, num_classes: int, ignore_index: int = IGNORED) -> Tensor:
    """Count pixels by their class and by the class that was predicted; counts of several batches can be added.

    Args:
        predicted: classes, int64 of any shape.
        labels: of the same shape.
        num_classes: K.
        ignore_index: label of pixels that do not count.

    Returns:
        (K, K), int64: true class down, predicted class across.

    Raises:
        InputError: shapes that differ, or classes outside 0 to K - 1.
    """
    if predicted.shape != labels.shape:
        raise InputError(
            f"predictions of shape {tuple(predicted.shape)} do not fit labels of shape {tuple(labels.shape)}: give one "
            "class for each pixel, logits.argmax(1)"
        )
    counts = labels != ignore_index
    true, said = labels[counts], predicted[counts]
    wrong = [
        int(value) for part in (true, said) if part.numel() for value in part.aminmax() if not 0 <= value < num_classes
    ]
    if wrong:
        raise InputError(
            f"class {wrong[0]} is not one of {num_classes}: give 0 to {num_classes - 1}, or {ignore_index} for pixels "
            "that do not count"
        )
    return torch.bincount(true * num_classes + said, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(counts: Tensor) -> Tensor:
    """Return intersection over union of each class (K,), from ``confusion``; of a class never seen nor said, nan."""
    both = counts.diagonal().double()
    return both / (counts.sum(0) + counts.sum(1) - both)


def mean_iou(counts: Tensor) -> float:
    """Return the mean of ``class_iou`` over the classes that were seen or said."""
    return float(class_iou(counts).nanmean())


def average_precision(
    found: Sequence[Mapping[str, Tensor]], truth: Sequence[Mapping[str, Tensor]], iou: float = 0.5
) -> float:
    """Return the mean over classes of the average precision at one overlap, as COCO has it: at 101 recalls.

    Detections of all images are taken in the order of their scores; one is right if it overlaps a box of its class that
    none before it took; it takes the one it overlaps most.

    Args:
        found: ``boxes`` (N, 4), ``scores`` (N,) and ``labels`` (N,) of each image, as torchvision's detectors return.
        truth: ``boxes`` and ``labels`` of each image.
        iou: least intersection over union, in (0, 1].

    Raises:
        InputError: another number of images, no box at all, or an overlap that is not allowed.
    """
    if len(found) != len(truth) or not 0 < iou <= 1:
        raise InputError(
            f"detections of {len(found)} images, boxes of {len(truth)} and iou = {iou:g} are not allowed together: "
            "give both for each image, and an overlap above 0, of 1 at most"
        )
    classes = sorted({int(label) for one in truth for label in one["labels"]})
    if not classes:
        raise InputError("there is no true box in these images: give some with boxes")
    return sum(_class_precision(found, truth, iou, label) for label in classes) / len(classes)


def _class_precision(
    found: Sequence[Mapping[str, Tensor]], truth: Sequence[Mapping[str, Tensor]], iou: float, label: int
) -> float:
    from torchvision.ops import box_iou

    scores, right, total = [], [], 0
    for detections, target in zip(found, truth):
        of_class = detections["labels"] == label
        order = detections["scores"][of_class].argsort(descending=True, stable=True)
        score, boxes = detections["scores"][of_class][order], detections["boxes"][of_class][order]
        true = target["boxes"][target["labels"] == label]
        overlaps = box_iou(boxes, true).tolist() if len(true) else [[] for _ in boxes]
        taken: set[int] = set()
        for row in overlaps:
            free = [(value, place) for place, value in enumerate(row) if value >= iou and place not in taken]
            if free:
                taken.add(max(free)[1])
            right.append(bool(free))
        scores += score.tolist()
        total += len(true)
    hits = torch.tensor(right)[torch.tensor(scores).argsort(descending=True, stable=True)].double().cumsum(0)
    if not len(hits):
        return 0.0
    recall = hits / total
    precision = (hits / torch.arange(1, len(hits) + 1)).flip(0).cummax(0).values.flip(0)
    at = torch.searchsorted(recall, torch.linspace(0, 1, 101, dtype=recall.dtype))
    return float(torch.cat((precision, precision.new_zeros(1)))[at].mean())
