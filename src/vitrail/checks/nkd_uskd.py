"""NKD against no teacher, KD and DKD with the same teacher; USKD against plain training and label smoothing.

The paper's claim is a gain of two points on ImageNet with a teacher, and of about one without. Here a network of
80,000 parameters learns from one three times its width, and from itself; all arms see the same number of images. The
weights of the losses are those of the paper's recipes for small images (CIFAR-100).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.app.build import count_parameters
from vitrail.checks.check import Arm, Context, Finding, Verdict, paired
from vitrail.errors import InputError
from vitrail.methods.distill.nkd_uskd import NKD
from vitrail.methods.method import Batch

STUDENT = {"model.options": {"channels": (8, 16, 32, 64), "stem_stride": 2}}
TEACHER = {"model.options": {"channels": (24, 48, 96, 192), "stem_stride": 2}}
EPOCHS = 0.5
"""Of Fashion-MNIST, for a student; its teacher has four times as many."""


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Return the loss of Hinton et al. (2015), the cross-entropy of soft labels, as a mean over the images.

    Args:
        student_logits, teacher_logits: (B, C).
        temperature: above 0.
    """
    soft = (teacher_logits / temperature).softmax(1)
    return -(temperature**2) * (soft * (student_logits / temperature).log_softmax(1)).sum(1).mean()


def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Return the loss of Zhao et al., "Decoupled Knowledge Distillation" (2022), as a mean over the images.

    The divergence of the two-class distributions (target, others), times alpha, plus that of the distributions over the
    others, times beta.

    Args:
        student_logits, teacher_logits: (B, C).
        target: class numbers (B,).
        alpha, beta: weights, from 0.
        temperature: above 0.
    """
    hidden = F.one_hot(target, student_logits.shape[1]).bool()
    pairs, others = [], []
    for logits in (student_logits / temperature, teacher_logits / temperature):
        log_p = logits.log_softmax(1)
        rest = log_p.masked_fill(hidden, -torch.inf)
        pairs.append(torch.stack((log_p[hidden], rest.logsumexp(1)), dim=1))  # (B, 2)
        others.append(logits[~hidden].view(len(logits), -1).log_softmax(1))  # (B, C - 1)
    of_target = F.kl_div(pairs[0], pairs[1], reduction="batchmean", log_target=True)
    of_others = F.kl_div(others[0], others[1], reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * of_target + beta * of_others)


class Rival(NKD):
    """What the paper compares NKD with, on the same teacher: ``form`` is "kd" or "dkd"."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None = None, *, form: str) -> None:
        super().__init__(model, teacher)
        if form not in ("kd", "dkd"):
            raise InputError(f"method.options.form = {form!r} is not allowed: give 'kd' or 'dkd'")
        self.form = form

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` with the weights of the paper's CIFAR-100 recipes."""
        images, target = batch["image"], batch["target"]
        with torch.no_grad():
            soft = self.teacher(images)
        logits = self.model(images)
        supervised = F.cross_entropy(logits, target)
        if self.form == "kd":
            return {"loss": 0.5 * supervised + 0.5 * kd_loss(logits, soft, temperature=3.0)}
        return {"loss": supervised + dkd_loss(logits, soft, target, alpha=1.0, beta=8.0, temperature=4.0)}


def run(ctx: Context) -> Verdict:
    """Train a teacher, then every arm on every seed."""
    index = ctx.index("digits" if ctx.quick else "fashion")
    epochs = 0.3 if ctx.quick else EPOCHS
    teacher, path = ctx.teacher(index, {**TEACHER, "train.epochs": epochs if ctx.quick else 4 * epochs})
    rival = "vitrail.checks.nkd_uskd:Rival"
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("supervised", {"smoothing": 0.0}),
        "smoothing": ("supervised", {"smoothing": 0.1}),
        "uskd": ("nkd_uskd", {"alpha": 0.1, "beta": 0.1, "mu": 0.1}),
        "kd": (rival, {"teacher": path, "form": "kd"}),
        "dkd": (rival, {"teacher": path, "form": "dkd"}),
        "nkd": ("nkd_uskd:NKD", {"teacher": path, "gamma": 3.5, "temperature": 3.0}),
    }
    arms: dict[str, list[Arm]] = {}
    for name, (method, options) in methods.items():
        settings = {**STUDENT, "train.epochs": epochs, "method.name": method, "method.options": options}
        arms[name] = [ctx.train(index, name, seed, settings) for seed in ctx.seeds]
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}

    def beats(ours: str, against: str, claim: str) -> Finding:
        pair = {name: top1[name] for name in (ours, against)}
        return paired(claim, "top-1 accuracy, held-out images", pair, ours=ours, against=against)

    findings = [
        beats("nkd", "plain", "A student taught by NKD is more accurate than one without a teacher."),
        beats("nkd", "kd", "NKD is more accurate than KD with the same teacher."),
        beats("nkd", "dkd", "NKD is more accurate than DKD with the same teacher."),
        beats("uskd", "plain", "USKD, which needs no teacher, is more accurate than plain training."),
        beats("uskd", "smoothing", "USKD is more accurate than label smoothing."),
    ]
    size = count_parameters(arms["plain"][0].model)
    notes = [
        f"{len(index.rows('train'))} training images; a student ({size} parameters) sees {epochs:g} epochs of them",
        f"one teacher ({count_parameters(teacher.model)} parameters, top-1 {teacher.top1:.1%}) for all seeds",
        "weights of the losses as in the paper's recipes for CIFAR-100",
    ]
    costs = [
        {
            "arm": name,
            "top1": sum(top1[name]) / len(trained),
            "seconds": round(sum(arm.learned.trained.seconds for arm in trained) / len(trained), 1),
        }
        for name, trained in arms.items()
    ]
    return Verdict(findings, notes, {"accuracy and time of training": costs})
