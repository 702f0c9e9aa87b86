"""NASNet: does a cell found on small images serve larger ones, and does dropping paths help more if it grows?"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.data.index import Index
from vitrail.models import create_model
from vitrail.models.nasnet import NASNET_A
from vitrail.search.cell_space import CellSpace
from vitrail.search.controller import ControllerSearch
from vitrail.search.strategy import Architecture, RandomSearch, Strategy, Trial, best, search

SMALL: dict[str, Any] = {"filters": 4, "cells": 1, "stem_width": 12}
LARGE: dict[str, Any] = {"filters": 8, "cells": 2, "stem_width": 24}
"""Twice as wide, and twice as many normal cells."""
TRIALS, BATCH, PICKS = 16, 4, 3
"""Cells that each search tries; those after which the controller learns; random cells whose median is taken."""
LR = 0.01
"""Of the controller. The published 3.5e-4 is for 20,000 cells, and would hardly move one that sees 16."""
SEARCH_PASSES, PASSES = 512, 1_280
"""Of images, for each net of a search and for each arm: minutes for all on two cores."""
DROP = 0.4
"""The published last rate of dropped paths for small images."""
OTHERWISE = {
    "constant": "DropPath of the rate that it ends with",
    "half": "DropPath of half that rate, which drops as many paths in all",
    "none": "no dropping of paths",
}
PUBLISHED = {"nasnet_mobile": (5.3, 0.564, 0.1, 0.001, 224), "nasnet_large": (88.9, 23.8, 0.1, 0.1, 331)}
"""Millions of parameters, billions of multiply-adds, their last digits, and pixels, from the paper's tables 2 and 3."""


def run(ctx: Context) -> Verdict:
    """Search on digits, stack what was found larger, train it; train with paths dropped in four ways; count nets."""
    digits = ctx.index("digits")
    images = digits if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    trials, picks = (1, 1) if ctx.quick else (TRIALS, PICKS)
    large = SMALL if ctx.quick else LARGE
    space = CellSpace(options=SMALL, blocks=2 if ctx.quick else 5)
    known = RandomSearch(space).ask(1)[0] if ctx.quick else NASNET_A
    names = ("controller", "random search", "random median", "published")
    cells: dict[str, list[float]] = {name: [] for name in names}
    rewards: dict[str, list[float]] = {"controller": [], "random search": []}
    kept: dict[str, Arm] = {}
    for seed in ctx.seeds:
        strategies: dict[str, Strategy] = {
            "controller": ControllerSearch(space, seed=seed, lr=LR),
            "random search": RandomSearch(space, seed=seed),
        }
        drawn = RandomSearch(space, seed=1_000 + seed).ask(picks)
        for name, strategy in strategies.items():
            tried = searched(ctx, digits, strategy, f"{name} search", seed, trials)
            rewards[name].append(statistics.fmean(trial.reward for trial in tried[trials // 2 :]))
            found = best(tried).architecture
            arm = ctx.train(images, name, seed, settings(ctx, images, large, found))
            cells[name].append(arm.top1)
            kept.setdefault(name, arm)
        random = [
            ctx.train(images, f"random {number}", seed, settings(ctx, images, large, each)).top1
            for number, each in enumerate(drawn)
        ]
        cells["random median"].append(statistics.median(random))
        arm = ctx.train(images, "published", seed, settings(ctx, images, large, known))
        cells["published"].append(arm.top1)
        kept.setdefault("published", arm)
    dropped = dropping(ctx, images, settings(ctx, images, large, known), cells["published"])
    sizes = published_sizes(["nasnet_mobile"] if ctx.quick else list(PUBLISHED))
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "a cell that a controller found on digits, stacked larger on other images, is more accurate than the "
                "median of random cells",
                quantity,
                cells,
                ours="controller",
                against="random median",
            ),
            paired(
                "the cell that a controller found is more accurate there than the one that random search found",
                quantity,
                {name: cells[name] for name in ("controller", "random search")},
                ours="controller",
                against="random search",
            ),
            paired(
                "the second half of the cells that a controller tries is on average better than random ones",
                "mean top-1 on digits of the second half of the cells tried",
                rewards,
                ours="controller",
                against="random search",
            ),
            *(
                paired(
                    f"ScheduledDropPath makes a net more accurate than {way}",
                    quantity,
                    dropped,
                    ours="scheduled",
                    against=against,
                )
                for against, way in OTHERWISE.items()
                if against in dropped
            ),
            bounded(
                "the mobile and the large net have the published parameters and multiply-adds",
                "largest deviation beyond the last digit, as a share",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"Each search trains {trials} nets on digits; each cell is then judged by one larger net.",
            f"The controller learns at a rate of {LR} from {trials} rewards; published are 3.5e-4 and 20,000.",
            "'published' has NASNet-A's cells, found on CIFAR-10, and is 'none' of the arms that drop paths.",
            "Nets of under a million parameters, trained for minutes: paths are dropped against overfitting, which "
            "there is little of. ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of the cells": [arm_cost(name, arm) for name, arm in kept.items()],
            "published sizes": sizes,
        },
    )


def settings(ctx: Context, index: Index, net: dict[str, Any], genotype: Architecture) -> dict[str, Any]:
    """Return what a net of these cells is trained with."""
    passes = 64 if ctx.quick else PASSES
    return {
        "model.name": "nasnet_nano",
        "model.options": {**net, "genotype": genotype},
        "train.batch_size": 32,
        "train.epochs": passes / len(index.rows("train")),
    }


def searched(ctx: Context, index: Index, strategy: Strategy, name: str, seed: int, trials: int) -> list[Trial]:
    """Let a strategy try cells in small nets."""
    passes = 64 if ctx.quick else SEARCH_PASSES
    number = iter(range(trials))

    def reward(genotype: Architecture) -> float:
        own = {"train.epochs": passes / len(index.rows("train"))}
        arm = f"{name} {next(number)}"
        return ctx.train(index, arm, seed, settings(ctx, index, SMALL, genotype) | own).top1

    return search(strategy, reward, trials=trials, batch=BATCH)


def dropping(ctx: Context, index: Index, net: dict[str, Any], none: list[float]) -> dict[str, list[float]]:
    """Train a net with paths dropped, by when and how often."""
    ways: dict[str, dict[str, Any]] = {
        "scheduled": {"model.drop_path_rate": DROP, "method.name": "nasnet:ScheduledDropPath"},
        "constant": {"model.drop_path_rate": DROP},
    }
    if not ctx.quick:
        ways["half"] = {"model.drop_path_rate": DROP / 2}
    found = {name: [ctx.train(index, name, seed, net | own).top1 for seed in ctx.seeds] for name, own in ways.items()}
    return {**found, "none": none}


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net."""
    rows = []
    for name in names:
        params, madds, params_digit, madds_digit, side = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        rows.append(size_row(name, size_of(model, side), (params, madds), (params_digit, madds_digit)))
    return rows
