"""XCiT: is attention between channels linear in the tokens, and does a net of it bear other resolutions?

Softmax attention as it is written holds a matrix of all pairs of tokens; fused, it never does, and its memory is linear
too. Both are compared, at one width, as blocks in training; then nets of both, alike in all else, are trained at one
size of image and asked at others. Last, what DINO taught a small net without labels is probed by a linear classifier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.layers import Attention
from timm.models.xcit import XCA
from torch import Tensor, nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.data.batches import Batches
from vitrail.data.index import Index
from vitrail.edits.surgery import Edit, replace_modules
from vitrail.models import create_model

WIDTH, HEADS = 64, 4
TOKENS = (256, 1024, 4096)
"""Squares of 16, 32 and 64 places; the growth is from the second to the third."""
SIZES = (20, 24, 36, 44)
"""Sides of images at which nets are asked that were trained at 28 pixels."""
SEEN, CROPPED = 2_000, 2_000
"""Images that each net learns from, with labels and without."""
DINO: dict[str, Any] = {
    "out_dim": 1024,
    "hidden_dim": 256,
    "bottleneck_dim": 64,
    "local_crops": 4,
    "momentum": 0.99,
    "freeze_last_layer": 0.0,
}
"""As published but for the head's size, half the crops, and a teacher that follows in as few steps as there are."""
PROBED = 2_000
"""Images of which features are taken, as many to learn from as to ask."""


def run(ctx: Context) -> Verdict:
    """Measure attention against tokens, train nets of both kinds, and probe one trained without labels."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    images = len(index.rows("train"))
    tokens = (16, 64, 256) if ctx.quick else TOKENS
    seen, cropped = (64, 32) if ctx.quick else (SEEN, CROPPED)
    costs = [row for count in tokens for row in cost(count, 1 if ctx.quick else 5)]
    power: dict[str, list[float]] = {name: [] for name in KINDS}
    kept: dict[str, list[float]] = {"channels": [], "tokens": []}
    learned: dict[str, list[float]] = {"DINO": [], "untrained": []}
    arms: dict[str, Arm] = {}
    sides: list[dict[str, Any]] = []
    for seed in ctx.seeds:
        times = {count: seconds(count, 1 if ctx.quick else 7, seed) for count in tokens[1:]}
        for name, values in power.items():
            values.append(math.log(times[tokens[2]][name] / times[tokens[1]][name]) / math.log(tokens[2] / tokens[1]))
        for name, values in kept.items():
            edits = [{"name": "vitrail.checks.xcit:softmax_attention"}] if name == "tokens" else []
            settings = {"model.name": "xcit_nano", "model.edits": edits, "train.batch_size": 32}
            arm = ctx.train(index, name, seed, {**settings, "train.epochs": seen / images})
            at = {size: accuracy(arm, ctx, index, size) for size in (*((20,) if ctx.quick else SIZES), 28)}
            values.append(sum(top1 for size, top1 in at.items() if size != 28) / (len(at) - 1) / max(at[28], 1e-9))
            arms.setdefault(name, arm)
            sides.append({"arm": name, "seed": seed, **{f"top1 at {size}": top1 for size, top1 in at.items()}})
        own = {"model.name": "xcit_nano", "model.options": {"patch_size": 8}, "train.batch_size": 32}
        method = {"method.name": "xcit:DINO", "method.options": DINO, "train.epochs": cropped / images}
        arm = ctx.train(index, "dino", seed, {**own, **method})
        torch.manual_seed(seed)
        begun = create_model("xcit_nano", num_classes=len(index.classes), patch_size=8)
        for name, model in (("DINO", arm.model), ("untrained", begun)):
            most = 64 if ctx.quick else PROBED
            train = ctx.training_images(index, arm.preprocess, most=most)
            test = ctx.held_out(index, arm.preprocess, most=most)
            learned[name].append(probe(model, train, test))
    return Verdict(
        [
            paired(
                "The time of cross-covariance attention grows with the tokens to a lower power than that of softmax "
                "attention, fused.",
                f"power of the tokens, from {tokens[1]} to {tokens[2]}, forward and backward",
                power,
                ours="channels",
                against="tokens, fused",
                higher_is_better=False,
            ),
            bounded(
                "The multiply-adds of cross-covariance attention are linear in the tokens.",
                "power of the tokens",
                growth(costs, "channels", "madds"),
                at_most=1.01,
            ),
            bounded(
                "What cross-covariance attention keeps for the backward pass is linear in the tokens.",
                "power of the tokens",
                growth(costs, "channels", "bytes kept"),
                at_most=1.01,
            ),
            paired(
                "A net with cross-covariance attention keeps more of its accuracy at other resolutions than the same "
                "net with softmax attention.",
                "accuracy at other sizes over that at the size of training",
                kept,
                ours="channels",
                against="tokens",
            ),
            paired(
                "A linear probe finds more in what DINO taught a net without labels than in the net it began with.",
                "top-1 accuracy of a linear classifier of features, held-out images",
                learned,
                ours="DINO",
                against="untrained",
            ),
        ],
        notes=[
            f"Attention of {WIDTH} channels in {HEADS} heads, of one image; times are the fastest of several, of one "
            "thread's processor time, in turns.",
            f"Fused, softmax attention keeps to the power {growth(costs, 'tokens, fused', 'bytes kept'):.2f} of the "
            f"tokens, written out to {growth(costs, 'tokens', 'bytes kept'):.2f}.",
            f"{images:,} training images; each net sees {seen:,} of them, DINO's {cropped:,}, in crops.",
            "Both nets have the same convolutions, by which neighbours meet; ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of attention": costs,
            "other resolutions": sides,
            "cost of the nets": [arm_cost(name, arm) for name, arm in arms.items()],
        },
    )


# ---- attention -------------------------------------------------------------------------------------------------------


def _tokens(fused: bool) -> nn.Module:
    attention: Any = Attention(WIDTH, HEADS, qkv_bias=True)
    attention.fused_attn = fused
    return attention


KINDS: dict[str, Callable[[], nn.Module]] = {
    "channels": lambda: XCA(WIDTH, HEADS, qkv_bias=True),
    "tokens": lambda: _tokens(fused=False),
    "tokens, fused": lambda: _tokens(fused=True),
}


def seconds(tokens: int, rounds: int, seed: int) -> dict[str, float]:
    """Return the processor seconds of a forward and a backward pass of each kind, the least of all rounds."""
    torch.manual_seed(seed)
    layers = {name: build() for name, build in KINDS.items()}
    x = torch.randn(1, tokens, WIDTH, requires_grad=True)
    found = dict.fromkeys(layers, math.inf)
    for _ in range(rounds + 1):
        for name, layer in layers.items():
            begun = time.process_time()
            layer(x).sum().backward()
            found[name] = min(found[name], time.process_time() - begun)
    return {name: max(value, 1e-6) for name, value in found.items()}


def cost(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each kind: its time, its multiply-adds and the bytes that it keeps for the backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    times, rows = seconds(tokens, rounds, seed=0), []
    for name, build in KINDS.items():
        layer = build()
        kept: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in layer.parameters()}

        def keep(value: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        x = torch.randn(1, tokens, WIDTH, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            y = layer(x)
        held = sum(size for place, size in kept.items() if place not in own)
        del y
        with FlopCounterMode(display=False) as counter:
            # Fused attention, which is not counted on every device, takes what it takes written out.
            (_tokens(fused=False) if name == "tokens, fused" else layer)(x)
        madds = counter.get_total_flops() // 2
        rows.append({"attention": name, "tokens": tokens, "ms": 1e3 * times[name], "madds": madds, "bytes kept": held})
    return rows


def growth(rows: list[dict[str, Any]], name: str, quantity: str) -> float:
    """Return the power of the tokens to which a quantity grows, from the middle number of tokens to the largest."""
    _, small, large = (row for row in rows if row["attention"] == name)
    return math.log(large[quantity] / small[quantity]) / math.log(large["tokens"] / small["tokens"])


def softmax_attention() -> Edit:
    """Put softmax attention between tokens, of as many heads, in the place of each cross-covariance attention."""

    def build(module: Any) -> nn.Module:
        return Attention(module.qkv.in_features, module.num_heads, qkv_bias=module.qkv.bias is not None)

    def edit(model: nn.Module) -> nn.Module:
        return replace_modules(
            model, lambda _name, module: isinstance(module, XCA), build, what="cross-covariance attention"
        )

    return edit


# ---- nets ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def accuracy(arm: Arm, ctx: Context, index: Index, size: int) -> float:
    """Return the share of held-out images that are answered rightly at a size."""
    right = total = 0
    most = 64 if ctx.quick else 1_000
    for images, targets in ctx.held_out(index, replace(arm.preprocess, size=(size, size)), most=most)():
        right += int((arm.model(images).argmax(1) == targets).sum())
        total += len(targets)
    return right / total


def probe(model: nn.Module, train: Batches, test: Batches) -> float:
    """Return the accuracy of a linear classifier of a net's features."""
    (x, y), (features, wanted) = (_features(model, batches) for batches in (train, test))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    return float(classifier.fit(x, y).score(features, wanted))


@torch.inference_mode()
def _features(model: Any, batches: Batches) -> tuple[Any, Any]:
    model.eval()
    found = [(model.forward_head(model.forward_features(x), pre_logits=True), y) for x, y in batches()]
    return torch.cat([x for x, _ in found]).numpy(), torch.cat([y for _, y in found]).numpy()
