"""What every edit promises: it changes the model that it is given, in place, and nothing else."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contract import costly, leaves_alone, no_default_can_be_changed
from probes import (
    CLASSES,
    TOLERANCE,
    autocast_agrees,
    batch_does_not_matter,
    cross_entropy_step,
    file_agrees,
    gap,
    images,
    unreached,
    unsettled,
)
from timm.models import model_entrypoint
from torch import Tensor, nn

import vitrail
from vitrail.app.artefact import Artefact, save
from vitrail.app.build import build_model, model_options
from vitrail.data.preprocess import Preprocess
from vitrail.edits.surgery import replace_modules
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.runs import RunFolder
from vitrail.training.recipe import EditConfig, ModelConfig

SIDE = 32


@dataclass(frozen=True)
class Edit:
    """An edit by its function, ``make(**options)``, and the path by which a recipe names it."""

    name: str
    path: str
    make: Callable[..., Callable[[nn.Module], nn.Module]]
    host: str = "small_resnet_nano"
    options: dict[str, Any] = field(default_factory=dict)
    traits: frozenset[str] = field(default_factory=frozenset)

    @property
    def modules(self) -> list[str]:
        """What defines it and its host."""
        return [str(self.make.__module__), str(model_entrypoint(self.host).__module__)]

    def plain(self, seed: int = 0) -> Any:
        """Return the host."""
        torch.manual_seed(seed)
        return create_model(self.host, num_classes=CLASSES, img_size=SIDE)

    def edit(self, model: nn.Module) -> nn.Module:
        return self.make(**copy.deepcopy(self.options))(model)

    def build(self, seed: int = 0) -> Any:
        """Return the edited host."""
        model = self.plain(seed)
        self.edit(model)
        return model

    def images(self, batch: int = 4) -> Tensor:
        return images(batch, SIDE)


def it_returns_the_same_model_changed(subject: Edit) -> None:
    model = subject.plain()
    before = repr(model), list(model.state_dict())
    unedited = unsettled(copy.deepcopy(model)).eval()
    assert subject.edit(model) is model, "the edit returns another model than it was given"
    with torch.no_grad():
        same = (repr(model), list(model.state_dict())) == before
        assert not same or gap(unsettled(model).eval()(subject.images()), unedited(subject.images())) > TOLERANCE, (
            "the edit changed nothing about the model"
        )


def it_keeps_the_shape_of_the_output(subject: Edit) -> None:
    model = subject.build().eval()
    for side in (SIDE, SIDE + 16):
        if side == SIDE or not model.pretrained_cfg.get("fixed_input_size"):
            assert model(images(2, side)).shape == (2, CLASSES), "the edited model's output has another shape"


def it_takes_over_mode_and_device(subject: Edit) -> None:
    model = subject.plain().eval().to("meta")
    subject.edit(model)
    training = [name for name, module in model.named_modules() if module.training]
    assert not training, f"in a model in evaluation mode, the edit puts {training[:3]} in training mode"
    away = [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]
    assert not away, f"the edit makes {away[:3]} on another device than the model's"


def every_parameter_gets_a_gradient(subject: Edit) -> None:
    model = unsettled(subject.build()).train()
    cross_entropy_step(model, subject.images(8))
    assert not unreached(model), f"no gradient reaches {unreached(model)}"


def a_model_without_a_match_is_refused(subject: Edit) -> None:
    stranger = nn.Sequential(nn.Flatten(), nn.Softsign())
    try:
        subject.edit(stranger)
    except InputError as error:
        message = str(error)
    else:
        raise AssertionError("a model in which it finds nothing to edit passes in silence")
    assert "Softsign" in message, f"the message does not list what the model has: {message}"
    assert "\n" not in message, "the message has several lines"


def options_and_defaults_are_left_alone(subject: Edit) -> None:
    no_default_can_be_changed(subject.make)
    options = copy.deepcopy(subject.options)
    leaves_alone(options, lambda: subject.make(**options)(subject.plain()))


def one_edit_serves_several_models(subject: Edit) -> None:
    edit = subject.make(**copy.deepcopy(subject.options))
    first, second = edit(subject.plain()), edit(subject.plain())
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not shared, "two models that were edited by one edit share parameters"
    assert list(first.state_dict()) == list(second.state_dict()), "the same edit makes two different models"


def it_composes(subject: Edit) -> None:
    def other(model: nn.Module) -> nn.Module:
        return replace_modules(
            model, lambda _, m: isinstance(m, nn.Linear), lambda m: nn.Sequential(m, nn.Identity()), what="linear layer"
        )

    def again(model: nn.Module) -> nn.Module:
        try:
            return subject.edit(model)
        except InputError:  # nothing was left to edit, and the edit said so
            return model

    for first, second in ((subject.edit, other), (other, subject.edit), (subject.edit, again)):
        model = second(first(subject.plain()))
        cross_entropy_step(unsettled(model).train(), subject.images(8))
        assert not unreached(model), f"after two edits no gradient reaches {unreached(model)}"


@torch.no_grad()
def it_survives_saving_and_loading(subject: Edit) -> None:
    config = ModelConfig(
        name=subject.host,
        img_size=SIDE,
        pretrained="none",
        edits=[EditConfig(name=subject.path, options=copy.deepcopy(subject.options))],
    )
    model = unsettled(build_model(config, CLASSES)).eval()
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        artefact = Artefact(
            model=config.name,
            options=model_options(config, CLASSES),
            edits=[edit.model_dump() for edit in config.edits],
            classes=[str(number) for number in range(CLASSES)],
            multilabel=False,
            preprocess=Preprocess((SIDE, SIDE)),
        )
        save(run, model, artefact)
        loaded = vitrail.load(run)
    assert gap(loaded(subject.images()), model(subject.images())) < TOLERANCE, "the model that was loaded differs"


@torch.no_grad()
def its_state_goes_round(subject: Edit) -> None:
    one, other = (unsettled(subject.build(seed)).eval() for seed in (0, 1))
    other.load_state_dict(one.state_dict(), strict=True)
    assert gap(other(subject.images()), one(subject.images())) < TOLERANCE, (
        "a model that loaded the state of another gives other logits: some of its state is not in state_dict"
    )


def evaluation_does_not_depend_on_the_batch(subject: Edit) -> None:
    batch_does_not_matter(unsettled(subject.build()), subject.images())


def bf16_autocast_runs(subject: Edit) -> None:
    autocast_agrees(unsettled(subject.build()), subject.images(8))


@costly
def its_onnx_file_agrees(subject: Edit) -> None:
    file_agrees(unsettled(subject.build()), SIDE)
