"""Arms of a training benchmark, each in a process of its own, taking turns."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def median_seconds(
    model: nn.Module, shape: tuple[int, int, int], batch: int, precision: str, channels_last: bool = False
) -> tuple[float, int]:
    """Return the seconds and page faults of a training step on random images: medians of 3 after 1."""
    model.train()
    images, target = torch.randn(batch, *shape), torch.zeros(batch, dtype=torch.long)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seconds, faults = [], []
    for _ in range(4):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median(seconds[1:]), int(statistics.median(faults[1:]))


def run_arms(script: str, arms: Sequence[str], rounds: int, options: list[str]) -> None:
    """Run ``script --arm NAME`` for every arm, ``rounds`` times in turn, and print medians against the first arm."""
    results: dict[str, list[dict[str, object]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name in arms:
            done = subprocess.run(
                [sys.executable, script, "--arm", name, *options], check=True, capture_output=True, text=True
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    speeds = {
        name: statistics.median(float(str(r["images_per_second"])) for r in runs) for name, runs in results.items()
    }
    for name, runs in results.items():
        ratio = speeds[name] / speeds[arms[0]]
        print(f"{name:28} {speeds[name]:8.1f} images/s  {ratio:5.2f}x  {runs[-1]['faults']} page faults a step")
        if runs[-1]["chosen"]:
            print("    " + str(runs[-1]["chosen"]).replace("\n", "\n    "))
