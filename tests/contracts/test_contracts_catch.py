"""Each contract catches each fault, and names it by the check that is for it; what is healthy passes."""

import dataclasses

import broken
import check_contract
import compressor_contract
import contract
import data_contract
import edit_contract
import golden
import method_contract
import model_contract
import pytest
import suite_contract
import torch
from twin import Twin

from vitrail.catalog import cards

ONNX = model_contract.its_onnx_file_agrees
EDITED_ONNX = edit_contract.its_onnx_file_agrees
EXPORTS = compressor_contract.its_model_exports


def test_healthy_parts_pass():
    assert not contract.failing(model_contract, broken.model(Twin), skip=[ONNX])
    assert not contract.failing(edit_contract, broken.edit(broken.healthy_edit), skip=[EDITED_ONNX])
    assert not contract.failing(method_contract, broken.method(broken.HealthyMethod))
    assert not contract.failing(compressor_contract, broken.compressor(broken.healthy_compressor), skip=[EXPORTS])
    assert not contract.failing(suite_contract, broken.suite(broken.healthy_suite))
    assert not contract.failing(data_contract, broken.source(broken.HealthySource))


@pytest.mark.parametrize("kind", broken.MODELS, ids=lambda kind: kind.__name__)
def test_model_faults(kind):
    assert contract.failing(model_contract, broken.model(kind), skip=[ONNX]) == broken.MODELS[kind]


@pytest.mark.slow
def test_a_model_whose_file_differs():
    with pytest.raises(AssertionError, match="the ONNX file's logits"):
        ONNX(broken.model(broken.OtherInExport))
    with pytest.raises(AssertionError, match="the ONNX file's logits"):
        EDITED_ONNX(broken.edit(broken.exported_edit))


def test_a_changed_start_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    model = broken.model(Twin)
    with pytest.raises(AssertionError, match=r"nothing is recorded.*golden.py Twin"):
        model_contract.it_gives_its_recorded_outputs(model)
    golden.record("Twin", golden.figures(model.build, model.side))
    model_contract.it_gives_its_recorded_outputs(model)

    def other_scale(**options):
        made = model.create(**options)
        torch.nn.init.constant_(made.stages[1][1].weight, 0.5)
        return made

    changed = model_contract.Model("Twin", other_scale)
    with pytest.raises(AssertionError, match="off those recorded"):
        model_contract.it_gives_its_recorded_outputs(changed)


@pytest.mark.parametrize("make", broken.EDITS, ids=lambda make: make.__name__)
def test_edit_faults(make):
    assert contract.failing(edit_contract, broken.edit(make), skip=[EDITED_ONNX]) == broken.EDITS[make]


@pytest.mark.parametrize("kind", broken.METHODS, ids=lambda kind: kind.__name__)
def test_method_faults(kind):
    assert contract.failing(method_contract, broken.method(kind)) == broken.METHODS[kind]


@pytest.mark.parametrize("compress", broken.COMPRESSORS, ids=lambda compress: compress.__name__)
def test_compressor_faults(compress):
    found = contract.failing(compressor_contract, broken.compressor(compress), skip=[EXPORTS])
    assert found == broken.COMPRESSORS[compress]


@pytest.mark.parametrize("run", broken.SUITES, ids=lambda run: run.__name__)
def test_suite_faults(run):
    assert contract.failing(suite_contract, broken.suite(run)) == broken.SUITES[run]


@pytest.mark.parametrize("kind", broken.SOURCES, ids=lambda kind: kind.__name__)
def test_source_faults(kind):
    assert contract.failing(data_contract, broken.source(kind)) == broken.SOURCES[kind]


@pytest.mark.parametrize("name", ["healthy", *broken.CHECKS])
def test_check_faults(name, tmp_path, monkeypatch):
    old, new, expected = broken.CHECKS.get(name, ("", "", set()))
    text = broken.HEALTHY_CHECK
    assert old in text
    (tmp_path / f"check_with_{name}.py").write_text(text.replace(old, new, 1) if old else text)
    monkeypatch.syspath_prepend(str(tmp_path))
    subject = check_contract.Check(name, f"check_with_{name}")
    found = contract.failing(check_contract, subject)
    # What does not run has no verdict, either.
    stopped = (
        {"its_findings_are_sound", "its_verdict_is_json"} if name in ("two_arguments", "private_attribute") else set()
    )
    assert found == expected | stopped


def test_every_check_of_every_contract_catches_something():
    caught = {
        model_contract: set.union(*broken.MODELS.values(), {ONNX.__name__, "it_gives_its_recorded_outputs"}),
        edit_contract: set.union(*broken.EDITS.values(), {EDITED_ONNX.__name__}),
        method_contract: set.union(*broken.METHODS.values()),
        compressor_contract: set.union(*broken.COMPRESSORS.values(), {EXPORTS.__name__}),
        suite_contract: set.union(*broken.SUITES.values()),
        data_contract: set.union(*broken.SOURCES.values()),
        check_contract: set.union(*(expected for _, _, expected in broken.CHECKS.values())),
    }
    for module, names in caught.items():
        checks = {check.__name__ for check in contract.checks_of(module)}
        assert checks == names, (
            f"{module.__name__}: no fixture fails {checks - names}; there is no check {names - checks}"
        )


def test_exceptions_are_declared_and_strict():
    card = dataclasses.replace(
        cards()["small_resnet"],
        traits=("dense", "not a_nano_is_small: it is meant for large images", "not Other.it_takes_one_channel: grey"),
    )
    cases = contract.cases(model_contract, [(card, broken.model(broken.Large))])
    marked = {case.values[0].__name__: case.marks for case in cases if any(m.name == "xfail" for m in case.marks)}
    assert list(marked) == ["a_nano_is_small"]
    assert marked["a_nano_is_small"][0].kwargs == {"reason": "it is meant for large images", "strict": True}
    assert contract.exceptions(card)["Other.it_takes_one_channel"] == "grey"


def test_traits_with_texts():
    card = dataclasses.replace(cards()["small_resnet"], traits=("dense", "host: vgg11", "options: a = 1, b = [2]"))
    assert contract.text_of(card, "host") == "vgg11"
    assert contract.table_of(card, "options") == {"a": 1, "b": [2]}
    assert contract.text_of(card, "budget") is None
    assert contract.table_of(card, "budget") == {}
