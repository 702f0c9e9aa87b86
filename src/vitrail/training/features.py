"""A head start: train the classifier alone on features of the frozen backbone, computed once.

A pretrained backbone sees each image once (and once mirrored, if time allows); its features go to a memory-mapped file,
and many epochs of the linear head on them cost less than one more pass of the backbone. Finetuning then starts from a
classifier that fits, and its first gradients do not spoil the backbone (Kumar et al., "Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution", 2022).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.data.index import Index
from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import EvalView
from vitrail.errors import InputError, RunError
from vitrail.methods.supervised.supervised import supervised_loss
from vitrail.runs import read_json, write_json
from vitrail.training.device import Normalise

WEIGHT_DECAYS = (0.03, 0.3, 1.0, 3.0)
"""Decoupled decays among which held-out training rows choose; on 4,500 clip-art images 1 to 3 were best."""
LEARNING_RATE = 0.01
BATCH = 256
EPOCHS = 40
MOST_SAMPLES = 400_000
"""Bound of the samples that one training of the head sees, so that large sets stay within seconds."""
EXTRACTION_SHARE = 0.8
"""Of the seconds; the rest trains the head."""


@dataclass(frozen=True)
class HeadStart:
    """What the head start did.

    Attributes:
        images: rows whose features were computed.
        views: passes over them: 1, or 2 with mirrored images.
        seconds: in all.
        weight_decay: chosen on held-out rows of the training split.
        holdout_loss: of those rows, by a head that did not see them.
        holdout_top1: likewise; NaN with several labels per image.
        reused: whether the features of an earlier, identical call were used.
    """

    images: int
    views: int
    seconds: float
    weight_decay: float
    holdout_loss: float
    holdout_top1: float
    reused: bool

    def __str__(self) -> str:
        seen = f"{self.images} images" + (" and their mirror images" if self.views == 2 else "")
        top1 = "" if math.isnan(self.holdout_top1) else f", top-1 {self.holdout_top1:.1%} on held-out training images"
        return f"head start on the features of {seen} in {self.seconds:.0f} s{top1}"


def warm_start_head(
    model: nn.Module,
    index: Index,
    rows: np.ndarray,
    preprocess: Preprocess,
    *,
    seconds: float,
    seed: int,
    folder: str | Path,
    precision: str = "fp32",
    channels_last: bool = False,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = 100_000_000,
    mirror: bool = True,
    workers: int = 0,
    max_bytes: int = 2**31,
) -> HeadStart:
    """Train the linear classifier of ``model`` on cached features and write its weights, in place.

    The backbone is not changed. The same features give the same weights for the same ``seed``. An interrupted call
    starts again; a finished one with the same arguments reuses its features.

    Args:
        model: with timm's surface; ``get_classifier()`` is an ``nn.Linear``.
        index: the data.
        rows: training rows, int64 (N,).
        preprocess: of evaluation.
        seconds: bound of the whole; the rows are taken in random order until most of it is spent.
        seed: of order and initial weights.
        folder: where ``features.npy`` and ``features.json`` go.
        precision: of autocast in the backbone; the head is trained in float32.
        channels_last: layout of the backbone's input.
        background, max_pixels: as in the recipe's ``data`` section.
        mirror: also take mirrored images, if time allows.
        workers: processes that decode.
        max_bytes: bound of the file of features; fewer rows are taken if it would be larger.

    Raises:
        InputError: the classifier is not linear, or there are no rows.
        RunError: the backbone gives features that are not finite.
    """
    started = time.monotonic()
    surface: Any = model
    head = surface.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"train.head_start needs a linear classifier, and that of {type(model).__name__} is "
            f"{type(head).__name__}: set train.head_start=0"
        )
    if not len(rows):
        raise InputError("train.head_start got no training images: set train.head_start=0, or give more images")
    order = np.random.default_rng(seed).permutation(rows)[: max(2, max_bytes // (4 * head.in_features))]
    store = _Store(Path(folder), head.in_features, len(order), 1 + mirror)
    # Features belong to these pixels and this backbone, so the key holds a sum over all weights.
    own = {id(parameter) for parameter in head.parameters()}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and id(t) not in own]
    key = {
        "model": type(model).__name__,
        "weights": sum(float(tensor.detach().double().abs().sum()) for tensor in tensors),
        "rows": [int(order[0]), int(order[-1]), len(order)],
        "preprocess": preprocess.to_dict(),
        "precision": precision,
        "seed": seed,
        "mirror": mirror,
    }
    reused = store.load(key)
    if not reused:
        _extract(
            model,
            index,
            order,
            store,
            EvalView(preprocess, background=background, max_pixels=max_pixels),
            end=started + EXTRACTION_SHARE * seconds,
            precision=precision,
            channels_last=channels_last,
            workers=workers,
        )
        store.finish(key)
    targets = torch.as_tensor(index.targets(store.rows))
    decay, loss, top1 = _fit(head, store, targets, index.multilabel, seed, end=started + seconds)
    spent = time.monotonic() - started
    return HeadStart(len(store.rows), store.views, spent, decay, loss, top1, reused)


class _Store:
    """Features of the first ``count`` rows of an order, one block per view, in a memory-mapped file of float16."""

    def __init__(self, folder: Path, width: int, rows: int, views: int) -> None:
        self.folder, self.shape = folder, (views, rows, width)
        self.rows = np.zeros(0, np.int64)
        self.views = 0
        self.features = np.zeros((0, 0, width), np.float16)

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "features.json").unlink(missing_ok=True)
        self.features = np.lib.format.open_memmap(
            self.folder / "features.npy", mode="w+", dtype=np.float16, shape=self.shape
        )

    def finish(self, key: dict[str, Any]) -> None:
        cast(np.memmap, self.features).flush()
        write_json(self.folder / "features.json", {"key": key, "rows": self.rows.tolist(), "views": self.views})

    def load(self, key: dict[str, Any]) -> bool:
        try:
            known = read_json(self.folder / "features.json")
            if known["key"] != json.loads(json.dumps(key)):
                return False
            self.features = np.load(self.folder / "features.npy", mmap_mode="r")
            self.rows, self.views = np.asarray(known["rows"], np.int64), int(known["views"])
        except (RunError, OSError, ValueError, KeyError, TypeError):
            return False
        return self.features.shape == self.shape

    def batch(self, view: np.ndarray, place: np.ndarray) -> Tensor:
        return torch.from_numpy(self.features[view, place].astype(np.float32))  # (B, D)


@torch.no_grad()
def _extract(
    model: nn.Module,
    index: Index,
    order: np.ndarray,
    store: _Store,
    view: EvalView,
    *,
    end: float,
    precision: str,
    channels_last: bool,
    workers: int,
) -> None:
    device = next(model.parameters()).device
    autocast = torch.autocast(
        device.type, {"bf16": torch.bfloat16}.get(precision, torch.float16), enabled=precision != "fp32"
    )
    normalise = Normalise(view.preprocess, channels_last).to(device)
    features = _pooled(model)
    training = model.training
    model.eval()
    store.open()
    kept: list[int] = []
    for number in range(store.shape[0]):
        # The mirrored pass covers the rows of the first, so that both blocks of the file are aligned.
        rows = order if number == 0 else np.asarray(kept, np.int64)
        loader = make_loader(index, rows, {"image": view}, batch_size=64, shuffle=False, workers=workers)
        done = 0
        for batch in loader:
            count = len(batch["row"])
            if count:
                images = normalise(torch.as_tensor(batch["image"]).to(device))
                with autocast:
                    found = features(images.flip(-1) if number else images).float().cpu()
                if not torch.isfinite(found).all():
                    raise RunError(
                        "the backbone gives features that are not finite: set train.precision='fp32', or choose "
                        "other weights with model.pretrained"
                    )
                store.features[number, done : done + count] = found.clamp(-65504, 65504).numpy()
                done += count
                if number == 0:
                    kept += np.asarray(batch["row"]).tolist()
            if time.monotonic() > end and done >= 2:
                break
        if number == 0:
            store.rows, store.views = np.asarray(kept, np.int64), 1
        elif done == len(kept):
            store.views = 2
        if time.monotonic() > end:
            break
    model.train(training)


def _pooled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function from images to the classifier's input (B, D)."""
    module: Any = model
    return lambda images: module.forward_head(module.forward_features(images), pre_logits=True)


def _fit(
    head: nn.Linear, store: _Store, targets: Tensor, multilabel: bool, seed: int, end: float
) -> tuple[float, float, float]:
    """Choose the weight decay on held-out rows, train on all, write into ``head``: decay, held-out loss and top-1."""
    count = len(store.rows)
    places = np.random.default_rng(seed).permutation(count)
    held, rest = places[: count // 5], places[count // 5 :]
    mean, scale = _statistics(store, rest if len(rest) else places)
    best = (math.inf, math.nan, WEIGHT_DECAYS[len(WEIGHT_DECAYS) // 2])
    started = time.monotonic()
    for decay in WEIGHT_DECAYS if len(held) and len(rest) else ():
        # One more candidate and the final training, each about as long as one so far, must fit.
        if best[0] < math.inf and time.monotonic() + 2.5 * (time.monotonic() - started) > end:
            break
        started = time.monotonic()
        trial = _train(store, targets, rest, mean, scale, head.out_features, decay, multilabel, seed)
        loss, top1 = _score(trial, store, targets, held, mean, scale, multilabel)
        if loss < best[0]:
            best = (loss, top1, decay)
    loss, top1, decay = best
    linear = _train(store, targets, places, mean, scale, head.out_features, decay, multilabel, seed)
    with torch.no_grad():
        weight = linear.weight / scale
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(linear.bias - weight @ mean)
    return decay, loss, top1


def _statistics(store: _Store, places: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the overall deviation (), from at most 4,096 rows."""
    some = store.batch(np.zeros(min(len(places), 4096), np.int64), places[:4096])
    mean = some.mean(0)
    # One scale for all features: dividing each by its own would blow up those that hardly vary.
    return mean, (some - mean).square().mean().sqrt().clamp_min(1e-6)


def _train(
    store: _Store,
    targets: Tensor,
    places: np.ndarray,
    mean: Tensor,
    scale: Tensor,
    classes: int,
    decay: float,
    multilabel: bool,
    seed: int,
) -> nn.Linear:
    rng = np.random.default_rng(seed)
    linear = nn.Linear(len(mean), classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=LEARNING_RATE, weight_decay=decay)
    batch = min(BATCH, max(8, len(places) // 16), len(places))  # small sets need steps more than large batches
    steps = max(1, min(EPOCHS * len(places), MOST_SAMPLES) // batch)
    stream = np.zeros(0, np.int64)
    for step in range(steps):
        if len(stream) < batch:
            stream = np.concatenate([stream, rng.permutation(places)])
        chosen, stream = stream[:batch], stream[batch:]
        rate = min(1.0, (step + 1) / (0.05 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        inputs = (store.batch(rng.integers(store.views, size=batch), chosen) - mean) / scale
        loss = supervised_loss(linear(inputs), targets[torch.from_numpy(chosen)], multilabel=multilabel)
        optimizer.zero_grad()
        # The binary loss is a mean over the classes; summed, its gradients do not shrink with their number.
        (loss * (classes if multilabel else 1)).backward()
        optimizer.step()
    return linear


@torch.no_grad()
def _score(
    linear: nn.Linear, store: _Store, targets: Tensor, places: np.ndarray, mean: Tensor, scale: Tensor, multilabel: bool
) -> tuple[float, float]:
    total = hits = 0.0
    for start in range(0, len(places), 4096):
        some = places[start : start + 4096]
        logits = linear((store.batch(np.zeros(len(some), np.int64), some) - mean) / scale)
        truth = targets[torch.from_numpy(some)]
        total += float(supervised_loss(logits, truth, multilabel=multilabel)) * len(some)
        hits += math.nan if multilabel else float((logits.argmax(-1) == truth).sum())
    return total / len(places), hits / len(places)
