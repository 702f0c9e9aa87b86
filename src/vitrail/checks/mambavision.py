"""MambaVision: does self-attention help after the mixers, and is the last half of a stage the place for it?"""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.app.build import count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, beyond_rounding, bounded, paired
from vitrail.models import create_model

DEPTHS = (1, 1, 4, 2)
NET: dict[str, Any] = {"depths": DEPTHS, "stem_stride": 1}
WINDOWS, QUICK_WINDOWS = (7, 4), (4, 2)
"""All that the hybrid stages see of 28 and of 16 pixels: one window, as in the published nets at 224 pixels."""
LAST, FIRST = ((2, 3), (1,)), ((0, 1), (0,))
WIDER = 4.45
"""Ratio of the feed-forward layers that gives a net of mixers alone the parameters of one with attention."""
PASSES = 5_600
"""Of images, for each arm: minutes for twelve nets on two cores."""
PUBLISHED = {
    "mambavision_t": (31.8, 4.4, 224),
    "mambavision_t2": (35.1, 5.1, 224),
    "mambavision_s": (50.1, 7.5, 224),
    "mambavision_b": (97.7, 15.0, 224),
    "mambavision_l": (227.9, 34.9, 224),
    "mambavision_l2": (241.5, 37.5, 224),
    "mambavision_l2_512": (241.5, 196.3, 512),
    "mambavision_l3_256": (739.6, 122.3, 256),
    "mambavision_l3_512": (739.6, 489.1, 512),
}
"""Millions of parameters, billions of multiply-adds, and pixels, from the tables of the authors' README."""


def run(ctx: Context) -> Verdict:
    """Train four arrangements at equal numbers of image passes and near equal size; count the published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    arms: dict[str, list[Arm]] = {"last": [], "first": [], "anywhere": [], "none": []}
    for seed in ctx.seeds:
        arrangements: dict[str, dict[str, Any]] = {
            "last": {"attention": LAST},
            "first": {"attention": FIRST},
            "anywhere": {"attention": anywhere(seed)},
            "none": {"attention": ((), ()), "mlp_ratio": WIDER},
        }
        for name, options in arrangements.items():
            settings = {
                "model.name": "mambavision_nano",
                "model.options": {**NET, "window_sizes": QUICK_WINDOWS if ctx.quick else WINDOWS, **options},
                "train.batch_size": 32,
                "train.epochs": epochs,
            }
            arms[name].append(ctx.train(index, name, seed, settings))
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    sizes = published_sizes(["mambavision_t"] if ctx.quick else list(PUBLISHED))
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "a net with attention in the last half of its hybrid stages is more accurate than one without, which "
                "has as many parameters",
                quantity,
                top1,
                ours="last",
                against="none",
            ),
            paired(
                "attention in the last half of a stage is more accurate than in the first half",
                quantity,
                top1,
                ours="last",
                against="first",
            ),
            paired(
                "attention in the last half of a stage is more accurate than in blocks drawn at random",
                quantity,
                top1,
                ours="last",
                against="anywhere",
            ),
            bounded(
                "the nets have the published parameters, and the published multiply-adds where the two products of "
                "attention are not counted",
                "largest deviation beyond the last digit of the published figure, as a share of it",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            f"The net without attention has feed-forward layers of {WIDER} C in place of 4 C. 'anywhere' attends in as "
            "many blocks as 'last', drawn for each seed among the other arrangements.",
            "Nets of under a million parameters on small images: ImageNet accuracy and throughput on a GPU are not "
            "shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "published sizes": sizes,
        },
    )


def anywhere(seed: int) -> tuple[tuple[int, ...], ...]:
    """Draw as many attending blocks as in the last half of each stage; neither all last nor all first."""
    choices = itertools.product(*(itertools.combinations(range(depth), depth // 2) for depth in DEPTHS[2:]))
    return random.Random(seed).choice([choice for choice in choices if choice not in (LAST, FIRST)])


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters, multiply-adds, and those without the products of attention, of each published net."""
    rows = []
    for name in names:
        params, flops, side = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model.eval()(torch.zeros(1, 3, side, side))
        by_operator = counter.get_flop_counts()["Global"]
        products = sum(count for operator, count in by_operator.items() if "bmm" in str(operator)) / 2e9
        madds = counter.get_total_flops() / 2e9
        rows.append(
            {
                "net": name,
                "params_m": count_parameters(model) / 1e6,
                "published_params_m": params,
                "params_off": beyond_rounding(count_parameters(model) / 1e6, params, 0.1),
                "madds_g": madds,
                "madds_without_products_g": madds - products,
                "published_madds_g": flops,
                "madds_off": beyond_rounding(madds - products, flops, 0.1),
            }
        )
    return rows
