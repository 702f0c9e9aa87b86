"""Choose a recipe from the size of the data and the budget."""

from __future__ import annotations

from typing import Any

from vitrail.layers.processor import preferred_precision

PRETRAINED = "tf_efficientnet_lite0"
HEAD_START_SHARE = 0.7
"""Of the training time, at most, for the head alone; it ends sooner when its features are complete."""
FEW_PASSES = 0.01
"""Seconds of training per small image below which they are not shifted and mirrored."""
PRESSED = 0.08
"""Seconds of training per image below which fewer pixels and fewer trained layers buy more."""


def recommend(
    *, n_train: int, n_classes: int, median_side: int, pretrained_available: bool, train_seconds: float
) -> dict[str, Any]:
    """Return values for the fields that a recipe leaves at ``"auto"``, by dotted key.

    Epochs come from a measured probe, and are left out. The precision is measured here, once per process.

    ==============  ==============================  ==========================  ========================
    case            pretrained finetune             small, from scratch         tiny, from scratch
    ==============  ==============================  ==========================  ========================
    when            weights, side over 64 px        all else                    side to 16 px
    model           tf_efficientnet_lite0           small_resnet_micro          small_resnet_nano
    img_size        160 or 224, by time per image   the images' side, 28 to 96  twice the side, to 32
    resize          squash                          squash                      squash
    augmentation    crop, flip                      shift or none, flip         shift, no flip
    learning rate   3e-4 to 5e-4, after a head start  3e-3                      3e-3
    batch size      32 to 64                        128                         64
    ==============  ==============================  ==========================  ========================

    Args:
        n_train: training images, at least 1.
        n_classes: at least 2.
        median_side: median of the images' shorter sides, in pixels.
        pretrained_available: whether pretrained weights of ``tf_efficientnet_lite0`` can be loaded.
        train_seconds: wall-clock seconds for training, head start included.
    """
    common = {
        "train.precision": preferred_precision(),
        "train.channels_last": True,
        "train.workers": 0,
        "evaluate.corruptions": True,
        "deploy.compile": train_seconds >= 120,
        "deploy.openvino": train_seconds >= 120,
        # Whole pictures did no worse than centre crops on images of mixed shapes: 73.7 against 72.4 % top-1 with a
        # linear head on 51 classes of clip art, mean of six settings, within the noise.
        "model.resize": "squash",
        "model.crop_pct": 1.0,
    }
    if pretrained_available and median_side > 64:
        pressed = train_seconds / n_train < PRESSED
        return common | {
            "model.name": PRETRAINED,
            "model.pretrained": "package",
            "model.img_size": 160 if pressed else 224,
            "augment.policy": "crop",
            "augment.flip": 0.5,
            # On 43 classes of clip art one epoch at 160 px gave 75.9 % with 1e-4 and 77.9 % with 5e-4 (one seed); the
            # head start alone gave 77.8 %.
            "optim.lr": 5e-4 if pressed else 3e-4,
            "train.batch_size": 32,
            "train.freeze": 0.5 if pressed else 0.0,
            "train.head_start": round(HEAD_START_SHARE * train_seconds, 1),
            "train.ema": 0.0,
        }
    tiny = median_side <= 16
    few_passes = train_seconds / n_train < FEW_PASSES
    side = min(2 * median_side, 32) if tiny else min(max(median_side, 28), 96)
    return common | {
        "model.name": "small_resnet_nano" if tiny else "small_resnet_micro",
        "model.pretrained": "none",
        "model.img_size": side,
        # Few passes over many images leave little to overfit, and shifted or mirrored copies slow down what is learned.
        "augment.policy": "none" if few_passes else "shift",
        # Images of this size are mostly characters, whose mirror images mean something else.
        "augment.flip": 0.0 if tiny or few_passes else 0.5,
        "optim.lr": 3e-3,
        "train.batch_size": 64 if tiny or n_train < 10_000 else 128,
        "train.freeze": 0.0,
        "train.head_start": 0.0,
        "train.ema": 0.0,
    }
