"""Supervised training of nets whose nodes choose among spaces of activations: all spaces first, then the chosen ones.

Yang et al., "Activation Space Selectable Kolmogorov-Arnold Networks" (2024), arXiv 2408.08338.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.selectable_kan import SelectableKAN, select
from vitrail.methods.supervised.supervised import Supervised


class SelectiveTraining(Supervised):
    """Train ``model`` on labelled images; in the middle of it every node keeps the space of its largest share.

    What was not chosen has no part in the model any more, and goes when it is exported.

    Args:
        model: with layers ``vitrail.layers.selectable_kan.SelectableKAN``.
        full: share of the training with all spaces, in [0, 1].
        smoothing: label smoothing, in [0, 1).
        class_weights: one factor per class, or None.
        multilabel: several labels per image.

    Raises:
        InputError: a model without such layers, or an option out of range.

    Example:
        vitrail fit --set model.name=sconvkan_nano --set method.name=skan:SelectiveTraining
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        full: float = 0.5,
        smoothing: float = 0.1,
        class_weights: Sequence[float] | Tensor | None = None,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model, smoothing=smoothing, class_weights=class_weights, multilabel=multilabel)
        if not 0 <= full <= 1:
            raise InputError(f"method.options.full = {full} is not allowed: give a share from 0 to 1, such as 0.5")
        if not any(isinstance(module, SelectableKAN) for module in model.modules()):
            raise InputError(
                f"this training needs layers with selectable activations, and {type(model).__name__} has none: set "
                "model.name to sconvkan_nano, or add the edit skan"
            )
        self.full = full

    def schedule(self, progress: float) -> None:
        """Let the nodes choose once the share of full training is over."""
        if progress >= self.full:
            select(self.model)
