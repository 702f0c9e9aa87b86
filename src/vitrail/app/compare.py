"""``vitrail compare``: arms at equal data and equal budget, paired over seeds, with intervals.

The comparison is a folder. Each arm and seed is a job with a folder of its own, which is skipped when its result is
there; a job that fails leaves its error, the others go on, and the same command tries it again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitrail.app.build import check_names, count_parameters
from vitrail.app.environment import environment
from vitrail.app.fit import request
from vitrail.app.learn import learn
from vitrail.app.plan import resolve
from vitrail.catalog import cards, find
from vitrail.data.audit import audit
from vitrail.data.index import Index, build_index
from vitrail.data.sources import open_source
from vitrail.errors import InputError, RunError, VitrailError, require
from vitrail.evaluate.paired import holm, paired_bootstrap
from vitrail.evaluate.scores import per_image
from vitrail.report.compare import ALPHA, write_comparison
from vitrail.runs import RunFolder, atomic_path, read_json, write_json, write_text
from vitrail.training.recipe import EditConfig, Recipe, apply_overrides
from vitrail.training.validate import validate

BASELINE = "baseline"
MINUTES = 10.0
REPORT_SECONDS = 5.0
EVALUATION_SHARE = 0.1
"""Of a job's time, at least, for what is not training."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One arm with one seed: everything that a process, here or elsewhere, needs to run it."""

    out: str
    arm: str
    seed: int
    recipe: dict[str, Any]
    """As asked for, with entries at ``"auto"``."""
    seconds: float | None

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return arm_folder(Path(self.out), self.arm) / f"seed-{self.seed}"

    @property
    def result(self) -> Path:
        """What it found: written last."""
        return self.folder / "result.json"


def compare(
    path: str | Path | None,
    arms: Sequence[str],
    *,
    seeds: int = 3,
    minutes: float | None = None,
    out: str | Path,
    recipe: str | Path | Recipe | None = None,
    overrides: Iterable[str] = (),
    on: Literal["here", "ray"] = "here",
    events: Callable[[Event], None] = lambda event: None,
    started: float | None = None,
) -> dict[str, Any]:
    """Train every arm with every seed on the same images for the same time; return ``comparison.json``.

    Args:
        path: images, as for ``fit``.
        arms: each a slug (a model, an edit, a method), a recipe file, or changes of the recipe as
            ``key=value,key=value``; they are compared with the recipe as it is, the arm ``baseline``.
        seeds: of training; the split is the same for all.
        minutes: wall-clock of the whole comparison, divided equally; 10 unless the recipe sets ``train.epochs``.
        out: folder, which the same call goes on with.
        recipe, overrides: what all arms start from.
        on: ``"here"``, one after another, or ``"ray"``: on the machines of a Ray cluster, which must share the folder.
        events: as for ``fit``.
        started: ``time.monotonic()`` at which the budget began; now by default.

    Raises:
        VitrailError: an arm that cannot be understood, or a folder that holds another comparison.
    """
    started = time.monotonic() if started is None else started
    if seeds < 1:
        raise InputError(f"--seeds {seeds} is not allowed: give 1 or more")
    if on not in ("here", "ray"):
        raise InputError(f"--on {on} is not allowed: give 'here' or 'ray'")
    if not arms:
        raise InputError("there is nothing to compare: name at least one arm, for example augment.mixup=0.2")
    base = request(path, minutes=None, target_ms=None, recipe=recipe, overrides=overrides)
    base.minutes = None
    asked = {BASELINE: base}
    for text in arms:
        name, changed = parse_arm(text, base)
        if name in asked:
            raise InputError(f"the arm {name!r} is given twice: leave one out")
        asked[name] = changed
    if minutes is None and any(arm.train.epochs == "auto" for arm in asked.values()):
        minutes = MINUTES
    folder = Path(out).resolve()
    wanted = {name: arm.model_dump(mode="json") for name, arm in asked.items()}
    _same_comparison(folder, {"arms": wanted, "minutes": minutes})
    events({"event": "stage", "stage": "audit"})
    index = _open_index(folder, base)
    budget = _seconds_per_job(folder, minutes, started, len(asked) * seeds)
    # Seed by seed, so that a comparison that is cut short has seen every arm.
    jobs = [Job(str(folder), name, seed, wanted[name], budget) for seed in range(seeds) for name in asked]
    _run_all([job for job in jobs if not _is_done(job)], on, events)
    events({"event": "stage", "stage": "report"})
    found = _analyse(folder, index, jobs, budget)
    write_json(folder / "comparison.json", found)
    write_comparison(folder / "report.html", found)
    return read_json(folder / "comparison.json")


def parse_arm(text: str, base: Recipe) -> tuple[str, Recipe]:
    """Return an arm's name, and the recipe that it stands for on the data of ``base``.

    Raises:
        InputError: it names nothing, or something that is no part of a training recipe.
    """
    if text.endswith(".toml"):
        arm = Recipe.load(text)
        name = Path(text).stem
    elif "=" in text:
        changes = re.split(r",(?=[a-z_]+(?:\.[a-z_0-9]+)*=)", text)
        arm = Recipe.from_dict(apply_overrides(base.model_dump(exclude_none=True), changes), f"the arm {text!r}")
        name = text
    else:
        arm, name = _by_slug(text, base), text
    arm.data, arm.minutes, arm.seed = base.data.model_copy(deep=True), None, None
    check_names(arm)
    return name, arm


def _by_slug(text: str, base: Recipe) -> Recipe:
    slug, _, part = text.partition(":")
    card = find(slug)
    arm = base.model_copy(deep=True)
    if card.status == "planned":
        raise InputError(f"{slug} is planned and not built yet: `vitrail list --status works` shows what can be an arm")
    if card.stage == "model":
        names = [path.rpartition(":")[2] for path in card.provides]
        if part and part not in names:
            raise InputError(f"{slug} has no model {part!r}: it has {', '.join(names)}")
        arm.model.name = part or names[0]
    elif card.stage == "edit":
        arm.model.edits.append(EditConfig(name=text))
    elif card.stage == "method":
        arm.method.name = text
        arm.method.options = {}
    else:
        possible = ", ".join(c.slug for c in cards().values() if c.stage in ("model", "edit", "method") and c.provides)
        raise InputError(
            f"{slug} is a system of stage {card.stage} and no part of a training recipe: arms are models, edits and "
            f"methods ({possible}), recipe files, or key=value"
        )
    return arm


def arm_folder(out: Path, arm: str) -> Path:
    """Return an arm's folder: its name as far as a file name can hold it, and a digest."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", arm)[:48]
    return out / "arms" / f"{plain}-{hashlib.sha256(arm.encode()).hexdigest()[:8]}"


# ---- the folder


def _same_comparison(folder: Path, asked: dict[str, Any]) -> None:
    """Write what was asked for, or raise if the folder holds something else. Seeds may be added."""
    file = folder / "request.json"
    if file.exists():
        if read_json(file) != json.loads(json.dumps(asked)):
            raise RunError(f"{folder} holds another comparison: choose another folder with --out, or delete this one")
        return
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no comparison: choose another folder with --out")
    write_json(file, asked)


def _open_index(folder: Path, recipe: Recipe) -> Index:
    source = open_source(recipe.data)
    found = audit(source, recipe.data, folder / "audit.sqlite")
    path = folder / "index.arrow"
    if path.exists():
        index = Index.open(path, source)
        if index.fingerprint != found.fingerprint:
            raise RunError(f"the images of {source.uri} have changed since {folder} was begun: choose another --out")
        return index
    index = build_index(source, found, recipe.data, path)
    write_json(folder / "data.json", {**found.summary(), "index": index.summary()})
    return index


def _seconds_per_job(folder: Path, minutes: float | None, started: float, jobs: int) -> float | None:
    """Return every job's share; the first call decides, so that arms that are run later get the same."""
    if minutes is None:
        return None
    file = folder / "budget.json"
    if not file.exists():
        left = minutes * 60 - (time.monotonic() - started) - REPORT_SECONDS
        share = left / jobs
        if share < 2:
            raise InputError(f"--minutes {minutes:g} leaves {max(share, 0):.1f} s for each of {jobs} jobs: give more")
        write_json(file, {"seconds_per_job": round(share, 2)})
    return float(read_json(file)["seconds_per_job"])


# ---- jobs


def _is_done(job: Job) -> bool:
    return job.result.exists() and "error" not in read_json(job.result)


def _run_all(jobs: list[Job], on: str, events: Callable[[Event], None]) -> None:
    if on == "ray":
        _run_on_ray(jobs, events)
        return
    for number, job in enumerate(jobs):
        events({"event": "stage", "stage": f"{job.arm}, seed {job.seed} ({number + 1} of {len(jobs)})"})
        _tell(job, run_job(job, events), events)


def _run_on_ray(jobs: list[Job], events: Callable[[Event], None]) -> None:
    ray = require("ray", "ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    # The plan of an arm is made by its first seed; the others follow it.
    for seed in sorted({job.seed for job in jobs}):
        remote = ray.remote(num_cpus=1, max_retries=0)(run_job)
        waiting = {remote.remote(job): job for job in jobs if job.seed == seed}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            try:
                _tell(job, ray.get(done), events)
            except ray.exceptions.RayError as error:  # the machine went away
                text = " ".join(str(error).split())[:200]
                write_json(job.result, {"arm": job.arm, "seed": job.seed, "error": text})
                _tell(job, text, events)


def _tell(job: Job, error: str, events: Callable[[Event], None]) -> None:
    if error:
        events({"event": "warning", "text": f"{job.arm}, seed {job.seed} failed: {error}; the others go on"})


def run_job(job: Job, events: Callable[[Event], None] = lambda event: None) -> str:
    """Train one arm with one seed and write its result; return its error, or "" when it went well."""
    started = time.monotonic()
    try:
        found = _train(job, started, events)
    except Exception as error:  # noqa: BLE001 - whatever an arm does must not end the others
        text = " ".join(str(error).split()) if isinstance(error, VitrailError) else ""
        text = text or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        write_text(job.folder / "error.txt", traceback.format_exc())
        write_json(job.result, {"arm": job.arm, "seed": job.seed, "error": text})
        return text
    write_json(job.result, {"arm": job.arm, "seed": job.seed, "seconds": round(time.monotonic() - started, 2), **found})
    # Pixels that were kept for its next epoch: of all arms together they would fill a disk.
    shutil.rmtree(RunFolder(job.folder).cache, ignore_errors=True)
    return ""


def _train(job: Job, started: float, events: Callable[[Event], None]) -> dict[str, Any]:
    asked = Recipe.from_dict(job.recipe)
    folder = Path(job.out)
    index = Index.open(folder / "index.arrow", open_source(asked.data))
    run = RunFolder(job.folder)
    run.create()
    run.cache.mkdir(exist_ok=True)
    # What is left of the time after training: the held-out images, measured by the plan, and a little.
    deadline = None if job.seconds is None else started + (1 - EVALUATION_SHARE) * job.seconds
    plan = _plan(job, asked, index, deadline, events)
    recipe = Recipe.from_dict(plan["recipe"])
    recipe.train.seed = job.seed
    write_text(run.recipe, recipe.to_toml())
    end = None if deadline is None else deadline - plan["evaluation"]
    learned = learn(run, index, recipe, switches=plan["switches"], deadline=lambda: end, events=events)
    rows = _held_out(index)
    logits, targets, seen = validate(learned.model, index, learned.preprocess, recipe, rows)
    scores = np.full(len(rows), np.nan, np.float32)
    scores[np.searchsorted(rows, seen)] = per_image(logits, targets)
    with atomic_path(run.path / "scores.npy") as temporary, temporary.open("wb") as file:
        np.save(file, scores)
    return {
        "params": count_parameters(learned.model),
        "epochs": learned.trained.epochs,
        "images_per_second": learned.trained.images_per_second,
        "model": recipe.model.name,
        "pretrained": learned.weights.description,
    }


def _plan(
    job: Job, asked: Recipe, index: Index, deadline: float | None, events: Callable[[Event], None]
) -> dict[str, Any]:
    """Return the arm's resolved recipe, made once and followed by all seeds."""
    file = arm_folder(Path(job.out), job.arm) / "plan.json"
    if not file.exists():
        side = int(read_json(Path(job.out) / "data.json")["sizes"]["shorter_side"]["median"])
        plan = resolve(asked, index, side, deadline, lambda text: events({"event": "message", "text": text}))
        write_json(
            file,
            {
                "recipe": plan.recipe.model_dump(mode="json", exclude_none=True),
                "switches": plan.switches,
                "evaluation": plan.evaluation,
            },
        )
    return read_json(file)


def _held_out(index: Index) -> np.ndarray:
    """Return the rows of the test split, or of the validation split where there is none."""
    rows = index.rows("test")
    return rows if len(rows) else index.rows("val")


# ---- what it says


def _analyse(folder: Path, index: Index, jobs: list[Job], budget: float | None) -> dict[str, Any]:
    results = {(job.arm, job.seed): read_json(job.result) for job in jobs}
    names = list(dict.fromkeys(job.arm for job in jobs))
    seeds = sorted({job.seed for job in jobs})
    scores = {
        key: np.load(arm_folder(folder, key[0]) / f"seed-{key[1]}" / "scores.npy", allow_pickle=False)
        for key, result in results.items()
        if "error" not in result
    }
    rows = _held_out(index)
    # Images that could not be read in one of the jobs count in none.
    seen = np.logical_and.reduce([np.isfinite(values) for values in scores.values()] or [np.ones(len(rows), bool)])
    scores = {key: values[seen] for key, values in scores.items()}
    groups = index.groups(rows)[seen]
    arms = []
    for name in names:
        done = [results[name, seed] for seed in seeds if (name, seed) in scores]
        values = [float(scores[name, seed].mean()) for seed in seeds if (name, seed) in scores]
        arm: dict[str, Any] = {
            "name": name,
            "seeds": [seed for seed in seeds if (name, seed) in scores],
            "values": values,
            "mean": float(np.mean(values)) if values else None,
            "errors": {str(seed): results[name, seed]["error"] for seed in seeds if "error" in results[name, seed]},
            "params": done[0]["params"] if done else None,
            "epochs": float(np.mean([result["epochs"] for result in done])) if done else None,
            "images_per_second": float(np.mean([result["images_per_second"] for result in done])) if done else None,
            "model": done[0]["model"] if done else None,
            "pretrained": done[0]["pretrained"] if done else None,
            "difference": None,
        }
        both = [seed for seed in arm["seeds"] if (BASELINE, seed) in scores]
        if name != BASELINE and both:
            ours, theirs = (np.stack([scores[arm_name, seed] for seed in both]) for arm_name in (name, BASELINE))
            found = paired_bootstrap(ours, theirs, groups)
            arm["difference"] = {"mean": found.mean, "low": found.low, "high": found.high, "p": found.p}
        arms.append(arm)
    compared = [arm for arm in arms if arm["difference"]]
    for arm, corrected in zip(compared, holm([arm["difference"]["p"] for arm in compared]), strict=True):
        found = arm["difference"]
        found["p_corrected"] = corrected
        clear = corrected < ALPHA
        found["verdict"] = ("better" if found["mean"] > 0 else "worse") if clear else "no difference seen"
    return {
        "data": index.source.uri,
        "quantity": "ranking average precision" if index.multilabel else "top-1",
        "n_eval": int(seen.sum()),
        "n_train": len(index.rows("train")),
        "n_classes": len(index.classes),
        "seeds": seeds,
        "seconds_per_job": budget,
        "arms": arms,
        "report": str(folder / "report.html"),
        "environment": environment(),
    }
