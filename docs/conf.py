"""Sphinx configuration: pages are written from the cards and the evidence each time the site is built."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import import_graph

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


def _newest_evidence() -> dict[str, dict]:
    """Return the last full run of every check, by slug."""
    found: dict[str, dict] = {}
    for path in sorted((ROOT / "evidence").glob("*.json")):
        evidence = json.loads(path.read_text(encoding="utf-8"))
        if evidence["mode"] == "full" and evidence["date"] > found.get(evidence["slug"], {"date": ""})["date"]:
            found[evidence["slug"]] = evidence
    return found


def _evidence_page() -> str:
    evidence = _newest_evidence()
    lines = [
        "# Claims and measurements",
        "",
        "What each paper claims, and what its check measured here: on small data, in minutes, with the seeds and the",
        "machine that its file in `evidence/` names. *Not seen*: the interval of the difference holds zero.",
        "",
        "| system | the paper's claim | what was tested | measured | verdict |",
        "|---|---|---|---|---|",
    ]
    for card in cards().values():
        claim = "; ".join(claim.text for claim in card.claims)
        found = evidence.get(card.slug)
        if found is None:
            state = "planned" if card.status == "planned" else "baseline" if not card.check else "no full run yet"
            cells = [card.slug, claim, card.experiment, "", state]
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
            continue
        for place, finding in enumerate(found["findings"]):
            arms = ", ".join(f"{name} {sum(v) / len(v):.4g}" for name, v in finding["arms"].items())
            interval = finding["interval"]
            if interval:
                arms += f"; difference {finding['difference']:+.3g} ({interval[0]:+.3g} to {interval[1]:+.3g})"
            cells = [f"**{card.slug}**" if not place else "", claim if not place else "", finding["claim"]]
            cells += [f"{finding['quantity']}: {arms}", f"*{finding['outcome']}*"]
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _card_page() -> str:
    evidence = _newest_evidence()
    built = sum(card.status != "planned" for card in cards().values())
    lines = ["# Systems", "", f"{len(cards())} systems, of which {built} are built.", ""]
    for card in cards().values():
        lines += [f"## {card.slug}", "", f"**{card.title}** ({card.stage}, {card.status}). {card.summary}", ""]
        parts = (card.authors, f"*{card.paper}*" if card.paper else "", str(card.year or ""))
        source = ", ".join(part for part in parts if part)
        lines += [source, ""] if source else []
        lines += ["Missing: " + card.missing, ""] if card.missing else []
        lines += [card.differences, ""] if card.differences else []
        for claim in card.claims:
            lines += [f"> {claim.text} ({claim.source})", ""]
        if card.slug in evidence:
            lines += [f"Our measurement: **{evidence[card.slug]['outcome']}**.", ""]
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
        "vitrail.app.compare",
        "vitrail.app.check",
        "vitrail.checks.check",
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
        "vitrail.compress.compressor",
        "vitrail.evaluate.suite",
        "vitrail.evaluate.paired",
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
    (folder / "imports.svg").write_text(import_graph.draw(), encoding="utf-8")
    for name, text in (
        ("systems", _card_page()),
        ("evidence", _evidence_page()),
        ("recipe", _recipe_page()),
        ("api", _api_page()),
    ):
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def setup(app: object) -> None:
    """Write the generated pages before Sphinx reads its sources."""
    app.connect("builder-inited", _generate)  # type: ignore[attr-defined]
