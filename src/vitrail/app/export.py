"""``vitrail export``: the ONNX file of a run's weights, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from vitrail.app.artefact import Artefact, load
from vitrail.deploy.export import check_parity, export_onnx
from vitrail.runs import RunFolder


def export_run(run: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Write the ONNX file and compare it with the torch module; return path, bytes, opset and the differences.

    Raises:
        RunError: not a finished run folder, or a damaged one.
    """
    folder = RunFolder(run)
    model, artefact = load(folder.path), Artefact.read(folder)
    preprocess = artefact.preprocess
    path = Path(out) if out is not None else folder.onnx
    written = export_onnx(
        model,
        preprocess,
        path,
        classes=artefact.classes,
        temperature=artefact.temperature,
        multilabel=artefact.multilabel,
    )
    # The run's images may be gone: smooth random pictures of several sizes exercise resize, crop and network.
    rng = np.random.default_rng(0)
    height, width = preprocess.size
    sizes = [(width, height), (2 * width + 3, height + 1), (width // 2 + 1, height)]
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(size) for size in sizes]
    parity = check_parity(model, preprocess, path, images)
    return {"path": str(path), "bytes": written.bytes, "opset": written.opset, **parity.to_dict()}


def export_command(run: Path, out: Path | None) -> None:
    """Export and print what was written."""
    done = export_run(run, out)
    Console(highlight=False).print(
        f"{done['path']}: {done['bytes'] / 1e6:.1f} MB, opset {done['opset']}, "
        f"differs from PyTorch by {done['max_abs_diff']:.1e} in the logits, same answer for {done['agreement']:.0%}"
    )
