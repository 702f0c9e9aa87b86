"""The plots of the report, as SVG that takes its colours and its font from the page around it.

Matplotlib draws with stand-in colours, which become CSS variables; so one file serves light and dark.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

P = ParamSpec("P")

INK, MUTED, LINE, BLUE, AMBER, TEAL, ROSE = (f"#0{n}0{n}0{n}" for n in range(1, 8))
_CSS = dict(zip((INK, MUTED, LINE, BLUE, AMBER, TEAL, ROSE), ("ink", "muted", "line", "c1", "c2", "c3", "c4")))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vitrail",
    "text.parse_math": False,  # a class may be called "$x$"
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
WIDTH = 4.6
"""Inches: text is then readable on a phone and not huge on a desk."""
MAX_CELLS = 40
"""Classes up to which the confusion matrix names each; beyond, cells are merged into a heat map."""


def svg_plot(draw: Callable[P, tuple[str, Figure] | None]) -> Callable[P, str]:
    """Let a function that returns (name, figure) return SVG, or "" for None: there is nothing to draw."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(), warnings.catch_warnings():
            matplotlib.rcdefaults()  # whatever the user's own style is
            matplotlib.rcParams.update(_STYLE)
            warnings.simplefilter("ignore", UserWarning)  # glyphs that only the browser's font has
            result = draw(*args, **kwargs)
            if result is None:
                return ""
            name, figure = result
            file = StringIO()
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})  # savefig would draw twice
        return _themed(file.getvalue(), name)

    return drawn


def _themed(svg: str, name: str) -> str:
    """Cut the XML head, make ids unique in the page, and put CSS in place of colours and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    body = svg[svg.index(">") + 1 :]
    view = re.search(r'viewBox="([^"]+)"', svg)
    slug = re.sub(r"\W+", "-", name)
    body = re.sub(r'\bid="', f'id="{slug}-', body)
    body = re.sub(r'(url\(|href=")#', rf"\g<1>#{slug}-", body)
    for colour, variable in _CSS.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"font: (?:\w+ )*([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]+;?", "", body)
    # xlink is an XML namespace name, not an address; HTML needs neither it nor the declaration.
    body = body.replace("xlink:href=", "href=")
    shape = view.group(1) if view else "0 0 1 1"
    return f'<svg class="plot" viewBox="{shape}" role="img" aria-label="{name}">{body.strip()}'


def standalone(svg: str) -> str:
    """Return a plot as an SVG file of its own, light or dark as what shows it prefers."""
    page = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    colours = "".join(line for line in page.splitlines() if ":root{" in line)
    style = f"{colours}svg{{background:var(--paper);font-family:system-ui,sans-serif}}text{{fill:var(--ink)}}"
    head, _, body = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{body}'


def short(name: str, most: int = 20) -> str:
    """Return a name cut in the middle to at most ``most`` characters."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - most // 2 - 1]}…{name[-(most // 2) :]}"


@svg_plot
def curve(history: Sequence[Mapping[str, Any]], quantity: str) -> tuple[str, Figure] | None:
    """Draw a quantity (``loss``, ``top1``, ``map`` or ``lr``) of ``metrics.jsonl`` over epochs."""
    titles = {
        "loss": "Loss",
        "top1": "Top-1, held out",
        "map": "Mean average precision, held out",
        "lr": "Learning rate",
    }
    figure, axes = new_figure(2.3)
    drawn = 0
    for kind, colour, label in (("train", MUTED, "training"), ("val", BLUE, "validation")):
        points = [
            (line["epoch"], line[quantity])
            for line in history
            if line.get("kind") == kind and isinstance(line.get(quantity), int | float) and "epoch" in line
        ]
        if len(points) > 1:
            x, y = zip(*points)
            axes.plot(x, y, color=colour, label=label, marker="o" if len(points) < 30 and kind == "val" else None, ms=3)
            drawn += 1
    if not drawn:
        return None
    if quantity in ("top1", "map"):
        axes.yaxis.set_major_formatter(percent)
    if drawn > 1:
        axes.legend(loc="upper right")
    axes.set_title(titles[quantity])
    axes.set_xlabel("epoch")
    axes.set_xlim(left=0)
    if axes.get_xlim()[1] >= 3:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return titles[quantity], figure


@svg_plot
def reliability_plot(diagram: Mapping[str, Any], title: str) -> tuple[str, Figure] | None:
    """Draw a diagram of ``calibration.reliability``: accuracy per bin of confidence, and how many images each holds."""
    if not sum(diagram["count"]):
        return None
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for low, high, count, confidence, accuracy in zip(
        diagram["edges"], diagram["edges"][1:], diagram["count"], diagram["confidence"], diagram["accuracy"]
    ):
        if not count:
            continue
        middle, width = (low + high) / 2, (high - low) * 0.86
        lower, upper = sorted((accuracy, confidence))
        top.bar(middle, lower, width, color=BLUE, alpha=0.85)
        top.bar(middle, upper - lower, width, lower, color=ROSE if confidence > accuracy else TEAL, alpha=0.4)
        below.bar(middle, count, width, color=MUTED, alpha=0.6)
    top.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (3, 3)))
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    top.set_title(title)
    top.yaxis.set_major_formatter(percent)
    below.xaxis.set_major_formatter(percent)
    below.set(xlabel="confidence", ylabel="count", yticks=[])
    return title, figure


@svg_plot
def confusion_plot(cells: Sequence[Sequence[int]], classes: Sequence[str]) -> tuple[str, Figure] | None:
    """Draw the confusion matrix from cells [true, predicted, count]: shares of each true class.

    Beyond ``MAX_CELLS`` classes neighbours are merged so that the picture has at most 200 rows.
    """
    if not cells:
        return None
    width = len(classes)
    table = np.asarray(cells, np.int64)
    merge = -(-width // 200) if width > MAX_CELLS else 1
    side = -(-width // merge)
    counts = np.zeros((side, side), np.int64)
    np.add.at(counts, (table[:, 0] // merge, table[:, 1] // merge), table[:, 2])
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = new_figure(WIDTH)
    axes.grid(False)
    axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xlabel="predicted", ylabel="true")
    if width > MAX_CELLS:
        # Alone the transparency tells the share, so the picture suits a light and a dark page.
        picture = np.zeros((side, side, 4))
        picture[...] = (0.83, 0.29, 0.36, 0)
        picture[np.arange(side), np.arange(side)] = (0.27, 0.5, 0.9, 0)
        picture[..., 3] = np.where(counts, 0.15 + 0.85 * share, 0)
        axes.imshow(picture, extent=(0, side, side, 0), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{width} classes" + (f", {merge} merged per cell" if merge > 1 else ""))
    else:
        for colour, right in ((BLUE, True), (ROSE, False)):
            places = [(i, j) for i, j in zip(*np.nonzero(counts)) if (i == j) == right]
            boxes = [Rectangle((j + 0.03, i + 0.03), 0.94, 0.94) for i, j in places]
            if boxes:
                alpha = np.array([0.18 + 0.7 * share[place] for place in places])
                axes.add_collection(PatchCollection(boxes, facecolor=colour, alpha=alpha, linewidth=0))
        if width <= 20:
            for i, j in zip(*np.nonzero(counts)):
                size = min(8.5, 90 / side / max(1, 0.7 * len(str(counts[i, j]))))
                axes.text(j + 0.5, i + 0.5, str(counts[i, j]), ha="center", va="center", fontsize=size, color=INK)
        size = max(4.5, min(8.5, 190 / side))
        names = [short(str(name), 18) for name in classes]
        axes.set_xticks(np.arange(side) + 0.5, names, rotation=90, fontsize=size)
        axes.set_yticks(np.arange(side) + 0.5, names, fontsize=size)
        axes.tick_params(length=0)
    return "Confusion matrix", figure


@svg_plot
def corruption_plot(corruption: Mapping[str, Any]) -> tuple[str, Figure] | None:
    """Draw the result of ``corruption_suite``: a bar per kind (mean over severities), a dot per severity."""
    kinds = corruption.get("per_kind") or {}
    if not kinds:
        return None
    names = list(reversed(kinds))
    figure, axes = new_figure(0.7 + 0.21 * len(names))
    axes.grid(axis="y", visible=False)
    for y, name in enumerate(names):
        values = list(kinds[name].values())
        axes.barh(y, sum(values) / len(values), 0.62, color=BLUE, alpha=0.85)
        if len(values) > 1:
            axes.scatter(values, [y] * len(values), s=7, color=INK, zorder=3, linewidths=0)
    if corruption.get("clean") is not None:
        axes.axvline(corruption["clean"], color=AMBER, lw=1.4)
        side, shift = ("right", -3) if corruption["clean"] > 0.3 else ("left", 3)
        axes.annotate(
            f"clean {corruption['clean']:.1%}",
            (corruption["clean"], len(names) - 0.5),
            (shift, 2),
            textcoords="offset points",
            color=AMBER,
            ha=side,
            va="bottom",
        )
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(percent)
    return "Accuracy under common corruptions", figure


@svg_plot
def class_counts_plot(counts: Mapping[str, int]) -> tuple[str, Figure] | None:
    """Draw the images per class, most first; beyond 40 classes without names."""
    if not counts:
        return None
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    values = [count for _, count in ordered]
    if len(ordered) > MAX_CELLS:
        figure, axes = new_figure(2.3)
        axes.fill_between(range(1, len(values) + 1), values, step="mid", color=BLUE, alpha=0.7, linewidth=0)
        axes.set(xlabel="classes, by size", ylabel="images", xlim=(0.5, len(values) + 0.5), ylim=(0, None))
    else:
        figure, axes = new_figure(0.5 + 0.19 * len(ordered))
        axes.grid(axis="y", visible=False)
        axes.barh(range(len(ordered)), values, 0.66, color=BLUE, alpha=0.85)
        axes.set_yticks(range(len(ordered)), [short(name, 24) for name, _ in ordered])
        axes.set(ylim=(len(ordered) - 0.4, -0.6), xlabel="images")
        axes.tick_params(axis="y", length=0)
    return "Images per class", figure


@svg_plot
def runtime_plot(runtimes: Sequence[Mapping[str, Any]], winner: str) -> tuple[str, Figure] | None:
    """Draw latency, size and top-1 of the runtimes that were measured, side by side; the one that ships stands out."""
    rows = [entry for entry in runtimes if entry.get("latency_ms") is not None]
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH, 0.55 + 0.27 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    quantities: list[tuple[str, str, float, str]] = [
        ("ms per image", "latency_ms", 1, "{:.3g}"),
        ("size, MB", "bytes", 1e-6, "{:.3g}"),
        ("top-1", "top1", 100, "{:.1f}\u202f%"),
    ]
    for axes, (title, key, factor, form) in zip(panels, quantities):
        most = max((entry.get(key) or 0) * factor for entry in rows) or 1
        axes.grid(False)
        for y, entry in enumerate(rows):
            if entry.get(key) is None:
                continue
            value = entry[key] * factor
            ships = entry["name"] == winner
            accepted = entry.get("status", "ok") == "ok"
            axes.barh(y, value, 0.62, color=BLUE if ships else MUTED, alpha=0.9 if ships else 0.4 if accepted else 0.18)
            axes.text(value + 0.03 * most, y, form.format(value), va="center", color=INK, fontsize=7.5)
        axes.set(xlim=(0, 1.55 * most), ylim=(len(rows) - 0.4, -0.6), xticks=[])
        axes.set_title(title, color=MUTED, fontsize=8)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(rows)), [entry["name"] for entry in rows])
    for label, entry in zip(panels[0].get_yticklabels(), rows):
        label.set_color(INK if entry["name"] == winner else MUTED)
    return "Runtimes", figure


@svg_plot
def difference_plot(arms: Sequence[Mapping[str, Any]]) -> tuple[str, Figure] | None:
    """Draw the arms of a comparison that have a ``difference`` to the baseline: its mean and its 95 % interval."""
    rows = [arm for arm in arms if arm.get("difference")]
    if not rows:
        return None
    figure, axes = new_figure(0.65 + 0.28 * len(rows))
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=MUTED, lw=1)
    colours = {"better": TEAL, "worse": ROSE}
    for y, arm in enumerate(rows):
        found = arm["difference"]
        colour = colours.get(found.get("verdict"), BLUE)
        axes.plot((found["low"], found["high"]), (y, y), color=colour, lw=2.2, solid_capstyle="round")
        axes.scatter([found["mean"]], [y], s=26, color=colour, zorder=3, linewidths=0)
    axes.set_yticks(range(len(rows)), [short(arm["name"], 28) for arm in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="difference to the baseline, 95 % interval")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(percent)
    return "Differences to the baseline", figure


@svg_plot
def seeds_plot(arms: Sequence[Mapping[str, Any]]) -> tuple[str, Figure] | None:
    """Draw every arm's value per seed, and its mean."""
    rows = [arm for arm in arms if arm.get("values")]
    if not rows:
        return None
    figure, axes = new_figure(0.65 + 0.28 * len(rows))
    axes.grid(axis="y", visible=False)
    for y, arm in enumerate(rows):
        axes.scatter(arm["values"], [y] * len(arm["values"]), s=16, color=BLUE, alpha=0.7, zorder=3, linewidths=0)
        axes.scatter([arm["mean"]], [y], s=90, marker="|", color=INK, zorder=4)
    axes.set_yticks(range(len(rows)), [short(arm["name"], 28) for arm in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(percent)
    return "Accuracy per seed", figure


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes, as wide as all are and ``height`` inches high."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def percent(value: float, _place: float) -> str:
    """Write a tick of an axis of shares."""
    return f"{100 * value:.4g}\u202f%"
