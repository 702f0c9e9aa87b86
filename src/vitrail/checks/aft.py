"""AFT: do images need fewer bits than with softmax attention, in memory that grows as the sequence does?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Context, Verdict, beyond_rounding, bounded, paired
from vitrail.data.preprocess import Preprocess
from vitrail.evaluate.memory import training_peak
from vitrail.layers.aft import AFTConv, AFTFull, AFTLocal, AFTSimple
from vitrail.layers.attention import attention
from vitrail.models import create_model
from vitrail.models.aft import PixelAFT

PUBLISHED = {
    "aft_full_tiny": 6.3,
    "aft_full_small": 22.6,
    "aft_conv_tiny_32_11": 5.4,
    "aft_conv_tiny_192_11": 5.9,
    "aft_conv_small_16_11": 20.3,
    "aft_conv_small_384_11": 22.5,
    "aft_conv_small_384_15": 23.0,
    "aft_conv_base_32_25": 79.7,
}
"""Millions of parameters, from tables 7 and 8."""
ARMS = ("local", "simple", "softmax")
HEADS = 3
"""Of softmax attention; the paper's have 128 channels each, these 16."""


@dataclass(frozen=True)
class Size:
    """Of the autoregressive nets: sides in pixels, width, blocks, steps, images of a step, of training and held out."""

    side: int = 14
    dim: int = 48
    depth: int = 3
    steps: int = 300
    batch: int = 16
    train: int = 6_400
    test: int = 1_000
    lengths: tuple[int, ...] = (1_024, 2_048, 4_096)


QUICK = Size(side=8, dim=24, depth=1, steps=4, batch=8, train=32, test=32, lengths=(512, 1_024))
LEVELS = 16
"""Values of a pixel."""
RANK = 8


class SoftmaxAttention(nn.Module):
    """Causal attention in the place of an AFT layer.

    Args:
        dim: C.
        heads: of it.
        form: ``"plain"``, which has all scores at once, or ``"fused"``.
    """

    def __init__(self, dim: int, heads: int, form: str = "plain") -> None:
        super().__init__()
        self.heads, self.form = heads, form
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return (B, T, C)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attention(query, key, value, is_causal=True, form=self.form)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def run(ctx: Context) -> Verdict:
    """Train three autoregressive nets at equal sizes and steps; weigh their layers, and try keys of +-1e4."""
    size = QUICK if ctx.quick else Size()
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    preprocess = Preprocess((size.side, size.side), resize="squash", mean=(0.0,) * 3, std=(1.0,) * 3)
    seen = greys(ctx.training_images(index, preprocess, most=size.train)())
    unseen = greys(ctx.held_out(index, preprocess, most=size.test)())
    bits: dict[str, list[float]] = {name: [] for name in ARMS}
    parameters = {}
    for seed in ctx.seeds:
        for name in ARMS:
            ctx.tell(f"{name}, seed {seed}")
            torch.manual_seed(seed)
            net = pixel_net(name, size)
            train(net, seen, seed, size)
            bits[name].append(held_out_bits(net, unseen))
            parameters[name] = count_parameters(net)
    quantity = "bits for each pixel of held-out images"
    memory = memory_rows(size.lengths)
    sizes = [published(name) for name in (["aft_conv_tiny_32_11"] if ctx.quick else PUBLISHED)]
    ours = [row for row in memory if row["layer"].startswith("AFT")]
    return Verdict(
        [
            paired(
                "an autoregressive net with AFT-local predicts images better than one with softmax attention of the "
                "same size, after as many steps",
                quantity,
                {name: bits[name] for name in ("local", "softmax")},
                ours="local",
                against="softmax",
                higher_is_better=False,
            ),
            paired(
                "with local position biases it predicts them better than without any",
                quantity,
                {name: bits[name] for name in ("local", "simple")},
                ours="local",
                against="simple",
                higher_is_better=False,
            ),
            bounded(
                "twice the length takes at most twice the memory, a tenth aside",
                "largest ratio of the peaks of a forward and backward pass, over the causal layers of AFT",
                max(row["by_length"] for row in ours),
                at_most=2.2,
            ),
            bounded(
                "twice the width takes at most twice the memory, a tenth aside",
                "largest ratio of the peaks of a forward and backward pass, over the causal layers of AFT",
                max(row["by_width"] for row in ours),
                at_most=2.2,
            ),
            bounded(
                "keys of +-1e4 give the right answer",
                "largest difference of outputs in single from those in double precision, as a share of the largest",
                large_key_error(),
                at_most=1e-3,
            ),
            bounded(
                "the nets have the published parameters",
                "largest deviation beyond the last digit, as a share",
                max(row["off"] for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(seen):,} grey images of {size.side} pixels a side with {LEVELS} values; {size.steps} steps of "
            f"{size.batch}. The paper has colours, 32 pixels, 256 values and 200 epochs of CIFAR10; that is not shown, "
            "nor are text and ImageNet.",
            "All nets have as many parameters: feed-forward layers are wider where there are no position biases.",
            "Memory is that of tensors, counted as they come and go; 'fused' attention does not write its scores.",
        ],
        tables={
            "parameters": [{"net": name, "parameters": count} for name, count in parameters.items()],
            "memory of a layer": memory,
            "published sizes": sizes,
        },
    )


# ---- bits ------------------------------------------------------------------------------------------------------------


def greys(batches: Any) -> Tensor:
    """Return images as whole numbers from 0 to below ``LEVELS``, (N, 1, H, W)."""
    found = [(images[:, :1] * 255).round().long() * LEVELS // 256 for images, _ in batches]
    return torch.cat(found)


def pixel_net(name: str, size: Size) -> PixelAFT:
    """Return an autoregressive net with AFT-local, with AFT-simple, or with softmax attention: all of one size."""
    length = size.side**2
    # As far as the 256 sub-pixels of the paper reach: 2.7 rows.
    window = round(256 / 96 * size.side)
    biases = 0 if name == "local" else 2 * length * RANK
    ratio = 4 + biases / (2 * size.dim + 1) / size.dim
    net = PixelAFT(
        img_size=size.side,
        in_chans=1,
        levels=LEVELS,
        embed_dim=size.dim,
        depth=size.depth,
        mixer="local" if name == "local" else "simple",
        window=window,
        rank=RANK,
        mlp_ratio=ratio,
        drop_rate=0.0,
    )
    if name == "softmax":
        for block in net.blocks:
            layer = SoftmaxAttention(size.dim, HEADS)
            for part in (layer.qkv, layer.proj):
                trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
            block.mixer = layer
    return net


def train(net: PixelAFT, images: Tensor, seed: int, size: Size) -> None:
    """Train a net with the paper's optimiser on batches drawn with this seed."""
    matrices = [value for name, value in net.named_parameters() if value.ndim > 1 and decays(name)]
    decayed = {id(value) for value in matrices}
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [value for value in net.parameters() if id(value) not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, foreach=True)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=size.steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(size.steps):
        chosen = torch.randint(len(images), (size.batch,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        net.bits_per_dim(images[chosen]).mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        pace.step()


def decays(name: str) -> bool:
    """Return whether a matrix of this name is one of a linear layer."""
    return name not in ("embed.weight", "pos_embed") and ".bias." not in name


@torch.inference_mode()
def held_out_bits(net: PixelAFT, images: Tensor) -> float:
    """Return the mean of the bits for each pixel."""
    net.eval()
    return float(torch.cat([net.bits_per_dim(batch) for batch in images.split(100)]).mean())


# ---- memory and precision --------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "AFT-simple": lambda dim, length: AFTSimple(dim, causal=True),
    "AFT-local": lambda dim, length: AFTLocal(dim, length, window=256, causal=True),
    "AFT-full": lambda dim, length: AFTFull(dim, length, causal=True),
    "AFT-conv": lambda dim, length: AFTConv(dim, 8, (1, 255), causal=True),
    "softmax, plain": lambda dim, length: SoftmaxAttention(dim, 1),
    "softmax, fused": lambda dim, length: SoftmaxAttention(dim, 1, "fused"),
}


def peak(layer: str, dim: int, length: int) -> int:
    """Return the peak of a forward and backward pass of a layer on one sequence, in bytes."""
    torch.manual_seed(0)
    return training_peak(LAYERS[layer](dim, length), torch.randn(1, length, dim))


def memory_rows(lengths: tuple[int, ...], dim: int = 64) -> list[dict[str, Any]]:
    """Return the peak of each layer by length, and how much the last doubling of it, and one of the width, raise it."""
    rows = []
    for layer in LAYERS:
        peaks = [peak(layer, dim, length) for length in lengths]
        wider = peak(layer, 2 * dim, lengths[0]) / peaks[0]
        megabytes = {f"mb_at_{length}": value / 1e6 for length, value in zip(lengths, peaks, strict=True)}
        rows.append({"layer": layer, **megabytes, "by_length": peaks[-1] / peaks[-2], "by_width": wider})
    return rows


@torch.no_grad()
def large_key_error(length: int = 40, dim: int = 12) -> float:
    """Return how far layers with keys of about +-1e4 are from the same in double precision."""
    errors = []
    for causal in (False, True):
        for build in (
            lambda causal: AFTSimple(dim, causal=causal),
            lambda causal: AFTFull(dim, length, causal=causal),
            lambda causal: AFTLocal(dim, length, window=5, causal=causal),
            lambda causal: AFTConv(dim, 3, (3, 5), causal=causal),
        ):
            torch.manual_seed(0)
            layer = build(causal)
            query, keys, values = (torch.randn(2, length, width) for width in layer.parts)
            fixed = torch.cat([query, 1e4 * keys, values], -1)
            found = []
            for kind in (torch.float32, torch.float64):
                layer.to(kind)
                layer.qkv = Fixed(fixed.to(kind))  # type: ignore[assignment]
                found.append(layer(query.to(kind), (5, length // 5)).double())
            errors.append(float((found[0] - found[1]).abs().max() / found[1].abs().max()))
    return float(np.max(errors))


class Fixed(nn.Module):
    """Gives what it was built with."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """Return the value."""
        return self.value


def published(name: str) -> dict[str, Any]:
    """Count parameters and multiply-adds of a published net."""
    with torch.device("meta"):
        model = create_model(name, num_classes=1000)
        side = 384 if name == "aft_conv_base_32_25" else 224
        madds = count_flops(model, (side, side)) / 1e9
    found = count_parameters(model) / 1e6
    return {
        "net": name,
        "params_m": found,
        "published_params_m": PUBLISHED[name],
        "off": beyond_rounding(found, PUBLISHED[name], 0.1),
        "madds_g": madds,
    }
