"""Prediction with an exported model: numpy, Pillow and ONNX Runtime, no torch.

Importing torch takes longer than a small model needs for a thousand images.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import onnxruntime
from PIL import Image

from vitrail.data.decode import IMAGE_EXTENSIONS, UnreadableImage, decode
from vitrail.deploy.interface import IMAGE, LOGITS, PIXELS, PROBABILITIES, Interface
from vitrail.errors import InputError, RunError, require, unknown
from vitrail.runs import RunFolder, read_json

Answer = Callable[[np.ndarray], np.ndarray]
"""From uint8 images of one size (N, H, W, 3) to probabilities (N, C)."""

# Decoded images are collected into batches; this bounds what they take together (3 bytes a pixel).
WINDOW_PIXELS = 32_000_000

# The runtimes that can ship: the file each one reads.
RUNTIMES = {
    "onnxruntime": "model.onnx",
    "onnxruntime-int8": "model.int8.onnx",
    "openvino": "model.onnx",
    "openvino-int8": "model.int8.onnx",
}


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: classes and their probabilities, most probable first; or ``error``."""

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        return {
            "path": self.path,
            "predictions": [
                {"class": name, "probability": value} for name, value in zip(self.classes, self.probabilities)
            ],
        }


class Predictor:
    """An exported model, ready to answer.

    Args:
        path: a run folder of ``vitrail fit``, or an ``.onnx`` file that ``vitrail.deploy.export`` wrote.
        prefer: of a run folder, ``"winner"`` takes the runtime that won the run's tournament (``model.onnx`` in ONNX
            Runtime if the winner is not installed here), ``"onnx"`` and ``"int8"`` that file in ONNX Runtime.

    Attributes:
        classes: names, in the order of the model's outputs.
        preprocess: how an image becomes the model's input.
        multilabel: whether an image may have several classes.
        runtime: the runtime in use, a name of ``RUNTIMES``.

    Raises:
        RunError: the folder or the file is missing or damaged.

    Example:
        >>> for prediction in Predictor("runs/a").predict(["cat.jpg"]):  # doctest: +SKIP
        ...     print(prediction.path, prediction.classes[0], prediction.probabilities[0])
    """

    def __init__(self, path: str | Path, *, prefer: Literal["winner", "onnx", "int8"] = "winner") -> None:
        file, self.runtime = _choose(Path(path), prefer)
        self._answer, interface = (_openvino if self.runtime.startswith("openvino") else _onnxruntime)(file)
        self.classes = interface.classes
        self.preprocess = interface.preprocess
        self.multilabel = interface.multilabel

    def predict(
        self, images: Iterable[str | Path | Image.Image | np.ndarray], *, top: int = 5, batch_size: int = 16
    ) -> Iterator[Prediction]:
        """Yield one prediction per image, in order, as they are done.

        A path that cannot be read yields its error and stops nothing. Of several images of one size up to
        ``batch_size`` are computed together.

        Args:
            images: files, folders (searched in sorted order, hidden ones skipped), Pillow images, or uint8 arrays
                (H, W), (H, W, 3) or (H, W, 4).
            top: most probable classes to give; a multi-label model gives all above 0.5 if they are more.
            batch_size: images computed together, at most.

        Raises:
            InputError: ``top`` or ``batch_size`` below 1.
        """
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            images = [images]
        return self._stream(images, top, batch_size)

    def _stream(
        self, images: Iterable[str | Path | Image.Image | np.ndarray], top: int, batch_size: int
    ) -> Iterator[Prediction]:
        window: list[tuple[str, np.ndarray | str]] = []
        held = 0
        for name, image in _expand(images):
            pixels = image if isinstance(image, str) else self._decode(image)
            window.append((name, pixels))
            held += pixels.size // 3 if isinstance(pixels, np.ndarray) else 0
            if len(window) == batch_size or held >= WINDOW_PIXELS:
                yield from self._answers(window, top)
                window, held = [], 0
        yield from self._answers(window, top)

    def _decode(self, image: Path | Image.Image | np.ndarray) -> np.ndarray | str:
        """Return RGB pixels (H, W, 3), or what is wrong."""
        blob: bytes | np.ndarray
        try:
            if isinstance(image, Path):
                blob = image.read_bytes()
            elif isinstance(image, Image.Image):
                # Through RGBA, so that transparency in any form meets the background.
                blob = np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGBA"))
            else:
                blob = image
            return np.asarray(decode(blob, background=self.preprocess.background))
        except UnreadableImage as error:
            return error.reason
        except OSError as error:
            return error.strerror or "it cannot be opened"

    def _answers(self, window: list[tuple[str, np.ndarray | str]], top: int) -> Iterator[Prediction]:
        """Compute the images of a window, those of one size together."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index, (_, pixels) in enumerate(window):
            if isinstance(pixels, np.ndarray):
                sizes.setdefault(pixels.shape, []).append(index)
        done: dict[int, np.ndarray | str] = {}
        for indices in sizes.values():
            try:
                done.update(zip(indices, self._answer(np.stack([window[index][1] for index in indices]))))
            except Exception as error:  # noqa: BLE001 - the runtimes raise classes of their own, memory ends included
                reason = " ".join(str(error).split())[:160]
                done.update(dict.fromkeys(indices, f"the model failed on it ({reason})"))
        for index, (name, pixels) in enumerate(window):
            answer = pixels if isinstance(pixels, str) else done[index]
            yield Prediction(name, error=answer) if isinstance(answer, str) else self._name(name, answer, top)

    def _name(self, path: str, probabilities: np.ndarray, top: int) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")
        count = max(top, int((probabilities > 0.5).sum())) if self.multilabel else top
        chosen = order[:count]
        return Prediction(
            path,
            tuple(self.classes[index] for index in chosen),
            tuple(float(probabilities[index]) for index in chosen),
        )


def open_session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """Open an ONNX file, or its bytes, on all cores this process may use.

    Raises:
        RunError: the file is missing, damaged, or needs operators this version does not have.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    if allowed and allowed < (os.cpu_count() or 1):
        # By itself ONNX Runtime starts one thread for each physical core, those that are not ours included.
        options.intra_op_num_threads = allowed
    name = "the model" if isinstance(model, bytes) else str(model)
    if isinstance(model, Path) and not model.is_file():
        raise RunError(f"cannot find {name}: run `vitrail export` on its run folder, or the same fit command again")
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the runtime raises a class of its own for each kind of damage
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"cannot read {name} ({reason}): the file is damaged or newer than ONNX Runtime "
            f"{onnxruntime.__version__}; export it again"
        ) from None


def import_openvino() -> ModuleType:
    """Import OpenVINO without letting it report its use over the network.

    Raises:
        MissingExtra: it is not installed.
    """
    # Its import sends an event unless this package is absent; None makes it look absent.
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    return require("openvino", "openvino")


def openvino_precision() -> Literal["bf16", "f32"]:
    """Return the precision in which OpenVINO computes: bf16 where the processor has it, else fp32."""
    capabilities = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if "BF16" in capabilities else "f32"


def compile_openvino(model: Path) -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], dict[str, str]]:
    """Compile the part of an exported file behind its resize, in bf16 where the processor has it.

    Returns:
        A function from uint8 pixels (N, h, w, 3) of the model's size to its outputs by name, and the file's metadata.

    Raises:
        MissingExtra: OpenVINO is not installed.
    """
    openvino = import_openvino()
    import onnx
    from google.protobuf.message import DecodeError

    from vitrail.deploy import graph

    core = openvino.Core()
    # Behind the resize only: OpenVINO has no antialiased resize of ONNX, and bf16 would spoil grey levels.
    try:
        whole = onnx.load(model)
        part = graph.network_from(whole, PIXELS).SerializeToString()
    except (OSError, ValueError, DecodeError) as error:
        raise RunError(f"cannot read {model} ({' '.join(str(error).split())[:200]}): export it again") from None
    compiled = core.compile_model(
        core.read_model(io.BytesIO(part)),
        "CPU",
        {"INFERENCE_PRECISION_HINT": openvino_precision(), "PERFORMANCE_HINT": "LATENCY"},
    )

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        values = compiled(np.moveaxis(pixels, -1, 1).astype(np.float32, order="C"))
        return {name: values[name] for name in (LOGITS, PROBABILITIES)}

    return run, {entry.key: entry.value for entry in whole.metadata_props}


def _onnxruntime(file: Path) -> tuple[Answer, Interface]:
    session = open_session(file)
    interface = _interface(file, session.get_modelmeta().custom_metadata_map)
    return lambda images: session.run([PROBABILITIES], {IMAGE: images})[0], interface


def _openvino(file: Path) -> tuple[Answer, Interface]:
    # The images are prepared by ``Preprocess`` itself, which the file's own resize follows.
    network, metadata = compile_openvino(file)
    interface = _interface(file, metadata)

    def answer(images: np.ndarray) -> np.ndarray:
        pixels = np.stack([interface.preprocess(Image.fromarray(image)) for image in images])
        return network(pixels)[PROBABILITIES]

    return answer, interface


def _interface(file: Path, metadata: Mapping[str, str]) -> Interface:
    try:
        return Interface.from_metadata(metadata)
    except ValueError:
        raise RunError(
            f"{file} does not say its classes and preprocessing: give a model.onnx that `vitrail fit` or "
            "`vitrail export` wrote"
        ) from None


def _choose(path: Path, prefer: str) -> tuple[Path, str]:
    """Return the file to open and the name of its runtime."""
    names = {"onnx": "onnxruntime", "int8": "onnxruntime-int8"}
    if prefer != "winner" and prefer not in names:
        raise unknown("value of prefer", prefer, ["winner", *names])
    if path.is_file():
        return path, "onnxruntime"
    run = RunFolder(path)
    if not path.is_dir():
        raise RunError(f"cannot find {path}: give the run folder of `vitrail fit`, or an .onnx file it exported")
    if prefer == "winner":
        runtime = read_json(run.artefact).get("runtime") if run.artefact.is_file() else None
        runtime = runtime if runtime in RUNTIMES else "onnxruntime"
        if runtime.startswith("openvino") and not _installed("openvino"):
            runtime = "onnxruntime"
    else:
        runtime = names[prefer]
    file = run / RUNTIMES[runtime]
    if prefer == "int8" and not file.is_file():
        raise RunError(f"{path} has no {file.name}: INT8 was refused or not asked for in this run; use model.onnx")
    return file, runtime


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _expand(
    images: Iterable[str | Path | Image.Image | np.ndarray],
) -> Iterator[tuple[str, Path | Image.Image | np.ndarray | str]]:
    """Yield a name with a file, an image, or what is wrong; folders become the images in them."""
    for index, image in enumerate(images):
        if not isinstance(image, str | Path):
            yield str(getattr(image, "filename", "") or f"image {index}"), image
        elif Path(image).is_dir():
            yield from _walk(Path(image))
        else:
            yield str(image), Path(image)


def _walk(folder: Path) -> Iterator[tuple[str, Path | str]]:
    """Yield the images of a folder, at any depth, in sorted order."""
    found = False
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            if not name.startswith(".") and path.suffix.lower() in IMAGE_EXTENSIONS:
                found = True
                yield str(path), path
    if not found:
        yield str(folder), "the folder holds no images"
