"""MambaEye: does a net that knows moves and no places do better at sizes that it was not trained at?

And does asking for an answer after every patch, with targets that harden, give better answers before the last?
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.app.build import count_parameters
from vitrail.checks.check import Arm, Context, Verdict, bounded, paired
from vitrail.data.index import Index
from vitrail.models import create_model
from vitrail.models.mambaeye import cut, moves_between

TRAINING = "vitrail.methods.supervised.mambaeye_training:MambaEyeTraining"
VIT: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 5,
    "num_heads": 4,
    "dynamic_img_size": True,
    "dynamic_img_pad": True,
}
"""A ViT of as many parameters, whose positions are interpolated to any size."""
SUPERVISIONS = ("hardening", "label", "last")
PASSES = 6_400
"""Of images, for each arm: minutes for twelve nets on two cores."""
SIDES, QUICK_SIDES = (14, 20, 28, 40, 56, 84, 112), (8, 16, 24)
"""Pixels of the test; trained at 28, and in quick mode at 16."""
IMAGES, QUICK_IMAGES = 300, 24
"""Held out, seen by every arm at every size."""


def run(ctx: Context) -> Verdict:
    """Train four arms at equal numbers of image passes and near equal size; test them at other sizes and early on."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    arms: dict[str, list[Arm]] = {name: [] for name in (*SUPERVISIONS, "vit")}
    for seed in ctx.seeds:
        shared = {"train.epochs": epochs, "train.batch_size": 32}
        for name in SUPERVISIONS:
            own = {"model.name": "mambaeye_nano", "method.name": TRAINING, "method.options": {"supervision": name}}
            arms[name].append(ctx.train(index, name, seed, {**shared, **own}))
        own = {"model.name": "vit_tiny_patch16_224", "model.options": VIT, "method.options": {"smoothing": 0.0}}
        arms["vit"].append(ctx.train(index, "vit", seed, {**shared, **own}))

    sides = QUICK_SIDES if ctx.quick else SIDES
    home = arms["vit"][0].preprocess.size[0]
    sweep = {name: [_by_side(ctx, index, arm, sides) for arm in trained] for name, trained in arms.items()}
    elsewhere = {
        name: [float(np.mean([found[side] for side in sides if side != home])) for found in by_seed]
        for name, by_seed in sweep.items()
    }
    steps = {name: [_by_steps(ctx, index, arm) for arm in trained] for name, trained in arms.items() if name != "vit"}
    early = {name: [float(found[:-1].mean()) for found in by_seed] for name, by_seed in steps.items()}
    net = arms["hardening"][0].model
    return Verdict(
        [
            paired(
                "trained at one size, MambaEye is more accurate at others than a ViT with interpolated positions",
                f"mean top-1 at {', '.join(str(side) for side in sides if side != home)} pixels",
                {name: elsewhere[name] for name in ("hardening", "vit")},
                ours="hardening",
                against="vit",
            ),
            paired(
                "with targets that harden at every step, MambaEye is more accurate before the last patch than with "
                "the label at the last step alone",
                "top-1, mean over all steps but the last",
                early,
                ours="hardening",
                against="last",
            ),
            paired(
                "targets that harden are better before the last patch than the label at every step",
                "top-1, mean over all steps but the last",
                early,
                ours="hardening",
                against="label",
            ),
            bounded(
                "a stream of patches, one at a time, gives the logits of the whole walk",
                "largest difference, as a share of the largest logit",
                _stream_gap(ctx, index, arms["hardening"][0]),
                at_most=1e-4,
            ),
            bounded(
                "each further patch takes as much memory as the ones before",
                "what patches 513 to 1024 keep for the backward pass, over twice what 257 to 512 do, less one",
                abs((_kept(net, 1024) - _kept(net, 512)) / (2 * (_kept(net, 512) - _kept(net, 256))) - 1),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm; {home} pixels in "
            "training, tiles of 4 pixels.",
            "In training walks are random and cover part of an image; in the test every tile is seen once, in a fixed "
            "random order. The paper trains at sizes from 256 to 1024 pixels, and this check at one.",
            "Nets of a quarter of a million parameters on small images, made larger: the paper's accuracy on ImageNet "
            "and at 1536 x 1536 is not shown.",
        ],
        tables={
            "accuracy by size": [
                {"pixels": side, **{name: _mean(found[side] for found in runs) for name, runs in sweep.items()}}
                for side in sides
            ],
            "accuracy by patches seen": [
                {"patches": step, **{name: _mean(found[step - 1] for found in runs) for name, runs in steps.items()}}
                for step in sorted({1, 2, 4, 8, 16, 32, len(steps["last"][0])})
                if step <= len(steps["last"][0])
            ],
            "cost": [{"arm": name, "parameters": count_parameters(trained[0].model)} for name, trained in arms.items()],
            "what a walk keeps for the backward pass": [
                {"patches": length, "numbers": _kept(net, length)} for length in (64, 256, 1024)
            ],
        },
    )


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


@torch.inference_mode()
def _by_side(ctx: Context, index: Index, arm: Arm, sides: tuple[int, ...]) -> dict[int, float]:
    """Return top-1 at each size, of the same images."""
    found = {}
    for side in sides:
        preprocess = replace(arm.preprocess, size=(side, side))
        batches = ctx.held_out(index, preprocess, most=QUICK_IMAGES if ctx.quick else IMAGES)
        hits = [arm.model(images).argmax(1) == target for images, target in batches()]
        found[side] = float(torch.cat(hits).float().mean())
    return found


def _walk(arm: Arm, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return patches and moves of the walk that the model takes of itself."""
    net: Any = arm.model
    positions = net.positions(*images.shape[-2:])
    return cut(images, positions, net.patch_size), moves_between(positions)


@torch.inference_mode()
def _by_steps(ctx: Context, index: Index, arm: Arm) -> np.ndarray:
    """Return top-1 after each step of the walk, (L,)."""
    net: Any = arm.model
    batches = ctx.held_out(index, arm.preprocess, most=QUICK_IMAGES if ctx.quick else IMAGES)
    hits = [net.forward_walk(*_walk(arm, images)).argmax(2) == target[:, None] for images, target in batches()]
    found: np.ndarray = torch.cat(hits).float().mean(0).numpy()
    return found


@torch.inference_mode()
def _stream_gap(ctx: Context, index: Index, arm: Arm) -> float:
    """Return how far a stream, step after step, is from the whole walk."""
    net: Any = arm.model
    images, _ = next(iter(ctx.held_out(index, arm.preprocess, most=8)()))
    patches, moves = _walk(arm, images)
    together, memory, apart = net.forward_walk(patches, moves), None, []
    for step in range(len(moves)):
        logits, memory = net.stream(patches[:, step : step + 1], moves[step : step + 1], memory)
        apart.append(logits)
    return float((torch.cat(apart, 1) - together).abs().max() / together.abs().max())


def _kept(net: Any, length: int) -> int:
    """Return how many numbers a walk of this length keeps for the backward pass, on no device."""
    with torch.device("meta"):
        twin: Any = create_model("mambaeye_nano", num_classes=net.num_classes).train()
    kept = 0

    def keep(value: Tensor) -> Tensor:
        nonlocal kept
        kept += value.numel()
        return value

    patches = torch.zeros(1, length, 3 * twin.patch_size**2, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        twin.forward_walk(patches, torch.zeros(length, 2, device="meta"))
    return kept
