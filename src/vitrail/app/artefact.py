"""What ships besides the weights: everything needed to rebuild a run's model and its inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import nn

from vitrail.data.preprocess import Preprocess
from vitrail.edits.surgery import apply_edits
from vitrail.errors import RunError
from vitrail.models import create_model
from vitrail.models.pretrained import read_weights
from vitrail.runs import RunFolder, atomic_path, read_json, write_json
from vitrail.training.recipe import EditConfig


@dataclass(frozen=True)
class Artefact:
    """The contents of ``artefact.json``."""

    model: str
    options: dict[str, Any]
    """Keyword arguments of ``create_model`` besides the name."""
    edits: list[dict[str, Any]]
    classes: list[str]
    multilabel: bool
    preprocess: Preprocess
    temperature: float = 1.0
    """Logits are divided by it before the softmax or sigmoid."""
    pretrained: str = ""
    runtime: str = ""
    """Name of the runtime that won the tournament."""
    version: str = field(default="")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, run: RunFolder) -> Self:
        """Read a run's artefact.

        Raises:
            RunError: the folder holds no finished run, or the file is damaged.
        """
        if not run.path.is_dir():
            raise RunError(f"{run.path} is not a folder: give the run folder of `vitrail fit`")
        values = read_json(run.artefact)
        try:
            return cls(**{**values, "preprocess": Preprocess.from_dict(values["preprocess"])})
        except (TypeError, KeyError) as error:
            raise RunError(f"{run.artefact} is damaged ({error}): run the same fit command again") from None


def save(run: RunFolder, model: nn.Module, artefact: Artefact) -> None:
    """Write ``model.safetensors`` and ``artefact.json``."""
    # safetensors refuses tied and channels-last tensors: clone each in plain layout.
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    with atomic_path(run.weights) as temporary:
        save_file(state, temporary)
    write_json(run.artefact, artefact.to_dict())


def load(path: str | Path) -> nn.Module:
    """Rebuild the model of a run folder, in evaluation mode.

    The module returns logits (B, C) for normalised floats (B, 3, H, W) and carries ``classes`` (names in the order of
    the logits), ``preprocess`` (makes the input from an image), ``temperature`` and ``multilabel``.

    Raises:
        RunError: not a finished run folder, or a damaged one.

    Example:
        >>> model = vitrail.load("runs/a")                                            # doctest: +SKIP
        >>> pixels = model.preprocess(PIL.Image.open("cat.jpg").convert("RGB"))       # doctest: +SKIP
        >>> logits = model(torch.from_numpy(model.preprocess.normalise(pixels))[None])  # doctest: +SKIP
    """
    run = RunFolder(path)
    artefact = Artefact.read(run)
    edits = [EditConfig(**edit) for edit in artefact.edits]
    model = apply_edits(create_model(artefact.model, **artefact.options), edits)
    try:
        model.load_state_dict(read_weights(run.weights), strict=True)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"{run.weights} does not fit its artefact.json: {str(error).splitlines()[0]}") from None
    model.eval().requires_grad_(False)
    for name in ("classes", "preprocess", "temperature", "multilabel"):
        setattr(model, name, getattr(artefact, name))
    return model
