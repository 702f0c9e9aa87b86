"""Knowledge concentration: do specialists teach one net more than the labels do, and does each at its own pace?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.app.artefact import Artefact, save
from vitrail.app.build import count_parameters, model_options, preprocess_of
from vitrail.checks.check import Context, Finding, Verdict, bounded, paired
from vitrail.data.index import Index
from vitrail.edits.structural_head import StructuralHead
from vitrail.evaluate.memory import peak_bytes
from vitrail.layers.label_tree import class_groups
from vitrail.layers.large_output import Form, large_loss, sampled_loss, sharded_loss
from vitrail.models import create_model
from vitrail.runs import RunFolder

GROUPS = ((0, 6), (2, 4), (1, 3, 8), (5, 7, 9))
"""Of Fashion-MNIST, four kinds of garments that are alike; of digits, as good as any."""
SPECIALIST_PASSES, PASSES = 8_000, 6_000
"""Of images: all specialists together, each of its own classes alone; and each student."""
S1, S2 = 128, 32
COUNTS = (1_000, 10_000, 100_000)
SYSTEM = "knowledge_concentration"


def run(ctx: Context) -> Verdict:
    """Train four specialists, and students of them and of the labels."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    classes = len(index.classes)
    groups = [list(group) for group in GROUPS] if classes == 10 else class_groups(min(4, classes // 2), classes)
    epochs = 0.03 if ctx.quick else PASSES / len(index.rows("train"))

    def student(name: str, seed: int, *, pace: str, connected: bool, teachers: list[str]) -> float:
        head = {"groups": groups, "s1": S1, "s2": S2, "shared": 0 if connected else S2, "pace": pace}
        method = "KnowledgeConcentration" if teachers else "TreeTraining"
        settings = {
            "train.epochs": epochs,
            "model.edits": [{"name": f"{SYSTEM}:structural_head", "options": head}],
            "method.name": f"{SYSTEM}:{method}",
            "method.options": {"teacher": teachers} if teachers else {},
        }
        return ctx.train(index, name, seed, settings).top1

    top1: dict[str, list[float]] = {name: [] for name in ("generalist", "distilled", "uniform", "concentrated")}
    of_specialists = []
    for seed in ctx.seeds:
        teachers, accuracy = _specialists(ctx, index, groups, seed)
        of_specialists.append({"seed": seed, **{f"specialist {v}": share for v, share in enumerate(accuracy)}})
        top1["generalist"].append(student("generalist", seed, pace="none", connected=False, teachers=[]))
        top1["distilled"].append(student("distilled", seed, pace="none", connected=False, teachers=teachers))
        top1["uniform"].append(student("uniform", seed, pace="none", connected=True, teachers=teachers))
        top1["concentrated"].append(student("concentrated", seed, pace="group", connected=True, teachers=teachers))

    def beats(claim: str, ours: str, other: str) -> Finding:
        return paired(claim, "top-1 on held-out images of all classes", top1, ours=ours, against=other)

    counts = COUNTS[:1] if ctx.quick else COUNTS
    return Verdict(
        [
            beats("a student of specialists beats a generalist that learns the labels", "concentrated", "generalist"),
            beats("learning each group at its own pace beats uniform pacing", "concentrated", "uniform"),
            beats("specialists teach more than the labels, with the same head", "distilled", "generalist"),
            beats("a head connected by groups beats a fully connected one with fewer weights", "uniform", "distilled"),
            bounded(
                "the loss in shards and its gradients are those of the whole",
                "largest difference, as a share of the largest value, both forms",
                _sharded_error(),
                at_most=1e-5,
            ),
            bounded(
                "the sampled partition function and its gradient are right in expectation",
                "difference of their means over draws, as a share of the norm",
                _sampled_error(100 if ctx.quick else 4_000),
                at_most=0.05,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every student; the specialists saw "
            "images of their own classes before, which the generalist did not: the paper's comparison.",
            "Ten classes in four groups and nets of under a million parameters: the paper has 100,000.",
            "Times are of one step of the output layer, forward and backward, after a warm-up; memory is the peak of "
            "tensors beyond weights and inputs, the gradients of the weights among it.",
        ],
        tables={
            "accuracy": [
                {"arm": name, "seed": s, "top1": v} for name, each in top1.items() for s, v in zip(ctx.seeds, each)
            ],
            "specialists": of_specialists,
            "cost of an output": [
                row for count in counts for row in _costs(count, *((16, 8) if ctx.quick else (512, 64)))
            ],
        },
    )


def _specialists(ctx: Context, index: Index, groups: list[list[int]], seed: int) -> tuple[list[str], list[float]]:
    """Train one net on the classes of each group; return their run folders, and accuracies among their own classes."""
    recipe = ctx.recipe(index, {}, seed)
    options = model_options(recipe.model, 1)
    folders, accuracies = [], []
    most = 64 if ctx.quick else SPECIALIST_PASSES
    torch.manual_seed(seed)
    for v, group in enumerate(groups):
        own = {**options, "num_classes": len(group)}
        model = create_model(recipe.model.name, **own)
        preprocess = preprocess_of(model, recipe)
        place = torch.full((len(index.classes),), -1)
        place[torch.tensor(group)] = torch.arange(len(group))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for images, labels in _of_group(ctx.training_images(index, preprocess, most=most)(), place):
            wanted = F.one_hot(labels, len(group)).float()
            loss = F.binary_cross_entropy_with_logits(model.train()(images), wanted, reduction="none").sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            right = [
                (model.eval()(images).argmax(1) == labels).float()
                for images, labels in _of_group(ctx.held_out(index, preprocess, most=most // 4)(), place)
            ]
        accuracies.append(float(torch.cat(right).mean()))
        folder = RunFolder(ctx.folder / f"specialist-{seed}-{v}")
        folder.create()
        artefact = Artefact(recipe.model.name, own, [], [index.classes[c] for c in group], False, preprocess)
        save(folder, model, artefact)
        folders.append(str(folder.path))
    return folders, accuracies


def _of_group(batches: Any, place: Tensor) -> Any:
    """Yield images of a group's classes, two or more, and their numbers in the group."""
    for images, labels in batches:
        own = place[labels]
        if (own >= 0).sum() > 1:
            yield images[own >= 0], own[own >= 0]


def _layer(count: int, width: int, images: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return features, weights, biases, and targets of a linear output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, width, generator=generator).requires_grad_()
    weight = (torch.randn(count, width, generator=generator) / width**0.5).requires_grad_()
    bias = torch.zeros(count, requires_grad=True)
    return x, weight, bias, torch.randint(count, (images, 1), generator=generator), torch.ones(images, 1)


def _sharded_error() -> float:
    """Return how far the loss in shards, and its gradients, are from the whole one's."""
    worst = 0.0
    x, weight, bias, places, shares = _layer(1_000, 32, 8)
    forms: tuple[Form, ...] = ("softmax", "sigmoid")
    for form in forms:
        whole = _whole(x, weight, bias, places, shares, form)
        shards = sharded_loss(x, weight, bias, places, shares, size=64, form=form)
        found = [[loss.detach(), *torch.autograd.grad(loss.sum(), (x, weight, bias))] for loss in (whole, shards)]
        worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found[1], found[0])))
    return worst


def _whole(x: Tensor, weight: Tensor, bias: Tensor, places: Tensor, shares: Tensor, form: Form = "softmax") -> Tensor:
    """Return the loss of all logits at once."""
    return large_loss([lambda: F.linear(x, weight, bias)], [len(weight)], places, shares, form=form)


def _sampled_error(draws: int) -> float:
    """Return how far the mean of exp(loss) over draws, and of its gradient, is from the whole one's."""
    x, weight, bias, places, shares = _layer(200, 8, 4)
    torch.manual_seed(0)

    def terms(loss: Tensor) -> list[Tensor]:
        total = loss.exp()
        return [total.detach(), *torch.autograd.grad(total.sum(), (x, weight))]

    whole = terms(_whole(x, weight, bias, places, shares))
    sums = [torch.zeros_like(value) for value in whole]
    for _ in range(draws):
        for mean, value in zip(sums, terms(sampled_loss(x, weight, bias, places, shares, samples=100))):
            mean += value / draws
    return max(float((mean - value).norm() / value.norm()) for mean, value in zip(sums, whole))


def _costs(count: int, width: int, images: int) -> list[dict[str, Any]]:
    """Return milliseconds and megabytes of a step of each way to compute an output of ``count`` classes."""
    x, weight, bias, places, shares = _layer(count, width, images)
    head = StructuralHead(width, class_groups(20, count), s1=width, s2=max(width // 4, 1))
    few = max(count // 10, 100)
    ways = {
        "full": lambda: _whole(x, weight, bias, places, shares),
        "sharded in 10": lambda: sharded_loss(x, weight, bias, places, shares, size=count // 10),
        "sampled, a tenth": lambda: sampled_loss(x, weight, bias, places, shares, samples=few),
        "connected by 20 groups, sharded": lambda: large_loss(
            head.parts(x), [len(group) for group in head.groups], places, shares, form="sigmoid"
        ),
    }
    rows = []
    for name, way in ways.items():

        def step(way: Any = way) -> None:
            for value in (x, weight, bias, *head.parameters()):
                value.grad = None
            way().mean().backward()

        step()
        spent = []
        for _ in range(3):
            start = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
            step()
            spent.append((time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()) - start)
        for value in (x, weight, bias, *head.parameters()):
            value.grad = None
        parameters = count_parameters(head) if "connected" in name else weight.numel() + bias.numel()
        peak = peak_bytes(step)
        rows.append(
            {
                "classes": count,
                "output": name,
                "features": width,
                "images": images,
                "parameters": parameters,
                "ms_per_step": 1e3 * float(np.min(spent)),
                "peak_mb": peak / 1e6,
                "peak_less_gradients_mb": (peak - 4 * parameters) / 1e6,
            }
        )
    return rows
