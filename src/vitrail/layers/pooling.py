"""The pooling before a classifier, as timm's models let a user choose it."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import SelectAdaptivePool2d

from vitrail.errors import InputError

POOLS = ("avg", "max", "avgmax", "")


def checked_pool(kind: str, num_classes: int, allowed: Sequence[str]) -> str:
    """Return ``kind``, or raise InputError unless it is allowed; ``""`` is so only without classifier."""
    if kind not in allowed or (num_classes and not kind):
        *names, last = [name for name in allowed if name]
        listed = f"{', '.join(names)} or {last}" if names else last
        none = ", or '' with num_classes = 0" if "" in allowed else ""
        raise InputError(f"global_pool = {kind!r} is not allowed: give {listed}{none}")
    return kind


def global_pooling(kind: str, num_classes: int) -> SelectAdaptivePool2d:
    """Return the pooling from (B, C, H, W) to (B, C).

    Args:
        kind: one of ``POOLS``; ``""`` leaves the map as it is, which only a model without classifier can.
        num_classes: outputs of the classifier that follows; 0 is none.

    Raises:
        InputError: a pooling that does not exist, or none for a classifier.
    """
    checked_pool(kind, num_classes, POOLS)
    return SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind))
