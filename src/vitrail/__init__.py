"""Vitrail: from a folder of images to the best deployable image model a budget allows.

The public names below are imported on first use, so that ``import vitrail`` stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Recipe": "vitrail.training.recipe",
    "create_model": "vitrail.models",
    "fit": "vitrail.app.fit",
    "load": "vitrail.app.artefact",
    "Predictor": "vitrail.deploy.runtime",
    "VitrailError": "vitrail.errors",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'vitrail' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
