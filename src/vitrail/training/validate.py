"""Validation: every sample once, at any number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from vitrail.data.cache import PixelCache
from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import build_views
from vitrail.errors import RunError
from vitrail.methods.supervised.supervised import supervised_loss
from vitrail.runs import RunFolder
from vitrail.training.device import Normalise, create_accelerator, resolved
from vitrail.training.recipe import Recipe

if TYPE_CHECKING:
    from vitrail.data.index import Index


def pixel_cache(index: Index, recipe: Recipe, folder: RunFolder) -> PixelCache | None:
    """Open the run's cache of decoded images, shared by training, validation and all workers; None if it is off."""
    if not recipe.train.cache_mb:
        return None
    fingerprint = f"{recipe.data.model_dump_json()} {index.classes} {index.fingerprint}"
    return PixelCache(folder.cache / "pixels.bin", recipe.train.cache_mb, rows=len(index), fingerprint=fingerprint)


def validate(
    model: nn.Module,
    index: Index,
    preprocess: Preprocess,
    recipe: Recipe,
    rows: np.ndarray,
    *,
    accelerator: Accelerator | None = None,
    cache: PixelCache | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the logits of ``rows``, each once.

    The processes of ``accelerator`` share the work, and each gets the whole; without one this process does it alone.
    One float32 (N, C) is held in memory, which the figures need. Images that cannot be read are left out.

    Returns:
        Logits (N, C) float32, targets (N,) or (N, C) and rows (N,), sorted by row.
    """
    alone = accelerator is None
    accelerator = accelerator or create_accelerator(recipe)
    normalise = Normalise(preprocess, recipe.train.channels_last is True).to(accelerator.device)
    model.to(accelerator.device)
    loader = make_loader(
        index,
        rows,
        build_views({"image": "eval"}, preprocess, recipe.augment, recipe.data),
        batch_size=resolved(recipe.train.batch_size),
        shuffle=False,
        rank=0 if alone else accelerator.process_index,
        world=1 if alone else accelerator.num_processes,
        workers=resolved(recipe.train.workers),
        cache=cache,
    )
    parts = []
    was_training = model.training
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        for batch in loader:
            if len(batch["row"]):
                logits = model(normalise(batch["image"])).float().cpu().numpy()
                parts.append((logits, batch["target"].numpy(), batch["row"].numpy()))
    model.train(was_training)
    if not alone:
        parts = gather_object(parts)
    if not parts:
        raise RunError(f"none of the {len(rows)} validation images could be read; check that the data are still there")
    logits, targets, found = (np.concatenate(columns) for columns in zip(*parts))
    order = np.argsort(found)
    return logits[order], targets[order], found[order]


def figures(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return ``loss``, and ``top1`` for class numbers (N,) or ``map`` for multi-hot targets (N, C)."""
    multilabel = targets.ndim == 2
    loss = supervised_loss(torch.from_numpy(logits), torch.from_numpy(targets), multilabel=multilabel).item()
    if not multilabel:
        return {"loss": loss, "top1": float((logits.argmax(1) == targets).mean())}
    from sklearn.metrics import average_precision_score  # takes a second to import, and few runs need it

    present = targets.any(0)
    score = average_precision_score(targets[:, present], logits[:, present]) if present.any() else 0.0
    return {"loss": loss, "map": float(score)}
