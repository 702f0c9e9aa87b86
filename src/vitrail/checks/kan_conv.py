"""Kolmogorov-Arnold convolutions of each basis against plain ones, their finetuning, and a U-Net of them.

The paper compares bases on MNIST, CIFAR and ImageNet, and U-Nets on medical masks. Here small VGGs, each as wide as an
equal number of parameters allows, see the same images of clothes; then one trained on half of the classes learns the
other half by new degrees alone; and U-Nets learn the masks of generated shapes.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.app.build import count_parameters
from vitrail.checks.check import SIDES, Context, Finding, Verdict, paired
from vitrail.data.index import Index
from vitrail.data.preprocess import Preprocess
from vitrail.data.synthetic.shapes import batches
from vitrail.edits.kan_conv import kan_finetune
from vitrail.layers.kan_layers import FORMS
from vitrail.models import create_model
from vitrail.models.kan_nets import KANUNet, dice_bce_loss

BASES = ("plain", *FORMS, "bottleneck gram")
QUICK = ("plain", "gram", "rbf", "bottleneck gram")
PARAMETERS = 24_000
STEPS, BATCH = 150, 64
"""Of each net, on Fashion-MNIST."""
SIDE = 32
"""Pixels of generated masks, and of images that are neither digits nor clothes."""


class PlainVGG(nn.Module):
    """The VGG of the check with plain convolutions, each with a normalisation and an activation behind it."""

    def __init__(self, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (dim_in, dim) in enumerate(zip((3, *widths[:-1]), widths)):
            layers += [nn.MaxPool2d(2, 2, ceil_mode=True)] if number else []
            layers += [nn.Conv2d(dim_in, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        return self.head(self.features(x).mean((2, 3)))


def make(basis: str, classes: int, width: int) -> nn.Module:
    """Return the net of a basis with that width at its end, half of it before and a quarter at its beginning."""
    widths = (width // 4, width // 2, width)
    if basis == "plain":
        return PlainVGG(classes, widths)
    kind, name = ("bottleneck", "gram") if basis.startswith("bottleneck") else ("full", basis)
    options: dict[str, Any] = {"widths": [(width,) for width in widths], "kind": kind, "basis": name}
    return create_model("kan_vgg_nano", num_classes=classes, **options)


@cache
def fitting(basis: str, classes: int) -> int:
    """Return the largest width with which a net has at most the check's number of parameters."""

    def size(width: int) -> int:
        with torch.device("meta"):
            return count_parameters(make(basis, classes, width))

    return bisect_right(range(4, 256), PARAMETERS, key=size) + 3


def train(model: nn.Module, images: Tensor, targets: Tensor, steps: int, seed: int, lr: float = 3e-3) -> float:
    """Train what may be trained on batches, at a rate that falls to 0; return CPU seconds of a step."""
    rng = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    dense = targets.ndim > 1
    model.train()
    start = time.process_time()
    for _ in range(steps):
        rows = torch.randint(len(images), (16 if dense else BATCH,), generator=rng)
        found = model(images[rows])
        loss = dice_bce_loss(found, targets[rows]) if dense else nn.functional.cross_entropy(found, targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (time.process_time() - start) / steps


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Return the share of images that are answered rightly."""
    model.eval()
    right = [(model(x).argmax(1) == y).float() for x, y in zip(images.split(256), targets.split(256))]
    return float(torch.cat(right).mean())


def run(ctx: Context) -> Verdict:
    """Compare bases, ways of finetuning and U-Nets."""
    index = ctx.index("digits" if ctx.quick else "fashion")
    held = 200 if ctx.quick else 4000
    most = 600 if ctx.quick else 20_000
    data, test = _images(ctx, index, most, training=True), _images(ctx, index, held, training=False)
    steps = 4 if ctx.quick else STEPS
    classes = len(index.classes)

    names = QUICK if ctx.quick else BASES
    top1: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    models: dict[str, nn.Module] = {}
    for seed in ctx.seeds:
        for name in names:
            ctx.tell(f"{name}, seed {seed}")
            torch.manual_seed(seed)
            models[name] = make(name, classes, fitting(name, classes))
            seconds[name].append(train(models[name], *data, steps, seed))
            top1[name].append(accuracy(models[name], *test))
    quantity = "top-1 accuracy, held-out images, a share"
    findings = [
        paired(
            "Of as many parameters, a net of Gram convolutions is more accurate than one of plain convolutions.",
            quantity,
            {"gram": top1["gram"], "plain": top1["plain"]},
            ours="gram",
            against="plain",
        ),
        paired(
            "In a bottleneck, Gram convolutions of as many parameters are more accurate than full ones.",
            quantity,
            {name: top1[name] for name in ("bottleneck gram", "gram")},
            ours="bottleneck gram",
            against="gram",
        ),
    ]
    findings += [
        paired(
            f"Gram polynomials are more accurate than the basis {name}.",
            quantity,
            {"gram": top1["gram"], name: top1[name]},
            ours="gram",
            against=name,
        )
        for name in names
        if name not in ("gram", "plain", "bottleneck gram")
    ]
    base = float(np.median(seconds["plain"]))
    bases = [
        {
            "basis": name,
            "parameters": count_parameters(models[name]),
            "top1": float(np.mean(top1[name])),
            "step_over_plain": float(np.median(seconds[name])) / base,
        }
        for name in names
    ]
    more, finetuning = _finetuning(ctx, data, test, steps)
    masks, segmentation = _segmentation(ctx)
    notes = [
        f"{len(data[0])} training images, {steps} steps of {BATCH} for each net; the paper trains for many epochs.",
        "Steps are timed in CPU seconds of nets of equal parameters, not of equal shape: benchmarks/kan_conv.py has "
        "equal shapes.",
        "The paper's claims of accuracy are of its own baselines at equal width; here parameters are equal.",
    ]
    tables = {"bases": bases, "finetuning": finetuning, "segmentation": segmentation}
    return Verdict([*findings, *more, *masks], notes, tables)


def _images(ctx: Context, index: Index, most: int, *, training: bool) -> tuple[Tensor, Tensor]:
    """Return images and class numbers; of several labels of an image the first counts."""
    side = SIDES.get(index.source.kind, SIDE)
    preprocess = Preprocess((side, side), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    stream = (ctx.training_images if training else ctx.held_out)(index, preprocess, most=most)
    images, targets = zip(*stream())
    target = torch.cat(targets)
    return torch.cat(images), target.argmax(1) if target.ndim > 1 else target


def _finetuning(
    ctx: Context, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], steps: int
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Train on the first half of the classes, then finetune on the other half."""
    half = int(data[1].max() + 1) // 2

    def part(pair: tuple[Tensor, Tensor], first: bool) -> tuple[Tensor, Tensor]:
        rows = (pair[1] < half) == first
        return pair[0][rows], pair[1][rows] - (0 if first else half)

    arms: dict[str, list[float]] = {"new degrees": [], "all": [], "head": []}
    learning: dict[str, int] = {}
    for seed in ctx.seeds:
        torch.manual_seed(seed)
        trained: Any = make("gram", half, fitting("gram", half))
        train(trained, *part(data, True), steps, seed)
        state = trained.state_dict()
        for name in arms:
            torch.manual_seed(seed)
            model: Any = make("gram", half, fitting("gram", half))
            model.load_state_dict(state)
            model.reset_classifier(half)
            if name == "head":
                model.requires_grad_(False)
                model.get_classifier().requires_grad_(True)
            elif name == "new degrees":
                kan_finetune(extra_degrees=1)(model)
            learning[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            train(model, *part(data, False), max(steps // 4, 2), seed)
            arms[name].append(accuracy(model, *part(test, False)))
    quantity = "top-1 accuracy on the classes of the finetuning, held-out images, a share"
    findings = [
        paired(
            "Finetuning a new degree alone is more accurate than finetuning all weights.",
            quantity,
            {name: arms[name] for name in ("new degrees", "all")},
            ours="new degrees",
            against="all",
        ),
        paired(
            "Finetuning a new degree alone is more accurate than training the classifier alone.",
            quantity,
            {name: arms[name] for name in ("new degrees", "head")},
            ours="new degrees",
            against="head",
        ),
    ]
    rows = [
        {"arm": name, "parameters_that_learn": learning[name], "top1": float(np.mean(values))}
        for name, values in arms.items()
    ]
    return findings, rows


def _segmentation(ctx: Context) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Train U-Nets on the masks of generated shapes."""
    count, steps = (24, 2) if ctx.quick else (1000, 250)
    images, classes, _ = next(batches(count + count // 4, size=(SIDE, SIDE)))
    masks = (classes > 0).float()[:, None]
    scores: dict[str, list[float]] = {"U-KAN": [], "U-Net": []}
    sizes: dict[str, int] = {}
    for seed in ctx.seeds:
        for name in scores:
            torch.manual_seed(seed)
            kan = name == "U-KAN"
            net = KANUNet(depth=3, layers=1, width=8) if kan else _plain_unet()
            sizes[name] = count_parameters(net)
            train(net, images[:count], masks[:count], steps, seed)
            net.eval()
            with torch.no_grad():
                found = torch.cat([net(batch) for batch in images[count:].split(64)]) > 0
            truth = masks[count:] > 0
            scores[name].append(float((found & truth).sum() / (found | truth).sum().clamp_min(1)))
    finding = paired(
        "A U-Net of bottleneck Gram convolutions finds masks better than a plain one of as many parameters.",
        "intersection over union of held-out masks, a share",
        scores,
        ours="U-KAN",
        against="U-Net",
    )
    rows = [{"net": name, "parameters": sizes[name], "iou": float(np.mean(values))} for name, values in scores.items()]
    return [finding], rows


def _plain_unet() -> nn.Module:
    """Return the U-Net with plain convolutions, widened to the other's parameters."""
    with torch.device("meta"):
        wanted = count_parameters(KANUNet(depth=3, layers=1, width=8))
        sizes = {width: count_parameters(_PlainUNet(width)) for width in range(4, 24)}
    return _PlainUNet(min(sizes, key=lambda width: abs(sizes[width] - wanted)))


class _PlainUNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

        def layer(dim_in: int, dim: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(dim_in, dim, 3, stride, 1, bias=False), nn.BatchNorm2d(dim), nn.SiLU())

        dims = (width, 2 * width, 4 * width)
        self.encoder = nn.ModuleList(layer(a, b, 1 + (a > 3)) for a, b in zip((3, *dims[:-1]), dims))
        self.decoder = nn.ModuleList(layer(3 * dim, dim) for dim in reversed(dims[:-1]))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        for number, block in enumerate(self.decoder, 2):
            up = nn.functional.interpolate(x, skips[-number].shape[2:], mode="bilinear", align_corners=True)
            x = block(torch.cat((up, skips[-number]), 1))
        return self.head(x)
