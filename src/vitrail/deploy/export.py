"""Export to one ONNX file that takes raw images, and its parity with the PyTorch model."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript
import torch
from onnx_ir.passes import common
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
    fuse_pad_into_conv_rule,
    normalize_pad_format_conv_rule,
)
from PIL import Image
from torch import nn

from vitrail.data.preprocess import Preprocess
from vitrail.deploy import graph
from vitrail.deploy.interface import IMAGE, INPUT, LOGITS, PIXELS, PROBABILITIES, Interface
from vitrail.deploy.reparameterise import reparameterise
from vitrail.errors import InputError, VitrailError
from vitrail.layers.scan import scans_as_operators
from vitrail.runs import atomic_path

# The largest message that protobuf, the format of an ONNX file, can hold.
LARGEST_BYTES = 2**31 - 1

FUSIONS = (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
    normalize_pad_format_conv_rule,
    fuse_pad_into_conv_rule,
)


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    path: Path
    bytes: int
    opset: int
    seconds: float
    operators: dict[str, int]
    """How often each operator occurs in the network itself."""


@dataclass(frozen=True)
class Parity:
    """Largest differences between the ONNX file and eager PyTorch, over all images."""

    images: int
    max_abs_diff: float
    """Of the logits, both networks given the same pixels."""
    max_abs_diff_probabilities: float
    """Of the probabilities, from the raw image on: the file's own resize against ``Preprocess``."""
    max_pixel_diff: float
    """Between the file's resize and ``Preprocess``, in grey levels."""
    agreement: float
    """Share of raw images for which both answer with the same class."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def export_onnx(
    model: nn.Module,
    preprocess: Preprocess,
    path: str | Path,
    *,
    classes: Sequence[str],
    temperature: float = 1.0,
    multilabel: bool = False,
) -> ExportReport:
    """Write a model as ONNX with its preprocessing: uint8 images (N, H, W, 3) in, logits and probabilities (N, C) out.

    Args:
        model: takes normalised floats (N, 3, h, w) and returns logits (N, C); it is not changed.
        preprocess: how an image becomes the model's input; built into the file.
        path: the file to write, atomically.
        classes: names of the C classes, in the order of the logits; stored in the file.
        temperature: the logits are divided by it before they become probabilities; above 0.
        multilabel: probabilities by sigmoid rather than softmax.

    Raises:
        VitrailError: an operator that ONNX does not have, control flow that depends on values, or a file above 2 GB.
        InputError: the classes or the temperature do not fit.
    """
    started = time.monotonic()
    if not temperature > 0:
        raise InputError(
            f"cannot export with temperature = {temperature}: it is above 0; 1 leaves the logits as they are"
        )
    # Exported on the CPU in fp32, whatever the model was trained in, and without touching the caller's.
    network = copy.deepcopy(model).to("cpu", torch.float32).eval()
    # What folds itself for inference does: the file has the plain layers.
    network = reparameterise(network).requires_grad_(False)
    weights = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    if weights > LARGEST_BYTES:
        raise VitrailError(
            f"cannot export to {path}: the weights take {weights / 1e9:.1f} GB and one ONNX file holds 2 GB; "
            "choose a smaller model"
        )
    example = torch.zeros(2, 3, *preprocess.size)
    with torch.inference_mode():
        outputs = network(example).shape[-1]
    if outputs != len(classes):
        raise InputError(
            f"the model has {outputs} outputs and {len(classes)} class names were given: give one for each"
        )
    proto = _export_network(network, example)
    interface = Interface(tuple(classes), preprocess, temperature, multilabel)
    wrapped = graph.wrap(proto, interface)
    write_model(wrapped, path)
    return ExportReport(
        Path(path),
        Path(path).stat().st_size,
        next(entry.version for entry in wrapped.opset_import if entry.domain == ""),
        time.monotonic() - started,
        dict(Counter(node.op_type for node in proto.graph.node)),
    )


def check_parity(model: nn.Module, preprocess: Preprocess, path: str | Path, images: Iterable[Image.Image]) -> Parity:
    """Compare an exported file with the model it came from, on RGB images of any sizes, one at a time.

    Raises:
        InputError: no image was given.
    """
    network = copy.deepcopy(model).to("cpu", torch.float32).eval()
    proto = onnx.load(path)
    interface = graph.interface_of(proto)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(PIXELS, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [LOGITS, PROBABILITIES, PIXELS]

    def eager(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            logits = network(torch.from_numpy(preprocess.normalise(pixels)))
            scaled = logits / interface.temperature
            return logits.numpy(), (scaled.sigmoid() if interface.multilabel else scaled.softmax(-1)).numpy()

    worst = np.zeros(3)
    count = agreed = 0
    for image in images:
        logits, probabilities, inside = session.run(names, {IMAGE: np.asarray(image)[None]})
        outside = preprocess(image)[None]
        inside = np.moveaxis(inside, 1, -1)
        expected, _ = eager(inside)
        _, answer = eager(outside)
        differences = (logits - expected, probabilities - answer, inside - outside)
        worst = np.maximum(worst, [float(np.abs(difference).max()) for difference in differences])
        agreed += int(probabilities.argmax() == answer.argmax())
        count += 1
    if count == 0:
        raise InputError("cannot check the exported model without images: give at least one")
    return Parity(count, float(worst[0]), float(worst[1]), float(worst[2]), agreed / count)


def write_model(model: onnx.ModelProto, path: str | Path) -> None:
    """Check a model and write it atomically."""
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)


def _export_network(network: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    """Export the network alone, with a batch of any size."""
    try:
        with quiet(), scans_as_operators() as translations:
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[LOGITS],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=translations,
                optimize=False,
            )
            if program is None:  # for the type checker: only with dynamo=False
                raise VitrailError("the exporter returned nothing")
            shape = program.model.graph.inputs[0].shape
            if shape is None or isinstance(shape[0], int):
                # The exporter's last resort is a file for as many images as the example has, which it does not say.
                raise VitrailError(
                    f"cannot export {type(network).__name__} to ONNX: its forward fixes the number of images at the "
                    f"example's {example.shape[0]}; take it from x.shape[0], not from len(x) or int(), or choose "
                    "another model"
                )
            _simplify(program.model)
    except torch.onnx.OnnxExporterError as error:
        raise VitrailError(_explain(type(network).__name__, error)) from error
    return program.model_proto


def _simplify(model: onnx_ir.Model) -> None:
    """Fold constants, batch norm and padding, and drop what is not used, in place.

    The exporter's own optimiser tries some fifty rules on every node, twice: 40 % of an export's time, and the
    runtimes apply what it finds themselves.
    """
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    onnxscript.rewriter.RewritePass(FUSIONS)(model)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)


def _explain(name: str, error: Exception) -> str:
    """Say in one line what the exporter could not do."""
    text = str(error)
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text)
    if missing:
        return (
            f"cannot export {name} to ONNX: its operator {missing.group(1)} has no ONNX counterpart; "
            "write that step with other operators, or choose another model"
        )
    if "data-dependent" in text:
        return (
            f"cannot export {name} to ONNX: it branches on the values of its input, and a file holds one path; "
            "use torch.where in place of if, or choose another model"
        )
    summary = text.split("## Exception summary")[-1].strip().splitlines()
    reason = " ".join((summary[0] if summary else text).split())[:200]
    return f"cannot export {name} to ONNX: {reason}; choose another model, or report this"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress lines and advice to developers off the user's terminal."""
    before = logging.root.manager.disable
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
