"""Static INT8 quantisation of an exported file, by ONNX Runtime, in the QDQ form that other runtimes read as well."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from vitrail.data.preprocess import Preprocess
from vitrail.deploy import graph
from vitrail.deploy.export import quiet, write_model
from vitrail.deploy.interface import INPUT
from vitrail.errors import InputError

WEIGHTED = ("Conv", "Gemm", "MatMul")

# In EfficientNet-Lite0 the first eighth of the layers causes two thirds of the error of the logits.
EDGE = 1 / 8


def quantise(path: str | Path, target: str | Path, pixels: Iterable[np.ndarray], *, keep_edges: bool = False) -> None:
    """Write an INT8 version of an exported file, with the same inputs and outputs.

    Weights are symmetric with one scale per channel, activations asymmetric with one range per tensor: from the least
    to the greatest value seen. The resize stays as it is; normalisation and probabilities stay in floats.

    Args:
        path: a file of ``export_onnx``.
        target: the file to write, atomically.
        pixels: batches of calibration images as ``Preprocess`` returns them, uint8 (N, h, w, 3); read once, streamed.
            100 to 200 images are enough.
        keep_edges: leave the first eighth of the layers and the last one in floats: slower and more accurate.

    Raises:
        InputError: no calibration image came.
    """
    whole = onnx.load(path)
    interface = graph.interface_of(whole)
    reader = _Reader(interface.preprocess, pixels)
    # The quantiser works on files.
    with tempfile.TemporaryDirectory() as folder, quiet():
        plain, prepared, quantised = (Path(folder, name) for name in ("plain.onnx", "prepared.onnx", "quantised.onnx"))
        onnx.save(graph.network_from(whole, INPUT), plain)
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantised),
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # With signed activations ONNX Runtime takes twice as long on x86.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=_edges(onnx.load(prepared)) if keep_edges else [],
        )
        write_model(graph.wrap(onnx.load(quantised), interface), target)


class _Reader(CalibrationDataReader):
    """Normalises batches as they are asked for."""

    def __init__(self, preprocess: Preprocess, pixels: Iterable[np.ndarray]) -> None:
        self.preprocess = preprocess
        self.batches: Iterator[np.ndarray] = iter(pixels)
        self.seen = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        if batch is None:
            if self.seen == 0:
                raise InputError("cannot quantise without calibration images: give at least one batch")
            return None
        self.seen += len(batch)
        return {INPUT: self.preprocess.normalise(batch)}


def _edges(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes at the start, with what lies between them, and of the last weighted node."""
    weighted = [index for index, node in enumerate(model.graph.node) if node.op_type in WEIGHTED]
    first = weighted[max(1, round(len(weighted) * EDGE))] if len(weighted) > 1 else 0
    last = weighted[-1:]
    return [node.name for index, node in enumerate(model.graph.node) if index < first or index in last]
