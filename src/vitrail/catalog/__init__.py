"""The catalogue: one card per system, found by the card alone."""

from __future__ import annotations

from vitrail.catalog.card import Card, Claim, Size, cards, find, locate

__all__ = ["Card", "Claim", "Size", "cards", "find", "locate"]
