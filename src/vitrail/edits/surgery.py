"""Replace modules of any model by rule.

An edit is ``edit(**options) -> Callable[[nn.Module], nn.Module]``; most are a rule given to ``replace_modules``.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable

from torch import nn

from vitrail.catalog import locate
from vitrail.errors import InputError, unknown
from vitrail.training.recipe import EditConfig

Edit = Callable[[nn.Module], nn.Module]


def apply_edits(model: nn.Module, edits: Iterable[EditConfig]) -> nn.Module:
    """Apply edits by slug or import path, in order, in place; return the model.

    Raises:
        InputError: an option that the edit does not take, or what the edit itself refuses.
    """
    for edit in edits:
        make = locate(edit.name, "edit")
        takes = inspect.signature(make).parameters
        for option in edit.options:
            if option not in takes and not any(value.kind is value.VAR_KEYWORD for value in takes.values()):
                raise unknown(f"option of {edit.name}", option, takes)
        model = make(**edit.options)(model)
    return model


def replace_modules(
    model: nn.Module,
    matches: Callable[[str, nn.Module], bool],
    build: Callable[[nn.Module], nn.Module],
    *,
    what: str,
) -> nn.Module:
    """Replace every module for which ``matches(name, module)`` holds by ``build(module)``, in place.

    A replaced module's own children are not visited; the new module takes over training mode and device of the old one,
    or the model's device where the old one holds no tensors.

    Raises:
        InputError: nothing matched; the text lists the kinds of module that the model has.
    """
    found = 0

    def visit(parent: nn.Module, prefix: str) -> None:
        nonlocal found
        for name, child in list(parent.named_children()):
            path = f"{prefix}{name}"
            if matches(path, child):
                new = build(child).train(child.training)
                tensor = next(iter([*child.parameters(), *child.buffers(), *model.parameters()]), None)
                if tensor is not None:
                    new = new.to(tensor.device)
                setattr(parent, name, new)
                found += 1
            else:
                visit(child, f"{path}.")

    visit(model, "")
    if not found:
        kinds = Counter(type(module).__name__ for module in model.modules() if module is not model)
        listed = ", ".join(f"{name} x{count}" for name, count in kinds.most_common(12))
        raise InputError(f"the edit found no {what} in {type(model).__name__}; its modules are: {listed}")
    return model
