"""ULSAM: can subspace attention stand in for blocks of MobileNetV2, and does it take the share that the paper says?

What an attention that adds so little does is best seen against the same net without the blocks, where nothing took
their place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.edits.surgery import Edit, replace_modules
from vitrail.edits.ulsam import numbered_blocks, ulsam

LAYERS = (14, 17)
"""The paper's choice for ImageNet: an eighth of the multiply-adds."""
MOST = (13, 14, 16, 17)
"""The paper's choice for fine-grained data: a quarter of the parameters."""
GROUPS = (1, 4, 8, 16)
NET: dict[str, Any] = {"model.name": "mobilenetv2_050", "model.options": {"output_stride": 8}}
"""Half as wide, so that 16 groups divide it; on small images, maps of 4 places a side where the blocks stand."""
QUICK: dict[str, Any] = {"model.name": "mobilenetv2_035"}


def removed() -> Edit:
    """Return the edit that takes the blocks out."""

    def edit(model: nn.Module) -> nn.Module:
        blocks = numbered_blocks(model)
        out = {blocks[number] for number in LAYERS}
        return replace_modules(model, lambda _, m: m in out, lambda _: nn.Identity(), what="block")

    return edit


ARMS: dict[str, list[dict[str, Any]]] = {
    "whole": [],
    "removed": [{"name": "vitrail.checks.ulsam:removed"}],
    **{
        f"g = {groups}": [
            {"name": "ulsam", "options": {"groups": groups, "substitute": True, "layers": list(LAYERS)}},
        ]
        for groups in GROUPS
    },
}
PASSES = 5_000
"""Of images, for each arm: minutes for eighteen nets on two cores."""
PUBLISHED: tuple[tuple[str, bool, tuple[int, ...], float, float], ...] = (
    ("mobilenetv2_100", False, (17,), 3.4, 300.01),
    ("mobilenetv2_100", True, (14,), 3.28, 277.34),
    ("mobilenetv2_100", True, (17,), 3.08, 284.54),
    ("mobilenetv2_100", True, (11, 14), 3.23, 267.06),
    ("mobilenetv2_100", True, (16, 17), 2.77, 269.08),
    ("mobilenetv2_100", True, LAYERS, 2.96, 261.88),
    ("mobilenetv2_100", True, MOST, 2.54, 223.77),
    ("mobilenetv1_100", False, (12,), 4.2, 569.2),
    ("mobilenetv1_100", False, (14,), 4.2, 569.1),
    ("mobilenetv1_100", True, (12,), 3.9, 517.0),
)
"""Net, whether substituted, layers, millions of parameters and of multiply-adds in the published poster."""


def run(ctx: Context) -> Verdict:
    """Train the arms at equal budget, and count what the paper's nets take."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.02 if ctx.quick else PASSES / len(index.rows("train"))
    settings = {**(QUICK if ctx.quick else NET), "train.epochs": epochs, "train.batch_size": 32}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name.replace(" ", ""), seed, {**settings, "model.edits": edits}) for seed in ctx.seeds]
        for name, edits in ARMS.items()
        if not ctx.quick or name in ("whole", "removed", "g = 1", "g = 4")
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    quantity = "top-1 on held-out images"
    nets = PUBLISHED[5:7] if ctx.quick else PUBLISHED
    rows = [published_row(*net) for net in nets]
    whole = size_of(_net("mobilenetv2_100"))
    counted = {net[2]: row for net, row in zip(nets, rows)}
    return Verdict(
        [
            paired(
                "with attention in 4 subspaces in the place of two of its blocks, MobileNetV2 is more accurate",
                quantity,
                top1,
                ours="g = 4",
                against="whole",
            ),
            paired(
                "it is more accurate than MobileNetV2 without those blocks",
                quantity,
                top1,
                ours="g = 4",
                against="removed",
            ),
            paired(
                "4 subspaces are more accurate than one map for all channels",
                quantity,
                top1,
                ours="g = 4",
                against="g = 1",
            ),
            bounded(
                "in the place of layers 14 and 17 it spares 13 % of the multiply-adds of MobileNetV2",
                "multiply-adds that remain, a share",
                counted[LAYERS]["madds_g"] / whole[1],
                at_most=0.875,
            ),
            bounded(
                "in the place of layers 13, 14, 16 and 17 it spares 25 % of the parameters of MobileNetV2",
                "parameters that remain, a share",
                counted[MOST]["params_m"] / whole[0],
                at_most=0.755,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm, from scratch; a "
            "MobileNetV2 of half the width, in which layers 14 and 17 stand at stride 8. The paper's are of ImageNet.",
            "The two shares are of two nets: the paper's abstract gives 13 % of both on ImageNet and 25 % of both on "
            "fine-grained data.",
            "The paper counts 3.4 M parameters for MobileNetV2, which has 3.50 M: published totals are 0.1 M lower, "
            "what is spared is the same.",
        ],
        tables={
            "accuracy": [{"arm": name, "top1": float(np.mean(values))} for name, values in top1.items()],
            "cost of the arms": [arm_cost(name, arms[name][0]) for name in (("g = 4",) if ctx.quick else arms)],
            "published nets": rows,
        },
    )


def published_row(
    name: str, substitute: bool, layers: tuple[int, ...], params: float, madds: float, groups: int = 4
) -> dict[str, Any]:
    """Return what one of the paper's nets takes beside what the paper says."""
    found = size_of(ulsam(groups=groups, substitute=substitute, layers=layers)(_net(name)))
    how = "in the place of" if substitute else "behind"
    digits = (0.1 if params in (3.4, 4.2, 3.9) else 0.01, 1e-3 if madds == int(madds) else 1e-5)
    return size_row(f"{name}, {how} {', '.join(map(str, layers))}", found, (params, madds / 1e3), digits)


def _net(name: str) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = timm.create_model(name, num_classes=1000)
    return net
