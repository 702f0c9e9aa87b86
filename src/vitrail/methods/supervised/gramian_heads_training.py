"""Training several heads to be right each by itself, and unlike what they say together.

Ryu, Han and Lim, "Gramian Attention Heads are Strong yet Efficient Vision Learners" (ICCV 2023), arXiv 2310.16483, as
in the authors' code (Lab-LVM/imagenet-models).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.edits.gramian_heads import GramianHeads
from vitrail.errors import InputError
from vitrail.methods.method import Batch, Method, one_hot_targets
from vitrail.methods.supervised.supervised import supervised_loss


def gramian_head_losses(
    logits: Tensor, target: Tensor, *, smoothing: float = 0.0, bce: bool = False, multilabel: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the loss of the labels, summed over heads, and how far the heads are from what they say together.

    The second is the sum over heads of KL(p || p_k) / K, where p_k is what a head says and p, through which no gradient
    flows, the softmax of the heads' mean logits.

    Args:
        logits: (B, heads, K).
        target: class numbers (B,), or probabilities or multi-hot (B, K).
        smoothing: label smoothing, in [0, 1).
        bce: binary cross-entropy per class in place of cross-entropy, as the published nets were trained.
        multilabel: several labels per image: binary cross-entropy anyway.

    Returns:
        Two scalars, float32.
    """
    logits = logits.float()
    heads, classes = logits.shape[1:]
    if bce and not multilabel:
        # Smoothed over classes, as of one label.
        target = one_hot_targets(target, classes) * (1 - smoothing) + smoothing / classes
        smoothing = 0.0
    supervised = sum(
        supervised_loss(logits[:, k], target, smoothing=smoothing, multilabel=bce or multilabel) for k in range(heads)
    )
    together = logits.detach().mean(1, keepdim=True).log_softmax(-1).expand_as(logits)
    apart = F.kl_div(logits.log_softmax(-1), together, reduction="sum", log_target=True) / (len(logits) * classes)
    return supervised, apart  # type: ignore[return-value]


class GramianHeadTraining(Method):
    """Train the heads of ``model``, each on the labels, and decorrelate them.

    Args:
        model: with Gramian heads: ``ga_convnext_*``, or any after the edit ``ga_heads:gramian_heads``.
        decorrelation: lambda, the weight of the heads' distance from their mean answer, at most 0: below 0 they are
            driven apart. Published: -0.8.
        smoothing: label smoothing, in [0, 1); published: 0.1.
        bce: binary cross-entropy per class in place of cross-entropy; published: True.
        multilabel: several labels per image.

    Raises:
        InputError: an argument out of range, or a model without such heads.

    Example:
        vitrail fit --set model.name=ga_convnext_nano --set method.name=ga_heads:GramianHeadTraining
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decorrelation: float = -0.8,
        smoothing: float = 0.1,
        bce: bool = False,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model)
        if not (isinstance(decorrelation, int | float) and float("-inf") < decorrelation <= 0):
            raise InputError(f"method.options.decorrelation = {decorrelation!r} is not allowed: give 0 or less")
        if not (isinstance(smoothing, int | float) and 0 <= smoothing < 1):
            raise InputError(f"method.options.smoothing = {smoothing!r} is not allowed: give a number in [0, 1)")
        self._heads()  # refuse a model without heads now
        self.decorrelation, self.smoothing, self.bce, self.multilabel = decorrelation, smoothing, bce, multilabel

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``supervised`` and ``apart`` for ``image`` (B, 3, H, W) and ``target``."""
        heads = self._heads()
        heads.apart = True  # in here alone: all others find a model of one answer
        try:
            logits = self.model(batch["image"])
        finally:
            heads.apart = False
        supervised, apart = gramian_head_losses(
            logits, batch["target"], smoothing=self.smoothing, bce=self.bce, multilabel=self.multilabel
        )
        loss = supervised + self.decorrelation * apart
        return {"loss": loss, "supervised": supervised.detach(), "apart": apart.detach()}

    def _heads(self) -> GramianHeads:
        for module in self.model.modules():
            if isinstance(module, GramianHeads):
                return module
        raise InputError(
            f"GramianHeadTraining needs a model with Gramian heads, and {type(self.model).__name__} has none: use "
            "ga_convnext_*, or add the edit ga_heads:gramian_heads"
        )
