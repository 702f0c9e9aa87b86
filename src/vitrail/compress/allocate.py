"""One choice per layer under shared limits: the budget solver of all quantisation and pruning.

A multiple-choice knapsack with any number of limits, solved exactly by integer programming (HiGHS). What is minimised
and what is limited are the caller's: the loss under a size, the size under a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array, vstack

from vitrail.errors import InputError, VitrailError

Table = Sequence[Sequence[float]]
"""A value for each option of each layer; layers may have different numbers of options."""
TOLERANCE = 1e-9
"""Relative excess over a limit that is rounding, not a violation."""


@dataclass(frozen=True)
class Limit:
    """The sum of the chosen ``costs`` is at most ``most``; ``name`` is for the user, with its unit."""

    name: str
    costs: Table
    most: float


def allocate(objective: Table, limits: Sequence[Limit]) -> list[int]:
    """Return the option of each layer, a number from 0, so that the sum of the objective is least.

    Args:
        objective: what is minimised, finite, for each option of each layer.
        limits: what has to hold; each with costs for the same options.

    Raises:
        InputError: a table that does not fit the objective, or holds a number that is not finite.
        VitrailError: no choice keeps all limits; names the limit and the least that can be had.
    """
    counts = [len(options) for options in objective]
    if not counts or 0 in counts:
        raise InputError("nothing to allocate: give at least one layer, and at least one option for each")
    goal = _flat("the objective", objective, counts)
    rows = [_flat(limit.name, limit.costs, counts) for limit in limits]
    starts = np.cumsum([0, *counts[:-1]])
    for limit, row in zip(limits, rows, strict=True):
        least = float(np.minimum.reduceat(row, starts).sum())
        if least > _slack(limit.most):
            raise VitrailError(f"{limit.name} of at most {limit.most:g} cannot be kept: the least is {least:g}")
    one_each = csr_array(block_diag([np.ones((1, count)) for count in counts]))
    # The solver's tolerances are absolute: each row is brought to the size of its largest entry.
    scales = [max(float(np.abs(row).max()), np.finfo(float).tiny) for row in rows]
    caps = np.array([limit.most / scale for limit, scale in zip(limits, scales, strict=True)])
    weights = [csr_array((row / scale)[None]) for row, scale in zip(rows, scales, strict=True)]
    # Only differences within a layer matter; large, so that the solver's absolute gap (1e-6) is a small share of them.
    goal = goal - np.repeat(np.minimum.reduceat(goal, starts), counts)
    goal *= 1e4 / (goal.max() or 1.0)
    for _ in range(4):
        low = np.concatenate([np.ones(len(counts)), np.full(len(rows), -np.inf)])
        high = np.concatenate([np.ones(len(counts)), caps])
        found = milp(
            goal,
            integrality=np.ones(len(goal)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(vstack([one_each, *weights]), low, high),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            break
        chosen = [int(part.argmax()) for part in np.split(found.x, starts[1:])]
        totals = [float(row[starts + chosen].sum()) for row in rows]
        over = np.array([total > _slack(limit.most) for total, limit in zip(totals, limits, strict=True)], bool)
        if not over.any():
            return chosen
        # The solver lets a limit be exceeded by its tolerance; a hair less, and it is kept.
        caps = np.where(over, caps - 1e-6 * np.maximum(np.abs(caps), 1.0), caps)
    listed = ", ".join(f"{limit.name} <= {limit.most:g}" for limit in limits)
    raise VitrailError(f"no choice keeps all of {listed}, although each can be kept alone: relax one of them")


def _flat(name: str, table: Table, counts: list[int]) -> np.ndarray:
    if [len(options) for options in table] != counts:
        raise InputError(f"{name} does not have one value for each option of each layer: give the objective's shape")
    flat = np.concatenate([np.asarray(options, float) for options in table])
    if not np.isfinite(flat).all():
        raise InputError(f"{name} holds a number that is not finite: leave out options that cannot be used")
    return flat


def _slack(most: float) -> float:
    return most + TOLERANCE * max(abs(most), 1.0)
