"""Replace a model's classifier, wherever and however often it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from vitrail.errors import InputError


def replace_classifiers(model: nn.Module, build: Callable[[int, int, int], nn.Module]) -> nn.Module:
    """Replace every linear layer that ``model.get_classifier()`` holds by ``build(features, classes, axis)``, in place.

    Linear is an ``nn.Linear`` or a convolution of one pixel, alone, last of an ``nn.Sequential``, or one of several
    that answer side by side. The new module takes over device, floating type and training mode.

    Args:
        model: with timm's ``get_classifier``.
        build: gets the number of features, the number of classes, and which axis of its input holds the features: -1,
            or 1 in the place of a convolution.

    Raises:
        InputError: there is no such classifier; the text lists the kinds of module that the model has.
    """
    surface: Any = model
    names = {id(module): name for name, module in model.named_modules()}
    found = list(_linear(surface.get_classifier())) if hasattr(model, "get_classifier") else []
    if not found:
        listed = ", ".join(sorted({type(module).__name__ for module in model.modules() if module is not model}))
        raise InputError(f"the edit found no linear classifier in {type(model).__name__}; its modules are: {listed}")
    for old in found:
        classes, features = old.weight.shape[:2]
        new = build(features, classes, -1 if isinstance(old, nn.Linear) else 1).train(old.training)
        model.set_submodule(names[id(old)], new.to(old.weight.device, old.weight.dtype))
    return model


def _linear(part: object) -> Iterator[nn.Linear | nn.Conv2d]:
    if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)):
        yield part
    elif isinstance(part, nn.Sequential):
        yield from next((inner for inner in map(list, map(_linear, reversed(part))) if inner), [])
    elif isinstance(part, tuple | nn.ModuleList):
        for each in part:
            yield from _linear(each)
