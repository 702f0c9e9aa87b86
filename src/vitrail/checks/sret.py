"""SReT: is a net that passes through its blocks twice better than one of as many weights that does not?

Every arm sees the same images. The net without recursion has as many weights in wider feed-forward layers; since it
takes half the computation, a second one is trained for twice as long.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F

from vitrail.app.build import count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.data.index import Index
from vitrail.models import create_model

NET: dict[str, Any] = {"blocks": (1, 1, 2)}
TWICE: dict[str, Any] = {**NET, "depths": (2, 2, 4)}
ARMS: dict[str, dict[str, Any]] = {
    "sliced": TWICE,
    "naive": {**TWICE, "groups": ((1, 1), (1, 1), (1, 1))},
    # A pass less for each block is a projection less, of 2 C^2 weights: 1 more of the feed-forward layer's ratio.
    "once": {**NET, "depths": NET["blocks"], "groups": ((1, 1), (1, 1), (1, 1)), "mlp_ratio": 4.0},
}
LONGER = "once, twice as long"
DEEP: dict[str, Any] = {
    "dims": (16, 32, 32),
    "num_heads": (1, 2, 2),
    "blocks": (1, 1, 1),
    "mlp_ratio": 2.0,
    "stem_strides": (2, 1, 1),
}
LAYERS = 200
PASSES = 4_800
"""Of images, for each arm: minutes for all of them on two cores."""
DEEP_PASSES = 1_200
"""Of digits, for the deep net: an image takes it much longer than the others."""
PUBLISHED = {
    "sret_t": (4.8, 1.1, 224),
    "sret_lt": (5.0, 1.2, 224),
    "sret_lt_16_14_1": (5.0, 1.2, 224),
    "sret_s": (20.9, 4.2, 224),
    "sret_t_wo_slice": (4.8, 1.4, 224),
    "sret_lt_wo_slice": (5.0, 1.4, 224),
    "sret_s_wo_slice": (20.9, 4.7, 224),
    "sret_t_wo_slice_384": (4.9, 6.4, 384),
    "sret_s_wo_slice_384": (21.0, 18.5, 384),
    "sret_s_wo_slice_512": (21.3, 42.8, 512),
}
"""Millions of parameters, billions of multiply-adds, and pixels, from the table of the authors' README."""


def run(ctx: Context) -> Verdict:
    """Train the arms and a deep net, count the published nets, and let deeper ones learn a batch."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    digits = index if ctx.quick or ctx.data else ctx.index("digits")
    seen, deep_seen = len(index.rows("train")), len(digits.rows("train"))
    epochs, deep_epochs = (0.02, 0.02) if ctx.quick else (PASSES / seen, DEEP_PASSES / deep_seen)
    layers = 6 if ctx.quick else LAYERS

    def train(name: str, net: dict[str, Any], length: float, index: Index = index) -> list[Arm]:
        settings = {"model.name": "sret_nano", "model.options": net, "train.batch_size": 32, "train.epochs": length}
        return [ctx.train(index, name.replace(", ", "-").replace(" ", "-"), seed, settings) for seed in ctx.seeds]

    arms = {name: train(name, net, epochs) for name, net in ARMS.items()}
    arms[LONGER] = train(LONGER, ARMS["once"], 2 * epochs)
    deep = train(f"{layers} layers", deep_net(layers), deep_epochs, digits)
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    targets = deep[0].targets.tolist() if deep[0].targets.ndim == 1 else deep[0].targets.argmax(1).tolist()
    commonest = max(Counter(targets).values()) / len(targets)
    learnt = {f"{layers} layers": [arm.top1 for arm in deep], "the commonest class": [commonest] * len(deep)}
    sizes = published_sizes(["sret_t", "sret_t_wo_slice"] if ctx.quick else list(PUBLISHED))
    depths = [deep_training(depth) for depth in ((6,) if ctx.quick else (100, 1000))]
    madds = {row["net"]: row["madds_g"] for row in sizes}
    kept = [value / madds[f"{name}_wo_slice"] for name, value in madds.items() if f"{name}_wo_slice" in madds]
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "a net that passes through each block twice is more accurate than one of as many weights that passes "
                "once, after as many images",
                quantity,
                top1,
                ours="naive",
                against="once",
            ),
            paired(
                "it is more accurate even than that net after twice as many images",
                quantity,
                top1,
                ours="naive",
                against=LONGER,
            ),
            paired("with slices too it is more accurate", quantity, top1, ours="sliced", against="once"),
            bounded(
                "slices save 10 % or more of the multiply-adds of the published nets",
                "largest share that is left",
                max(kept),
                at_most=0.9,
            ),
            paired(
                f"a net of {layers} passes through three blocks trains",
                quantity,
                learnt,
                ours=f"{layers} layers",
                against="the commonest class",
            ),
            bounded(
                f"a net of {depths[-1]['layers']} passes through three blocks learns a batch in ten steps",
                "its loss after them, as a share of that before",
                depths[-1]["loss_after"] / depths[-1]["loss_before"],
                at_most=0.9,
            ),
            bounded(
                "the nets have the published parameters and multiply-adds",
                "largest deviation beyond the last digit, as a share",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{seen:,} training images, {epochs:.3g} epochs for every arm but '{LONGER}'; the deep net has "
            f"{deep_epochs:.3g} epochs of {deep_seen:,} digits, or of the data given.",
            "'once' has feed-forward layers of 4 C where the others have 3 C, in place of the projections of the "
            "second passes; it takes about half of their multiply-adds.",
            "Nets of under a million parameters on small images: ImageNet accuracy is not shown, nor are deep nets of "
            "13 M parameters.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, arms[name][0]) for name in ARMS],
            "deep nets at the start": depths,
            "published sizes": sizes,
        },
    )


def deep_net(layers: int) -> dict[str, Any]:
    """Return options of a net of so many passes through three blocks, most in the last stage."""
    return {**DEEP, "depths": (2, 2, layers - 4)}


def deep_training(layers: int) -> dict[str, Any]:
    """Train a deep net on one batch for ten steps; return the losses and how gradients differ over its depth."""
    torch.manual_seed(0)
    model = create_model("sret_nano", num_classes=10, **deep_net(layers)).train()
    x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, ratio = [], float("nan")
    for _ in range(10):
        loss = F.cross_entropy(model(x), y)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        if len(losses) == 1:
            stage: Any = model.get_submodule("stages.2")
            norms = [float(layer.mlp.fc1.weight.grad.norm()) for layer in stage.blocks[0].projections]
            ratio = norms[0] / norms[-1]
        optimizer.step()
    with torch.no_grad():
        losses.append(float(F.cross_entropy(model(x), y)))
    return {
        "layers": layers,
        "parameters": count_parameters(model),
        "first_gradient_over_last": ratio,
        "loss_before": losses[0],
        "loss_after": losses[-1],
    }


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net."""
    rows = []
    for name in names:
        params, flops, side = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        rows.append(size_row(name, size_of(model, side), (params, flops), (0.1, 0.1)))
    return rows
