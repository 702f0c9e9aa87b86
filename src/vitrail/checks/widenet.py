"""WideNet: are shared depths with experts more accurate for their parameters, and do the norms and the balance matter?

The paper's claim is of 1.5 points above ViT on ImageNet with 0.72 times its parameters. Here small nets of one width
and depth see a few thousand small images: WideNet, with fewer parameters than the ViT; a ViT; a ViT whose depths share
all but their norms; WideNet whose depths share their norms too; and WideNet without the balance loss. All arms see the
same number of images.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitrail.app.build import count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.data.index import Index
from vitrail.evaluate.expert_load import run as expert_load

BODY: dict[str, Any] = {"patch_size": 4, "embed_dim": 64, "num_heads": 4}
DEPTH, QUICK_DEPTH = 6, 2
HIDDEN = 256
"""Width inside an expert, and of the feed-forward layers of both ViTs: 4 times that of the net."""
PASSES = 9_000
"""Of images, for each arm: minutes for fifteen nets on two cores."""


def run(ctx: Context) -> Verdict:
    """Train five nets on every seed, and count what their experts are given."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = (64 if ctx.quick else PASSES) / len(index.rows("train"))
    side, depth = int(ctx.recipe(index, {}).model.img_size), QUICK_DEPTH if ctx.quick else DEPTH
    wide = {"img_size": side, **BODY, "depth": depth, "hidden": HIDDEN}
    balanced = {"model.name": "widenet_nano", "method.name": "widenet:BalancedExperts"}
    settings: dict[str, dict[str, Any]] = {
        "widenet": {**balanced, "model.options": wide},
        "vit": {
            "model.name": "vit_tiny_patch16_224",
            "model.options": {**BODY, "depth": depth, "mlp_ratio": HIDDEN / BODY["embed_dim"]},
        },
        "shared vit": {"model.name": "widenet_nano", "model.options": {**wide, "experts": 1, "top_k": 1}},
        "shared norms": {**balanced, "model.options": {**wide, "shared_norms": True}},
        "unbalanced": {**balanced, "model.options": wide, "method.options": {"balance": 0.0}},
    }
    shared = {"train.batch_size": 32, "train.epochs": epochs, "optim.lr": 1e-3}
    arms = {
        name: [ctx.train(index, name.replace(" ", "-"), seed, {**shared, **own}) for seed in ctx.seeds]
        for name, own in settings.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    parameters = {name: count_parameters(trained[0].model) for name, trained in arms.items()}
    uneven = {name: [unevenness(ctx, arm, index) for arm in arms[name]] for name in ("widenet", "unbalanced")}
    quantity = "top-1 accuracy, held-out images"

    def beats(against: str, claim: str) -> Any:
        return paired(claim, quantity, top1, ours="widenet", against=against)

    return Verdict(
        [
            beats("vit", "a WideNet is more accurate than a ViT of the same width and depth, with fewer parameters"),
            beats("shared vit", "depths that share experts are more accurate than depths that share one layer"),
            beats("shared norms", "depths with norms of their own are more accurate than depths that share them"),
            paired(
                "the balance loss makes the load of the experts more even",
                "deviation of the experts' shares, over an even share, mean over depths",
                uneven,
                ours="widenet",
                against="unbalanced",
                higher_is_better=False,
            ),
            bounded(
                "a WideNet has at most 0.72 times the parameters of the ViT",
                "parameters over those of the ViT",
                parameters["widenet"] / parameters["vit"],
                at_most=0.72,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm; patches of 4 x 4 "
            f"pixels, {depth} depths, four experts of which a token gets two.",
            "Equal are the images seen, width, depth and the width inside a feed-forward layer or an expert; a token "
            "of a WideNet goes through two of these at each depth, and so costs more than one of the ViT.",
            "Small nets on small images: ImageNet and the paper's text models are not shown.",
        ],
        tables={
            "accuracy for parameters": [
                {
                    "arm": name,
                    "top1": float(np.mean(top1[name])),
                    "parameters": parameters[name],
                    "points for 1000 parameters": 1e5 * float(np.mean(top1[name])) / parameters[name],
                }
                for name in arms
            ],
            "load of the experts": load(ctx, arms["widenet"][0], index),
            "costs": [arm_cost(name, trained[0]) for name, trained in arms.items()],
        },
    )


def load(ctx: Context, arm: Arm, index: Index) -> list[dict[str, Any]]:
    """Return the load of the experts of a net on held-out images."""
    return expert_load(arm.model, ctx.held_out(index, arm.preprocess, most=32 if ctx.quick else 256)).table


def unevenness(ctx: Context, arm: Arm, index: Index) -> float:
    """Return how far the experts' shares are from an even one: their deviation over it, a mean over depths."""
    rows = load(ctx, arm, index)
    depths = {row["depth"] for row in rows}
    shares = [[row["share"] for row in rows if row["depth"] == depth] for depth in depths]
    return float(np.mean([np.std(each) * len(each) for each in shares]))
