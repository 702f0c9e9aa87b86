"""The load of experts: how many tokens each is given, at each depth.

Xue et al., "Go Wider Instead of Deeper" (AAAI 2022), arXiv 2107.11817, share experts among all depths, which lean
on them differently. Works with every ``vitrail.layers.experts.MixtureOfExperts`` of a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vitrail.data.batches import Batches
from vitrail.errors import InputError
from vitrail.evaluate.suite import Result, evaluating
from vitrail.layers.experts import MixtureOfExperts, with_room
from vitrail.report.plots import new_figure, short, svg_plot


class _Load:
    """What one layer with experts was given, at each of its uses in a forward pass."""

    def __init__(self, layer: MixtureOfExperts) -> None:
        self.layer = layer
        self.use = 0
        self.sums: list[Tensor] = []

    def look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0].flatten(0, -2)
        routing = self.layer.route(tokens)
        chosen = routing.chosen
        late = chosen & ~with_room(chosen, self.layer.room(len(tokens)))
        found = torch.stack([chosen.double().sum(0), (routing.probabilities * chosen).double().sum(0), late.sum(0)])
        if self.use == len(self.sums):
            self.sums.append(torch.zeros_like(found))
        self.sums[self.use] += found
        self.use += 1


def run(model: nn.Module, data: Batches) -> Result:
    """Count, for every layer with experts and each of its uses, the tokens that each expert is given.

    Args:
        model: with experts, such as ``widenet_*``; it is left as it was.
        data: images; their targets are not used.

    Returns:
        A row per layer, use in a forward pass (``depth``, from 0) and ``expert``: its ``share`` of all choices, an even
        one being 1 over the number of experts; ``gate``, its mean probability where it is chosen; ``without_room``, the
        share of its tokens that training with batches such as these would turn away.

    Raises:
        InputError: a model without experts, or no images.

    Example:
        >>> run(vitrail.load("runs/widenet"), held_out).table[0]["share"]          # doctest: +SKIP
    """
    loads = {name: _Load(part) for name, part in model.named_modules() if isinstance(part, MixtureOfExperts)}
    if not loads:
        raise InputError(f"{type(model).__name__} has no experts: give a model such as widenet_nano")
    hooks = [load.layer.register_forward_pre_hook(load.look) for load in loads.values()]
    images = 0
    try:
        with evaluating(model):
            place = next(model.parameters())
            for batch, _ in data():
                images += len(batch)
                for load in loads.values():
                    load.use = 0
                model(batch.to(place.device, place.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        raise InputError("the load of experts cannot be told without images: give at least one")
    table = [
        {
            "layer": name,
            "depth": depth,
            "expert": expert,
            "share": float(tokens / sums[0].sum()),
            "gate": float(gate / max(tokens, 1)),
            "without_room": float(late / max(tokens, 1)),
        }
        for name, load in loads.items()
        for depth, sums in enumerate(load.sums)
        for expert, (tokens, gate, late) in enumerate(sums.T.tolist())
    ]
    notes = [f"{images} images. A token's choices count once each; 'without_room' depends on the size of batches."]
    return Result("Load of experts", table, {"Load of experts": load_plot(table)}, notes)


@svg_plot
def load_plot(table: list[dict[str, Any]]) -> tuple[str, Figure] | None:
    """Draw the share of each expert, a bar for each layer and depth, input first.

    Args:
        table: rows of ``run``.
    """
    if not table:
        return None
    uses = list(dict.fromkeys((row["layer"], row["depth"]) for row in table))
    figure, axes = new_figure(0.8 + 0.2 * len(uses))
    axes.grid(axis="y", visible=False)
    left = np.zeros(len(uses))
    for expert in sorted({row["expert"] for row in table}):
        shares = {(row["layer"], row["depth"]): row["share"] for row in table if row["expert"] == expert}
        widths = np.array([shares.get(use, 0.0) for use in uses])
        axes.barh(np.arange(len(uses)), widths, 0.7, left=left, label=f"expert {expert}", edgecolor="white")
        left += widths
    axes.set_yticks(np.arange(len(uses)), [short(f"{name}, depth {depth}", 28) for name, depth in uses])
    axes.set(xlim=(0, 1), ylim=(len(uses) - 0.4, -0.6))
    axes.set_title("Share of the tokens")
    return "Load of experts", figure
