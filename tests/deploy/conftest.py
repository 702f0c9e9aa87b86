from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import nn

from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import export_onnx
from vitrail.models import create_model

CLASSES = ("ant", "bee", "cat", "dog", "élan")


@dataclass(frozen=True)
class Exported:
    model: nn.Module
    preprocess: Preprocess
    path: Path

    def pixels(self, count: int, seed: int = 0) -> np.ndarray:
        """Crops of photographs, as the model sees them: uint8 (N, h, w, 3)."""
        rng = np.random.default_rng(seed)
        photos = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee")]
        crops = []
        for index in range(count):
            photo = photos[index % len(photos)]
            side = int(rng.integers(40, 200))
            left, top = (int(rng.integers(0, limit - side)) for limit in photo.size)
            crops.append(self.preprocess(photo.crop((left, top, left + side, top + side))))
        return np.stack(crops)

    def answers(self, pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.from_numpy(self.preprocess.normalise(pixels))).argmax(1).numpy()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A small network whose answers differ between photographs, and its file."""
    torch.manual_seed(0)
    model = create_model("small_resnet_nano", num_classes=len(CLASSES))
    preprocess = Preprocess((32, 32), crop_pct=0.875, interpolation="bicubic")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # the last of each block starts at zero
            nn.init.uniform_(module.weight, 0.5, 1.5)
    result = Exported(model.eval(), preprocess, tmp_path_factory.mktemp("exported") / "model.onnx")
    with torch.no_grad():  # centre and spread the logits, so that the classes share the photographs
        logits = model(torch.from_numpy(preprocess.normalise(result.pixels(64))))
        model.fc.weight.div_(logits.std(0)[:, None] / 2)
        model.fc.bias.copy_((model.fc.bias - logits.mean(0)) / (logits.std(0) / 2))
    export_onnx(model, preprocess, result.path, classes=CLASSES)
    return result
