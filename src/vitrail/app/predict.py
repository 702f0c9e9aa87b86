"""``vitrail predict``: the exported model, without torch unless pictures of what it looked at are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vitrail.deploy.runtime import Prediction, Predictor
from vitrail.errors import InputError
from vitrail.runs import RunFolder


def predict_command(run: Path, images: Sequence[Path], *, top: int, as_json: bool, explain: Path | None) -> int:
    """Print a line per image as it is done; return the exit code: 0, or 1 when an image could not be read."""
    missing = [image for image in images if not image.exists()]
    if missing:
        raise InputError(f"cannot find {missing[0]}: give image files or folders of images")
    pictures = _Pictures(run, explain) if explain is not None else None
    failed = count = 0
    for prediction in Predictor(run).predict(images, top=top):
        count += 1
        failed += prediction.error is not None
        print(json.dumps(prediction.to_dict()) if as_json else describe(prediction), flush=True)  # noqa: T201
        if pictures is not None and prediction.error is None:
            pictures.draw(Path(prediction.path), prediction.classes[0])
    if not count:
        raise InputError(f"there are no images in {', '.join(map(str, images))}")
    return 1 if failed else 0


def describe(prediction: Prediction) -> str:
    """Return one line: the path, and classes with their probabilities or what is wrong."""
    if prediction.error is not None:
        return f"{prediction.path}: cannot be read: {prediction.error}"
    pairs = zip(prediction.classes, prediction.probabilities)
    return f"{prediction.path}: " + ", ".join(f"{name} {value:.1%}" for name, value in pairs)


class _Pictures:
    """Writes Grad-CAM pictures into a folder, numbered in the order of the images."""

    def __init__(self, run: Path, folder: Path) -> None:
        from vitrail.app.artefact import Artefact, load

        self.model = load(run)
        self.artefact = Artefact.read(RunFolder(run))
        self.folder = folder
        self.count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def draw(self, path: Path, name: str) -> None:
        import torch

        from vitrail.data.decode import decode
        from vitrail.evaluate.explain import grad_cam, overlay

        preprocess = self.artefact.preprocess
        pixels = preprocess(decode(path.read_bytes(), background=preprocess.background))
        inputs = torch.from_numpy(preprocess.normalise(pixels))[None]
        cam = grad_cam(self.model, inputs, self.artefact.classes.index(name))
        self.count += 1
        overlay(pixels, cam).save(self.folder / f"{self.count:04}-{path.stem}.png")
