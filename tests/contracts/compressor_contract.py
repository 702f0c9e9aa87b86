"""What every compressor promises: a model within the budget, the given one untouched, a report of plain values."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from contract import leaves_alone, no_default_can_be_changed, slow
from probes import CLASSES, batch_does_not_matter, gap, half_frozen, images, labels, unchanged, unsettled
from torch import Tensor, nn

from vitrail.app.build import count_flops
from vitrail.compress.compressor import Budget, Compressed
from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import export_onnx
from vitrail.models import create_model

SIDE = 16
HOST = "small_resnet_nano"


@dataclass(frozen=True)
class Compressor:
    """A compressor by its function.

    Attributes:
        bounds: of the budget; bytes, flops and bitops (at 32 x 32 bits) as shares of what the host takes.
    """

    name: str
    compress: Callable[..., Compressed]
    host: str = HOST
    options: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=lambda: {"bytes": 0.5})
    traits: frozenset[str] = field(default_factory=frozenset)

    def model(self) -> Any:
        torch.manual_seed(0)
        narrow = {"channels": (8, 8, 16, 16)} if self.host == HOST else {}
        return unsettled(create_model(self.host, num_classes=CLASSES, img_size=SIDE, **narrow)).eval()

    def budget(self) -> Budget:
        model = self.model()
        flops = count_flops(model, (SIDE, SIDE))
        stored = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        whole = {"bytes": stored, "flops": flops, "bitops": 32 * 32 * flops}
        return Budget(**{name: share * whole.get(name, 1) for name, share in self.bounds.items()})

    @cached_property
    def made(self) -> Compressed:
        """What a run made of the host; not to be changed."""
        return self.run()

    def run(self, model: nn.Module | None = None, data: Any = None) -> Compressed:
        torch.manual_seed(0)
        model = self.model() if model is None else model
        return self.compress(model, data or _calibration, self.budget(), **copy.deepcopy(self.options))


def _calibration() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two batches of images that hold some structure."""
    for number in range(2):
        yield images(8, SIDE, seed=number).cumsum(-1) / 3, labels(8)


def the_given_model_is_left_alone(subject: Compressor) -> None:
    model = half_frozen(subject.model())
    with unchanged(model):
        made = subject.run(model)
    assert made.model is not model, "the compressed model is the given one"
    places = {value.data_ptr() for value in model.state_dict().values() if value.numel()}
    shared = [name for name, value in made.model.state_dict().items() if value.data_ptr() in places]
    assert not shared, f"the compressed model shares {shared[:3]} with the given one: a change of one changes both"


def its_report_is_json(subject: Compressor) -> None:
    model = subject.model()
    report = subject.made.report
    json.dumps(report, allow_nan=False)
    missing = {"bytes", "bytes_before", "layers"} - set(report)
    assert not missing, f"the report lacks {missing}"
    assert 0 < report["bytes"] <= report["bytes_before"], (
        f"{report['bytes']} bytes are reported after compression and {report['bytes_before']} before"
    )
    stored = sum(value.numel() * value.element_size() for value in model.parameters())
    assert 0.5 * stored <= report["bytes_before"] <= 1.5 * stored, (
        f"{report['bytes_before']} bytes before compression are reported, and the model's parameters take {stored}"
    )
    assert report["layers"], "the report says nothing of any layer"
    modules = dict(model.named_modules())
    for layer in report["layers"]:
        name = layer.get("name")
        assert name in modules, f"the report names a layer {name!r} that the model does not have"
        assert len(layer) > 1, f"the report does not say what was decided for {name}"


def it_keeps_to_the_budget(subject: Compressor) -> None:
    budget, report = subject.budget(), subject.made.report
    for name in ("bytes", "flops", "bitops"):
        bound = getattr(budget, name)
        if bound is not None:
            assert name in report, f"the budget bounds {name}, and the report does not say them"
            assert report[name] <= bound, f"the budget is {bound:.0f} {name}, and {report[name]:.0f} are reported"


def its_model_works(subject: Compressor) -> None:
    model = subject.made.model
    x = images(4, SIDE)
    with torch.no_grad():
        logits = model.eval()(x)
    assert logits.shape == (4, CLASSES), f"the compressed model's output has the shape {tuple(logits.shape)}"
    assert logits.isfinite().all(), "the compressed model's output is not finite"
    batch_does_not_matter(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert gap(twin(x), logits) == 0, "a copy of the compressed model gives other logits"


def it_gives_the_same_twice(subject: Compressor) -> None:
    first, second = subject.made, subject.run()
    assert first.report == second.report, "two runs with one seed give two reports"
    with torch.no_grad():
        one, other = (made.model.eval()(images(4, SIDE)) for made in (first, second))
    assert gap(other, one) == 0, "two runs with one seed give two models"


def the_images_are_left_alone(subject: Compressor) -> None:
    batches = list(_calibration())
    before = copy.deepcopy(batches)
    subject.run(data=lambda: iter(batches))
    for (x, target), (was, right) in zip(batches, before, strict=True):
        assert torch.equal(x, was) and torch.equal(target, right), "the calibration images were changed in place"


def options_and_defaults_are_left_alone(subject: Compressor) -> None:
    no_default_can_be_changed(subject.compress)
    options = copy.deepcopy(subject.options)
    leaves_alone(options, lambda: subject.compress(subject.model(), _calibration, subject.budget(), **options))


@slow
def its_model_exports(subject: Compressor) -> None:
    preprocess = Preprocess((SIDE, SIDE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with tempfile.TemporaryDirectory() as folder:
        names = [str(number) for number in range(CLASSES)]
        written = export_onnx(subject.made.model, preprocess, Path(folder) / "model.onnx", classes=names)
    assert written.bytes > 0
