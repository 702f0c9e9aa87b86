"""Resolve a recipe: put a value in every place that says ``"auto"``, from the data, the budget and a measured probe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from vitrail.app.artefact import build_model
from vitrail.app.choose import recommend
from vitrail.data.index import Index
from vitrail.errors import InputError
from vitrail.models.pretrained import packaged_weights
from vitrail.training.recipe import Recipe

RESERVE_SHARE, RESERVE_SECONDS, RESERVE_MOST = 0.12, 25.0, 0.4


def reserve_seconds(budget: float) -> float:
    """Return the seconds of a run's budget that are kept for evaluation, export, timing and the report."""
    return min(RESERVE_SECONDS + RESERVE_SHARE * budget, RESERVE_MOST * budget)


def resolve(asked: Recipe, index: Index, median_side: int, seconds: float | None, say: Callable[[str], None]) -> Recipe:
    """Return a copy of ``asked`` with nothing left at ``"auto"``.

    Args:
        asked: the recipe as given.
        index: the data, split.
        median_side: median of the images' shorter sides, in pixels.
        seconds: wall-clock time left for training; None when ``train.epochs`` is given.
        say: told what was chosen and why.
    """
    recipe = asked.model_copy(deep=True)
    values = recommend(
        n_train=len(index.rows("train")),
        n_classes=len(index.classes),
        median_side=median_side,
        pretrained_available=_pretrained_wanted(recipe) and packaged_weights("tf_efficientnet_lite0") is not None,
        train_seconds=600.0 if seconds is None else seconds,
    )
    fill(recipe, values)
    if recipe.deploy.target_ms is not None and asked.model.img_size == "auto":
        _meet_latency(recipe, index, say)
    if recipe.train.epochs == "auto":
        if seconds is None:
            raise InputError("give --minutes, or train.epochs: one of them must say when training ends")
        _probe_epochs(recipe, index, seconds, say)
    if recipe.unresolved():
        raise InputError(f"the recipe leaves {', '.join(recipe.unresolved())} at 'auto': give them values with --set")
    return recipe


def fill(recipe: Recipe, values: dict[str, Any]) -> None:
    """Set the dotted keys of ``values`` that the recipe leaves at ``"auto"``, in place."""
    for key in set(recipe.unresolved()) & set(values):
        *sections, name = key.split(".")
        place: Any = recipe
        for section in sections:
            place = getattr(place, section)
        setattr(place, name, values[key])
