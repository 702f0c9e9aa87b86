"""What the comparisons of whole models, which take turns in one process, share beside ``vitrail.evaluate.turns``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def clock() -> float:
    """Return seconds; where one thread computes, those of it alone, which other processes do not lengthen."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def what_was_timed() -> str:
    """Return a line on the clock and the threads, for the foot of a table."""
    threads = torch.get_num_threads()
    kind = "CPU seconds of one thread" if threads == 1 else f"wall seconds, {threads} threads"
    return f"Medians of interleaved rounds in one process; {kind}; torch {torch.__version__}."


def as_markdown(rows: Sequence[Row]) -> str:
    """Return rows of one shape as a table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in head) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def save(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON, or as a table where the name ends in .md."""
    if path.suffix == ".md":
        path.write_text(f"{as_markdown(rows)}\n\n{what_was_timed()}\n", encoding="utf-8")
    else:
        path.write_text(json.dumps({"rows": list(rows), "timed": what_was_timed()}, indent=1), encoding="utf-8")
