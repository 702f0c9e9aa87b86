"""Gramian heads: are several better than one, and does driving them apart make them differ, and answer better?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.data.batches import Batches
from vitrail.edits.gramian_heads import GramianHeads

COUNTS = (1, 3, 5)
LAMBDA = -0.8
PASSES = 4_800
"""Of images, for each arm: minutes for eighteen nets on two cores."""
GRAM_DIM = 32
CHEAP = 0.4
"""Share of the multiply-adds that five heads may add: as in table 3 for ConvNeXt-T, 4.5 to 6.3 G, where the aggregation
of stages is part of it."""


def run(ctx: Context) -> Verdict:
    """Train one linear classifier, and one, three and five Gramian heads with and without decorrelation."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.02 if ctx.quick else PASSES / len(index.rows("train"))
    common = {"model.name": "small_resnet_nano", "train.batch_size": 32, "train.epochs": epochs}
    own: dict[str, dict[str, Any]] = {"linear": {}}
    for heads in COUNTS[::2] if ctx.quick else COUNTS:
        for lam in (LAMBDA, 0.0):
            own[f"{heads}, {'apart' if lam else 'free'}"] = {
                "model.edits": [{"name": "ga_heads:gramian_heads", "options": {"heads": heads, "gram_dim": GRAM_DIM}}],
                "method.name": "ga_heads:GramianHeadTraining",
                "method.options": {"decorrelation": lam},
            }
    # One head is its own mean, from which nothing drives it.
    del own["1, apart"]
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, **settings}) for seed in ctx.seeds]
        for name, settings in own.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    alike: dict[str, list[float]] = {}
    rows = []
    for name, trained in arms.items():
        if name[0] not in "35":
            continue
        for seed, arm in zip(ctx.seeds, trained, strict=True):
            held_out = ctx.held_out(index, arm.preprocess, most=64 if ctx.quick else 2_000)
            found = of_heads(arm.model, held_out)
            alike.setdefault(name, []).append(found["correlation"])
            rows.append({"arm": name, "seed": seed, "top1": arm.top1, **found})
    costs = [arm_cost(name, trained[0]) for name, trained in arms.items()]
    madds = {row["arm"]: row["madds"] for row in costs}
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "five heads that are driven apart are more accurate than one",
                quantity,
                top1,
                ours="5, apart",
                against="1, free",
            ),
            paired(
                "five heads that are driven apart are more accurate than five that are not",
                quantity,
                top1,
                ours="5, apart",
                against="5, free",
            ),
            paired(
                "five heads that are driven apart are less correlated than five that are not",
                "mean correlation of two heads' centred logits, held-out images",
                alike,
                ours="5, apart",
                against="5, free",
                higher_is_better=False,
            ),
            paired(
                "five heads that are driven apart are more accurate than a linear classifier of the mean",
                quantity,
                top1,
                ours="5, apart",
                against="linear",
            ),
            bounded(
                "five heads add little to the multiply-adds",
                "multiply-adds added, as a share of those with a linear classifier",
                madds["5, apart"] / madds["linear"] - 1,
                at_most=CHEAP,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm; heads take the Gramian "
            f"of {GRAM_DIM} channels, and lambda is {LAMBDA}, as published, where they are driven apart.",
            "The loss of several heads is a sum, as published, so that the backbone's gradients are larger the more "
            "there are; the optimiser divides by their size.",
            "A net of under a million parameters on small images: ImageNet is not shown.",
        ],
        tables={"cost of the arms": costs, "several heads": rows},
    )


@torch.no_grad()
def of_heads(model: nn.Module, data: Batches) -> dict[str, float]:
    """Return how a trained net's heads agree: correlation, and the top-1 of the mean head by itself."""
    heads = next(module for module in model.modules() if isinstance(module, GramianHeads))
    heads.apart = True
    try:
        batches = [(model(images), targets) for images, targets in data()]
    finally:
        heads.apart = False
    logits = torch.cat([logits for logits, _ in batches])  # (B, heads, K)
    targets = torch.cat([targets for _, targets in batches])
    single = (logits.argmax(-1) == targets[:, None]).float().mean()
    return {"correlation": correlation(logits), "single_top1": float(single)}


def correlation(logits: Tensor) -> float:
    """Return the mean correlation of the logits (B, heads, K) of two heads, each image's centred over its classes."""
    centred = (logits - logits.mean(-1, keepdim=True)).transpose(0, 1).flatten(1)
    matrix = torch.corrcoef(centred)
    count = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (count * (count - 1)))
