"""FocalNet: is focal modulation better than attention in windows, at what speed, and what do modulators point at?"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_image
from timm.layers import trunc_normal_
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, paired
from vitrail.data.synthetic.shapes import NAMES, scene
from vitrail.edits.surgery import Edit, replace_modules
from vitrail.evaluate.modulator import modulation_picture, modulations
from vitrail.evaluate.turns import medians
from vitrail.layers.mixed_block import MixedSwinBlock
from vitrail.models import create_model
from vitrail.report.plots import standalone

NET: dict[str, Any] = {
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2, 2),
    "num_heads": (1, 2, 4),
    "window_size": 7,
    "strict_img_size": False,
}
"""Windows of 7 as published, on maps of 14, 7 and 4 places a side."""
SWIN = "swin_tiny_patch4_window7_224"
ARMS: dict[str, list[dict[str, Any]]] = {
    "focal": [{"name": "focalnet:focal_modulation"}],
    "window": [],
    "depthwise": [{"name": "vitrail.checks.focalnet:depthwise"}],
}
PASSES = 6_400
"""Of images, for each arm: minutes for nine nets on two cores."""
SCENES = 1_536
"""To learn from, a shape in each, before modulators are looked at."""


def run(ctx: Context) -> Verdict:
    """Train three mixers of places in one net, time them, and hold modulators against masks."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    net = {**NET, "depths": (1, 1, 1)} if ctx.quick else NET
    settings = {"model.name": SWIN, "model.options": net, "train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**settings, "model.edits": edits}) for seed in ctx.seeds]
        for name, edits in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    seconds = step_seconds({name: arms[name] for name in ("focal", "window")}, ctx)
    learned = [trained_on_scenes(ctx, seed) for seed in ctx.seeds]
    contrast = {where: [foreground(model, where, ctx) for model in learned] for where in ("inside", "outside")}
    pictures(learned[0], ctx)
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "focal modulation is more accurate than attention in shifted windows after as many images",
                quantity,
                top1,
                ours="focal",
                against="window",
            ),
            paired(
                "it is more accurate than a 7 x 7 depthwise convolution, which sees as far with its widest level",
                quantity,
                top1,
                ours="focal",
                against="depthwise",
            ),
            paired(
                "a training step takes no longer than with attention in shifted windows",
                "seconds of the processor for a step of 32 images, forward and backward",
                seconds,
                ours="focal",
                against="window",
                higher_is_better=False,
            ),
            paired(
                "modulators are larger at places of the shape that gives an image its class than elsewhere",
                "mean size of the modulator, of its mean over the image",
                contrast,
                ours="inside",
                against="outside",
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm; one net, timm's Swin, "
            "whose mixers of places are exchanged.",
            "Modulators are those of a nano that learned to name one shape on a random texture, at its second size of "
            "map; the masks were not learned from. The pictures are of photographs that this net does not know.",
            "Small nets on small images: ImageNet accuracy and detection are not shown.",
        ],
        tables={"cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()]},
    )


class Depthwise(nn.Module):
    """A linear layer, a 7 x 7 depthwise convolution, GELU and a linear layer, on maps (B, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        for linear in (self.enter, self.leave):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        y = self.conv(self.enter(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.leave(nn.functional.gelu(y))


def depthwise() -> Edit:
    """Return the edit that puts ``Depthwise`` in the place of the attention of Swin's blocks."""

    def build(block: Any) -> nn.Module:
        return MixedSwinBlock(block, Depthwise(block.dim))

    return lambda model: replace_modules(
        model, lambda _, module: isinstance(module, SwinTransformerBlock), build, what="block of Swin"
    )


def step_seconds(arms: dict[str, list[Arm]], ctx: Context) -> dict[str, list[float]]:
    """Return the median processor time of a step forward and backward, the arms of a seed taking turns."""
    images = torch.zeros(32, 3, 28, 28)
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(len(ctx.seeds)):
        steps = {
            name: lambda model=trained[number].model: model(images).sum().backward() for name, trained in arms.items()
        }
        for name, seconds in medians(steps, 1 if ctx.quick else 8, time.process_time).items():
            found[name].append(seconds)
    return found


# ---- modulators and masks --------------------------------------------------------------------------------------------


def trained_on_scenes(ctx: Context, seed: int) -> nn.Module:
    """Return a nano that has learned which shape is in a scene."""
    torch.manual_seed(seed)
    model = create_model("focalnet_nano", num_classes=len(NAMES) - 1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    images, labels, _ = scenes(32 if ctx.quick else SCENES, seed)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(1 if ctx.quick else 4):
        for rows in torch.randperm(len(images), generator=rng).split(32):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def scenes(count: int, seed: int, side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (N, 3, side, side) about zero, the class of their one shape (N,), and masks (N, side, side)."""
    drawn = [scene(number, seed, (side, side), most=1) for number in range(count)]
    images = torch.from_numpy(np.stack([one.image for one in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.tensor([int(one.labels[0]) - 1 for one in drawn])
    return images, labels, torch.from_numpy(np.stack([one.mask > 0 for one in drawn]))


def foreground(model: nn.Module, where: str, ctx: Context) -> float:
    """Return the modulator's mean size inside or outside the masks of scenes that are new, of its mean over all."""
    images, _, masks = scenes(4 if ctx.quick else 128, seed=1000)
    shares = []
    for image, mask in zip(images, masks):
        size = torch.from_numpy(modulations(model, image[None])[1].modulator)
        inside = nn.functional.adaptive_avg_pool2d(mask[None].float(), (size.shape[0], size.shape[1]))[0]
        weight = inside if where == "inside" else 1 - inside
        shares.append(float((size * weight).sum() / weight.sum() / size.mean()))
    return statistics.fmean(shares)


def pictures(model: nn.Module, ctx: Context) -> None:
    """Draw modulators and gates for photographs into files that are kept."""
    for name in ("china",) if ctx.quick else ("china", "flower"):
        pixels = torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        size = (48, 48) if ctx.quick else (128, 128)
        pixels = nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        seen = ((pixels[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy()
        svg = modulation_picture(model, pixels, seen)
        (ctx.folder / f"modulators-{name}.svg").write_text(standalone(svg), encoding="utf-8")
