"""Optimiser groups and the learning-rate plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.methods.method import Method
from vitrail.training.device import resolved
from vitrail.training.recipe import OptimConfig

Group = dict[str, Any]


def param_groups(method: Method, config: OptimConfig) -> list[Group]:
    """Return optimiser groups that hold every trainable parameter of ``method`` once.

    Biases, the parameters of normalisations (all of one dimension or none) and those of ``model.no_weight_decay()`` are
    not decayed. With ``layer_decay`` a group carries ``lr_scale``, by timm's grouping of the model's layers. What
    ``method.param_groups()`` claims, and after it that of any module in it that has such a function, is taken as it is;
    only what is frozen or claimed already is left out. See ``create_optimizer`` for a group with its own optimiser.
    """
    groups: list[Group] = []
    taken: set[int] = set()

    def claim(claimed: Iterable[Group]) -> None:
        before = frozenset(taken)  # who claims a parameter twice in one go hears of it from torch
        for group in claimed:
            parameters = _as_list(group["params"])
            rest = [each for each in parameters if id(each) not in before and each.requires_grad]
            taken.update(map(id, rest))
            if rest:
                groups.append({**group, "params": rest})

    for module in method.modules():
        claim(getattr(module, "param_groups", tuple)() or ())
    decay = config.weight_decay
    keep: set[str] = getattr(method.model, "no_weight_decay", set)()
    if config.layer_decay < 1:
        defaults = param_groups_layer_decay(
            method.model, decay, no_weight_decay_list=keep, layer_decay=config.layer_decay
        )
    else:
        defaults = param_groups_weight_decay(method.model, decay, no_weight_decay_list=keep)
    claim(defaults)
    claim(param_groups_weight_decay(method, decay))
    if not groups:
        raise InputError("nothing to train: every parameter of the model is frozen; unfreeze some of them")
    return groups


def _as_list(parameters: nn.Parameter | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)


def create_optimizer(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """Build the timm optimiser ``config.name`` on ``groups``.

    A group that names another ``"optimizer"``, a class or function called as ``optimizer([group], lr=...)``, gets that.

    Raises:
        InputError: no such optimiser, or a setting that it does not take.
    """
    names = [str(name) for name in list_optimizers()]
    name = config.name.lower()
    if name.removeprefix("lookahead_") not in names:
        raise unknown("optimiser (optim.name)", config.name, names)
    info = get_optimizer_info(name.removeprefix("lookahead_"))
    options: dict[str, Any] = {}
    for key, value, known in (
        ("betas", config.betas, info.has_betas),
        ("momentum", config.momentum, info.has_momentum),
    ):
        if value is not None and not known:
            raise InputError(f"optim.{key} = {value} is given, but the optimiser {config.name} has none; leave it out")
        if value is not None:
            options[key] = value
    lr = resolved(config.lr)
    plain = [group for group in groups if "optimizer" not in group]
    own = [dict(group) for group in groups if "optimizer" in group]
    parts: list[torch.optim.Optimizer] = []
    try:
        if plain:
            parts = [create_optimizer_v2(plain, opt=name, lr=lr, weight_decay=config.weight_decay, **options)]
    except TypeError as error:
        raise InputError(f"the optimiser {config.name} does not take what [optim] gives it: {error}") from None
    parts += [group.pop("optimizer")([group], lr=lr) for group in own]
    return parts[0] if len(parts) == 1 else JointOptimizer(parts)


class JointOptimizer(torch.optim.Optimizer):
    """Several optimisers, each of parameters of its own, that act as one."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        # The base is not initialised: it would keep groups of its own, and the parts renew theirs on loading a state.
        self.parts = list(parts)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """Every part's groups, in their order."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """What the parts know of each parameter."""
        return {key: value for part in self.parts for key, value in part.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step all; the gradients are there already, so that no ``closure`` is taken."""
        for part in self.parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return one state per part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give every part its state back."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group to ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(progress: float, *, peak: float, warmup: float, floor: float) -> float:
    """Return the learning rate at ``progress`` of training: linear warm-up, then a cosine.

    Loshchilov and Hutter, "SGDR" (2017), without restarts.

    Args:
        progress: 0 to 1; 1 at the last step.
        peak: largest rate.
        warmup: share of training over which the rate rises, 0 to 1.
        floor: rate at the end, as a share of the peak.
    """
    if progress < warmup:
        return peak * progress / warmup
    done = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Plan:
    """How far training has come after each step: straight lines between (step, progress) points.

    A plan that does not fit the deadline is bent, never broken: the learning rate stays continuous and still
    falls to its minimum at the last step.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, total: int) -> Plan:
        """Return the plan of ``total`` equal steps."""
        return cls(((0, 0.0), (total, 1.0)))

    @property
    def total(self) -> int:
        """The number of steps."""
        return self.points[-1][0]

    def progress(self, step: int) -> float:
        """Return the share of training that lies behind when ``step`` steps are done, 0 to 1."""
        steps, shares = zip(*self.points)
        return float(np.interp(step, steps, shares))

    def bent(self, step: int, total: int) -> Plan:
        """Return the plan that leaves its present course at ``step`` and ends at ``total``, at least ``step``."""
        past = tuple(point for point in self.points if point[0] < step)
        bend = ((step, self.progress(step)),) if step < total else ()
        return Plan((*past, *bend, (total, 1.0)))
