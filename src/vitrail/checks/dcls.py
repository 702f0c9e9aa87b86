"""DCLS: do few elements that learn where to stand do better than as many parameters on a grid?

The images are made so that what is near says nothing: three marks of one kind lie at random places, each with a mark of
a second kind at the same distance and direction, which is the class. All images have the same marks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.utils import reparameterize_model
from torch import Tensor, nn

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Context, Verdict, bounded, paired
from vitrail.edits.dcls import FORMS, Dcls, Dcls2d, dcls, dense_kernel
from vitrail.edits.surgery import Edit, replace_modules
from vitrail.evaluate.turns import medians, one_thread
from vitrail.layers.large_kernel import LargeKernelConv2d
from vitrail.methods.supervised.supervised import Supervised
from vitrail.models import create_model
from vitrail.report.plots import BLUE, WIDTH, standalone, svg_plot
from vitrail.training.optim import create_optimizer, learning_rate, param_groups, set_learning_rate
from vitrail.training.recipe import OptimConfig

SIDE, MARKS, NOISE = 28, 3, 0.5
MOVES = ((-7, 0), (-5, 5), (0, 7), (5, 5), (7, 0), (5, -5), (0, -7), (-5, -5))
"""Rows and columns from a mark to its partner, by class: farther than the three places that 7 x 7 reaches."""
NET: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "dims": (16, 32, 48, 64),
    "patch_size": 1,
    "ls_init_value": 1.0,
    "num_classes": len(MOVES),
}
"""timm's ConvNeXt on all pixels; with the usual layer scale of 1e-6 a short training would not use its blocks."""
SIZE = 17
COUNTS = {"bilinear": 16, "gauss": 9}
"""Elements: with two positions each, and two widths, as many parameters as 49 taps have, or a few less."""
ARMS: dict[str, Edit | None] = {
    "dcls": dcls(kernel_size=SIZE, kernel_count=COUNTS["bilinear"]),
    "dcls, gauss": dcls(kernel_size=SIZE, kernel_count=COUNTS["gauss"], form="gauss"),
    "7x7": None,
    "7x7, dilated": lambda model: dilate(model),
}
DILATION = 3
"""Of 7 x 7: it reaches nine places; DCLS eight."""
STEPS, BATCH, LR = 120, 48, 3e-3
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
"""Channels and side at each stage of ConvNeXt-T at 224 pixels."""


def run(ctx: Context) -> Verdict:
    """Train the arms at equal steps and about equal parameters; compare gradients and times; draw positions."""
    steps, images = (3, 64) if ctx.quick else (STEPS, 2048)
    nets = {name: [train(edit, seed, steps) for seed in ctx.seeds] for name, edit in ARMS.items()}
    top1 = {name: [accuracy(net, images, seed) for net, seed in zip(found, ctx.seeds)] for name, found in nets.items()}
    layers = [timed_layers(channels, side, ctx) for channels, side in (STAGES[2:] if ctx.quick else STAGES)]
    picture = positions_picture(nets["dcls"][0])
    (ctx.folder / "positions.svg").write_text(standalone(picture), encoding="utf-8")
    quantity = "top-1 on held-out images"
    seconds = timed_nets(ctx)
    return Verdict(
        [
            paired(
                "elements that learn their positions are more accurate than 7 x 7 taps of no fewer parameters",
                quantity,
                top1,
                ours="dcls",
                against="7x7",
            ),
            paired(
                "they are more accurate than 7 x 7 taps that are spread as far",
                quantity,
                top1,
                ours="dcls",
                against="7x7, dilated",
            ),
            paired(
                "Gaussian elements are more accurate than bilinear ones",
                quantity,
                top1,
                ours="dcls, gauss",
                against="dcls",
            ),
            bounded(
                "the gradients of positions are those of finite differences",
                "largest difference, as a share of the largest gradient",
                max(gradient_gap(form) for form in FORMS),
                at_most=1e-6,
            ),
            bounded(
                "a training step of a ConvNeXt takes at most a tenth longer with DCLS than with 7 x 7",
                "processor time with 34 elements in 17 x 17, positions shared over stages, over that of 7 x 7",
                seconds["dcls"] / seconds["7x7"],
                at_most=1.1,
            ),
        ],
        notes=[
            f"{steps} steps of {BATCH} generated images of {SIDE} pixels for every arm, AdamW at {LR:g}, five times "
            "that for positions; one ConvNeXt of four blocks, whose depthwise layers are exchanged.",
            "Positions are not shared here: there is one block in each stage.",
            f"Timed on one thread of the processor, {'convnext_atto' if ctx.quick else 'convnext_tiny'} as a net, the "
            "paper's on GPUs. Large depthwise kernels have a fast way on processors here, which torch's 7 x 7 has not; "
            "the table has torch's 17 x 17 beside it. Accuracy on ImageNet is not shown.",
        ],
        tables={
            "cost of the arms": [
                {
                    "arm": name,
                    "parameters": count_parameters(found[0]),
                    # Of what is deployed: the kernel is made once.
                    "madds": count_flops(reparameterize_model(found[0]).to("meta"), (SIDE, SIDE)),
                    "top1": float(np.mean(top1[name])),
                }
                for name, found in nets.items()
            ],
            "a training step of a layer, over 7 x 7": layers,
        },
    )


def scenes(count: int, seed: int, noise: float = NOISE) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, SIDE, SIDE), a channel for each kind of mark and one of noise alone, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(len(MOVES), (count,), generator=generator)
    images = torch.zeros(count, 3, SIDE, SIDE)
    for image, target in zip(images, targets):
        places = torch.randperm((SIDE // 2) ** 2, generator=generator)[:MARKS]
        image[0, places // (SIDE // 2) * 2, places % (SIDE // 2) * 2] = 3.0
        # Round the edges, so that no place tells the class.
        image[1] = image[0].roll(MOVES[target], (0, 1))
    return images + noise * torch.randn(images.shape, generator=generator), targets


def dilate(model: nn.Module) -> nn.Module:
    """Spread the taps of the 7 x 7 convolutions."""

    def spread(layer: Any) -> nn.Module:
        wide = LargeKernelConv2d(layer.in_channels, 7, DILATION, bias=True)
        wide.weight, wide.bias = layer.weight, layer.bias
        return wide

    return replace_modules(
        model, lambda _, m: isinstance(m, nn.Conv2d) and m.kernel_size == (7, 7), spread, what="7 x 7 convolution"
    )


def train(edit: Edit | None, seed: int, steps: int) -> nn.Module:
    """Return the net of an arm after ``steps`` of new images."""
    torch.manual_seed(seed)
    net = create_model("convnext_atto", **NET)
    method = Supervised(edit(net) if edit is not None else net)
    config = OptimConfig(name="adamw", lr=LR, weight_decay=0.05)
    optimizer = create_optimizer(param_groups(method, config), config)
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(step / steps, peak=LR, warmup=0.1, floor=0.0))
        images, targets = scenes(BATCH, seed=1000 * seed + step)
        optimizer.zero_grad()
        F.cross_entropy(net(images), targets).backward()
        optimizer.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net: nn.Module, images: int, seed: int) -> float:
    """Return top-1 on images that no training saw."""
    hits = []
    for part in range(0, images, 64):
        x, targets = scenes(64, seed=10**6 + 1000 * seed + part)
        hits.append(net(x).argmax(1) == targets)
    return float(torch.cat(hits).float().mean())


def gradient_gap(form: str) -> float:
    """Return how far the gradient of a kernel in its positions is from central differences, off whole places."""
    generator = torch.Generator().manual_seed(0)
    weight, pull = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 2, 5), (2, 2, 7, 7)))
    positions = torch.randint(-3, 3, (2, 2, 2, 5), generator=generator) + 0.25
    positions = positions.double().requires_grad_()
    widths = torch.full_like(positions, 0.4).detach()

    def value(at: Tensor) -> Tensor:
        return (dense_kernel(weight, at, (7, 7), form, widths) * pull).sum()

    (slope,) = torch.autograd.grad(value(positions), positions)
    step, worst = 1e-5, 0.0
    with torch.no_grad():
        for place in np.ndindex(*positions.shape):
            move = torch.zeros_like(positions)
            move[place] = step
            central = (value(positions + move) - value(positions - move)) / (2 * step)
            worst = max(worst, abs(float(central - slope[place])))
    return worst / float(slope.abs().max())


def timed_nets(ctx: Context) -> dict[str, float]:
    """Return the seconds of the processor for a training step of ConvNeXt with DCLS and with 7 x 7."""
    name, side, batch, rounds = ("convnext_atto", 32, 2, 1) if ctx.quick else ("convnext_tiny", 160, 4, 5)
    torch.manual_seed(0)
    nets = {arm: create_model(name, num_classes=10) for arm in ("dcls", "7x7")}
    dcls(shared=True)(nets["dcls"])
    images = torch.randn(batch, 3, side, side)
    return steps_in_turns({arm: net.train() for arm, net in nets.items()}, images, rounds)


def timed_layers(channels: int, side: int, ctx: Context) -> dict[str, Any]:
    """Return the processor time of a training step of depthwise layers, over that of 7 x 7."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "dcls": Dcls2d(channels, channels, 34, SIZE, padding=SIZE // 2, groups=channels),
        "17x17": nn.Conv2d(channels, channels, SIZE, padding=SIZE // 2, groups=channels),
        "7x7": nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
    }
    x = torch.randn(1 if ctx.quick else 8, channels, side, side, requires_grad=True)
    times = steps_in_turns(layers, x, 1 if ctx.quick else 5)
    return {"channels": channels, "side": side, **{name: times[name] / times["7x7"] for name in ("dcls", "17x17")}}


def steps_in_turns(modules: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Return the seconds of the processor for a pass forward and backward of each."""

    def step(module: nn.Module) -> Callable[[], None]:
        return lambda: module(x).sum().backward()

    with one_thread():
        return medians({name: step(module) for name, module in modules.items()}, rounds, time.thread_time)


@svg_plot
def positions_picture(net: nn.Module) -> tuple[str, Figure]:
    """Draw where the elements of each layer of a net stand, of all its kernels together."""
    layers = [module for module in net.modules() if isinstance(module, Dcls)]
    figure = Figure(figsize=(WIDTH, 2.0), layout="constrained")
    for number, layer in enumerate(layers):
        axes = figure.add_subplot(1, len(layers), number + 1)
        rows, columns = layer.P.detach().flatten(1).numpy()
        axes.scatter(columns, rows, s=2, color=BLUE, linewidths=0)
        reach = layer.kernel_size[0] / 2
        axes.set(xlim=(-reach, reach), ylim=(reach, -reach), xticks=[], yticks=[], aspect="equal")
        axes.set_title(f"stage {number + 1}", fontsize=8)
    return "Where the elements stand, in kernels of 17 x 17", figure
