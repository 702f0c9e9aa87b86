"""E2GC: groups of one size against one number of groups, at equal multiply-adds, in MobileNetV1 and ResNeXt-50.

The paper measures the energy of two GPUs. Here the machine's counter is read where there is one; else the proxy stands
for it, and time for what the machine does. The cost model's optimum is held against the size at which a layer takes
twice the least time: there computing costs what moving data does.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.checks.check import Context, Finding, Verdict, bounded, paired
from vitrail.edits.group_convolution import group_convolution, optimum_size
from vitrail.edits.surgery import Edit
from vitrail.evaluate.energy import measure_energy, work
from vitrail.models import create_model

NETS = ("mobilenetv1_100", "resnext50_32x4d")
SIZED, COUNTED = (8, 16), (8, 16, 64)
"""Sizes and numbers of groups of which the two arms of a net have those with the nearest multiply-adds."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LAYER = (256, 14)
"""Channels and side of the map of the layer whose optimum is measured."""


def run(ctx: Context) -> Verdict:
    """Compare energy and time per image, and optima."""
    side, batch, rounds = (32, 1, 2) if ctx.quick else (224, 4, 10)
    energy: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    rows: list[dict[str, Any]] = []
    sources: set[str] = set()
    for net in NETS:
        plain = create_model(net, num_classes=10)
        size, groups = equal_pair(plain, side)
        energy[net], seconds[net] = {"size": [], "count": []}, {"size": [], "count": []}
        for seed in ctx.seeds:
            torch.manual_seed(seed)
            images = torch.randn(batch, 3, side, side)
            arms = {
                "size": group_convolution(size=size)(copy.deepcopy(plain)).eval(),
                "count": group_convolution(groups=groups)(copy.deepcopy(plain)).eval(),
            }
            taken = times(list(arms.values()), images, rounds)
            for (name, model), each in zip(arms.items(), taken):
                found = measure_energy(model, images, repeats=rounds)
                sources.add(found.source)
                energy[net][name].append(found.joules)
                seconds[net][name].append(each / batch)
                row = {"net": net, "arm": name, "size": size, "groups": groups, "seed": seed, "macs": found.macs}
                rows.append({**row, "bytes": found.bytes, "joules": found.joules, "ms": 1e3 * each / batch})
    (source,) = sources
    findings: list[Finding] = []
    for net in NETS:
        claim = f"At equal multiply-adds {net} takes less energy with groups of one size than with one number of them."
        quantity = f"joules an image ({source})"
        findings.append(paired(claim, quantity, energy[net], ours="size", against="count", higher_is_better=False))
    for net in NETS:
        claim = f"At equal multiply-adds {net} takes less time with groups of one size than with one number of them."
        quantity = "CPU seconds an image"
        findings.append(paired(claim, quantity, seconds[net], ours="size", against="count", higher_is_better=False))
    curve, predicted, measured = _optimum(rounds)
    findings.append(
        bounded(
            "The cost model's optimum group size is within a factor of two of the measured one.",
            "the larger over the smaller",
            max(predicted / measured, measured / predicted),
            at_most=2,
        )
    )
    notes = [
        f"Images of {side} pixels in batches of {batch}; one thread counts, {rounds} rounds in turns.",
        f"The energy is of: {source}. The proxy is a count of operations and bytes, and no measurement.",
        f"A layer of {LAYER[0]} channels on {LAYER[1]} x {LAYER[1]} places: predicted {predicted:.3g}, measured "
        f"{measured:.3g}, with this machine's own rates of arithmetic and of moving data.",
        "Size and number of groups are those of the nearest multiply-adds; both are in the table.",
    ]
    return Verdict(findings, notes, {"nets": rows, "sizes": curve})


def equal_pair(model: nn.Module, side: int) -> tuple[int, int]:
    """Return the size and the number of groups of ``SIZED`` and ``COUNTED`` whose multiply-adds differ least."""
    image, shape = torch.zeros(1, 3, side, side, device="meta"), copy.deepcopy(model).to("meta").eval()

    def logarithm(edit: Edit) -> float:
        return math.log(work(edit(copy.deepcopy(shape)), image)[0])

    sized = {size: logarithm(group_convolution(size=size)) for size in SIZED}
    counted = {groups: logarithm(group_convolution(groups=groups)) for groups in COUNTED}
    pairs = [(size, groups) for size in SIZED for groups in COUNTED]
    return min(pairs, key=lambda pair: abs(sized[pair[0]] - counted[pair[1]]))


@torch.no_grad()
def times(models: Sequence[nn.Module], images: Tensor, rounds: int) -> list[float]:
    """Return the least CPU seconds of a pass of each model, taken in turns; the first turn does not count."""
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, own in zip(models, taken):
            start = time.process_time()
            model(images)
            own.append(time.process_time() - start)
    return [min(own[1:]) for own in taken]


def _optimum(rounds: int) -> tuple[list[dict[str, Any]], float, float]:
    """Return the time of a layer by the size of its groups, and the optimum that is predicted and measured."""
    channels, side = LAYER
    x = torch.randn(8, channels, side, side)
    layers = [nn.Conv2d(channels, channels, 3, 1, 1, groups=channels // size, bias=False) for size in SIZES]
    taken = times(layers, x, rounds)
    # This machine's own rates: the dense layer computes, a copy moves.
    places = side * side
    per_mac = taken[-1] / (len(x) * 9 * channels**2 * places)
    copied = min(times([nn.Dropout(0.5).eval(), _Copy()], x, rounds)[1:])
    per_byte = copied / (2 * x.numel() * 4)
    predicted = optimum_size((channels, channels), (places, places), 9, per_mac=per_mac, per_byte=per_byte)
    measured = crossing(SIZES, taken)
    curve = [{"size": size, "ms": 1e3 * each / len(x)} for size, each in zip(SIZES, taken)]
    return curve, predicted, measured


def crossing(sizes: Sequence[int], taken: Sequence[float]) -> float:
    """Return the size beyond which all take more than twice the least time, between two sizes in their logarithms."""
    twice, found = 2 * min(taken), float(sizes[-1])
    for (small, low), (large, high) in zip(zip(sizes, taken), zip(sizes[1:], taken[1:])):
        if low < twice <= high:
            found = small * (large / small) ** (math.log(twice / low) / math.log(high / low))
    return found


class _Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()
