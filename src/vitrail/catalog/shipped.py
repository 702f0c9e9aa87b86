"""Recipes that Vitrail ships: ``recipes/<name>.toml``, each the training of a paper."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def shipped_recipe(name: str | Path) -> Path:
    """Return the file of the shipped recipe ``name``; a file of the user's, and what is no such name, as it is."""
    given = Path(name)
    return FOLDER / f"{given}.toml" if str(given) in recipe_names() and not given.is_file() else given
