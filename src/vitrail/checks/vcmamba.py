"""VCMamba: do scans at the end of a convolutional net help, and are they better there than everywhere?"""

from __future__ import annotations

from typing import Any

import torch

from vitrail.checks.check import Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.models import create_model

NET: dict[str, Any] = {"stem_stride": 1, "img_size": 28}
ARMS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "convolutions alone": {"mamba": (0, 0, 0, 0), "dims": (20, 28, 54, 74)},
    "scans alone": {"mamba": (1, 1, 2, 3), "dims": (14, 20, 38, 52)},
}
"""The widths give all nets as many parameters."""
PASSES = 5_600
"""Of images, for each arm: minutes for nine nets on two cores."""
PUBLISHED = {"vcmamba_s": (10.5, 1.1), "vcmamba_m": (21.0, 2.3), "vcmamba_b": (31.5, 4.0)}
"""Millions of parameters, and billions of multiply-adds at 224 pixels, from the table of the authors' README."""


def run(ctx: Context) -> Verdict:
    """Train three nets of as many parameters at equal numbers of image passes; count the published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    settings = {"model.name": "vcmamba_nano", "train.batch_size": 32, "train.epochs": epochs}
    net = {**NET, "stem_stride": 2} if ctx.quick else NET
    arms = {
        name: [ctx.train(index, name, seed, {**settings, "model.options": {**net, **options}}) for seed in ctx.seeds]
        for name, options in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    sizes = [published_size(name) for name in list(PUBLISHED)[: 1 if ctx.quick else None]]
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "a convolutional net whose last blocks scan is more accurate than one of convolutions alone, of as "
                "many parameters",
                quantity,
                top1,
                ours="hybrid",
                against="convolutions alone",
            ),
            paired(
                "a convolutional net whose last blocks scan is more accurate than one of scans alone, of as many "
                "parameters",
                quantity,
                top1,
                ours="hybrid",
                against="scans alone",
            ),
            bounded(
                "the nets have the published parameters and multiply-adds",
                "largest deviation beyond the last digit of the published figure, as a share of it",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            "The stages have widths of (16, 24, 48, 64), "
            + " and ".join(f"{arm['dims']} ({name})" for name, arm in ARMS.items() if "dims" in arm)
            + ". A block of scans keeps its convolutions in 'scans alone'.",
            "Nets of a quarter of a million parameters on small images, trained from labels: ImageNet accuracy and "
            "segmentation are not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "published sizes": sizes,
        },
    )


def published_size(name: str) -> dict[str, Any]:
    """Count parameters and multiply-adds of a published net, which has two classifiers."""
    with torch.device("meta"):
        net = create_model(name, num_classes=1000, distilled=True)
    return size_row(name, size_of(net), PUBLISHED[name], (0.1, 0.1))
