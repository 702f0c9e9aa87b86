from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from vitrail.deploy.int8 import quantise
from vitrail.deploy.runtime import open_session
from vitrail.errors import InputError


def test_int8_is_smaller_with_the_same_interface_and_nearly_the_same_answers(exported, tmp_path: Path) -> None:
    images = exported.pixels(48)
    batches = iter([images[:16], images[16:32], images[32:]])
    quantise(exported.path, tmp_path / "int8.onnx", batches)
    assert next(batches, None) is None
    assert (tmp_path / "int8.onnx").stat().st_size < 0.35 * exported.path.stat().st_size
    plain, small = open_session(exported.path), open_session(tmp_path / "int8.onnx")
    assert [(value.name, value.type, value.shape) for value in [*plain.get_inputs(), *plain.get_outputs()]] == [
        (value.name, value.type, value.shape) for value in [*small.get_inputs(), *small.get_outputs()]
    ]
    assert plain.get_modelmeta().custom_metadata_map == small.get_modelmeta().custom_metadata_map
    raw = np.random.default_rng(0).permutation(exported.pixels(32, seed=1))
    expected, answers = (session.run(["probabilities"], {"image": raw})[0] for session in (plain, small))
    assert (expected.argmax(1) == answers.argmax(1)).mean() > 0.8
    assert np.abs(expected - answers).mean() < 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


def test_edges_can_stay_in_floats(exported, tmp_path: Path) -> None:
    quantise(exported.path, tmp_path / "int8.onnx", [exported.pixels(8)], keep_edges=True)
    model = onnx.load(tmp_path / "int8.onnx")
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    quantised = [made_by.get(node.input[1]) == "DequantizeLinear" for node in layers]
    assert not quantised[0]
    assert not quantised[-1]
    assert all(quantised[2:-1])


def test_calibration_needs_images(exported, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give at least one batch"):
        quantise(exported.path, tmp_path / "int8.onnx", iter([]))
    assert not list(tmp_path.iterdir())
