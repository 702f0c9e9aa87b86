"""CrossViT: do two branches that meet by cross attention beat one of them, and both apart?

The paper's claim is of two points above DeiT on ImageNet. Here small nets see a few thousand small images: CrossViT's
nano, a plain vision transformer of its coarse branch, and the nano without cross attention, whose branches answer apart
and are averaged. All arms see the same number of images.
"""

from __future__ import annotations

from typing import Any

from timm.models.crossvit import MultiScaleBlock
from torch import nn

from vitrail.checks.check import Context, Finding, Verdict, arm_cost, paired
from vitrail.edits.surgery import Edit, replace_modules
from vitrail.models.crossvit import Apart

COARSE: dict[str, Any] = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 3}
"""The nano's coarse branch: two blocks twice."""
PASSES = 14_000
"""Of images, for each arm."""


def without_cross_attention() -> Edit:
    """Leave the branches of a CrossViT apart, up to the mean of their answers."""

    def edit(model: nn.Module) -> nn.Module:
        return replace_modules(
            model, lambda _name, module: isinstance(module, MultiScaleBlock), Apart, what="multi-scale block"
        )

    return edit


def run(ctx: Context) -> Verdict:
    """Train three nets on every seed."""
    index = ctx.index("digits" if ctx.quick else "fashion")
    epochs = (64 if ctx.quick else PASSES) / len(index.rows("train"))
    nano = {"model.name": "crossvit_nano"}
    side = ctx.recipe(index, {}).model.img_size
    settings: dict[str, dict[str, Any]] = {
        "crossvit": nano,
        "coarse branch": {
            "model.name": "vit_tiny_patch16_224",
            "model.img_size": -(-int(side) // 8) * 8,
            "model.options": COARSE,
        },
        "apart": {**nano, "model.edits": [{"name": "vitrail.checks.crossvit:without_cross_attention"}]},
    }
    arms = {
        name: [
            ctx.train(index, name.replace(" ", "-"), seed, {"train.batch_size": 32, "train.epochs": epochs, **own})
            for seed in ctx.seeds
        ]
        for name, own in settings.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}

    def beats(against: str, claim: str) -> Finding:
        pair = {name: top1[name] for name in ("crossvit", against)}
        return paired(claim, "top-1 accuracy, held-out images", pair, ours="crossvit", against=against)

    findings = [
        beats("coarse branch", "Two branches with cross attention are more accurate than the coarse one alone."),
        beats("apart", "Branches that meet by cross attention are more accurate than the same branches apart."),
    ]
    notes = [
        f"{len(index.rows('train'))} training images; each arm sees {epochs:.3g} epochs of them",
        "equal are the images seen, the width and the depth of the coarse branch; parameters and multiply-adds are in "
        "the table of costs",
    ]
    return Verdict(findings, notes, {"costs": [arm_cost(name, trained[0]) for name, trained in arms.items()]})
