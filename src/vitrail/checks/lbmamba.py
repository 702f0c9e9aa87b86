"""LBMamba: is one scan that looks ahead in windows as good as two, from both ends, and does it cost less?

Nets of four blocks, all without class token and pooled by the mean. Vim scans twice in a block; LBVim once, from the
first patch and from the last in turn, and is wider, by as much as gives it Vim's multiply-adds. With windows of one
place LBVim's scan sees nothing ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.layers.scan import selective_scan
from vitrail.layers.scan.local import local_scan

WIDTH, WIDER = 96, 103
"""Of Vim, and of LBVim with its multiply-adds."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "both ways": ("vim_nano", {"embed_dim": WIDTH, "class_token": "none"}),
    "local": ("lbvim_nano", {"embed_dim": WIDER}),
    "one way": ("lbvim_nano", {"embed_dim": WIDER, "window": 1}),
}
PASSES = 5_600
"""Of images, for each arm: minutes for nine nets on two cores."""
SHAPE, QUICK_SHAPE = (2, 384, 196, 16), (1, 32, 50, 4)
"""Of timed scans, (B, D, L, N): those of Vim's tiny net at 224 pixels."""
EXACT = 1e-4


def run(ctx: Context) -> Verdict:
    """Train three nets at equal numbers of image passes, time their scans, and compare the scan with its definition."""
    index = ctx.index("digits", val_fraction=0.05) if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.02 if ctx.quick else PASSES / len(index.rows("train"))
    arms: dict[str, list[Arm]] = {name: [] for name in ARMS}
    for seed in ctx.seeds:
        for name, (net, options) in ARMS.items():
            settings = {
                "model.name": net,
                "model.options": options,
                "train.batch_size": 32,
                "train.epochs": epochs,
            }
            arms[name].append(ctx.train(index, name.replace(" ", "-"), seed, settings))
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    shape, rounds = (QUICK_SHAPE, 2) if ctx.quick else (SHAPE, 15)
    times = [scan_times(shape, rounds, seed) for seed in ctx.seeds]
    by_scan = {name: [row[name] for row in times] for name in times[0]}
    accuracy = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "A net with one locally bidirectional scan in a block is more accurate than Vim, with two scans and as "
                "many multiply-adds.",
                accuracy,
                top1,
                ours="local",
                against="both ways",
            ),
            paired(
                "Looking ahead in windows makes a net that reads one way at a time more accurate.",
                accuracy,
                top1,
                ours="local",
                against="one way",
            ),
            paired(
                "One locally bidirectional scan takes less time than two scans, from both ends.",
                "milliseconds, forward and backward",
                by_scan,
                ours="local",
                against="both ways",
                higher_is_better=False,
            ),
            bounded(
                "The scan is what its definition says, in values and gradients.",
                "largest difference from a loop of the definition, as a share of the largest value",
                max(departure(length, window) for length, window in ((7, 4), (65, 8), (196, 8), (130, 16))),
                at_most=EXACT,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            f"Scans of {shape} (batch, channels, places, states), in turn in one process; the smallest of their times.",
            "Nets of under half a million parameters on small images, whose multiply-adds are equal and whose time on "
            "a GPU is not measured: accuracy at equal throughput on ImageNet is not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "milliseconds of a scan": [
                {"scan": name, **{f"seed {seed}": value for seed, value in zip(ctx.seeds, values)}}
                for name, values in by_scan.items()
            ],
        },
    )


def scan_times(shape: tuple[int, int, int, int], rounds: int, seed: int) -> dict[str, float]:
    """Time a scan from one end, from both, and the local one, forward and backward, in milliseconds."""
    given = _inputs(*shape, seed)

    def both_ways(*values: Tensor) -> Tensor:
        turned = [value.flip(-1) if value.ndim > 2 else value for value in values]
        return selective_scan(*values)[0] + selective_scan(*turned)[0].flip(-1)

    scans: dict[str, Callable[..., Tensor]] = {
        "one way": lambda *values: selective_scan(*values)[0],
        "both ways": both_ways,
        "local": lambda *values: local_scan(*values)[0],
    }
    times: dict[str, list[float]] = {name: [] for name in scans}
    for _ in range(rounds + 1):
        for name, scan in scans.items():
            start = time.perf_counter()
            scan(*given).sum().backward()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: min(values[1:]) for name, values in times.items()}


def departure(length: int, window: int) -> float:
    """Return how far the scan is from its definition, in float32, of values and gradients, relative to the largest."""
    given = _inputs(2, 6, length, 3, seed=length)
    exact = [value.detach().double().requires_grad_() for value in given]
    found, wanted = local_scan(*given, window=window), local_scan(*exact, window=window, form="reference")
    ours = [*found, *torch.autograd.grad(found[0].sum() + found[1].sum(), given)]
    theirs = [*wanted, *torch.autograd.grad(wanted[0].sum() + wanted[1].sum(), exact)]
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


def _inputs(batch: int, channels: int, length: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u, delta = (torch.randn(batch, channels, length, generator=generator) for _ in range(2))
    A = -torch.arange(1.0, size + 1).expand(channels, size).clone()
    B, C = (torch.randn(batch, 1, size, length, generator=generator) for _ in range(2))
    return [value.requires_grad_() for value in (u, 0.1 * delta.abs(), A, B, C)]
