"""A finished `vitrail fit` against a plain timm finetuning script at the same wall-clock, on the same split.

    vitrail fit PHOTOS --minutes 6 --out RUN
    python benchmarks/fit_against_timm.py PHOTOS RUN

The script is what one writes in ten minutes with timm's documentation open: its pretrained model, its transforms, a
data loader, AdamW, a cosine over the time. It has no audit, export or report to pay for and gets all of the run's
seconds for loading, training and evaluation.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset

from vitrail.models.pretrained import load_pretrained

MODEL, BATCH, LEARNING_RATE = "tf_efficientnet_lite0", 32, 5e-4


class Images(Dataset):
    def __init__(self, root: Path, rows: list[tuple[str, int]], transform) -> None:
        self.root, self.rows, self.transform = root, rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int):
        key, target = self.rows[place]
        return self.transform(Image.open(self.root / key).convert("RGB")), target


def plain_script(root: Path, run: Path, seconds: float) -> tuple[float, float]:
    """Return top-1 on the run's held-out images, and the epochs that fitted."""
    started = time.monotonic()
    with (run / "split.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    held_out = "test" if any(row["split"] == "test" for row in rows) else "val"
    parts = {
        name: [(row["key"], classes.index(row["label"])) for row in rows if row["split"] == name]
        for name in ("train", held_out)
    }
    model = timm.create_model(MODEL, num_classes=len(classes))
    load_pretrained(model, MODEL, "package")
    config = resolve_data_config({}, model=model)
    train = Images(root, parts["train"], create_transform(**config, is_training=True))
    test = Images(root, parts[held_out], create_transform(**config))
    evaluation = 1.15 * len(test) * _forward_seconds(model, config["input_size"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    begun, end = time.monotonic(), started + seconds - evaluation
    model.train()
    steps = 0
    while time.monotonic() < end:
        for images, targets in DataLoader(train, BATCH, shuffle=True, drop_last=True, num_workers=1):
            share = min((time.monotonic() - begun) / (end - begun), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, steps / 20) * 0.5 * (1 + math.cos(math.pi * share))
            F.cross_entropy(model(images), targets, label_smoothing=0.1).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if time.monotonic() > end:
                break
    model.eval()
    right = 0
    with torch.inference_mode():
        for images, targets in DataLoader(test, BATCH, num_workers=1):
            right += int((model(images).argmax(1) == targets).sum())
    print(f"plain script: {time.monotonic() - started:.0f} s of {seconds:.0f} s")
    return right / len(test), steps * BATCH / len(train)


def _forward_seconds(model: torch.nn.Module, size: tuple[int, ...]) -> float:
    images = torch.randn(8, *size)
    with torch.inference_mode():
        model.eval()(images)
        start = time.perf_counter()
        model(images)
    return (time.perf_counter() - start) / 8 + 0.01  # and 10 ms to decode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="the folder of images that the run was given")
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    summary = json.loads((options.run / "summary.json").read_text())
    top1, epochs = plain_script(options.images, options.run, summary["seconds"])
    print(f"plain timm script: {top1:.1%} after {epochs:.2f} epochs; vitrail fit: {summary['top1']:.1%}")
