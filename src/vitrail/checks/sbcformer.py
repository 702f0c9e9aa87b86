"""SBCFormer: is it soon done on one thread of a CPU, and is its hourglass better than convolutions alone?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.evaluate.turns import in_turns
from vitrail.models import create_model

TIMED = ("sbcformer_b", "edgenext_small", "mobilevit_s", "mobilenetv3_large_150d")
QUICK_TIMED = ("sbcformer_nano", "mobilenetv3_small_050")
"""Ours, and of each of three families of timm the net nearest in multiply-adds; or a trial of two small ones."""
ROUNDS = 9
ARMS: dict[str, dict[str, Any]] = {
    "hourglass": {},
    "convolutions": {"depths_mattn": (0, 0, 0), "depths_mixer": (2, 3, 3)},
    "full map": {"pool_ratios": (1, 1, 1), "side": 14},
}
"""Parameters within 2 % of each other; attention on the full map takes 1.7 times the multiply-adds."""
PASSES = 5_600
"""Of images, for each arm: minutes for nine nets on two cores."""
PUBLISHED = {"sbcformer_xs": (5.6, 0.7), "sbcformer_s": (8.5, 0.9), "sbcformer_b": (13.8, 1.6)}
"""Millions of parameters and, at 224 pixels, billions of multiply-adds, as later papers quote them from this one."""


def run(ctx: Context) -> Verdict:
    """Time four nets in turns on one thread, train three arrangements at near equal size, count the published nets."""
    names, side = (QUICK_TIMED, 64) if ctx.quick else (TIMED, 224)
    models = {name: create_model(name, num_classes=1000).eval() for name in names}
    draws = [latencies(models, side, 1 if ctx.quick else ROUNDS, seed) for seed in ctx.seeds]
    spent = {name: [draw[name] for draw in draws] for name in names}
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    common = {"model.name": "sbcformer_nano", "train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, "model.options": own}) for seed in ctx.seeds]
        for name, own in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    sizes = published_sizes(list(PUBLISHED)[:1] if ctx.quick else list(PUBLISHED))
    sooner = "milliseconds of processor time for an image, on one thread, for each draw of images"
    quantity, deviation = "top-1 on held-out images", "largest deviation beyond the last digit, as a share"
    return Verdict(
        [
            *(
                paired(
                    f"on one thread {names[0]} answers sooner than {peer}, of similar multiply-adds",
                    sooner,
                    spent,
                    ours=names[0],
                    against=peer,
                    higher_is_better=False,
                )
                for peer in names[1:]
            ),
            paired(
                "with attention on a small map a net is more accurate than with convolutions alone",
                quantity,
                top1,
                ours="hourglass",
                against="convolutions",
            ),
            paired(
                "attention on a small map, which gates what is seen on the full one, is more accurate than attention "
                "on the full map",
                quantity,
                top1,
                ours="hourglass",
                against="full map",
            ),
            bounded(
                "the nets have the published parameters",
                deviation,
                max(row["params_off"] for row in sizes),
                at_most=0.01,
            ),
            bounded(
                "the nets have the published multiply-adds",
                deviation,
                max(row["madds_off"] for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"Timed in turns at {side} pixels, one image at a time, on this processor: the paper's is the ARM one of "
            "a Raspberry Pi 4. Nets as they are built, not prepared for inference.",
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            "Ours has the parameters and the outputs of the authors' code, which takes fewer multiply-adds than the "
            "paper is quoted with.",
            "Accuracy is of nets of a seventh of a million parameters on small images: of ImageNet nothing is shown.",
        ],
        tables={
            "latency on one thread": latency_rows(models, side, spent),
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "published sizes": sizes,
        },
    )


def latencies(models: Mapping[str, nn.Module], side: int, rounds: int, seed: int) -> dict[str, float]:
    """Return milliseconds that each model takes for an image: medians over rounds in which they take turns."""
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return in_turns({name: partial(model, image) for name, model in models.items()}, rounds)


def latency_rows(
    models: Mapping[str, nn.Module], side: int, spent: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Return what each timed net has and takes."""
    rows = []
    for name, model in models.items():
        madds, ms = count_flops(model, (side, side)) / 1e9, statistics.mean(spent[name])
        rows.append(
            {
                "net": name,
                "params_m": count_parameters(model) / 1e6,
                "madds_g": madds,
                "ms_per_image": ms,
                "gigamadds_per_second": 1e3 * madds / ms,
            }
        )
    return rows


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net."""
    rows = []
    for name in names:
        params, flops = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        rows.append(size_row(name, size_of(model), (params, flops), (0.1, 0.1)))
    return rows
