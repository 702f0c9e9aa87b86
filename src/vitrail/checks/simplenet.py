"""SimpleNet: is a plain row of convolutions as good as VGG's and ResNet's arrangements of as many parameters?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.edits.surgery import Edit
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.simplenet import SimpleNet

VGG: dict[str, Any] = {
    "widths": (16, 16, 32, 32, 64, 64, 128, 128),
    "strides": (),
    "pools": (2, 4, 6),
    "pointwise": (),
}
"""Two layers of 3 x 3 at each resolution, twice as wide at each: 2 % fewer parameters than ours."""
HIDDEN = 64
RESNET: dict[str, Any] = {"channels": (16, 32, 64, 128), "layers": (1, 1, 1, 1), "stem_stride": 1}
"""A residual block of two 3 x 3 layers at each resolution: 1 % fewer parameters than ours, more multiply-adds."""
PASSES = 9_600
"""Of images, for each arm: minutes for nine nets on two cores."""
PUBLISHED = {
    "simplenetv1_small_m1_05": (1.51, 0.34),
    "simplenetv1_small_m2_05": (1.51, 0.43),
    "simplenetv1_small_m1_075": (3.29, 0.76),
    "simplenetv1_small_m2_075": (3.29, 0.96),
    "simplenetv1_5m_m1": (5.75, 1.35),
    "simplenetv1_5m_m2": (5.75, 1.69),
    "simplenetv1_9m_m1": (9.51, 2.78),
    "simplenetv1_9m_m2": (9.51, 3.56),
}
"""Millions of parameters and, at 224 pixels, billions of multiply-adds, from the authors' benchmark tables."""
ARMS: dict[str, dict[str, Any]] = {
    "simplenet": {"model.name": "simplenet_nano"},
    "vgg": {
        "model.name": "simplenet_nano",
        "model.options": VGG,
        "model.edits": [{"name": "vitrail.checks.simplenet:vgg_head"}],
    },
    "resnet": {"model.name": "small_resnet_nano", "model.options": RESNET},
}


def run(ctx: Context) -> Verdict:
    """Train three arrangements at equal numbers of image passes and near equal size; count the published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    common = {"train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, **own}) for seed in ctx.seeds] for name, own in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    sizes = published_sizes(list(PUBLISHED)[:1] if ctx.quick else list(PUBLISHED))
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "SimpleNet is more accurate than a residual net of as many parameters",
                quantity,
                top1,
                ours="simplenet",
                against="resnet",
            ),
            paired(
                "SimpleNet is more accurate than a net in the style of VGG of as many parameters",
                quantity,
                top1,
                ours="simplenet",
                against="vgg",
            ),
            bounded(
                "the nets for ImageNet have the published parameters and multiply-adds",
                "largest deviation beyond the last digit, as a share",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            "'vgg' has batch norm, which VGG had not, three linear layers behind the last map, and the same code for "
            "its convolutions; 'resnet' is small_resnet with the widths below.",
            "Nets of a third of a million parameters, trained briefly and without dropout: not the paper's regime.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "published sizes": sizes,
        },
    )


def vgg_head() -> Edit:
    """Put VGG's three linear layers in the place of the one of a SimpleNet net."""

    def edit(model: nn.Module) -> nn.Module:
        if not isinstance(model, SimpleNet):
            raise InputError(f"this head is for a SimpleNet net, and this is a {type(model).__name__}")
        model.head = nn.Sequential(
            nn.Linear(model.num_features, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, model.num_classes),
        )
        return model

    return edit


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net."""
    rows = []
    for name in names:
        params, flops = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        rows.append(size_row(name, size_of(model), (params, flops), (0.01, 0.01)))
    return rows
