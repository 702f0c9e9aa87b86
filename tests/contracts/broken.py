"""Parts with one fault each, and healthy twins without: what the contracts have to tell apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compressor_contract import Compressor
from data_contract import Images
from edit_contract import Edit
from method_contract import Method
from model_contract import Model
from suite_contract import Suite
from timm.layers import GroupNorm1
from torch import Tensor, nn
from twin import NAME, Twin, build

from vitrail.compress.compressor import Budget, Compressed
from vitrail.data.batches import Batches
from vitrail.data.sources.base import Record
from vitrail.edits.surgery import replace_modules
from vitrail.errors import InputError
from vitrail.evaluate.suite import Result
from vitrail.methods.method import Batch, one_hot_targets
from vitrail.methods.method import Method as MethodBase

# ---- models


class OtherForward(Twin):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class KeepsNumClasses(Twin):
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        before = self.num_classes
        super().reset_classifier(num_classes, global_pool)
        self.num_classes = before


class LosesDtype(Twin):
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes)


class WrongWidth(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.feature_info[1]["num_chs"] = 17


class WrongStride(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.feature_info[1]["reduction"] = 8


class UnknownParameter(Twin):
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


class HeadFirst(Twin):
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {**super().group_matcher(coarse), "stem": r"^stem|^head"}


class Large(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.table = nn.Parameter(torch.zeros(1000, 1000))

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x + self.table.mean())


class ThreeChannels(Twin):
    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x.expand(-1, 3, -1, -1))


class FixedSize(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("place", torch.linspace(-1, 1, 16), persistent=False)

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x + self.place)


class BiasedStart(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.num_classes:
            nn.init.constant_(self.head.bias, 2.0)


class Explodes(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        nn.init.constant_(self.stages[0][1].weight, 300.0)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Vanishes(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stages[1].insert(0, Scale())


class DeadParameter(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.unused = nn.Parameter(torch.ones(3))


class Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() + 0 * x


class CutOff(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stages[1].insert(0, Detach())


class LearnsNothing(Twin):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        out = super().forward_head(x, pre_logits)
        return out if pre_logits or not self.num_classes else 1e-3 * out


class OtherWhenCheckpointing(Twin):
    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x.tanh() if self.grad_checkpointing else x)


class NoCheckpointing(Twin):
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        pass


class NoDropout(Twin):
    def __init__(self, drop_rate: float = 0.0, **options: Any) -> None:
        super().__init__(**options)


class NoAutocast(Twin):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        sums = torch.zeros(x.shape)
        return super().forward_head(sums.index_add(0, torch.arange(len(x)), x), pre_logits)


class BatchDependent(Twin):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x - 0.5 * x.mean(0, keepdim=True), pre_logits)


class HiddenState(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.factor = 1 + float(torch.rand(()))

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x) * self.factor


class NotPickled(Twin):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.twice = lambda x: 2 * x

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(self.twice(x))


class OneLayout(Twin):
    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x.view(len(x), -1).view(x.shape))


class OtherInExport(Twin):
    def forward_features(self, x: Tensor) -> Tensor:
        x = super().forward_features(x)
        return 2 * x if torch.compiler.is_exporting() else x


def model(kind: type[Twin]) -> Model:
    """Return a model of a class of this module."""

    def create(*, img_size: int | None = None, **options: Any) -> nn.Module:
        return build(kind, **options)

    return Model(kind.__name__, create, frozenset({"dense", "nano"}), 16)


MODELS: dict[type[Twin], set[str]] = {
    OtherForward: {"it_has_timms_surface"},
    KeepsNumClasses: {"the_classifier_can_be_replaced"},
    LosesDtype: {"reset_classifier_keeps_device_and_dtype"},
    WrongWidth: {"declared_features_are_real"},
    WrongStride: {"declared_features_are_real"},
    UnknownParameter: {"it_names_real_parameters"},
    HeadFirst: {"it_names_real_parameters"},
    Large: {"a_nano_is_small"},
    ThreeChannels: {"it_takes_one_channel"},
    FixedSize: {"it_takes_images_of_any_size"},
    BiasedStart: {"statistics_at_the_start_are_sane"},
    Explodes: {"statistics_at_the_start_are_sane"},
    Vanishes: {"statistics_at_the_start_are_sane"},
    DeadParameter: {"every_parameter_gets_a_gradient"},
    CutOff: {"every_parameter_gets_a_gradient", "statistics_at_the_start_are_sane"},
    LearnsNothing: {"a_few_steps_lower_the_loss"},
    OtherWhenCheckpointing: {"checkpointing_changes_nothing"},
    NoCheckpointing: {"checkpointing_changes_nothing"},
    NoDropout: {"dropout_acts_in_training_alone"},
    NoAutocast: {"bf16_autocast_runs"},
    BatchDependent: {"evaluation_does_not_depend_on_the_batch", "dropout_acts_in_training_alone"},
    HiddenState: {"its_state_goes_round"},
    NotPickled: {"copies_and_pickles_are_alike"},
    OneLayout: {"channels_last_is_the_same"},
}
"""What each breaks, and nothing else; ``OtherInExport`` breaks the ONNX file alone, which takes seconds."""


# ---- edits


class Gate(nn.Module):
    """Scale channels by what their means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mix(x.mean((2, 3))).sigmoid()[:, :, None, None]


def _gated(model: nn.Module, gate: Callable[[int], nn.Module]) -> nn.Module:
    def build(layer: Any) -> nn.Module:
        return nn.Sequential(layer, gate(layer.num_features))

    return replace_modules(model, lambda _, m: isinstance(m, nn.BatchNorm2d), build, what="normalisation")


def healthy_edit(*, kinds: tuple[str, ...] = ("mean",), names: list[str] | None = None) -> Callable[..., nn.Module]:
    return lambda model: _gated(model, Gate)


def copying_edit() -> Callable[..., nn.Module]:
    return lambda model: _gated(copy.deepcopy(model), Gate)


def silent_edit() -> Callable[..., nn.Module]:
    def edit(model: nn.Module) -> nn.Module:
        try:
            return _gated(model, Gate)
        except InputError:
            return model

    return edit


def idle_edit() -> Callable[..., nn.Module]:
    def edit(model: nn.Module) -> nn.Module:
        _gated(copy.deepcopy(model), Gate)
        return model

    return edit


def mutable_default_edit(*, seen: list[str] = []) -> Callable[..., nn.Module]:  # noqa: B006 - the fault
    return lambda model: _gated(model, Gate)


def option_changing_edit(*, names: list[str]) -> Callable[..., nn.Module]:
    names.append("changed")
    return healthy_edit()


def dead_edit() -> Callable[..., nn.Module]:
    class Dead(Gate):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = self.mix(x.mean((2, 3))).sigmoid()[:, :, None, None]
            return x * gate

    return lambda model: _gated(model, Dead)


def training_edit() -> Callable[..., nn.Module]:
    return lambda model: _gated(model, Gate).train()


def widening_edit() -> Callable[..., nn.Module]:
    def edit(model: Any) -> nn.Module:
        _gated(model, Gate).reset_classifier(model.num_classes + 1)
        return model.train(model.training)

    return edit


def sharing_edit() -> Callable[..., nn.Module]:
    gates: dict[int, nn.Module] = {}
    return lambda model: _gated(model, lambda channels: gates.setdefault(channels, Gate(channels)))


def once_edit() -> Callable[..., nn.Module]:
    def edit(model: nn.Module) -> nn.Module:
        if any(isinstance(module, Gate) for module in model.modules()):
            raise RuntimeError("gates on gates")
        return _gated(model, Gate)

    return edit


def forgetful_edit() -> Callable[..., nn.Module]:
    class Forgetful(Gate):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.turn = float(torch.rand(()))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.turn)

    return lambda model: _gated(model, Forgetful)


def batch_edit() -> Callable[..., nn.Module]:
    class Batchwise(Gate):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.mix(x.mean((0, 2, 3))).sigmoid()[:, None, None]

    return lambda model: _gated(model, Batchwise)


def half_edit() -> Callable[..., nn.Module]:
    class Half(Gate):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(-4 * x if torch.is_autocast_enabled("cpu") else x)

    return lambda model: _gated(model, Half)


def exported_edit() -> Callable[..., nn.Module]:
    class Exported(Gate):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x if torch.compiler.is_exporting() else x)

    return lambda model: _gated(model, Exported)


EDITS: dict[Callable[..., Any], set[str]] = {
    copying_edit: {"it_returns_the_same_model_changed"},
    silent_edit: {"a_model_without_a_match_is_refused"},
    idle_edit: {"it_returns_the_same_model_changed"},
    mutable_default_edit: {"options_and_defaults_are_left_alone"},
    option_changing_edit: {"options_and_defaults_are_left_alone"},
    dead_edit: {"every_parameter_gets_a_gradient", "it_composes"},
    training_edit: {"it_takes_over_mode_and_device"},
    widening_edit: {"it_keeps_the_shape_of_the_output"},
    sharing_edit: {"one_edit_serves_several_models"},
    once_edit: {"it_composes"},
    forgetful_edit: {"its_state_goes_round", "it_survives_saving_and_loading"},
    batch_edit: {"evaluation_does_not_depend_on_the_batch"},
    half_edit: {"bf16_autocast_runs"},
}
"""What each breaks, and nothing else; ``exported_edit`` breaks the ONNX file alone."""


def edit(make: Callable[..., Any]) -> Edit:
    """Return an edit of this module."""
    options = {"names": ["given"]} if make is option_changing_edit else {}
    return Edit(make.__name__, f"broken:{make.__name__}", make, host=NAME, options=options)


# ---- methods


class HealthyMethod(MethodBase):
    """Cross-entropy, and nearness of a projection to what a teacher says."""

    def __init__(self, model: nn.Module, *, teacher: nn.Module, num_classes: int, weights: Any = None) -> None:
        super().__init__(model)
        self.teacher = teacher.eval().requires_grad_(False)
        self.project = nn.Linear(num_classes, num_classes)

    def train(self, mode: bool = True) -> HealthyMethod:
        super().train(mode)
        self.teacher.eval()
        return self

    def entropies(self, logits: Tensor, batch: Batch) -> Tensor:
        target = one_hot_targets(batch["target"], logits.shape[1])
        return -(target * logits.float().log_softmax(1)).sum(1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.model(batch["image"])
        with torch.no_grad():
            said = self.teacher(batch["image"]).float()
        near = (self.project(logits).float() - said).pow(2).mean()
        return {"loss": self.reduced(self.entropies(logits, batch)) + near, "near": near}

    def reduced(self, entropies: Tensor) -> Tensor:
        return entropies.mean()


class Summed(HealthyMethod):
    def reduced(self, entropies: Tensor) -> Tensor:
        return entropies.sum()


class WrongGradient(HealthyMethod):
    """The right value, and a gradient that falls with the images in a process."""

    def reduced(self, entropies: Tensor) -> Tensor:
        mean = entropies.mean()
        return mean.detach() + (mean - mean.detach()) * 4 / len(entropies)


class NoGradient(HealthyMethod):
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": super().loss(batch)["loss"], "each": torch.ones(2)}


class StrangeView(HealthyMethod):
    views = {"image": "training"}  # noqa: RUF012 - as methods declare it


class DeadHead(HealthyMethod):
    def __init__(self, model: nn.Module, *, teacher: nn.Module, num_classes: int) -> None:
        super().__init__(model, teacher=teacher, num_classes=num_classes)
        self.unused = nn.Linear(2, 2)


class ChangesBatch(HealthyMethod):
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        batch["image"].mul_(0.5)
        return super().loss(batch)


class MutableDefault(HealthyMethod):
    def __init__(self, model: nn.Module, *, teacher: nn.Module, num_classes: int, seen: list[int] = []) -> None:  # noqa: B006
        super().__init__(model, teacher=teacher, num_classes=num_classes)


class Overlapping(HealthyMethod):
    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.project.parameters())}, {"params": [self.project.bias], "weight_decay": 0.0}]


class Climbs(HealthyMethod):
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(batch)
        return {**terms, "loss": 2 * terms["loss"].detach() - terms["loss"]}


class OnlyNumbers(HealthyMethod):
    def entropies(self, logits: Tensor, batch: Batch) -> Tensor:
        target = batch["target"] if batch["target"].ndim == 1 else batch["target"].long()[:, 0]
        return F.cross_entropy(logits.float(), target, reduction="none")


class HiddenQueue(HealthyMethod):
    def __init__(self, model: nn.Module, *, teacher: nn.Module, num_classes: int) -> None:
        super().__init__(model, teacher=teacher, num_classes=num_classes)
        self.factor = 1 + float(torch.rand(()))

    def reduced(self, entropies: Tensor) -> Tensor:
        return self.factor * entropies.mean()


class MovesModel(HealthyMethod):
    def after_step(self) -> None:
        with torch.no_grad():
            next(self.model.parameters()).mul_(0.999)


class LowPrecision(HealthyMethod):
    def reduced(self, entropies: Tensor) -> Tensor:
        return entropies.mean().to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(batch)
        return {**terms, "loss": self.reduced(terms["loss"])}


class TeacherLearns(HealthyMethod):
    def train(self, mode: bool = True) -> TeacherLearns:
        nn.Module.train(self, mode)
        return self


METHODS: dict[type[HealthyMethod], set[str]] = {
    Summed: {"its_loss_is_a_mean_over_images"},
    WrongGradient: {"its_loss_is_a_mean_over_images"},
    NoGradient: {"its_loss_is_a_finite_scalar"},
    StrangeView: {"it_asks_for_views_that_exist"},
    DeadHead: {"every_parameter_gets_a_gradient", "bf16_autocast_runs"},
    ChangesBatch: {"the_batch_is_left_alone"},
    MutableDefault: {"options_and_defaults_are_left_alone"},
    Overlapping: {"its_groups_hold_every_parameter_once", "a_few_steps_lower_the_loss"},
    Climbs: {"a_few_steps_lower_the_loss"},
    OnlyNumbers: {"probabilities_serve_as_targets"},
    HiddenQueue: {"its_state_goes_round"},
    MovesModel: {"its_hooks_can_be_called_at_any_time"},
    LowPrecision: {"bf16_autocast_runs"},
    TeacherLearns: {"its_teacher_is_left_alone", "its_loss_is_a_mean_over_images"},
}


def method(kind: type[HealthyMethod]) -> Method:
    """Return a method of this module."""
    return Method(kind.__name__, kind, NAME, {"norm_layer": GroupNorm1}, NAME, traits=frozenset({"teacher"}))


# ---- compressors


def healthy_compressor(model: nn.Module, calibration: Batches, budget: Budget, *, levels: int = 127) -> Compressed:
    """Round weights to 8 bits."""
    made = copy.deepcopy(model)
    layers = [(name, m) for name, m in made.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for _, layer in layers:
            step = layer.weight.abs().max() / levels
            layer.weight.copy_((layer.weight / step).round() * step)
    return Compressed(made, _report(model, [{"name": name, "bits": 8} for name, _ in layers]))


def _report(model: nn.Module, layers: list[dict[str, Any]], share: float = 0.25) -> dict[str, Any]:
    before = sum(value.numel() * value.element_size() for value in model.parameters())
    return {"bytes": int(share * before), "bytes_before": before, "layers": layers}


def changing_compressor(model: nn.Module, calibration: Batches, budget: Budget) -> Compressed:
    made = healthy_compressor(model, calibration, budget)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    return made


def sharing_compressor(model: nn.Module, calibration: Batches, budget: Budget) -> Compressed:
    made = healthy_compressor(model, calibration, budget)
    getattr(made.model, "head").weight = getattr(model, "head").weight  # noqa: B009 - of a module
    return made


def vague_compressor(model: nn.Module, calibration: Batches, budget: Budget) -> Compressed:
    return Compressed(copy.deepcopy(model), _report(model, [{"name": "somewhere", "bits": 8}]))


def tensor_compressor(model: nn.Module, calibration: Batches, budget: Budget) -> Compressed:
    return Compressed(copy.deepcopy(model), _report(model, [{"name": "head", "bits": torch.tensor(8)}]))


def generous_compressor(model: nn.Module, calibration: Batches, budget: Budget) -> Compressed:
    return Compressed(copy.deepcopy(model), _report(model, [{"name": "head", "bits": 32}], share=0.9))


def breaking_compressor(model: nn.Module, calibration: Batches, budget: Budget) -> Compressed:
    made = healthy_compressor(model, calibration, budget)
    made.model.reset_classifier(7)
    return made


def random_compressor(model: nn.Module, calibration: Batches, budget: Budget) -> Compressed:
    return healthy_compressor(model, calibration, budget, levels=int(np.random.default_rng().integers(50, 10**9)))


def scaling_compressor(model: nn.Module, calibration: Batches, budget: Budget) -> Compressed:
    for x, _ in calibration():
        x.mul_(0.5)
    return healthy_compressor(model, calibration, budget)


def defaulting_compressor(
    model: nn.Module,
    calibration: Batches,
    budget: Budget,
    *,
    bits: dict[str, int] = {},  # noqa: B006 - the fault
) -> Compressed:
    return healthy_compressor(model, calibration, budget)


COMPRESSORS: dict[Callable[..., Any], set[str]] = {
    changing_compressor: {"the_given_model_is_left_alone"},
    sharing_compressor: {"the_given_model_is_left_alone"},
    vague_compressor: {"its_report_is_json"},
    tensor_compressor: {"its_report_is_json"},
    generous_compressor: {"it_keeps_to_the_budget"},
    breaking_compressor: {"its_model_works"},
    random_compressor: {"it_gives_the_same_twice"},
    scaling_compressor: {"the_images_are_left_alone"},
    defaulting_compressor: {"options_and_defaults_are_left_alone"},
}


def compressor(compress: Callable[..., Any]) -> Compressor:
    """Return a compressor of this module."""
    return Compressor(compress.__name__, compress, NAME)


# ---- suites


def healthy_suite(model: nn.Module, data: Batches, *, factors: tuple[float, ...] = (0.5, 1.0)) -> Result:
    """Measure the accuracy with other scales of the first layer."""
    modes = {module: module.training for module in model.modules()}
    layer = next(model.parameters())
    kept = layer.detach().clone()
    table = []
    try:
        model.eval()
        with torch.no_grad():
            for factor in factors:
                layer.copy_(factor * kept)
                right = [float((model(x).argmax(1) == target).float().mean()) for x, target in data()]
                table.append({"factor": factor, "top1": float(np.mean(right))})
    finally:
        with torch.no_grad():
            layer.copy_(kept)
        for module, mode in modes.items():
            module.training = mode
    return Result("Accuracy by scale", table, {"curve": "<svg></svg>"})


def leaving_suite(model: nn.Module, data: Batches) -> Result:
    result = healthy_suite(model, data)
    model.train()
    return result


def uneven_suite(model: nn.Module, data: Batches) -> Result:
    result = healthy_suite(model, data)
    result.table.append({"factor": 2.0})
    return result


def drawing_suite(model: nn.Module, data: Batches) -> Result:
    return Result("Accuracy", healthy_suite(model, data).table, {"curve": "curve.png"})


def guessing_suite(model: nn.Module, data: Batches) -> Result:
    return Result("Accuracy", [{"top1": float(np.random.default_rng().random())}])


def clamping_suite(model: nn.Module, data: Batches) -> Result:
    for x, _ in data():
        x.clamp_(-1, 1)
    return healthy_suite(model, data)


def defaulting_suite(model: nn.Module, data: Batches, *, kinds: list[str] = []) -> Result:  # noqa: B006 - the fault
    return healthy_suite(model, data)


SUITES: dict[Callable[..., Any], set[str]] = {
    leaving_suite: {"the_model_is_restored"},
    uneven_suite: {"its_rows_are_plain_and_alike"},
    drawing_suite: {"its_figures_are_svg"},
    guessing_suite: {"it_finds_the_same_twice"},
    clamping_suite: {"the_images_are_left_alone"},
    defaulting_suite: {"options_and_defaults_are_left_alone"},
}


def suite(run: Callable[..., Any]) -> Suite:
    """Return a suite of this module."""
    return Suite(run.__name__, run, NAME)


# ---- sources


class HealthySource:
    """Noise of two classes."""

    uri, kind, multilabel = "noise", "noise", False

    def records(self) -> Iterator[Record]:
        for number in range(12):
            yield Record(f"noise/{number}", str(number), (str(number % 2),))

    def read(self, locator: str) -> np.ndarray:
        return np.random.default_rng(int(locator)).integers(0, 256, (9, 8, 3), dtype=np.uint8)

    def stamp(self, locator: str) -> str:
        return "1"


class Nameless(HealthySource):
    uri = None  # type: ignore[assignment]


class NumberLabels(HealthySource):
    def records(self) -> Iterator[Record]:
        for record in super().records():
            yield record._replace(labels=(int(record.labels[0]),))  # type: ignore[arg-type]


class Twins(HealthySource):
    def records(self) -> Iterator[Record]:
        for record in super().records():
            yield record._replace(key="noise")


class Shuffled(HealthySource):
    def records(self) -> Iterator[Record]:
        records = list(super().records())
        yield from (records[place] for place in np.random.default_rng().permutation(len(records)))


class OneStream(HealthySource):
    """Draws its images one after another from one stream."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def read(self, locator: str) -> np.ndarray:
        return self.rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)


class Floats(HealthySource):
    def read(self, locator: str) -> np.ndarray:
        return super().read(locator) / 255


class Closed(HealthySource):
    def __init__(self) -> None:
        self.open = lambda: None


class Heavy(HealthySource):
    def __init__(self) -> None:
        self.held = bytes(10**6)


SOURCES: dict[type[HealthySource], set[str]] = {
    Nameless: {"it_says_what_it_is"},
    NumberLabels: {"its_records_are_sound"},
    Twins: {"its_records_are_sound"},
    Shuffled: {"its_records_are_the_same_every_time", "it_goes_to_other_processes"},
    OneStream: {"its_images_are_the_same_every_time", "it_goes_to_other_processes"},
    Floats: {"its_images_can_be_decoded"},
    Closed: {"it_goes_to_other_processes"},
    Heavy: {"it_goes_to_other_processes"},
}


def source(kind: type[HealthySource]) -> Images:
    """Return a source of this module."""
    return Images(kind.__name__, kind)


# ---- checks

HEALTHY_CHECK = """
from vitrail.checks.check import Context, Verdict, paired

def run(ctx: Context) -> Verdict:
    arms = {"with": [0.5 for _ in ctx.seeds], "without": [0.4 for _ in ctx.seeds]}
    return Verdict([paired("it helps", "accuracy", arms, ours="with", against="without")], ["on nothing"])
"""

CHECKS: dict[str, tuple[str, str, set[str]]] = {
    "two_arguments": ("(ctx: Context)", "(ctx: Context, index)", {"it_takes_a_context_alone"}),
    "private_name": (
        "\n\ndef",
        "\nfrom vitrail.data.sources.digits import _digits\n\ndef",
        {"it_uses_the_public_interface"},
    ),
    "private_attribute": ("[0.4 for", "ctx.index.__func__._x or [0.4 for", {"it_uses_the_public_interface"}),
    "another_check": (
        "\n\ndef",
        "\ndef arm():\n    import vitrail.checks.other\n\ndef",
        {"it_uses_the_public_interface"},
    ),
    "other_lengths": ("[0.4 for _ in ctx.seeds]", "[0.4, 0.4]", {"its_findings_are_sound"}),
    "no_number": ("[0.5 for", "[float('nan') for", {"its_verdict_is_json"}),
}
"""What is put in place of what in the healthy check."""
