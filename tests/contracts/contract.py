"""Which checks a contract holds, and which of them apply to a system: read off the traits of its card.

A check is a public function of a ``*_contract.py``: it takes a subject and raises ``AssertionError``. A trait is a word
(``WORDS``) or a key with a text (``KEYS``):

    dense, fixed_size        a model with features to take out; one that takes images of one size
    host: NAME               the model that an edit, a method, a compressor or a suite is tried on
    host_options: a = 1      of that model, for a method: what it has to be built with
    options: a = 1, b = 2    what it is called with, as in a TOML table, to keep the trial small
    budget: bytes = 0.5      of a compressor: bytes, flops and bitops as shares of what the host takes
    not CHECK: reason        this check does not hold, for a reason; it is run all the same, and a pass is a failure
    not Part.CHECK: reason   the same, of one part of the system
"""

from __future__ import annotations

import copy
import importlib
import inspect
import tomllib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import passed
import pytest
import timm

from vitrail.catalog import Card, cards

Check = Callable[[Any], None]

WORDS = {"dense", "fixed_size", "pretrained", "baseline"}
KEYS = {"host", "host_options", "options", "budget"}
BUILT = ("works", "partial")


# ---- checks


def needs(*traits: str) -> Callable[[Check], Check]:
    """Mark a check that is asked only of what has these traits."""
    return _mark(needs=frozenset(traits))


def unless(*traits: str) -> Callable[[Check], Check]:
    """Mark a check that is not asked of what has one of these traits."""
    return _mark(unless=frozenset(traits))


def slow(check: Check) -> Check:
    """Mark a check that takes seconds."""
    return _mark(slow=True)(check)


def costly(check: Check) -> Check:
    """Mark a check that is not run again on what passed it as everything is: see ``passed.py``."""
    return _mark(costly=True, slow=True)(check)


def _mark(**marks: Any) -> Callable[[Check], Check]:
    def mark(check: Check) -> Check:
        vars(check).update(marks)
        return check

    return mark


def checks_of(contract: ModuleType) -> list[Check]:
    """Return all checks of a contract: the public functions that its module defines."""
    return [
        function
        for name, function in vars(contract).items()
        if inspect.isfunction(function) and function.__module__ == contract.__name__ and not name.startswith("_")
    ]


def applicable(contract: ModuleType, traits: Iterable[str]) -> list[Check]:
    """Return the checks that are asked of a subject with these traits."""
    have = set(traits)
    return [
        check
        for check in checks_of(contract)
        if getattr(check, "needs", frozenset()) <= have and not getattr(check, "unless", frozenset()) & have
    ]


def failing(contract: ModuleType, subject: Any, *, skip: Iterable[Check] = ()) -> set[str]:
    """Return the names of the checks that a subject does not pass."""
    names = set()
    for check in applicable(contract, subject.traits):
        if check not in skip:
            try:
                check(subject)
            except Exception:  # noqa: BLE001 - a part may break in any way
                names.add(check.__name__)
    return names


# ---- cards


def built(*stages: str) -> list[Card]:
    """Return the cards of what is built, of these stages or of all."""
    return [card for card in cards().values() if card.status in BUILT and (not stages or card.stage in stages)]


def text_of(card: Card, key: str) -> str | None:
    """Return the text of the trait ``key: text``, or None."""
    found = [trait.partition(": ")[2] for trait in card.traits if trait.startswith(f"{key}: ")]
    return found[0] if found else None


def table_of(card: Card, key: str) -> dict[str, Any]:
    """Return the values of the trait ``key: a = 1, b = 2``."""
    values: dict[str, Any] = tomllib.loads(f"table = {{ {text_of(card, key) or ''} }}")["table"]
    return values


def exceptions(card: Card) -> dict[str, str]:
    """Return the checks that a card says do not hold, each with its reason."""
    split = (trait.removeprefix("not ").partition(": ") for trait in card.traits if trait.startswith("not "))
    return {check: reason for check, _, reason in split}


def exempt(card: Card, name: str, check: Check) -> list[pytest.MarkDecorator]:
    """Return the mark of a test of a check that a card says does not hold, for all or for the part of this name."""
    declared = exceptions(card)
    reason = declared.get(check.__name__) or declared.get(f"{name}.{check.__name__}")
    return [pytest.mark.xfail(reason=reason, strict=True)] if reason else []


def provided(card: Card) -> Iterator[tuple[str, Any]]:
    """Yield name and object of the import paths that a card provides; what does not import is left to test_catalog."""
    for path in card.provides:
        module, _, name = path.partition(":")
        if module != "timm":
            try:
                yield path, getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):
                continue


def model_names_of(card: Card) -> list[str]:
    """Return the models of a family to run: its nano variants, or the first that timm has."""
    own = [path.rpartition(":")[2] for path, _ in provided(card)]
    nanos = [name for name in own if name.endswith("_nano") and timm.is_model(name)]
    timms = [path.removeprefix("timm:") for path in card.provides if path.startswith("timm:")]
    return nanos or timms[:1]


def returns(thing: Any, *kinds: str) -> bool:
    """Whether a function says that it returns one of these kinds."""
    if not inspect.isfunction(thing):
        return False
    said = inspect.signature(thing).return_annotation
    return (said if isinstance(said, str) else getattr(said, "__name__", str(said))) in kinds


def cases(contract: ModuleType, subjects: Iterable[tuple[Card, Any]]) -> list[Any]:
    """Return one test per subject and applicable check, the declared exceptions run strictly."""
    found = []
    for card, subject in subjects:
        for check in applicable(contract, subject.traits):
            marks = [pytest.mark.slow] if getattr(check, "slow", False) else []
            marks += exempt(card, subject.name, check)
            if getattr(check, "costly", False) and passed.is_kept(check, subject):
                marks.append(pytest.mark.skip(reason="it passed with these very sources and libraries: passed.json"))
            found.append(pytest.param(check, subject, id=f"{subject.name}-{check.__name__}", marks=marks))
    return found


# ---- arguments


def no_default_can_be_changed(function: Callable[..., Any]) -> None:
    """Raise if a default value is one that all calls share and any can change."""
    for name, parameter in inspect.signature(function).parameters.items():
        assert not isinstance(parameter.default, list | dict | set), (
            f"the default of {name!r} of {function.__qualname__} is a {type(parameter.default).__name__}, "
            "shared by all calls: use None or a tuple"
        )


def leaves_alone(options: dict[str, Any], use: Callable[[], object]) -> None:
    """Raise if ``use`` changes values of the caller's options; modules among them are compared by the caller."""
    plain = {name: value for name, value in options.items() if isinstance(value, str | int | float | list | dict)}
    before = copy.deepcopy(plain)
    use()
    assert plain == before, f"the caller's options were changed from {before} to {plain}"
