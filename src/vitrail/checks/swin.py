"""Swin: do shifted windows do better than windows that stay where they are, and is the cost linear in the pixels?"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch

from vitrail.app.build import count_flops
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.data.synthetic.shapes import NAMES, batches
from vitrail.evaluate.dense import confusion, mean_iou
from vitrail.models import create_model
from vitrail.models.dense import segmentation_loss, segmenter

NET: dict[str, Any] = {"patch_size": 1, "window_size": (4, 4, 4, 4)}
"""Of 28 pixels: 7, 4, 2 and 1 windows along a side of the four stages; 8, 4, 2 and 1 in the published nets."""
WIDE = (7, 7, 7, 4)
"""Windows three times as large, which see as far without a shift."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "shifted": ("swin_nano", {}),
    "unshifted": ("swin_nano", {"shift": False}),
    "wide, unshifted": ("swin_nano", {"shift": False, "window_size": WIDE}),
    "mixer, shifted": ("swin_mixer_nano", {}),
    "mixer, unshifted": ("swin_mixer_nano", {"shift": False}),
}
PASSES = 3_000
"""Of images, for each arm: minutes for fifteen nets on two cores."""
SIDE, BATCH, STEPS = 32, 16, 120
"""Of the pictures of shapes to segment; none comes twice."""
SIDES = (64, 128, 256, 512)


def run(ctx: Context) -> Verdict:
    """Train with and without shifts at equal size and numbers of images, to classify and to segment; count the cost."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    arms: dict[str, list[Arm]] = {name: [] for name in ARMS}
    iou: dict[str, list[float]] = {"shifted": [], "unshifted": []}
    for seed in ctx.seeds:
        for name, (net, own) in ARMS.items():
            settings = {
                "model.name": net,
                "model.options": {**NET, **({"patch_size": 2} if ctx.quick else {}), **own},
                "train.batch_size": 32,
                "train.epochs": epochs,
            }
            arms[name].append(ctx.train(index, name, seed, settings))
        for name, values in iou.items():
            ctx.tell(f"segmentation, {name}, seed {seed}")
            values.append(segment(seed, shift=name == "shifted", steps=1 if ctx.quick else STEPS))
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    costs = [cost(side) for side in (SIDES[:2] if ctx.quick else SIDES)]
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "with windows that every second block shifts a net classifies better than with windows that stay",
                quantity,
                top1,
                ours="shifted",
                against="unshifted",
            ),
            paired(
                "with windows that shift a net segments better than with windows that stay",
                "mean intersection over union, held-out pictures of shapes",
                iou,
                ours="shifted",
                against="unshifted",
            ),
            paired(
                "windows that shift help the all-MLP net too",
                quantity,
                top1,
                ours="mixer, shifted",
                against="mixer, unshifted",
            ),
            paired(
                "with windows that shift a net classifies better than with windows three times as large that stay",
                quantity,
                top1,
                ours="shifted",
                against="wide, unshifted",
            ),
            bounded(
                "the multiply-adds are linear in the pixels",
                "exponent of the multiply-adds over the pixels, from the smallest image to the largest",
                growth(costs, "windows_madds"),
                at_most=1.02,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm; for segmentation "
            f"{STEPS * BATCH:,} pictures.",
            "Nets with and without shifts have the same parameters and multiply-adds; Swin-Mixer's shifted windows "
            "reach beyond the map, which costs it some more.",
            f"Attention over all places grows with the pixels to the power {growth(costs, 'global_madds'):.2f} in the "
            "same nets and at the same sizes.",
            "Nets of under a million parameters on small images; ImageNet, COCO and ADE20K are not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "multiply-adds against size": costs,
        },
    )


def segment(seed: int, *, shift: bool, steps: int) -> float:
    """Return the mean IoU, on held-out pictures, of UPerNet on a net that was trained with it."""
    torch.manual_seed(seed)
    net = segmenter("swin_nano", len(NAMES), width=32, shift=shift)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, foreach=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps + 1)
    for images, masks, _ in islice(batches(BATCH, seed, (SIDE, SIDE)), steps):
        optimizer.zero_grad()
        segmentation_loss(net(images), masks).backward()
        optimizer.step()
        rates.step()
    counts = torch.zeros(len(NAMES), len(NAMES), dtype=torch.int64)
    with torch.inference_mode():
        for images, masks, _ in islice(batches(BATCH, 10**6 + seed, (SIDE, SIDE)), max(1, steps // 8)):
            counts += confusion(net.eval()(images).argmax(1), masks, len(NAMES))
    return mean_iou(counts)


def cost(side: int) -> dict[str, Any]:
    """Return the multiply-adds of the nano for an image, with its windows and with windows as large as the maps."""
    row: dict[str, Any] = {"side": side, "pixels": side**2}
    everywhere = tuple(side // stride for stride in (2, 4, 8, 16))
    with torch.device("meta"):
        for name, windows in (("windows", (4, 4, 4, 2)), ("global", everywhere)):
            row[f"{name}_madds"] = count_flops(
                create_model("swin_nano", num_classes=10, window_size=windows), (side, side)
            )
    return row


def growth(costs: list[dict[str, Any]], what: str) -> float:
    """Return the exponent of a cost over the pixels, from the first row to the last."""
    first, last = costs[0], costs[-1]
    return math.log(last[what] / first[what]) / math.log(last["pixels"] / first["pixels"])
