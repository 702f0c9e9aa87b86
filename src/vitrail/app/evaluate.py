"""``vitrail evaluate``: a run's shipped model on other labelled images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vitrail.data.decode import UnreadableImage, decode
from vitrail.data.sources import open_source
from vitrail.deploy.runtime import Predictor
from vitrail.errors import DataError
from vitrail.evaluate.metrics import evaluate
from vitrail.training.recipe import Recipe, apply_overrides


def evaluate_run(run: str | Path, path: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Measure the shipped model of ``run`` on the labelled images of ``path``, matching labels by name.

    Returns:
        The figures of ``vitrail.evaluate.metrics.evaluate``, and ``unreadable`` (path and reason) and
        ``unknown_classes`` (images per class that the model does not know, left out).

    Raises:
        DataError: no class of the data is a class of the model, or no image can be read, or one of the two has several
            labels per image and the other has not.
    """
    predictor = Predictor(run)
    config = Recipe.from_dict(apply_overrides({"data": {"path": path}}, overrides)).data
    source = open_source(config)
    if source.multilabel != predictor.multilabel:
        kinds = {True: "several labels", False: "one label"}
        raise DataError(
            f"the images of {path} have {kinds[source.multilabel]} each and the model was trained on "
            f"{kinds[predictor.multilabel]}: set data.label_separator as in training"
        )
    numbers = {name: number for number, name in enumerate(predictor.classes)}
    targets: list[Any] = []
    unreadable: list[dict[str, str]] = []
    unknown: Counter[str] = Counter()

    def images() -> Iterator[np.ndarray]:
        for record in source.records():
            if record.problem is not None:
                unreadable.append({"path": record.key, "reason": record.problem})
                continue
            strange = [label for label in record.labels if label not in numbers]
            if strange:
                unknown.update(strange)
                continue
            try:
                blob = source.read(record.locator)
                image = decode(blob, background=predictor.preprocess.background, max_pixels=config.max_pixels)
            except (UnreadableImage, OSError) as error:
                unreadable.append({"path": record.key, "reason": getattr(error, "reason", None) or str(error)})
                continue
            targets.append([numbers[label] for label in record.labels])
            yield np.asarray(image)

    answers = [_in_order(answer, numbers) for answer in predictor.predict(images(), top=len(numbers))]
    if not answers:
        if unknown:
            raise DataError(
                f"no class of {path} is a class of the model: {', '.join(list(unknown)[:4])} there, "
                f"{', '.join(predictor.classes[:4])} here; labels are matched by name (see data.level)"
            )
        raise DataError(f"no image of {path} can be read; `vitrail audit {path}` says why")
    probabilities = np.stack(answers).clip(1e-9, 1 - 1e-9)
    if predictor.multilabel:
        logits = np.log(probabilities) - np.log1p(-probabilities)
        truth = np.zeros(logits.shape, np.float32)
        for row, labels in enumerate(targets):
            truth[row, labels] = 1
    else:
        logits, truth = np.log(probabilities), np.array([labels[0] for labels in targets])
    figures = evaluate(logits, truth, predictor.classes)
    return {**figures, "runtime": predictor.runtime, "unreadable": unreadable, "unknown_classes": dict(unknown)}


def _in_order(prediction: Any, numbers: dict[str, int]) -> np.ndarray:
    """Return the probabilities (C,) of a prediction that lists all classes, in the order of the classes."""
    if prediction.error is not None:
        raise DataError(f"the model failed on an image: {prediction.error}")
    row = np.empty(len(numbers), np.float64)
    row[[numbers[name] for name in prediction.classes]] = prediction.probabilities
    return row


def evaluate_command(run: Path, path: str, *, as_json: bool, overrides: Iterable[str]) -> None:
    """Print the figures, as JSON or as tables."""
    figures = evaluate_run(run, path, overrides)
    console = Console(highlight=False)
    if as_json:
        print(json.dumps(figures))  # noqa: T201 - the command's output
        return
    table = Table(show_header=False, box=None)
    if figures["multilabel"]:
        table.add_row("mean average precision", f"{figures['map']:.1%}")
    else:
        low, high = figures["top1_interval"]
        table.add_row("top-1", f"{figures['top1']:.1%}  (95 % interval {low:.1%} to {high:.1%})")
        table.add_row("top-5", f"{figures['top5']:.1%}")
    table.add_row("macro F1", f"{figures['macro_f1']:.3f}")
    table.add_row("calibration error", f"{figures['ece']:.3f}")
    table.add_row("images", str(figures["n"]))
    if figures["unreadable"]:
        first = figures["unreadable"][0]
        table.add_row("unreadable", f"{len(figures['unreadable'])}, the first {first['path']}: {first['reason']}")
    if figures["unknown_classes"]:
        table.add_row(
            "left out", f"{sum(figures['unknown_classes'].values())} images of classes the model does not know"
        )
    console.print(table)
    worst = sorted((row for row in figures["per_class"] if row["f1"] is not None), key=lambda row: row["f1"])[:10]
    detail = Table("weakest classes", "images", "precision", "recall", "F1", box=None)
    for row in worst:
        cells = (row["precision"], row["recall"], row["f1"])
        detail.add_row(row["name"], str(row["support"]), *("-" if cell is None else f"{cell:.2f}" for cell in cells))
    console.print(detail)
