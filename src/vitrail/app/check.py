"""``vitrail check``: run a system's experiment and keep what it showed."""

from __future__ import annotations

import importlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vitrail import __version__
from vitrail.app.environment import environment
from vitrail.catalog import find
from vitrail.checks.check import Context, Verdict
from vitrail.errors import InputError
from vitrail.runs import write_json

QUICK_SEEDS, FULL_SEEDS = 1, 3


def check(
    slug: str,
    *,
    data: str | None = None,
    full: bool = False,
    seeds: int | None = None,
    out: str | Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the check of a system and return its evidence, plain values for JSON.

    Args:
        slug: of a system that has a check.
        data: images to use instead of the bundled ones: anything that ``vitrail fit`` takes.
        full: all arms at the size that a verdict needs, minutes; else quick, seconds, and the verdict is not judged.
        seeds: of each arm; 3 in full mode (the least), 1 in quick mode.
        out: folder for the evidence, a file per run and the pictures that the check drew; nothing is written without
            one.
        tell: takes lines of text about progress.

    Raises:
        InputError: no such system, or it has no check; too few seeds.
    """
    card = find(slug)
    if not card.check:
        why = "it is planned and not built yet" if card.status == "planned" else "checks compare with it"
        raise InputError(f"{slug} has no check: {why}; `vitrail list --status works` shows what is built")
    least = FULL_SEEDS if full else QUICK_SEEDS
    count = least if seeds is None else seeds
    if count < least:
        raise InputError(f"--seeds {count} is not allowed: a {'full' if full else 'quick'} check needs {least} or more")
    module = importlib.import_module(card.check)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vitrail-check-") as folder:
        # Whatever a check draws outside its arms is drawn alike at every run.
        torch.manual_seed(0)
        context = Context(not full, tuple(range(count)), Path(folder), data, tell)
        verdict: Verdict = module.run(context)
        now = datetime.now(UTC)
        name = f"{slug}-{'full' if full else 'quick'}-{now:%Y%m%dT%H%M%SZ}"
        pictures = sorted(path for path in Path(folder).iterdir() if path.suffix in (".png", ".svg"))
        if out is not None and pictures:
            Path(out).mkdir(parents=True, exist_ok=True)
            for picture in pictures:
                shutil.copy(picture, Path(out) / f"{name}-{picture.name}")
    evidence = {
        "slug": slug,
        "mode": "full" if full else "quick",
        "outcome": verdict.outcome if full else "not judged",
        "findings": [asdict(finding) for finding in verdict.findings],
        "notes": verdict.notes,
        "tables": verdict.tables,
        "data": data or "bundled",
        "seeds": list(context.seeds),
        "seconds": round(time.monotonic() - started, 1),
        "date": now.isoformat(timespec="seconds"),
        "vitrail": __version__,
        "environment": environment(),
    }
    if out is not None:
        path = Path(out) / f"{name}.json"
        write_json(path, evidence)
        evidence["path"] = str(path)
    return evidence


def lines(evidence: dict[str, Any]) -> list[str]:
    """Return the evidence in words, for a terminal."""
    told = [f"{evidence['slug']}: {evidence['outcome']}  ({evidence['mode']}, {evidence['seconds']:.0f} s)"]
    for finding in evidence["findings"]:
        told += ["", finding["claim"], f"  {finding['quantity']}"]
        width = max(len(name) for name in finding["arms"])
        for name, values in finding["arms"].items():
            shown = " ".join(f"{value:.4g}" for value in values)
            mean = f"  mean {sum(values) / len(values):.4g}" if len(values) > 1 else ""
            told.append(f"    {name:{width}}  {shown}{mean}")
        if finding["difference"] is not None:
            low, high = finding["interval"] or (None, None)
            interval = f", 95 % interval {low:+.4g} to {high:+.4g}" if finding["interval"] else ""
            told.append(f"    difference {finding['difference']:+.4g}{interval}: {finding['outcome']}")
        else:
            told.append(f"    {finding['outcome']}")
    for name, rows in evidence["tables"].items():
        told += ["", name, *_table(rows)]
    told += [""] if evidence["notes"] else []
    told += [f"note: {note}" for note in evidence["notes"]]
    if evidence["mode"] == "quick":
        told += ["", "A quick run shows that the check works, and judges nothing: add --full for a verdict."]
    told += ["", f"written to {evidence['path']}"] if "path" in evidence else []
    return told


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [list(rows[0])] + [[_cell(row.get(key)) for key in rows[0]] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    return ["    " + "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)) for line in cells]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
