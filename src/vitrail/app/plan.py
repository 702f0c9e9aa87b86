"""Resolve a recipe: put a value in every place that says ``"auto"``, from the data, the budget and a measured probe."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.app.build import build_method, build_model, model_options, preprocess_of
from vitrail.app.choose import recommend
from vitrail.data.index import Index
from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import build_views
from vitrail.deploy.export import export_onnx
from vitrail.deploy.runtime import Predictor
from vitrail.errors import InputError
from vitrail.models.factory import create_model
from vitrail.models.pretrained import packaged_weights
from vitrail.training.cpu import Switches, tune_for_cpu
from vitrail.training.device import require_precision, resolved
from vitrail.training.freeze import freeze
from vitrail.training.probe import largest_batch, measure_step
from vitrail.training.recipe import Recipe

MARGIN = 0.97
"""Share of the measured speed that is counted on; the loop shortens the plan when even that is too much."""
LEAST_EPOCHS, MOST_EPOCHS = 0.01, 200.0
PROBE_SHARE = 0.04
"""Of the time for training, for the choice of forms of operators, and for timing whole steps."""
HEAD_START_VIEWS = 2
"""Each image, and its mirror image."""
SMALLEST, STEP = 32, 16
"""Image sides in pixels: the least that is tried to meet a latency, and the grain."""


@dataclass(frozen=True)
class Plan:
    """A resolved recipe, and what goes with it on this machine."""

    recipe: Recipe
    switches: Switches
    """Forms of operators to train with on a CPU."""
    evaluation: float
    """Seconds that the held-out images will take after training."""


def reserve_seconds(budget: float) -> float:
    """Return the seconds of a run's budget that are kept for export, timing and the report."""
    return min(25.0 + 0.12 * budget, 0.4 * budget)


def resolve(asked: Recipe, index: Index, median_side: int, deadline: float | None, say: Callable[[str], None]) -> Plan:
    """Return a copy of ``asked`` with nothing left at ``"auto"``, and what was measured on the way.

    Args:
        asked: the recipe as given.
        index: the data, split.
        median_side: median of the images' shorter sides, in pixels.
        deadline: ``time.monotonic()`` at which training has to end, or None when ``train.epochs`` is given.
        say: told what was measured.

    Raises:
        InputError: neither a budget nor a number of epochs, a precision that this machine does not have, or a latency
            that no image size meets.
    """
    require_precision(asked)  # before a probe that may take minutes
    recipe = asked.model_copy(deep=True)
    wanted = recipe.model.pretrained != "none" and recipe.model.name in ("auto", "tf_efficientnet_lite0")
    if deadline is None and recipe.train.epochs == "auto":
        raise InputError("nothing says when training ends: give --minutes, or set train.epochs")
    fill(
        recipe,
        recommend(
            n_train=len(index.rows("train")),
            n_classes=len(index.classes),
            median_side=median_side,
            pretrained_available=wanted and packaged_weights("tf_efficientnet_lite0") is not None,
            train_seconds=600.0 if deadline is None else deadline - time.monotonic(),
        ),
    )
    if recipe.deploy.target_ms is not None and asked.model.img_size == "auto":
        _meet_latency(recipe, len(index.classes), say)
    plan = _probe(recipe, index, deadline, say)
    if recipe.unresolved():
        raise InputError(f"the recipe leaves {', '.join(recipe.unresolved())} at 'auto': give them values with --set")
    return plan


def fill(recipe: Recipe, values: dict[str, Any]) -> None:
    """Set the dotted keys of ``values`` that the recipe leaves at ``"auto"``, in place."""
    for key in set(recipe.unresolved()) & set(values):
        *sections, name = key.split(".")
        place: Any = recipe
        for section in sections:
            place = getattr(place, section)
        setattr(place, name, values[key])


def _probe(recipe: Recipe, index: Index, deadline: float | None, say: Callable[[str], None]) -> Plan:
    """Measure steps and loading; set batch size and epochs so that training ends before the deadline."""
    model = build_model(recipe.model, len(index.classes))
    preprocess = preprocess_of(model, recipe)
    frozen = resolved(recipe.train.freeze)
    freeze(model, frozen)
    method = build_method(recipe, model, index)
    rows = index.rows("train")
    left = math.inf if deadline is None else deadline - time.monotonic()
    trial = recipe.model_copy(deep=True)
    trial.train.epochs = 1.0
    if recipe.train.batch_size == "auto":
        trial.train.batch_size = 32
        # A batch as large as leaves some twenty steps an epoch, at most what fits.
        limit = 2 ** max(3, min(8, int(math.log2(max(1, len(rows) / 20)))))
        recipe.train.batch_size = largest_batch(method, trial, preprocess, limit=limit).batch_size
    batch_size = resolved(recipe.train.batch_size)
    trial.train.batch_size = batch_size
    switches: Switches = {}
    step = math.inf
    if not torch.cuda.is_available():
        report = tune_for_cpu(
            model,
            image_shape=(3, *preprocess.size),
            batch_size=batch_size,
            precision=str(recipe.train.precision),
            channels_last=recipe.train.channels_last is True,
            seconds=min(20.0, PROBE_SHARE * left),
        )
        switches, step = report.switches, 1 / report.images_per_second
        for line in report.lines():
            say(line)
    # Four whole batches, unless the tuning's few images have to do.
    if not 4 * batch_size * step > PROBE_SHARE * left or step == math.inf:
        step = measure_step(method, trial, preprocess, batch_size).seconds_per_image
    load = _loading_seconds(trial, index, preprocess, method.views)
    say(f"a training step takes {1e3 * step:.2f} ms per image, loading {1e3 * load:.2f} ms")
    # A forward pass is a third of a step, or more of one that goes back through some layers alone.
    forward = step / (2 if frozen else 3) + load
    evaluation = forward * (2 * len(index.rows("val")) + len(index.rows("test")))
    if recipe.train.epochs == "auto":
        seconds = MARGIN * (left - evaluation)
        head_start = min(resolved(recipe.train.head_start), 10 + 1.2 * HEAD_START_VIEWS * forward * len(rows))
        if recipe.train.head_start:
            recipe.train.head_start = round(head_start, 1)
            seconds -= head_start
        validation = len(index.rows("val")) * forward / recipe.train.eval_every
        epochs = seconds / (len(rows) * (step + load) + validation)
        recipe.train.epochs = round(min(max(epochs, LEAST_EPOCHS), MOST_EPOCHS), 3)
    return Plan(recipe, switches, evaluation)


def _loading_seconds(recipe: Recipe, index: Index, preprocess: Preprocess, views: Any) -> float:
    """Return the seconds per training image of reading, decoding and augmenting, without a cache."""
    rows = np.random.default_rng(0).permutation(index.rows("train"))[:256]
    loader = make_loader(
        index,
        rows,
        build_views(views, preprocess, recipe.augment, recipe.data),
        batch_size=min(32, len(rows)),
        shuffle=False,
        workers=0,
    )
    best, total = math.inf, 0.0
    started = time.perf_counter()
    for batch in loader:
        seconds = time.perf_counter() - started
        best, total = min(best, seconds / max(1, len(batch["row"]))), total + seconds
        if total > 1.0:
            break
        started = time.perf_counter()
    return best


def _meet_latency(recipe: Recipe, n_classes: int, say: Callable[[str], None]) -> None:
    """Shrink the image size until the exported model meets ``deploy.target_ms``, or raise."""
    target = float(recipe.deploy.target_ms or 0)
    size = resolved(recipe.model.img_size)
    while True:
        recipe.model.img_size = size
        measured = _latency_ms(recipe, n_classes)
        say(f"{recipe.model.name} at {size} px takes {measured:.2f} ms per image; the target is {target:g} ms")
        if measured <= target:
            return
        # Time goes with the pixels; 0.95 leaves room for what does not shrink with them.
        smaller = int(0.95 * size * math.sqrt(target / measured)) // STEP * STEP
        if smaller < SMALLEST:
            raise InputError(
                f"--target-ms {target:g} cannot be met by {recipe.model.name} on this machine ({measured:.2f} ms at "
                f"{size} px): give more time, or a smaller model with --set model.name=..."
            )
        size = min(smaller, size - STEP)


def _latency_ms(recipe: Recipe, n_classes: int) -> float:
    """Return the median milliseconds of one image in ONNX Runtime, fp32."""
    model = create_model(recipe.model.name, **model_options(recipe.model, n_classes)).eval()
    preprocess = preprocess_of(model, recipe)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.onnx"
        export_onnx(model, preprocess, file, classes=[str(number) for number in range(n_classes)])
        predictor = Predictor(file)
        image = np.zeros((*preprocess.size, 3), np.uint8)
        seconds = []
        for _ in range(12):
            started = time.perf_counter()
            list(predictor.predict([image], top=1))
            seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[2:])
