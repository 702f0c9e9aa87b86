"""SVT: is mixing wavelet bands in early stages better than attention or a convolution, and is nothing lost?"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired, size_of, size_row
from vitrail.edits.surgery import Edit
from vitrail.errors import InputError
from vitrail.layers.dtcwt import DualTree
from vitrail.models import create_model
from vitrail.models.svt import SVT, Block, ScatterMixer

NET: dict[str, Any] = {"depths": (2, 2, 2, 1), "scatter_stages": 2}
PASSES = 6_400
"""Of images, for each arm: minutes for nine nets on two cores."""
KERNEL = 11
"""Side of the convolution that takes the place of a wavelet mixer: of 12 to 16 channels in the place of 16, its
weights are as many as those of the gate and the matrices, within a few per cent of the net."""
SIDES = [(1, 1), (2, 3), (7, 9), (14, 14), (28, 28), (45, 61), (56, 56)]
PUBLISHED = {"svt_h_s": (22.0, 3.9), "svt_h_b": (32.8, 6.3), "svt_h_l": (54.0, 12.7)}
"""Millions of parameters and billions of multiply-adds at 224 pixels, from the table of the authors' README."""


def run(ctx: Context) -> Verdict:
    """Train three mixers of early stages at equal numbers of image passes; take maps apart; count published nets."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    net = {**NET, **({"depths": (1, 1, 1, 1)} if ctx.quick else {})}
    own: dict[str, dict[str, Any]] = {
        "wavelets": {"model.options": net},
        "attention": {"model.options": {**net, "scatter_stages": 0}},
        "convolution": {"model.options": net, "model.edits": [{"name": "vitrail.checks.svt:convolutions"}]},
    }
    common = {"model.name": "svt_nano", "train.batch_size": 32, "train.epochs": epochs}
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(index, name, seed, {**common, **settings}) for seed in ctx.seeds]
        for name, settings in own.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    errors = reconstruction()
    sizes = published_sizes(["svt_h_s"] if ctx.quick else list(PUBLISHED), layers=not ctx.quick)
    quantity, deviation = "top-1 on held-out images", "largest deviation beyond the last digit, as a share"
    return Verdict(
        [
            paired(
                "a net whose early stages mix wavelet bands is more accurate than one that attends in all",
                quantity,
                top1,
                ours="wavelets",
                against="attention",
            ),
            paired(
                "mixing wavelet bands is more accurate than a convolution in its place",
                quantity,
                top1,
                ours="wavelets",
                against="convolution",
            ),
            bounded(
                "the transform gives back every map, of odd sides too",
                "largest error over the largest value, float32",
                max(row["error"] for row in errors),
                at_most=1e-5,
            ),
            bounded(
                "the nets have the published parameters",
                deviation,
                max(row["params_off"] for row in sizes),
                at_most=0.01,
            ),
            bounded(
                "the nets have the published multiply-adds",
                deviation,
                max(row["madds_off"] for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm; the first two of four "
            "stages differ.",
            f"'convolution' has a depthwise convolution of {KERNEL} x {KERNEL} and a linear layer in the place of each "
            "wavelet mixer.",
            "The multiply-adds of linear and convolution layers alone, with two stages of wavelets, are the published "
            "ones; the published code has one such stage, and products of matrices besides.",
            "Nets of under a million parameters on small images, without token labels: ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "reconstruction": errors,
            "published sizes": sizes,
        },
    )


class ConvMixer(nn.Module):
    """A depthwise convolution and a linear layer, on maps (B, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, KERNEL, padding=KERNEL // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        return self.proj(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def convolutions() -> Edit:
    """Put a convolution in the place of each wavelet mixer of an SVT net."""

    def edit(model: nn.Module) -> nn.Module:
        if not isinstance(model, SVT):
            raise InputError(f"these convolutions are for an SVT net, and this is a {type(model).__name__}")
        for block in model.modules():
            if isinstance(block, Block) and isinstance(block.mixer, ScatterMixer):
                block.mixer = ConvMixer(len(block.mixer.gate))
        return model

    return edit


def reconstruction() -> list[dict[str, Any]]:
    """Take random maps apart and put them together again, by size."""
    generator, rows = torch.Generator().manual_seed(0), []
    for size in SIDES:
        x = torch.randn(2, *size, 8, generator=generator)
        transform = DualTree(size)
        low, high = transform(x)
        again = transform.inverse(low, high, size)
        rows.append({"height": size[0], "width": size[1], "error": float((again - x).abs().max() / x.abs().max())})
    return rows


def published_sizes(names: list[str], *, layers: bool) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of each published net, and those of its ``layers`` with two wavelet stages."""
    rows = []
    for name in names:
        params, flops = PUBLISHED[name]
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
            net = create_model(name, num_classes=1000, scatter_stages=2).eval() if layers else None
            alone = None if net is None else layer_madds(net) / 1e9
        row = size_row(name, size_of(model), (params, flops), (0.1, 0.1))
        rows.append({**row, "layers_alone_two_stages_g": alone})
    return rows


def layer_madds(model: nn.Module) -> int:
    """Return the multiply-adds of linear and convolution layers alone, for an image of 224 pixels."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * cast(Tensor, module.weight)[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return total
