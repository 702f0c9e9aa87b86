"""Mixup and cutmix on whole batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from vitrail.methods.method import one_hot_targets
from vitrail.training.recipe import AugmentConfig


def mix(
    batch: Mapping[str, Any],
    names: Iterable[str],
    augment: AugmentConfig,
    num_classes: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return ``batch`` with each image mixed with the one half a batch further on; targets become probabilities.

    Zhang et al., "mixup" (2018); Yun et al., "CutMix" (2019). One ratio and one box serve the whole batch, as in timm;
    with both methods on, each is used for half of the batches. Processes that hold every w-th image of a joint batch of
    B images pair the same images as one process does if 2 w divides B.

    Args:
        batch: images (B, 3, H, W) under each of ``names``, ``target`` (B,) or (B, C).
        names: entries that are mixed.
        augment: ``mixup`` and ``cutmix`` are the alphas of their Beta distributions; 0 is off.
        num_classes: C.
        rng: source of the ratio and the box; the same in all processes.
    """
    cut = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < 0.5)
    alpha = augment.cutmix if cut else augment.mixup
    keep = float(rng.beta(alpha, alpha))
    centre = rng.random(2)
    half = len(batch["target"]) // 2
    mixed, share = dict(batch), keep
    for name in names:
        images = batch[name]
        partner = images.roll(-half, 0)
        if cut:
            rows, columns = _box(images, keep, centre)
            images = images.clone()
            images[:, :, rows, columns] = partner[:, :, rows, columns]
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            share = 1 - area / (images.shape[2] * images.shape[3])
        else:
            images = partner.lerp(images, keep)
        mixed[name] = images
    target = one_hot_targets(batch["target"], num_classes)
    mixed["target"] = target.roll(-half, 0).lerp(target, share)
    return mixed


def _box(images: Tensor, keep: float, centre: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of a box around ``centre`` with the share 1 - keep of the area, cut at the border."""
    sides = []
    for size, place in zip(images.shape[2:], centre):
        length = size * (1 - keep) ** 0.5
        middle = size * place
        sides.append(slice(round(max(middle - length / 2, 0)), round(min(middle + length / 2, size))))
    return sides[0], sides[1]
