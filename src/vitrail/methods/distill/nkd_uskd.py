"""Distillation with normalised non-target classes: NKD learns from a teacher, USKD from the student itself.

Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
Customized Soft Labels" (ICCV 2023). Both add to the cross-entropy a term for the target class and one for the other
classes, whose probabilities are normalised without the target. NKD takes both soft labels from a teacher. USKD makes
them up: the target's from the student's own confidence, the others' by Zipf's law from the ranks that the student and a
weak classifier on an intermediate feature give them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.distill.teacher import TaughtMethod
from vitrail.methods.method import Batch, Method

WEAK_SMOOTHING = 0.1
"""Label smoothing of the weak classifier's own loss, as published."""


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """Return the NKD loss, to be added to the cross-entropy, as a mean over the images.

    With S and T the probabilities of student and teacher, t the target and N(.) the softmax at the temperature lambda
    without the target: -T_t log S_t - gamma lambda^2 sum_{i != t} N(T_i) log N(S_i).

    Args:
        student_logits: (B, C), any floating type; computed in float32 at least.
        teacher_logits: (B, C); no gradient goes into them.
        target: class numbers (B,), or probabilities (B, C), of which the largest names the target, as published.
        gamma: weight of the non-target term, from 0; published: 1.5 on ImageNet, 3.5 on CIFAR-100, 1 for DeiT.
        temperature: lambda, above 0; published: 1 on ImageNet, 3 on CIFAR-100.

    Returns:
        A scalar.

    Raises:
        InputError: shapes that differ, class numbers that are no integers, or a temperature of 0 or below.
    """
    _check_shapes(student_logits, target, teacher_logits=teacher_logits)
    if not temperature > 0:
        raise InputError(f"temperature = {temperature} is not allowed: give a number above 0")
    student, teacher = _exact(student_logits), _exact(teacher_logits).detach()
    label = (target.long() if target.ndim == 1 else target.argmax(1))[:, None]  # (B, 1)
    of_target = -teacher.softmax(1).gather(1, label) * student.log_softmax(1).gather(1, label)  # (B, 1)
    hidden = torch.zeros_like(student, dtype=torch.bool).scatter(1, label, True)
    soft = (teacher / temperature).masked_fill(hidden, -torch.inf).softmax(1)
    of_others = -(soft * _log_softmax_without(student / temperature, hidden)).sum(1)
    return of_target.mean() + gamma * temperature**2 * of_others.mean()


def uskd_loss(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    mean_square: Tensor | None = None,
) -> Tensor:
    """Return the USKD loss, to be added to the cross-entropy, as a mean over the images.

    With S and W the probabilities of student and weak classifier and V_t the target's share of the label:
    alpha (-P_t log S_t) + beta (-sum_{i != t} Z_i log N(S_i)) + mu (cross-entropy of W), where P_t = V_t + S_t^2 - mean
    of S_t^2 over the batch, N(.) is the softmax without the target, and Z_i is 1 / rank, normalised likewise. The loss
    of the weak classifier trains the student up to its feature, too, as published.

    Args:
        student_logits: (B, C), any floating type; computed in float32 at least.
        weak_logits: (B, C), of the weak classifier.
        target: class numbers (B,), or probabilities (B, C), of which the largest two are targets, as published.
        alpha: weight of the target term, from 0; published: 1 on ImageNet, 0.1 on CIFAR-100.
        beta: weight of the non-target term, from 0; published: 0.1.
        mu: weight of the weak classifier's loss, from 0; published: 0.005 on ImageNet, 0.1 on CIFAR-100.
        mean_square: mean of S_t^2 over a larger batch of which this is a part, (K,) for K = 1 target per image or, with
            probabilities, 2; None takes the mean over this batch. The parts' losses then average to the whole one's.

    Returns:
        A scalar.

    Raises:
        InputError: shapes that differ, or class numbers that are no integers.
    """
    _check_shapes(student_logits, target, weak_logits=weak_logits)
    student, weak = _exact(student_logits), _exact(weak_logits)
    log_s = student.log_softmax(1)
    label, share = _targets(target)  # (B, K)
    if mean_square is not None and mean_square.shape != label.shape[1:]:
        raise InputError(f"mean_square {tuple(mean_square.shape)} is not allowed: give ({label.shape[1]},)")
    present = share > 0
    hidden = torch.zeros_like(student, dtype=torch.bool).scatter(1, label, present)

    log_s_t = log_s.gather(1, label).where(present, 0)
    with torch.no_grad():
        squares = target_squares(student, target)
        soft_t = share + squares - (squares.mean(0) if mean_square is None else mean_square)
        soft_t = soft_t.to(student.dtype)
        zipf = 1 / _ranks(log_s, weak.softmax(1), hidden)
        zipf = zipf.to(student.dtype).masked_fill(hidden, 0)
        zipf = zipf / zipf.sum(1, keepdim=True).clamp_min(torch.finfo(zipf.dtype).tiny)  # none are left of two targets
    of_target = -(soft_t * log_s_t).sum(1)
    of_others = -(zipf * _log_softmax_without(student, hidden)).sum(1)
    weak_target = target.long() if target.ndim == 1 else target.to(weak)
    of_weak = F.cross_entropy(weak, weak_target, label_smoothing=WEAK_SMOOTHING)
    return alpha * of_target.mean() + beta * of_others.mean() + mu * of_weak


def target_squares(student_logits: Tensor, target: Tensor) -> Tensor:
    """Return the squared probability of every target, (B, 1) or, for probabilities as targets, (B, 2).

    Where a label has one class only, the second is 0; the published code takes any class there.
    """
    label, share = _targets(target)
    return (_exact(student_logits).softmax(1).gather(1, label) ** 2).where(share > 0, 0)


def _targets(target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target classes and their shares, both (B, K)."""
    if target.ndim == 1:
        return target.long()[:, None], torch.ones_like(target)[:, None]
    share, label = target.topk(2, dim=1)
    return label, share


def _ranks(log_s: Tensor, w: Tensor, hidden: Tensor) -> Tensor:
    """Return the rank of every class, from 1, by the student's and the weak classifier's opinion, (B, C)."""
    s_t = (log_s * hidden).sum(1, keepdim=True)
    w_t = (w * hidden).sum(1, keepdim=True)
    # As the published code has it: probabilities of the weak classifier, but logarithms of the student's, whose opinion
    # weighs more for it.
    score = w / (1 - w_t + 1e-6) + log_s / (1 - s_t + 1e-6)
    # The targets take part, so that the best of the other classes is at rank 2 where the target leads.
    return score.argsort(dim=1, descending=True).argsort(dim=1) + 1


def _log_softmax_without(logits: Tensor, hidden: Tensor) -> Tensor:
    """Return the logarithm of the softmax over the classes that are not hidden, and 0 for those that are."""
    return logits.masked_fill(hidden, -torch.inf).log_softmax(1).masked_fill(hidden, 0)


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_shapes(student_logits: Tensor, target: Tensor, **others: Tensor) -> None:
    shape = tuple(student_logits.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise InputError(f"student_logits {shape} are not allowed: give (B, C) of at least 2 classes")
    for name, other in others.items():
        if tuple(other.shape) != shape:
            raise InputError(f"{name} {tuple(other.shape)} and student_logits {shape} differ: both have to be (B, C)")
    if target.shape == shape[:1] and (target.is_floating_point() or target.dtype == torch.bool):
        raise InputError(f"targets {shape[:1]} of {target.dtype} are not allowed: class numbers are integers")
    if tuple(target.shape) not in (shape, shape[:1]):
        raise InputError(
            f"targets {tuple(target.shape)} do not fit student_logits {shape}: give class numbers (B,) or "
            "probabilities (B, C)"
        )


class NKD(TaughtMethod):
    """Train ``model`` by cross-entropy and the NKD loss against a teacher, of which ``TaughtMethod`` tells.

    Args:
        model: the student; returns logits (B, C).
        teacher: returns logits (B, C) of the same classes; in a recipe, the path of its run folder.
        gamma: weight of the non-target term, from 0.
        temperature: of the non-target term, above 0.
        smoothing: label smoothing of the cross-entropy, in [0, 1).
        multilabel: refused, as the loss is of one label per image.

    Raises:
        InputError: an argument out of range, several labels per image, or no teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        gamma: float = 1.5,
        temperature: float = 1.0,
        smoothing: float = 0.0,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model, teacher, otherwise="nkd_uskd")
        _check_options("NKD", multilabel, smoothing, gamma=gamma)
        if not (_is_number(temperature) and 0 < temperature < float("inf")):
            raise InputError(f"method.options.temperature = {temperature!r} is not allowed: give a number above 0")
        self.gamma, self.temperature, self.smoothing = gamma, temperature, smoothing

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``supervised`` and ``nkd`` for ``image`` (B, 3, H, W) and ``target``."""
        images, target = batch["image"], batch["target"]
        with torch.no_grad():
            soft = self.teacher(images)
        logits = self.model(images)
        supervised = _cross_entropy(logits, target, self.smoothing)
        nkd = nkd_loss(logits, soft, target, gamma=self.gamma, temperature=self.temperature)
        return {"loss": supervised + nkd, "supervised": supervised.detach(), "nkd": nkd.detach()}


class USKD(Method):
    """Train ``model`` by cross-entropy and the USKD loss, without a teacher.

    The weak classifier is one linear layer on an intermediate feature, trained along, and does not ship. Of a network
    in stages the feature is the last level before the one that the head reads, averaged over its places (ResNet: the
    third stage). Of a network whose levels are all alike, as a ViT, it is the class token after the middle block, or
    the mean over the tokens where there is no class token.

    Args:
        model: the student; returns logits (B, C) and has timm's ``feature_info`` and ``num_classes``.
        alpha: weight of the target term, from 0.
        beta: weight of the non-target term, from 0.
        mu: weight of the weak classifier's loss, from 0.
        level: index into ``feature_info`` of the feature, if not the above; may be negative.
        smoothing: label smoothing of the cross-entropy, in [0, 1).
        multilabel: refused, as the loss is of one label per image.

    Raises:
        InputError: an argument out of range, several labels per image, or a model without intermediate features.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        level: int | None = None,
        smoothing: float = 0.0,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model)
        _check_options("USKD", multilabel, smoothing, alpha=alpha, beta=beta, mu=mu)
        self.alpha, self.beta, self.mu, self.smoothing = alpha, beta, mu, smoothing
        levels = _levels(model)
        if level is None:
            level = _middle(levels, getattr(model, "num_features", None))
        elif not isinstance(level, int) or not -len(levels) <= level < len(levels):
            raise InputError(
                f"method.options.level = {level!r} is not allowed: {type(model).__name__} has {len(levels)} levels, "
                f"numbered from 0; give one of them"
            )
        self.feature: str = levels[level]["module"]
        place = next(model.parameters())
        classes = int(getattr(model, "num_classes"))  # noqa: B009 - nn.Module types its attributes as modules
        self.weak = nn.Linear(levels[level]["num_chs"], classes, device=place.device)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``supervised`` and ``uskd`` for ``image`` (B, 3, H, W) and ``target``."""
        target = batch["target"]
        logits, feature = self._forward(batch["image"])
        supervised = _cross_entropy(logits, target, self.smoothing)
        uskd = uskd_loss(
            logits,
            self.weak(feature),
            target,
            alpha=self.alpha,
            beta=self.beta,
            mu=self.mu,
            mean_square=_joint_mean(target_squares(logits.detach(), target)),
        )
        return {"loss": supervised + uskd, "supervised": supervised.detach(), "uskd": uskd.detach()}

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, C) and the pooled feature (B, D)."""
        outputs: list[Tensor] = []
        # The hook lives for this call only, so that copies of the model do not carry it.
        hook = self.model.get_submodule(self.feature).register_forward_hook(lambda _m, _i, out: outputs.append(out))
        try:
            logits = self.model(images)
        finally:
            hook.remove()
        if not outputs:
            raise InputError(
                f"USKD: {type(self.model).__name__} went past its layer {self.feature!r} in training; "
                "set train.grad_checkpointing=false, or choose another feature by method.options.level"
            )
        if not isinstance(outputs[0], Tensor) or outputs[0].ndim not in (3, 4):
            raise InputError(
                f"USKD: the layer {self.feature!r} of {type(self.model).__name__} does not give one map of features: "
                "choose another by method.options.level"
            )
        return logits, _pooled(self.model, outputs[0])


def _cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    logits = logits.float()
    return F.cross_entropy(logits, target if target.ndim == 1 else target.to(logits), label_smoothing=smoothing)


def _joint_mean(values: Tensor) -> Tensor:
    """Return the mean (K,) of values (B, K) over the images of all processes, whose numbers may differ."""
    sums = torch.cat([values.sum(0), values.new_tensor([len(values)])])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums[:-1] / sums[-1]


def _levels(model: nn.Module) -> list[dict[str, Any]]:
    """Return the entries of the model's ``feature_info`` whose module exists."""
    known = dict(model.named_modules())
    info: Any = getattr(model, "feature_info", None) or []
    levels = [entry for entry in info if entry.get("module") in known]
    if len(levels) < 2 or not hasattr(model, "num_classes"):
        raise InputError(
            f"USKD needs intermediate features, and {type(model).__name__} names "
            f"{len(levels) or 'none'} in feature_info: use a model of timm or Vitrail"
        )
    return levels


def _middle(levels: list[dict[str, Any]], width: int | None) -> int:
    """Return the number of the level that feeds the weak classifier."""
    if len({(entry["num_chs"], entry.get("reduction")) for entry in levels}) == 1:
        return max(len(levels) // 2 - 1, 0)
    # A convolution may widen the last level for the head (MobileNetV2: 320 to 1280); it then is the level before.
    return len(levels) - (2 if levels[-1]["num_chs"] == width else 1)


def _pooled(model: Any, feature: Tensor) -> Tensor:
    """Return (B, D) of a feature map or of tokens."""
    if feature.ndim == 4:
        return feature.mean((1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3))
    return feature[:, 0] if getattr(model, "cls_token", None) is not None else feature.mean(1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _check_options(name: str, multilabel: bool, smoothing: float, **weights: float) -> None:
    if multilabel:
        raise InputError(
            f"{name} is for one label per image, and these data have several: use method.name='supervised'"
        )
    if not (_is_number(smoothing) and 0 <= smoothing < 1):
        raise InputError(f"method.options.smoothing = {smoothing!r} is not allowed: give a number in [0, 1)")
    for key, weight in weights.items():
        if not (_is_number(weight) and 0 <= weight < float("inf")):
            raise InputError(f"method.options.{key} = {weight!r} is not allowed: give a finite number from 0")
