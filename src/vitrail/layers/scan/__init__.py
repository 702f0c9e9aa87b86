"""State-space scans: linear recurrences over sequences, in forms that agree and differ in speed.

``selective`` has the scan of Mamba (S6), ``dual`` that of Mamba-2, ``reference`` a slow loop that the forms must equal.
"""

from __future__ import annotations

from vitrail.layers.scan.dual import dual_scan, dual_step
from vitrail.layers.scan.selective import SCAN_FORMS, scan_form, selective_scan

__all__ = ["SCAN_FORMS", "dual_scan", "dual_step", "scan_form", "selective_scan"]
