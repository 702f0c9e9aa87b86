"""ResNeXt: at equal cost, are many narrow paths better than one wide one, and than a deeper or a wider net?"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.models import create_model
from vitrail.models.resnext import block_cost, preserved_width

NET: dict[str, Any] = {"layers": (1, 1, 1), "channels": (24, 48, 96)}
PATHS = (1, 2, 4, 8, 16)
DOUBLED: dict[str, dict[str, Any]] = {
    "twice, paths": {**NET, "cardinality": 26, "base_width": preserved_width(16)},
    "twice, deep": {**NET, "cardinality": 1, "layers": (2, 2, 2)},
    "twice, wide": {**NET, "cardinality": 1, "base_width": preserved_width(1, 2.0)},
}
"""The net of more paths takes the fewest multiply-adds of the three, by two percent."""
PASSES = 6_400
"""Of images, for each arm."""
TABLE_2 = {1: 64, 2: 40, 4: 24, 8: 14, 32: 4}
"""Width of each number of paths, from the paper and from the authors' README."""
PUBLISHED = {
    ("resnext50", 1, 64): (1000, 224, 25.5, 4.1),
    ("resnext50", 32, 4): (1000, 224, 25.0, 4.2),
    ("resnext29_8x64d", 8, 64): (10, 32, 34.4, None),
    ("resnext29_16x64d", 16, 64): (10, 32, 68.1, None),
}
"""Classes, pixels, millions of parameters and billions of multiply-adds, from tables 1 and 7."""


def run(ctx: Context) -> Verdict:
    """Train nets of one to many paths at equal numbers of image passes; count the published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.02 if ctx.quick else PASSES / len(index.rows("train"))
    numbers = (PATHS[0], PATHS[-1]) if ctx.quick else PATHS
    options = {str(paths): {**NET, "cardinality": paths} for paths in numbers} | DOUBLED
    common = {"model.name": "resnext_nano", "train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, "model.options": own}) for seed in ctx.seeds]
        for name, own in options.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    preserved = {name: top1[name] for name in map(str, numbers)}
    slopes = [float(np.polyfit(np.log2(numbers), values, 1)[0]) for values in zip(*preserved.values())]
    widths, sizes = rule(), published_sizes(1 if ctx.quick else len(PUBLISHED))
    quantity = "top-1 on held-out images"
    twice = {name: top1[name] for name in DOUBLED}
    return Verdict(
        [
            paired("at the cost of one path, sixteen are more accurate", quantity, preserved, ours="16", against="1"),
            paired(
                "at preserved cost, accuracy rises with the number of paths",
                "points of top-1, as a share, for each doubling of the paths (least squares)",
                {"slope": slopes, "none": [0.0] * len(slopes)},
                ours="slope",
                against="none",
            ),
            paired(
                "at about twice the cost, more paths are more accurate than a deeper net of one path",
                quantity,
                twice,
                ours="twice, paths",
                against="twice, deep",
            ),
            paired(
                "at about twice the cost, more paths are more accurate than a wider net of one path",
                quantity,
                twice,
                ours="twice, paths",
                against="twice, wide",
            ),
            bounded(
                "the rule picks the paper's widths",
                "largest deviation of a path's width, channels",
                max(abs(row["width"] - TABLE_2.get(row["paths"], row["width"])) for row in widths),
                at_most=0,
            ),
            bounded(
                "the nets have the published parameters and multiply-adds",
                "largest deviation beyond the last digit, as a share",
                max(off for row in sizes for off in (row["params_off"], row["madds_off"]) if off is not None),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            "Widths are whole channels: how well cost is preserved in nets this narrow is in the table of costs.",
            "Nets of under a million parameters on small images: ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "width of a path, by the rule": widths,
            "published sizes": sizes,
        },
    )


def rule() -> list[dict[str, Any]]:
    """Return the width that the rule picks for each number of paths, and the block's cost beside ResNet's."""
    rows = []
    for paths in (1, 2, 4, 8, 16, 32, 64, 128):
        width = preserved_width(paths)
        rows.append({"paths": paths, "width": width, "cost": block_cost(paths, width) / block_cost(1, 64)})
    return rows


def published_sizes(most: int) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of the first nets whose figures are published."""
    rows = []
    for (name, paths, width), (classes, side, params, madds) in itertools.islice(PUBLISHED.items(), most):
        with torch.device("meta"):
            model = create_model(name, num_classes=classes, cardinality=paths, base_width=width)
        rows.append(size_row(f"{name}, {paths} x {width}d", size_of(model, side), (params, madds), (0.1, 0.1)))
    return rows
