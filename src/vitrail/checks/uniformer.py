"""UniFormer: local aggregators first and global ones after; and does a net for clips see what no frame shows?"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_row
from vitrail.data.sources.digits import DigitsSource
from vitrail.models import create_model
from vitrail.models.uniformer import uniformer_video_base, uniformer_video_nano, uniformer_video_small

ARMS: dict[str, dict[str, Any]] = {
    "local and global": {"aggregators": "LLGG"},
    "all local": {"aggregators": "LLLL", "mlp_ratio": 4.8},
    "all global": {"aggregators": "GGGG"},
}
"""All within one per cent of each other's parameters."""
PASSES = 4_800
"""Of images, for each arm: minutes for nine nets on two cores."""
FRAMES, SIDE = 8, 16
STEPS, BATCH, HELD_OUT = 100, 32, 512
"""Of clips; every clip that is trained with is new."""
WIDER = 4.2
"""Ratio of the feed-forward layers that gives the net of frames the parameters of the net of clips."""
PUBLISHED: dict[str, tuple[float, float, float, tuple[int, ...]]] = {
    "uniformer_small": (22, 3.6, 0.1, (224,)),
    "uniformer_small_plus": (24, 4.2, 0.1, (224,)),
    "uniformer_base": (50, 8.3, 0.1, (224,)),
    "uniformer_large_ls": (100, 12.6, 0.1, (224,)),
    "uniformer_video_small": (21.4, 167 / 4, 0.25, (16, 224)),
    "uniformer_video_base": (49.8, 387 / 4, 0.25, (16, 224)),
}
"""Millions of parameters, billions of multiply-adds, their last digit, and the size, from tables of the authors."""


def run(ctx: Context) -> Verdict:
    """Train three arrangements on images, and nets of clips and of frames on clips; count the published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    images: dict[str, list[Arm]] = {name: [] for name in ARMS}
    clips: dict[str, list[float]] = {"clips": [], "frames": []}
    for seed in ctx.seeds:
        for name, options in ARMS.items():
            settings = {
                "model.name": "uniformer_nano",
                "model.options": options,
                "train.batch_size": 32,
                "train.epochs": 0.05 if ctx.quick else PASSES / len(index.rows("train")),
            }
            images[name].append(ctx.train(index, name, seed, settings))
        for name in clips:
            ctx.tell(f"{name}, seed {seed}")
            clips[name].append(learn_motion(name, seed, *((2, 4, 16) if ctx.quick else (STEPS, BATCH, HELD_OUT))))
    top1 = {name: [arm.top1 for arm in arms] for name, arms in images.items()}
    sizes = published_sizes(["uniformer_small"] if ctx.quick else list(PUBLISHED))
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "two local stages and then two global ones are more accurate than four local ones",
                quantity,
                top1,
                ours="local and global",
                against="all local",
            ),
            paired(
                "two local stages and then two global ones are more accurate than four global ones",
                quantity,
                top1,
                ours="local and global",
                against="all global",
            ),
            paired(
                "a net of clips tells motions that the mean answer of a net of frames, of the same size, cannot",
                "share of the motions of held-out clips told rightly",
                clips,
                ours="clips",
                against="frames",
            ),
            bounded(
                "the nets have the published parameters and multiply-adds",
                "largest deviation beyond the last digit of the published figure, as a share of it",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{PASSES:,} passes of images for each arm and {STEPS * BATCH:,} clips in full, a few in quick mode. The "
            "feed-forward layers of the net of local stages are wider, so that all have the same parameters; global "
            "stages early cost more multiply-adds, and all arms have as many passes.",
            f"Clips are {FRAMES} frames of a written digit that moves by a pixel a frame, up, down, left or right, on "
            "a plane whose edges meet: each frame alone is as likely under every motion, so that the mean of answers "
            "of frames cannot be better than one in four.",
            "The released UniFormer-L has half as many multiply-adds again as its table says, in the published code "
            "too.",
            "Nets of under half a million parameters: ImageNet and Kinetics are not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, arms[0]) for name, arms in images.items()],
            "cost of the nets of clips": [_cost(name) for name in clips],
            "published sizes": sizes,
        },
    )


# ---- clips -----------------------------------------------------------------------------------------------------------


def digits_in_motion(digits: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return clips (B, 1, T, H, W) and the number of the direction of each, (B,).

    A digit begins anywhere on a plane whose edges meet, and moves by a pixel a frame.

    Args:
        digits: (N, 8, 8).
        count: B.
        generator: draws digits, places and directions.
    """
    labels = torch.randint(4, (count,), generator=generator)
    plane = torch.zeros(count, SIDE, SIDE)
    plane[:, :8, :8] = digits[torch.randint(len(digits), (count,), generator=generator)]
    start = torch.randint(SIDE, (count, 2), generator=generator)
    step = torch.tensor([(-1, 0), (1, 0), (0, -1), (0, 1)])[labels]
    shift = start[:, None] + torch.arange(FRAMES)[:, None] * step[:, None]  # (B, T, 2)
    down, right = ((torch.arange(SIDE) - shift[..., None]) % SIDE).unbind(2)  # (B, T, side)
    one = torch.arange(count)[:, None, None, None]
    return plane[one, down[..., :, None], right[..., None, :]][:, None], labels


class OfFrames(nn.Module):
    """The mean of the answers of a net of images to the frames of a clip."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, clips: Tensor) -> Tensor:
        """Return logits (B, classes) of (B, C, T, H, W)."""
        answers: Tensor = self.net(clips.transpose(1, 2).flatten(0, 1))
        return answers.unflatten(0, (len(clips), -1)).mean(1)


def net_of(name: str) -> nn.Module:
    """Return a net of clips, or one of frames of about the same size."""
    if name == "clips":
        return uniformer_video_nano(in_chans=1, num_classes=4)
    return OfFrames(create_model("uniformer_nano", in_chans=1, num_classes=4, mlp_ratio=WIDER))


def learn_motion(name: str, seed: int, steps: int, batch: int, held_out: int) -> float:
    """Train a net on new clips at every step, and return the share of held-out ones that it tells rightly."""
    source = DigitsSource()
    digits = torch.stack([torch.from_numpy(source.read(record.locator)) for record in source.records()]) / 128 - 0.25
    seen, unseen = digits[:1400], digits[1400:]
    torch.manual_seed(seed)
    model = net_of(name)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=3e-3)
    for step in range(steps):
        rate = 3e-3 * min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        clips, labels = digits_in_motion(seen, batch, generator)
        loss = F.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    clips, labels = digits_in_motion(unseen, held_out, torch.Generator().manual_seed(10_000 + seed))
    with torch.inference_mode():
        answers = torch.cat([model(part).argmax(1) for part in clips.split(64)])
    return float((answers == labels).float().mean())


def _cost(name: str) -> dict[str, Any]:
    model, times = net_of(name).eval(), []
    clips = torch.zeros(16, 1, FRAMES, SIDE, SIDE)
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            model(clips)
            times.append(time.perf_counter() - start)
    return {
        "net": name,
        "parameters": count_parameters(model),
        "ms_per_clip": 1e3 * min(times[1:]) / len(clips),
    }


# ---- sizes -----------------------------------------------------------------------------------------------------------


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net."""
    videos = {"uniformer_video_small": uniformer_video_small, "uniformer_video_base": uniformer_video_base}
    rows = []
    for name in names:
        params, flops, digit, size = PUBLISHED[name]
        with torch.device("meta"):
            if name in videos:
                model: nn.Module = videos[name]()
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    model.eval()(torch.zeros(1, 3, *size, size[-1]))
                madds = counter.get_total_flops() / 2e9
            else:
                model = create_model(name, num_classes=1000)
                madds = count_flops(model, (size[0], size[0])) / 1e9
        found = count_parameters(model) / 1e6, madds
        rows.append(size_row(name, found, (params, flops), (0.1 if params % 1 else 1.0, digit)))
    return rows
