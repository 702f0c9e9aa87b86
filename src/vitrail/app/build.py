"""Build what a resolved recipe names: the model with its edits, its preprocessing, the method."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from vitrail.app.artefact import load
from vitrail.catalog import locate
from vitrail.data.index import Index
from vitrail.data.preprocess import Preprocess
from vitrail.edits.surgery import apply_edits
from vitrail.errors import InputError, unknown
from vitrail.methods.method import Method
from vitrail.models import create_model, model_names
from vitrail.training.balance import class_weights
from vitrail.training.device import resolved
from vitrail.training.recipe import ModelConfig, Recipe


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Create the recipe's model with its edits, without pretrained weights."""
    return apply_edits(create_model(config.name, **model_options(config, num_classes)), config.edits)


def model_options(config: ModelConfig, num_classes: int) -> dict[str, Any]:
    """Return the keyword arguments of ``create_model`` besides the name."""
    return {
        "num_classes": num_classes,
        "img_size": config.img_size,
        "drop_rate": config.drop_rate,
        "drop_path_rate": config.drop_path_rate,
        **config.options,
    }


def check_names(recipe: Recipe) -> None:
    """Raise now for a model, method or edit that does not exist, rather than after the audit."""
    if recipe.model.name != "auto" and recipe.model.name not in model_names():
        raise unknown("model", recipe.model.name, model_names(), "`vitrail list --models` lists them all")
    locate(recipe.method.name, "method")
    for edit in recipe.model.edits:
        locate(edit.name, "edit")


def preprocess_of(model: nn.Module, recipe: Recipe) -> Preprocess:
    """Return the preprocessing of a model: normalisation and interpolation as its weights were trained with."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = resolved(recipe.model.img_size)
    interpolation = config.get("interpolation")
    return Preprocess(
        size=(size, size),
        resize=resolved(recipe.model.resize),
        crop_pct=resolved(recipe.model.crop_pct),
        interpolation="bicubic" if interpolation == "bicubic" else "bilinear",
        mean=tuple(config.get("mean") or (0.5, 0.5, 0.5)),
        std=tuple(config.get("std") or (0.5, 0.5, 0.5)),
        background=recipe.data.background,
    )


def build_method(recipe: Recipe, model: nn.Module, index: Index) -> Method:
    """Create the recipe's method around ``model``.

    Facts of the data (``num_classes``, ``class_names``, ``multilabel``, ``class_weights``) go to a method that has
    arguments of these names and was not given them. A ``teacher`` that is given as a run folder becomes the run's
    trained network; of several, in a list, each may know some of the classes.

    Raises:
        InputError: an option that the method does not take.
    """
    kind = locate(recipe.method.name, "method")
    takes = inspect.signature(kind).parameters
    weights = class_weights(index.counts("train")) if recipe.train.balance == "weights" else None
    facts = {
        "num_classes": len(index.classes),
        "class_names": index.classes,
        "multilabel": index.multilabel,
        "class_weights": None if weights is None else torch.from_numpy(weights),
    }
    for option in recipe.method.options:
        if option not in takes:
            raise unknown(f"option of {recipe.method.name}", option, [name for name in takes if name != "model"])
    if weights is not None and "class_weights" not in takes:
        raise InputError(f"{recipe.method.name} has no class weights: set train.balance to 'sampler' or 'none'")
    options = dict(recipe.method.options)
    if isinstance(options.get("teacher"), str):
        options["teacher"] = _teacher(options["teacher"], index)
    elif isinstance(options.get("teacher"), list):
        options["teacher"] = [load(run) for run in options["teacher"]]
    return kind(model, **{**{name: fact for name, fact in facts.items() if name in takes}, **options})


def _teacher(run: str, index: Index) -> nn.Module:
    """Return the network of a run whose classes are those of ``index``."""
    model = load(run)
    classes = tuple(getattr(model, "classes", ()))
    if classes != index.classes:
        raise InputError(
            f"the teacher {run} has {len(classes)} classes and the data have {len(index.classes)}, or their "
            "names differ: give a run of the same classes"
        )
    return model


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, size: tuple[int, int]) -> int:
    """Return the multiply-adds of one image of ``size`` (height, width): what papers call FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    place = next(model.parameters())
    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, *size, device=place.device, dtype=place.dtype))
    model.train(training)
    return int(counter.get_total_flops()) // 2
