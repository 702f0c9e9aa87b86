"""What the seeded small models gave when they were last looked at: a change of what they compute does not go unnoticed.

A new model, or a change that is meant, is recorded by

    python tests/contracts/golden.py NAME ...      # no name: all of the catalogue
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from probes import gap, unsettled
from torch import nn

FOLDER = Path(__file__).with_name("golden")
TOLERANCE = 2e-3
"""Of the largest logit: generous to the order of sums, far below any change of formula."""


def figures(build: Callable[[], nn.Module], side: int) -> dict[str, Any]:
    """Return what is recorded of a model: its size, and the logits of two waves before and after a little noise."""
    model = build().eval()
    places = torch.arange(2 * 3 * side * side, dtype=torch.float32).view(2, 3, side, side)
    waves = (places * 0.37).sin() + (places / side * 0.61).cos()
    with torch.no_grad():
        start = model(waves)
        # What starts at zero hides what is behind it.
        moved = unsettled(model)(waves)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "start": [[float(f"{value:.6g}") for value in row] for row in start.tolist()],
        "moved": [[float(f"{value:.6g}") for value in row] for row in moved.tolist()],
    }


def compare(name: str, found: dict[str, Any]) -> None:
    """Raise unless the figures are those that are recorded."""
    file = FOLDER / f"{name}.json"
    command = f"run  python tests/contracts/golden.py {name}"
    assert file.is_file(), f"nothing is recorded for {name}: {command}"
    recorded = json.loads(file.read_text(encoding="utf-8"))
    assert found["parameters"] == recorded["parameters"], (
        f"{name} has {found['parameters']} parameters and had {recorded['parameters']}; if that is meant, {command}"
    )
    for kind in ("start", "moved"):
        off = gap(torch.tensor(found[kind]), torch.tensor(recorded[kind]))
        assert off < TOLERANCE, (
            f"the logits of {name} ({kind}) are {off:.2g} off those recorded; if that is meant, {command}"
        )


def record(name: str, found: dict[str, Any]) -> Path:
    """Write the figures of a model."""
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    from subjects import models

    wanted = set(sys.argv[1:])
    for _, subject in models():
        if not wanted or subject.name in wanted:
            print(record(subject.name, figures(subject.build, subject.side)))
