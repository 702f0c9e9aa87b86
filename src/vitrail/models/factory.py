"""Create any timm or Vitrail model by name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from functools import cache
from typing import Any

import timm
from torch import nn

from vitrail.errors import InputError, nearest, unknown


@cache
def _register() -> None:
    """Import every backbone file of this package: importing one registers its models with timm."""
    import vitrail.models as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def model_names() -> list[str]:
    """Return the names of all models, timm's and ours."""
    _register()
    return timm.list_models()


def create_model(
    name: str,
    *,
    num_classes: int,
    img_size: int | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> nn.Module:
    """Build a model without pretrained weights.

    Args:
        name: a name of ``model_names()``.
        num_classes: outputs of the classifier; 0 leaves the head off.
        img_size: input side in pixels, given to models built for one size.
        in_chans: input channels.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth, in [0, 1); left out where it is 0 and the architecture has none.
        **options: further arguments of the architecture.

    Raises:
        InputError: no such model, a number or a rate that is not allowed, or an option it does not take.
    """
    _register()
    if not timm.is_model(name):
        raise unknown("model", name, model_names(), "`vitrail list --models` lists them all")
    for argument, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
        if value < least:
            raise InputError(f"{argument} = {value} is not allowed: give {least} or more")
    for argument, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0 <= rate < 1:
            raise InputError(f"{argument} = {rate} is not allowed: give a rate in [0, 1)")
    if img_size is not None and _is_fixed_size(name):
        options["img_size"] = img_size

    def build(**rates: Any) -> nn.Module:
        return timm.create_model(
            name, pretrained=False, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, **options, **rates
        )

    try:
        return build(drop_path_rate=drop_path_rate)  # 0 too: some of timm's nets have 0.1 unless told
    except TypeError as error:
        if drop_path_rate or _refused(error) != "drop_path_rate":
            raise _explained(error, name, options) from None
    return build()


def _explained(error: TypeError, name: str, options: dict[str, Any]) -> Exception:
    """Return what to raise for an error of a constructor: for an option that it does not take, the nearest that is."""
    given = _refused(error)
    if given not in {*options, "drop_path_rate"}:
        return error
    known = sorted(_constructor_arguments(name))
    close = nearest(given, known)
    offer = f"did you mean {close[0]!r}?" if close else f"it takes: {', '.join(known)}"
    return InputError(f"the model {name} does not take the option {given!r}; {offer}")


def _refused(error: TypeError) -> str:
    """Return the argument that a call did not take, or nothing."""
    found = re.search(r"unexpected keyword.*?'(\w+)'", str(error))
    return found[1] if found else ""


def _is_fixed_size(name: str) -> bool:
    config = timm.models.get_pretrained_cfg(name)
    return bool(config is not None and config.fixed_input_size)


def _constructor_arguments(name: str) -> set[str]:
    module = inspect.getmodule(timm.models.model_entrypoint(name))
    classes = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, nn.Module) and member.__module__ == getattr(module, "__name__", "")
    ]
    return {
        argument
        for kind in classes
        for argument in inspect.signature(kind).parameters
        if argument not in ("self", "args", "kwargs") and hasattr(kind, "reset_classifier")
    }
