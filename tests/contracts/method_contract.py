"""What every training objective promises: a mean over images, of which each parameter feels the gradient."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from contract import leaves_alone, needs, no_default_can_be_changed, unless
from probes import CLASSES, TOLERANCE, gap, gradients, images, labels, step, the_same_gradients, unreached, unsettled
from timm.layers import GroupNorm1
from torch import Tensor, nn

from vitrail.data.views import KINDS
from vitrail.errors import InputError
from vitrail.methods.method import Method as Base
from vitrail.models import create_model
from vitrail.training.optim import param_groups
from vitrail.training.recipe import OptimConfig

SIDE = 16
HOST = "small_resnet_nano"
NARROW = {"channels": (8, 8, 16, 16)}
IMAGES = 8
PARTS = (slice(0, 5), slice(5, 8))
"""Shares of two processes."""


@dataclass(frozen=True)
class Method:
    """A method by its class."""

    name: str
    kind: type[Base]
    host: str = HOST
    host_options: dict[str, Any] = field(default_factory=dict)
    teacher_host: str = HOST
    options: dict[str, Any] = field(default_factory=dict)
    traits: frozenset[str] = field(default_factory=frozenset)

    def model(self, seed: int = 0) -> nn.Module:
        """Return what is trained: without statistics over the batch, in which images do not depend on each other."""
        torch.manual_seed(seed)
        narrow = {**NARROW, "norm_layer": GroupNorm1} if self.host == HOST else {}
        return unsettled(create_model(self.host, num_classes=CLASSES, img_size=SIDE, **narrow, **self.host_options))

    def teacher(self) -> nn.Module:
        """Return a random network with batch normalisation, in training mode: the worst that a user may hand over."""
        torch.manual_seed(9)
        narrow = NARROW if self.teacher_host == HOST else {}
        return unsettled(create_model(self.teacher_host, num_classes=CLASSES, **narrow)).train()

    def arguments(self) -> dict[str, Any]:
        """Return the facts of the data that the method asks for, as a run gives them, and its options."""
        facts = {"num_classes": CLASSES, "multilabel": "multilabel" in self.traits, "class_weights": None}
        takes = inspect.signature(self.kind).parameters
        given = {name: fact for name, fact in facts.items() if name in takes}
        if "teacher" in self.traits:
            given["teacher"] = self.teacher()
        return {**given, **copy.deepcopy(self.options)}

    def build(self, seed: int = 0) -> Base:
        model, arguments = self.model(seed), self.arguments()
        torch.manual_seed(seed)
        return self.kind(model, **arguments).train()

    def batch(self, part: slice = slice(None)) -> dict[str, Any]:
        views = {name: images(IMAGES, SIDE, seed=number)[part] for number, name in enumerate(self.kind.views)}
        target = labels(IMAGES)[part]
        if "multilabel" in self.traits:
            hot = torch.nn.functional.one_hot(target, CLASSES)
            target = (hot + hot.roll(1, 1)).float()
        return {**views, "target": target, "row": torch.arange(IMAGES)[part]}


def its_loss_is_a_finite_scalar(subject: Method) -> None:
    method = subject.build()
    terms = method.loss(subject.batch())
    assert "loss" in terms, f"the terms {list(terms)} lack 'loss'"
    for name, value in terms.items():
        assert isinstance(value, Tensor) and value.ndim == 0, f"the term {name} is no scalar tensor"
        assert value.isfinite(), f"the term {name} is {value.item()}"
    assert terms["loss"].requires_grad, "the loss has no gradient"
    torch.manual_seed(3)
    called = method(subject.batch())["loss"]
    torch.manual_seed(3)
    assert torch.equal(called, method.loss(subject.batch())["loss"]), "calling the method is not calling its loss"


def it_asks_for_views_that_exist(subject: Method) -> None:
    strange = set(subject.kind.views.values()) - set(KINDS)
    assert not strange, f"it asks for the views {strange}; there are {', '.join(KINDS)}"


def every_parameter_gets_a_gradient(subject: Method) -> None:
    method = subject.build()
    step(method, subject.batch())
    assert any(parameter.requires_grad for parameter in method.model.parameters()), "nothing of the model is trained"
    assert not unreached(method), f"no gradient reaches {unreached(method)}"


def its_loss_is_a_mean_over_images(subject: Method) -> None:
    whole, parts = subject.build(), subject.build()
    total = step(whole, subject.batch())["loss"]
    shares = [
        (part.stop - part.start) / IMAGES * step(parts, subject.batch(part), (part.stop - part.start) / IMAGES)["loss"]
        for part in PARTS
    ]
    assert gap(sum(shares), total) < TOLERANCE, (
        f"the loss of {IMAGES} images is {total.item():.4f}, and the average over two parts {sum(shares).item():.4f}"
    )
    the_same_gradients(gradients(parts), gradients(whole), "computed in two parts,")


@unless("multilabel")
def probabilities_serve_as_targets(subject: Method) -> None:
    hard = step(subject.build(), subject.batch())["loss"]
    soft_batch = subject.batch()
    soft_batch["target"] = torch.nn.functional.one_hot(soft_batch["target"], CLASSES).float()
    try:
        soft = step(subject.build(), soft_batch)["loss"]
    except InputError:  # refused with an explanation
        return
    assert gap(soft, hard) < TOLERANCE, "class numbers and the same classes as probabilities give different losses"


def options_and_defaults_are_left_alone(subject: Method) -> None:
    no_default_can_be_changed(subject.kind)
    arguments = subject.arguments()

    def use() -> None:
        method = subject.kind(subject.model(), **arguments)
        step(method, subject.batch())
        method.after_step()

    leaves_alone(arguments, use)


def the_batch_is_left_alone(subject: Method) -> None:
    batch = subject.batch()
    before = copy.deepcopy(batch)
    step(subject.build(), batch)
    assert list(batch) == list(before), f"the batch has the entries {list(batch)} after a step, and had {list(before)}"
    changed = [name for name, value in before.items() if not torch.equal(value, batch[name])]
    assert not changed, f"the loss changed {changed} of the batch in place"


def its_groups_hold_every_parameter_once(subject: Method) -> None:
    method = subject.build()
    own = {id(parameter): name for name, parameter in method.named_parameters()}
    claimed = [id(parameter) for group in method.param_groups() or () for parameter in _listed(group["params"])]
    assert len(claimed) == len(set(claimed)), "a parameter is in two of the method's groups"
    assert set(claimed) <= set(own), "the method's groups hold parameters that are not its own"
    held = [id(p) for group in param_groups(method, OptimConfig(lr=1e-3)) for p in group["params"]]
    trained = [key for key, parameter in zip(own, method.parameters()) if parameter.requires_grad]
    assert sorted(held) == sorted(trained), (
        f"the optimiser holds {len(held)} parameters, and {len(trained)} are to be trained"
    )


def _listed(parameters: Any) -> list[nn.Parameter]:
    return [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)


def a_few_steps_lower_the_loss(subject: Method) -> None:
    method, batch, steps = subject.build(), subject.batch(), 9
    optimizer = torch.optim.AdamW(param_groups(method, OptimConfig(lr=3e-3, weight_decay=0.0)), lr=3e-3, foreach=True)
    losses = []
    for number in range(steps):
        method.schedule(number / steps)
        optimizer.zero_grad(set_to_none=True)
        losses.append(step(method, batch)["loss"].item())
        optimizer.step()
        method.after_step()
    assert losses[-1] < 0.95 * losses[0], (
        f"{steps} steps on one batch took the loss from {losses[0]:.4f} to {losses[-1]:.4f}"
    )


def its_state_goes_round(subject: Method) -> None:
    one, other = subject.build(0), subject.build(1)
    one.after_step()
    other.load_state_dict(one.state_dict(), strict=True)
    first, second = (step(method, subject.batch())["loss"] for method in (one, other))
    assert gap(second, first) < TOLERANCE, (
        "a method that loaded the state of another gives another loss: some of its state is not in state_dict"
    )


def its_hooks_can_be_called_at_any_time(subject: Method) -> None:
    method = subject.build()
    before = copy.deepcopy(method.model.state_dict())
    for progress in (0.0, 0.5, 1.0):
        method.schedule(progress)
        assert step(method, subject.batch())["loss"].isfinite(), f"at progress {progress} the loss is not finite"
        method.after_step()
    changed = [name for name, value in method.model.state_dict().items() if not torch.equal(value, before[name])]
    assert not changed, f"without an optimiser's step, {changed[:3]} of the model changed"


def bf16_autocast_runs(subject: Method) -> None:
    exact = step(subject.build(), subject.batch())["loss"]
    method = subject.build()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        loss = method(subject.batch())["loss"]
    loss.backward()
    assert loss.dtype == torch.float32, f"under bf16 autocast the loss is of {loss.dtype}: compute it in float32"
    assert gap(loss, exact) < 0.1, f"under bf16 autocast the loss is {loss.item():.4f} in place of {exact.item():.4f}"
    assert not unreached(method), f"under bf16 autocast no finite gradient reaches {unreached(method)}"


@needs("teacher")
def its_teacher_is_left_alone(subject: Method) -> None:
    model, arguments = subject.model(), subject.arguments()
    teacher = arguments["teacher"]
    weights = copy.deepcopy(teacher.state_dict())
    method = subject.kind(model, **arguments).train()
    trained = {id(p) for group in param_groups(method, OptimConfig(lr=1e-3)) for p in group["params"]}
    assert not any(id(parameter) in trained for parameter in teacher.parameters()), "the optimiser holds the teacher"
    for number in range(2):
        step(method, subject.batch())
        method.schedule(number / 2)
        method.after_step()
    assert all(parameter.grad is None for parameter in teacher.parameters()), "the teacher gets gradients"
    changed = [name for name, value in teacher.state_dict().items() if not torch.equal(value, weights[name])]
    assert not changed, f"the teacher was changed: {changed[:3]} (is it in evaluation mode after method.train()?)"
