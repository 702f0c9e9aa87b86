"""Sphinx configuration: pages are written from the cards and the evidence each time the site is built."""

import json
from pathlib import Path

import vitrail
from vitrail.catalog import cards

ROOT = Path(__file__).resolve().parent.parent

project = "Vitrail"
author = "The Vitrail authors"
release = version = vitrail.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"Vitrail {release}"
exclude_patterns = ["generated/README.md"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
myst_heading_anchors = 3


def _card_page() -> str:
    lines = ["# Systems", ""]
    for card in cards().values():
        lines += [f"## {card.slug}", "", f"**{card.title}** ({card.stage}, {card.status}). {card.summary}", ""]
        parts = (card.authors, f"*{card.paper}*" if card.paper else "", str(card.year or ""))
        source = ", ".join(part for part in parts if part)
        lines += [source, ""] if source else []
        lines += ["Missing: " + card.missing, ""] if card.missing else []
        lines += [card.differences, ""] if card.differences else []
        for claim in card.claims:
            lines += [f"> {claim.text} ({claim.source})", ""]
        evidence = ROOT / "evidence" / f"{card.slug}.json"
        if evidence.is_file():
            verdict = json.loads(evidence.read_text(encoding="utf-8")).get("verdict", "")
            lines += [f"Our measurement: **{verdict}**.", ""]
        lines += ["```console", f"$ {card.example}", "```", ""] if card.example else []
    return "\n".join(lines)


def _recipe_page() -> str:
    from vitrail.training.recipe import Recipe

    module = ".. automodule:: vitrail.training.recipe\n   :members:\n   :exclude-members: model_config"
    defaults = ["```toml", Recipe().to_toml().strip(), "```"]
    return "\n".join(["# The recipe", "", *defaults, "", "```{eval-rst}", module, "```", ""])


def _api_page() -> str:
    modules = [
        "vitrail.app.fit",
        "vitrail.app.artefact",
        "vitrail.deploy.runtime",
        "vitrail.models.factory",
        "vitrail.models.pretrained",
        "vitrail.edits.surgery",
        "vitrail.methods.method",
        "vitrail.data.sources",
        "vitrail.data.audit",
        "vitrail.data.index",
        "vitrail.data.loader",
        "vitrail.data.preprocess",
        "vitrail.training.train",
        "vitrail.evaluate.metrics",
        "vitrail.evaluate.calibration",
        "vitrail.evaluate.corruptions",
        "vitrail.deploy.export",
        "vitrail.deploy.tournament",
        "vitrail.errors",
    ]
    lines = ["# Python interface", ""]
    for module in modules:
        lines += [f"## {module}", "", "```{eval-rst}", f".. automodule:: {module}", "   :members:", "```", ""]
    return "\n".join(lines)


def _generate(app: object) -> None:
    folder = Path(__file__).parent / "generated"
    folder.mkdir(exist_ok=True)
    for name, text in (("systems", _card_page()), ("recipe", _recipe_page()), ("api", _api_page())):
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def setup(app: object) -> None:
    """Write the generated pages before Sphinx reads its sources."""
    app.connect("builder-inited", _generate)  # type: ignore[attr-defined]
