"""The layer-wise shuffle: does it narrow the gap between training and held-out images of a Vim that is too large?

A Vim of some 0.2 M parameters sees a few hundred images of digits again and again. The arms differ in how training is
disturbed alone: not at all, by the shuffle, or by stochastic depth, which rises with depth as well.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F

from vitrail.checks.check import Arm, Context, Verdict, bounded, paired
from vitrail.data.batches import Batches
from vitrail.data.index import Index
from vitrail.edits.layer_shuffle import shufflemamba
from vitrail.models import create_model

NET: dict[str, Any] = {"embed_dim": 64, "depth": 6}
RATE = 0.5
"""Of the shuffle, and of stochastic depth: both as published for the base net."""
HELD_OUT = 0.6
"""Share of the images that no arm sees: the few that are left can be learnt by heart."""
EPOCHS = 20.0
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "shuffle": {"model.edits": [{"name": "shufflemamba", "options": {"rate": RATE}}]},
    "stochastic depth": {"model.drop_path_rate": RATE},
}


def run(ctx: Context) -> Verdict:
    """Train the arms at equal numbers of image passes; compare losses on what they saw and what they did not."""
    index = ctx.index("digits", val_fraction=0.05 if ctx.quick else HELD_OUT)
    epochs = 0.03 if ctx.quick else EPOCHS
    arms: dict[str, list[Arm]] = {name: [] for name in ARMS}
    for seed in ctx.seeds:
        for name, own in ARMS.items():
            settings = {"model.name": "vim_nano", "model.options": NET, "train.epochs": epochs, "train.batch_size": 32}
            arms[name].append(
                ctx.train(index, name.replace(" ", "-"), seed, {**settings, "augment.policy": "none", **own})
            )
    seen = {name: [_loss(ctx, index, arm, seen=True) for arm in trained] for name, trained in arms.items()}
    unseen = {name: [_loss(ctx, index, arm, seen=False) for arm in trained] for name, trained in arms.items()}
    gaps = {name: [b - a for a, b in zip(seen[name], unseen[name])] for name in arms}
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    gap, accuracy = "cross-entropy of held-out images less that of training images", "top-1 accuracy, held-out images"
    shuffled = arms["shuffle"][0]
    return Verdict(
        [
            paired(
                "With the shuffle, an over-sized Vim has a smaller gap between training and held-out images.",
                gap,
                gaps,
                ours="shuffle",
                against="none",
                higher_is_better=False,
            ),
            paired("With the shuffle it is more accurate.", accuracy, top1, ours="shuffle", against="none"),
            paired(
                "The shuffle is more accurate than stochastic depth of the same rate.",
                accuracy,
                top1,
                ours="shuffle",
                against="stochastic depth",
            ),
            bounded(
                "In inference a shuffled net is the plain net with its weights.",
                "largest difference of their logits",
                _difference(shuffled, ctx, index),
                at_most=0.0,
            ),
        ],
        notes=[
            f"{len(index.rows('train'))} training images, {epochs:g} epochs for every arm, no augmentation.",
            "The paper's nets have 98 M parameters and more and see ImageNet for 300 epochs: that is not shown.",
        ],
        tables={
            "losses": [
                {
                    "arm": name,
                    "seed": seed,
                    "training": seen[name][i],
                    "held_out": unseen[name][i],
                    "gap": gaps[name][i],
                    "top1": top1[name][i],
                }
                for name in arms
                for i, seed in enumerate(ctx.seeds)
            ],
            "cost of a training step": step_costs(ctx.quick),
        },
    )


@torch.no_grad()
def _loss(ctx: Context, index: Index, arm: Arm, *, seen: bool) -> float:
    """Return the mean cross-entropy of an arm on images of its training, or on held-out ones."""
    stream: Batches = (ctx.training_images if seen else ctx.held_out)(
        index, arm.preprocess, most=60 if ctx.quick else None
    )
    total, count = 0.0, 0
    for images, targets in stream():
        logits = arm.model(images)
        one_label = targets.ndim == 1
        loss = F.cross_entropy if one_label else F.binary_cross_entropy_with_logits
        total += float(loss(logits, targets if one_label else targets.float())) * len(images)
        count += len(images)
    return total / count


@torch.no_grad()
def _difference(arm: Arm, ctx: Context, index: Index) -> float:
    """Return how far the logits of a shuffled net are from those of a plain net that loaded its weights."""
    plain = create_model("vim_nano", num_classes=len(index.classes), **NET).eval()
    plain.load_state_dict(arm.model.state_dict())
    images, _ = next(iter(ctx.held_out(index, arm.preprocess, most=64)()))
    return float((plain(images) - arm.model(images)).abs().max())


def step_costs(quick: bool) -> list[dict[str, Any]]:
    """Time forward and backward passes in turn, with the shuffle and without."""
    torch.manual_seed(0)
    plain = create_model("vim_nano", num_classes=10, **NET).train()
    models = {"none": plain, "shuffle": shufflemamba(rate=RATE)(copy.deepcopy(plain))}
    images = torch.randn(8 if quick else 32, 3, 28, 28)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(2 if quick else 20):
        for name, model in models.items():
            start = time.perf_counter()
            model(images).sum().backward()
            times[name].append(time.perf_counter() - start)
    median = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    return [{"arm": name, "ms": 1e3 * value, "over_none": value / median["none"]} for name, value in median.items()]
