"""``vitrail fit``: from images to a deployable model and a report, within a budget."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitrail.app.audit import embedder
from vitrail.app.budget import Clock
from vitrail.app.build import build_method, build_model, check_names, preprocess_of
from vitrail.app.finish import finish
from vitrail.app.plan import reserve_seconds, resolve
from vitrail.data.audit import Audit, audit
from vitrail.data.index import Index, build_index, write_split_csv
from vitrail.data.preprocess import Preprocess
from vitrail.data.sources import Source, open_source
from vitrail.errors import InputError, RunError
from vitrail.methods.method import Method
from vitrail.models.pretrained import Weights, load_pretrained
from vitrail.runs import RunFolder, atomic_path, read_json, write_json, write_text
from vitrail.training.cpu import apply_switches, keep_memory
from vitrail.training.device import resolved
from vitrail.training.features import warm_start_head
from vitrail.training.freeze import freeze, thaw
from vitrail.training.recipe import Recipe, apply_overrides
from vitrail.training.train import TrainResult, train
from vitrail.training.validate import figures, validate

Event = dict[str, Any]
Tell = Callable[[Event], None]


def fit(
    path: str | Path | None = None,
    *,
    minutes: float | None = None,
    out: str | Path | None = None,
    target_ms: float | None = None,
    recipe: str | Path | Recipe | None = None,
    overrides: Iterable[str] = (),
    events: Tell | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Audit the data, choose and train a model, evaluate, compress, export and report; return ``summary.json``.

    A run that was interrupted goes on when it is called again in the same way; a finished one returns its summary.

    Args:
        path: class-per-folder tree, manifest, IDX folder, ``hf://name`` or shards; None is the embedded digits.
        minutes: wall-clock budget, report included; 10 unless the recipe says otherwise (1 for the digits).
        out: run folder; ``runs/`` and the name of the data by default.
        target_ms: latency per image that the shipped model must meet, in milliseconds.
        recipe: TOML file or ``Recipe``.
        overrides: ``key=value`` entries of the recipe.
        events: called with dictionaries whose ``"event"`` is ``stage``, ``message``, ``warning`` or ``progress``.
        started: ``time.monotonic()`` at which the budget began; now by default.

    Raises:
        VitrailError: with one line that says what was given, what is allowed and what to do next.

    Example:
        >>> summary = vitrail.fit(minutes=1, out="runs/digits")  # doctest: +SKIP
        >>> summary["top1"]                                      # doctest: +SKIP
    """
    started = time.monotonic() if started is None else started
    asked = request(path, minutes=minutes, target_ms=target_ms, recipe=recipe, overrides=overrides)
    check_names(asked)
    run = RunFolder(out if out is not None else default_folder(asked))
    state = PartialState()
    tell: Tell = events if events and state.is_main_process else lambda event: None
    if run.summary.exists() and _same_request(run, asked):
        tell({"event": "message", "text": f"{run.path} is finished; this is its result (another --out starts anew)"})
        return read_json(run.summary)
    # A path that cannot be used should not leave a folder behind.
    source = open_source(asked.data)
    if state.is_main_process:
        run.create()
        _same_request(run, asked)
        run.cache.mkdir(exist_ok=True)
        write_json(run.cache / "request.json", asked.model_dump(mode="json"))
    state.wait_for_everyone()
    seconds = None if asked.minutes is None else asked.minutes * 60
    return _Fit(run, asked, source, Clock(run.cache / "clock.json", seconds, started), state, tell).run_all()


def request(
    path: str | Path | None,
    *,
    minutes: float | None,
    target_ms: float | None,
    recipe: str | Path | Recipe | None,
    overrides: Iterable[str],
) -> Recipe:
    """Return the recipe that a call asks for, with everything undecided at ``"auto"``."""
    if isinstance(recipe, Recipe):
        asked = Recipe.from_dict(apply_overrides(recipe.model_dump(exclude_none=True), overrides))
    elif recipe is not None:
        asked = Recipe.load(recipe, overrides)
    else:
        asked = Recipe.from_dict(apply_overrides({}, overrides))
    if path is not None:
        asked.data.path = str(path)
    if asked.data.path is not None and Path(asked.data.path).expanduser().exists():
        # The saved recipe reproduces the run from any folder.
        asked.data.path = str(Path(asked.data.path).expanduser().resolve())
    for name, value in (("minutes", minutes), ("target_ms", target_ms)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {value:g} is not allowed: give a number above 0")
    if target_ms is not None:
        asked.deploy.target_ms = target_ms
    if minutes is not None:
        asked.minutes = minutes
    if asked.minutes is None and asked.train.epochs == "auto":
        asked.minutes = 1.0 if asked.data.path is None else 10.0
    return asked


def default_folder(asked: Recipe) -> Path:
    """Return ``runs/`` and the name of the data."""
    name = (
        (asked.data.path or "digits")
        .removeprefix("hf://")
        .rstrip("/")
        .replace("/", "-" if "://" in str(asked.data.path) else "/")
    )
    return Path("runs") / (Path(name).stem or "data")


def _same_request(run: RunFolder, asked: Recipe) -> bool:
    """Return whether the folder holds a run of this very request; raise if it holds another one."""
    file = run.cache / "request.json"
    if not file.exists():
        if run.summary.exists() or run.checkpoints.exists():
            raise RunError(f"{run.path} holds a run that cannot be identified: choose another folder with --out")
        return False
    old, new = Recipe.from_dict(read_json(file)).model_dump(), asked.model_dump()
    differing = [
        f"{section}.{key}" if isinstance(value, dict) else section
        for section, value in new.items()
        for key in (value if isinstance(value, dict) else [""])
        if (old[section][key] != value[key] if isinstance(value, dict) else old[section] != value)
    ]
    if differing:
        raise RunError(
            f"{run.path} holds another run ({', '.join(differing[:4])} differ): "
            "choose another folder with --out, or delete this one"
        )
    return True


class _Fit:
    """One call of ``fit``: the stages in order, each reading what the earlier ones left on the disk or in here."""

    def __init__(
        self, run: RunFolder, asked: Recipe, source: Source, clock: Clock, state: PartialState, tell: Tell
    ) -> None:
        self.run, self.asked, self.source, self.clock, self.state = run, asked, source, clock, state
        self._tell = tell
        self.plan = run.cache / "plan.json"
        self.warnings: list[str] = []

    def tell(self, event: Event) -> None:
        self.clock.tick()
        if event["event"] == "warning":
            event = {**event, "text": event.get("text") or event.get("message", "")}
            self.warnings.append(event["text"])
        self._tell(event)

    def message(self, text: str) -> None:
        self.tell({"event": "message", "text": text})

    def progress(self, step: int, total: int | None) -> None:
        self.tell({"event": "progress", "step": step, "total": total})

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.tell({"event": "stage", "stage": name})
        with self.clock.stage(name):
            yield

    def run_all(self) -> dict[str, Any]:
        with self.stage("audit"), self.state.main_process_first():
            found, index = self.audit()
        with self.stage("choose"):
            recipe = self.choose(index, found)
            model, weights = self.model(index, recipe)
        preprocess = preprocess_of(model, recipe)
        method = build_method(recipe, model, index)
        start = self.head_start(model, index, preprocess, recipe)
        weights_before = copy.deepcopy(model.state_dict()) if start else {}
        freeze(model, resolved(recipe.train.freeze))
        with self.stage("train"):
            trained = self.train(method, index, preprocess, recipe)
        thaw(trained.model)
        self.better_of(start, weights_before, trained)
        if not self.state.is_main_process:
            return {}
        return finish(self.run, index, found, recipe, preprocess, weights, trained, self)

    # ---- data

    def audit(self) -> tuple[Audit, Index]:
        config = self.asked.data
        cache = self.run.cache / "audit.sqlite"
        found = audit(self.source, config, cache, self.progress, embed=embedder(config))
        path = self.run.cache / "index.arrow"
        if path.exists():
            index = Index.open(path, self.source)
        else:
            index = build_index(self.source, found, config, path)
            write_split_csv(index, self.run.split)
        counts = {split: len(index.rows(split)) for split in ("train", "val", "test")}
        shown = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        self.message(f"{shown} images in {len(index.classes)} classes")
        return found, index

    # ---- recipe and model

    def choose(self, index: Index, found: Audit) -> Recipe:
        if not self.run.recipe.exists() and self.state.is_main_process:
            side = int(found.summary()["sizes"]["shorter_side"]["median"])
            plan = resolve(self.asked, index, side, self.train_deadline(), self.message)
            write_json(self.plan, {"switches": plan.switches, "evaluation": plan.evaluation})
            write_text(self.run.recipe, plan.recipe.to_toml())
        self.state.wait_for_everyone()
        return Recipe.load(self.run.recipe)

    def train_deadline(self) -> float | None:
        """Return when training has to end, so that what follows has its time."""
        deadline = self.clock.deadline
        if deadline is None:
            return None
        evaluation = read_json(self.plan)["evaluation"] if self.plan.exists() else 0.0
        return deadline - reserve_seconds(self.clock.seconds or 0.0) - evaluation

    def model(self, index: Index, recipe: Recipe) -> tuple[nn.Module, Weights]:
        torch.manual_seed(recipe.train.seed)
        model = build_model(recipe.model, len(index.classes))
        weights = load_pretrained(model, recipe.model.name, recipe.model.pretrained, sha256=recipe.model.sha256)
        self.message(f"{recipe.model.name} at {recipe.model.img_size} px, {weights.description}")
        self.message(
            f"{recipe.train.epochs:g} epochs in batches of {recipe.train.batch_size}, {recipe.optim.name}, "
            f"learning rate {recipe.optim.lr:g}, {recipe.train.precision}"
        )
        return model, weights

    # ---- training

    def head_start(self, model: nn.Module, index: Index, preprocess: Preprocess, recipe: Recipe) -> dict[str, float]:
        """Train the classifier alone on cached features; return its validation figures, or nothing if it is off.

        How far it comes depends on the clock: what it found is kept, so that a restart begins from the same.
        """
        if not recipe.train.head_start:
            return {}
        weights, figures_file = (self.run.cache / f"head_start.{kind}" for kind in ("safetensors", "json"))
        with self.stage("head_start"):
            if not figures_file.exists() and self.state.is_main_process:
                report = warm_start_head(
                    model,
                    index,
                    index.rows("train"),
                    preprocess,
                    seconds=resolved(recipe.train.head_start),
                    seed=recipe.train.seed,
                    folder=self.run.cache,
                    precision=str(recipe.train.precision),
                    channels_last=recipe.train.channels_last is True,
                    background=recipe.data.background,
                    max_pixels=recipe.data.max_pixels,
                )
                self.message(str(report))
                with atomic_path(weights) as temporary:
                    save_file(_head(model).state_dict(), temporary)
                logits, targets, _ = validate(model, index, preprocess, recipe, index.rows("val"))
                write_json(figures_file, figures(logits, targets))
            self.state.wait_for_everyone()
            _head(model).load_state_dict(load_file(weights))
        return read_json(figures_file)

    def better_of(self, start: dict[str, float], weights: dict[str, Tensor], trained: TrainResult) -> None:
        """Go back to the head start where finetuning was too short to beat it on the validation images."""
        name = "map" if "map" in start else "top1"
        if start and start[name] > trained.figures.get(name, 0.0):
            trained.model.load_state_dict(weights)
            self.tell(
                {
                    "event": "warning",
                    "text": f"finetuning gave {trained.figures[name]:.1%} on the validation images and the head start "
                    f"{start[name]:.1%}: the head start ships; more --minutes may change that",
                }
            )

    def train(self, method: Method, index: Index, preprocess: Preprocess, recipe: Recipe) -> TrainResult:
        # A restart takes the forms of operators that the first start measured, so that it computes the same.
        if self.plan.exists() and not torch.cuda.is_available():
            keep_memory()
            apply_switches(method.model, read_json(self.plan)["switches"])
        return train(method, index, preprocess, recipe, self.run, deadline=self.train_deadline(), events=self.tell)


def _head(model: nn.Module) -> nn.Module:
    """Return the classifier, by timm's surface."""
    surface: Any = model
    return surface.get_classifier()
