"""S2AFormer: is strip self-attention sooner done than its rivals, and as good as they at as many parameters?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.evaluate.turns import in_turns
from vitrail.models import create_model
from vitrail.models.s2aformer import StripSelfAttention

SHAPES = ((40, 1, 8, 56), (80, 2, 4, 28), (160, 4, 2, 14), (320, 8, 1, 7))
"""Of the four stages of our T at 224 pixels: channels, heads, reduction of the map, and places in height and width."""
RIVALS: dict[str, dict[str, Any]] = {"strip": {}, "reduced": {"key_dim": 0}, "full": {"key_dim": 0, "reduction": 1}}
"""What differs from strip self-attention in spatial-reduction attention, and in full attention."""
ROUNDS = 9
ARMS: dict[str, dict[str, Any]] = {
    "strip": {"mlp_ratio": 3.0},
    "reduced": {"mlp_ratio": 2.06, "key_dim": 0},
    "full": {"mlp_ratio": 2.12, "key_dim": 0, "reductions": (1, 1, 1, 1)},
    "none": {"mlp_ratio": 4.16, "attention": False},
}
"""Feed-forward layers as wide as give all nets the same parameters."""
PASSES = 5_600
"""Of images, for each arm: minutes for twelve nets on two cores."""
PUBLISHED = {
    "s2aformer_mini": (5.02, 0.43),
    "s2aformer_t": (5.80, 0.655),
    "s2aformer_xs": (6.54, 0.786),
    "s2aformer_s": (10.69, 1.38),
    "s2aformer_m": (24.87, 4.12),
}
"""Millions of parameters and, at 224 pixels, billions of multiply-adds."""


def run(ctx: Context) -> Verdict:
    """Time three attentions at the shapes of the stages, train four nets of near equal size, count all sizes."""
    shapes = SHAPES[2:] if ctx.quick else SHAPES
    rounds = 1 if ctx.quick else ROUNDS
    draws = [attention_times(shapes, rounds, seed) for seed in ctx.seeds]
    spent = {name: [sum(rows[name] for rows in draw) for draw in draws] for name in RIVALS}
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    common = {"model.name": "s2aformer_nano", "train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, "model.options": own}) for seed in ctx.seeds]
        for name, own in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    sizes = published_sizes(list(PUBLISHED)[:1] if ctx.quick else list(PUBLISHED))
    taken = "milliseconds of processor time for a layer of each stage, one image, on one thread"
    names = {"full": "full attention", "reduced": "spatial-reduction attention", "none": "no attention"}
    return Verdict(
        [
            *(
                paired(
                    f"strip self-attention is sooner done than {names[rival]} at the same shapes",
                    taken,
                    spent,
                    ours="strip",
                    against=rival,
                    higher_is_better=False,
                )
                for rival in ("reduced", "full")
            ),
            *(
                paired(
                    f"a net with strip self-attention is more accurate than one with {names[rival]} and as many "
                    "parameters",
                    "top-1 on held-out images",
                    top1,
                    ours="strip",
                    against=rival,
                )
                for rival in ("none", "reduced", "full")
            ),
            bounded(
                "nets of widths and depths of ours have the published parameters and multiply-adds",
                "largest deviation beyond the last digit of the published figure, as a share of it",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            "Timed in turns on this processor, with random weights; layers as they are built.",
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            "The published widths and depths were not at hand: sizes were met with ours. Accuracy is of nets of a "
            "tenth of a million parameters on small images; ImageNet accuracy and GPU throughput are not shown.",
        ],
        tables={
            "attention at the shapes of the stages": [
                cost_row(shape, [draw[i] for draw in draws]) for i, shape in enumerate(shapes)
            ],
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "published sizes": sizes,
        },
    )


def layer(shape: tuple[int, int, int, int], rival: str) -> StripSelfAttention:
    """Return the attention ``rival`` of a stage."""
    dim, heads, reduction, _ = shape
    return StripSelfAttention(dim, heads, **{"reduction": reduction, **RIVALS[rival]}).eval()


def attention_times(shapes: Sequence[tuple[int, int, int, int]], rounds: int, seed: int) -> list[dict[str, float]]:
    """Return for each shape the milliseconds that each attention takes for an image, in turns."""
    rows = []
    for shape in shapes:
        dim, *_, side = shape
        image = torch.randn(1, dim, side, side, generator=torch.Generator().manual_seed(seed))
        rows.append(in_turns({rival: partial(layer(shape, rival), image) for rival in RIVALS}, rounds))
    return rows


def cost_row(shape: tuple[int, int, int, int], draws: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return what each attention takes at a shape: multiply-adds and mean milliseconds."""
    dim, heads, reduction, side = shape
    row: dict[str, Any] = {"channels": dim, "heads": heads, "reduction": reduction, "side": side}
    for rival in RIVALS:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            # Fused attention is not counted on every device; on the meta device it is taken apart.
            layer(shape, rival).to("meta")(torch.zeros(1, dim, side, side, device="meta"))
        row[f"{rival}_mega_madds"] = counter.get_total_flops() / 2e6
        row[f"{rival}_ms"] = sum(draw[rival] for draw in draws) / len(draws)
    return row


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net."""
    rows = []
    for name in names:
        params, madds = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        rows.append(size_row(name, size_of(model), (params, madds), (0.01, 0.01)))
    return rows
