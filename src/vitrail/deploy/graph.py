"""The preprocessing and the outputs as ONNX operators, put around an exported network.

The file that results takes raw images and gives probabilities:

    image   uint8 (N, H, W, 3)       any N, H and W
    pixels  float32 (N, 3, h, w)     resized and cropped, whole grey levels 0 to 255
    input   float32 (N, 3, h, w)     normalised: what the network was trained on
    logits, probabilities            float32 (N, C)

The resize is that of ``Preprocess`` to within one grey level: antialiased, in whole grey levels, along the rows and
then along the columns. (Two levels, rarely, where a value lies exactly between two levels in both passes.)
``exclude_outside`` matters: without it ONNX Runtime 1.31 errs by up to 18 grey levels at the borders.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitrail import __version__
from vitrail.data.preprocess import Preprocess
from vitrail.deploy.interface import IMAGE, INPUT, LOGITS, PIXELS, PROBABILITIES, Interface


def wrap(network: onnx.ModelProto, interface: Interface) -> onnx.ModelProto:
    """Return the network from ``input`` to ``logits`` with the preprocessing before it and the probabilities behind."""
    resize, normalise, answer = (_Nodes(prefix) for prefix in _PREFIXES)
    _resize(resize, interface.preprocess)
    _normalise(normalise, interface.preprocess)
    scaled = answer("Div", LOGITS, np.array(interface.temperature, dtype=np.float32))
    if interface.multilabel:
        answer("Sigmoid", scaled, output=PROBABILITIES)
    else:
        answer("Softmax", scaled, output=PROBABILITIES, axis=-1)
    added = (resize, normalise, answer)
    return _model(
        network,
        interface,
        [*resize.nodes, *normalise.nodes, *network.graph.node, *answer.nodes],
        [*network.graph.initializer, *(value for nodes in added for value in nodes.constants.values())],
        IMAGE,
    )


def network_from(model: onnx.ModelProto, start: str) -> onnx.ModelProto:
    """Return the part of a wrapped model from ``pixels`` or ``input`` to ``logits`` (and ``probabilities``)."""
    dropped = _PREFIXES[:1] if start == PIXELS else _PREFIXES
    return _model(
        model,
        interface_of(model),
        [node for node in model.graph.node if not node.name.startswith(dropped)],
        [value for value in model.graph.initializer if not value.name.startswith(dropped)],
        start,
    )


def interface_of(model: onnx.ModelProto) -> Interface:
    """Read the interface of a wrapped model from its metadata."""
    return Interface.from_metadata({entry.key: entry.value for entry in model.metadata_props})


_PREFIXES = ("vitrail/resize", "vitrail/normalise", "vitrail/answer")


def _model(
    like: onnx.ModelProto,
    interface: Interface,
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    start: str,
) -> onnx.ModelProto:
    """Build a model of the versions, functions and inner shapes of another."""
    size = interface.preprocess.size
    if start == IMAGE:
        source = helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, ["batch", "height", "width", 3])
    else:
        source = helper.make_tensor_value_info(start, TensorProto.FLOAT, ["batch", 3, *size])
    made = {name for node in nodes for name in node.output}
    graph = helper.make_graph(
        nodes,
        like.graph.name or "vitrail",
        [source],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", len(interface.classes)])
            for name in (LOGITS, PROBABILITIES)
            if name in made
        ],
        initializers,
        value_info=[value for value in like.graph.value_info if value.name in made],
    )
    model = helper.make_model(
        graph,
        opset_imports=like.opset_import,
        ir_version=like.ir_version,
        functions=like.functions,
        producer_name="vitrail",
        producer_version=__version__,
    )
    helper.set_model_props(model, interface.to_metadata())
    return model


class _Nodes:
    """Collects nodes and constants; a call adds one node and returns the name of its output."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[Any, ...], onnx.TensorProto] = {}

    def __call__(self, operator: str, *inputs: str | np.ndarray, output: str | None = None, **attributes: Any) -> str:
        name = f"{self.prefix}/{operator}_{len(self.nodes)}"
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [output or name], name=name, **attributes))
        return output or name

    def _constant(self, value: np.ndarray) -> str:
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(value, f"{self.prefix}/constant_{len(self.constants)}")
        return self.constants[key].name


def _int(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _resize(add: _Nodes, preprocess: Preprocess) -> None:
    """Add the way from ``image`` to ``pixels``."""
    shape = add("Shape", IMAGE)
    height, width = add("Gather", shape, _int([1])), add("Gather", shape, _int([2]))
    rows, columns = _resized(add, preprocess, height, width)
    sizes = add("Concat", add("Gather", shape, _int([0])), _int([3]), rows, columns, axis=0)
    planes = add("Transpose", IMAGE, perm=[0, 3, 1, 2])  # uint8 (N, 3, H, W)
    # On uint8 the operator rounds and clips to grey levels after each pass, as Pillow does.
    kind: dict[str, dict[str, Any]] = {
        "bilinear": {"mode": "linear"},
        "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5},
    }
    resized = add("Resize", planes, "", "", sizes, antialias=1, exclude_outside=1, **kind[preprocess.interpolation])
    top, left = (
        add("Div", add("Sub", side, _int([kept])), _int([2])) for side, kept in zip((rows, columns), preprocess.size)
    )
    start = add("Concat", top, left, axis=0)
    crop = add("Slice", resized, start, add("Add", start, _int(list(preprocess.size))), _int([2, 3]))  # (N, 3, h, w)
    add("Cast", crop, output=PIXELS, to=TensorProto.FLOAT)


def _normalise(add: _Nodes, preprocess: Preprocess) -> None:
    """Add the way from ``pixels`` to ``input``: ``(pixel / 255 - mean) / std``."""
    mean, std = (np.array(values, dtype=np.float64).reshape(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    scaled = add("Mul", PIXELS, (1 / (255 * std)).astype(np.float32))
    add("Add", scaled, (-mean / std).astype(np.float32), output=INPUT)


def _resized(add: _Nodes, preprocess: Preprocess, height: str, width: str) -> tuple[str, str]:
    """Add ``Preprocess.resized``: the same whole numbers."""
    target_h, target_w = replace(preprocess, resize="squash").resized(1, 1)
    if preprocess.resize == "squash":
        return add("Identity", _int([target_h])), add("Identity", _int([target_w]))

    def side(own: str, other: str, target: int, least: int) -> str:
        rounded = add("Add", add("Mul", own, _int([target])), add("Div", other, _int([2])))
        return add("Max", add("Div", rounded, other), _int([least]))

    wide = add("GreaterOrEqual", add("Mul", width, _int([target_h])), add("Mul", height, _int([target_w])))
    rows = add("Where", wide, _int([target_h]), side(height, width, target_w, target_h))
    columns = add("Where", wide, side(width, height, target_h, target_w), _int([target_w]))
    return rows, columns
