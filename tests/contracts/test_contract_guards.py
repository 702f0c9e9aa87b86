"""Tests that guard the tests: every system has its files, every trait means something, every setting is read."""

import ast
import importlib
import inspect
import shlex
from pathlib import Path
from typing import Any

import click
import contract
import model_contract
import passed
import pytest
import subjects

import vitrail
from vitrail.app.build import check_names
from vitrail.catalog import cards, find
from vitrail.cli import app
from vitrail.errors import nearest
from vitrail.training.recipe import Recipe, apply_overrides, recipe_keys

SOURCE = Path(vitrail.__file__).parent
TESTS = Path(__file__).parents[1]
BUILT = [card.slug for card in contract.built()]
# The contracts by the stage of the card; systems of other stages have none yet.
CONTRACTS = {
    "model": "model_contract",
    "edit": "edit_contract",
    "method": "method_contract",
    "compress": "compressor_contract",
    "evaluate": "suite_contract",
    "data": "data_contract",
}
FOUND = {
    "model": subjects.models,
    "edit": subjects.edits,
    "method": subjects.methods,
    "compress": subjects.compressors,
    "evaluate": subjects.suites,
}


# ---- systems


@pytest.mark.parametrize("slug", BUILT)
def test_a_system_has_its_files(slug):
    card = find(slug)
    own = [path.partition(":")[0] for path in card.provides if not path.startswith("timm:")]
    files = [Path(inspect.getfile(importlib.import_module(module))) for module in own]
    if "baseline" in card.traits:
        return
    assert files, f"{slug} is built and provides nothing"
    assert card.check == f"vitrail.checks.{slug}", f"the check of {slug} is {card.check!r}"
    assert (SOURCE / "checks" / f"{slug}.py").is_file()
    for file in files:
        folder = TESTS / file.relative_to(SOURCE).parts[0]
        assert list(folder.rglob(f"test_{file.stem}.py")), f"{folder} has no test_{file.stem}.py"


def test_every_check_is_of_a_card():
    of_cards = {card.check.rpartition(".")[2] for card in cards().values() if card.check}
    files = {path.stem for path in (SOURCE / "checks").glob("*.py")} - {"__init__", "check"}
    assert files <= of_cards, f"checks that no card names: {files - of_cards}"


@pytest.mark.parametrize("slug", [slug for slug in BUILT if find(slug).stage in FOUND])
def test_a_contract_runs_on_every_system(slug):
    stage = find(slug).stage
    found = [part for card, part in FOUND[stage]() if card.slug == slug]
    assert found, (
        f"no contract runs on {slug}: it provides no {stage} "
        "(a model's name ends in _nano; a method is a class; a function says it returns Edit, Compressed or Result)"
    )


@pytest.mark.parametrize("slug", BUILT)
def test_every_trait_means_something(slug):
    card = find(slug)
    for trait in card.traits:
        key, sign, text = trait.partition(": ")
        if not sign:
            close = nearest(trait, contract.WORDS)
            assert trait in contract.WORDS, f"{slug} has the unknown trait {trait!r}; nearest: {close}"
        elif key.startswith("not "):
            # A model's or an edit's system may have a method beside it.
            beside = ("method_contract",) if card.stage in ("model", "edit") else ()
            names = (CONTRACTS[card.stage], *beside, "check_contract")
            contracts = [importlib.import_module(name) for name in names]
            known = {check.__name__ for module in contracts for check in contract.checks_of(module)}
            assert key.removeprefix("not ").rpartition(".")[2] in known, f"{slug}: no check is called {key[4:]!r}"
            assert len(text.split()) > 2 and "fixme" not in text.lower(), f"{slug}: {text!r} is no reason"
        else:
            assert key in contract.KEYS, f"{slug} has the unknown trait {trait!r}"
    for key in ("options", "budget"):
        if card.stage != "data":
            contract.table_of(card, key)


@pytest.mark.parametrize("slug", [slug for slug in BUILT if find(slug).example])
def test_every_example_is_a_command(slug):
    program, *arguments = shlex.split(find(slug).example)
    assert program == "vitrail"
    overrides = parsed(arguments).get("overrides", ())
    check_names(Recipe.from_dict(apply_overrides({}, overrides), f"the example of {slug}"))


def test_an_example_that_is_no_command_is_seen():
    for words in (["list", "--stagee", "x"], ["lst"]):
        with pytest.raises(click.ClickException):
            parsed(words)


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the parameters of a command line, which is not run."""
    with app.make_context("vitrail", list(words)) as context:
        name, command, rest = app.resolve_command(context, list(words))
        with command.make_context(name, rest, parent=context) as inner:
            return inner.params


# ---- settings


def read_attributes() -> set[tuple[str, str]]:
    """Return every attribute that the source reads, with the last name of what it is read of: ("train", "epochs")."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        if path.name != "recipe.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    owner = node.value
                    name = getattr(owner, "attr", None) or getattr(owner, "id", None)
                    found.add((str(name), node.attr))
    return found


def unread(keys: list[str], read: set[tuple[str, str]]) -> list[str]:
    """Return the recipe keys whose value no code reads from its section or a ``config``."""
    missing = []
    for key in keys:
        section, _, leaf = key.rpartition(".")
        owners = {section, "config"} if section else {owner for owner, _ in read}
        if not any((owner, leaf) in read for owner in owners):
            missing.append(key)
    return missing


def test_every_recipe_key_is_read():
    read = read_attributes()
    assert not unread(recipe_keys(), read)
    assert unread(["train.epochs", "train.bogus_setting"], read) == ["train.bogus_setting"]


def test_what_is_kept_as_passed_rests_on_every_source_and_library(monkeypatch, tmp_path):
    check = model_contract.its_onnx_file_agrees
    found = {subject.name: subject for _, subject in subjects.models()}
    net, other = found["rmt_nano"], found["xcit_nano"]
    rests_on = passed.closure(net.modules)
    assert {"vitrail.models.rmt", "vitrail.models.planes", "vitrail.models.staged", "vitrail.errors"} <= rests_on
    assert not {"vitrail.models.xcit", "vitrail.training.train", "numpy"} & rests_on
    before = passed.key(check, net), passed.key(check, other)
    assert before[0] != before[1]

    # A changed file changes the keys of what rests on it.
    changed = tmp_path / "planes.py"
    changed.write_text((SOURCE / "models/planes.py").read_text() + "\n# changed\n")
    real = passed._file
    monkeypatch.setattr(passed, "_file", lambda name: changed if name == "vitrail.models.planes" else real(name))
    assert passed.key(check, net) != before[0]
    assert passed.key(check, other) == before[1]
    monkeypatch.setattr(passed, "_file", real)
    # So does another version of a library.
    monkeypatch.setattr(passed, "version", lambda library: "0")
    assert passed.key(check, net) != before[0]


def test_only_what_passed_as_it_is_is_left_out(monkeypatch):
    check = model_contract.its_onnx_file_agrees
    pairs = [(card, subject) for card, subject in subjects.models() if subject.name in ("rmt_nano", "xcit_nano")]
    net = pairs[0][1]
    monkeypatch.setattr(passed, "_kept", lambda: {net.name: passed.key(check, net), pairs[1][1].name: "of before"})
    skipped = [
        case.id for case in contract.cases(model_contract, pairs) if any(mark.name == "skip" for mark in case.marks)
    ]
    assert skipped == [f"{net.name}-its_onnx_file_agrees"]
