"""The pooling before a classifier, as timm's models let a user choose it."""

from __future__ import annotations

from timm.layers import SelectAdaptivePool2d

from vitrail.errors import InputError

POOLS = ("avg", "max", "avgmax", "")


def global_pooling(kind: str, num_classes: int) -> SelectAdaptivePool2d:
    """Return the pooling from (B, C, H, W) to (B, C).

    Args:
        kind: one of ``POOLS``; ``""`` leaves the map as it is, which only a model without classifier can.
        num_classes: outputs of the classifier that follows; 0 is none.

    Raises:
        InputError: a pooling that does not exist, or none for a classifier.
    """
    if kind not in POOLS or (num_classes and not kind):
        raise InputError(
            f"global_pool = {kind!r} is not allowed: give one of avg, max and avgmax, or '' with num_classes = 0"
        )
    return SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind))
