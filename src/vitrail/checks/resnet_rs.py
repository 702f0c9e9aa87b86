"""ResNet-RS: is it better to deepen a net where it is trained long on few images, and to widen it elsewhere?

A small net is scaled to the same multiply-adds by depth and by width. Trained short, it sees several thousand images
once; trained long, a few hundred images as often as makes the same number of passes.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_row
from vitrail.data.index import Index
from vitrail.models import create_model
from vitrail.models.resnet_rs import FAMILY, deepest, multiply_adds, scaled, widest

BASE: dict[str, Any] = {"layers": (1, 1, 1, 1), "width": 0.25}
TIMES = 2.3
"""Of the base net's multiply-adds, for the scaled ones: the next width, or twice as many blocks."""
PASSES = 6_400
"""Of images, for each arm."""
FEW = 0.85
"""Share of the images that training long does without."""
PUBLISHED: dict[tuple[int, int], tuple[float, float | None]] = {
    (50, 160): (36, 2.3),
    (101, 160): (64, None),
    (101, 192): (64, None),
    (152, 192): (87, None),
    (152, 224): (87, None),
    (152, 256): (87, None),
    (200, 256): (93.4, None),
    (270, 256): (130, None),
    (350, 256): (164, 34.5),
    (350, 320): (164, None),
    (420, 320): (192, 64.0),
}
"""Depth and pixels -> millions of parameters and billions of multiply-adds, half of the FLOPs that the paper gives; the
parameters of 200 from the authors' second implementation."""


def run(ctx: Context) -> Verdict:
    """Train a net, a deeper one and a wider one, on few and on many images at equal numbers of passes."""
    few = ctx.index("digits", val_fraction=0.1 if ctx.quick else FEW)
    indices = {"long": few, "short": few if ctx.quick else ctx.index("fashion", val_fraction=0.02)}
    passes = 32 if ctx.quick else PASSES
    arms: dict[str, list[Arm]] = {}
    for regime, index in indices.items():
        epochs = passes / len(index.rows("train"))
        common = {
            "model.name": "resnet_rs_nano",
            "train.batch_size": 32,
            "train.epochs": epochs,
            "train.eval_every": max(epochs, 1.0),
        }
        for name, options in arms_of(ctx, index).items():
            settings = {**common, "model.options": options}
            arms[f"{regime}, {name}"] = [ctx.train(index, f"{regime}-{name}", seed, settings) for seed in ctx.seeds]
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    gain = {
        regime: [deep - wide for deep, wide in zip(top1[f"{regime}, deep"], top1[f"{regime}, wide"])]
        for regime in indices
    }
    sizes, family = published_sizes(1 if ctx.quick else len(PUBLISHED)), rule()
    quantity = "top-1 on held-out images"

    def beats(claim: str, regime: str, one: str, other: str) -> Any:
        pair = {name: top1[name] for name in (f"{regime}, {one}", f"{regime}, {other}")}
        return paired(claim, quantity, pair, ours=f"{regime}, {one}", against=f"{regime}, {other}")

    return Verdict(
        [
            beats("trained long on few images, a deeper net is more accurate than a wider one", "long", "deep", "wide"),
            beats(
                "trained short on many images, a wider net is more accurate than a deeper one", "short", "wide", "deep"
            ),
            paired(
                "depth gains more over width where training is long",
                "top-1 of the deeper net less that of the wider one",
                gain,
                ours="long",
                against="short",
            ),
            beats("trained long, a deeper net is more accurate than the net it is made from", "long", "deep", "base"),
            bounded(
                "at the cost of each published net, the rule of resolution gives that net's or the next step",
                "largest difference from the published resolution, pixels",
                max(abs(row["side"] - row["published_side"]) for row in family),
                at_most=32,
            ),
            bounded(
                "the nets have the published parameters and multiply-adds",
                "largest deviation beyond the last digit, as a share",
                max(off for row in sizes for off in (row["params_off"], row["madds_off"]) if off is not None),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{passes:,} passes of an image for every arm: {len(few.rows('train')):,} images trained long, "
            f"{min(passes, len(indices['short'].rows('train'))):,} trained short.",
            "Unless --data is given, the two regimes are of digits and of clothes. Costs are of the latter.",
            "Multiply-adds of the deeper and the wider net are as near as whole blocks allow: see the costs.",
            "Nets of one or two million parameters on small images: EfficientNets, ImageNet and time are not compared.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, arms[name][0]) for name in arms if name.startswith("short")],
            "the rule of resolution": family,
            "published sizes": sizes,
        },
    )


def arms_of(ctx: Context, index: Index) -> dict[str, dict[str, Any]]:
    """Return the options of the base net, and of the deeper and the wider net of equal cost at the same resolution."""
    side, classes = int(ctx.recipe(index, {}).model.img_size), len(index.classes)

    def cost(layers: tuple[int, ...], width: float) -> int:
        return multiply_adds(layers, width, side, stem_stride=2, num_classes=classes)

    limit = TIMES * cost(BASE["layers"], BASE["width"])
    deep = deepest(limit, lambda layers: cost(layers, BASE["width"]))
    wide = widest(limit, lambda width: cost(BASE["layers"], width))
    return {"base": BASE, "deep": {**BASE, "layers": deep}, "wide": {**BASE, "width": wide}}


def rule() -> list[dict[str, Any]]:
    """Return what the rules give for the cost of each published net."""
    rows = []
    for depth, side in PUBLISHED:
        own = multiply_adds(FAMILY[depth], 1.0, side)
        deep, wide = (scaled(own / 1e9, regime) for regime in ("long", "short"))
        rows.append(
            {
                "madds_g": own / 1e9,
                "published_depth": depth,
                "published_side": side,
                "side": deep.resolution,
                "depth_if_long": deep.depth,
                "width_if_short": wide.width,
            }
        )
    return rows


def published_sizes(most: int) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of the first nets of the family."""
    rows = []
    for (depth, side), (params, madds) in itertools.islice(PUBLISHED.items(), most):
        with torch.device("meta"):
            model = create_model(f"resnetrs{depth}", num_classes=1000)
        found = count_parameters(model) / 1e6
        # The count of the deepest nets takes many seconds, and the formula is held to it in the tests.
        taken = (count_flops(model, (side, side)) if depth <= 101 else multiply_adds(FAMILY[depth], 1.0, side)) / 1e9
        digits = 1, 0.05 if madds is None or madds < 5 else 0.5  # whole billions of both operations, but for the first
        rows.append(size_row(f"resnetrs{depth}, {side} px", (found, taken), (params, madds), digits))
    return rows
