"""The runtimes that may ship against eager PyTorch, and the share of the resize inside the file.

    python benchmarks/runtimes.py [--model tf_efficientnet_lite0] [--size 224] [--compile]

Weights are random unless the model's package is installed: only speed is looked at. Figures are ratios to eager fp32 in
one run, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import skimage.data
import torch
from PIL import Image

from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import export_onnx
from vitrail.deploy.graph import network_from
from vitrail.deploy.interface import IMAGE, PIXELS, PROBABILITIES
from vitrail.deploy.runtime import open_session
from vitrail.deploy.tournament import tournament
from vitrail.models import create_model, load_pretrained
from vitrail.training.recipe import DeployConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well: minutes")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = create_model(options.model, num_classes=1000, img_size=options.size).eval()
    load_pretrained(model, options.model, "auto")
    preprocess = Preprocess((options.size, options.size), crop_pct=0.875, interpolation="bicubic")
    photo = Image.fromarray(skimage.data.chelsea()).resize((500, 375))
    pixels = np.stack([preprocess(photo.rotate(angle)) for angle in range(0, 320, 10)])
    with torch.inference_mode():
        targets = model(torch.from_numpy(preprocess.normalise(pixels))).argmax(1).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export_onnx(model, preprocess, path, classes=[str(number) for number in range(1000)])
        result = tournament(
            model,
            preprocess,
            folder,
            onnx_path=path,
            calibration=lambda: iter([pixels[:16], pixels[16:]]),
            validation=lambda: iter([(pixels[:16], targets[:16]), (pixels[16:], targets[16:])]),
            config=DeployConfig(compile=options.compile, max_drop=1.0),
        )
        whole, network = open_session(path), open_session(network_from(onnx.load(path), PIXELS).SerializeToString())
        image, ready = {IMAGE: np.asarray(photo)[None]}, {PIXELS: np.moveaxis(pixels[:1], -1, 1).astype(np.float32)}
        pairs = [(_timed(whole, image), _timed(network, ready)) for _ in range(30)]
    eager = result["eager"]
    print(f"{options.model} at {options.size}, {result.threads} threads; speed against eager fp32")
    for entry in result.entries:
        if entry.latency_ms and entry.latency_ms_16 and eager.latency_ms and eager.latency_ms_16:
            one, many = eager.latency_ms / entry.latency_ms, eager.latency_ms_16 / entry.latency_ms_16
            print(f"{entry.name:20} {entry.precision}  batch 1: {one:5.2f}x   batch 16: {many:5.2f}x   {entry.status}")
        else:
            print(f"{entry.name:20} {entry.status}: {entry.reason}")
    both, alone = (statistics.median(values) for values in zip(*pairs))
    print(f"from a 500 x 375 image on, the file takes {both / alone:.2f} times as long as its network alone")


def _timed(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    """Return milliseconds of one call, after one to settle."""
    session.run([PROBABILITIES], feeds)
    started = time.perf_counter()
    session.run([PROBABILITIES], feeds)
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
