"""State-space scans: linear recurrences over sequences, in forms that agree and differ in speed.

``selective`` has the scan of Mamba (S6), ``reference`` a slow loop of every operator, against which all others are
tested.
"""

from __future__ import annotations

from vitrail.layers.scan.selective import SCAN_FORMS, scan_form, selective_scan

__all__ = ["SCAN_FORMS", "scan_form", "selective_scan"]
