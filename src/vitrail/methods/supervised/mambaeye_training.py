"""The training of MambaEye: an answer is asked for after every patch, and surer ones the more has been seen.

Choi, Kim and Kim, "MambaEye: A Size-Agnostic Visual Encoder with Causal Sequential Processing" (CVPR 2026 Findings),
arXiv 2511.19963, and the authors' code (usingcolor/MambaEye). As in diffusion, what is to be predicted goes from noise,
all classes alike, to the label. The net is ``vitrail.models.mambaeye``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.methods.method import Batch, Method, one_hot_targets
from vitrail.models.mambaeye import cut, moves_between, seen_share, tiles

SUPERVISION = ("hardening", "label", "last")


def stepwise_loss(logits: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Return the cross-entropy with targets that harden, a mean over images and steps.

    The target of a step that has seen the share t of an image is t y + (1 - t) / C.

    Args:
        logits: after each step, (B, L, C), any floating type; the loss is computed in float32 at least.
        target: class numbers (B,) or probabilities (B, C): y.
        share: t, in [0, 1], (L,) or (B, L); one everywhere asks for the label after every step.

    Returns:
        A scalar.

    Raises:
        InputError: shapes that do not go together.
    """
    fits = logits.ndim == 3 and share.shape in (logits.shape[1:2], logits.shape[:2])
    if not fits or target.shape not in (logits.shape[:1], (len(logits), logits.shape[2])):
        raise InputError(
            f"logits {tuple(logits.shape)}, targets {tuple(target.shape)} and shares {tuple(share.shape)} do not go "
            "together: give (B, L, C), (B,) or (B, C), and (L,) or (B, L)"
        )
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(2)
    label = one_hot_targets(target, logits.shape[2]).to(log_p).unsqueeze(1)  # (B, 1, C)
    share = share.to(log_p).expand(logits.shape[:2])
    return -(share * (label * log_p).sum(2) + (1 - share) * log_p.mean(2)).mean()


def draw_positions(height: int, width: int, patch: int, steps: int, rng: np.random.Generator) -> Tensor:
    """Return ``steps`` positions of patches anywhere inside an image, any twice, (L, 2)."""
    return torch.from_numpy(rng.integers(0, (height - patch + 1, width - patch + 1), (steps, 2)))


class MambaEyeTraining(Method):
    """Train a MambaEye on random walks, each step asked for an answer.

    Every image is walked over in a way of its own, drawn anew for each step of the optimiser, in patches that may lie
    anywhere and over each other, as published.

    Args:
        model: a MambaEye, or another with its ``forward_walk`` and ``patch_size``.
        steps: patches of a walk; None is as many as would tile the image. Published: 1024, then 2048.
        sides: smallest and largest side in pixels that the images of a batch are resized to, drawn for each batch;
            None leaves them. Published: 256 to 1024, drawn for each image.
        supervision: what a step is asked for: ``"hardening"``, a target between all classes alike and the label by the
            share of the image that it has seen, as published; ``"label"``, the label after every step; ``"last"``, the
            label after the last step alone.
        multilabel: refused, as the loss is of one label per image.

    Raises:
        InputError: a model that does not walk, or an option out of range.
    """

    seed: Tensor
    batches: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int | None = None,
        sides: tuple[int, int] | None = None,
        supervision: str = "hardening",
        multilabel: bool = False,
    ) -> None:
        super().__init__(model)
        if not hasattr(model, "forward_walk"):
            raise InputError(
                f"the training of MambaEye needs a model that walks, and {type(model).__name__} has no forward_walk: "
                "set model.name to one of mambaeye_nano, mambaeye_tiny, mambaeye_small and mambaeye_base"
            )
        if multilabel:
            raise InputError(
                "the training of MambaEye is for one label per image, and these data have several: use "
                "method.name='supervised'"
            )
        if supervision not in SUPERVISION:
            raise InputError(
                f"method.options.supervision = {supervision!r} is not allowed: give one of {', '.join(SUPERVISION)}"
            )
        if steps is not None and steps < 1:
            raise InputError(f"method.options.steps = {steps} is not allowed: give 1 or more, or leave it out")
        if sides is not None and not (len(sides) == 2 and 1 <= sides[0] <= sides[1]):
            raise InputError(
                f"method.options.sides = {sides} is not allowed: give the smallest and the largest side in pixels"
            )
        self.steps, self.sides, self.supervision = steps, sides, supervision
        # In the state, so that a run that was interrupted goes on with the walks that it would have had.
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` for ``image`` (B, 3, H, W), ``target`` and ``row``."""
        key = (int(self.seed), int(self.batches))
        images, target = self._resized(batch["image"], np.random.default_rng(key)), batch["target"]
        model: Any = self.model
        patch = model.patch_size
        height, width = images.shape[-2:]
        steps = self.steps or len(tiles(height, width, patch))
        # By the row of an image, and not by its place in the batch: it walks alike in any process.
        drawn = (np.random.default_rng((*key, row)) for row in batch["row"].tolist())
        walks = [draw_positions(height, width, patch, steps, rng) for rng in drawn]
        positions = torch.stack(walks).to(images.device)
        logits = model.forward_walk(cut(images, positions, patch), moves_between(positions))
        if self.supervision == "last":
            logits, share = logits[:, -1:], torch.ones(1, device=logits.device)
        elif self.supervision == "label":
            share = torch.ones(steps, device=logits.device)
        else:
            share = seen_share(positions, height, width, patch)
        return {"loss": stepwise_loss(logits, target, share)}

    def after_step(self) -> None:
        """Go on to other walks."""
        self.batches += 1

    def _resized(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Return the images with their longer side as drawn, and with no side below a patch's."""
        if self.sides is not None:
            height, width = images.shape[-2:]
            side = int(rng.integers(self.sides[0], self.sides[1] + 1))
            size = [max(1, round(part * side / max(height, width))) for part in (height, width)]
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        patch: Any = self.model.patch_size
        return F.pad(images, (0, max(patch - images.shape[3], 0), 0, max(patch - images.shape[2], 0)))
