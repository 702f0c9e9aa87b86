"""What the training loop costs beside a bare hand-written one: same model, same loader, same mathematics.

    python benchmarks/training_overhead.py

Rounds of the two alternate, the one that begins changes from round to round, and the ratio of each pair is taken, so
that a machine whose clock drifts does not decide. The figure promised is at most 1.03 in the median.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time

import numpy as np
import torch
from timm.optim import param_groups_weight_decay

from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import build_views
from vitrail.methods.supervised.supervised import Supervised, supervised_loss
from vitrail.models.factory import create_model
from vitrail.runs import RunFolder
from vitrail.training.optim import learning_rate
from vitrail.training.recipe import Recipe
from vitrail.training.train import train


class Noise:
    """An index over random pixels in memory."""

    multilabel = False
    classes = tuple("abcdefghij")

    def __init__(self, images: int, size: int) -> None:
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (images + 10, size, size, 3), dtype=np.uint8)
        self.labels = rng.integers(0, 10, images + 10)

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, split: str) -> np.ndarray:
        images = len(self) - 10
        return np.arange(images) if split == "train" else np.arange(images, images + 10)

    def key(self, row: int) -> str:
        return str(row)

    def targets(self, rows: np.ndarray) -> np.ndarray:
        return self.labels[rows]

    def read(self, row: int) -> np.ndarray:
        return self.pixels[row]


def bare(method: Supervised, index: Noise, preprocess: Preprocess, recipe: Recipe, steps: int) -> float:
    """Return seconds per step of the loop that anybody would write."""
    model = method.model.train()
    groups = param_groups_weight_decay(model, recipe.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    mean = 255 * torch.tensor(preprocess.mean).view(3, 1, 1)
    std = 255 * torch.tensor(preprocess.std).view(3, 1, 1)
    views = build_views({"image": "train"}, preprocess, recipe.augment, recipe.data)
    batch_size = int(recipe.train.batch_size)
    start = time.monotonic()
    loader = make_loader(index, index.rows("train"), views, batch_size=batch_size, shuffle=True)
    for step, batch in enumerate(loader, start=1):
        lr = learning_rate(step / steps, peak=1e-3, warmup=recipe.train.warmup, floor=recipe.train.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = batch["image"].to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)
        loss = supervised_loss(model(images), batch["target"], smoothing=0.1)
        if not torch.isfinite(loss):
            raise RuntimeError("the loss is not finite")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    return (time.monotonic() - start) / steps


def ours(method: Supervised, index: Noise, preprocess: Preprocess, recipe: Recipe) -> float:
    """Return seconds per step of the training loop, validation and checkpoints apart."""
    with tempfile.TemporaryDirectory() as path:
        result = train(method, index, preprocess, recipe, RunFolder(path), events=lambda event: None)  # type: ignore[arg-type]
    return int(recipe.train.batch_size) / result.images_per_second


def compare(name: str, size: int, batch_size: int, steps: int, rounds: int) -> float:
    index, preprocess = Noise(batch_size * steps, size), Preprocess(size=(size, size))
    values = {
        "augment": {"policy": "shift", "flip": 0.5},
        "optim": {"lr": 1e-3},
        "train": {
            "epochs": 1,
            "batch_size": batch_size,
            "precision": "fp32",
            "channels_last": False,
            "ema": 0.0,
            "workers": 0,
            "cache_mb": 0,
            "checkpoint_seconds": 1e9,
        },
    }
    recipe = Recipe.from_dict(values)
    torch.manual_seed(0)
    method = Supervised(create_model(name, num_classes=10))
    pairs = []
    for number in range(rounds + 1):
        seconds = {}
        for who in ("bare", "ours") if number % 2 else ("ours", "bare"):
            trial = copy.deepcopy(method)
            if who == "bare":
                seconds[who] = bare(trial, index, preprocess, recipe, steps)
            else:
                seconds[who] = ours(trial, index, preprocess, recipe)
        pairs.append(seconds)
    pairs = pairs[1:]
    ratios = sorted(pair["ours"] / pair["bare"] for pair in pairs)
    step = statistics.median(pair["bare"] for pair in pairs)
    middle = statistics.median(ratios)
    quarter = len(ratios) // 4
    print(
        f"{name} at {size} px, batch {batch_size}: bare step {1000 * step:.1f} ms, ratio {middle:.3f} "
        f"(middle half {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}, {rounds} pairs)"
    )
    return middle


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    compare("small_resnet_micro", 32, 64, options.steps, options.rounds)
    compare("small_resnet_nano", 8, 64, 8 * options.steps, options.rounds)
