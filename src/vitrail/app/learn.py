"""Train what a resolved recipe says, for ``fit``, ``compare`` and checks: model, weights, head start, finetuning."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn

from vitrail.app.build import build_method, model_options, preprocess_of
from vitrail.data.index import Index
from vitrail.data.preprocess import Preprocess
from vitrail.edits.surgery import apply_edits
from vitrail.layers.processor import keep_memory
from vitrail.models import create_model
from vitrail.models.pretrained import Weights, load_pretrained
from vitrail.runs import RunFolder, atomic_path, read_json, write_json
from vitrail.training.cpu import Switches, apply_switches
from vitrail.training.device import resolved
from vitrail.training.features import warm_start_head
from vitrail.training.freeze import freeze, thaw
from vitrail.training.recipe import Recipe
from vitrail.training.train import TrainResult, train
from vitrail.training.validate import figures, validate

Event = dict[str, Any]
Stage = Callable[[str], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Learned:
    """A trained model and where it came from."""

    trained: TrainResult
    weights: Weights
    preprocess: Preprocess

    @property
    def model(self) -> nn.Module:
        """The network that ships, in evaluation mode."""
        return self.trained.model


@contextlib.contextmanager
def _unnamed(name: str) -> Iterator[None]:
    yield


def learn(
    run: RunFolder,
    index: Index,
    recipe: Recipe,
    *,
    switches: Switches | None = None,
    deadline: Callable[[], float | None] = lambda: None,
    events: Callable[[Event], None] = lambda event: None,
    stage: Stage = _unnamed,
) -> Learned:
    """Build the recipe's model, give it its weights and train it, going on from what ``run`` holds.

    Args:
        run: folder for checkpoints, ``metrics.jsonl`` and the cache.
        index: the data, split.
        recipe: with nothing left at ``"auto"``.
        switches: forms of operators for training on a CPU, as measured when the run began; a restart needs the same.
        deadline: asked before training: ``time.monotonic()`` at which it has to end.
        events: as for ``training.train``, and ``message``.
        stage: entered around ``"head_start"`` and ``"train"``.
    """

    def say(text: str) -> None:
        events({"event": "message", "text": text})

    torch.manual_seed(recipe.train.seed)
    model = create_model(recipe.model.name, **model_options(recipe.model, len(index.classes)))
    weights = load_pretrained(model, recipe.model.name, recipe.model.pretrained, sha256=recipe.model.sha256)
    # After the weights, whose names an edit may change.
    model = apply_edits(model, recipe.model.edits)
    say(f"{recipe.model.name} at {recipe.model.img_size} px, {weights.description}")
    say(
        f"{recipe.train.epochs:g} epochs in batches of {recipe.train.batch_size}, {recipe.optim.name}, "
        f"learning rate {recipe.optim.lr:g}, {recipe.train.precision}"
    )
    preprocess = preprocess_of(model, recipe)
    method = build_method(recipe, model, index)
    start: dict[str, float] = {}
    if recipe.train.head_start:
        with stage("head_start"):
            start = _head_start(run, model, index, preprocess, recipe, say)
    before = copy.deepcopy(model.state_dict()) if start else {}
    freeze(model, resolved(recipe.train.freeze))
    with stage("train"):
        if switches is not None and not torch.cuda.is_available():
            keep_memory()
            apply_switches(method.model, switches)
        trained = train(method, index, preprocess, recipe, run, deadline=deadline(), events=events)
    thaw(trained.model)
    name = "map" if "map" in start else "top1"
    if start and start[name] > trained.figures.get(name, 0.0):
        # Finetuning was too short to beat the head start.
        trained.model.load_state_dict(before)
        text = (
            f"finetuning gave {trained.figures[name]:.1%} on the validation images and the head start "
            f"{start[name]:.1%}: the head start ships; more --minutes may change that"
        )
        trained.figures = start
        events({"event": "warning", "text": text})
    return Learned(trained, weights, preprocess)


def _head_start(
    run: RunFolder,
    model: nn.Module,
    index: Index,
    preprocess: Preprocess,
    recipe: Recipe,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Train the classifier alone on cached features; return its validation figures.

    How far it comes depends on the clock: what it found is kept, so that a restart begins from the same.
    """
    weights, figures_file = (run.cache / f"head_start.{kind}" for kind in ("safetensors", "json"))
    state = PartialState()
    if not figures_file.exists() and state.is_main_process:
        report = warm_start_head(
            model,
            index,
            index.rows("train"),
            preprocess,
            seconds=resolved(recipe.train.head_start),
            seed=recipe.train.seed,
            folder=run.cache,
            precision=str(recipe.train.precision),
            channels_last=recipe.train.channels_last is True,
            background=recipe.data.background,
            max_pixels=recipe.data.max_pixels,
        )
        say(str(report))
        with atomic_path(weights) as temporary:
            save_file(_head(model).state_dict(), temporary)
        logits, targets, _ = validate(model, index, preprocess, recipe, index.rows("val"))
        write_json(figures_file, figures(logits, targets))
    state.wait_for_everyone()
    _head(model).load_state_dict(load_file(weights))
    return read_json(figures_file)


def _head(model: nn.Module) -> nn.Module:
    """Return the classifier, by timm's surface."""
    surface: Any = model
    return surface.get_classifier()
