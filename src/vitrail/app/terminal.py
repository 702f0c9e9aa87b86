"""What the command line shows while a run goes on, and its final table."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

STAGES = {
    "start": "Loading",
    "audit": "Auditing the data",
    "choose": "Choosing a recipe",
    "head_start": "Training the head on cached features",
    "train": "Training",
    "evaluate": "Evaluating",
    "deploy": "Exporting and timing",
    "corruptions": "Corrupting",
    "report": "Writing the report",
}


class FitDisplay:
    """A live bar per stage, with facts and warnings printed above it.

    On a terminal the bar is redrawn in place; elsewhere (a log file) each stage is one line.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> Self:
        self._progress.start()
        self.event({"event": "stage", "stage": "start"})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._progress.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Show one event of ``fit``: a stage, its progress, a message or a warning."""
        kind = event["event"]
        if kind == "stage":
            self._stage = event["stage"]
            name = STAGES.get(self._stage, self._stage)
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(name, total=None, note="")
            if not self.console.is_terminal:
                self.console.print(name)
        elif kind == "progress" and self._task is not None:
            self._progress.update(
                self._task, completed=event.get("step", 0), total=event.get("total"), note=_note(event)
            )
        elif kind == "message":
            self.console.print(f"  {event['text']}", markup=False)
        elif kind == "warning":
            self.console.print(f"  [yellow]warning[/]: {_escape(event['text'])}")

    def final(self, summary: dict[str, Any]) -> None:
        """Print the result as a table, and where everything is."""
        out = Console(highlight=False)
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in summary_rows(summary):
            table.add_row(f"[bold]{name}[/]", _escape(value))
        out.print(table)


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the name and value of each line of the final table."""
    rows: list[tuple[str, str]] = []
    add = rows.append
    if summary.get("multilabel"):
        add(("mean average precision", f"{summary['map']:.1%}"))
    else:
        low, high = summary["top1_interval"]
        add(("top-1", f"{summary['top1']:.1%}  (95 % interval {low:.1%} to {high:.1%}, {summary['n_eval']} images)"))
        if summary["n_classes"] > 5:
            add(("top-5", f"{summary['top5']:.1%}"))
    add(("macro F1", f"{summary['macro_f1']:.3f}"))
    if summary.get("ece") is not None:
        add(("calibration error", f"{summary['ece']:.3f}, after temperature scaling {summary['ece_calibrated']:.3f}"))
    corruption = summary.get("corruption") or {}
    if corruption.get("mean") is not None:
        add(("top-1, corrupted", f"{corruption['mean']:.1%}  (mean of {len(corruption['per_kind'])} kinds)"))
    add(
        (
            "model",
            f"{summary['model']}, {summary['params'] / 1e6:.2f} M parameters, "
            f"{summary['flops'] / 1e9:.3f} G multiply-adds",
        )
    )
    add(("weights", summary["pretrained"]))
    onnx = summary.get("onnx")
    if onnx:
        add(("ONNX", f"{onnx['latency_ms']:.2f} ms per image, differs from PyTorch by {onnx['max_abs_diff']:.1e}"))
    int8 = summary.get("int8")
    if int8:
        verdict = "accepted" if int8["accepted"] else "refused"
        latency = f"{int8['latency_ms']:.2f} ms, " if int8.get("latency_ms") is not None else ""
        add(("INT8", f"{latency}{verdict}: {int8['reason']}" if int8.get("reason") else f"{latency}{verdict}"))
    add(("ships", summary.get("ships", "")))
    unreadable = len(summary["unreadable"])
    add(
        (
            "data",
            f"{summary['n_train']} training and {summary['n_val']} validation images, {summary['n_classes']} classes"
            + (f", {unreadable} unreadable (listed in data.json)" if unreadable else ""),
        )
    )
    add(("time", f"{summary['seconds']:.0f} s"))
    add(("report", summary["report"]))
    return rows


def comparison_lines(found: dict[str, Any]) -> list[str]:
    """Return the result of ``compare`` in words."""
    arms = found["arms"]
    width = max(len(arm["name"]) for arm in arms)
    told = [f"{found['quantity']} on {found['n_eval']} images, {len(found['seeds'])} seeds; differences in points"]
    for arm in arms:
        mean = f"{arm['mean']:7.2%}" if arm["values"] else " failed"
        line = f"  {arm['name']:{width}}  {mean}"
        if difference := arm.get("difference"):
            mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
            line += f"  {mean:+6.2f} ({low:+.2f} to {high:+.2f})  p {difference['p_corrected']:.3f}"
            line += f"  {difference['verdict']}"
        told.append(line)
        told += [f"    seed {seed} failed: {error}" for seed, error in arm["errors"].items()]
    return [*told, "", f"report: {found['report']}"]


def _note(event: dict[str, Any]) -> str:
    parts = []
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("top1") is not None:
        parts.append(f"top-1 {event['top1']:.1%}")
    if event.get("images_per_second"):
        parts.append(f"{event['images_per_second']:.0f} images/s")
    if event.get("eta") is not None:
        minutes, seconds = divmod(max(0, round(event["eta"])), 60)
        parts.append(f"{minutes}:{seconds:02} left")
    return "  ".join(parts)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
