"""Let the parts of a model fold themselves into what they are once training is over."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def foldable(module: nn.Module) -> str | None:
    """Return the method by which a module folds itself, as timm's and others' do, or None.

    ``fuse`` returns the new module, ``reparameterize`` and ``switch_to_deploy`` change the one they are of. A submodule
    of such a name is none.
    """
    names = ("fuse", "reparameterize", "switch_to_deploy")
    return next((name for name in names if inspect.ismethod(getattr(module, name, None))), None)


def reparameterise(model: nn.Module) -> nn.Module:
    """Fold every part of ``model`` that can, in place, and return it; outputs in evaluation stay as they are."""
    for name, child in list(model.named_children()):
        method = foldable(child)
        if method is not None:
            found: Any = getattr(child, method)()
            if isinstance(found, nn.Module):
                setattr(model, name, found)
        reparameterise(child)
    return model
