"""Whole state-space models on this CPU: against the same weights with the scan as a loop, and against a transformer.

    python benchmarks/state_space_models.py [--batch 8] [--rounds 3] [--train]    images a second, at 224 pixels
    python benchmarks/state_space_models.py --sides 224 384 512 768 1024           time and peak memory, one image

A ratio is of medians of interleaved runs in one process; memory is of a fresh process for each point.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import nn

from vitrail.layers.scan import selective_scan
from vitrail.models import create_model

PEERS = {
    "vim_tiny": "deit_tiny_patch16_224",
    "groupmamba_tiny": "swin_tiny_patch4_window7_224",
    "mambavision_t": "swin_tiny_patch4_window7_224",
}
"""A model, and a transformer with about as many multiply-adds."""


def build(name: str, side: int = 224, *, loop: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=1000, img_size=side)
    module: Any
    for module in model.modules():
        if loop and getattr(module, "scan", None) is selective_scan:
            module.scan = partial(selective_scan, form="reference")
    return model


def seconds(model: nn.Module, images: torch.Tensor, train: bool) -> float:
    model.train(train)
    start = time.perf_counter()
    with torch.set_grad_enabled(train):
        y = model(images)
    if train:
        (sum(part.sum() for part in y) if isinstance(y, tuple) else y.sum()).backward()
        model.zero_grad()
    return time.perf_counter() - start


def compare(name: str, batch: int, rounds: int, train: bool) -> None:
    images = torch.randn(batch, 3, 224, 224)
    peer = PEERS[name]
    arms = {name: build(name), f"{name}, scan as a loop": build(name, loop=True), peer: build(peer)}
    seconds(arms[name], images, train)  # compiles
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, model in arms.items():
            times[arm].append(seconds(model, images, train))
    own = statistics.median(times[name])
    for arm, found in times.items():
        middle = statistics.median(found)
        print(f"{arm:36} {batch / middle:7.2f} images/s   {name} is {middle / own:6.2f}x as fast", flush=True)


def at_sides(name: str, sides: list[int]) -> None:
    for side in sides:
        for arm in (name, PEERS[name]):
            command = [sys.executable, __file__, "--one", arm, "--sides", str(side)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(
                    f"{arm:36} {side:5}  failed: {(done.stderr.strip().splitlines() or ['killed'])[-1][:120]}",
                    flush=True,
                )
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{arm:36} {side:5}  {found['seconds']:7.2f} s  {found['megabytes']:7.0f} MB", flush=True)


def one(name: str, side: int) -> None:
    """Print the seconds of a forward pass of one image, and the memory that it takes over the model's own."""
    model, image = build(name, side), torch.randn(1, 3, side, side)
    seconds(model, torch.randn(1, 3, side, side), False)  # compiles
    runs = [seconds(model, image, False) for _ in range(3)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": statistics.median(runs), "megabytes": peak}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--sides", type=int, nargs="+")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.sides[0])
    else:
        for name in PEERS:
            if options.sides:
                at_sides(name, options.sides)
            else:
                compare(name, options.batch, options.rounds, options.train)
