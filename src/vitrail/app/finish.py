"""What ``fit`` does after training: measure, export, time, corrupt, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from vitrail import __version__
from vitrail.app.artefact import Artefact, save
from vitrail.app.budget import Clock
from vitrail.app.build import count_flops, count_parameters, model_options
from vitrail.app.environment import environment
from vitrail.app.learn import Learned
from vitrail.app.story import gather
from vitrail.data.audit import Audit
from vitrail.data.batches import Batches, batches_of
from vitrail.data.index import Index
from vitrail.data.loader import make_loader
from vitrail.data.views import build_views
from vitrail.deploy.export import check_parity, export_onnx
from vitrail.deploy.tournament import TournamentResult, tournament
from vitrail.evaluate.calibration import calibrate, expected_calibration_error
from vitrail.evaluate.cascade import nearest_right, nested_answers
from vitrail.evaluate.corruptions import corruption_suite
from vitrail.evaluate.metrics import evaluate
from vitrail.layers.nested import its_nested_classifier, nested_classifier
from vitrail.report.model_card import write_model_card
from vitrail.report.report import write_report
from vitrail.runs import RunFolder, read_json, write_json
from vitrail.training.recipe import Recipe
from vitrail.training.validate import validate

REPORT_SECONDS = 6.0
"""Kept for writing the report."""
UNREADABLE_LISTED = 1000
NESTED_SHARE = 0.03
"""Of the budget, at most, for seeing held-out images at every dimension of a nested model; as much for its database."""
NESTED_IMAGES = 2000


class Stages(Protocol):
    """What ``fit`` lends: its clock and its voice."""

    clock: Clock
    warnings: list[str]

    def tell(self, event: dict[str, Any]) -> None:
        """Pass an event on."""

    def stage(self, name: str) -> Any:
        """Enter a stage."""


class Finish:
    """The stages after training, in order: ``Finish(...).run_all()`` returns the contents of ``summary.json``."""

    def __init__(
        self,
        run: RunFolder,
        index: Index,
        found: Audit,
        recipe: Recipe,
        learned: Learned,
        fit: Stages,
    ) -> None:
        self.run, self.index, self.found, self.recipe, self.fit = run, index, found, recipe, fit
        self.preprocess, self.weights, self.trained = learned.preprocess, learned.weights, learned.trained
        # Everything reported is computed in fp32, whatever training used.
        self.model = learned.model.float().eval()
        self.split = "test" if len(index.rows("test")) else "val"
        self.rows = index.rows(self.split)

    def run_all(self) -> dict[str, Any]:
        """Do everything; return the contents of ``summary.json``."""
        with self.fit.stage("evaluate"):
            figures = self._evaluate()
        with self.fit.stage("deploy"):
            runtimes, onnx = self._deploy()
        with self.fit.stage("corruptions"):
            corruption = self._corrupt()
        with self.fit.stage("report"):
            summary = self._summarise(figures, runtimes, onnx, corruption)
            self._report(summary)
        self._clock(summary)
        # The last file: a run with a summary is finished.
        write_json(self.run.summary, summary)
        return read_json(self.run.summary)

    # ---- figures

    def _evaluate(self) -> dict[str, Any]:
        exact = self.recipe.model_copy(deep=True)
        exact.train.precision = "fp32"

        def logits(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return validate(self.model, self.index, self.preprocess, exact, rows)

        val = logits(self.index.rows("val"))
        self.calibration = calibrate(*val[:2])
        self.temperature = float(self.calibration["temperature"])
        self.answers = val if self.split == "val" else logits(self.rows)
        values, targets, _ = self.answers
        figures = evaluate(values, targets, self.index.classes)
        if self.split == "val":
            # The temperature was fitted on these very images: only the cross-fitted error is honest.
            figures["ece_calibrated"] = self.calibration["ece_calibrated"]
        else:
            figures["ece_calibrated"] = expected_calibration_error(values, targets, temperature=self.temperature)
        if nested_classifier(self.model) is not None:
            figures["nested"] = self._nested()
        return figures

    def _nested(self) -> dict[str, Any]:
        """Return what a nested model is worth at each of its dimensions, on some of the images."""
        seconds = NESTED_SHARE * (self.fit.clock.seconds or 600.0)

        def answers(rows: np.ndarray) -> tuple[np.ndarray, ...]:
            batches = batches_of(self.index, _spread(rows, NESTED_IMAGES), self.preprocess)
            return nested_answers(self.model, _for_seconds(batches, seconds))[1:]

        right, queries, truth = answers(self.rows)
        _, database, labels = answers(self.index.rows("train"))
        table = [
            {
                "dim": dim,
                "bytes": 4 * dim,
                "top1": float(right[level].mean()),
                "neighbour_top1": nearest_right(dim, queries, truth, database, labels),
            }
            for level, dim in enumerate(its_nested_classifier(self.model).dims)
        ]
        return {"table": table, "images": len(queries), "database": len(database)}

    # ---- what ships

    def _deploy(self) -> tuple[TournamentResult, dict[str, Any]]:
        recipe, index = self.recipe, self.index
        save(self.run, self.model, self._artefact(""))
        export_onnx(
            self.model,
            self.preprocess,
            self.run.onnx,
            classes=index.classes,
            temperature=self.temperature,
            multilabel=index.multilabel,
        )
        parity = check_parity(self.model, self.preprocess, self.run.onnx, self._images(16))
        deadline = self.fit.clock.deadline
        if deadline is not None:
            # Half of what is left, so that corruptions get their share.
            deadline = time.monotonic() + max(5.0, 0.6 * (deadline - REPORT_SECONDS - time.monotonic()))
        runtimes = tournament(
            self.model,
            self.preprocess,
            self.run.path,
            onnx_path=self.run.onnx,
            calibration=self._calibration_pixels,
            validation=self._pixels,
            config=recipe.deploy,
            deadline=deadline,
            progress=lambda text: self.fit.tell({"event": "message", "text": text}),
        )
        save(self.run, self.model, self._artefact(runtimes.winner))
        return runtimes, parity.to_dict()

    def _artefact(self, runtime: str) -> Artefact:
        return Artefact(
            model=self.recipe.model.name,
            options=model_options(self.recipe.model, len(self.index.classes)),
            edits=[edit.model_dump() for edit in self.recipe.model.edits],
            classes=list(self.index.classes),
            multilabel=self.index.multilabel,
            preprocess=self.preprocess,
            temperature=self.temperature,
            pretrained=self.weights.description,
            runtime=runtime,
            version=__version__,
        )

    def _images(self, count: int) -> Iterator[Image.Image]:
        """Yield up to ``count`` held-out images, spread over the classes, as they come from their files."""
        for row in _spread(self.rows, count):
            yield self.index.load(int(row))

    def _batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield pixels as in evaluation, uint8 (B, h, w, 3), targets and rows."""
        loader = make_loader(
            self.index,
            rows,
            build_views({"image": "eval"}, self.preprocess, self.recipe.augment, self.recipe.data),
            batch_size=16,
            shuffle=False,
        )
        for batch in loader:
            if len(batch["row"]):
                pixels = batch["image"].permute(0, 2, 3, 1).contiguous().numpy()
                yield pixels, batch["target"].numpy(), batch["row"].numpy()

    def _calibration_pixels(self) -> Iterator[np.ndarray]:
        for pixels, _, _ in self._batches(_spread(self.index.rows("train"), self.recipe.deploy.calibration_images)):
            yield pixels

    def _pixels(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for pixels, targets, _ in self._batches(_spread(self.rows, len(self.rows))):
            yield pixels, targets

    # ---- corruptions

    def _corrupt(self) -> dict[str, Any] | None:
        if self.recipe.evaluate.corruptions is False:
            return None
        deadline = self.fit.clock.deadline
        rows = _spread(self.rows, self.recipe.evaluate.corruption_images)
        model = self.model.to(memory_format=torch.channels_last)

        def predict(pixels: np.ndarray) -> np.ndarray:
            inputs = torch.from_numpy(self.preprocess.normalise(pixels)).to(memory_format=torch.channels_last)
            with torch.inference_mode():
                return model(inputs).float().numpy()

        return corruption_suite(
            predict,
            lambda: self._batches(rows),
            deadline=None if deadline is None else deadline - REPORT_SECONDS,
            seed=self.recipe.train.seed,
        )

    # ---- words and numbers

    def _summarise(
        self,
        figures: dict[str, Any],
        runtimes: TournamentResult,
        onnx: dict[str, Any],
        corruption: dict[str, Any] | None,
    ) -> dict[str, Any]:
        index, audit = self.index, self.found.summary()
        unreadable = [
            {"path": key, "reason": reason} for key, reason in islice(self.found.unreadable(), UNREADABLE_LISTED)
        ]
        deployed = runtimes.to_dict()
        summary = {
            "vitrail": __version__,
            "model": self.recipe.model.name,
            "pretrained": self.weights.description,
            "pretrained_origin": self.weights.origin,
            "method": self.recipe.method.name,
            "multilabel": index.multilabel,
            "evaluated_on": self.split,
            "n_eval": figures["n"],
            "n_train": len(index.rows("train")),
            "n_val": len(index.rows("val")),
            "n_test": len(index.rows("test")),
            "n_classes": len(index.classes),
            "classes": list(index.classes),
            **{
                key: value
                for key, value in figures.items()
                if key not in ("n", "n_classes", "multilabel", "temperature")
            },
            "temperature": self.temperature,
            "unreadable": unreadable,
            "n_unreadable": audit["unreadable"]["count"],
            "duplicates": {
                "exact": _counts(audit["exact_duplicates"]),
                "near": _counts(audit["near_duplicates"]),
                "leakage": _counts(audit["leakage"]["near"]),
                "conflicts": _counts(audit["conflicts"]["exact"]),
            },
            "params": count_parameters(self.model),
            "flops": count_flops(self.model, self.preprocess.size),
            "epochs": self.trained.epochs,
            "steps": self.trained.steps,
            "stopped": self.trained.stopped,
            "images_per_second": self.trained.images_per_second,
            "failed": self.trained.failed,
            **deployed,
            "corruption": corruption,
            "warnings": self.fit.warnings,
            "environment": environment(),
            "command": f"vitrail predict {self.run.path} IMAGE",
            "report": str(self.run.report),
        }
        summary["onnx"] = {**(summary.get("onnx") or {}), **onnx}
        return summary

    def _report(self, summary: dict[str, Any]) -> None:
        write_json(self.run.environment, summary["environment"])
        write_json(self.run.data, {**self.found.summary(), "index": self.index.summary()})
        content = gather(
            self.run,
            self.index,
            self.found,
            self.recipe,
            self.preprocess,
            self.model,
            summary,
            self.calibration,
            self.answers,
        )
        self._clock(summary)
        write_report(self.run.report, content)
        write_model_card(self.run.model_card, content)

    def _clock(self, summary: dict[str, Any]) -> None:
        """Put the time spent so far into ``summary``."""
        clock = self.fit.clock
        summary["seconds"] = round(clock.spent, 2)
        summary["seconds_per_stage"] = {name: round(spent, 2) for name, spent in clock.stages.items()}


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Return up to ``count`` of ``rows`` in an order without meaning, the same at every call."""
    return np.random.default_rng(0).permutation(rows)[:count]


def _for_seconds(batches: Batches, seconds: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches, the first and those that are asked for within so many seconds."""
    end = time.monotonic() + seconds
    for batch in batches():
        yield batch
        if time.monotonic() > end:
            return


def _counts(entry: dict[str, Any]) -> dict[str, int]:
    return {name: entry[name] for name in ("groups", "images")}
