"""The training of LookupViT: the classifiers of both sets of tokens learn the label, each for itself.

Koner, Jain, Jain, Tresp, Paul, "LookupViT: Compressing visual information to a limited number of tokens" (ECCV 2024),
arXiv 2407.12753. The net is ``vitrail.models.lookupvit``; it draws the number of compressed tokens of a batch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.method import Batch
from vitrail.methods.supervised.supervised import Supervised, supervised_loss


class LookupTraining(Supervised):
    """Train both classifiers of a LookupViT on labelled images; ``loss`` is the mean of theirs.

    Args:
        model: with ``both``, as ``vitrail.models.lookupvit`` has it.
        smoothing: label smoothing, in [0, 1).
        class_weights: one factor per class, or None.
        multilabel: several labels per image.

    Raises:
        InputError: a model with one classifier, or an option out of range.

    Example:
        vitrail fit --set model.name=lookupvit_nano --set 'model.options.train_compressed=[[2,2],[3,3],[4,4]]'
        --set method.name=lookupvit:LookupTraining
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
        if not hasattr(model, "both"):
            raise InputError(
                f"this training needs a model with a classifier of each set of tokens, and {type(model).__name__} has "
                "one classifier: set model.name to lookupvit_nano or another lookupvit_*, or use "
                "method.name='supervised'"
            )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``compressed`` and ``lookup`` for ``image`` (B, 3, H, W) and ``target``."""
        model: Any = self.model
        compressed, lookup = (
            supervised_loss(
                logits,
                batch["target"],
                smoothing=self.smoothing,
                class_weights=self.class_weights,
                multilabel=self.multilabel,
            )
            for logits in model.both(model.forward_features(batch["image"]))
        )
        return {"loss": (compressed + lookup) / 2, "compressed": compressed.detach(), "lookup": lookup.detach()}
