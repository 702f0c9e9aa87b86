"""Mamba-ND: is it better to alternate the orders of plain layers than to have one order, or two scans in each layer?"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from vitrail.app.build import count_parameters
from vitrail.checks.check import Arm, Context, Verdict, paired
from vitrail.models.mamba_nd import MambaND, mamba_nd_video_nano

WIDTH: dict[str, Any] = {"dim": 32, "states": 8}
ARMS: dict[str, dict[str, Any]] = {
    "alternating": {"design": "alternating"},
    "single": {"design": "single"},
    "bidirectional": {"design": "bi_ssm", "expand": 52.5 / 32},
}
"""A layer with two scans has as many parameters as one with one scan where it is 52 channels wide inside, not 64."""
IMAGES: dict[str, Any] = {"patch_size": 4, "depths": (8,), **WIDTH}
FRAMES, SIDE = 6, 12
CLIPS: dict[str, Any] = {
    "in_chans": 1,
    "num_classes": 4,
    "img_size": (FRAMES, SIDE, SIDE),
    "depths": (6,),
    **WIDTH,
}
PASSES = 3_200
"""Of images, for each arm."""
STEPS, BATCH, HELD_OUT = 150, 32, 512
"""Of clips; every clip that is trained with is new."""


def run(ctx: Context) -> Verdict:
    """Train three designs of equal size on images and on clips, at equal numbers of passes."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    net = {**IMAGES, **({"img_size": 16, "depths": (4,)} if ctx.quick else {"img_size": 28})}
    images: dict[str, list[Arm]] = {name: [] for name in ARMS}
    clips: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in ctx.seeds:
        for name, design in ARMS.items():
            settings = {
                "model.name": "mamba_nd_nano",
                "model.options": {**net, **design},
                "train.batch_size": 32,
                "train.epochs": 0.05 if ctx.quick else PASSES / len(index.rows("train")),
            }
            images[name].append(ctx.train(index, name, seed, settings))
            ctx.tell(f"{name} on clips, seed {seed}")
            clips[name].append(learn_motion(design, seed, *((2, 4, 16) if ctx.quick else (STEPS, BATCH, HELD_OUT))))
    top1 = {name: [arm.top1 for arm in arms] for name, arms in images.items()}
    against = {
        "single": "a net whose layers alternate their orders is more accurate than one whose layers have one order",
        "bidirectional": "a net whose layers alternate their orders is more accurate than one that scans both ways in "
        "every layer",
    }
    tasks = (
        ("images", "top-1 on held-out images", top1),
        ("clips", "share of the motions of held-out clips told rightly", clips),
    )
    return Verdict(
        [
            paired(f"on {task}, {claim}", quantity, values, ours="alternating", against=other)
            for task, quantity, values in tasks
            for other, claim in against.items()
        ],
        notes=[
            f"{PASSES:,} passes of images and {STEPS * BATCH:,} clips for every arm in full, a few in quick mode; 8 "
            "layers for images, 6 for clips.",
            f"Clips are {FRAMES} frames of a blob that moves by a pixel a frame, up, down, left or right, under noise, "
            "on a plane whose edges meet: no frame alone tells the motion.",
            "The layer with two scans is narrower inside, so that all nets have the same parameters.",
            "Nets of under 0.1 M parameters: ImageNet, HMDB-51 and ERA5 are not shown.",
        ],
        tables={"cost of the arms": [_cost(name, images[name][0], design) for name, design in ARMS.items()]},
    )


def blobs_in_motion(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return clips (B, 1, T, H, W) and the number of the direction of each, (B,).

    A blob begins anywhere on a plane whose edges meet, and moves by a pixel a frame; every frame has its own noise.
    """
    start = SIDE * torch.rand(count, 2, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    step = torch.tensor([(-1, 0), (1, 0), (0, -1), (0, 1)])[labels]
    centre = start[:, None] + torch.arange(FRAMES)[:, None] * step[:, None]  # (B, T, 2)
    away = (torch.arange(SIDE) - centre[..., None] + SIDE / 2) % SIDE - SIDE / 2  # (B, T, 2, side)
    down, right = (2 * (-away.square() / 8).exp()).unbind(2)
    clips = (down[..., :, None] * right[..., None, :] / 2)[:, None]
    return clips + 0.2 * torch.randn(clips.shape, generator=generator), labels


def learn_motion(design: dict[str, Any], seed: int, steps: int, batch: int, held_out: int) -> float:
    """Train a net on new clips at every step, and return the share of held-out ones that it tells rightly."""
    torch.manual_seed(seed)
    model = mamba_nd_video_nano(**{**CLIPS, **design})
    generator = torch.Generator().manual_seed(seed)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    for step in range(steps):
        rate = 3e-3 * min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        clips, labels = blobs_in_motion(batch, generator)
        loss = F.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    clips, labels = blobs_in_motion(held_out, torch.Generator().manual_seed(10_000 + seed))
    with torch.inference_mode():
        answers = torch.cat([model(part).argmax(1) for part in clips.split(64)])
    return float((answers == labels).float().mean())


def _cost(name: str, arm: Arm, design: dict[str, Any]) -> dict[str, Any]:
    images = torch.zeros(16, 3, *arm.preprocess.size)
    clips = torch.zeros(16, 1, FRAMES, SIDE, SIDE)
    video: MambaND = mamba_nd_video_nano(**{**CLIPS, **design}).eval()
    return {
        "arm": name,
        "parameters, images": count_parameters(arm.model),
        "parameters, clips": count_parameters(video),
        "ms_per_image": _ms(arm.model, images),
        "ms_per_clip": _ms(video, clips),
    }


def _ms(model: nn.Module, x: Tensor) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:]) / len(x)
