"""PReLU networks: does a plain net of 30 layers begin to learn, and does a learnt slope help?"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.edits.surgery import Edit
from vitrail.layers.rectifier_init import rectifier_init_
from vitrail.models.prelu_net import PReLUNet

THIRTY: dict[str, Any] = {"depths": (9, 9, 8), "widths": (16, 24, 32), "rectifier_kind": "relu"}
"""With the stem, 27 convolutions; three linear layers follow, as in the paper's net."""
SLOPES = {"ours": 0.0, "Xavier": 1.0}
"""The paper's formula for a = 1 is that of Glorot and Bengio, whose derivation is for linear layers: 1 / n."""
KINDS = ("channel", "shared", "relu")
PASSES = 12_800
"""Of images, for each arm."""
DEPTH, WIDTH, BATCH = 30, 512, 32


def run(ctx: Context) -> Verdict:
    """Train a plain net of 30 layers from two beginnings, and a small one with three rectifiers; measure variances."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.02 if ctx.quick else PASSES / len(index.rows("train"))
    common: dict[str, Any] = {
        "model.name": "prelu_net_nano",
        "train.batch_size": 32,
        "train.epochs": epochs,
        "optim.name": "sgd",
        "optim.momentum": 0.9,
        "optim.lr": 1e-2,
        "optim.weight_decay": 5e-4,
    }
    begin = "vitrail.checks.prelu_net:begun"
    arms: dict[str, dict[str, Any]] = {
        name: {"model.options": THIRTY, "model.edits": [{"name": begin, "options": {"slope": slope}}]}
        for name, slope in SLOPES.items()
    } | {kind: {"model.options": {"rectifier_kind": kind}} for kind in KINDS}
    trained: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, **own}) for seed in ctx.seeds] for name, own in arms.items()
    }
    top1 = {name: [arm.top1 for arm in found] for name, found in trained.items()}
    deep = {name: top1[name] for name in SLOPES}
    kinds = {name: top1[name] for name in KINDS}
    classes = trained["ours"][0].logits.shape[1]
    spread = variances()
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "a plain net of 30 layers is more accurate when it begins with this initialisation than with Xavier's",
                quantity,
                deep,
                ours="ours",
                against="Xavier",
            ),
            bounded(
                "with Xavier's initialisation it does not begin to learn",
                "top-1 on held-out images above one in the number of classes, the best seed",
                max(top1["Xavier"]) - 1 / classes,
                at_most=0.05,
            ),
            paired(
                "a slope learnt for each channel makes a small net more accurate than ReLU",
                quantity,
                kinds,
                ours="channel",
                against="relu",
            ),
            paired(
                "a slope learnt for each layer makes a small net more accurate than ReLU",
                quantity,
                kinds,
                ours="shared",
                against="relu",
            ),
            bounded(
                "through 30 rectified layers, variances of activations and gradients stay",
                "largest change of the variance from the first layer to the last, in powers of two",
                max(abs(row["change"]) for row in spread if row["beginning"] == "ours"),
                at_most=2,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm; SGD with momentum, as "
            "in the paper; gradients are clipped to a norm of 1 for every arm.",
            f"Variances are of {DEPTH} linear layers of {WIDTH} features on noise. In convolutions the zeros around a "
            "map take some of the variance, the more the smaller it is.",
            "Nets of under a million parameters on small images: ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, found[0]) for name, found in trained.items() if name != "Xavier"],
            "variances at the start": spread,
        },
    )


def begun(*, slope: float) -> Edit:
    """Begin a net anew, all layers but its classifier, for rectifiers of this slope."""

    def edit(model: nn.Module) -> nn.Module:
        rectifier_init_(model, slope)
        cast(PReLUNet, model).put_head()
        return model

    return edit


def variances() -> list[dict[str, Any]]:
    """Return how the variance changes from the first to the last of 30 layers, by slope, beginning and direction."""
    rows = []
    for slope in (0.0, 0.25):
        for beginning, assumed in (("ours", slope), ("Xavier", 1.0)):
            torch.manual_seed(0)
            layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
            rectifier_init_(nn.ModuleList(layers), assumed)
            found: list[Tensor] = [torch.randn(BATCH, WIDTH, requires_grad=True)]
            for layer in layers:
                found.append(layer(nn.functional.leaky_relu(found[-1], slope)))
            gradients = torch.autograd.grad((found[-1] * torch.randn(BATCH, WIDTH)).sum(), found[:-1])
            for direction, values in (("forward", found[1:]), ("backward", gradients)):
                logs = [math.log2(float(value.detach().var())) for value in values]
                steps = [after - before for before, after in pairwise(logs)]
                change = sum(steps) if direction == "forward" else -sum(steps)
                rows.append({"slope": slope, "beginning": beginning, "direction": direction, "change": change})
    return rows
