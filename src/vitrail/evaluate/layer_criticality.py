"""Which layers a model's decisions depend on: re-randomise or reset one at a time and see what changes.

Gavrikov et al., "How Do Training Methods Influence the Utilization of Vision Models?" (2024), arXiv 2410.14470, and the
authors' code (paulgavrikov/layer_criticality). The experiment goes back to Zhang et al., "Are All Layers Created
Equal?" (2019), who reset layers to their values before training.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats
from torch import Tensor, nn

from vitrail.data.batches import Batches
from vitrail.errors import InputError, unknown
from vitrail.evaluate.suite import Result, evaluating
from vitrail.report.plots import BLUE, INK, new_figure, percent, short, svg_plot

TARGETS = ("random", "initial", "zero")
MAX_NAMED = 80
"""Layers up to which a chart names each."""


def decision_change(before: Tensor, after: Tensor, *, multilabel: bool = False) -> Tensor:
    """Return how far each image's decision moved, (B,) in [0, 1]: 1 less the cosine between the probabilities.

    Unlike a drop of accuracy it needs no labels and also sees changes among wrong answers. Where the network no longer
    gives finite numbers, nothing is left of the decision, and the change is 1.

    Args:
        before, after: logits (B, C).
        multilabel: probabilities by sigmoid rather than softmax.
    """
    p, q = (_probabilities(logits, multilabel) for logits in (before, after))
    cosine = torch.cosine_similarity(p, q, dim=1)
    return (1 - torch.nan_to_num(cosine, nan=0.0)).clamp(0, 1)


def layers_of(model: nn.Module, *, norms: bool = False) -> dict[str, nn.Module]:
    """Return the layers that are examined, by name, in the model's order: modules that own parameters themselves.

    Args:
        model: any.
        norms: also those that own vectors only, such as normalisations; the paper's published results leave them out.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if any(norms or parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    }


def run(
    model: nn.Module,
    data: Batches,
    *,
    to: str = "random",
    seeds: Sequence[int] = (0, 1, 2),
    fresh: Callable[[], nn.Module] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    norms: bool = False,
) -> Result:
    """Measure the criticality of each layer: the mean change of decisions when it alone loses what it learnt.

    The model is left exactly as it was, also after an error. One layer's values are kept aside at a time.

    Args:
        model: returns logits (B, C).
        data: images to decide on; targets are used for the accuracy alone.
        to: what a layer becomes: ``"random"`` (drawn anew), ``"initial"`` (its values in ``initial``) or ``"zero"``.
        seeds: of the draws; the criticality is their mean.
        fresh: builds an untrained twin of the model, from which random values come, so that they are distributed as the
            architecture initialises them; one twin at a time is kept. None: as each layer's ``reset_parameters`` does.
        initial: the ``state_dict`` of the model before training.
        norms: as for ``layers_of``.

    Returns:
        A row per layer: ``layer``, ``kind``, ``parameters``, ``criticality`` in [0, 1], ``spread`` (standard deviation
        over the seeds), ``changed`` (share of the images whose answer is another) and ``top1`` (accuracy that is left).

    Raises:
        InputError: an unknown ``to``, no seeds, no images, no layer, or values that do not fit the model.
    """
    if to not in TARGETS:
        raise unknown("target of a reset", to, TARGETS)
    if (to == "initial") != (initial is not None):
        raise InputError("initial values and to='initial' go together: give both or neither")
    if not seeds:
        raise InputError("layer criticality got no seeds: give at least one; the paper takes three")
    layers = layers_of(model, norms=norms)
    skipped: list[str] = []
    if to == "random" and fresh is None:
        skipped = [name for name, layer in layers.items() if not hasattr(layer, "reset_parameters")]
        layers = {name: layer for name, layer in layers.items() if name not in skipped}
    if not layers:
        raise InputError(f"{type(model).__name__} has no layer that could be reset: give a model with weights")
    tallies = []
    with evaluating(model):
        for seed in seeds if to == "random" else seeds[:1]:
            twin = None if fresh is None or to != "random" else _seeded(fresh, seed)
            tallies.append(_tally(model, layers, data, _source(to, seed, twin, initial)))
    change, other, right = (np.stack([getattr(t, name) / t.images for t in tallies]) for name in _Tally.SHARES)
    spread = change.std(axis=0, ddof=1) if len(tallies) > 1 else np.zeros(len(layers))
    table: list[dict[str, Any]] = [
        {
            "layer": name or "(model)",
            "kind": type(layer).__name__,
            "parameters": sum(parameter.numel() for parameter in layer.parameters(recurse=False)),
            "criticality": float(change[:, i].mean()),
            "spread": float(spread[i]),
            "changed": float(other[:, i].mean()),
            "top1": float(right[:, i].mean()),
        }
        for i, (name, layer) in enumerate(layers.items())
    ]
    made = {"random": f"{len(tallies)} random draws", "initial": "the initial values", "zero": "zeros"}[to]
    notes = [
        f"{tallies[0].images} images; each layer in turn replaced by {made}; unchanged, the model answers "
        f"{tallies[0].unchanged_right / tallies[0].images:.1%} rightly; mean criticality {change.mean():.1%}.",
    ]
    if skipped:
        named = ", ".join(name or "(model)" for name in skipped)
        notes.append(f"Left out, as they cannot draw values by themselves (give fresh=): {named}.")
    figure = profile_plot([row["layer"] for row in table], change)
    return Result("Layer criticality", table, {"Layer criticality": figure}, notes)


def compare(profiles: Mapping[str, Result]) -> Result:
    """Put the profiles of one architecture's checkpoints side by side, so that each can be measured on its own.

    Args:
        profiles: name of the checkpoint -> what ``run`` returned for it; two or more.

    Returns:
        A row per layer with the criticality under each name and their ``range``.

    Raises:
        InputError: fewer than two profiles, or profiles of different layers.
    """
    if len(profiles) < 2:
        raise InputError(f"a comparison got {len(profiles)} profile(s): give two or more")
    names = list(profiles)
    layers = [row["layer"] for row in profiles[names[0]].table]
    for name in names[1:]:
        differ = set(layers) ^ {row["layer"] for row in profiles[name].table}
        if differ:
            raise InputError(
                f"the profiles {names[0]!r} and {name!r} are of different layers (first: {min(differ)!r}): "
                "compare checkpoints of one architecture, measured with the same options"
            )
    found = [{row["layer"]: row["criticality"] for row in profile.table} for profile in profiles.values()]
    values = np.array([[profile[layer] for layer in layers] for profile in found])
    table: list[dict[str, Any]] = [
        {"layer": layer, **dict(zip(names, column.tolist())), "range": float(np.ptp(column))}
        for layer, column in zip(layers, values.T)
    ]
    notes = [f"{name}: mean criticality {row.mean():.1%}." for name, row in zip(names, values)]
    for i, first in enumerate(names):
        for j, second in enumerate(names[:i]):
            if np.ptp(values[i]) and np.ptp(values[j]):
                order = stats.spearmanr(values[i], values[j]).statistic
                notes.append(f"{second} and {first} order the layers with a rank correlation of {order:.2f}.")
    figure = comparison_plot(layers, names, values)
    return Result("Layer criticality", table, {"Criticality side by side": figure}, notes)


# ---- resetting -------------------------------------------------------------------------------------------------------

Source = Callable[[str, nn.Module], Mapping[str, Tensor]]
"""Gives the values that a layer (name, module) is to take, by the names of its own tensors."""


@dataclass
class _Tally:
    """Sums over images, a number per layer."""

    SHARES = ("change", "other", "right")

    change: np.ndarray
    other: np.ndarray
    right: np.ndarray
    unchanged_right: int = 0
    images: int = 0


def _tally(model: nn.Module, layers: Mapping[str, nn.Module], data: Batches, source: Source) -> _Tally:
    # Images outside, layers inside: they are read once, and nothing grows with their number.
    tally = _Tally(np.zeros(len(layers)), np.zeros(len(layers)), np.zeros(len(layers)))
    place = next(model.parameters())
    for images, targets in data():
        multilabel = targets.ndim == 2
        images = images.to(place.device, place.dtype)
        before = _logits(model, images)
        tally.images += len(images)
        tally.unchanged_right += int(_right(before, targets).sum())
        for i, (name, layer) in enumerate(layers.items()):
            with _replaced(layer, source(name, layer)):
                after = _logits(model, images)
            tally.change[i] += float(decision_change(before, after, multilabel=multilabel).sum())
            tally.other[i] += int((_decided(before, multilabel) != _decided(after, multilabel)).any(1).sum())
            tally.right[i] += int(_right(after, targets).sum())
    if not tally.images:
        raise InputError("layer criticality got no images: give at least one")
    return tally


def _source(to: str, seed: int, twin: nn.Module | None, initial: Mapping[str, Tensor] | None) -> Source:
    def zero(name: str, layer: nn.Module) -> Mapping[str, Tensor]:
        return {key: torch.zeros_like(value) for key, value in layer.named_parameters(recurse=False)}

    def stored(name: str, layer: nn.Module) -> Mapping[str, Tensor]:
        held = {key: f"{name}.{key}".lstrip(".") for key in layer.state_dict() if "." not in key}
        values = initial or {}
        missing = [key for key in held.values() if key not in values]
        if missing:
            raise InputError(f"the initial values lack {missing[0]!r}: give the state_dict of the same architecture")
        return {key: values[full] for key, full in held.items()}

    def drawn(name: str, layer: nn.Module) -> Mapping[str, Tensor]:
        if twin is not None:
            try:
                return _own(twin.get_submodule(name))
            except AttributeError:
                raise InputError(f"the untrained twin has no layer {name!r}: build the same architecture") from None
        draft = copy.deepcopy(layer).cpu()
        _seeded(draft.reset_parameters, seed + zlib.crc32(name.encode()))  # type: ignore[arg-type]
        return _own(draft)

    return {"zero": zero, "initial": stored, "random": drawn}[to]


def _own(layer: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a layer itself."""
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


@contextmanager
def _replaced(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a layer other values for a while."""
    own = _own(layer)
    for key, value in values.items():
        if key not in own or own[key].shape != value.shape:
            raise InputError(
                f"a {type(layer).__name__} has no {key!r} of shape {tuple(value.shape)}: "
                "the values that a layer is reset to come from the same architecture"
            )
    kept = {key: own[key].detach().clone() for key in values}
    try:
        with torch.no_grad():
            for key, value in values.items():
                own[key].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for key, value in kept.items():
                own[key].copy_(value)


def _seeded(make: Callable[[], Any], seed: int) -> Any:
    """Call with seeded random numbers and put the caller's back."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return make()


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"layer criticality needs logits (B, C) and the model returns {shape}: give a classifier")
    return logits.float().cpu()


def _probabilities(logits: Tensor, multilabel: bool) -> Tensor:
    return logits.sigmoid() if multilabel else logits.softmax(1)


def _decided(logits: Tensor, multilabel: bool) -> Tensor:
    """Return the answers, (B, 1), or which labels are given, (B, C)."""
    return logits > 0 if multilabel else logits.argmax(1, keepdim=True)


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    """Return which images are answered rightly; of several labels, the most probable is one of them."""
    answers = logits.argmax(1)
    return answers == targets if targets.ndim == 1 else targets[torch.arange(len(answers)), answers] > 0.5


# ---- charts ----------------------------------------------------------------------------------------------------------


@svg_plot
def profile_plot(layers: Sequence[str], values: np.ndarray) -> tuple[str, Figure] | None:
    """Draw a model's profile: a bar per layer, input first (mean over seeds), and a dot per seed.

    Args:
        layers: names.
        values: criticality (seeds, layers) in [0, 1].
    """
    if not len(layers):
        return None
    mean, places = values.mean(axis=0), np.arange(len(layers))
    if len(layers) > MAX_NAMED:
        figure, axes = new_figure(2.3)
        axes.fill_between(places + 1, mean, step="mid", color=BLUE, alpha=0.7, linewidth=0)
        axes.set(xlabel="layers, from the input", xlim=(0.5, len(layers) + 0.5), ylim=(0, 1))
        axes.yaxis.set_major_formatter(percent)
    else:
        figure, axes = new_figure(0.6 + 0.17 * len(layers))
        axes.grid(axis="y", visible=False)
        axes.barh(places, mean, 0.66, color=BLUE, alpha=0.7)
        if len(values) > 1:
            axes.scatter(values.ravel(), np.tile(places, len(values)), s=6, color=INK, zorder=3, linewidths=0)
        axes.set_yticks(places, [short(name, 28) for name in layers])
        axes.set(xlim=(0, 1), ylim=(len(layers) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(percent)
    axes.set_title("Criticality of each layer")
    return "Layer criticality", figure


@svg_plot
def comparison_plot(layers: Sequence[str], names: Sequence[str], values: np.ndarray) -> tuple[str, Figure] | None:
    """Draw several profiles as a table of shades: a row per layer, input first, a column per checkpoint.

    Args:
        layers: names of the rows.
        names: of the columns.
        values: criticality (columns, layers) in [0, 1].
    """
    if not len(layers) or not len(names):
        return None
    named = len(layers) <= MAX_NAMED
    figure, axes = new_figure(0.8 + 0.17 * len(layers) if named else 4.0)
    axes.grid(False)
    height = 0.94 if named else 1.0
    boxes = [Rectangle((x + 0.03, y + 0.03), 0.94, height) for x in range(len(names)) for y in range(len(layers))]
    # Transparency alone tells the value, so that the picture suits a light and a dark page.
    alpha = 0.06 + 0.9 * np.clip(values.ravel(), 0, 1)
    axes.add_collection(PatchCollection(boxes, facecolor=BLUE, alpha=alpha, linewidth=0))
    if named and len(names) <= 8:
        for (x, y), value in np.ndenumerate(values):
            axes.text(x + 0.5, y + 0.55, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=INK)
    axes.set(xlim=(0, len(names)), ylim=(len(layers), 0))
    axes.set_xticks(np.arange(len(names)) + 0.5, [short(name, 14) for name in names])
    axes.set_yticks(
        np.arange(len(layers)) + 0.5 if named else [], [short(name, 28) for name in layers] if named else []
    )
    axes.tick_params(length=0)
    axes.set_title("Criticality in percent, input first")
    return "Criticality side by side", figure
