"""Whole models taking turns in one process: what the comparisons of models share."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def clock() -> float:
    """Return seconds; where one thread computes, those of it alone, which other processes do not lengthen."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def medians(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each arm over rounds in which all take their turn, after one to settle."""
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, run in arms.items():
            start = clock()
            run()
            if turn:
                spent[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


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
