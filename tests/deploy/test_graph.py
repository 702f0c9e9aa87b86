"""The preprocessing inside the file against ``Preprocess``."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from vitrail.data.preprocess import Preprocess
from vitrail.deploy import graph
from vitrail.deploy.interface import INPUT, LOGITS, PIXELS, PROBABILITIES, Interface

MODES = [(resize, interpolation) for resize in ("crop", "squash") for interpolation in ("bilinear", "bicubic")]
PREPROCESSES = {
    (resize, interpolation, size): Preprocess(size, resize, crop_pct, interpolation, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for resize, interpolation in MODES
    for size, crop_pct in (((32, 32), 0.875), ((24, 40), 1.0))
}


def mean_network(size: tuple[int, int]) -> onnx.ModelProto:
    """The smallest network: the mean of each channel is the logit of its class."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", [INPUT, "axes"], [LOGITS], keepdims=0, name="mean")],
        "mean",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, *size])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@cache
def session(preprocess: Preprocess) -> Callable[[np.ndarray], list[np.ndarray]]:
    model = graph.wrap(mean_network(preprocess.size), Interface(("r", "g", "b"), preprocess))
    onnx.checker.check_model(model, full_check=True)
    for name in (PIXELS, INPUT):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda images: opened.run([PIXELS, INPUT, LOGITS, PROBABILITIES], {"image": images})


def check(preprocess: Preprocess, images: np.ndarray) -> None:
    pixels, inputs, logits, probabilities = session(preprocess)(images)
    expected = np.stack([preprocess(Image.fromarray(image)) for image in images])
    difference = np.abs(np.moveaxis(pixels, 1, -1) - expected)
    # Where a small ratio such as 5:4 makes a value end in exactly .5, Pillow's 22-bit weights and ONNX Runtime's floats
    # may round it to either side: in the first pass, and then in the second.
    assert difference.max() <= 2
    assert (difference > 1).sum() <= 2 + difference.size / 2000
    assert np.array_equal(pixels, np.round(pixels))
    normal = preprocess.normalise(np.moveaxis(pixels, 1, -1).astype(np.uint8))
    np.testing.assert_allclose(inputs, normal, atol=2e-6)
    np.testing.assert_allclose(logits, inputs.mean((2, 3)), atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("key", PREPROCESSES, ids=str)
@settings(max_examples=15)
@given(
    height=st.one_of(st.integers(1, 90), st.sampled_from([255, 256, 257, 375, 500])),
    width=st.one_of(st.integers(1, 90), st.sampled_from([255, 256, 257, 375, 500])),
    seed=st.integers(0, 2**32 - 1),
)
def test_noise_of_any_size_is_within_a_grey_level_but_for_ties(key: tuple, height: int, width: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    check(PREPROCESSES[key], noise)


@pytest.mark.parametrize("key", PREPROCESSES, ids=str)
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 700), (700, 1), (32, 32), (24, 40), (37, 37), (2000, 3), (1200, 1600)], ids=str
)
def test_corner_sizes(key: tuple, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    check(PREPROCESSES[key], noise)


@pytest.mark.parametrize("key", PREPROCESSES, ids=str)
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "cat"])
def test_photographs_are_within_one_grey_level(key: tuple, name: str) -> None:
    image = getattr(skimage.data, name)()
    expected = PREPROCESSES[key](Image.fromarray(image))
    pixels = session(PREPROCESSES[key])(image[None])[0]
    assert np.abs(np.moveaxis(pixels[0], 0, -1) - expected).max() <= 1


def test_the_scaled_size_follows_whole_numbers() -> None:
    # Ties and near ties of the aspect ratio: a float comparison in the graph would cut at another place.
    preprocess = PREPROCESSES["crop", "bilinear", (24, 40)]
    for height in range(10, 40):
        for width in (height * 5 // 3 - 1, height * 5 // 3, height * 5 // 3 + 1):
            image = np.zeros((1, height, width, 3), np.uint8)
            image[:, :, width // 2 :] = 255
            check(preprocess, image)


def test_multilabel_gives_independent_probabilities_and_temperature_divides() -> None:
    preprocess = Preprocess((8, 8))
    image = np.random.default_rng(1).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    for multilabel in (False, True):
        interface = Interface(("r", "g", "b"), preprocess, temperature=2.5, multilabel=multilabel)
        model = graph.wrap(mean_network((8, 8)), interface)
        opened = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        logits, probabilities = opened.run([LOGITS, PROBABILITIES], {"image": image})
        scaled = np.exp(logits / 2.5)
        expected = scaled / (1 + scaled) if multilabel else scaled / scaled.sum(1, keepdims=True)
        np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_the_interface_survives_the_file() -> None:
    interface = Interface(("a", "Übung", "c"), Preprocess((8, 12), "squash", std=(0.5, 0.5, 0.25)), 1.7, True)
    model = onnx.load_from_string(graph.wrap(mean_network((8, 12)), interface).SerializeToString())
    assert graph.interface_of(model) == interface
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(entries["classes"]) == ["a", "Übung", "c"]
    assert entries["vitrail_version"]


def test_the_parts_add_up_to_the_whole() -> None:
    preprocess = Preprocess((8, 8), crop_pct=0.5)
    model = graph.wrap(mean_network((8, 8)), Interface(("r", "g", "b"), preprocess))
    image = np.random.default_rng(1).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    pixels = np.stack([preprocess(Image.fromarray(one)) for one in image])

    def run(part: onnx.ModelProto, name: str, value: np.ndarray) -> np.ndarray:
        onnx.checker.check_model(part, full_check=True)
        return onnxruntime.InferenceSession(part.SerializeToString()).run([LOGITS], {name: value})[0]

    whole = run(model, "image", image)
    behind_resize = run(graph.network_from(model, PIXELS), PIXELS, np.moveaxis(pixels, -1, 1).astype(np.float32))
    network = run(graph.network_from(model, INPUT), INPUT, preprocess.normalise(pixels))
    np.testing.assert_allclose(behind_resize, network, atol=1e-6)
    np.testing.assert_allclose(whole, network, atol=0.02)  # one grey level, here and there
    assert {node.op_type for node in graph.network_from(model, INPUT).graph.node} == {"ReduceMean"}
