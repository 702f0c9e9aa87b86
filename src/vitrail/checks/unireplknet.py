"""UniRepLKNet: do large kernels see wider than a deep stack of small ones, and does the net forecast time series?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.utils import reparameterize_model
from torch import Tensor

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.data.batches import Batches
from vitrail.evaluate.receptive_field import run as receptive_field
from vitrail.evaluate.shape_bias import run as shape_bias
from vitrail.models import create_model
from vitrail.models.unireplknet_inputs import Forecaster, SeriesImage, series_loss

NETS: dict[str, dict[str, Any]] = {
    "large": {"large_kernel": 13},
    "small": {"large_kernel": 3},
    "deep": {"large_kernel": 3, "dim": 12, "depths": (2, 2, 8, 2)},
}
"""Five blocks with large kernels; the same without; fourteen small blocks with as many parameters as the first."""
PASSES = 5_600
"""Of images, for each arm: minutes for nine nets on two cores."""
HALF = 0.5
"""Of all contributions, whose area is compared."""
LENGTH, HORIZON, PERIODS = 48, 24, (24.0, 9.0, 60.0)
STEPS, BATCH, RATE = 300, 32, 2e-3


def run(ctx: Context) -> Verdict:
    """Train three nets at equal numbers of image passes, look at what they see, and forecast generated series."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.04 if ctx.quick else PASSES / len(index.rows("train"))
    arms: dict[str, list[Arm]] = {name: [] for name in NETS}
    areas: dict[str, list[float]] = {name: [] for name in NETS}
    biases: dict[str, list[float]] = {name: [] for name in NETS}
    rows, off = [], 0.0
    for seed in ctx.seeds:
        for name, options in NETS.items():
            settings = {
                "model.name": "unireplknet_nano",
                "model.options": options,
                "train.batch_size": 32,
                "train.epochs": epochs,
            }
            arm = ctx.train(index, name, seed, settings)
            arms[name].append(arm)
            seen = ctx.held_out(index, arm.preprocess, most=4 if ctx.quick else 200)
            field = receptive_field(arm.model, seen, thresholds=(0.2, 0.3, HALF, 0.99), side=32 if ctx.quick else 112)
            areas[name].append(field.table[2]["area"])
            bias = shape_bias(arm.model, ctx.held_out(index, arm.preprocess, most=32 if ctx.quick else 2_000)).table[-1]
            biases[name].append(0.5 if bias["shape_bias"] is None else bias["shape_bias"])
            rows.append(
                {"arm": name, "seed": seed, **{f"area_{row['share']:.0%}": row["area"] for row in field.table}}
                | {"pairs": bias["pairs"], "shape_bias": bias["shape_bias"]}
            )
            off = max(off, merged_difference(arm, seen))
    errors = forecast_errors(ctx)
    return Verdict(
        [
            paired(
                "few large kernels see wider than a deep stack of small ones with as many parameters",
                "area that holds half of what pixels add to the middle of the last map, as a share of the image",
                areas,
                ours="large",
                against="deep",
            ),
            paired(
                "few large kernels are more accurate than a deep stack of small ones with as many parameters",
                "top-1 on held-out images",
                {name: [arm.top1 for arm in trained] for name, trained in arms.items()},
                ours="large",
                against="deep",
            ),
            bounded(
                "the net of one kernel per block gives what the trained net with its branches gives",
                "largest difference of logits on held-out images, as a share of the largest logit",
                off,
                at_most=1e-5,
            ),
            paired(
                "the net forecasts series of several seasons better than a linear map of the window",
                "mean squared error of unseen windows, in variances of the series",
                errors,
                ours="large",
                against="linear",
                higher_is_better=False,
            ),
            paired(
                "large kernels follow shapes rather than textures more than a deep stack of small ones",
                "shape bias on silhouettes of one held-out image filled with another",
                biases,
                ours="large",
                against="deep",
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm. 'small' is 'large' with "
            "3 x 3 kernels throughout; 'deep' has fourteen blocks in place of five, and as many parameters as 'large'.",
            f"Series are products of seasons of {PERIODS} moments, with noise; all forecasters see as many windows of "
            f"{LENGTH} moments for the next {HORIZON}. The linear map is the least-squares one, of normalised windows.",
            "A shape bias of 0.5 stands where no answer followed either cue; the table has None.",
            "Nets of under a million parameters on small images: published accuracies are not shown.",
        ],
        tables={
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "what they see": rows,
        },
    )


@torch.no_grad()
def merged_difference(arm: Arm, seen: Batches) -> float:
    """Return how far the re-parameterised net's logits are from the net's, as a share of the largest."""
    images, _ = next(seen())
    logits = arm.model(images)
    return float((reparameterize_model(arm.model)(images) - logits).abs().max() / logits.abs().max())


# ---- forecasting -----------------------------------------------------------------------------------------------------


def windows(count: int, draw: np.random.Generator) -> Tensor:
    """Return windows (count, LENGTH + HORIZON, 1) of products of seasons, each with its own phases and strengths."""
    time = np.arange(LENGTH + HORIZON)
    series = np.ones((count, len(time)))
    for period in PERIODS:
        phase, strength = draw.uniform(0, 2 * math.pi, (count, 1)), draw.uniform(0.3, 1.0, (count, 1))
        series = series * (1 + strength * np.sin(2 * math.pi * time / period + phase))
    series += 0.1 * draw.standard_normal(series.shape)
    return torch.from_numpy(series).float()[..., None]


def forecast_errors(ctx: Context) -> dict[str, list[float]]:
    """Return the error of each forecaster of unseen windows, per seed."""
    steps = 3 if ctx.quick else STEPS
    errors: dict[str, list[float]] = {"large": [], "linear": [], "mean": []}
    for seed in ctx.seeds:
        draw = np.random.default_rng(seed)
        seen, unseen = windows(steps * BATCH, draw), windows(64 if ctx.quick else 1_000, draw)
        past, truth = unseen[:, :LENGTH], unseen[:, LENGTH:]
        forecasters: dict[str, Callable[[Tensor], Tensor]] = {
            "large": forecaster(NETS["large"], seen, seed),
            "linear": linear_map(seen),
            "mean": lambda x: x.mean(1, keepdim=True).expand(-1, HORIZON, -1),
        }
        with torch.no_grad():
            for name, forecast in forecasters.items():
                errors[name].append(float(series_loss(forecast(past), truth) / truth.var()))
    return errors


def forecaster(net: dict[str, Any], seen: Tensor, seed: int) -> Forecaster:
    """Train a net on all windows (N, LENGTH + HORIZON, 1) once."""
    torch.manual_seed(seed)
    backbone = create_model("unireplknet_nano", num_classes=0, in_chans=1, **net)
    embed = SeriesImage(1, dim=12, date_features=0)
    model = Forecaster(embed, backbone, LENGTH, HORIZON).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=len(seen) // BATCH)
    for batch in seen.split(BATCH):
        optimiser.zero_grad()
        series_loss(model(batch[:, :LENGTH]), batch[:, LENGTH:]).backward()
        optimiser.step()
        plan.step()
    return model.eval()


def linear_map(seen: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the least-squares forecast of windows normalised by their own mean and deviation."""

    def normalised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, deviation = x[:, :LENGTH].mean(1, keepdim=True), x[:, :LENGTH].std(1, keepdim=True, unbiased=False) + 1e-5
        return (x - mean) / deviation, mean, deviation

    values = normalised(seen)[0][..., 0].double()
    ones = torch.ones(len(values), 1, dtype=torch.float64)
    inputs = torch.cat((values[:, :LENGTH], ones), 1)
    weight = torch.linalg.lstsq(inputs, values[:, LENGTH:], driver="gelsd").solution.float()

    def forecast(x: Tensor) -> Tensor:
        values, mean, deviation = normalised(x)
        out = torch.cat((values[..., 0], torch.ones(len(x), 1)), 1) @ weight
        return out[..., None] * deviation + mean

    return forecast
