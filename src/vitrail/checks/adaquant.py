"""AdaQuant: 4-bit weights and activations without training, against min-max and learned rounding.

Own networks are judged by accuracy on held-out images. For the pretrained EfficientNet-Lite0 there are no ImageNet
images here: on clip art its answers are compared with those of the float network, which says how far quantisation moves
them and not how accurate they are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vitrail.checks.check import BUNDLED, Context, Finding, Verdict, paired
from vitrail.compress.adaquant import compress
from vitrail.compress.compressor import Budget
from vitrail.data.batches import Batches
from vitrail.data.decode import UnreadableImage, decode
from vitrail.data.preprocess import Preprocess
from vitrail.errors import DataError, MissingExtra
from vitrail.models import create_model
from vitrail.models.pretrained import load_pretrained

ANY = Budget(bytes=1e12)
LAYERWISE: dict[str, dict[str, Any]] = {
    "min-max": {"layerwise": "none", "retune_norms": False, "bias_steps": 0},
    "AdaRound": {"layerwise": "adaround", "retune_norms": False, "bias_steps": 0},
    "AdaQuant": {"layerwise": "adaquant", "retune_norms": False, "bias_steps": 0},
}
TUNED: dict[str, Any] = {"layerwise": "adaquant", "order": "sequential", "retune_norms": True, "bias_steps": 100}
FLOAT = "float, less one point"


def run(ctx: Context) -> Verdict:
    """Quantise networks of several seeds by every method and compare them."""
    images, steps = (16, 2) if ctx.quick else (256, 100)
    networks = ("digits",) if ctx.quick or ctx.data is not None else ("digits", "fashion")
    settings: dict[str, dict[str, Any]] = {
        "digits": {"train.epochs": 0.1 if ctx.quick else 10.0},
        "fashion": {"train.epochs": 0.2, "model.name": "small_resnet_micro"},
    }
    scores: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    mixed: dict[str, list[float]] = defaultdict(list)
    sizes: dict[int, list[float]] = defaultdict(list)
    for name in networks:
        index = ctx.index(name)
        for seed in ctx.seeds:
            arm = ctx.train(index, name, seed, settings[name])
            held_out = _kept(ctx.held_out(index, arm.preprocess, most=200 if ctx.quick else 2000))
            calibration = _kept(ctx.training_images(index, arm.preprocess, most=images))
            options: dict[str, Any] = {"keep_edges": True, "steps": steps, "batch_size": 32, "seed": seed}
            exact = _accuracy(arm.model, held_out)
            for bits in (4,) if ctx.quick or name == "fashion" else (8, 4, 3):
                ctx.tell(f"{name}, seed {seed}, {bits} bits")
                found = scores[name, bits]
                found[FLOAT].append(exact - 0.01)
                tuned = {**TUNED, "bias_steps": 2} if ctx.quick else TUNED
                arms = {**LAYERWISE, "AdaQuant, tuned": tuned} if bits == 4 else LAYERWISE
                for method, how in arms.items():
                    model = compress(arm.model, calibration, ANY, bits=(bits,), **options, **how).model
                    found[method].append(_accuracy(model, held_out))
            if name == networks[0]:
                _mixed(arm.model, calibration, held_out, mixed, seed, (8, 4, 2) if ctx.quick else (8, 6, 4, 3, 2))
                for size in (8,) if ctx.quick else (16, 64, 1024):
                    ctx.tell(f"{name}, seed {seed}, {size} calibration images")
                    few = _kept(ctx.training_images(index, arm.preprocess, most=size))
                    model = compress(arm.model, few, ANY, bits=(4,), **options, **LAYERWISE["AdaQuant"]).model
                    sizes[size].append(_accuracy(model, held_out))
    if not ctx.quick:
        sizes[images] = scores[networks[0], 4]["AdaQuant"]
    notes = [
        f"Layers are optimised for {steps} steps on {images} images (the paper: 1,000 steps, 1,000 images); first and "
        "last layer have 8 bits. The tuned arm is sequential, with batch-norm and bias tuning."
    ]
    tables = {
        "top-1 by calibration images, AdaQuant at 4 bits": [
            {"images": size, "top-1": round(float(np.mean(values)), 4)} for size, values in sorted(sizes.items())
        ]
    }
    if not ctx.quick:
        try:
            tables["EfficientNet-Lite0 against itself in float"] = _pretrained(ctx)
            notes.append(
                "EfficientNet-Lite0 with ImageNet weights, at 64 pixels on clip art, 30 steps, one draw of images: the "
                "share of images with the same answer as in float, and the error of the logits over their deviation."
            )
        except (DataError, MissingExtra) as error:
            notes.append(f"EfficientNet-Lite0 was left out: {error}")
    return Verdict(_findings(scores, mixed), notes, tables)


def _findings(scores: dict[tuple[str, int], dict[str, list[float]]], mixed: dict[str, list[float]]) -> list[Finding]:
    quantity = "top-1 on held-out images, a share"
    findings = []
    for ours, against, bits, claim in (
        ("AdaQuant, tuned", FLOAT, 4, "With 4 bits in all layers but two, AdaQuant loses less than one point"),
        ("AdaQuant", "min-max", 4, "At 4 bits AdaQuant is more accurate than min-max"),
        ("AdaQuant", "AdaRound", 4, "At 4 bits AdaQuant is more accurate than learned rounding"),
        ("AdaQuant, tuned", "AdaQuant", 4, "Sequential order, batch-norm and bias tuning add accuracy"),
        ("AdaQuant", "min-max", 3, "At 3 bits AdaQuant is more accurate than min-max"),
        ("AdaQuant", "AdaRound", 3, "At 3 bits AdaQuant is more accurate than learned rounding"),
        ("AdaQuant", "min-max", 8, "At 8 bits AdaQuant is more accurate than min-max"),
    ):
        findings += [
            paired(f"{claim}: {name}.", quantity, arms, ours=ours, against=against)
            for (name, width), arms in scores.items()
            if width == bits
        ]
    claim = "The integer programme's mixed bits are more accurate than 4 bits in all layers, at equal bytes."
    findings.append(paired(claim, quantity, mixed, ours="integer programme", against="4 bits"))
    return findings


def _mixed(
    model: nn.Module,
    calibration: Batches,
    held_out: Batches,
    arms: dict[str, list[float]],
    seed: int,
    bits: tuple[int, ...],
) -> None:
    """Compare the paper's light pipeline, bits by integer programme and batch-norm tuning alone, with uniform bits."""
    light: dict[str, Any] = {"layerwise": "none", "bias_steps": 0, "seed": seed}
    uniform = compress(model, calibration, ANY, bits=(4,), **light)
    mixed = compress(model, calibration, Budget(bytes=uniform.report["bytes"]), bits=bits, **light)
    arms["4 bits"].append(_accuracy(uniform.model, held_out))
    arms["integer programme"].append(_accuracy(mixed.model, held_out))


def _pretrained(ctx: Context, side: int = 64) -> list[dict[str, Any]]:
    """Return how EfficientNet-Lite0's answers move, by bits and method."""
    name = "tf_efficientnet_lite0"
    model = create_model(name, num_classes=1000).eval()
    load_pretrained(model, name, "package")
    preprocess = Preprocess((side, side), "squash", 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3, (255, 255, 255))
    if ctx.data is None:
        root, package = BUNDLED["clipart"] or ("", "")
        files = sorted(Path(root).rglob("*.png"))
        if len(files) < 256:
            raise DataError(f"it needs the Debian package {package}, which is not installed")
        readable = _readable(files[number] for number in np.random.default_rng(0).permutation(len(files)))
        pixels = np.stack([preprocess(image) for image in itertools.islice(readable, 256)])
        images = torch.from_numpy(preprocess.normalise(pixels))
    else:
        images = torch.cat([part for part, _ in ctx.held_out(ctx.index(), preprocess, most=256)()])
        if len(images) < 128:
            raise DataError(f"it needs 128 held-out images, and the data have {len(images)}")
    with torch.no_grad():
        exact = torch.cat([model(part) for part in images.split(32)])
    answers = exact.argmax(1)
    calibration, held_out = _batches(images[:64], answers[:64]), _batches(images[64:], answers[64:])
    rows = []
    for bits in (8, 4, 3):
        for method, how in LAYERWISE.items():
            ctx.tell(f"{name}, {bits} bits, {method}")
            options: dict[str, Any] = {"keep_edges": True, "steps": 30, "batch_size": 16, **how}
            quantised = compress(model, calibration, ANY, bits=(bits,), **options).model
            with torch.no_grad():
                logits = torch.cat([quantised(part) for part, _ in held_out()])
            error = (logits - exact[64:]).pow(2).mean().sqrt() / exact[64:].std()
            agreement = float((logits.argmax(1) == answers[64:]).float().mean())
            rows.append({"bits": bits, "method": method, "agreement": agreement, "logit error": float(error)})
    return rows


def _readable(files: Iterable[Path]) -> Iterator[Image.Image]:
    for file in files:
        with contextlib.suppress(UnreadableImage):  # some pieces of the clip art are larger than is decoded
            yield decode(file.read_bytes())


def _batches(images: torch.Tensor, target: torch.Tensor) -> Batches:
    return lambda: zip(images.split(32), target.split(32), strict=True)


def _kept(batches: Batches) -> Batches:
    """Return the batches from memory: they are gone through many times."""
    parts = list(batches())
    return lambda: iter(parts)


@torch.no_grad()
def _accuracy(model: nn.Module, batches: Batches) -> float:
    right = total = 0
    for images, target in batches():
        answers = model(images).argmax(1)
        hit = answers == target if target.ndim == 1 else target.gather(1, answers[:, None])[:, 0] > 0.5
        right, total = right + int(hit.sum()), total + len(images)
    return right / total
