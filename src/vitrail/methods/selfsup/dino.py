"""DINO: a student predicts, from any crop of an image, what its own moving average says of the large crops.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021), arXiv 2104.14294, and the
authors' code (facebookresearch/dino). The teacher's answers are centred, so that no output dominates, and sharpened, so
that they are not all alike; only the student learns. Labels, if there are any, train a linear classifier on features
that it does not change: a probe of what was learned, by which the usual validation measures it.

Shapes: B images, V crops of each, two of them large, K outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitrail.errors import InputError
from vitrail.methods.method import Batch, Method
from vitrail.methods.supervised.supervised import supervised_loss

LARGE = ("global_1", "global_2")


def _views(local_crops: int) -> dict[str, str]:
    return {**{name: name for name in LARGE}, **{f"local_{number}": "local" for number in range(local_crops)}}


def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, *, student_temp: float = 0.1, teacher_temp: float = 0.04
) -> Tensor:
    """Return the cross-entropy of the student's answers to the teacher's, over all pairs of different crops.

    Args:
        student: logits (V, B, K); the first crops are those of the teacher.
        teacher: logits (T, B, K), no more crops than the student's; no gradient goes to them.
        center: what is taken off the teacher's logits, (K,).
        student_temp, teacher_temp: temperatures.

    Returns:
        A scalar in float32: the mean over images and pairs.
    """
    wanted = ((teacher.detach().float() - center) / teacher_temp).softmax(-1)
    found = (student.float() / student_temp).log_softmax(-1)
    # All crops but the teacher's own, in one product for each of the teacher's.
    others = found.sum(0) - found[: len(wanted)]
    pairs = len(wanted) * (len(found) - 1)
    return -(wanted * others).sum(-1).mean(1).sum() / pairs


class DINOHead(nn.Module):
    """Three layers to a narrow unit vector, and its cosines with K unit vectors.

    Args:
        in_dim: width of the features.
        out_dim: K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: of the unit vectors.
        norm_last_layer: whether the K vectors stay of length one; else each learns its length.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        layer: Any
        for layer in self.mlp[::2]:
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(nn.Linear(bottleneck_dim, out_dim, bias=False).weight.detach())
        self.lengths = None if norm_last_layer else nn.Parameter(torch.ones(out_dim, 1))
        self.frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (..., K) of features (..., C)."""
        weight = F.normalize(self.prototypes, dim=-1)
        if self.lengths is not None:
            weight = weight * self.lengths
        if self.frozen:
            # A gradient of zero in place of none, which is an error among several processes.
            weight = weight.detach() + 0 * weight
        return F.linear(F.normalize(self.mlp(x), dim=-1), weight)


class DINO(Method):
    """Train ``model`` without labels, to say of small crops what its moving average says of large ones.

    The model's classifier, if it has one, is trained as a probe: on features of the large crops, to which it sends no
    gradient. The student ships, as the model of every method does; ``train.ema`` ships its average. The weight decay
    that rises along a cosine in the published recipe is the recipe's here, and constant.

    Args:
        model: with timm's surface, and one linear classifier or none.
        local_crops: small crops of each image.
        out_dim, hidden_dim, bottleneck_dim, norm_last_layer: as for ``DINOHead``; the published 65,536 outputs are for
            large data: some thousands do for small ones.
        student_temp: temperature of the student.
        teacher_temp: of the teacher, once it is warm.
        warmup_teacher_temp: of the teacher at the start.
        warmup: share of training over which the teacher's temperature moves from one to the other, in [0, 1].
        momentum: of the teacher's average at the start, in [0, 1]; it rises to 1 along a cosine.
        center_momentum: of the centre's average, in [0, 1].
        freeze_last_layer: share of training for which the last layer stays as it is, in [0, 1]; published is one epoch
            of a hundred.
        multilabel: of the probe: several labels per image.

    Raises:
        InputError: a number out of its range, or a model with another kind of classifier.

    Example:
        vitrail fit --set model.name=xcit_nano --set method.name=xcit:DINO --set method.options.out_dim=4096
    """

    views: ClassVar[Mapping[str, str]] = _views(8)

    center: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        local_crops: int = 8,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        warmup: float = 0.0,
        momentum: float = 0.996,
        center_momentum: float = 0.9,
        freeze_last_layer: float = 0.01,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model)
        _refuse("local_crops", local_crops, 0, math.inf)
        for name, size in (("out_dim", out_dim), ("hidden_dim", hidden_dim), ("bottleneck_dim", bottleneck_dim)):
            _refuse(name, size, 1, math.inf)
        temperatures = {"student_temp": student_temp, "teacher_temp": teacher_temp}
        for name, value in {**temperatures, "warmup_teacher_temp": warmup_teacher_temp}.items():
            _refuse(name, value, 1e-6, math.inf)
        shares = {"warmup": warmup, "momentum": momentum, "center_momentum": center_momentum}
        for name, value in {**shares, "freeze_last_layer": freeze_last_layer}.items():
            _refuse(name, value, 0, 1)
        surface: Any = model
        classifier = surface.get_classifier()
        if not isinstance(classifier, nn.Linear | nn.Identity):
            raise InputError(
                f"DINO: the classifier of {type(model).__name__} is a {type(classifier).__name__}, and the probe needs "
                "one linear layer: give model.num_classes = 0, or another model"
            )
        self.probed = isinstance(classifier, nn.Linear)
        self.views = _views(local_crops)  # type: ignore[misc]  # the class has those of the default
        width = getattr(surface, "head_hidden_size", None) or surface.num_features
        self.head = DINOHead(
            width, out_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, norm_last_layer=norm_last_layer
        )
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.student_temp, self.temperatures, self.warmup = student_temp, (warmup_teacher_temp, teacher_temp), warmup
        self.first_momentum, self.center_momentum = momentum, center_momentum
        self.freeze_last_layer, self.multilabel = freeze_last_layer, multilabel
        self.register_buffer("center", torch.zeros(out_dim))
        # Of this process and step: no buffer, which the processes would share.
        self.answers: list[Tensor] = []
        self.schedule(0.0)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the student; of the teacher only batch normalisation sees the statistics of a batch."""
        super().train(mode)
        for module in self.teacher.modules():
            module.training = mode and isinstance(module, _BatchNorm)
        return self

    def schedule(self, progress: float) -> None:
        """Set the teacher's temperature and momentum, and whether the last layer learns."""
        start, end = self.temperatures
        self.teacher_temp = start + (end - start) * progress / self.warmup if progress < self.warmup else end
        self.momentum = 1 - (1 - self.first_momentum) * (1 + math.cos(math.pi * progress)) / 2
        self.head.frozen = progress < self.freeze_last_layer

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` for the crops, and its terms ``dino`` and, of the classifier, ``probe`` for ``target``."""
        large = torch.cat([batch[name] for name in LARGE])
        small = [batch[name] for name in self.views if name not in LARGE]
        with torch.no_grad():
            teacher = self.teacher_head(_features(self.teacher, large)).float()
            if self.training:
                self.answers.append(F.pad(teacher, (0, 1), value=1.0).sum(0))  # their sum and their number
        features = _features(self.model, large)
        crops = [features] + ([_features(self.model, torch.cat(small))] if small else [])
        student = self.head(torch.cat(crops))
        dino = dino_loss(
            student.unflatten(0, (len(self.views), -1)),
            teacher.unflatten(0, (len(LARGE), -1)),
            self.center,
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp,
        )
        if not self.probed:
            return {"loss": dino}
        surface: Any = self.model
        logits = surface.get_classifier()(features.detach())
        target = torch.cat([batch["target"]] * len(LARGE))
        probe = supervised_loss(logits, target, multilabel=self.multilabel)
        return {"loss": dino + probe, "dino": dino.detach(), "probe": probe.detach()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the centre towards the teacher's mean answer, and the teacher towards the student."""
        counted = torch.stack([self.center.new_zeros(len(self.center) + 1), *self.answers]).sum(0)
        self.answers.clear()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counted)
        if counted[-1]:
            self.center.lerp_(counted[:-1] / counted[-1], 1 - self.center_momentum)
        students: list[Tensor] = [*self.model.parameters(), *self.head.parameters()]
        teachers: list[Tensor] = [*self.teacher.parameters(), *self.teacher_head.parameters()]
        torch._foreach_lerp_(teachers, students, 1 - self.momentum)


def _features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a model's classifier sees, (B, C)."""
    surface: Any = model
    found: Tensor = surface.forward_head(surface.forward_features(images), pre_logits=True)
    return found


def _refuse(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        allowed = f"{least:g} or more" if math.isinf(most) else f"a number from {least:g} to {most:g}"
        raise InputError(f"method.options.{name} = {value} is not allowed: give {allowed}")
