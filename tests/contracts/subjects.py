"""What the contracts run on: everything that the cards of the catalogue say is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from check_contract import Check
from compressor_contract import Compressor
from contract import built, model_names_of, provided, returns, table_of, text_of
from data_contract import Images
from edit_contract import Edit
from method_contract import Method
from model_contract import Model
from suite_contract import Suite
from timm.models import get_pretrained_cfg
from torch import nn

from vitrail.catalog import Card
from vitrail.data.sources import open_source
from vitrail.methods.method import Method as MethodBase
from vitrail.models import create_model, model_names
from vitrail.training.recipe import DataConfig

EDIT = ("Edit", "Callable[[nn.Module], nn.Module]")
Found = Iterator[tuple[Card, Any]]


def models() -> Found:
    """Yield the smallest models of every family, of whatever stage the system that it belongs to."""
    for card in built():
        for name in model_names_of(card):
            traits = {*card.traits, "recorded"} | ({"nano"} if name.endswith("_nano") else set())
            side = get_pretrained_cfg(name).input_size[-1] if "fixed_size" in traits else 32
            yield card, Model(name, _creator(name), frozenset(traits), side)


def _creator(name: str) -> Callable[..., nn.Module]:
    return lambda **options: create_model(name, **options)


def edits() -> Found:
    """Yield every function that returns an edit."""
    model_names()  # registers every host
    for card, path, thing in _parts():
        if returns(thing, *EDIT):
            yield card, Edit(_name(path), path, thing, **_trial(card))


def methods() -> Found:
    """Yield every training objective."""
    for card, path, thing in _parts():
        if inspect.isclass(thing) and issubclass(thing, MethodBase):
            takes = inspect.signature(thing).parameters
            trial = _trial(card)
            if "teacher" in takes:
                trial["traits"] |= {"teacher"}
            if "multilabel" in takes and takes["multilabel"].default is True:
                trial["traits"] |= {"multilabel"}
            yield card, Method(_name(path), thing, host_options=table_of(card, "host_options"), **trial)


def compressors() -> Found:
    """Yield every function that compresses."""
    for card, path, thing in _parts():
        if returns(thing, "Compressed"):
            bounds = table_of(card, "budget")
            yield card, Compressor(_name(path), thing, **_trial(card), **({"bounds": bounds} if bounds else {}))


def suites() -> Found:
    """Yield every evaluation suite."""
    for card, path, thing in _parts():
        if returns(thing, "Result"):
            yield card, Suite(_name(path), thing, **_trial(card))


def sources() -> Found:
    """Yield every generator of images that a path ``SLUG://`` opens."""
    for card in built("data"):
        things = [thing for _, thing in provided(card)][:1]
        if any(inspect.isclass(thing) and hasattr(thing, "records") for thing in things):
            yield card, Images(card.slug, _opener(f"{card.slug}://{text_of(card, 'options') or ''}"))


def _opener(path: str) -> Callable[[], Any]:
    return lambda: open_source(DataConfig(path=path))


def checks() -> Found:
    """Yield the check of every system that has one."""
    for card in built():
        if card.check:
            yield card, Check(card.slug, card.check, card.provides, frozenset(card.traits))


def _parts() -> Iterator[tuple[Card, str, Any]]:
    for card in built():
        for path, thing in provided(card):
            yield card, path, thing


def _trial(card: Card) -> dict[str, Any]:
    host = text_of(card, "host")
    return {
        "options": table_of(card, "options"),
        "traits": frozenset(card.traits),
        **({"host": host} if host else {}),
    }


def _name(path: str) -> str:
    return path.rpartition(":")[2]
