"""The recipe: everything that determines a run, typed, in one TOML file.

A field left at ``"auto"`` is decided from the data and the budget by ``vitrail.app.choose``; the resolved recipe that a
run saves contains no ``"auto"`` and reproduces the run.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitrail.catalog import recipe_names, shipped_recipe
from vitrail.errors import InputError, unknown

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors, values are checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class DataConfig(Section):
    """Which images, which labels, how they are split."""

    path: str | None = None
    """Folder, manifest (CSV or Parquet), IDX folder, ``hf://name``, shard pattern; ``None`` is the embedded digits."""
    level: Positive | None = None
    """Folders, at most, that name the class: with 2 ``a/b/c/x.png`` is of class ``a/b``; ``None``: all of them."""
    path_column: str = "path"
    label_column: str = "label"
    group_column: str | None = None
    """Column of a manifest whose equal values stay on one side of the split (a patient, a film)."""
    split_column: str | None = None
    label_separator: str | None = None
    """Splits one label cell into several (multi-label), for example ``"|"``."""
    min_per_class: Positive = 2
    """Classes with fewer readable, distinct images are left out, and said so."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    test_fraction: Fraction = 0.0
    """Share of an additional test split; 0 means that results are given on the validation split or an official test."""
    near_duplicates: Literal["group", "drop", "ignore"] = "group"
    """Near duplicates are kept on one side of the split, dropped but for one, or ignored."""
    embedding_duplicates: bool = False
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour on which transparent images are composited, 0 to 255 per channel."""
    max_pixels: Positive = 100_000_000
    """Images with more pixels are refused as decompression bombs."""
    seed: int = 0
    """Seed of the split alone, so that comparing training seeds compares on the same images."""


class EditConfig(Section):
    """One drop-in layer: the slug or import path of an edit, and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class ModelConfig(Section):
    """Backbone, its weights, and the edits made to it."""

    name: str = "auto"
    """A timm or Vitrail model name."""
    pretrained: str = "auto"
    """``auto`` (the best weights that can be had), ``none``, ``package``, ``hub``, or the path of a local file."""
    sha256: str | None = None
    """Checksum that a local weight file must have."""
    img_size: Positive | Auto = "auto"
    resize: Literal["crop", "squash"] | Auto = "auto"
    """``crop``: scale the shorter side and cut the centre; ``squash``: scale both sides, whatever the aspect ratio."""
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] | Auto = "auto"
    """Share of the scaled image that the centre crop keeps."""
    drop_rate: Fraction = 0.0
    drop_path_rate: Fraction = 0.0
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the model's constructor."""
    edits: list[EditConfig] = Field(default_factory=list)


class MethodConfig(Section):
    """Training objective by catalogue slug or import path, and its options."""

    name: str = "supervised"
    options: dict[str, Any] = Field(default_factory=dict)


class AugmentConfig(Section):
    """Random views of the training images, and how they are mixed."""

    policy: Literal["crop", "shift", "simple", "none"] | Auto = "auto"
    """``crop``: random resized crop; ``shift``: pad and random crop, for small images; ``simple``: DeiT III's random
    crop of the whole image; ``none``: as in evaluation."""
    scale: tuple[float, float] = (0.35, 1.0)
    """Area of the random resized crop, as a share of the image."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: Fraction | Auto = "auto"
    """Probability of a horizontal flip."""
    color_jitter: Fraction = 0.0
    rand_augment: Annotated[int, Field(ge=0, le=30)] = 0
    """Magnitude of RandAugment with two operations; 0 is off."""
    three_augment: bool = False
    """DeiT III's 3-Augment: each image is turned grey, solarised or blurred."""
    erase: Fraction = 0.0
    mixup: Annotated[float, Field(ge=0.0)] = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: Annotated[float, Field(ge=0.0)] = 0.0


class OptimConfig(Section):
    """Optimiser (a timm name) and its groups."""

    name: str = "adamw"
    lr: Annotated[float, Field(gt=0.0)] | Auto = "auto"
    """Peak learning rate for the total batch size of ``train.batch_size``."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    betas: tuple[float, float] | None = None
    momentum: Fraction | None = None
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Learning-rate factor per layer group from the head downwards; 1 is off."""
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global gradient norm; 0 is off."""


class TrainConfig(Section):
    """Length, batch, precision and safety of the training loop."""

    epochs: Annotated[float, Field(gt=0.0)] | Auto = "auto"
    batch_size: Positive | Auto = "auto"
    """Images per optimiser step over all processes and accumulated parts."""
    accumulate: Positive = 1
    """Parts in which a batch is computed one after another, to save memory."""
    warmup: Fraction = 0.05
    """Share of all steps over which the learning rate rises linearly."""
    min_lr: Fraction = 0.01
    """Final learning rate of the cosine, as a share of the peak."""
    head_start: Annotated[float, Field(ge=0.0)] | Auto = "auto"
    """Seconds at most for training the head alone on cached features of a pretrained backbone; 0 is off.

    It ends as soon as more training does not help. Where finetuning, in the time left, does
    not do better on the validation images, it ships."""
    freeze: Fraction | Auto = "auto"
    """Share of the layers, from the input, that keep their weights; above 0 all batch-norm statistics stay, too."""
    precision: Literal["fp32", "bf16", "fp16"] | Auto = "auto"
    channels_last: bool | Auto = "auto"
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] | Auto = "auto"
    """Decay of the exponential moving average of the weights; 0 is off."""
    balance: Literal["none", "weights", "sampler"] = "none"
    """Answer to class imbalance: loss weights or balanced sampling."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Validations without improvement after which training stops; 0 is off."""
    eval_every: Annotated[float, Field(gt=0.0)] = 1.0
    """Epochs between validations."""
    checkpoint_seconds: Annotated[float, Field(ge=0.0)] = 60.0
    """Seconds between checkpoints; one is also written after each epoch that took 20 times as long as writing it."""
    workers: Annotated[int, Field(ge=0)] | Auto = "auto"
    cache_mb: Annotated[int, Field(ge=0)] = 1024
    """Bound of the cache of decoded images, on disk and shared by workers; 0 is off."""
    sync_batchnorm: bool = True
    grad_checkpointing: bool = False
    seed: int = 0


class EvaluateConfig(Section):
    """What is measured on held-out data."""

    corruptions: bool | Auto = "auto"
    corruption_images: Positive = 500
    """Held-out images, at most, on which common corruptions are measured."""


class DeployConfig(Section):
    """What is exported and what may ship."""

    target_ms: Annotated[float, Field(gt=0.0)] | None = None
    """Latency per image at batch 1 that the chosen runtime must meet."""
    int8: bool = True
    max_drop: Fraction = 0.01
    """Largest drop of top-1 (0.01 = one percentage point) at which a faster runtime is accepted."""
    compile: bool | Auto = "auto"
    openvino: bool | Auto = "auto"
    calibration_images: Positive = 200


class Recipe(Section):
    """A whole run."""

    seed: int | None = None
    """Sets ``train.seed``; a short form for comparisons."""
    minutes: Annotated[float, Field(gt=0.0)] | None = None
    """Wall-clock budget of the whole run, report included; ``None`` needs ``train.epochs``."""
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    deploy: DeployConfig = Field(default_factory=DeployConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> Self:
        """Validate nested values; an unknown key is an error that names the nearest key."""
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            raise _explain(error, where) from None
        if recipe.seed is not None:
            recipe.train.seed = recipe.seed
        return recipe

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a TOML file and apply ``key=value`` overrides.

        Args:
            path: of the file; or, where there is none, the name of a recipe that Vitrail ships, as ``deit3``.
            overrides: entries that replace those of the file.

        Raises:
            InputError: no such file or name, or an entry that is not allowed.
        """
        path = shipped_recipe(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(
                f"cannot read the recipe {path}: {reason}; give the path of a TOML file, or the name of a shipped "
                f"recipe: {', '.join(recipe_names())}"
            ) from None
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"the recipe {path} is not valid TOML: {error}") from None
        return cls.from_dict(apply_overrides(values, overrides), where=str(path))

    def to_toml(self) -> str:
        """Return the recipe as TOML; ``None`` fields are left out, as TOML has no null."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def unresolved(self) -> list[str]:
        """Return the dotted keys that are still ``"auto"``."""
        return [key for key, value in _leaves(self.model_dump()) if value == "auto"]


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of nested ``values`` with ``section.key=value`` overrides applied; values are read as TOML."""
    result = _copy(values)
    for text in overrides:
        key, sign, value = text.partition("=")
        key = key.strip()
        if not sign or not key:
            raise InputError(f"cannot use the override {text!r}: give it as key=value, for example optim.lr=1e-3")
        *sections, leaf = key.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise InputError(f"cannot use the override {text!r}: {section!r} is a value, not a section")
        place[leaf] = _parse(value.strip())
    return result


def _parse(text: str) -> Any:
    # TOML has no null; "none" stays a string, because fields such as model.pretrained use that word.
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False}.get(text, text)


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, dict) else values


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def recipe_keys(section: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """Return every dotted key that a recipe may have."""
    keys = []
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [kind for kind in kinds if issubclass(kind, Section)]
        if inner and field.annotation is inner[0]:
            keys += recipe_keys(inner[0], f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _explain(error: ValidationError, where: str) -> InputError:
    """Turn the first validation error into one line."""
    first, *others = error.errors()
    keys = recipe_keys()
    # Members of a union appear in the location as type names; only keys and indices mean something to a user.
    parts = [str(part) for part in first["loc"]]
    while len(parts) > 1 and ".".join(parts) not in keys and ".".join(parts[:-1]) in keys:
        parts.pop()
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        elsewhere = [name for name in keys if name.rsplit(".", 1)[-1] == parts[-1]]
        if elsewhere:
            return InputError(f"unknown key {key!r} in {where}: did you mean {' or '.join(map(repr, elsewhere))}?")
        prefix = "".join(f"{part}." for part in parts[:-1])
        siblings = {prefix + name.removeprefix(prefix).split(".")[0] for name in keys if name.startswith(prefix)}
        return unknown("key", key, siblings, f"(in {where})")
    depth = len(parts)
    messages = [first["msg"], *(other["msg"] for other in others if other["loc"][:depth] == first["loc"][:depth])]
    return InputError(f"{key} = {first['input']!r} in {where} is not allowed: {'; or: '.join(dict.fromkeys(messages))}")
