"""Supervised training of nets of Kolmogorov-Arnold convolutions, with penalties on what their layers say and weigh.

Drokin, "Kolmogorov-Arnold Convolutions: Design Principles and Empirical Studies" (2024), arXiv 2407.01092. Its balance
loss for experts is that of Shazeer et al. (2017), ``vitrail.layers.kan_layers.imbalance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.kan_layers import (
    BottleneckKANConv,
    BottleneckKANExperts,
    KANConv,
    Router,
    TunedKANConv,
    imbalance,
)
from vitrail.methods.method import Batch
from vitrail.methods.supervised.supervised import Supervised


class KANRegularised(Supervised):
    """Train ``model`` on labelled images, with penalties on its Kolmogorov-Arnold layers.

    To the supervised loss are added, each summed over layers and times its option: the mean absolute value and the mean
    square of what a layer returns; the sum of the absolute values of its weights; and of layers with experts, how
    unevenly the batch used them. The last is of the whole batch and no mean over images.

    Args:
        model: with layers of ``vitrail.layers.kan_layers``.
        activation_l1, activation_l2, weight_l1: 0 or more.
        balance: 0 or more; published: 0.01.
        smoothing: label smoothing, in [0, 1).
        class_weights: one factor per class, or None.
        multilabel: several labels per image.

    Raises:
        InputError: a model without such layers, or an option out of range.

    Example:
        vitrail fit --set model.name=kan_vgg_nano --set method.name=kan_conv:KANRegularised
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        activation_l1: float = 1e-4,
        activation_l2: float = 0.0,
        weight_l1: float = 1e-8,
        balance: float = 0.01,
        smoothing: float = 0.1,
        class_weights: Sequence[float] | Tensor | None = None,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model, smoothing=smoothing, class_weights=class_weights, multilabel=multilabel)
        self.factors = {
            "activation_l1": activation_l1,
            "activation_l2": activation_l2,
            "weight_l1": weight_l1,
            "balance": balance,
        }
        for name, value in self.factors.items():
            if not value >= 0:
                raise InputError(f"method.options.{name} = {value} is not allowed: give 0 or more, such as 1e-6")
        self.layers = _outermost(model)
        if not self.layers:
            raise InputError(
                f"this training needs Kolmogorov-Arnold layers, and {type(model).__name__} has none: set model.name to "
                "kan_vgg_nano or another of kan_conv's, or add the edit kan_conv"
            )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``supervised``, ``activation_l1`` and those of the other options."""
        said: list[Tensor] = []
        routed: list[tuple[Tensor, Tensor]] = []
        hooks = [layer.register_forward_hook(lambda _, __, output: said.append(output)) for layer in self.layers]
        routers = [module for module in self.model.modules() if isinstance(module, Router)]
        hooks += [router.register_forward_hook(lambda _, __, output: routed.append(output)) for router in routers]
        try:
            terms = super().loss(batch)
        finally:
            for hook in hooks:
                hook.remove()
        found: dict[str, Any] = {
            "activation_l1": sum(output.float().abs().mean() for output in said),
            "activation_l2": sum(output.float().square().mean() for output in said),
            "weight_l1": sum(p.float().abs().sum() for layer in self.layers for p in layer.parameters()),
        }
        if routed:
            found["balance"] = sum(imbalance(*output) for output in routed)
        supervised = terms["loss"]
        loss = supervised + sum(self.factors[name] * value for name, value in found.items())
        return {"loss": loss, "supervised": supervised.detach(), **{k: v.detach() for k, v in found.items()}}


def _outermost(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the layers that are not inside another; a tuple, so that they are the model's parts and not ours."""
    kinds = (KANConv, BottleneckKANConv, BottleneckKANExperts, TunedKANConv)
    found = [module for module in model.modules() if isinstance(module, kinds)]
    inside = {part for layer in found for part in layer.modules() if part is not layer}
    return tuple(layer for layer in found if layer not in inside)
