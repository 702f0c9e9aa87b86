"""InceptionNeXt: is its depthwise convolution faster than one of 7 x 7, and is the net as accurate?

The paper's claim is of training on a GPU. Layers and nets are timed here on whatever device torch computes on by
default, forward and backward, taking turns in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, paired
from vitrail.edits.inception_depthwise import InceptionDepthwise, inception_depthwise
from vitrail.evaluate.turns import medians
from vitrail.models import create_model

NET: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128), "patch_size": 2, "output_stride": 16}
"""timm's ConvNeXt halves a stem of stride 2 at once; without the last stride small images would vanish."""
EDIT: dict[str, Any] = {
    "name": "inception_next:inception_depthwise",
    "options": {"band_kernel": 9, "branch_ratio": 0.25},
}
"""The shares and bands of the published atto: an eighth of 16 channels is two."""
ARMS: dict[str, dict[str, Any]] = {
    "inception": {"model.options": NET, "model.edits": [EDIT]},
    "7x7": {"model.options": NET},
    "3x3": {"model.options": {**NET, "kernel_sizes": 3}},
}
PASSES = 12_000
"""Of images, for each arm."""
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
"""Channels and side at each stage of the tiny nets at 224 pixels."""


def run(ctx: Context) -> Verdict:
    """Train three small ConvNeXts that differ in their depthwise convolution, and time layers and nets."""
    nets = _timed_nets(ctx)
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.1 if ctx.quick else PASSES / len(index.rows("train"))
    arms: dict[str, list[Arm]] = {
        name: [
            ctx.train(
                index,
                name,
                seed,
                {"model.name": "convnext_atto", "train.batch_size": 32, "train.epochs": epochs, **own},
            )
            for seed in ctx.seeds
        ]
        for name, own in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "a ConvNeXt with Inception depthwise convolutions trains faster than one with 7 x 7 convolutions",
                "seconds of a training step, forward and backward, for each draw of images",
                {name: nets[name] for name in ("inception", "7x7")},
                ours="inception",
                against="7x7",
                higher_is_better=False,
            ),
            paired(
                "it is more accurate than with 7 x 7 convolutions after as many images",
                quantity,
                top1,
                ours="inception",
                against="7x7",
            ),
            paired(
                "it is more accurate than with 3 x 3 convolutions after as many images",
                quantity,
                top1,
                ours="inception",
                against="3x3",
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm; small nets on small "
            "images: ImageNet accuracy is not shown.",
            f"Timed on {'the GPU' if torch.cuda.is_available() else 'the CPU'}; the paper's 1.6x is of an A100, with "
            f"{'convnext_atto' if ctx.quick else 'convnext_tiny'} here.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "layers, times as fast as 7 x 7": _layers(ctx),
        },
    )


def _timed_nets(ctx: Context) -> dict[str, list[float]]:
    """Return the seconds of a training step of each net, one median for each seed."""
    name, side, batch = ("convnext_atto", 32, 2) if ctx.quick else ("convnext_tiny", 160, 4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    kernels = {"inception": 7, "7x7": 7, "3x3": 3}
    nets = {arm: create_model(name, num_classes=10, kernel_sizes=side).to(device) for arm, side in kernels.items()}
    inception_depthwise()(nets["inception"])
    found: dict[str, list[float]] = {arm: [] for arm in nets}
    for seed in ctx.seeds:
        images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(device)
        steps = {arm: _step(net, images) for arm, net in nets.items()}
        for arm, seconds in medians(steps, 1 if ctx.quick else 5, time.perf_counter).items():
            found[arm].append(seconds)
    return found


def _layers(ctx: Context) -> list[dict[str, Any]]:
    """Time the layer alone at each stage of the tiny nets."""
    rows = []
    for channels, side in STAGES[2:] if ctx.quick else STAGES:
        torch.manual_seed(0)
        layers = {
            "inception": InceptionDepthwise(channels),
            "7x7": nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            "3x3": nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        }
        x = torch.randn(2 if ctx.quick else 8, channels, side, side, requires_grad=True)
        steps = {arm: _step(layer, x) for arm, layer in layers.items()}
        times = medians(steps, 2 if ctx.quick else 7, time.perf_counter)
        rows.append(
            {
                "channels": channels,
                "side": side,
                **{arm: times["7x7"] / times[arm] for arm in ("inception", "3x3")},
            }
        )
    return rows


def _step(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        layer(x).sum().backward()
        layer.zero_grad()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step
