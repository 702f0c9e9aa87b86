"""The rank of what attention gives: a probe of every attention layer of a model.

Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention" (CVPR 2025), arXiv 2411.07635, section 3, and what its
authors say of the measurement (qhfan/RALA, issue 10): the features of a single head, (places, channels), and NumPy's
``matrix_rank``. That rank counts every direction above the rounding of float32; the effective rank of Roy and Vetterli
(EUSIPCO 2007), beside it, says among how many directions a matrix spreads what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vitrail.data.batches import Batches
from vitrail.errors import InputError
from vitrail.evaluate.suite import Result, evaluating
from vitrail.report.plots import AMBER, BLUE, new_figure, percent, short, svg_plot


def ranks(matrices: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """Return rank and effective rank of each matrix, (...) each.

    Args:
        matrices: (..., M, N), finite.
        tolerance: singular values up to this share of the largest count as zero; None is NumPy's: the larger of M and N
            times the rounding of float32.
    """
    values = torch.linalg.svdvals(matrices.float())
    if tolerance is None:
        tolerance = max(matrices.shape[-2:]) * torch.finfo(torch.float32).eps
    rank = (values > tolerance * values[..., :1]).sum(-1)
    shares = torch.nan_to_num(values / values.sum(-1, keepdim=True))  # a matrix of zeros has none
    return rank, torch.special.entr(shares).sum(-1).exp() * (rank > 0)


def run(model: nn.Module, data: Batches, *, tolerance: float | None = None) -> Result:
    """Measure, for every attention layer, the rank of its output features and of its KV buffer, per image and head.

    A layer with a method ``attention_features``, which takes what its ``forward`` takes and returns its buffer
    (B, n, d, e), or None, and its features (B, n, L, e), is asked. Of any other with ``num_heads`` and an output
    projection ``proj`` or ``out_proj``, the features are what the projection is given; windows count as images.

    Args:
        model: with attention; it is left as it was.
        data: images; their targets are not used.
        tolerance: as for ``ranks``, in [0, 1).

    Returns:
        A row per layer: ``layer``, ``kind``, ``heads``, ``places`` L, ``channels`` e, ``full`` (the largest rank that
        there can be), and means over images and heads: ``rank`` and ``effective`` of the features, ``kv_rank`` and
        ``kv_effective`` of the buffer, None where attention has none.

    Raises:
        InputError: a tolerance out of range, no attention layer, no images, or features that are no finite numbers.

    Example:
        >>> run(vitrail.load("runs/ravlt"), held_out).table[0]["effective"]          # doctest: +SKIP
    """
    if tolerance is not None and not 0 <= tolerance < 1:
        raise InputError(f"tolerance = {tolerance} is not allowed: give a share of the largest singular value, below 1")
    layers = _layers(model)
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no attention layer to probe: give a model whose layers have num_heads and an "
            "output projection, such as ravlt_t or a vision transformer"
        )
    tallies = {name: _Tally() for name in layers}
    hooks = [_attach(name, layer, tallies[name], tolerance) for name, layer in layers.items()]
    images = 0
    try:
        with evaluating(model):
            place = next(model.parameters())
            for batch, _ in data():
                images += len(batch)
                model(batch.to(place.device, place.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        raise InputError("the rank probe got no images: give at least one")
    seen = {name: tally for name, tally in tallies.items() if tally.features.count}  # some layers may be idle
    table = [_row(name, layers[name], tally) for name, tally in seen.items()]
    notes = [
        f"{images} images; ranks of single heads, means over images and heads.",
        "The rank counts the singular values above "
        + ("NumPy's tolerance in float32" if tolerance is None else f"{tolerance:g} of the largest")
        + "; the effective rank is the exponential of the entropy of their shares.",
    ]
    shares = [[row["effective"] / row["full"] for row in table]]
    if any(row["kv_effective"] is not None for row in table):
        shares.append([(row["kv_effective"] or 0.0) / row["channels"] for row in table])
    return Result("Rank of attention", table, {"Rank of attention": rank_plot(list(seen), shares)}, notes)


# ---- the layers ------------------------------------------------------------------------------------------------------


@dataclass
class _Mean:
    """Sums of ranks."""

    rank: float = 0.0
    effective: float = 0.0
    count: int = 0

    def add(self, matrices: Tensor, tolerance: float | None) -> None:
        rank, effective = ranks(matrices, tolerance)
        self.rank += float(rank.sum())
        self.effective += float(effective.double().sum())
        self.count += rank.numel()


@dataclass
class _Tally:
    """What was seen of a layer."""

    features: _Mean = field(default_factory=_Mean)
    buffer: _Mean = field(default_factory=_Mean)
    shape: tuple[int, int, int] = (0, 0, 0)
    """Heads, places and channels."""

    def add(self, name: str, buffer: Tensor | None, features: Tensor, tolerance: float | None) -> None:
        for matrices, mean in ((features, self.features), (buffer, self.buffer)):
            if matrices is None:
                continue
            if not matrices.isfinite().all():
                raise InputError(
                    f"what the attention of {name} gives is not finite: probe a model that has not diverged"
                )
            mean.add(matrices, tolerance)
        self.shape = tuple(features.shape[1:])  # type: ignore[assignment]


def _layers(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "attention_features")
        or (isinstance(getattr(module, "num_heads", None), int) and _projection(module) is not None)
    }


def _projection(layer: nn.Module) -> nn.Linear | None:
    for name in ("proj", "out_proj"):
        found = getattr(layer, name, None)
        if isinstance(found, nn.Linear):
            return found
    return None


def _attach(name: str, layer: Any, tally: _Tally, tolerance: float | None) -> Any:
    """Let a layer tell the tally what it gives; return the hook."""

    def ask(module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        buffer, features = module.attention_features(*args, **kwargs)
        tally.add(name, buffer, features, tolerance)

    def look(module: nn.Module, args: tuple[Any, ...], *, heads: int) -> None:
        features = args[0]  # (B, ..., C)
        tally.add(name, None, features.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2), tolerance)

    if hasattr(layer, "attention_features"):
        return layer.register_forward_pre_hook(ask, with_kwargs=True)
    projection: Any = _projection(layer)
    return projection.register_forward_pre_hook(partial(look, heads=layer.num_heads))


def _row(name: str, layer: nn.Module, tally: _Tally) -> dict[str, Any]:
    heads, places, channels = tally.shape
    kind, features, buffer = getattr(layer, "form", type(layer).__name__), tally.features, tally.buffer
    return {
        "layer": name,
        "kind": kind,
        "heads": heads,
        "places": places,
        "channels": channels,
        "full": min(places, channels),
        "rank": features.rank / features.count,
        "effective": features.effective / features.count,
        "kv_rank": buffer.rank / buffer.count if buffer.count else None,
        "kv_effective": buffer.effective / buffer.count if buffer.count else None,
    }


# ---- chart -----------------------------------------------------------------------------------------------------------


@svg_plot
def rank_plot(layers: Sequence[str], shares: Sequence[Sequence[float]]) -> tuple[str, Figure] | None:
    """Draw the effective ranks of a model's attention as shares of the full rank: bars per layer, input first.

    Args:
        layers: names.
        shares: of the features and, where any layer has a buffer, of the buffers; a number in [0, 1] per layer each.
    """
    if not layers:
        return None
    figure, axes = new_figure(0.8 + 0.2 * len(layers))
    axes.grid(axis="y", visible=False)
    places, thickness = np.arange(len(layers)), 0.7 / len(shares)
    for i, (values, colour, name) in enumerate(zip(shares, (BLUE, AMBER), ("output features", "KV buffer"))):
        axes.barh(places + (i - (len(shares) - 1) / 2) * thickness, values, thickness, color=colour, label=name)
    axes.set_yticks(places, [short(name, 28) for name in layers])
    axes.set(xlim=(0, 1), ylim=(len(layers) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(percent)
    axes.set_title("Effective rank, of the full rank")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04 - 0.6 / (4 + len(layers))), ncols=2)
    return "Rank of attention", figure
