"""Mamba2D: is one scan of the plane as good as scans of its lines in four directions, and is it fast?

The paper's claim is of ImageNet, between nets of different groups. Here one net is trained with either kind of scan in
the place of the other; all else, which is the linear layers about the scan, the convolution beside it and the attention
after it, stays as it is. A second pair of nets has nothing but the scan to mix places with.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.app.build import count_parameters
from vitrail.checks.check import Arm, Context, Finding, Verdict, arm_cost, beyond_rounding, bounded, paired
from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError
from vitrail.layers.mamba import ScanPaths
from vitrail.layers.scan import selective_scan
from vitrail.layers.scan.orders import cross, cross_merge, cross_scan
from vitrail.layers.scan.plane import PLANE_SCAN_FORMS, plane_scan, plane_scan_form
from vitrail.models import create_model
from vitrail.models.mamba2d import PlaneScan

ALONE: dict[str, Any] = {"mixers": ("scan",) * 4}
ARMS: dict[str, tuple[dict[str, Any], int | None]] = {
    "plane": ({}, None),
    "four directions": ({"mlp_ratio": 3.71}, 4),
    "one direction": ({"mlp_ratio": 4.1}, 1),
    "plane alone": (ALONE, None),
    "four directions alone": ({**ALONE, "mlp_ratio": 3.0}, 4),
}
"""Options of the net, and the directions of its scans, None for a scan of the plane. Each of the first three, and of
the last two, has feed-forward layers as wide as give them the same number of parameters."""
MARGIN = 0.02
"""What 'comparable' may lose of the top-1 accuracy: two points."""
PASSES = 8_000
"""Of images, for each arm: minutes for fifteen nets on two cores."""
PUBLISHED = {"mamba2d_n": 7, "mamba2d_t": 27, "mamba2d_s": 50}
"""Millions of parameters, from the authors' README."""
SHAPE, QUICK_SHAPE = (4, 28, 28, 64, 16), (1, 8, 8, 8, 16)
"""Images, rows, columns, channels and states of the scans that are compared."""


def run(ctx: Context) -> Verdict:
    """Train all arms at equal numbers of image passes and equal size; compare the forms of the scan with the loop."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.03 if ctx.quick else PASSES / len(index.rows("train"))
    arms: dict[str, list[Arm]] = {name: [] for name in ARMS}
    for seed in ctx.seeds:
        for name, (options, directions) in ARMS.items():
            edits = [{"name": f"{__name__}:lines", "options": {"directions": directions}}] if directions else []
            settings = {
                "model.name": "mamba2d_nano",
                "model.options": options,
                "model.edits": edits,
                "train.batch_size": 32,
                "train.epochs": epochs,
            }
            arms[name].append(ctx.train(index, name, seed, settings))
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    forms = compare_forms(QUICK_SHAPE if ctx.quick else SHAPE, rounds=1 if ctx.quick else 3)
    sizes = published_sizes(["mamba2d_n"] if ctx.quick else list(PUBLISHED))
    own = next(row for row in forms if row["scan"] == plane_scan_form(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1)))
    allowed = "four directions, less two points"
    top1[allowed] = [value - MARGIN for value in top1["four directions"]]

    def beats(ours: str, against: str, claim: str) -> Finding:
        both = {name: top1[name] for name in (ours, against)}
        return paired(claim, "top-1 on held-out images", both, ours=ours, against=against)

    return Verdict(
        [
            beats(
                "plane",
                allowed,
                "a net with one scan of the plane is comparable to one with scans of lines in four directions and as "
                "many parameters: it is less than two points worse",
            ),
            beats("plane", "four directions", "one scan of the plane is more accurate than four directions of lines"),
            beats("plane", "one direction", "one scan of the plane is more accurate than one direction of lines"),
            beats(
                "plane alone",
                "four directions alone",
                "where nothing else mixes places, the scan of the plane is more accurate than four directions of lines",
            ),
            bounded(
                "every form of the scan equals the loop over places, in its values and in all its gradients",
                "largest deviation, as a share of the largest element",
                max(row["deviation"] for row in forms if row["deviation"] is not None),
                at_most=1e-4,
            ),
            bounded(
                "the scan of the plane is faster than the loop over places, forward and backward",
                "its time over the loop's",
                1 / own["times_the_loop"],
                at_most=1.0,
            ),
            bounded(
                "the nets have the published parameters",
                "largest deviation beyond the last digit of the published figure, as a share of it",
                max(row["params_off"] for row in sizes),
                at_most=0.01,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every arm.",
            "Scans of lines are VMamba's, with parameters of their own for each direction; their mean is taken, as the "
            "published code takes that of two scans. Feed-forward layers are narrower where they have more parameters.",
            f"'alone': four stages of scans in the place of two with a convolution beside the scan and two of "
            f"attention. The forms are timed on planes of {' x '.join(map(str, QUICK_SHAPE if ctx.quick else SHAPE))} "
            "(images, rows, columns, channels, states).",
            "Nets of under a million parameters on small images: ImageNet accuracy and throughput on a GPU are not "
            "shown.",
        ],
        tables={
            "forms of the scan": forms,
            "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()],
            "published sizes": sizes,
        },
    )


# ---- the other scan


def lines(*, directions: int = 4) -> Edit:
    """Put selective scans of lines in the place of every scan of the plane.

    Args:
        directions: 4, rows and columns from either end, or 1, rows from the first.

    Raises:
        InputError: another number of directions, or a net that scans no planes.
    """
    if directions not in (1, 4):
        raise InputError(f"directions = {directions} is not allowed: give 1 or 4")

    def edit(model: nn.Module) -> nn.Module:
        return replace_modules(
            model,
            lambda name, module: isinstance(module, PlaneScan),
            lambda module: Lines(module.D.numel(), directions),  # type: ignore[operator]
            what="scan of the plane",
        )

    return edit


class Lines(ScanPaths):
    """The mean of selective scans of a plane's lines in some directions, for the place of a ``PlaneScan``."""

    def __init__(self, dim: int, directions: int) -> None:
        super().__init__(directions, dim, math.ceil(dim / 16))
        self.directions = directions

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        orders = cross((x.shape[1], x.shape[2]))[: self.directions]
        y = cross_merge(self.along(cross_scan(x.flatten(1, 2), orders)), orders)
        return (y / self.directions).unflatten(1, x.shape[1:3])


# ---- costs


def compare_forms(shape: tuple[int, int, int, int, int], *, rounds: int) -> list[dict[str, Any]]:
    """Time each form of the scan, and four scans of lines, in turn; compare each form with the loop over places."""
    given = scan_inputs(shape)
    expected = _values(given, "reference")
    fastest = plane_scan_form(given[0], given[3])
    forms = [name for name in PLANE_SCAN_FORMS if name in ("reference", "portable", fastest)]
    deviation: dict[str, float | None] = {}
    for name in forms:
        pairs = zip(_values(given, name), expected, strict=True)  # compiles, before it is timed
        deviation[name] = max(float((found - right).abs().max() / right.abs().max()) for found, right in pairs)
    arms: dict[str, Callable[[], tuple[float, float]]] = {name: partial(_seconds, given, name) for name in forms}
    four = "four directions of lines"
    deviation[four], arms[four] = None, partial(_seconds_of_lines, given)
    arms[four]()  # compiles
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, function in arms.items():
            times[name].append(function())
    median = {name: [statistics.median(part) for part in zip(*runs, strict=True)] for name, runs in times.items()}
    loop = sum(median["reference"])
    return [
        {
            "scan": name,
            "forward_ms": 1e3 * forward,
            "backward_ms": 1e3 * backward,
            "times_the_loop": loop / (forward + backward),
            "deviation": deviation[name],
        }
        for name, (forward, backward) in median.items()
    ]


def scan_inputs(shape: tuple[int, int, int, int, int]) -> list[Tensor]:
    """Draw inputs of ``plane_scan`` with the rates and step sizes that nets begin with."""
    batch, height, width, channels, states = shape
    draw = torch.Generator().manual_seed(0)
    place = (batch, height, width)
    rates = -torch.arange(1.0, states + 1).repeat(channels, 1)
    values = [torch.randn(*place, channels, generator=draw)]
    values += [torch.rand(*place, channels, generator=draw) / 10 for _ in range(2)]
    values += [rates, rates.clone()]
    values += [torch.randn(*place, states, generator=draw) for _ in range(3)]
    return [value.requires_grad_() for value in values]


def _values(given: list[Tensor], form: str) -> list[Tensor]:
    y = plane_scan(*given, form=form)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), given)]


def _seconds(given: list[Tensor], form: str) -> tuple[float, float]:
    start = time.perf_counter()
    y = plane_scan(*given, form=form)
    middle = time.perf_counter()
    torch.autograd.grad(y.sum(), given)
    return middle - start, time.perf_counter() - middle


def _seconds_of_lines(given: list[Tensor]) -> tuple[float, float]:
    """Scan as many places, four times, with all orders read and put back."""
    u, delta, _, A, _, B, _, C = given
    orders = cross((u.shape[1], u.shape[2]))
    start = time.perf_counter()
    us, deltas, Bs, Cs = (cross_scan(x.flatten(1, 2), orders).transpose(2, 3) for x in (u, delta, B, C))
    y, _ = selective_scan(us.flatten(1, 2), deltas.flatten(1, 2), A.repeat(4, 1), Bs, Cs)
    y = cross_merge(y.unflatten(1, (4, -1)).transpose(2, 3), orders)
    middle = time.perf_counter()
    torch.autograd.grad(y.sum(), (u, delta, A, B, C))
    return middle - start, time.perf_counter() - middle


def published_sizes(names: list[str]) -> list[dict[str, Any]]:
    """Count the parameters of each published net."""
    rows = []
    for name in names:
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        params, published = count_parameters(model) / 1e6, PUBLISHED[name]
        rows.append(
            {
                "net": name,
                "params_m": params,
                "published_params_m": published,
                "params_off": beyond_rounding(params, published, 1.0),
            }
        )
    return rows
