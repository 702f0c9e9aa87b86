"""XNOR-Net: binary weights, and binary inputs too, against full precision of all bytes and of as few.

The paper's AlexNet and ResNet-18 are trained on ImageNet; here a small residual network sees as many images in every
arm. What is exact is checked exactly: packed inference against the float simulation, and the bytes of AlexNet. The
paper's 58 times is a count of operations; here a convolution of its size is timed on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitrail.checks.check import Arm, Context, Finding, Verdict, bounded, paired
from vitrail.data.index import Index
from vitrail.layers.binary import BinaryConv2d, PackedConv2d, pack
from vitrail.models import create_model

NET: dict[str, Any] = {"model.name": "small_resnet_micro"}
EPOCHS = 0.7
"""Of Fashion-MNIST, for each arm."""
SPEED, MEMORY = 58, 32
SHAPE = (1, 256, 14, 14)
"""Of the input of the convolution that the paper counts: 3 x 3, 256 channels in and out."""


def run(ctx: Context) -> Verdict:
    """Compare accuracy, bytes and time."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else EPOCHS
    binary = {"bwn": {"inputs": False}, "xnor": {}, "xnor without K": {"scaled": False}}
    arms = {name: _edited(options) for name, options in binary.items()}
    packed: dict[str, list[nn.Module]] = {name: [] for name in binary}
    trained: dict[str, list[Arm]] = {}
    for name, settings in arms.items():
        trained[name] = [
            ctx.train(index, name.replace(" ", "-"), s, {**settings, "train.epochs": epochs}) for s in ctx.seeds
        ]
        packed[name] = [pack(arm.model) for arm in trained[name]]
    widths = narrow(state_bytes(packed["bwn"][0]), len(index.classes))
    plain = {"full precision": {}, "narrow": {"model.options": {"channels": widths}}}
    for name, own in plain.items():
        settings = {**NET, **own, "train.epochs": epochs}
        trained[name] = [ctx.train(index, name.replace(" ", "-"), s, settings) for s in ctx.seeds]
    top1 = {name: [arm.top1 for arm in found] for name, found in trained.items()}

    def beats(ours: str, other: str, claim: str) -> Finding:
        both = {ours: top1[ours], other: top1[other]}
        return paired(claim, "top-1 accuracy, held-out images, a share", both, ours=ours, against=other)

    gaps = [_gap(ctx, index, arm, twin) for name in packed for arm, twin in zip(trained[name], packed[name])]
    # Rows of the timings: the shares of the fp32 convolution's time.
    times = timings(3 if ctx.quick else 40)
    alexnet = _alexnet()
    findings = [
        beats("bwn", "narrow", "A Binary-Weight-Network is more accurate than a full-precision net of as many bytes."),
        beats("xnor", "narrow", "An XNOR-Network is more accurate than a full-precision net of as many bytes."),
        beats("bwn", "full precision", "Binary weights cost no accuracy: they give more than full precision."),
        beats("xnor", "xnor without K", "Scaling by the inputs' magnitudes makes an XNOR-Network more accurate."),
        bounded(
            "Packed inference equals the float simulation but for rounding.",
            "largest difference of a logit, as a share of the largest logit",
            max(gaps),
            at_most=1e-4,
        ),
        bounded(
            f"The binary layers of AlexNet take {MEMORY} times fewer bytes.",
            "bytes packed over bytes in float32",
            alexnet[0]["packed_bytes"] / alexnet[0]["float_bytes"],
            at_most=1.02 / MEMORY,
        ),
        bounded(
            f"A packed convolution of 256 channels is {SPEED} times faster than the one in float32, on one thread.",
            "its time over that of the other",
            times[0]["share_of_fp32"],
            at_most=1 / SPEED,
        ),
    ]
    notes = [
        f"{len(index.rows('train'))} training images, of which every arm sees {epochs:g} epochs; the paper trains on "
        "ImageNet to the end",
        f"The net of as many bytes has the widths {widths}; bytes are those of all tensors, binary ones packed.",
        "58 is the paper's count: 64 binary operations for one, and the scaling; memory is not in it.",
    ]
    rows = [
        {
            "arm": name,
            "seed": seed,
            "top1": arm.top1,
            "bytes": state_bytes(packed[name][i] if name in packed else arm.model),
        }
        for name, found in trained.items()
        for i, (seed, arm) in enumerate(zip(ctx.seeds, found))
    ]
    return Verdict(findings, notes, {"arms": rows, "time": times, "alexnet": alexnet})


def _edited(options: dict[str, Any]) -> dict[str, Any]:
    return {**NET, "model.edits": [{"name": "xnor", "options": options}]}


def state_bytes(module: nn.Module) -> int:
    """Return the bytes of all that a file of the module's weights holds."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def narrow(most: int, classes: int) -> tuple[int, int, int, int]:
    """Return the widths, doubling, of the widest net in full precision that takes no more than ``most`` bytes."""
    width = 2
    while True:
        wider = tuple((width + 2) * 2**stage for stage in range(4))
        with torch.device("meta"):
            model = create_model(NET["model.name"], num_classes=classes, channels=wider)
        if state_bytes(model) > most:
            return (width, 2 * width, 4 * width, 8 * width)
        width += 2


@torch.no_grad()
def _gap(ctx: Context, index: Index, arm: Arm, packed: nn.Module) -> float:
    """Return how far the packed model's logits are from the simulation's."""
    images, _ = next(iter(ctx.held_out(index, arm.preprocess, most=16 if ctx.quick else 64)()))
    wanted = arm.model(images)
    return float((packed(images) - wanted).abs().max() / wanted.abs().max())


def _alexnet() -> list[dict[str, Any]]:
    """Return the bytes of AlexNet's binary layers, and of all of it, with the paper's figures."""
    create_model("alexnet_xnor_nano", num_classes=2)  # registers all models before the device changes
    with torch.device("meta"):
        model = create_model("alexnet_bwn", num_classes=1000)
    layers = [module for module in model.modules() if isinstance(module, BinaryConv2d)]
    whole = state_bytes(model)
    dense, few = (sum(state_bytes(layer) for layer in kind) for kind in (layers, [PackedConv2d(m) for m in layers]))
    return [
        {"layers": "binary", "float_bytes": dense, "packed_bytes": few},
        {"layers": "all", "float_bytes": whole, "packed_bytes": whole - dense + few},
    ]


def timings(rounds: int, shape: tuple[int, ...] = SHAPE) -> list[dict[str, Any]]:
    """Return the time of packed convolutions beside one in float32, on one thread, in turns.

    Args:
        rounds: turns; the first of each does not count.
        shape: of the input; as many channels go out, and filters are of 3 x 3.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    conv = BinaryConv2d(shape[1], shape[1], 3, padding=1, bias=False)
    conv.norm = None  # the timed float convolution has none either
    bare = BinaryConv2d(shape[1], shape[1], 3, padding=1, bias=False, scaled=False)
    bare.norm = None
    kinds: dict[str, Callable[[], object]] = {"fp32": lambda: F.conv2d(x, conv.weight, padding=1)}
    for name, layer in (("xnor", pack(conv)), ("xnor without K", pack(bare))):
        kinds[name] = lambda layer=layer: layer(x)  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(rounds + 1):
                for name, call in kinds.items():
                    call()  # so that each finds the caches as it left them itself
                    start = time.thread_time()
                    call()
                    taken[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    found = {name: statistics.median(times[1:]) for name, times in taken.items()}
    return [
        {"convolution": name, "ms": 1e3 * found[name], "share_of_fp32": found[name] / found["fp32"]}
        for name in ("xnor", "xnor without K", "fp32")
    ]
