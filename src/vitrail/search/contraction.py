"""Progressive contraction: a large net becomes a small one in steps, each under limits, by making factors smaller.

Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers" (ECCV 2022), arXiv 2207.10666, section
3.2, which names the factors and describes the search; no code of it is published. Around the present net, smaller ones
are made by lowering factors; those within the limits of the step, on parameters and on throughput, are trained a
little, and the most accurate is where the next step begins, until the limits that were asked for are met.

    name = "tiny_vit_21m_224"
    steps = contract(
        Factors(),  # TinyViT-21M's
        Limits(params=5.4e6, throughput=20.0),
        partial(parameters, name),
        partial(throughput, name, size=224),
        score=validation_accuracy,  # of factors
    )
    create_model(name, num_classes=1000, **steps[-1].best.factors.options())
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vitrail.errors import InputError
from vitrail.models import create_model

SMALLEST_HEAD = 8
"""Channels of a head below which it is not narrowed."""


@dataclass(frozen=True)
class Factors:
    """What is contracted of a net whose first stage is of convolutions and whose others have attention in windows.

    The defaults are TinyViT-21M's; those of the paper's other nets differ in the widths alone.

    Args:
        embed_dims: width of each stage (gamma_D); a multiple of ``head_dim`` behind the first.
        depths: blocks of each stage (gamma_N).
        window_sizes: side of the windows of each stage, in places (gamma_W); that of the first is not used.
        conv_ratio: hidden width of a convolutional block over the stage's (gamma_R), 1 or more.
        mlp_ratio: hidden width of a feed-forward layer over the stage's (gamma_M), 1 or more.
        head_dim: channels of a head (gamma_E); where it falls, there are more heads.

    Raises:
        InputError: values of several numbers of stages, below 1, or widths that heads do not divide.
    """

    embed_dims: tuple[int, ...] = (96, 192, 384, 576)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    conv_ratio: float = 4.0
    mlp_ratio: float = 4.0
    head_dim: int = 32

    def __post_init__(self) -> None:
        stages = (self.embed_dims, self.depths, self.window_sizes)
        if len({len(values) for values in stages}) != 1 or not self.embed_dims:
            raise InputError(
                f"embed_dims = {self.embed_dims}, depths = {self.depths} and window_sizes = {self.window_sizes} are of "
                "several lengths: give one of each for every stage"
            )
        least = min(*self.embed_dims, *self.depths, *self.window_sizes, self.conv_ratio, self.mlp_ratio, self.head_dim)
        if least < 1:
            raise InputError(f"a factor of {least} is not allowed: give 1 or more")
        for width in self.embed_dims[1:]:
            if width % self.head_dim:
                raise InputError(
                    f"head_dim = {self.head_dim} does not divide a width of {width}: give a divisor of all but the "
                    "first"
                )

    def options(self) -> dict[str, Any]:
        """Return the arguments of timm's ``tiny_vit_*`` and of ``tinyvit_nano`` that make this net."""
        return {
            "embed_dims": self.embed_dims,
            "depths": self.depths,
            "num_heads": tuple(max(1, width // self.head_dim) for width in self.embed_dims),
            "window_sizes": self.window_sizes,
            "mbconv_expand_ratio": self.conv_ratio,
            "mlp_ratio": self.mlp_ratio,
        }

    def smaller(self) -> list[Factors]:
        """Return the nets of which one factor is one notch lower.

        A width falls by the channels of a head, a depth by a block, a window to half its side, a ratio by one, and the
        channels of a head to half. No factor falls below 1, a head not below ``SMALLEST_HEAD`` channels, and no stage
        becomes narrower than the one before it.
        """
        found = []
        for place, (width, depth, window) in enumerate(zip(self.embed_dims, self.depths, self.window_sizes)):
            before = self.embed_dims[place - 1] if place else 1
            if width - self.head_dim >= before:
                found.append(replace(self, embed_dims=_with(self.embed_dims, place, width - self.head_dim)))
            if depth > 1:
                found.append(replace(self, depths=_with(self.depths, place, depth - 1)))
            if place and window > 1:
                found.append(replace(self, window_sizes=_with(self.window_sizes, place, math.ceil(window / 2))))
        if self.conv_ratio >= 2:
            found.append(replace(self, conv_ratio=self.conv_ratio - 1))
        if self.mlp_ratio >= 2:
            found.append(replace(self, mlp_ratio=self.mlp_ratio - 1))
        if self.head_dim % 2 == 0 and self.head_dim // 2 >= SMALLEST_HEAD:
            found.append(replace(self, head_dim=self.head_dim // 2))
        return found


def _with(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


# ---- limits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a net may cost.

    Args:
        params: most parameters.
        throughput: least images a second.
    """

    params: float
    throughput: float = 0.0


def limits_between(start: Limits, target: Limits, steps: int) -> list[Limits]:
    """Return the limits of each step: from what the large net costs to the target, by equal factors.

    Args:
        start: what the large net costs.
        target: of the last step.
        steps: how many, 1 or more.

    Raises:
        InputError: no step, or a target of no parameters.
    """
    if steps < 1 or target.params < 1:
        raise InputError(f"steps = {steps} to params = {target.params} is not allowed: give 1 or more of both")
    found = []
    for step in range(1, steps):
        share = step / steps
        params = max(start.params, target.params) ** (1 - share) * target.params**share
        speed = min(start.throughput, target.throughput) ** (1 - share) * target.throughput**share
        found.append(Limits(params, speed))
    return [*found, target]


def parameters(name: str, factors: Factors) -> int:
    """Return the number of parameters.

    Args:
        name: of a model that takes ``factors.options()``, such as ``"tinyvit_nano"``.
        factors: of the net.
    """
    return sum(
        parameter.numel() for parameter in create_model(name, num_classes=1000, **factors.options()).parameters()
    )


def throughput(name: str, factors: Factors, *, size: int, batch: int = 8, rounds: int = 5) -> float:
    """Return the images a second of a model on this machine's CPU.

    Args:
        name, factors: as for ``parameters``.
        size: side of the images, in pixels.
        batch: images at a time.
        rounds: passes that are timed, of which the fastest counts: what else the machine does only slows them.
    """
    model = create_model(name, num_classes=1000, **factors.options()).eval()
    images, seconds = torch.zeros(batch, 3, size, size), math.inf
    with torch.inference_mode():
        model(images)
        for _ in range(rounds):
            begun = time.perf_counter()
            model(images)
            seconds = min(seconds, time.perf_counter() - begun)
    return batch / seconds


# ---- the search ------------------------------------------------------------------------------------------------------


Count = Callable[[Factors], float]


@dataclass(frozen=True)
class Candidate:
    """A net that keeps the limits of a step.

    Attributes:
        factors: of it.
        score: as given; NaN counts as worse than any.
    """

    factors: Factors
    score: float


@dataclass(frozen=True)
class Step:
    """A step of the contraction.

    Attributes:
        limits: of the step.
        candidates: that were scored.
    """

    limits: Limits
    candidates: Sequence[Candidate]

    @property
    def best(self) -> Candidate:
        """The first of those with the highest score."""
        return max(self.candidates, key=lambda one: -math.inf if math.isnan(one.score) else one.score)


def propose(
    current: Factors,
    limits: Limits,
    params: Count,
    speed: Count,
    count: int,
    rng: np.random.Generator,
    *,
    tries: int = 8,
) -> list[Factors]:
    """Return different nets, each made from ``current`` by lowering factors at random until it keeps the limits.

    A walk stops at the first net within the limits, so that the candidates lie close to them.

    Args:
        current: where each begins.
        limits: to keep.
        params: the parameters of a net.
        speed: its images a second; asked only of nets with few enough parameters.
        count: how many to return, at most.
        rng: draws a factor for each notch.
        tries: walks per candidate, of which those that end at a known net or at the smallest are lost.
    """
    found: list[Factors] = []
    known: dict[Factors, bool] = {}
    for _ in range(count * tries):
        net = current
        while True:
            if net not in known:
                known[net] = params(net) <= limits.params and speed(net) >= limits.throughput
            ways = net.smaller()
            if known[net] or not ways:
                break
            net = ways[int(rng.integers(len(ways)))]
        if known[net] and net not in found:
            found.append(net)
        if len(found) == count:
            break
    return found


def contract(
    start: Factors,
    target: Limits,
    params: Count,
    speed: Count,
    score: Count,
    *,
    steps: int = 2,
    candidates: int = 8,
    seed: int = 0,
) -> list[Step]:
    """Contract a large net step by step; the last step's ``best`` keeps ``target``.

    Args:
        start: the large net.
        target: limits of the last step; those of the others lie between, by ``limits_between``.
        params: the parameters of a net, such as ``functools.partial(parameters, "tinyvit_nano")``.
        speed: its images a second, such as ``functools.partial(throughput, "tinyvit_nano", size=32)``.
        score: how good a net is, such as its accuracy on validation images after a short training; higher is better.
        steps: of the contraction; 1 goes to the target at once.
        candidates: scored in each step, at most.
        seed: of the random choices.

    Raises:
        InputError: no step or no candidate, or limits that no net was found to keep.
    """
    if candidates < 1:
        raise InputError(f"candidates = {candidates} is not allowed: give 1 or more")
    rng = np.random.default_rng(seed)
    current, done = start, []
    for limits in limits_between(Limits(params(start), speed(start)), target, steps):
        nets = propose(current, limits, params, speed, candidates, rng)
        if not nets:
            raise InputError(
                f"no net of at most {limits.params:,.0f} parameters and at least {limits.throughput:,.1f} images a "
                f"second was found below {current}: give wider limits or a smaller start"
            )
        done.append(Step(limits, [Candidate(net, score(net)) for net in nets]))
        current = done[-1].best.factors
    return done
