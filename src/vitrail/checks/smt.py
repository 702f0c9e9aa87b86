"""SMT: do convolutions of several widths help, and does it help to bring them together across the heads?"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.app.build import count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, beyond_rounding, bounded, paired
from vitrail.models import create_model


def _wide(ratio: float) -> dict[str, Any]:
    return {"mlp_ratios": (ratio, ratio, ratio, 2)}


ARMS: dict[str, dict[str, Any]] = {
    "published": {},
    "one head": {"kernels": (3,), **_wide(4.2)},
    "two heads": {"kernels": (3, 5), **_wide(4.1)},
    "eight heads": {"kernels": tuple(range(3, 19, 2)), **_wide(3.6)},
    "one width": {"kernels": (7, 7, 7, 7)},
    "within": {"aggregation": "within"},
    "none": {"aggregation": "none", **_wide(4.6)},
}
"""All within one per cent of each other's parameters, by the width of the feed-forward layers."""
PASSES = 4_000
"""Of images, for each arm: minutes for 21 nets on two cores."""
PUBLISHED = {
    "smt_t": (11.5, 0.1, 2.4, 224),
    "smt_s": (21.0, 1.0, 4.7, 224),
    "smt_b": (32.0, 1.0, 7.7, 224),
    "smt_l": (81.0, 1.0, 17.6, 224),
    "smt_l_384": (81.0, 1.0, 51.6, 384),
}
"""Millions of parameters, their last digit, billions of multiply-adds, and pixels, from abstract and README."""


def run(ctx: Context) -> Verdict:
    """Train seven modulations at equal numbers of image passes and near equal size; count the published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.03 if ctx.quick else PASSES / len(index.rows("train"))
    arms: dict[str, list[Arm]] = {name: [] for name in ARMS}
    for seed in ctx.seeds:
        for name, options in ARMS.items():
            settings = {
                "model.name": "smt_nano",
                "model.options": options,
                "train.batch_size": 32,
                "train.epochs": epochs,
            }
            arms[name].append(ctx.train(index, name, seed, settings))
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    sizes = published_sizes(["smt_t"] if ctx.quick else list(PUBLISHED))
    claims = {
        "one head": "a modulation with four heads, of widths 3 to 9, is more accurate than one with a single head of "
        "width 3",
        "one width": "heads of four widths are more accurate than four heads of width 7, the same places in all",
        "within": "an aggregation across the heads is more accurate than one of the same size that groups neighbours "
        "within a head",
        "none": "an aggregation across the heads is more accurate than none, with the weights in the feed-forward "
        "layers",
        "two heads": "four heads are more accurate than two",
        "eight heads": "four heads are more accurate than eight",
    }
    return Verdict(
        [
            *(
                paired(claim, "top-1 on held-out images", top1, ours="published", against=other)
                for other, claim in claims.items()
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
            "The hidden width of the feed-forward layers gives all arms as many parameters within one per cent. Eight "
            "heads have widths of 3 to 17, two of 3 and 5.",
            "SMT-S has 22.6 M parameters in the published code too, where its table says 21 M.",
            "Nets of under half a million parameters on small images: ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "published sizes": sizes,
        },
    )


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters, multiply-adds, and those without the products of attention, of each published net."""
    rows = []
    for name in names:
        params, digit, flops, side = PUBLISHED[name]
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
                "params_off": beyond_rounding(count_parameters(model) / 1e6, params, digit),
                "madds_g": madds,
                "madds_without_products_g": madds - products,
                "published_madds_g": flops,
                "madds_off": beyond_rounding(madds - products, flops, 0.1),
            }
        )
    return rows
