"""CSWin: are cross-shaped windows better than shifted ones, and does attention in stripes need to know positions?"""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from timm.layers import trunc_normal_
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.edits.surgery import Edit
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.cswin import Block, CSWin

NET: dict[str, Any] = {"depths": (2, 2, 4, 2), "num_heads": (2, 2, 4, 4), "stripes": (1, 2, 2)}
WINDOWS = (4, 4, 2, 2)
"""Sides of the shifted windows: of 28 pixels, 16, 16 and 4 places where stripes have 14, 14 and 8; published are 49
where they have 56, 56 and 98."""
PASSES = 6_400
"""Of images, for each arm: minutes for nine nets on two cores."""
PUBLISHED = {
    "cswin_tiny": (23, 4.3, 224),
    "cswin_small": (35, 6.9, 224),
    "cswin_base": (78, 15.0, 224),
    "cswin_base_384": (78, 47.0, 384),
    "cswin_large": (173, 31.5, 224),
    "cswin_large_384": (173, 96.8, 384),
}
"""Millions of parameters, billions of multiply-adds, and pixels, from the table of the authors' README."""


def run(ctx: Context) -> Verdict:
    """Train three arrangements at equal numbers of image passes and near equal size; count the published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    shifted = {"name": "vitrail.checks.cswin:shifted_windows", "options": {"side": 16 if ctx.quick else 28}}
    net = {**NET, "depths": (1, 1, 2, 1)} if ctx.quick else NET
    own: dict[str, dict[str, Any]] = {
        "cross": {"model.options": net},
        "shifted": {"model.options": net, "model.edits": [shifted]},
        "no position": {"model.options": {**net, "lepe": False}},
    }
    common = {"model.name": "cswin_nano", "train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, **settings}) for seed in ctx.seeds]
        for name, settings in own.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    reach = reach_of_blocks()
    sizes = published_sizes(["cswin_tiny"] if ctx.quick else list(PUBLISHED))
    unlike = {row["net"]: max(row["params_off"], row["madds_off"]) for row in sizes}
    quantity, deviation = "top-1 on held-out images", "largest deviation beyond the last digit, as a share"
    findings = [
        paired(
            "cross-shaped windows are more accurate than shifted ones in a net of the same widths and depths",
            quantity,
            top1,
            ours="cross",
            against="shifted",
        ),
        paired(
            "with the locally-enhanced positional encoding a net is more accurate than without any",
            quantity,
            top1,
            ours="cross",
            against="no position",
        ),
        bounded(
            "after two blocks every place of a map depends on every other",
            "largest share of the places that an output does not depend on",
            1 - min(row["reach"] for row in reach if (row["blocks"], row["windows"]) == (2, "cross")),
            at_most=0,
        ),
        bounded(
            "the nets T, S and B have the published parameters and multiply-adds",
            deviation,
            max(off for name, off in unlike.items() if "large" not in name),
            at_most=0.01,
        ),
    ]
    large = [off for name, off in unlike.items() if "large" in name]
    if large:
        claim = "the net L has the published parameters and multiply-adds"
        findings.append(bounded(claim, deviation, max(large), at_most=0.01))
    return Verdict(
        findings,
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            "'shifted' has timm's Swin blocks, with their relative positions, in the same net; its windows of "
            f"{WINDOWS} places a side are moved by half of it in every second block.",
            "The authors' own code of L takes as many multiply-adds as ours; their table says less.",
            "Nets of under a million parameters on small images: ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "reach of blocks": reach,
            "published sizes": sizes,
        },
    )


def shifted_windows(*, side: int) -> Edit:
    """Put timm's Swin blocks, with windows and shifted windows in turn, in the place of CSWin's.

    Args:
        side: of the images, in pixels: these blocks are built for maps of one size.
    """

    def edit(model: nn.Module) -> nn.Module:
        if not isinstance(model, CSWin):
            raise InputError(f"shifted windows are for a CSWin net, and this is a {type(model).__name__}")
        for stage, info, window in zip(model.stages, model.feature_info, WINDOWS, strict=True):
            places, blocks = -(-side // info["reduction"]), cast(nn.ModuleList, stage.blocks)
            for number, block in enumerate(blocks):
                blocks[number] = swin_block(cast(Block, block), places, window, shifted=bool(number % 2))
        return model

    return edit


def swin_block(block: Block, places: int, window: int, *, shifted: bool) -> SwinTransformerBlock:
    """Return a block of Swin as wide as one of CSWin, begun alike, for maps of ``places`` x ``places``."""
    attention: Any = block.attn
    dim = attention.proj.out_features
    new = SwinTransformerBlock(
        dim,
        (places, places),
        num_heads=sum(branch.num_heads for branch in attention.attns),
        window_size=window,
        shift_size=window // 2 if shifted else 0,
        mlp_ratio=block.mlp.fc1.out_features / dim,
    )
    for module in new.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return new


def reach_of_blocks(places: int = 14) -> list[dict[str, Any]]:
    """Return the share of a map's places that the output at a corner depends on, by number of blocks."""
    torch.manual_seed(0)
    rows = []
    for windows in ("cross", "shifted"):
        model = cast(CSWin, create_model("cswin_nano", num_classes=0, **NET)).eval()
        if windows == "shifted":
            shifted_windows(side=2 * places)(model)
        x = torch.randn(1, places, places, 16, requires_grad=True)
        y, corners = x, (0, -1)  # which see least
        for number, block in enumerate(cast(nn.ModuleList, model.stages[0].blocks), 1):
            y, shares = block(y), []
            for row, column in itertools.product(corners, corners):
                (gradient,) = torch.autograd.grad(y[0, row, column].sum(), x, retain_graph=True)
                shares.append(float(gradient.ne(0).any(-1).float().mean()))
            rows.append({"windows": windows, "blocks": number, "reach": min(shares)})
    return rows


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net."""
    rows = []
    for name in names:
        params, flops, side = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        rows.append(size_row(name, size_of(model, side), (params, flops), (1, 0.1)))
    return rows
