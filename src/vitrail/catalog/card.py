"""Cards: what a system is, where it comes from, what it promises.

A card is ``systems/<slug>.toml``. Other distributions add cards of their own through the entry-point group
``vitrail.systems``, whose values name packages that contain a folder ``systems``.
"""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from vitrail.errors import InputError, VitrailError, unknown

STAGES = (
    "model",
    "edit",
    "data",
    "method",
    "search",
    "compress",
    "evaluate",
    "retrieve",
    "generate",
    "restore",
    "language",
    "medical",
)
TASKS = (
    "classification",
    "multi-label",
    "dense",
    "distillation",
    "self-supervised",
    "robustness",
    "retrieval",
    "generation",
    "restoration",
    "image-text",
    "medical",
    "compression",
    "analysis",
)
GROUP = "vitrail.systems"
STATUSES = ("works", "partial", "planned")


@dataclass(frozen=True)
class Claim:
    """A figure of the paper, and where it stands."""

    text: str
    source: str


@dataclass(frozen=True)
class Size:
    """Published size of one variant."""

    name: str
    params: float
    """Millions of parameters."""
    flops: float | None = None
    """Billions of multiply-adds at ``img_size``."""
    img_size: int | None = None


@dataclass(frozen=True)
class Card:
    """One system. The fields are the keys of its TOML file; ``slug`` is the file's name."""

    slug: str
    title: str
    stage: str
    summary: str
    status: str
    authors: str = ""
    year: int | None = None
    tasks: tuple[str, ...] = ("classification",)
    """What it serves, of ``TASKS``."""
    paper: str = ""
    code: str = ""
    provides: tuple[str, ...] = ()
    """Import paths ``package.module:name``, or ``timm:model_name``."""
    traits: tuple[str, ...] = ()
    """What contract tests may expect: ``dense``, ``fixed_size``, ``pretrained``, ``baseline`` ..."""
    example: str = ""
    """A command that runs."""
    claims: tuple[Claim, ...] = ()
    sizes: tuple[Size, ...] = ()
    check: str = ""
    """Import path of the check's module; empty for baselines, against which checks compare."""
    experiment: str = ""
    """What the check compares, in words."""
    missing: str = ""
    """What a partial system lacks."""
    differences: str = ""
    """Where our figures differ from the published ones, and why."""


def _card_folders() -> Iterator[Path]:
    yield Path(__file__).parent / "systems"
    # importlib.metadata takes longer to import than all cards take to read: first see whether anyone needs it.
    files = (file for folder in sys.path for file in Path(folder).glob("*.dist-info/entry_points.txt"))
    if not any(f"[{GROUP}]" in file.read_text(encoding="utf-8", errors="ignore") for file in files):
        return
    import importlib.metadata
    import importlib.util

    for point in importlib.metadata.entry_points(group=GROUP):
        spec = importlib.util.find_spec(point.value)  # finds the package without running it
        for location in (spec.submodule_search_locations or ()) if spec else ():
            yield Path(location) / "systems"


@cache
def cards() -> dict[str, Card]:
    """Return all cards by slug, sorted.

    Raises:
        VitrailError: a card is damaged; names the file and the key.
    """
    found: dict[str, Card] = {}
    for folder in _card_folders():
        for path in sorted(folder.glob("*.toml")):
            if path.stem in found:
                raise VitrailError(f"the card {path} has the slug of another system: rename the file")
            found[path.stem] = read_card(path)
    return dict(sorted(found.items()))


def find(slug: str) -> Card:
    """Return the card of ``slug``, or raise an error that offers the nearest slugs."""
    try:
        return cards()[slug]
    except KeyError:
        raise unknown("system", slug, cards(), "`vitrail list` shows all") from None


def read_card(path: Path) -> Card:
    """Read and check one card."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VitrailError(f"cannot read the card {path}: {error}") from None
    for key, kind in (("claims", Claim), ("sizes", Size)):
        entries = values.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise VitrailError(f"the card {path} is wrong at {key!r}: expected a list of tables")
        values[key] = tuple(_build(kind, entry, path, f"{key}.{i}.") for i, entry in enumerate(entries))
    card: Card = _build(Card, {"slug": path.stem, **values}, path, "")
    for key, allowed in (("stage", STAGES), ("status", STATUSES)):
        if getattr(card, key) not in allowed:
            raise VitrailError(
                f"the card {path} is wrong at {key!r}: {getattr(card, key)!r} is not one of {', '.join(allowed)}"
            )
    for task in card.tasks:
        if task not in TASKS:
            raise VitrailError(f"the card {path} is wrong at 'tasks': {task!r} is not one of {', '.join(TASKS)}")
    if card.status == "planned" and (card.provides or card.check or card.example):
        raise VitrailError(f"the card {path} is wrong at 'status': what provides something is no longer planned")
    if (card.status == "partial") != bool(card.missing):
        raise VitrailError(
            f"the card {path} is wrong at 'missing': say what is missing when, and only when, it is partial"
        )
    return card


def _build(kind: type, values: dict[str, Any], path: Path, prefix: str) -> Any:
    types = get_type_hints(kind)
    known = {entry.name: entry for entry in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise VitrailError(f"the card {path}: {unknown('key', prefix + key, known)}")
        if isinstance(value, list):
            values = {**values, key: tuple(value)}
        if not _fits(values[key], types[key]):
            raise VitrailError(f"the card {path} is wrong at {prefix + key!r}: {value!r} is not of type {types[key]}")
    absent = [name for name, entry in known.items() if entry.default is MISSING and name not in values]
    if absent:
        raise VitrailError(f"the card {path} lacks the key {prefix + absent[0]!r}")
    return kind(**values)


def _fits(value: Any, kind: Any) -> bool:
    options = get_args(kind)
    if isinstance(value, tuple):
        return bool(options) and all(isinstance(item, options[0]) for item in value)
    allowed = options or (kind,)
    return isinstance(value, (*allowed, int) if float in allowed else allowed) and not isinstance(value, bool)


def locate(name: str, stage: str) -> Any:
    """Return the object that a recipe names.

    Args:
        name: a slug (the first thing that its card provides), ``slug:Name`` (another thing that it provides), or an
            import path ``package.module:Name``.
        stage: that the system has to be of, or the folder of the part.

    Raises:
        InputError: no such system, or it belongs to another stage, or the path does not import.
    """
    path = name
    slug, _, part = name.partition(":")
    if not part or slug in cards():
        card = find(slug)
        provided = {path.rpartition(":")[2]: path for path in card.provides}
        if part and card.provides and part not in provided:
            raise unknown(f"part of {slug}", part, provided)
        path = provided.get(part, card.provides[0]) if card.provides else ""
        # A model's system may have a method beside it: what a part is, its folder says, ``models`` or ``methods``.
        beside = part and path.split(".")[1:2] == [f"{stage}s"]
        if not path or (card.stage != stage and not beside):
            planned = "; it is planned and not built yet" if card.status == "planned" else ""
            raise InputError(f"{slug!r} is a system of stage {card.stage!r}, and a {stage} is needed here{planned}")
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot import the {stage} {name!r}: {error}; give a slug or package.module:name") from None
