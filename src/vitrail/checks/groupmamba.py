"""GroupMamba: is one direction for each quarter of the channels as good as all four for all, and what does it save?"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import nn

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, beyond_rounding, bounded, paired
from vitrail.models import create_model

NARROWER = (2.63, 2.63, 2.63, 2.63)
"""Ratios of the feed-forward layers that give a net of full scans the parameters of one of grouped scans."""
ARMS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "all, equal parameters": {"scan": "all", "mlp_ratios": NARROWER},
    "all, equal width": {"scan": "all"},
    "no gate": {"modulation": False},
}
PASSES = 5_600
"""Of images, for each arm: minutes for twelve nets on two cores."""
PUBLISHED = {"groupmamba_tiny": 23, "groupmamba_small": 34, "groupmamba_base": 57}
"""Millions of parameters, from the table of the authors' README."""


def run(ctx: Context) -> Verdict:
    """Train four nets at equal numbers of image passes; weigh and time them; count the published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    settings = {"model.name": "groupmamba_nano", "train.batch_size": 32, "train.epochs": epochs}
    depths = {"depths": (1, 1, 1, 1)} if ctx.quick else {}
    arms = {
        name: [ctx.train(index, name, seed, {**settings, "model.options": {**options, **depths}}) for seed in ctx.seeds]
        for name, options in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    costs = cost({name: trained[0] for name, trained in arms.items()}, rounds=1 if ctx.quick else 15)
    grouped, full = costs[0], costs[2]
    names = list(PUBLISHED)[: 1 if ctx.quick else None]
    sizes = [published_size(name) for name in names]
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "one direction for each quarter of the channels is more accurate than all four for all, in nets of as "
                "many parameters",
                quantity,
                top1,
                ours="grouped",
                against="all, equal parameters",
            ),
            paired(
                "one direction for each quarter of the channels is more accurate than all four for all, in nets of the "
                "same width",
                quantity,
                top1,
                ours="grouped",
                against="all, equal width",
            ),
            paired("the gate makes a net more accurate", quantity, top1, ours="grouped", against="no gate"),
            bounded(
                "at the same width, one direction for each quarter of the channels takes less time",
                "median time of a forward pass over that of all four directions",
                grouped["ms_per_image"] / full["ms_per_image"],
                at_most=1.0,
            ),
            bounded(
                "the nets have the published parameters",
                "largest deviation beyond the last digit of the published figure, as a share of it",
                max(row["off"] for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            f"'all, equal parameters' has feed-forward layers of {NARROWER[0]} C in place of 4 C.",
            "Nets of under half a million parameters on small images, trained from labels: ImageNet accuracy, and what "
            "distillation does for large nets, are not shown.",
        ],
        tables={"cost of the arms": costs, "published sizes": sizes},
    )


def cost(arms: dict[str, Arm], *, rounds: int) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each arm, and time them in turn, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, arm in arms.items():
                spent = _seconds(arm.model, torch.zeros(32, 3, *arm.preprocess.size))
                if turn:  # the first warms up
                    times[name].append(spent / 32)
    return [
        {
            "arm": name,
            "parameters": count_parameters(arm.model),
            "madds": count_flops(arm.model, arm.preprocess.size),
            "ms_per_image": 1e3 * median(times[name]),
        }
        for name, arm in arms.items()
    ]


def _seconds(model: nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def published_size(name: str) -> dict[str, Any]:
    """Count the parameters of a published net, with one classifier and with two, of 1000 classes."""
    with torch.device("meta"):
        net = create_model(name, num_classes=1000)
    found, published = count_parameters(net) / 1e6, PUBLISHED[name]
    return {
        "net": name,
        "params_m": found,
        "with_two_classifiers_m": found + count_parameters(net.get_submodule("head")) / 1e6,
        "published_params_m": published,
        "off": beyond_rounding(found, published, 1.0),
    }
