"""Iwin: does one block reach every place, and do interleaved windows do better, also on larger images, than others?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_row
from vitrail.data.batches import Batches
from vitrail.data.index import Index
from vitrail.edits.surgery import Edit
from vitrail.errors import InputError
from vitrail.layers.interleaved import InterleavedAttention
from vitrail.layers.windows import to_windows
from vitrail.models import create_model
from vitrail.models.iwin import Iwin, iwin_video_small, iwin_video_tiny
from vitrail.models.staged import Block

NET: dict[str, Any] = {"depths": (2, 2, 2, 1)}
PASSES = 3_200
"""Of images, for each arm: minutes for twelve nets on two cores."""
TUNED, RATE, BATCH = 640, 3e-4, 32
"""Images of twice the side that an arm is tuned with, at which learning rate, and how many in a step."""
MAPS = (56, 28, 14)
"""Sides of the maps of the published stages that have several windows, of 7 places a side."""
PUBLISHED: dict[str, tuple[float, float, float, int]] = {
    "iwin_tiny": (30.2, 4.7, 0.1, 224),
    "iwin_small": (51.6, 9.0, 0.1, 224),
    "iwin_small_384": (51.6, 27.7, 0.1, 384),
    "iwin_small_512": (51.6, 52.0, 0.1, 512),
    "iwin_small_1024": (51.6, 207.9, 0.1, 1024),
    "iwin_base": (91.2, 15.9, 0.1, 224),
    "iwin_base_384": (91.2, 48.3, 0.1, 384),
    "iwin_base_512": (91.3, 89.5, 0.1, 512),
    "iwin_base_1024": (91.3, 358.2, 0.1, 1024),
    "iwin_large": (204.3, 35.4, 0.1, 224),
    "iwin_large_384": (204.3, 106.6, 0.1, 384),
    "iwin_video_tiny": (29.8, 74, 1, 224),
    "iwin_video_small": (51.1, 140, 1, 224),
}
"""Millions of parameters, billions of multiply-adds, their last digit, and pixels, from tables of the authors."""
CLIPS: dict[str, Callable[..., nn.Module]] = {
    "iwin_video_tiny": iwin_video_tiny,
    "iwin_video_small": iwin_video_small,
}


def run(ctx: Context) -> Verdict:
    """Measure what blocks reach, train four arrangements, tune them on larger images; count the published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.02 if ctx.quick else PASSES / len(index.rows("train"))
    shifted = {"name": "vitrail.checks.iwin:shifted_windows", "options": {"side": 16 if ctx.quick else 28}}
    # Nets of one form and, but for the convolutions and Swin's relative positions, of one size.
    own: dict[str, dict[str, Any]] = {
        "interleaved": {"model.options": NET},
        "neighbours": {"model.options": NET, "model.edits": [{"name": "vitrail.checks.iwin:windows_of_neighbours"}]},
        "no convolution": {"model.options": {**NET, "conv": (False,) * 4}},
        "shifted": {"model.options": NET, "model.edits": [shifted]},
    }
    common = {"model.name": "iwin_nano", "train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, **settings}) for seed in ctx.seeds]
        for name, settings in own.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    larger: dict[str, list[float]] = {}
    rows = []
    for name in ("interleaved", "shifted"):
        for seed, arm in zip(ctx.seeds, arms[name], strict=True):
            ctx.tell(f"{name} on larger images, seed {seed}")
            before, after = on_larger_images(ctx, index, arm, seed)
            larger.setdefault(name, []).append(after)
            rows.append({"windows": name, "seed": seed, "trained_size": arm.top1, "twice": before, "tuned": after})
    reach = reach_of_blocks(MAPS[2:] if ctx.quick else MAPS)
    sizes = published_sizes(["iwin_tiny"] if ctx.quick else list(PUBLISHED))
    quantity = "top-1 on held-out images"
    share = {(row["windows"], row["map"], row["blocks"]): row["reach"] for row in reach}
    maps = {side for _, side, _ in share}
    return Verdict(
        [
            bounded(
                "after one block every place of a map depends on every other",
                "largest share of the places that an output of one block does not depend on",
                max(1 - share["interleaved", side, 1] for side in maps),
                at_most=0,
            ),
            bounded(
                "two blocks reach at least as many places as two blocks of Swin",
                "share reached by shifted windows less the share reached by interleaved ones, where it is largest",
                max(share["shifted", side, 2] - share["interleaved", side, 2] for side in maps),
                at_most=0,
            ),
            paired(
                "interleaved windows are more accurate than windows of neighbours beside the same convolutions",
                quantity,
                top1,
                ours="interleaved",
                against="neighbours",
            ),
            paired(
                "with the convolution beside the attention a net is more accurate than without",
                quantity,
                top1,
                ours="interleaved",
                against="no convolution",
            ),
            paired(
                "interleaved windows are more accurate than shifted ones with relative positions, in the same net",
                quantity,
                top1,
                ours="interleaved",
                against="shifted",
            ),
            paired(
                "tuned briefly on images of twice the side, interleaved windows are more accurate than shifted ones",
                "top-1 on held-out images of twice the side",
                larger,
                ours="interleaved",
                against="shifted",
            ),
            bounded(
                "the nets have the published parameters and multiply-adds",
                "largest deviation beyond the last digit of the published figure, as a share of it",
                max(max(row["params_off"], row["madds_off"]) for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm; {TUNED:,} images of "
            "twice the side to tune with in full.",
            "An output of one block is the sum of what its window says and what its eight neighbours say: that is what "
            "is counted, on maps of the published stages, from the corners and from the middle.",
            "On images of twice the side windows are of twice the side, as published of both; Swin's relative "
            "positions are interpolated.",
            "'shifted' has the blocks of Swin, with their relative positions, in the same net; 'neighbours' has the "
            "same attention and convolutions, and windows of places that stand together.",
            "The published multiply-adds of nets for clips are without the two products of attention, and counted so.",
            "Nets of under a million parameters on small images: ImageNet, ADE20K and Kinetics are not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "reach of blocks": reach,
            "larger images": rows,
            "published sizes": sizes,
        },
    )


# ---- other windows in the same net -----------------------------------------------------------------------------------


class Neighbours(nn.Module):
    """The same attention and convolution, in windows of neighbours: it reorders what the attention takes apart."""

    def __init__(self, attention: InterleavedAttention) -> None:
        super().__init__()
        self.conv, attention.conv = attention.conv, None
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        height, width = x.shape[1:3]
        side = cast(int, self.attention.window)
        tall, wide = min(side, height), min(side, width)
        rows, columns = -(-height // tall), -(-width // wide)
        windows = to_windows(x, (tall, wide)).unflatten(0, (-1, rows, columns))  # (B, rows, columns, tall, wide, C)
        apart = windows.permute(0, 3, 1, 4, 2, 5).reshape(-1, tall * rows, wide * columns, x.shape[-1])
        found = self.attention(apart).unflatten(2, (wide, columns)).unflatten(1, (tall, rows))
        y = found.transpose(1, 2).transpose(3, 4).flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return y if self.conv is None else y + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def windows_of_neighbours() -> Edit:
    """Put windows of places that stand together in the place of Iwin's, with all else as it is."""

    def edit(model: nn.Module) -> nn.Module:
        for block in _blocks(model):
            block.attn = Neighbours(_attention(block))
        return model

    return edit


def shifted_windows(*, side: int) -> Edit:
    """Put timm's Swin blocks, with windows and shifted windows in turn, in the place of Iwin's.

    Args:
        side: of the images, in pixels: these blocks are built for maps of one size.
    """

    def edit(model: nn.Module) -> nn.Module:
        _blocks(model)
        net = cast(Iwin, model)
        for stage, info in zip(net.stages, net.feature_info, strict=True):
            places, blocks = -(-side // info["reduction"]), cast(nn.ModuleList, stage.blocks)
            for number, block in enumerate(blocks):
                blocks[number] = swin_block(cast(Block, block), places, shifted=bool(number % 2))
        return model

    return edit


def swin_block(block: Block, places: int, *, shifted: bool) -> SwinTransformerBlock:
    """Return a block of Swin as wide as one of Iwin, begun alike, for maps of ``places`` x ``places``."""
    attention = _attention(block)
    dim, window = attention.proj.out_features, cast(int, attention.window)
    hidden = cast(nn.Linear, block.mlp.fc1).out_features
    new = SwinTransformerBlock(
        dim,
        (places, places),
        num_heads=attention.num_heads,
        window_size=window,
        shift_size=window // 2 if shifted else 0,
        mlp_ratio=hidden / dim,
        dynamic_mask=True,
    )
    for module in new.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return new


def _blocks(model: nn.Module) -> list[Block]:
    if not isinstance(model, Iwin):
        raise InputError(f"other windows are for an Iwin net, and this is a {type(model).__name__}")
    return [module for module in model.modules() if isinstance(module, Block)]


def _attention(block: Block) -> InterleavedAttention:
    return cast(InterleavedAttention, block.attn)


# ---- larger images ---------------------------------------------------------------------------------------------------


def on_larger_images(ctx: Context, index: Index, arm: Arm, seed: int) -> tuple[float, float]:
    """Return the top-1 of a trained arm on held-out images of twice the side, as it is and tuned on some more."""
    height, width = arm.preprocess.size
    preprocess = replace(arm.preprocess, size=(2 * height, 2 * width))
    held_out = ctx.held_out(index, preprocess, most=32 if ctx.quick else 2_000)
    model = copy.deepcopy(arm.model)
    for module in model.modules():
        if isinstance(module, InterleavedAttention):
            module.window = 2 * cast(int, module.window)
        elif isinstance(module, SwinTransformerBlock):
            (tall, wide), (h, w) = cast(tuple[int, int], module.input_resolution), module.window_size
            module.set_input_size((2 * tall, 2 * wide), (2 * h, 2 * w))
    before = accuracy(model, held_out)
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, foreach=True)
    for images, targets in ctx.training_images(index, preprocess, most=BATCH if ctx.quick else TUNED)():
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    return before, accuracy(model.eval(), held_out)


@torch.no_grad()
def accuracy(model: nn.Module, data: Batches) -> float:
    """Return the share of images answered rightly."""
    hits = [model(images).argmax(1) == targets for images, targets in data()]
    return float(torch.cat(hits).float().mean())


# ---- counts ----------------------------------------------------------------------------------------------------------


def reach_of_blocks(maps: tuple[int, ...], blocks: int = 3, window: int = 7) -> list[dict[str, Any]]:
    """Return the share of a map's places that an output depends on, where it is smallest, by number of blocks."""
    torch.manual_seed(0)
    rows = []
    net: dict[str, Any] = {"dim": 4, "depths": (blocks, 1, 1, 1), "num_heads": (1,) * 4, "window": window}
    for name in ("interleaved", "shifted"):
        for side in maps:
            model = create_model("iwin_nano", num_classes=0, **net)
            if name == "shifted":
                shifted_windows(side=2 * side)(model)
            stage = cast(nn.ModuleList, cast(Iwin, model.eval()).stages[0].blocks)
            x = torch.randn(1, side, side, 4, requires_grad=True)
            y: Tensor = x
            for number, block in enumerate(stage, 1):
                y, shares = block(y), []
                for place in (0, side // 2, side - 1):
                    (gradient,) = torch.autograd.grad(y[0, place, place].sum(), x, retain_graph=True)
                    shares.append(float(gradient.ne(0).any(-1).float().mean()))
                rows.append({"windows": name, "map": side, "blocks": number, "reach": min(shares)})
    return rows


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net, those for clips without the products of attention."""
    rows = []
    for name in names:
        params, flops, digit, side = PUBLISHED[name]
        with torch.device("meta"):
            if name in CLIPS:
                model = CLIPS[name]().eval()
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    model(torch.zeros(1, 3, 32, side, side))
                counts = counter.get_flop_counts()["Global"]
                madds = sum(value for operator, value in counts.items() if not _of_attention(str(operator))) / 2
            else:
                model = create_model(name, num_classes=1000)
                madds = count_flops(model, (side, side))
        found = count_parameters(model) / 1e6, madds / 1e9
        rows.append(size_row(name, found, (params, flops), (0.1, digit)))
    return rows


def _of_attention(operator: str) -> bool:
    # On the meta device attention is taken apart into products of batches, which no other layer has.
    return "bmm" in operator or "scaled_dot_product" in operator
