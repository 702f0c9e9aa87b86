"""RAVLT: is what rank-augmented linear attention gives of higher rank, is it more accurate, and does it stay linear?"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, beyond_rounding, bounded, paired
from vitrail.data.batches import Batches
from vitrail.evaluate import attention_rank
from vitrail.models import create_model
from vitrail.models.ravlt import Attention, plane_rotation

WIDER = 3.48
"""Ratio of the feed-forward layers that gives a net without modulation the parameters of one with it."""
ARMS: dict[str, dict[str, Any]] = {
    "rala": {"attention": ("rala",) * 4},
    "linear": {"attention": ("linear",) * 4, "modulated": False, "mlp_ratios": (WIDER,) * 4},
    "softmax": {"attention": ("softmax",) * 4, "modulated": False, "mlp_ratios": (WIDER,) * 4},
    "modulation alone": {"attention": ("linear",) * 4},
}
PASSES = 5_600
"""Of images, for each arm: minutes for twelve nets on two cores."""
PROBED = 32
"""Held-out images on which ranks are measured."""
PUBLISHED = {
    "ravlt_t": (14.90, 2.4),
    "ravlt_s": (25.59, 4.6),
    "ravlt_b": (48.24, 9.9),
    "ravlt_l": (95.24, 16.0),
}
"""Millions of parameters, counted in the authors' code, and 2^30 multiply-adds, from its README."""


def run(ctx: Context) -> Verdict:
    """Train four kinds of attention at equal numbers of image passes and near equal size; probe and count them."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    arms: dict[str, list[Arm]] = {}
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for name, options in ARMS.items():
        settings = {
            "model.name": "ravlt_nano",
            "model.options": options,
            "train.batch_size": 32,
            "train.epochs": epochs,
        }
        arms[name] = [ctx.train(index, name.replace(" ", "-"), seed, settings) for seed in ctx.seeds]
        found[name] = [probe(arm, ctx.held_out(index, arm.preprocess, most=PROBED)) for arm in arms[name]]
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    features = {name: [share(rows, "effective", "full") for rows in each] for name, each in found.items()}
    buffers = {
        name: [share(rows, "kv_effective", "channels") for rows in each]
        for name, each in found.items()
        if name != "softmax"
    }
    curve = cost_curve((7, 14) if ctx.quick else (7, 14, 28, 56))
    per_place = [row["rala_madds"] / row["places"] for row in curve]
    sizes = published_sizes(["ravlt_t"] if ctx.quick else list(PUBLISHED))
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "after training, what RALA gives is of higher rank than what plain linear attention gives",
                "effective rank of the output features of a head, as a share of the full rank, held-out images",
                features,
                ours="rala",
                against="linear",
            ),
            paired(
                "weighting its terms by the mean query raises the rank of the KV buffer",
                "effective rank of the KV buffer of a head, as a share of its channels, held-out images",
                buffers,
                ours="rala",
                against="modulation alone",
            ),
            paired(
                "a net with RALA is more accurate than one with plain linear attention, which has as many parameters",
                quantity,
                top1,
                ours="rala",
                against="linear",
            ),
            paired(
                "a net with RALA is more accurate than one with softmax attention, which has as many parameters",
                quantity,
                top1,
                ours="rala",
                against="softmax",
            ),
            bounded(
                "the multiply-adds of RALA grow linearly with the number of places",
                "largest relative deviation of the multiply-adds of a place",
                max(per_place) / min(per_place) - 1,
                at_most=0.01,
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
            f"Plain linear and softmax attention are without modulation and have feed-forward layers of {WIDER} C in "
            "place of 3 C. All arms attend so in all four stages; the published nets have softmax in the last two.",
            f"Ranks are those of {PROBED} held-out images, means over the layers that have at least as many places as "
            "channels in a head, before the convolution of the values is added.",
            "Nets of under a million parameters on small images: ImageNet accuracy is not shown.",
        ],
        tables={
            "ranks, first seed": [{"arm": name, **row} for name, each in found.items() for row in each[0]],
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "cost of attention": curve,
            "published sizes": sizes,
        },
    )


def probe(arm: Arm, data: Batches) -> list[dict[str, Any]]:
    """Return the ranks of an arm's layers."""
    return attention_rank.run(arm.model, data).table


def share(rows: list[dict[str, Any]], quantity: str, of: str) -> float:
    """Return the mean share of a full rank over the layers whose places do not limit it."""
    shares = [row[quantity] / row[of] for row in rows if row["places"] >= row["channels"]]
    return sum(shares) / len(shares)


def cost_curve(sides: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return multiply-adds and milliseconds of a layer of RAVLT-T's first stage for one image of side x side places."""
    rows = []
    for side in sides:
        row: dict[str, Any] = {"places": side * side}
        for form in ("rala", "softmax"):
            layer, x, angles = (
                Attention(64, 1, form).eval(),
                torch.randn(1, side, side, 64),
                plane_rotation(side, side, 64),
            )
            times = []
            with torch.inference_mode():
                for _ in range(4):
                    start = time.perf_counter()
                    layer(x, angles)
                    times.append(time.perf_counter() - start)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer.to("meta")(x.to("meta"), type(angles)(*(table.to("meta") for table in angles)))
            row[f"{form}_madds"] = counter.get_total_flops() // 2
            row[f"{form}_ms"] = 1e3 * min(times[1:])
        rows.append(row)
    return rows


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net."""
    rows = []
    for name in names:
        params, flops = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        count, madds = count_parameters(model) / 1e6, count_flops(model, (224, 224)) / 2**30
        rows.append(
            {
                "net": name,
                "params_m": count,
                "published_params_m": params,
                "params_off": beyond_rounding(count, params, 0.01),
                "madds_2_30": madds,
                "published_madds_2_30": flops,
                "madds_off": beyond_rounding(madds, flops, 0.1),
            }
        )
    return rows
