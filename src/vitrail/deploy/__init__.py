"""From a trained model to what ships: export, INT8, the tournament of runtimes, prediction without torch.

``optimise`` is imported on first use, and nothing else is imported here: ``vitrail.deploy.runtime`` must stay free of
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.deploy.inference import optimise

__all__ = ["optimise"]


def __getattr__(name: str) -> Any:
    if name == "optimise":
        from vitrail.deploy.inference import optimise

        return optimise
    raise AttributeError(f"module 'vitrail.deploy' has no attribute {name!r}")
