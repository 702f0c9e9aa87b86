"""The catalogue: one card per system, found by the card alone."""

from __future__ import annotations

from vitrail.catalog.card import Card, Claim, Size, cards, find, locate
from vitrail.catalog.shipped import recipe_names, shipped_recipe

__all__ = ["Card", "Claim", "Size", "cards", "find", "locate", "recipe_names", "shipped_recipe"]
