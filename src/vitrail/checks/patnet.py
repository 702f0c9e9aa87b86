"""PATNet: is its T2 sooner done than FasterNet's, and is attention on untouched channels worth its parameters?"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.evaluate.turns import in_turns
from vitrail.models import create_model

TIMED, QUICK_TIMED = ("patnet_t2", "fasternet_t2"), ("patnet_nano", "fasternet_t0")
BATCH = 8
ROUNDS = 9
ARMS: dict[str, dict[str, Any]] = {
    "patnet": {},
    "fasternet": {"mixers": ("identity",) * 4, "spatial": False, "mlp_ratio": 3.05},
    "no self": {"mixers": ("channel",) * 4, "mlp_ratio": 2.35},
    "no spatial": {"spatial": False, "mlp_ratio": 2.15},
}
"""Wider feed-forward layers give the nets that lack something the parameters of the one that lacks nothing."""
PASSES = 5_600
"""Of images, for each arm: minutes for twelve nets on two cores."""


def run(ctx: Context) -> Verdict:
    """Time both nets, and ours folded, in turns; train four arrangements of near equal size."""
    (ours, theirs), side = (QUICK_TIMED, 32) if ctx.quick else (TIMED, 224)
    models = {name: create_model(name, num_classes=1000).eval() for name in (ours, theirs)}
    models["folded"] = reparameterize_model(models[ours])
    one: dict[str, list[float]] = {name: [] for name in models}
    many: dict[str, list[float]] = {name: [] for name in models}
    for seed in ctx.seeds:
        for spent, count in ((one, 1), (many, BATCH)):
            images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
            calls = {name: partial(model, images) for name, model in models.items()}
            for name, ms in in_turns(calls, 1 if ctx.quick else ROUNDS).items():
                spent[name].append(ms / count)
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    common = {"model.name": "patnet_nano", "train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, "model.options": own}) for seed in ctx.seeds]
        for name, own in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    taken, quantity = "milliseconds of processor time for an image, on one thread", "top-1 on held-out images"
    more_accurate = {
        "fasternet": "a net whose untouched channels are attended to is more accurate than one that leaves them alone",
        "no self": "self-attention in the last stage is more accurate than channel attention there",
        "no spatial": "with spatial attention in its feed-forward layers a net is more accurate than without",
    }
    return Verdict(
        [
            paired(
                f"on one thread {ours} answers sooner than {theirs}",
                f"{taken}, one at a time",
                one,
                ours=ours,
                against=theirs,
                higher_is_better=False,
            ),
            paired(
                f"on one thread {ours} answers more images a second than {theirs}",
                f"{taken}, {BATCH} at a time",
                many,
                ours=ours,
                against=theirs,
                higher_is_better=False,
            ),
            *(
                paired(f"{claim}, which has as many parameters", quantity, top1, ours="patnet", against=name)
                for name, claim in more_accurate.items()
            ),
            bounded(
                "spatial attention folds into the feed-forward layers",
                "largest difference of logits, as a share of the largest",
                max(fold_error(arm.model, arm.preprocess.size) for arm in arms["patnet"]),
                at_most=1e-5,
            ),
        ],
        notes=[
            f"Timed in turns at {side} pixels on this processor, with random weights; FasterNet is timm's. Nets as "
            "they are built; 'folded' has spatial attention folded.",
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            "Accuracy is of nets of a quarter of a million parameters on small images: the 1.3 % between the T2 nets "
            "on ImageNet, and throughput on a GPU, are not shown.",
        ],
        tables={
            "latency on one thread": [
                cost_row(name, model, side, sum(one[name]) / len(one[name]), sum(many[name]) / len(many[name]))
                for name, model in models.items()
            ],
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
        },
    )


def cost_row(name: str, model: nn.Module, side: int, latency: float, batched: float) -> dict[str, Any]:
    """Return what a timed net has and takes; milliseconds are of an image."""
    return {
        "net": name,
        "params_m": count_parameters(model) / 1e6,
        # Fused attention is not counted on every device; on the meta device it is taken apart.
        "madds_g": count_flops(copy.deepcopy(model).to("meta"), (side, side)) / 1e9,
        "ms": latency,
        "ms_in_a_batch": batched,
        "images_per_second": 1e3 / batched,
    }


@torch.no_grad()
def fold_error(model: nn.Module, size: tuple[int, int]) -> float:
    """Return by how much folding changes the logits of noise, over the largest."""
    images = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    return float((reparameterize_model(model)(images) - logits).abs().max() / logits.abs().max())
