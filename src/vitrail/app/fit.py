"""``vitrail fit``: from images to a deployable model and a report, within a budget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from vitrail.app.audit import embedder
from vitrail.app.budget import Clock
from vitrail.app.build import check_names
from vitrail.app.finish import Finish
from vitrail.app.learn import learn
from vitrail.app.plan import reserve_seconds, resolve
from vitrail.data.audit import Audit, audit
from vitrail.data.index import Index, build_index, write_split_csv
from vitrail.data.sources import Source, open_source
from vitrail.errors import InputError, RunError
from vitrail.runs import RunFolder, read_json, write_json, write_text
from vitrail.training.recipe import EditConfig, Recipe, apply_overrides

Event = dict[str, Any]
Tell = Callable[[Event], None]
NESTED_METHOD, NESTED_EDITS = "mrl:MatryoshkaTraining", ("mrl", "mrl:nested_head")


def fit(
    path: str | Path | None = None,
    *,
    minutes: float | None = None,
    out: str | Path | None = None,
    target_ms: float | None = None,
    matryoshka: bool = False,
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
        matryoshka: train a nested representation: short for the edit ``mrl`` and the method ``mrl:MatryoshkaTraining``.
        recipe: TOML file, the name of a shipped one, or ``Recipe``.
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
    asked = request(
        path, minutes=minutes, target_ms=target_ms, matryoshka=matryoshka, recipe=recipe, overrides=overrides
    )
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
    matryoshka: bool = False,
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
    if matryoshka:
        if asked.method.name not in ("supervised", NESTED_METHOD):
            raise InputError(
                f"--matryoshka trains by {NESTED_METHOD}, not by {asked.method.name}: leave out one of them"
            )
        asked.method.name = NESTED_METHOD
        if not any(edit.name in NESTED_EDITS for edit in asked.model.edits):
            asked.model.edits = [*asked.model.edits, EditConfig(name=NESTED_EDITS[0])]
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
        switches = read_json(self.plan)["switches"] if self.plan.exists() else None
        learned = learn(
            self.run,
            index,
            recipe,
            switches=switches,
            deadline=self.train_deadline,
            events=self.tell,
            stage=self.stage,
        )
        if not self.state.is_main_process:
            return {}
        return Finish(self.run, index, found, recipe, learned, self).run_all()

    # ---- data

    def audit(self) -> tuple[Audit, Index]:
        config = self.asked.data
        cache = self.run.cache / "audit.sqlite"
        found = audit(self.source, config, cache, self.progress, embed=embedder(config))
        path = self.run.cache / "index.arrow"
        index = Index.open(path, self.source) if path.exists() else None
        if index is None or index.fingerprint != found.fingerprint:
            if index is not None and self.run.recipe.exists():
                raise RunError(
                    f"the images of {self.source.uri} have changed since the run in {self.run.path} began: choose "
                    "another folder with --out, or delete this one"
                )
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
