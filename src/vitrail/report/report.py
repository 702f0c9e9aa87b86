"""Write ``report.html``: one file that needs nothing else, on a desk, on a phone, in the dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from vitrail.report import plots
from vitrail.runs import write_text

THUMBNAIL = 160
"""Longest side of a picture in the report, in pixels."""
MAX_WORST, MAX_PAIRS, PAIR_IMAGES, MAX_EXPLAINED = 24, 8, 3, 8
MAX_GROUPS, GROUP_IMAGES, MAX_BLANK = 4, 4, 8
"""Groups of duplicates with pictures, pictures of each, and blank images shown."""
FIRST_ROWS, MAX_ROWS, MAX_WARNINGS = 12, 2000, 50
"""Rows of a table in sight, and at all."""


@dataclass
class Example:
    """One picture with its answer.

    Attributes:
        image: any size; ``thumbnail`` keeps it small until the report is written.
        true, predicted: class names; several are joined by the caller with ", ".
        confidence: in [0, 1].
        key: the name that the user knows the image by.
        overlay: the same picture with a Grad-CAM map over it.
    """

    image: Image.Image
    true: str
    predicted: str
    confidence: float | None = None
    key: str = ""
    overlay: Image.Image | None = None


@dataclass
class ConfusedPair:
    """An entry of ``metrics.most_confused`` with pictures of its images."""

    true: str
    predicted: str
    count: int
    share: float
    images: Sequence[Image.Image] = ()


@dataclass
class ReportContent:
    """What a report tells. Only ``summary`` is needed; a part that is missing is left out of the page.

    Attributes:
        summary: contents of ``summary.json``.
        audit: ``Audit.summary()``.
        pictures: thumbnails for the keys that ``audit_keys(audit)`` names.
        history: lines of ``metrics.jsonl``.
        calibration: result of ``calibration.calibrate``.
        worst: the most confident mistakes, worst first.
        pairs: the most confused pairs, most frequent first.
        explanations: examples with an ``overlay``.
        commands: what reproduces the run, a shell command each.
        recipe: the resolved recipe, TOML.
        split: how the data was split, a sentence.
        title: heading; the data's name.
    """

    summary: Mapping[str, Any]
    audit: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    worst: Sequence[Example] = ()
    pairs: Sequence[ConfusedPair] = ()
    explanations: Sequence[Example] = ()
    commands: Sequence[str] = ()
    recipe: str = ""
    split: str = ""
    title: str = ""


FINDINGS = {
    "conflicts": "The same picture under different labels",
    "leakage": "Twins in different given splits",
    "exact_duplicates": "Exact duplicates",
    "near_duplicates": "Near duplicates",
}
"""Kinds of groups in an audit, the most harmful first."""


def thumbnail(image: Image.Image) -> Image.Image:
    """Return a picture small enough to be kept for the report: RGB, at most 160 pixels on its longer side."""
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image


def audit_keys(audit: Mapping[str, Any]) -> list[str]:
    """Return the keys of the images of which the audit's section shows pictures; their number is bounded."""
    keys = [image["key"] for finding in _findings(audit) for group in finding["groups"] for image in group]
    keys += (audit.get("blank") or {}).get("examples", [])[:MAX_BLANK]
    return list(dict.fromkeys(keys))


def write_report(path: str | Path, content: ReportContent) -> None:
    """Write the report, atomically. Its size is bounded: so many pictures, so many rows, whatever the data.

    Raises:
        RunError: the disk is full.
    """
    write_text(path, render(content))


def render(content: ReportContent) -> str:
    """Return the report's HTML."""
    summary = content.summary
    classes = [str(name) for name in summary.get("classes") or []]
    calibration = content.calibration
    rows = [row for row in summary.get("per_class") or [] if row.get("f1") is not None]
    rows.sort(key=lambda row: (row["f1"], row["name"]))
    drawn = {
        "curves": [svg for name in ("loss", "top1", "map", "lr") if (svg := plots.curve(content.history, name))],
        "confusion": plots.confusion_plot(summary.get("confusion") or [], classes),
        "reliability": [
            plots.reliability_plot(calibration[part], f"{title}: error {calibration[key]:.3f}")
            for part, key, title in (
                ("before", "ece", "Before"),
                ("after", "ece_calibrated", "After temperature scaling"),
            )
            if calibration.get(part)
        ],
        "corruption": plots.corruption_plot(summary.get("corruption") or {}),
        "counts": plots.class_counts_plot(content.audit.get("classes") or {}),
        "runtimes": plots.runtime_plot(summary.get("runtimes") or [], summary.get("winner") or ""),
    }
    return (
        template_environment()
        .get_template("template.html.j2")
        .render(
            c=content,
            s=Optional(summary),
            audit=Optional(content.audit),
            title=content.title or summary.get("model") or "Vitrail",
            shipped=shipped(summary),
            headline=headline(summary),
            rows=rows[:MAX_ROWS],
            rows_left_out=max(0, len(rows) - MAX_ROWS),
            first_rows=FIRST_ROWS,
            worst=content.worst[:MAX_WORST],
            pairs=[(pair, pair.images[:PAIR_IMAGES]) for pair in content.pairs[:MAX_PAIRS]],
            explanations=[example for example in content.explanations if example.overlay][:MAX_EXPLAINED],
            findings=_findings(content.audit),
            max_blank=MAX_BLANK,
            warnings=list(summary.get("warnings") or [])[:MAX_WARNINGS],
            many_classes=len(classes) > plots.MAX_CELLS,
            plots={
                name: [Markup(svg) for svg in value] if isinstance(value, list) else Markup(value)
                for name, value in drawn.items()
            },
        )
    )


def shipped(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of the runtime that ships, or an empty one."""
    entries = [entry for entry in summary.get("runtimes") or [] if entry.get("name") == summary.get("winner")]
    return Optional(entries[0] if entries else {})


def headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name, value and 95 % interval of the figure that counts most, or an empty dict."""
    for name, label, interval in (
        ("top1", "top-1 accuracy", "top1_interval"),
        ("micro_f1", "micro F1", "micro_f1_interval"),
        ("map", "mean average precision", ""),
    ):
        if summary.get(name) is not None:
            return Optional(name=name, label=label, value=summary[name], interval=summary.get(interval))
    return Optional()


def _findings(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each kind of group found: title, counts, and the first groups cut to what is shown."""
    found = []
    for name, title in FINDINGS.items():
        entry = audit.get(name) or {}
        # Leaks and conflicts are counted among exact and among near duplicates; the latter include the former.
        entry = entry.get("near", entry)
        if entry.get("groups"):
            groups = [group[:GROUP_IMAGES] for group in entry.get("examples", [])[:MAX_GROUPS]]
            found.append(
                {"name": name, "title": title, "count": entry["groups"], "images": entry["images"], "groups": groups}
            )
    return found


class Optional(dict[str, Any]):
    """Values for a template, where a key that is missing reads as None."""

    def __missing__(self, key: str) -> None:
        return None


# ---- how values are written


def template_environment() -> Environment:
    """Return the environment of the templates: what goes into HTML is escaped, an unknown name is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and "html" in name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, count=count, size=size, duration=duration, data_uri=data_uri, short=plots.short
    )
    return environment


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as a percentage."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u202f%"


def count(value: float | None) -> str:
    """Return a number with a thin space between thousands; large ones with a unit."""
    if value is None:
        return "–"
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:,.0f}".replace(",", "\u202f")


def size(value: float | None) -> str:
    """Return bytes in the unit that suits."""
    if value is None:
        return "–"
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} bytes"


def duration(seconds: float | None) -> str:
    """Return a length of time."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def data_uri(image: Image.Image) -> str:
    """Return a thumbnail as a data URI: PNG where every pixel counts, else JPEG."""
    image = thumbnail(image)
    form, kind = ("PNG", "png") if max(image.size) <= 48 else ("JPEG", "jpeg")
    file = io.BytesIO()
    image.save(file, form, optimize=True, **({} if form == "PNG" else {"quality": 82}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
