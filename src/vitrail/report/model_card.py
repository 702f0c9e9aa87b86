"""Write ``MODEL_CARD.md``: what the model is for, what it was trained on, what it can and cannot do.

The front matter is that of the Hugging Face hub.
"""

from __future__ import annotations

import json
from pathlib import Path

from vitrail.report.report import Optional, ReportContent, headline, shipped, template_environment
from vitrail.runs import write_text

_MAX_CLASSES, _WEAKEST, _MAX_WARNINGS = 50, 5, 20


def write_model_card(path: str | Path, content: ReportContent) -> None:
    """Write the model card, atomically.

    Raises:
        RunError: the disk is full.
    """
    write_text(path, render_model_card(content))


def render_model_card(content: ReportContent) -> str:
    """Return the model card's Markdown."""
    summary = content.summary
    environment = template_environment()
    environment.filters["yaml"] = lambda value: json.dumps(str(value), ensure_ascii=False)  # JSON strings are YAML
    environment.filters["code"] = lambda value: str(value).replace("`", "'")
    environment.filters["md"] = _markdown
    rows = [row for row in summary.get("per_class") or [] if row.get("f1") is not None]
    return environment.get_template("model_card.md.j2").render(
        c=content,
        s=Optional(summary),
        audit=Optional(content.audit),
        title=content.title or summary.get("model") or "Image classifier",
        classes=list(summary.get("classes") or []),
        most=_MAX_CLASSES,
        figures=[
            (name, kind, summary[key], key)
            for key, name, kind in (
                ("top1", "top-1 accuracy", "accuracy"),
                ("top5", "top-5 accuracy", "accuracy"),
                ("map", "mean average precision", "map"),
                ("micro_f1", "micro F1", "f1"),
                ("macro_f1", "macro F1", "f1"),
            )
            if summary.get(key) is not None
        ],
        headline=headline(summary),
        shipped=shipped(summary),
        rows=sorted(rows, key=lambda row: (row["f1"], row["name"]))[:_WEAKEST],
        warnings=list(summary.get("warnings") or [])[:_MAX_WARNINGS],
    )


def _markdown(value: object) -> str:
    """Return text that Markdown and its HTML show as it is, on one line."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    for sign in "\\`*_[]|#":
        text = text.replace(sign, f"\\{sign}")
    return text
