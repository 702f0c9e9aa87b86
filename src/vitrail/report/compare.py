"""Write the page of a comparison, in the style of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vitrail.evaluate.paired import RESAMPLES
from vitrail.report import plots
from vitrail.report.report import template_environment
from vitrail.runs import write_text

ALPHA = 0.05
"""Of a verdict, after correction."""


def write_comparison(path: str | Path, comparison: Mapping[str, Any]) -> None:
    """Write the page of ``comparison.json``'s contents: one file that needs nothing else, atomically."""
    arms = comparison["arms"]
    page = (
        template_environment()
        .get_template("compare.html.j2")
        .render(
            c=comparison,
            differences=Markup(plots.difference_plot(arms)),
            seeds=Markup(plots.seeds_plot(arms)),
            failed=[(arm["name"], seed, error) for arm in arms for seed, error in arm["errors"].items()],
            resamples=RESAMPLES,
            alpha=ALPHA,
        )
    )
    write_text(path, page)
