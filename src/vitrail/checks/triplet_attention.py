"""Triplet attention against no attention, squeeze-and-excitation and CBAM in one small residual network.

The paper's claim is a gain on ImageNet, COCO and VOC at negligible cost. Here all arms see the same number of images;
what differs is the module at the end of each residual branch. Where the networks look is drawn and measured as well: on
the bundled data the object is what is bright.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Finding, Verdict, bounded, paired
from vitrail.data.index import Index
from vitrail.edits.triplet_attention import TripletAttention, triplet_attention
from vitrail.evaluate.explain import cam_sheet, grad_cam, grad_cam_plus_plus
from vitrail.models import create_model

NET = {"stem_stride": 2}
ARMS: dict[str, dict[str, Any]] = {
    "base": {"model.options": NET},
    "se": {"model.options": {**NET, "block_args": {"attn_layer": "se"}}},
    "cbam": {"model.options": {**NET, "block_args": {"attn_layer": "cbam"}}},
    "triplet": {"model.options": NET, "model.edits": [{"name": "triplet_attention"}]},
}
MAPS = {"Grad-CAM": grad_cam, "Grad-CAM++": grad_cam_plus_plus}
EPOCHS = 0.5
"""Of Fashion-MNIST, for each arm."""
FEW_HUNDRED = 300
"""Parameters per block: three branches of 2 x 7 x 7 weights and a normalisation of one channel."""
BRIGHT = 0.2
"""Of white; the ink of a digit and the cloth of a garment are above it, their ground is at 0."""


def run(ctx: Context) -> Verdict:
    """Compare the arms' accuracy, cost and maps."""
    index = ctx.index("digits" if ctx.quick else "fashion")
    settings = {"train.epochs": 0.2 if ctx.quick else EPOCHS}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**settings, **own}) for seed in ctx.seeds] for name, own in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    model = arms["triplet"][0].model
    blocks = sum(isinstance(module, TripletAttention) for module in model.modules())
    added = count_parameters(model) - count_parameters(arms["base"][0].model)

    def beats(other: str, claim: str) -> Finding:
        both = {"triplet": top1["triplet"], other: top1[other]}
        return paired(claim, "top-1 accuracy, held-out images", both, ours="triplet", against=other)

    findings = [
        beats("base", "With triplet attention a residual network is more accurate after as many images."),
        beats("se", "Triplet attention is more accurate than squeeze-and-excitation."),
        beats("cbam", "Triplet attention is more accurate than CBAM."),
        bounded(
            "It adds a few hundred parameters per block.", "parameters per block", added / blocks, at_most=FEW_HUNDRED
        ),
    ]
    notes = [
        f"{len(index.rows('train'))} training images, of which every arm sees {settings['train.epochs']:g} epochs; "
        "the paper trains on ImageNet to the end",
        "SE and CBAM are timm's, at the same place in each block",
    ]
    tables = {"cost": _costs(arms)}
    tables["maps"], ink = _maps(ctx, index, arms)
    if ctx.data is None:
        claim = "The map of a network with triplet attention lies more on the object."
        pair = {name: ink[name] for name in ("triplet", "base")}
        quantity = "share of the Grad-CAM map on bright pixels"
        findings.append(paired(claim, quantity, pair, ours="triplet", against="base"))
    return Verdict(findings, notes, tables)


def _costs(arms: dict[str, list[Arm]]) -> list[dict[str, Any]]:
    """Return parameters and multiply-adds of the arms, and of the paper's ResNet-50 with and without the module."""
    rows = [
        {
            "model": name,
            "parameters": count_parameters(trained[0].model),
            "multiply_adds": count_flops(trained[0].model, trained[0].preprocess.size),
            "seconds": round(float(np.mean([arm.learned.trained.seconds for arm in trained])), 1),
        }
        for name, trained in arms.items()
    ]
    with torch.device("meta"):
        plain = create_model("resnet50", num_classes=1000)
        gated: nn.Module = triplet_attention()(create_model("resnet50", num_classes=1000))
    for name, model in (("resnet50", plain), ("resnet50 with triplet attention", gated)):
        cost = {"parameters": count_parameters(model), "multiply_adds": count_flops(model, (224, 224))}
        rows.append({"model": name, **cost, "seconds": None})
    return rows


def _maps(
    ctx: Context, index: Index, arms: dict[str, list[Arm]]
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Draw the maps of some images; return the share of each arm's maps on bright pixels, and that of Grad-CAM."""
    preprocess = arms["base"][0].preprocess
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    images = [
        image[None] for batch, _ in ctx.held_out(index, preprocess, most=4 if ctx.quick else 100)() for image in batch
    ]
    bright = [((image[0] * std + mean).mean(0) > BRIGHT).numpy() for image in images]

    def share(model: nn.Module, kind: str) -> float:
        values = [MAPS[kind](model, image) for image in images]
        return float(np.mean([cam[mask].sum() / max(cam.sum(), 1e-12) for cam, mask in zip(values, bright)]))

    shares = {
        (name, kind): [share(arm.model, kind) for arm in trained] for name, trained in arms.items() for kind in MAPS
    }
    table = [
        {"arm": name, "map": kind, "share_on_bright_pixels": float(np.mean(values))}
        for (name, kind), values in shares.items()
    ]
    first = [trained[0].model for trained in arms.values()]
    for number, image in enumerate(images[:4]):
        pixels = ((image[0] * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        cam_sheet(first, pixels, image).save(ctx.folder / f"cams-{number}.png")
    return table, {name: shares[name, "Grad-CAM"] for name in arms}
