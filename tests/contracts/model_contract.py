"""What every model promises: timm's surface, real declarations, sane beginnings, no surprises in training or export."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import golden
import torch
import torch.nn.functional as F
from contract import costly, needs, unless
from probes import (
    CLASSES,
    TOLERANCE,
    autocast_agrees,
    batch_does_not_matter,
    cross_entropy_step,
    file_agrees,
    gap,
    images,
    labels,
    unreached,
    unsettled,
)
from timm.models import group_parameters, model_entrypoint
from torch import Tensor, nn

NANO_PARAMETERS = 1_000_000


@dataclass(frozen=True)
class Model:
    """A model by the function that creates it: ``create(num_classes=..., **options)``."""

    name: str
    create: Callable[..., Any]
    traits: frozenset[str] = field(default_factory=frozenset)
    side: int = 32

    @property
    def modules(self) -> list[str]:
        """What defines it."""
        return [str(model_entrypoint(self.name).__module__)]

    def build(self, seed: int = 0, **options: Any) -> Any:
        torch.manual_seed(seed)
        return self.create(**{"num_classes": CLASSES, **options})

    def images(self, batch: int = 4, channels: int = 3) -> Tensor:
        return images(batch, self.side, channels)


# ---- the surface


def it_has_timms_surface(subject: Model) -> None:
    model, x = unsettled(subject.build()).eval(), subject.images()
    wanted = ["forward_features", "forward_head", "reset_classifier", "get_classifier", "set_grad_checkpointing"]
    for name in [*wanted, "group_matcher", "num_features", "num_classes", "feature_info"]:
        assert hasattr(model, name), f"it has no {name}"
    assert model.num_classes == CLASSES, f"num_classes is {model.num_classes} in place of {CLASSES}"
    features = model.forward_features(x)
    logits = model.forward_head(features)
    assert logits.shape == (len(x), CLASSES), f"the logits are of shape {tuple(logits.shape)}"
    assert gap(model(x), logits) < TOLERANCE, "forward is not forward_head after forward_features"
    before = model.forward_head(features, pre_logits=True)
    width = getattr(model, "head_hidden_size", model.num_features)
    assert before.shape == (len(x), width), f"pre_logits are of shape {tuple(before.shape)}, and the head takes {width}"


def the_classifier_can_be_replaced(subject: Model) -> None:
    model, x = subject.build().eval(), subject.images()
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for p in model.get_classifier().parameters()} <= own, "get_classifier gives what is not in the model"
    for classes in (CLASSES + 2, 1):
        model.reset_classifier(classes)
        assert model(x).shape == (len(x), classes), "reset_classifier does not set the number of outputs"
        assert model.num_classes == classes, "reset_classifier leaves num_classes as it was"
    width = getattr(model, "head_hidden_size", model.num_features)
    model.reset_classifier(0)
    for headless in (model, subject.build(num_classes=0).eval()):
        assert headless(x).shape == (len(x), width), "without classifier, it does not return its pooled features"
        assert headless.num_classes == 0, "num_classes is not 0 without classifier"
    if "global_pool" in inspect.signature(model.reset_classifier).parameters:
        model.reset_classifier(0, "")
        assert model(x).shape == model.forward_features(x).shape, "without pooling it does not return its features"
        model.reset_classifier(CLASSES, "avg")
        assert model(x).shape == (len(x), CLASSES), "pooling does not come back"


def reset_classifier_keeps_device_and_dtype(subject: Model) -> None:
    for place in (torch.float64, torch.bfloat16, torch.device("meta")):
        model = subject.build().to(place)
        model.reset_classifier(CLASSES + 1)
        kind = "device" if isinstance(place, torch.device) else "dtype"
        wrong = [name for name, parameter in model.named_parameters() if getattr(parameter, kind) != place]
        assert not wrong, f"reset_classifier of a model on {place} makes {wrong} with another {kind}"


@needs("dense")
def declared_features_are_real(subject: Model) -> None:
    features = subject.build(features_only=True).eval()
    height, width = 64, 96
    maps = features(images(2, (height, width)))
    channels, strides = features.feature_info.channels(), features.feature_info.reduction()
    assert len(maps) == len(channels), f"{len(maps)} features come, and {len(channels)} are declared"
    for number, (found, wide, stride) in enumerate(zip(maps, channels, strides)):
        size = (-(-height // stride), -(-width // stride))
        assert tuple(found.shape) == (2, wide, *size), (
            f"feature {number} is of shape {tuple(found.shape)}; declared are {wide} channels at stride {stride}"
        )
    model = subject.build()
    modules = dict(model.named_modules())
    absent = [info["module"] for info in model.feature_info if info["module"] not in modules]
    assert not absent, f"feature_info names modules that the model does not have: {absent}"
    last = subject.build(features_only=True, out_indices=(-1,)).eval()(images(2, (height, width)))
    assert len(last) == 1, "out_indices does not choose features"
    assert last[0].shape == maps[-1].shape, "out_indices = (-1,) is not the last feature"


def it_names_real_parameters(subject: Model) -> None:
    model = subject.build()
    names = [name for name, _ in model.named_parameters()]
    for pattern in getattr(model, "no_weight_decay", set)():
        assert fnmatch.filter(names, pattern), f"no_weight_decay names {pattern!r}, and there is no such parameter"
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}
    head = {name for name, parameter in model.named_parameters() if id(parameter) in classifier}
    for coarse in (False, True):
        matcher = model.group_matcher(coarse=coarse)
        for pattern in _patterns(matcher):
            assert any(re.match(pattern, name) for name in names), f"group_matcher's {pattern!r} matches no parameter"
        groups = group_parameters(model, matcher)
        grouped = [name for group in groups.values() for name in group]
        assert sorted(grouped) == sorted(names), "group_matcher does not put every parameter into one group"
        assert len(groups) > 2, f"group_matcher makes {len(groups)} groups: no layer decay is possible"
        assert head <= set(groups[max(groups)]), "group_matcher does not put the classifier into the last group"


def _patterns(matcher: dict[str, Any]) -> Iterator[str]:
    for value in matcher.values():
        for entry in [value] if isinstance(value, str) else value:
            yield entry if isinstance(entry, str) else entry[0]


@needs("nano")
def a_nano_is_small(subject: Model) -> None:
    count = sum(parameter.numel() for parameter in subject.build().parameters())
    assert count <= NANO_PARAMETERS, f"the nano has {count / 1e6:.2f} M parameters: 1 M at most"


def it_takes_one_channel(subject: Model) -> None:
    model = subject.build(in_chans=1).eval()
    assert model(subject.images(channels=1)).shape == (4, CLASSES)


@unless("fixed_size")
def it_takes_images_of_any_size(subject: Model) -> None:
    for size in ((28, 28), (64, 64), (45, 61)):
        try:
            logits = subject.build(img_size=size[0]).eval()(images(2, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise AssertionError(f"it does not take images of {size}: {error}") from error
        assert logits.shape == (2, CLASSES), f"images of {size} give {tuple(logits.shape)}"


# ---- the beginning


def statistics_at_the_start_are_sane(subject: Model) -> None:
    model, seen = subject.build().train(), {}

    def note(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(value, Tensor) or not value.requires_grad:
                return None
            value.retain_grad()
            seen[name] = value
            # What follows may change its input in place.
            return value.clone() if value is output else None

        return hook

    classifier = model.get_classifier()
    for name, block in _blocks(model):
        if block is not classifier:
            block.register_forward_hook(note(name))
    logits = cross_entropy_step(model, images(16, subject.side))
    assert len(seen) > 1, "no blocks were found in the model: keep them as attributes, in a Sequential or a ModuleList"
    for name, value in seen.items():
        rms = float(value.detach().float().pow(2).mean().sqrt())
        assert 1e-2 < rms < 1e2, f"at the start the output of {name} has a root mean square of {rms:.2g}"
    norms = {name: float(value.grad.norm()) for name, value in seen.items() if value.grad is not None}
    low, high = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
    assert norms[high] < 1e3 * norms[low], (
        f"at the start gradients vanish or explode: norm {norms[low]:.2g} at {low}, {norms[high]:.2g} at {high}"
    )
    logits = logits.detach()
    mean, rms = float(logits.mean()), float(logits.pow(2).mean().sqrt())
    # Each class has a mean of its own by chance; their mean is near zero against that.
    chance = float(logits.mean(0).std()) / CLASSES**0.5
    assert abs(mean) < max(0.5, 4 * chance), f"at the start the logits have the mean {mean:.2f}"
    assert rms < 3, f"at the start the logits have a root mean square of {rms:.1f}"


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _blocks(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}", child


@needs("recorded")
def it_gives_its_recorded_outputs(subject: Model) -> None:
    golden.compare(subject.name, golden.figures(subject.build, subject.side))


# ---- training


def every_parameter_gets_a_gradient(subject: Model) -> None:
    model = unsettled(subject.build()).train()
    cross_entropy_step(model, subject.images(8))
    assert not unreached(model), f"no gradient reaches {unreached(model)}"


def a_few_steps_lower_the_loss(subject: Model) -> None:
    model, x = subject.build().train(), subject.images(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True)
    losses = []
    for _ in range(9):
        loss = F.cross_entropy(cross_entropy_step(model, x), labels(len(x)))
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], f"9 steps on 8 images took the loss from {losses[0]:.3f} to {losses[-1]:.3f}"


def checkpointing_changes_nothing(subject: Model) -> None:
    plain, x = unsettled(subject.build()).train(), subject.images(8)
    frugal = copy.deepcopy(plain)
    frugal.set_grad_checkpointing(True)
    found = []
    for model in (plain, frugal):
        kept: list[int] = []

        def keep(value: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(value.numel())
            return value

        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            logits = cross_entropy_step(model, x)
        found.append((logits, [parameter.grad for parameter in model.parameters()], sum(kept)))
    (logits, gradients, held), (again, others, less) = found
    assert gap(again, logits) < TOLERANCE, "set_grad_checkpointing changes the logits"
    for (name, _), own, other in zip(plain.named_parameters(), gradients, others):
        assert (own is None) == (other is None), f"set_grad_checkpointing changes the gradient of {name}"
        if own is not None:
            assert gap(other, own) < 1e-3, f"set_grad_checkpointing changes the gradient of {name}"
    assert less < held, "set_grad_checkpointing(True) keeps as much for the backward pass as before"


def dropout_acts_in_training_alone(subject: Model) -> None:
    model, x = unsettled(subject.build(drop_rate=0.5)), subject.images()
    batch_does_not_matter(model, x)
    model.train()
    with torch.no_grad():
        assert gap(model(x), model(x)) > 0, "drop_rate = 0.5 does nothing in training"


def bf16_autocast_runs(subject: Model) -> None:
    autocast_agrees(unsettled(subject.build()), subject.images(8))


# ---- evaluation, storage, export


def evaluation_does_not_depend_on_the_batch(subject: Model) -> None:
    batch_does_not_matter(unsettled(subject.build()), subject.images())


@torch.no_grad()
def its_state_goes_round(subject: Model) -> None:
    one, other = (unsettled(subject.build(seed)).eval() for seed in (0, 1))
    other.load_state_dict(one.state_dict(), strict=True)
    assert gap(other(subject.images()), one(subject.images())) < TOLERANCE, (
        "a model that loaded the state of another gives other logits: some of its state is not in state_dict"
    )


@torch.no_grad()
def copies_and_pickles_are_alike(subject: Model) -> None:
    model, x = unsettled(subject.build()).eval(), subject.images()
    for kind, twin in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        assert gap(twin(x), model(x)) < TOLERANCE, f"its {kind} gives other logits"


def channels_last_is_the_same(subject: Model) -> None:
    model, x = unsettled(subject.build()).train(), subject.images(8)
    exact = cross_entropy_step(model, x)
    model.to(memory_format=torch.channels_last)
    logits = cross_entropy_step(model, x.contiguous(memory_format=torch.channels_last))
    assert gap(logits, exact) < 1e-3, "channels-last memory changes the logits"


@costly
@needs("nano")
def its_onnx_file_agrees(subject: Model) -> None:
    file_agrees(unsettled(subject.build()), subject.side)
