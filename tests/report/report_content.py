"""A synthetic run for the report's tests: every section filled, with names that need escaping."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
from PIL import Image

from vitrail.evaluate.calibration import calibrate
from vitrail.evaluate.corruptions import CORRUPTIONS
from vitrail.evaluate.metrics import evaluate, most_confused
from vitrail.report.report import ConfusedPair, Example, ReportContent, audit_keys, thumbnail

EVIL = "<script>alert(1)</script>"


def picture(seed: int, side: int = 160) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return thumbnail(small.resize((side, side), Image.Resampling.BICUBIC))


def runtime(name, status, latency, top1, size, reason=""):
    figures = {
        "latency_ms": latency,
        "latency_ms_16": latency and latency * 9,
        "throughput": latency and 1700 / latency,
    }
    return {
        "name": name,
        "status": status,
        "reason": reason,
        "top1": top1,
        "agreement": top1 and 0.98,
        "bytes": size,
        **figures,
    }


def content(classes: int = 10, images: int = 477, multilabel: bool = False) -> ReportContent:
    """Return a run of one's own to change; making it costs once."""
    return copy.deepcopy(_content(classes, images, multilabel))


@lru_cache
def _content(classes: int, images: int, multilabel: bool) -> ReportContent:
    rng = np.random.default_rng(0)
    names = [EVIL, "$x_1$ & 'quotes' \"double\"", *(f"category/kind {i}" for i in range(2, classes))]
    logits = 2.5 * rng.standard_normal((images, classes)).astype(np.float32)
    if multilabel:
        targets = (logits + 2 * rng.standard_normal(logits.shape) > 1.5).astype(np.float32)
    else:
        targets = rng.integers(0, classes, images)
        logits[np.arange(images), targets] += 4.5
    figures = evaluate(logits, targets, names)
    calibration = calibrate(logits, targets)

    def group(*keys, labels=("cat",), split="train"):
        return [{"key": key, "labels": list(labels) if i else [EVIL], "split": split} for i, key in enumerate(keys)]

    def twice(groups, *examples):
        return {"groups": groups, "images": 3 * groups, "largest": 3, "examples": list(examples)}

    audit = {
        "source": "photos",
        "images": 8123,
        "readable": 8121,
        "bytes": 412_000_000,
        "classes": {name: int(n) for name, n in zip(names, rng.integers(20, 300, classes))},
        "sizes": {
            "width": {"min": 16, "median": 640, "max": 14000},
            "height": {"min": 16, "median": 480, "max": 12000},
        },
        "unreadable": {
            "count": 2,
            "examples": [{"key": f"a/{EVIL}.png", "reason": "truncated"}, {"key": "b.png", "reason": "168 megapixels"}],
        },
        "left_out": {"count": 0, "examples": []},
        "blank": {"count": 3, "examples": ["blank/1.png", "blank/2.png"]},
        "exact_duplicates": twice(310, group("a/1.png", "a/2.png", "b/1.png"), group("c/1.png", "c/2.png")),
        "near_duplicates": {"method": "hash", **twice(420, group("d/1.png", "d/2.png"))},
        "leakage": {"exact": twice(1), "near": twice(2, group("e/1.png", "e/2.png"))},
        "conflicts": {"exact": twice(1), "near": twice(2, group("f/1.png", "f/2.png"))},
        "suspicious_names": [["Cat", "cat"]],
        "problems": ["classes of test that train lacks: 'zebra'"],
    }
    history = [
        {"kind": "train", "step": i, "epoch": i / 20, "loss": 2.3 * 0.98**i + 0.1, "lr": 1e-3 * (1 - i / 120)}
        for i in range(1, 120)
    ] + [
        {"kind": "val", "step": 20 * i, "epoch": i, "loss": 2.2 * 0.7**i + 0.3, "top1": 1 - 0.8**i} for i in range(1, 6)
    ]
    per_kind = {kind: {str(s): float(rng.uniform(0.2, 0.6)) for s in (1, 3, 5)} for kind in CORRUPTIONS}
    corruption = {
        "mean": 0.41,
        "clean": 0.62,
        "per_kind": per_kind,
        "metric": "top1",
        "images": 96,
        "severities": [1, 3, 5],
        "complete": False,
    }
    runtimes = [
        runtime("eager", "ok", 21.0, 0.61, 13_600_000),
        runtime("onnxruntime", "ok", 6.2, 0.61, 13_500_000),
        runtime("onnxruntime-int8", "refused", 4.1, 0.55, 3_600_000, "top-1 drops by 6.1 points, 1.0 allowed"),
        runtime("openvino", "ok", 3.4, 0.609, 13_500_000),
        runtime("compiled-bf16", "skipped", None, None, None, "building takes 90 s, 20 s are left"),
    ]
    summary = {
        "vitrail": "0.1.0",
        "model": "tf_efficientnet_lite0",
        "pretrained": "EfficientNet-Lite0, ImageNet-1K, from the package",
        "method": "supervised",
        "evaluated_on": "val",
        "n_eval": figures["n"],
        "n_train": 4293,
        "n_val": 477,
        "n_test": 0,
        "n_classes": classes,
        "classes": names,
        **figures,
        "ece_calibrated": calibration["ece_calibrated"],
        "params": 3_400_000,
        "flops": 770_000_000,
        "epochs": 11.5,
        "seconds": 352.0,
        "seconds_per_stage": {"audit": 21.0, "train": 240.0, "deploy": 44.0, "report": 4.0},
        "onnx": {"max_abs_diff": 2.1e-6, "latency_ms": 6.2},
        "int8": {"accepted": False, "reason": "top-1 drops by 6.1 points"},
        "runtimes": runtimes,
        "runtime_images": 477,
        "winner": "openvino",
        "ships": "openvino, 3.40 ms per image",
        "target_ms": None,
        "meets_target": None,
        "corruption": corruption,
        "warnings": ["only 3 images of class 'owl'", EVIL],
        "environment": {"python": "3.11", "gpus": [], "packages": {"torch": "2.9"}},
    }
    examples = [
        Example(picture(i), names[i % classes], names[(i + 1) % classes], 0.99 - i / 100, f"folder/{i}.png")
        for i in range(30)
    ]
    pairs = [
        ConfusedPair(p["true_name"], p["predicted_name"], p["count"], p["share"], [picture(50 + i) for i in range(5)])
        for p in most_confused(figures.get("confusion", []), names, 12)
    ]
    return ReportContent(
        summary=summary,
        audit=audit,
        pictures={key: picture(90 + i) for i, key in enumerate(audit_keys(audit)[:-1])},
        history=history,
        calibration=calibration,
        worst=examples,
        pairs=pairs,
        explanations=[Example(picture(i), "a", "b", 0.7, f"{i}.png", overlay=picture(i + 1)) for i in range(6)],
        commands=["vitrail fit photos --recipe recipe.toml --out again"],
        recipe='[model]\nname = "tf_efficientnet_lite0"\n',
        split="10 % of each class were held out; near duplicates stay on one side.",
        title="photos",
    )
