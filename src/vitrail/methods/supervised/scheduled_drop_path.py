"""ScheduledDropPath: stochastic depth that grows with training, from nothing to what the model was built with.

Zoph, Vasudevan, Shlens, Le, "Learning Transferable Architectures for Scalable Image Recognition" (CVPR 2018), arXiv
1707.07012, and the authors' code (tensorflow/models, research/slim/nets/nasnet). A path is dropped with a probability
that grows linearly over the course of training and, in the code, with depth, which the model sees to.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import DropPath
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.supervised.supervised import Supervised


class ScheduledDropPath(Supervised):
    """Train ``model`` on labelled images, its stochastic depth growing linearly with the progress of training.

    Args:
        model: any with timm's ``DropPath``, built with ``drop_path_rate`` above 0: the rate at the end of training.
            Published for NASNet: 0.4 for small images, 0.3 for the large net and 0 for the mobile one.
        smoothing: label smoothing, in [0, 1).
        class_weights: one factor per class, or None.
        multilabel: several labels per image.

    Raises:
        InputError: a model without stochastic depth.

    Example:
        vitrail fit --set model.name=nasnet_nano --set model.drop_path_rate=0.4
        --set method.name=nasnet:ScheduledDropPath
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        smoothing: float = 0.1,
        class_weights: Sequence[float] | Tensor | None = None,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model, smoothing=smoothing, class_weights=class_weights, multilabel=multilabel)
        modules = (module for module in model.modules() if isinstance(module, DropPath))
        self._paths = [(module, float(module.drop_prob)) for module in modules if module.drop_prob]
        if not self._paths:
            raise InputError(
                f"ScheduledDropPath: {type(model).__name__} has no stochastic depth that could grow: set "
                "model.drop_path_rate, for example to 0.4, or use method.name='supervised'"
            )
        self.schedule(0.0)

    def schedule(self, progress: float) -> None:
        """Set the rates: their share of the last ones is the progress of training, from 0 to 1."""
        for module, rate in self._paths:
            module.drop_prob = rate * progress
