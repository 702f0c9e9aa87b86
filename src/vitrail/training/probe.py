"""Measured, not guessed: what a training step costs, and how many images fit."""

from __future__ import annotations

import copy
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from vitrail.data.preprocess import Preprocess
from vitrail.errors import RunError
from vitrail.methods.method import Method
from vitrail.training.device import Normalise, create_accelerator, place
from vitrail.training.optim import create_optimizer, param_groups
from vitrail.training.recipe import Recipe

SAFE_SHARE = 0.8
"""Share of the free memory that a batch may be expected to take."""


@dataclass(frozen=True)
class Measured:
    """Cost of a training step on images that are already in memory.

    Attributes:
        batch_size: images of the step.
        seconds_per_image: of the quickest step; what else runs on the machine only ever adds.
        peak_bytes: of the device's memory; on CPUs of the whole process.
    """

    batch_size: int
    seconds_per_image: float
    peak_bytes: int


def measure_step(method: Method, recipe: Recipe, preprocess: Preprocess, batch_size: int, steps: int = 3) -> Measured:
    """Time training steps of a copy of ``method`` on random pixels, in this process alone; ``method`` stays as it is.

    Args:
        method: its ``model.num_classes`` tells the targets.
        recipe: resolved; precision, layout, accumulation and optimiser are taken from it.
        preprocess: of the model.
        batch_size: images per step, at least 1; computed in ``train.accumulate`` parts.
        steps: measured after one that is not, at least 1.
    """
    accelerator = create_accelerator(recipe)
    device = accelerator.device
    trial = copy.deepcopy(method).train()
    place(trial, recipe, device)
    normalise = Normalise(preprocess, recipe.train.channels_last is True).to(device)
    optimizer = create_optimizer(param_groups(trial, recipe.optim), recipe.optim)
    classes: Any = trial.model.num_classes
    random = torch.Generator().manual_seed(0)
    # Channels-last in memory, as the loader gives them.
    pixels = torch.randint(0, 256, (batch_size, *preprocess.size, 3), dtype=torch.uint8, generator=random)
    target = torch.randint(0, classes, (batch_size,), generator=random).to(device)
    row = torch.arange(batch_size, device=device)
    parts = min(recipe.train.accumulate, batch_size)
    seconds = []
    _reset_peak(device)
    for _ in range(1 + steps):
        start = time.perf_counter()
        images = normalise(pixels.permute(0, 3, 1, 2))
        for part in zip(*(values.tensor_split(parts) for values in (target, row, images))):
            batch: dict[str, Any] = {"target": part[0], "row": part[1], **dict.fromkeys(trial.views, part[2])}
            with accelerator.autocast():
                loss = trial(batch)["loss"]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Measured(batch_size, min(seconds[1:]) / batch_size, _peak(device))


def largest_batch(
    method: Method, recipe: Recipe, preprocess: Preprocess, *, limit: int = 1024, step_seconds: float = 10.0
) -> Measured:
    """Return the cost of the largest batch, a power of two up to ``limit``, that fits into memory and time.

    Batches are doubled while the next one is expected to take at most 80 % of the free memory and ``step_seconds``,
    and until memory runs out all the same.

    Raises:
        RunError: not even one image fits.
    """
    found: list[Measured] = []
    # Batch normalisation may have nothing to normalise over in a batch of one, so that comes last.
    size = min(2, limit)
    while size <= limit:
        try:
            found.append(measure_step(method, recipe, preprocess, size, steps=2))
        except RuntimeError as error:
            if not (should_reduce_batch_size(error) or isinstance(error, torch.OutOfMemoryError)):
                raise
            clear_device_cache(garbage_collection=True)
            if found:
                break
            if size == 1:
                height, width = preprocess.size
                raise RunError(
                    f"out of memory with a single image of {height}x{width} pixels; choose a smaller model.name or "
                    "model.img_size, or set train.grad_checkpointing=true"
                ) from error
            size = 1
            continue
        size = 2 * size
        if size == 2 or _exceeds(found, size, step_seconds):
            break
    return found[-1]


def _exceeds(found: list[Measured], size: int, step_seconds: float) -> bool:
    """Return whether a batch of ``size`` images is expected to take too long or too much memory."""
    if found[-1].seconds_per_image * size > step_seconds:
        return True
    free = free_memory()
    if len(found) < 2 or free is None:
        return False
    before, last = found[-2:]
    per_image = max(last.peak_bytes - before.peak_bytes, 0) / (last.batch_size - before.batch_size)
    return per_image * size > SAFE_SHARE * free


def free_memory() -> int | None:
    """Return the bytes that this process may still take, by the machine and its control group; None if unknown."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        if most != "max":
            limits.append(int(most) - int((group / "memory.current").read_text(encoding="ascii")))
    except OSError:
        pass
    return min(limits, default=None)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
