"""Gather what the report and the model card tell: pictures of mistakes, of findings, and how to do it again."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vitrail.data.audit import Audit
from vitrail.data.decode import UnreadableImage, decode
from vitrail.data.index import Index
from vitrail.data.preprocess import Preprocess
from vitrail.errors import InputError
from vitrail.evaluate.explain import grad_cam, overlay
from vitrail.evaluate.metrics import confused_rows, most_confused, worst_errors
from vitrail.report.report import ConfusedPair, Example, ReportContent, audit_keys, thumbnail
from vitrail.runs import RunFolder
from vitrail.training.recipe import Recipe

EXPLAINED = 8


def gather(
    run: RunFolder,
    index: Index,
    found: Audit,
    recipe: Recipe,
    preprocess: Preprocess,
    model: nn.Module,
    summary: dict[str, Any],
    calibration: dict[str, Any],
    answers: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> ReportContent:
    """Return the contents of the report.

    Args:
        run: the run folder.
        index, found, recipe, preprocess, model: of the run.
        summary: the contents of ``summary.json``.
        calibration: result of ``calibrate``.
        answers: logits, targets and rows of the held-out images.
    """
    logits, targets, rows = answers
    temperature = float(summary["temperature"])
    worst = [
        example
        for mistake in worst_errors(logits, targets, rows, temperature=temperature)
        for example in _example(index, mistake)
    ]
    pairs = []
    if not index.multilabel:
        for pair in most_confused(summary["confusion"], index.classes, k=8):
            of_pair = confused_rows(logits, targets, rows, pair["true"], pair["predicted"])
            images = [image for row in of_pair for image in _picture(index, row)]
            pairs.append(ConfusedPair(pair["true_name"], pair["predicted_name"], pair["count"], pair["share"], images))
    return ReportContent(
        summary=summary,
        audit=found.summary(),
        pictures=_audit_pictures(index, found, recipe),
        history=_history(run),
        calibration=calibration,
        worst=worst,
        pairs=pairs,
        explanations=list(_explanations(index, preprocess, model, answers)),
        commands=[f"vitrail fit --recipe {shlex.quote(str(run.recipe))} --out {shlex.quote(f'{run.path}-again')}"],
        recipe=recipe.to_toml(),
        split=_split_sentence(index, recipe),
        title=Path(recipe.data.path or "digits").name,
    )


def _history(run: RunFolder) -> list[dict[str, Any]]:
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else []
    return [json.loads(line) for line in lines]


def _split_sentence(index: Index, recipe: Recipe) -> str:
    counts = {split: len(index.rows(split)) for split in ("train", "val", "test")}
    named = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
    kept = " Near duplicates stay on one side." if recipe.data.near_duplicates == "group" else ""
    return f"Stratified by class, seed {recipe.data.seed}: {named} images.{kept} Every image's side is in split.csv."


def _picture(index: Index, row: int) -> Iterator[Image.Image]:
    """Yield a thumbnail, or nothing where the file has gone since."""
    with contextlib.suppress(UnreadableImage, OSError):
        yield thumbnail(index.load(row))


def _example(index: Index, mistake: dict[str, Any]) -> Iterator[Example]:
    names = {side: ", ".join(index.classes[number] for number in mistake[side]) for side in ("true", "predicted")}
    for image in _picture(index, mistake["row"]):
        yield Example(image, names["true"], names["predicted"], mistake["confidence"], index.key(mistake["row"]))


def _audit_pictures(index: Index, found: Audit, recipe: Recipe) -> dict[str, Image.Image]:
    pictures = {}
    for key, locator in found.locators(audit_keys(found.summary())).items():
        with contextlib.suppress(UnreadableImage, OSError):
            image = decode(
                index.source.read(locator), background=recipe.data.background, max_pixels=recipe.data.max_pixels
            )
            pictures[key] = thumbnail(image)
    return pictures


def _explanations(
    index: Index, preprocess: Preprocess, model: nn.Module, answers: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> Iterator[Example]:
    """Yield held-out images with what spoke for the answer, right and wrong ones in turn."""
    logits, targets, rows = answers
    said = logits.argmax(1)
    right = said == targets if targets.ndim == 1 else targets[np.arange(len(said)), said] > 0.5
    order = np.random.default_rng(0).permutation(len(rows))
    chosen = [*order[right[order]][: EXPLAINED // 2], *order[~right[order]][: EXPLAINED // 2]]
    for place in chosen:
        try:
            pixels = preprocess(index.load(int(rows[place])))
            inputs = torch.from_numpy(preprocess.normalise(pixels))[None]
            cam = grad_cam(model, inputs, int(said[place]))
        except (UnreadableImage, OSError):
            continue
        except InputError:
            return  # this model has no layer with places
        true = [int(targets[place])] if targets.ndim == 1 else np.flatnonzero(targets[place] > 0.5).tolist()
        yield Example(
            Image.fromarray(pixels),
            ", ".join(index.classes[number] for number in true),
            index.classes[int(said[place])],
            key=index.key(int(rows[place])),
            overlay=overlay(pixels, cam),
        )
