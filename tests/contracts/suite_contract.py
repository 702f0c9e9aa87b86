"""What every evaluation suite promises: rows of plain values, and a model that is afterwards what it was before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from contract import leaves_alone, no_default_can_be_changed
from probes import CLASSES, half_frozen, images, labels, unchanged, unsettled
from torch import Tensor

from vitrail.evaluate.suite import Result
from vitrail.models import create_model

SIDE = 16
HOST = "small_resnet_nano"


@dataclass(frozen=True)
class Suite:
    """A suite by its function."""

    name: str
    run: Callable[..., Result]
    host: str = HOST
    options: dict[str, Any] = field(default_factory=dict)
    traits: frozenset[str] = field(default_factory=frozenset)

    def model(self) -> Any:
        torch.manual_seed(0)
        narrow = {"channels": (8, 8, 16, 16)} if self.host == HOST else {}
        return unsettled(create_model(self.host, num_classes=CLASSES, img_size=SIDE, **narrow)).eval()

    @cached_property
    def found(self) -> Result:
        """What a run found; not to be changed."""
        return self.result()

    def result(self, model: Any = None, data: Any = None) -> Result:
        torch.manual_seed(0)
        model = self.model() if model is None else model
        return self.run(model, data or _held_out, **copy.deepcopy(self.options))


def _held_out() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two batches."""
    for number in range(2):
        yield images(8, SIDE, seed=number), labels(8)


def the_model_is_restored(subject: Suite) -> None:
    model = half_frozen(subject.model())
    with unchanged(model):
        subject.result(model)


def its_rows_are_plain_and_alike(subject: Suite) -> None:
    result = subject.found
    assert result.title and "\n" not in result.title, "the result has no title of one line"
    assert result.table, "the table has no rows"
    keys = list(result.table[0])
    for row in result.table:
        assert list(row) == keys, f"the rows have different keys: {keys} and {list(row)}"
    json.dumps(result.to_dict(), allow_nan=False)


def its_figures_are_svg(subject: Suite) -> None:
    for name, figure in subject.found.figures.items():
        assert "<svg" in figure and "</svg>" in figure, f"the figure {name} is no SVG"
        assert "http" not in figure.replace("http://www.w3.org/", ""), f"the figure {name} needs what is elsewhere"


def it_finds_the_same_twice(subject: Suite) -> None:
    assert subject.result().table == subject.found.table, "two runs on one model and the same images differ"


def the_images_are_left_alone(subject: Suite) -> None:
    batches = list(_held_out())
    before = copy.deepcopy(batches)
    subject.result(data=lambda: iter(batches))
    for (x, target), (was, right) in zip(batches, before, strict=True):
        assert torch.equal(x, was) and torch.equal(target, right), "the images were changed in place"


def options_and_defaults_are_left_alone(subject: Suite) -> None:
    no_default_can_be_changed(subject.run)
    options = copy.deepcopy(subject.options)
    leaves_alone(options, lambda: subject.run(subject.model(), _held_out, **options))
