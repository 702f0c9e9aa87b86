"""ConvFirst: is a net of fused blocks faster than ConvNeXt, does it use more of the machine, what does fusion do?"""

from __future__ import annotations

import copy
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn

from vitrail.checks.check import Context, Verdict, bounded, paired, size_of, size_row
from vitrail.evaluate.efficiency import Profile, efficiency_gap_plot, profile_models, summary, waterline_plot
from vitrail.evaluate.turns import medians, one_thread
from vitrail.models import create_model
from vitrail.models.convfirst import ConvFirst, FusedConvFirst, fuse_blocks
from vitrail.report.plots import standalone

NETS = {"convfirst": ("convfirst_t", 256), "convnext": ("convnext_tiny", 288), "resnet": ("resnet50", 224)}
"""ConvFirst and ConvNeXt of the paper's table, 82.8 and 82.7 % top-1, at their sizes; a ResNet as it is mostly used."""
QUICK_NETS = {"convfirst": ("convfirst_nano", 32), "convnext": ("convnext_atto", 64), "resnet": ("resnet10t", 64)}
ROUNDS = 5
BLOCKS = ((40, 64), (80, 32), (160, 16), (320, 8))
"""Channels and places of a side in the four stages of that ConvFirst."""
EXPANSION = 6
BATCH = 4
"""Images that go through a block alone."""
PUBLISHED = {
    "convfirst_p": (5.9, 0.860),
    "convfirst_n": (10.2, 1.81),
    "convfirst_t": (17.2, 3.23),
    "convfirst_s": (28.6, 5.50),
}
"""Millions of parameters, and billions of multiply-adds as the card derives them."""


def run(ctx: Context) -> Verdict:
    """Measure the nets with the machine, in turns and on one thread; then blocks, fused and layer by layer."""
    nets = QUICK_NETS if ctx.quick else NETS
    sessions: list[dict[str, Profile]] = []
    apart: list[float] = []
    with one_thread():
        for seed in ctx.seeds:
            ctx.tell(f"nets, seed {seed}")
            torch.manual_seed(seed)
            models = arms(nets)
            sides = {name: nets[name.partition(" ")[0]][1] for name in models}
            apart.append(disagreement(models["convfirst layers"], models["convfirst fused"], sides["convfirst fused"]))
            found = profile_models(
                models,
                {name: (side, side) for name, side in sides.items()},
                rounds=1 if ctx.quick else ROUNDS,
                clock=time.thread_time,
                tell=ctx.tell,
            )
            sessions.append({profile.name: profile for profile in found})
        blocks = block_times(ctx)
    last = list(sessions[-1].values())
    (ctx.folder / "efficiency-gap.svg").write_text(standalone(efficiency_gap_plot(last)), encoding="utf-8")
    for profile in last:
        name = f"waterline-{profile.name.replace(' ', '-')}.svg"
        (ctx.folder / name).write_text(standalone(waterline_plot(profile)), encoding="utf-8")
    times = {name: [1e3 * session[name].seconds for session in sessions] for name in sessions[0]}
    shares = {name: [session[name].efficiency for session in sessions] for name in sessions[0]}
    ratio = statistics.median(a / b for a, b in zip(times["convfirst fused"], times["convnext"], strict=True))
    sizes = published_sizes(["convfirst_p"] if ctx.quick else list(PUBLISHED))
    quantity = "milliseconds of processor time an image, one thread"
    return Verdict(
        [
            paired(
                "ConvFirst with fused blocks is faster than ConvNeXt of the same published accuracy",
                quantity,
                times,
                ours="convfirst fused",
                against="convnext",
                higher_is_better=False,
            ),
            bounded(
                "it takes a third of ConvNeXt's time or less; the paper has about a quarter, on a GPU and against "
                "Inductor",
                "time over that of ConvNeXt, median over the seeds",
                ratio,
                at_most=1 / 3,
            ),
            paired(
                "ConvFirst with fused blocks uses a larger share of the machine's peak than ConvNeXt",
                "computational efficiency: multiply-adds a second over those of a product of matrices",
                shares,
                ours="convfirst fused",
                against="convnext",
            ),
            paired(
                "fused, the blocks of ConvFirst are faster than layer by layer, norms folded in both",
                quantity,
                times,
                ours="convfirst fused",
                against="convfirst layers",
                higher_is_better=False,
            ),
            bounded(
                "fused and layer by layer, the net gives the same",
                "largest difference of logits over the largest logit",
                max(apart),
                at_most=1e-4,
            ),
            bounded(
                "the nets have the published parameters, and the multiply-adds that the published figures imply",
                "largest deviation beyond the last digit of the figure, as a share of it",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            "Nets: " + ", ".join(f"{name} is {net} at {side} px" for name, (net, side) in nets.items()) + "; random "
            "weights, one image, PyTorch's own layers on one CPU thread. Accuracies are the paper's; the widths and "
            "depths of ConvFirst are a reconstruction of the same size.",
            "A seed is a measurement of its own: the machine's product of matrices and its copy, and all nets, take "
            "turns, and times are medians. Bytes count as if nothing stayed in a cache.",
            "The paper measures batches of 128 on a GPU, whose waterline is near 160 operations per byte in its plots: "
            "what its kernels gain there is not shown here.",
        ],
        tables={
            "efficiency, last seed": [summary(profile) for profile in last],
            "a block, milliseconds of processor time": blocks,
            "published sizes": sizes,
        },
    )


def arms(nets: dict[str, tuple[str, int]]) -> dict[str, nn.Module]:
    """Build the nets, ConvFirst with its norms folded: layer by layer, and fused."""
    built = {name: create_model(net, num_classes=1000).eval() for name, (net, _) in nets.items()}
    folded = reparameterize_model(built.pop("convfirst"))
    return {"convfirst fused": fuse_blocks(copy.deepcopy(folded)), "convfirst layers": folded, **built}


@torch.no_grad()
def disagreement(one: nn.Module, other: nn.Module, side: int) -> float:
    """Return the largest difference of logits of an image, over the largest."""
    x = torch.randn(1, 3, side, side)
    expected = one(x)
    return float((other(x) - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def block_times(ctx: Context) -> list[dict[str, Any]]:
    """Time a block of each stage: layer by layer, depth first, and compiled where there is a compiler."""
    rows = []
    for channels, side in BLOCKS[:1] if ctx.quick else BLOCKS:
        ctx.tell(f"a block of {channels} channels")
        torch.manual_seed(0)
        block = ConvFirst(channels, EXPANSION).eval()
        fused = FusedConvFirst(block)  # folds the block's norms too
        x = torch.randn(1 if ctx.quick else BATCH, channels, side, side).to(memory_format=torch.channels_last)
        forms: dict[str, Callable[[], Any]] = {"layers": partial(block, x), "depth_first": partial(fused, x)}
        if not ctx.quick and shutil.which("g++"):
            forms["inductor"] = partial(torch.compile(block), x)
        taken = medians(forms, 2 if ctx.quick else 15, time.thread_time)
        rows.append(
            {
                "channels": channels,
                "side": side,
                **{name: 1e3 * seconds for name, seconds in taken.items()},
                "depth_first_over_layers": taken["depth_first"] / taken["layers"],
            }
        )
    return rows


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count the parameters and multiply-adds of nets, beside the published ones."""
    rows = []
    for name in names:
        params, macs = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        rows.append(size_row(name, size_of(model, 256), (params, macs), (0.1, 0.001 if macs < 1 else 0.01)))
    return rows
