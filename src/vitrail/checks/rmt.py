"""RMT: does decay with the Manhattan distance help, and is its decomposition exact where it should be, and cheap?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, bounded, paired
from vitrail.models.rmt import axis_decay, decomposed_attention, head_decays, manhattan_attention, manhattan_decay

ARMS: dict[str, dict[str, Any]] = {
    "decay": {"model.name": "rmt_nano"},
    "no decay": {"model.name": "rmt_nano", "model.options": {"decay": False}},
    "residual net": {"model.name": "small_resnet_nano"},
}
HEADS, HEAD_DIM = 4, 16


def run(ctx: Context) -> Verdict:
    """Train with and without decay and a residual net, at equal numbers of image passes; compare the two forms."""
    # A fifth of an epoch of Fashion-MNIST, 12,000 passes, keeps six transformers within minutes on two cores.
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.1 if ctx.quick else 12_000 / len(index.rows("train"))
    arms = {
        name: [ctx.train(index, name.replace(" ", "-"), seed, {**own, "train.epochs": epochs}) for seed in ctx.seeds]
        for name, own in ARMS.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    separable, general = form_differences()
    curve = cost_curve((7, 14) if ctx.quick else (7, 14, 28, 56))
    off = max(abs(row["share"] / (2 / row["side"]) - 1) for row in curve)
    quantity = "top-1 on held-out images"
    return Verdict(
        [
            paired(
                "attention that decays with the Manhattan distance is more accurate than attention without decay",
                quantity,
                top1,
                ours="decay",
                against="no decay",
            ),
            bounded(
                "attention along rows and columns equals attention over the plane where the scores are a sum over axes",
                "largest difference of the outputs, of order 1",
                separable,
                at_most=1e-5,
            ),
            bounded(
                "attention along rows and columns takes (H + W) / HW of the multiply-adds of attention over the plane",
                "largest relative deviation from that share",
                off,
                at_most=0.01,
            ),
            paired(
                "RMT is more accurate than a residual net after as many image passes",
                quantity,
                top1,
                ours="decay",
                against="residual net",
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            f"With scores that are no sum over axes the two forms differ by up to {general:.2g}.",
            "Nets of under a million parameters on small images: ImageNet accuracy is not shown.",
        ],
        tables={
            "cost of the arms": [_cost(name, trained[0]) for name, trained in arms.items()],
            "cost of attention": curve,
        },
    )


def form_differences(height: int = 7, width: int = 10) -> tuple[float, float]:
    """Return how far the two forms of attention are apart for scores that are a sum over axes, and for any scores."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, HEADS, HEAD_DIM // 2, generator=draw, dtype=torch.float64)

    def by_axis() -> Tensor:
        """Half of the channels depend on the row alone, the others on the column alone."""
        rows = normal(2, height, 1).expand(-1, -1, width, -1, -1)
        return torch.cat((rows, normal(2, 1, width).expand(-1, height, -1, -1, -1)), dim=-1)

    def anyhow() -> Tensor:
        return torch.cat((normal(2, height, width), normal(2, height, width)), dim=-1)

    log_gamma = head_decays(HEADS, 2, 4)
    value = anyhow()
    found = []
    for make in (by_axis, anyhow):
        query, key = make(), make()
        plane = manhattan_attention(query, key, value, manhattan_decay(height, width, log_gamma))
        axes = decomposed_attention(query, key, value, axis_decay(height, log_gamma), axis_decay(width, log_gamma))
        found.append(float((plane - axes).abs().max()))
    return found[0], found[1]


def cost_curve(sides: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return multiply-adds and milliseconds of both forms of attention for one image of ``side`` x ``side`` places."""
    rows = []
    for side in sides:
        log_gamma = head_decays(HEADS, 2, 4)
        axis, plane = axis_decay(side, log_gamma), manhattan_decay(side, side, log_gamma)
        tokens = torch.randn(1, side, side, HEADS, HEAD_DIM)
        forms: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
            "plane": (manhattan_attention, (plane,)),
            "axes": (decomposed_attention, (axis, axis)),
        }
        row: dict[str, Any] = {"side": side}
        for name, (form, decays) in forms.items():
            row[f"{name}_madds"] = _madds(form, tokens, decays)
            row[f"{name}_ms"] = _milliseconds(form, tokens, decays)
        rows.append({**row, "share": row["axes_madds"] / row["plane_madds"]})
    return rows


def _madds(form: Callable[..., Tensor], tokens: Tensor, decays: tuple[Tensor, ...]) -> int:
    # Fused kernels are not counted on every device; on the meta device they are taken apart.
    tokens, *decays = (tensor.to("meta") for tensor in (tokens, *decays))  # type: ignore[assignment]
    with FlopCounterMode(display=False) as counter:
        form(tokens, tokens, tokens, *decays)
    return counter.get_total_flops() // 2


def _milliseconds(form: Callable[..., Tensor], tokens: Tensor, decays: tuple[Tensor, ...]) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            form(tokens, tokens, tokens, *decays)
            times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def _cost(name: str, arm: Arm) -> dict[str, Any]:
    return {
        "arm": name,
        "parameters": count_parameters(arm.model),
        "madds": count_flops(arm.model, arm.preprocess.size),
    }
