"""GC ViT: do global queries relate parts of an image that no window has together?

An image has two marks on noise, far apart: one near its left edge, one near its right. Its class says whether they are
of one colour. No linear function of an average over the image tells it, and no window of the net
holds both.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import trunc_normal_
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Context, Verdict, paired
from vitrail.models import create_model
from vitrail.models.gcvit import Block, GCViT

SIDE = 32
NET: dict[str, Any] = {
    "embed_dim": 16,
    "depths": (2, 4),
    "num_heads": (1, 2),
    "window_size": (4, 4),
    "query_levels": (2, 1),
}
"""Maps of 16 and 8 places a side, in windows of 4."""
MARK = 3
"""Pixels of a mark's side."""
IMAGES = 6_400
"""That each arm learns from, each seen once."""
BATCH = 64


def run(ctx: Context) -> Verdict:
    """Train a net with global queries, one with local windows alone and one with shifted windows."""
    count = 2 * BATCH if ctx.quick else IMAGES
    top1: dict[str, list[float]] = {name: [] for name in ("global", "local", "shifted")}
    costs: list[dict[str, Any]] = []
    for seed in ctx.seeds:
        for name, scores in top1.items():
            ctx.tell(f"{name}, seed {seed}")
            model = net(name, seed)
            learn(model, count, seed)
            scores.append(accuracy(model, 64 if ctx.quick else 1024))
            if len(costs) < len(top1):
                madds = count_flops(net(name, seed).to("meta"), (SIDE, SIDE))
                costs.append({"arm": name, "parameters": count_parameters(model), "madds": madds})
    quantity = "top-1 on new images, two classes"
    return Verdict(
        [
            paired(
                "with global queries a net tells whether two distant marks are alike better than with local windows",
                quantity,
                top1,
                ours="global",
                against="local",
            ),
            paired(
                "with global queries it tells it better than with shifted windows",
                quantity,
                top1,
                ours="global",
                against="shifted",
            ),
        ],
        notes=[
            f"{count:,} generated images of {SIDE} pixels, each seen once, the same for every arm; chance is 0.5.",
            "'local' has local queries in every block and no map of queries; 'shifted' has timm's Swin blocks, with "
            "their own relative positions, moved by half a window in every second block; depths and widths are equal.",
            "Squeeze-and-excitation before each stage, which all arms have, sees averages over the image.",
            "A task made for long reach: ImageNet accuracy is not shown.",
        ],
        tables={"cost of the arms": costs},
    )


def net(arm: str, seed: int) -> GCViT:
    """Return the net of an arm, begun from a seed."""
    torch.manual_seed(seed)
    model = cast(GCViT, create_model("gcvit_nano", num_classes=2, **NET))
    if arm != "global":
        for stage, info, window in zip(cast(Any, model.stages), model.feature_info, NET["window_size"]):
            places = SIDE // info["reduction"]
            stage.global_block = nn.Identity()
            stage.blocks = nn.ModuleList(
                other(block, window, places, shift=window // 2 * (number % 2) if arm == "shifted" else None)
                for number, block in enumerate(stage.blocks)
            )
    return model


def other(block: Any, window: int, places: int, shift: int | None) -> nn.Module:
    """Return a block as wide as one of GC ViT, with local queries, or of Swin where windows are to be shifted."""
    dim, heads = block.attn.proj.out_features, block.attn.num_heads
    ratio = block.mlp.fc1.out_features / dim
    new: nn.Module
    if shift is None:
        new = Block(dim, (places, places), heads, window, mlp_ratio=ratio, use_global=False)
    else:
        new = Shifted(SwinTransformerBlock(dim, (places, places), heads, None, window, shift, mlp_ratio=ratio))
    for module in new.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return new


class Shifted(nn.Module):
    """A block of Swin where one of GC ViT was: it leaves the map of queries alone."""

    def __init__(self, block: SwinTransformerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """Return (B, H, W, C)."""
        y: Tensor = self.block(x)
        return y


# ---- images ----------------------------------------------------------------------------------------------------------


def marks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, SIDE, SIDE), and whether their two marks are of one of two colours (N,)."""
    rng = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=rng)
    colours = torch.randint(2, (count, 2), generator=rng)
    rows = torch.randint(SIDE - MARK, (count, 2), generator=rng)
    columns = torch.randint(SIDE // 8, (count, 2), generator=rng)
    columns[:, 1] = SIDE - MARK - columns[:, 1]
    for image, colour, down, across in zip(images, colours.tolist(), rows.tolist(), columns.tolist()):
        for mark in range(2):
            # Red or blue: their sum over the image is the same for both orders of two unlike marks.
            place = image[:, down[mark] : down[mark] + MARK, across[mark] : across[mark] + MARK]
            place[2 * colour[mark]] += 2
    return images, (colours[:, 0] == colours[:, 1]).long()


def learn(model: nn.Module, count: int, seed: int) -> None:
    """Train on images that are each seen once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    steps = count // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2), pct_start=0.2)
    model.train()
    for step in range(steps):
        images, labels = marks(BATCH, 1_000_003 * (seed + 1) + step)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, count: int) -> float:
    """Return the share of new images, the same for all, that are answered rightly."""
    images, labels = marks(count, seed=7)
    with torch.inference_mode():
        return float((model.eval()(images).argmax(1) == labels).float().mean())
