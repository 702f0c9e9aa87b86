"""Fractal pretraining: does it help where labels are few, and is it worth its compute?

The paper pretrains a ResNet-50 for 90 epochs of a million fractals and finetunes it for 150 epochs. Here a small
network sees some 12,000 fractals at 32 pixels. What can be seen at this size is the direction: finetuned from fractals
against from scratch at equal finetuning, and against from scratch with the compute of the pretraining on top.
"""

from __future__ import annotations

import csv
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vitrail.checks.check import BUNDLED, Arm, Context, Verdict, paired
from vitrail.data.audit import audit
from vitrail.data.index import Index, build_index
from vitrail.data.sources import open_source
from vitrail.data.synthetic.fractals import NUMPY, Fractals, compiled
from vitrail.errors import DataError
from vitrail.training.recipe import DataConfig

METHODS = {"fractals": "supervised", "fractals_multi": "vitrail.methods.supervised.multi_instance:MultiInstance"}
INSTANCES = {"fractals": 1, "fractals_multi": 5}


def run(ctx: Context) -> Verdict:
    """Train all arms on each data set and compare them."""
    classes, per_class, passes, epochs = (3, 5, 1, 0.05) if ctx.quick else (20, 100, 6, 25.0)
    model, side = ("small_resnet_nano", 16) if ctx.quick else ("small_resnet_micro", 32)

    def train(index: Index, arm: str, seed: int, length: float, settings: dict[str, Any]) -> Arm:
        common = {"model.name": model, "model.img_size": side, "train.epochs": length, "train.eval_every": length}
        return ctx.train(index, arm, seed, {**common, **settings})

    data = _data(ctx)
    pretraining = {
        name: _index(
            ctx,
            name,
            DataConfig(
                path=f"fractal_pretraining://classes={classes}&per_class={per_class}&size={side}&instances={count}"
            ),
        )
        for name, count in INSTANCES.items()
    }
    scores: dict[str, dict[str, list[float]]] = {place: defaultdict(list) for place in data}
    for seed in ctx.seeds:
        weights = {}
        for name, index in pretraining.items():
            arm = train(index, f"pretrain-{name}", seed, passes, {"method.name": METHODS[name]})
            weights[name] = ctx.folder / f"{name}-{seed}.safetensors"
            save_file({key: value.contiguous() for key, value in arm.model.state_dict().items()}, weights[name])
        for place, index in data.items():
            images = len(index.rows("train"))
            seen = passes * len(pretraining["fractals_multi"].rows("train"))
            arms: dict[str, tuple[float, dict[str, Any]]] = {
                "scratch": (epochs, {}),
                "scratch_longer": (epochs + seen / images, {}),
                **{name: (epochs, {"model.pretrained": str(path)}) for name, path in weights.items()},
            }
            for name, (length, settings) in arms.items():
                scores[place][name].append(train(index, f"{place}-{name}", seed, length, settings).top1)
    findings = []
    for against, claim in (
        ("scratch", "Finetuning from multi-instance fractals beats training from scratch at equal finetuning"),
        ("scratch_longer", "It beats training from scratch with the compute of the pretraining on top"),
        ("fractals", "Multi-instance prediction is the better task for pretraining than multi-class prediction"),
    ):
        for place, arms_of in scores.items():
            quantity = "top-1 on held-out images, a share"
            findings.append(
                paired(f"{claim}: few-shot {place}.", quantity, arms_of, ours="fractals_multi", against=against)
            )
    shots = ", ".join(f"{place} {len(index.rows('train'))}" for place, index in data.items())
    notes = [
        f"{model} at {side} pixels; {classes} classes of {per_class} fractals, {passes} passes; finetuned for "
        f"{epochs:g} passes; training images: {shots}.",
        "The paper's figure, 92.7 to 98.1 % of ImageNet pretraining with a ResNet-50, needs a pretraining some 5,000 "
        "times as long and is not measured here.",
    ]
    return Verdict(findings, notes, {"images per second": _speed(ctx)})


def _data(ctx: Context) -> dict[str, Index]:
    if ctx.data is not None:
        return {"data": ctx.index()}
    if ctx.quick:
        return {"digits": ctx.index("digits")}
    # A twentieth of the digits is nine a class.
    return {"clip art": _clip_art(ctx), "digits": ctx.index("digits", val_fraction=0.95)}


def _clip_art(ctx: Context, classes: int = 20, shots: int = 8, held_out: int = 12) -> Index:
    """Return the first images of the first classes that have enough."""
    root, package = BUNDLED["clipart"] or ("", "")
    if not Path(root).is_dir():
        raise DataError(f"this check needs the Debian package {package}: install it, or give --data PATH")
    table = ctx.folder / "clip_art.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        taken = 0
        for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
            images = sorted(folder.rglob("*.png"))
            # Neighbours in the alphabet are often versions of one picture: take them from all over the folder.
            images = images[:: max(len(images) // (shots + held_out), 1)][: shots + held_out]
            if len(images) == shots + held_out and taken < classes:
                taken += 1
                rows.writerows(
                    [str(path), folder.name, "train" if place < shots else "val"] for place, path in enumerate(images)
                )
    return _index(ctx, "clip-art", DataConfig(path=str(table), split_column="split"))


def _index(ctx: Context, name: str, config: DataConfig) -> Index:
    folder = ctx.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(config)
    return build_index(source, audit(source, config, folder / "audit.sqlite"), config, folder / "index.arrow")


def _speed(ctx: Context) -> list[dict[str, Any]]:
    """Return what one thread renders per second, in both forms."""
    rows = []
    for size in (64,) if ctx.quick else (64, 224):
        for instances in (1, 5):
            fractals = Fractals(classes=100, per_class=1000, size=size, instances=instances)
            row: dict[str, Any] = {"size": size, "instances": instances}
            for name, loops in (("compiled", compiled()), ("numpy", NUMPY)):
                fractals.image(0, loops)  # the first call loads the machine code
                count = 1 if ctx.quick else 100 if name == "compiled" else 10
                start = time.perf_counter()
                for number in range(count):
                    fractals.image(number * 37 % len(fractals), loops)
                row[name] = round(count / (time.perf_counter() - start), 1)
            rows.append(row)
    return rows
