"""MS-MLP: is shifting and mixing together better than either alone, and better than window attention in Swin?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, beyond_rounding, bounded, paired
from vitrail.models import create_model
from vitrail.models.ms_mlp import MSMLP, Block

WIDER = 2.23
"""Ratio of the feed-forward layers that gives a net that shifts alone the parameters of one that also mixes."""
SWIN_WIDER = 3.8
"""Ratio that gives Swin without attention the parameters of one with it."""
NET: dict[str, Any] = {"model.name": "ms_mlp_nano"}
ARMS: dict[str, dict[str, Any]] = {
    "mix-shift": {},
    "shift": {"mix_sizes": ((1,) * 5,) * 4, "mlp_ratio": WIDER},
    "mix": {"shifts": (0,) * 5},
}
SWIN: dict[str, Any] = {
    "model.name": "swin_tiny_patch4_window7_224",
    "model.options": {
        "patch_size": 2,
        "window_size": 7,
        "embed_dim": 24,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "mlp_ratio": 2.0,
        "strict_img_size": False,
    },
}
PASSES = 5_600
"""Of images, for each arm: minutes for fifteen nets on two cores."""
PUBLISHED = {"ms_mlp_tiny": (28, 4.9), "ms_mlp_small": (50, 9.0), "ms_mlp_base": (88, 16.1)}
"""Millions of parameters, cut to whole ones, and billions of multiply-adds, from the authors' README."""


def run(ctx: Context) -> Verdict:
    """Train mix-shift, shift and mix alone, and Swin with and without, at equal numbers of image passes; count."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    common = {"train.batch_size": 32, "train.epochs": 0.05 if ctx.quick else PASSES / len(index.rows("train"))}
    settings = {name: {**NET, "model.options": options, **common} for name, options in ARMS.items()}
    settings["swin"] = {**SWIN, **common}
    settings["swin + mix-shift"] = {
        **settings["swin"],
        "model.options": {**SWIN["model.options"], "mlp_ratio": SWIN_WIDER},
        "model.edits": [{"name": "ms_mlp:swin_mix_shift"}],
    }
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name.replace(" ", ""), seed, own) for seed in ctx.seeds]
        for name, own in settings.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    sizes = published_sizes(["ms_mlp_tiny"] if ctx.quick else list(PUBLISHED))
    quantity = "top-1 on held-out images"

    def of(*names: str) -> dict[str, list[float]]:
        return {name: top1[name] for name in names}

    return Verdict(
        [
            paired(
                "a net that shifts and mixes is more accurate than one that mixes in the same regions without shifts",
                quantity,
                of(*ARMS),
                ours="mix-shift",
                against="mix",
            ),
            paired(
                "a net that shifts and mixes is more accurate than one that shifts alone, with as many parameters",
                quantity,
                of(*ARMS),
                ours="mix-shift",
                against="shift",
            ),
            paired(
                "Swin is more accurate with mix-shift in the place of window attention, with as many parameters",
                quantity,
                of("swin", "swin + mix-shift"),
                ours="swin + mix-shift",
                against="swin",
            ),
            bounded(
                "the nets have the published parameters, and the published multiply-adds by the authors' own count",
                "largest deviation beyond the last digit of the published figure, as a share of it",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {common['train.epochs']:.3g} epochs for every arm.",
            f"The net that shifts alone has regions of one place, and feed-forward layers of {WIDER} C, not 2 C.",
            "Swin loses the projections of its attention with it: for them the net with mix-shift has feed-forward "
            f"layers of {SWIN_WIDER} C, not 2 C.",
            "The authors' count takes k and not k^2 products for a region of side k, and counts downsamplings at the "
            "size that goes in: the table has theirs beside the products that are computed.",
            "Nets of under a million parameters on small images: ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "published sizes": sizes,
        },
    )


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net, these also as its authors do."""
    rows = []
    for name in names:
        params, flops = PUBLISHED[name]
        with torch.device("meta"):
            model: Any = create_model(name, num_classes=1000)
        count, theirs = count_parameters(model) / 1e6, authors_count(model, 224) / 1e9
        rows.append(
            {
                "net": name,
                "params_m": count,
                "published_params_m": params,
                "params_off": beyond_rounding(count, params + 0.5, 1),  # cut, not rounded
                "madds_g": count_flops(model, (224, 224)) / 1e9,
                "madds_as_published_g": theirs,
                "published_madds_g": flops,
                "madds_off": beyond_rounding(theirs, flops, 0.1),
            }
        )
    return rows


def authors_count(model: MSMLP, side: int) -> int:
    """Return the multiply-adds of an image of side x side pixels as the authors' code counts them.

    It has a line for each layer, additions and normalisations among them. Of a downsampling it has two: the README's
    figures are those of the one that counts at the size that goes in.
    """
    total, places, width = 0, 0, 0
    for i, stage in enumerate(model.stages):
        embed: Any = stage.downsample if i else model.stem
        conv = embed.proj
        if i:
            total += places * (width + width * conv.out_channels * 4)
            places //= 4
        else:
            places = (side // conv.stride[0]) ** 2
            total += places * (conv.weight.numel() + conv.out_channels)
        width = conv.out_channels
        for block in stage.modules():
            if isinstance(block, Block):
                mixed = sum(mixer.out_channels * mixer.kernel_size[0] for mixer in convolutions(block.mix.across))
                total += places * (2 * mixed + 2 * width + 2 * width * block.mlp.fc1.out_features)
    return total + width * places // 4 + width * model.num_classes


def convolutions(mixers: nn.ModuleList) -> list[nn.Conv2d]:
    """Return the convolutions of one direction."""
    return [mixer for mixer in mixers if isinstance(mixer, nn.Conv2d)]
