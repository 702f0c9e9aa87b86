"""DeiT III: is its recipe better than RandAugment with cross-entropy, and is low resolution first worth it?

Small transformers see some thousands of small images. What an arm changes is taken from the shipped recipe itself; the
optimiser is the same for the arms of the first claim, as LAMB is for batches a hundred times larger.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from vitrail.app.build import count_flops
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.data.index import Index
from vitrail.models import create_model
from vitrail.training.recipe import Recipe

NET: dict[str, Any] = {"embed_dim": 64, "num_heads": 2}
PASSES = 8_000
"""Of images, for each arm."""
LOW = 5 / 7
"""Side of the small images: 20 pixels for 28, so that there are about half as many patches."""
EARLY = 0.7
"""Of the compute, for small images."""
OTHERS = {
    "randaugment": {
        "augment.rand_augment": 9,
        "augment.erase": 0.25,
        "augment.mixup": 0.8,
        "augment.cutmix": 1.0,
        "augment.flip": 0.5,
        "method.options": {"smoothing": 0.1},
    },
    "plain": {"augment.flip": 0.5, "method.options": {"smoothing": 0.1}},
}
"""The recipe of DeiT's first version, less its optimiser; and none."""
PUBLISHED = {
    "deit3_small": (22.0, 4.6),
    "deit3_medium": (38.8, 8.0),
    "deit3_base": (86.6, 17.5),
    "deit3_large": (304.4, 61.6),
    "deit3_huge": (632.1, 167.4),
}
"""Millions of parameters and billions of multiply-adds at 224 pixels, from the README."""


def run(ctx: Context) -> Verdict:
    """Train a net by several recipes at equal numbers of images, and at two resolutions at equal compute."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    images = len(index.rows("train"))
    passes = 32 if ctx.quick else PASSES
    net = {**NET, "depth": 1} if ctx.quick else NET
    common = {
        "model.name": "deit3_nano",
        "model.options": net,
        "train.batch_size": 32,
        "optim.lr": 1e-3,
        "train.warmup": 0.1,
    }
    ours = published_settings()
    lamb = {"optim.name": "lamb", "optim.lr": Recipe.load("deit3").optim.lr}
    settings: dict[str, dict[str, Any]] = {"deit3": ours, **OTHERS, "deit3, lamb": {**ours, **lamb}}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, "train.epochs": passes / images, **own}) for seed in ctx.seeds]
        for name, own in settings.items()
    }
    resolutions = [low_then_full(ctx, index, seed, {**common, **ours}, passes) for seed in ctx.seeds]
    arms["low, then full"] = [arm for arm, _ in resolutions]
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    sizes = published_sizes(1 if ctx.quick else len(PUBLISHED))
    quantity = "top-1 on held-out images"

    def beats(claim: str, one: str, other: str) -> Any:
        return paired(claim, quantity, {one: top1[one], other: top1[other]}, ours=one, against=other)

    return Verdict(
        [
            beats(
                "3-Augment with binary cross-entropy is better than RandAugment with cross-entropy",
                "deit3",
                "randaugment",
            ),
            beats("it is better than flips and shifts alone, with cross-entropy", "deit3", "plain"),
            beats("its optimiser, LAMB, is better than AdamW", "deit3, lamb", "deit3"),
            beats(
                "low resolution and then full is better than full resolution throughout, at equal multiply-adds",
                "low, then full",
                "deit3",
            ),
            bounded(
                "the nets have the published parameters and multiply-adds",
                "largest deviation beyond the last digit, as a share",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{images:,} training images; {passes:,} passes of an image for each arm but the one of two resolutions.",
            "mixup and cutmix are in both recipes; all arms shift images, as random resized crops are for photos.",
            "AdamW in all arms but the one with LAMB, whose learning rate is the published one; batches are of 32.",
            "Nets of under a million parameters on small images: ImageNet accuracy, and BEiT, are not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "compute of the resolutions": [row for _, row in resolutions],
            "published sizes": sizes,
        },
    )


def published_settings() -> dict[str, Any]:
    """Return what the shipped recipe says of augmentation and loss, but for the crop, which is for photos."""
    recipe = Recipe.load("deit3")
    kept = ("flip", "three_augment", "color_jitter", "mixup", "cutmix")
    return {
        **{f"augment.{name}": getattr(recipe.augment, name) for name in kept},
        "method.options": dict(recipe.method.options),
    }


def low_then_full(
    ctx: Context, index: Index, seed: int, settings: dict[str, Any], passes: int
) -> tuple[Arm, dict[str, Any]]:
    """Train on small images, go on with the weights on large ones, and say what that took.

    Args:
        ctx, index, seed, settings: as for ``Context.train``.
        passes: of large images, whose multiply-adds both trainings together may take.
    """
    full = int(ctx.recipe(index, settings).model.img_size)
    low, images = round(LOW * full), len(index.rows("train"))
    with torch.device("meta"):
        net = create_model("deit3_nano", num_classes=len(index.classes), img_size=full, **settings["model.options"])
    share = count_flops(net, (low, low)) / count_flops(net, (full, full))
    early, late = EARLY * passes / share, (1 - EARLY) * passes
    small = {**settings, "model.img_size": low, "train.epochs": early / images}
    first = ctx.train(index, "low", seed, small)
    file = ctx.folder / f"low-{seed}.safetensors"
    save_file({name: value.contiguous() for name, value in first.model.state_dict().items()}, file)
    # Finetuning, so at a tenth of the rate.
    tuned = {**settings, "model.pretrained": str(file), "train.epochs": late / images}
    arm = ctx.train(index, "low, then full", seed, {**tuned, "optim.lr": 0.1 * settings["optim.lr"]})
    row = {
        "seed": seed,
        "low_side": low,
        "full_side": full,
        "madds_of_low": share,
        "passes_at_low": round(early),
        "passes_at_full": round(late),
        "top1_before": first.top1,
        "top1_after": arm.top1,
    }
    return arm, row


def published_sizes(most: int) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of the first nets whose figures are published."""
    rows = []
    for name, (params, madds) in list(PUBLISHED.items())[:most]:
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        rows.append(size_row(name, size_of(model), (params, madds), (0.1, 0.1)))
    return rows
