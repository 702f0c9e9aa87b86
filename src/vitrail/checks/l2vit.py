"""L2ViT: does the local concentration module concentrate what linear attention spreads, and is the cost linear?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.models import create_model
from vitrail.models.l2vit import ATTENTIONS, GlobalAttention, GlobalBlock

WIDER = 4.28
"""Ratio of the feed-forward layers that gives a net without the module the parameters of one with it."""
ARMS: dict[str, dict[str, Any]] = {
    "module": {},
    "none": {"concentration": False, "mlp_ratio": WIDER},
    "softmax": {"attention": "softmax", "concentration": False, "mlp_ratio": WIDER},
}
PASSES = 6_400
"""Of images, for each arm: minutes for nine nets on two cores."""
LEAST = 16
"""Places of the smallest map whose attention is looked at."""
DIM, HEADS = 96, 3
"""Of the attention whose cost is counted: the first stage's of L2ViT-T."""
PUBLISHED = {
    "l2vit_tiny": (29, 4.7, 224),
    "l2vit_small": (50, 9.0, 224),
    "l2vit_base": (89, 15.9, 224),
    "l2vit_base_384": (89, 47.5, 384),
}
"""Millions of parameters, billions of multiply-adds, and pixels, from the tables of the author's README."""


def run(ctx: Context) -> Verdict:
    """Train three arrangements at equal numbers of image passes and near equal size; measure, count, time."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    common = {"model.name": "l2vit_nano", "train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, "model.options": options}) for seed in ctx.seeds]
        for name, options in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    held_out = ctx.held_out(index, arms["module"][0].preprocess, most=8 if ctx.quick else 64)
    images = torch.cat([batch for batch, _ in held_out()])
    maps = {name: [map_entropy(arm.model, images) for arm in trained] for name, trained in arms.items()}
    spread = {name: [influence_entropy(arm.model, images) for arm in trained] for name, trained in arms.items()}
    curve = cost_curve((14, 28) if ctx.quick else (14, 28, 56, 112))
    sizes = published_sizes(["l2vit_tiny"] if ctx.quick else list(PUBLISHED))
    entropy, accuracy = "mean entropy over that of equal shares", "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "the attention maps of linear attention are more concentrated in a net with the local concentration "
                "module than in one without, which has as many parameters",
                f"{entropy}, of rows of the attention maps",
                maps,
                ours="module",
                against="none",
                higher_is_better=False,
            ),
            paired(
                "what a place gets by attention and module together is more concentrated than by attention alone",
                f"{entropy}, of the sizes of an output's gradients at all places",
                spread,
                ours="module",
                against="none",
                higher_is_better=False,
            ),
            paired(
                "the attention maps of linear attention are less concentrated than those of softmax attention",
                f"{entropy}, of rows of the attention maps",
                maps,
                ours="none",
                against="softmax",
            ),
            paired(
                "a net with the module is more accurate than one without, which has as many parameters",
                accuracy,
                top1,
                ours="module",
                against="none",
            ),
            paired(
                "linear attention with the module is more accurate than softmax attention without it",
                accuracy,
                top1,
                ours="module",
                against="softmax",
            ),
            bounded(
                "the multiply-adds of linear attention grow no faster than the number of places",
                "largest growth per growth of places, less 1",
                max(growth(curve, "linear_madds")) - 1,
                at_most=0,
            ),
            bounded(
                "the nets have the published parameters and multiply-adds",
                "largest deviation beyond the last digit of the published figure, as a share of it",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            f"The nets without module have feed-forward layers of {WIDER} C in place of 4 C.",
            f"Entropies are means over {len(images)} held-out images and all global blocks whose maps have {LEAST} "
            "places or more. The module stands behind its attention: of that block's own map it can change nothing but "
            "what is learned.",
            "Nets of under a million parameters on small images, whose linear attention has a floor of 1 and not of "
            "100: ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "cost of global attention by side of the map": curve,
            "published sizes": sizes,
        },
    )


def relative_entropy(shares: Tensor) -> Tensor:
    """Return the entropy of non-negative numbers (..., N), made to sum to 1, over log N: 1 where all are equal.

    Where all are zero, nothing is attended to, and there is no entropy: nan.
    """
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1) / torch.tensor(float(shares.shape[-1])).log()


def global_blocks(model: nn.Module, images: Tensor) -> Iterator[tuple[GlobalBlock, Tensor]]:
    """Yield each global block on a map of ``LEAST`` places or more, with what came in, (B, H, W, C)."""
    seen: list[tuple[GlobalBlock, Tensor]] = []
    blocks = [module for module in model.modules() if isinstance(module, GlobalBlock)]
    hooks = [block.register_forward_pre_hook(lambda module, given: seen.append((module, given[0]))) for block in blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return ((block, x) for block, x in seen if x.shape[1] * x.shape[2] >= LEAST)


def map_entropy(model: nn.Module, images: Tensor) -> float:
    """Return the relative entropy of the rows of the attention maps, mean over heads, places, images and blocks."""
    found = []
    with torch.no_grad():
        for block, x in global_blocks(model, images):
            found.append(relative_entropy(block.attn.weights(block.norm1(block.cpe(x)))).nanmean())
    return float(torch.stack(found).mean())


def influence_entropy(model: nn.Module, images: Tensor) -> float:
    """Return how spread over places the influence on an output of attention and module is, mean over images and blocks.

    The influence of a place is the norm of the gradient there of a random sum of the channels of what attention and
    module add, at a place in the middle.
    """
    found = []
    for block, given in global_blocks(model, images):
        x = block.cpe(given).detach().requires_grad_()
        inside = x + block.attn(block.norm1(x))
        if block.norm3 is not None and block.local_mp is not None:
            inside = inside + block.local_mp(block.norm3(inside).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        added = (inside - x)[:, x.shape[1] // 2, x.shape[2] // 2]
        draw = torch.randn(added.shape[-1], generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad((added @ draw).sum(), x)
        found.append(relative_entropy(gradient.norm(dim=-1).flatten(1)).nanmean())
    return float(torch.stack(found).mean())


def cost_curve(sides: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return multiply-adds and milliseconds of both kinds of global attention for one map of ``side`` x ``side``."""
    rows = []
    for side in sides:
        row: dict[str, Any] = {"side": side, "places": side * side}
        for kind in ATTENTIONS:
            layer, x = GlobalAttention(DIM, HEADS, kind=kind), torch.randn(1, side, side, DIM)
            times = []
            with torch.inference_mode():
                for _ in range(4):
                    start = time.perf_counter()
                    layer(x)
                    times.append(time.perf_counter() - start)
                # Fused attention is not counted on every device; on the meta device it is taken apart.
                with FlopCounterMode(display=False) as counter:
                    layer.to("meta")(x.to("meta"))
            row |= {f"{kind}_madds": counter.get_total_flops() // 2, f"{kind}_ms": 1e3 * min(times[1:])}
        rows.append(row)
    return rows


def growth(curve: list[dict[str, Any]], figure: str) -> list[float]:
    """Return by what a figure grows from row to row, over what places grow by."""
    return [(b[figure] / a[figure]) / (b["places"] / a["places"]) for a, b in itertools.pairwise(curve)]


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net."""
    rows = []
    for name in names:
        params, flops, side = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        rows.append(size_row(name, size_of(model, side), (params, flops), (1, 0.1)))
    return rows
