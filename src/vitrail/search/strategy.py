"""The contracts of architecture search: a ``Space`` of what there is, a ``Strategy`` that says what to try next.

An architecture is plain values, so that what was found is saved in a recipe and built without any of this. Its reward
is whatever the caller measures: the accuracy of a net that was trained for a short while, or that less its cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import nn

from vitrail.errors import InputError

Architecture = dict[str, Any]
"""Plain values: numbers, texts, lists and tables of them."""


class Cost(NamedTuple):
    """What a net takes: parameters, and multiply-adds for an image."""

    params: int
    madds: int


class Space(Protocol):
    """What there is to choose from: a sequence of decisions, each with a number of options."""

    @property
    def choices(self) -> tuple[int, ...]:
        """How many options each decision has."""

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Draw each decision alike from its options."""

    def encode(self, architecture: Architecture) -> tuple[int, ...]:
        """Return the option that each decision took."""

    def decode(self, code: Sequence[int]) -> Architecture:
        """Return the architecture of these options."""

    def mutate(self, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        """Return another architecture, which differs in one decision."""

    def cost(self, architecture: Architecture) -> Cost:
        """Count what its net takes."""

    def build(self, architecture: Architecture, **options: Any) -> nn.Module:
        """Return its net, as a plain model with weights that have yet to be trained."""


@dataclass(frozen=True)
class Trial:
    """An architecture and its reward."""

    architecture: Architecture
    reward: float


class Strategy(Protocol):
    """What says what to try next."""

    def ask(self, count: int) -> list[Architecture]:
        """Return so many architectures to try."""

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn from the rewards of what was asked for last."""


class RandomSearch:
    """Draw each decision alike from its options: what a strategy has to beat.

    Args:
        space: to draw from.
        seed: of the draws.
    """

    def __init__(self, space: Space, *, seed: int = 0) -> None:
        self.space, self.rng = space, np.random.default_rng(seed)

    def ask(self, count: int) -> list[Architecture]:
        """Return so many architectures."""
        return [self.space.sample(self.rng) for _ in range(count)]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn nothing."""


def search(strategy: Strategy, reward: Callable[[Architecture], float], *, trials: int, batch: int = 1) -> list[Trial]:
    """Try what a strategy asks for, and return all that was tried, in order.

    Args:
        strategy: says what to try.
        reward: of an architecture, a finite number; higher is better.
        trials: how many, 1 or more.
        batch: how many are tried before the strategy learns of them, 1 or more.

    Raises:
        InputError: a number out of range, or a reward that is not finite.

    Example:
        found = best(search(RandomSearch(CellSpace()), reward, trials=20))
    """
    if trials < 1 or batch < 1:
        raise InputError(f"search: trials = {trials}, batch = {batch} is not allowed: give 1 or more of each")
    done: list[Trial] = []
    while len(done) < trials:
        asked = strategy.ask(min(batch, trials - len(done)))
        told = [Trial(architecture, float(reward(architecture))) for architecture in asked]
        for trial in told:
            if not math.isfinite(trial.reward):
                raise InputError(
                    f"search: the reward {trial.reward} of {trial.architecture} is not finite: give a number that can "
                    "be compared, such as 0 for what cannot be trained"
                )
        strategy.tell(told)
        done += told
    return done


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial of the highest reward, of equals the first.

    Raises:
        InputError: there is none.
    """
    if not trials:
        raise InputError("search: there are no trials to choose from: give trials = 1 or more")
    return max(trials, key=lambda trial: trial.reward)
