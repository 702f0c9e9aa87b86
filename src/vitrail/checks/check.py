"""The contract of a check: ``run(ctx: Context) -> Verdict``.

A check is a small, honest, falsifiable experiment of one paper's central claim: arms at equal budget (with the method,
without it, and the strongest simple alternative), several seeds, one quantity, its interval. It is written once, before
its outcome is known, and is never tuned until it agrees. It uses the public interface alone, and takes from its context
the data, the seeds and the way to train, so that one file runs in a minute or in full, on bundled data or a user's.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import nn

from vitrail.app.artefact import Artefact, save
from vitrail.app.build import count_flops, count_parameters, model_options
from vitrail.app.learn import Learned, learn
from vitrail.data.audit import audit
from vitrail.data.batches import Batches, batches_of
from vitrail.data.index import Index, build_index
from vitrail.data.preprocess import Preprocess
from vitrail.data.sources import open_source
from vitrail.errors import DataError, InputError
from vitrail.runs import RunFolder
from vitrail.training.recipe import DataConfig, Recipe, apply_overrides
from vitrail.training.validate import validate

Outcome = Literal["confirmed", "not seen", "contradicted"]
BUNDLED = {
    "digits": None,
    "fashion": ("/usr/share/datasets/fashion-mnist", "dataset-fashion-mnist"),
    "clipart": ("/usr/share/openclipart/png", "openclipart-png"),
}
"""Data that need no download: the path, and the Debian package that installs it."""
BASE: dict[str, Any] = {
    "model": {"name": "small_resnet_nano", "pretrained": "none", "resize": "squash", "crop_pct": 1.0},
    "augment": {"policy": "shift", "flip": 0.0},
    "optim": {"lr": 3e-3},
    "train": {
        "epochs": 10.0,
        "batch_size": 64,
        "head_start": 0.0,
        "freeze": 0.0,
        "precision": "fp32",
        "channels_last": True,
        "ema": 0.0,
        "workers": 0,
        "checkpoint_seconds": 600.0,
    },
}
"""What an arm is trained with unless it says otherwise. Nothing here depends on the machine or on the clock."""
SIDES = {"digits": 16, "idx": 28}
SIDE = 64
"""Pixels at which an arm is trained, by kind of source."""


@dataclass(frozen=True)
class Finding:
    """One claim, what was measured of it, and what that says.

    Attributes:
        claim: one falsifiable sentence.
        quantity: what was measured, and its unit.
        arms: name -> one value per seed.
        outcome: *confirmed* if the whole interval lies on the claimed side of zero, *contradicted* if it lies on the
            other side, else *not seen*.
        difference: mean of the paired differences, the arm of the claim less the one it is compared with.
        interval: of ``difference``, 95 %; None where one seed or an exact statement has none.
    """

    claim: str
    quantity: str
    arms: dict[str, list[float]]
    outcome: Outcome
    difference: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """What a check found: the first finding is of the central claim and gives the verdict.

    Attributes:
        findings: one or more.
        notes: what a reader has to know: the data, the sizes, what is not shown.
        tables: name -> rows of plain values: costs, curves.
    """

    findings: list[Finding]
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        """Of the central claim."""
        return self.findings[0].outcome


def paired(
    claim: str,
    quantity: str,
    arms: Mapping[str, Sequence[float]],
    *,
    ours: str,
    against: str,
    higher_is_better: bool = True,
) -> Finding:
    """Judge the claim that the arm ``ours`` beats the arm ``against``, paired over seeds.

    The interval is Student's: it is wide for three seeds, and honest, where resampling three values is not.

    Args:
        claim, quantity: as in ``Finding``.
        arms: name -> one value per seed, in the same order of seeds.
        ours, against: names of arms.
        higher_is_better: whether a larger quantity agrees with the claim.
    """
    values = {name: [float(value) for value in arm] for name, arm in arms.items()}
    differences = np.subtract(values[ours], values[against])
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Finding(claim, quantity, values, "not seen", mean)
    half = float(stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    low, high = mean - half, mean + half
    better, worse = (low > 0, high < 0) if higher_is_better else (high < 0, low > 0)
    outcome: Outcome = "confirmed" if better else "contradicted" if worse else "not seen"
    return Finding(claim, quantity, values, outcome, mean, (low, high))


def bounded(claim: str, quantity: str, value: float, *, at_most: float) -> Finding:
    """Judge an exact claim: ``value`` is at most ``at_most``."""
    return Finding(claim, quantity, {"measured": [float(value)]}, "confirmed" if value <= at_most else "contradicted")


@dataclass(frozen=True)
class Arm:
    """A trained arm, measured on held-out images.

    Attributes:
        learned: the model, its preprocessing and the course of its training.
        logits, targets: of the held-out images, (N, C) and (N,) or (N, C).
    """

    learned: Learned
    logits: np.ndarray
    targets: np.ndarray

    @property
    def model(self) -> nn.Module:
        """In evaluation mode."""
        return self.learned.model

    @property
    def preprocess(self) -> Preprocess:
        """What the model wants of an image."""
        return self.learned.preprocess

    @cached_property
    def top1(self) -> float:
        """Share of the held-out images answered rightly; of several labels, the most probable is one of them."""
        answers = self.logits.argmax(1)
        if self.targets.ndim == 1:
            return float((answers == self.targets).mean())
        return float((self.targets[np.arange(len(answers)), answers] > 0.5).mean())


@dataclass(frozen=True)
class Context:
    """What a check is given.

    Attributes:
        quick: run through in seconds; the verdict is not judged.
        seeds: of the arms; one in quick mode, at least three in full.
        folder: for files; may be gone afterwards, but PNG and SVG files at its top are kept beside the evidence.
        data: what the user gave with ``--data``, or None.
        tell: takes a line of text about progress.
    """

    quick: bool
    seeds: tuple[int, ...]
    folder: Path
    data: str | None = None
    tell: Callable[[str], None] = lambda text: None

    def index(self, name: str = "digits", **options: Any) -> Index:
        """Return the user's data, or bundled data of this name, audited and split.

        Args:
            name: of ``BUNDLED``.
            **options: of ``DataConfig``, for the bundled data.

        Raises:
            InputError: the bundled data are not installed; names the package.
        """
        if self.data is not None:
            config, name = DataConfig(path=self.data), "data"
        elif name not in BUNDLED:
            raise InputError(f"there are no bundled data {name!r}: choose one of {', '.join(BUNDLED)}")
        else:
            place = BUNDLED[name]
            if place is not None and not Path(place[0]).is_dir():
                raise DataError(f"this check needs the Debian package {place[1]}: install it, or give --data PATH")
            config = DataConfig(**{"path": place[0] if place else None, **options})
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        source = open_source(config)
        return build_index(source, audit(source, config, folder / "audit.sqlite"), config, folder / "index.arrow")

    def train(self, index: Index, arm: str, seed: int, settings: Mapping[str, Any] | None = None) -> Arm:
        """Train an arm and measure it on the test split, or the validation split where there is none.

        Args:
            index: the data.
            arm: its name, also of its folder.
            seed: of initialisation, order and augmentation.
            settings: dotted keys of the recipe with their values, on top of ``BASE``: ``{"model.name": "rmt_nano"}``.
        """
        recipe = self.recipe(index, settings or {}, seed)
        self.tell(f"{arm}, seed {seed}")
        run = RunFolder(self.folder / "arms" / arm / f"seed-{seed}")
        run.create()
        run.cache.mkdir(exist_ok=True)
        learned = learn(run, index, recipe)
        rows = index.rows("test")
        logits, targets, _ = validate(
            learned.model, index, learned.preprocess, recipe, rows if len(rows) else index.rows("val")
        )
        return Arm(learned, logits, targets)

    def teacher(self, index: Index, settings: Mapping[str, Any]) -> tuple[Arm, str]:
        """Train a teacher and save it as a finished run; return it and the folder.

        Args:
            index: the data.
            settings: as of ``train``.
        """
        arm = self.train(index, "teacher", 0, settings)
        config = self.recipe(index, settings).model
        artefact = Artefact(
            model=config.name,
            options=model_options(config, len(index.classes)),
            edits=[],
            classes=list(index.classes),
            multilabel=index.multilabel,
            preprocess=arm.preprocess,
        )
        folder = RunFolder(self.folder / "teacher")
        folder.create()
        save(folder, arm.model, artefact)
        return arm, str(folder.path)

    def recipe(self, index: Index, settings: Mapping[str, Any], seed: int = 0) -> Recipe:
        """Return ``BASE`` with ``settings``, a size that fits the images, and the seed."""
        side = SIDES.get(index.source.kind, SIDE)
        values = apply_overrides({**BASE, "seed": seed, "model": {**BASE["model"], "img_size": side}}, [])
        for key, value in settings.items():
            *sections, leaf = key.split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = value
        return Recipe.from_dict(values, "the settings of a check")

    def held_out(self, index: Index, preprocess: Preprocess, *, most: int | None = None) -> Batches:
        """Return the stream of up to ``most`` held-out images, spread over the classes."""
        rows = index.rows("test")
        rows = np.random.default_rng(0).permutation(rows if len(rows) else index.rows("val"))[:most]
        return batches_of(index, rows, preprocess)

    def training_images(self, index: Index, preprocess: Preprocess, *, most: int | None = None) -> Batches:
        """Return the stream of up to ``most`` training images as seen in evaluation, for calibration."""
        rows = np.random.default_rng(0).permutation(index.rows("train"))[:most]
        return batches_of(index, rows, preprocess)


# ---- rows of tables that several checks have


def arm_cost(name: str, arm: Arm) -> dict[str, Any]:
    """Return an arm's parameters and multiply-adds, and milliseconds for an image of a batch of 32."""
    times, images = [], torch.zeros(32, 3, *arm.preprocess.size)
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            arm.model(images)
            times.append(time.perf_counter() - start)
    return {
        "arm": name,
        "parameters": count_parameters(arm.model),
        # Fused attention is not counted on every device; on the meta device it is taken apart.
        "madds": count_flops(copy.deepcopy(arm.model).to("meta"), arm.preprocess.size),
        "ms_per_image": 1e3 * min(times[1:]) / len(images),
    }


def beyond_rounding(found: float, published: float, digit: float) -> float:
    """Return how far a figure is from one that was rounded to multiples of ``digit``, as a share of it."""
    return max(0.0, abs(found - published) - digit / 2) / published


def size_of(model: nn.Module, side: int = 224) -> tuple[float, float]:
    """Return the millions of parameters of a net and its billions of multiply-adds for an image of ``side`` pixels."""
    return count_parameters(model) / 1e6, count_flops(model, (side, side)) / 1e9


def size_row(
    net: str, found: tuple[float, float], published: tuple[float, float | None], digits: tuple[float, float]
) -> dict[str, Any]:
    """Return what a published net was counted to take, and how far that is from what its authors say.

    Args:
        net: its name.
        found: millions of parameters and billions of multiply-adds, as ``size_of`` gives them.
        published: both; None where no multiply-adds are.
        digits: the multiples to which each was rounded.
    """
    (params, madds), (said_params, said_madds) = found, published
    return {
        "net": net,
        "params_m": params,
        "published_params_m": said_params,
        "params_off": beyond_rounding(params, said_params, digits[0]),
        "madds_g": madds,
        "published_madds_g": said_madds,
        "madds_off": None if said_madds is None else beyond_rounding(madds, said_madds, digits[1]),
    }
