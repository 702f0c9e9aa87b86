"""A model with selective scans as ONNX: a scan as one operator against its steps written out, and eager PyTorch.

    python benchmarks/scan_export.py [--model mambavision_t] [--size 224] [--rounds 15]

One thread, batch 1, random weights. Times are of the processor, medians of interleaved rounds; ratios to eager PyTorch,
which takes the form of the scan that ``scan_form`` names.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch

from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import export_onnx
from vitrail.deploy.graph import network_from
from vitrail.deploy.interface import INPUT, LOGITS
from vitrail.models import create_model

TRANSLATIONS = "vitrail.deploy.export.scans_as_operators"


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def open_network(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(network_from(onnx.load(path), INPUT).SerializeToString(), options)


def answer(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    logits: np.ndarray = session.run([LOGITS], {INPUT: images})[0]
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mambavision_t")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_model(options.model, num_classes=10, img_size=options.size).eval()
    images = torch.randn(1, 3, options.size, options.size)
    preprocess, classes = Preprocess((options.size, options.size)), [str(number) for number in range(10)]

    @torch.inference_mode()
    def eager() -> np.ndarray:
        logits: np.ndarray = model(images).numpy()
        return logits

    runs: dict[str, Callable[[], np.ndarray]] = {"eager": eager}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export_onnx(create_model("small_resnet_nano", num_classes=10), Preprocess((28, 28)), path, classes=classes)
        for name in ("operator", "written out"):
            with contextlib.ExitStack() as stack:
                if name == "written out":
                    stack.enter_context(mock.patch(TRANSLATIONS, lambda: contextlib.nullcontext({})))
                spent = seconds(lambda: export_onnx(model, preprocess, path, classes=classes))
            kinds = [node.op_type for node in onnx.load(path).graph.node]
            runs[name] = partial(answer, open_network(path), images.numpy())
            error = np.abs(runs[name]() - eager()).max()
            what = f"{len(kinds)} nodes, {kinds.count('Scan')} of them Scan"
            print(f"{name:12} export {spent:6.1f} s, {what}; off by {error:.1e}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:12} {1e3 * median:8.1f} ms  {medians['eager'] / median:5.2f}x the speed of eager PyTorch")


if __name__ == "__main__":
    main()
