"""State-space scans: linear recurrences over sequences, in forms that agree and differ in speed.

``selective`` has the scan of Mamba (S6), ``dual`` that of Mamba-2, ``lti`` the layers S4, S4D and S5, ``reference`` a
slow loop that the forms of the first must equal.
"""

from __future__ import annotations

from vitrail.layers.scan.dual import dual_scan, dual_step
from vitrail.layers.scan.exported import scans_as_operators
from vitrail.layers.scan.lti import S4, S4D, S5
from vitrail.layers.scan.selective import SCAN_FORMS, scan_form, selective_scan, selective_step

__all__ = [
    "S4",
    "S4D",
    "S5",
    "SCAN_FORMS",
    "dual_scan",
    "dual_step",
    "scan_form",
    "scans_as_operators",
    "selective_scan",
    "selective_step",
]
