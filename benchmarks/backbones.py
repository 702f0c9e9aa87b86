"""Our models beside timm's nearest and, where you have it, the published code: forward, and forward and backward.

    python benchmarks/backbones.py inception_next_tiny rmt_t [--peer convnext_tiny] [--batch 4] [--rounds 5]
        [--published PATH.py:function] [--bf16] [--channels-last] [--out table.json]

A function given with --published is called without arguments and returns the published model for the first name; the
file's folder is on the path while it is imported. The state of ours is loaded into it where their keys agree, or after
the renaming that a function ``rename(state, model)`` of the same file does, and the difference of their outputs is
printed. Ratios are of medians of interleaved rounds in one process: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from turns import Row, as_markdown, clock, save, what_was_timed

from vitrail.app.build import count_flops, count_parameters
from vitrail.errors import InputError
from vitrail.evaluate.turns import medians
from vitrail.layers.processor import preferred_precision
from vitrail.models import create_model

PEERS = (
    "convnext_tiny",
    "deit3_small_patch16_224",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "resnet50",
    "resnet18",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
)
"""Models of timm; the one with the nearest number of multiply-adds is a model's peer unless --peer says which."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=1000)


def nearest_peer(name: str, size: int) -> str:
    with torch.device("meta"):
        flops = {other: count_flops(build(other), (size, size)) for other in (name, *PEERS)}
    return min((peer for peer in PEERS if peer != name), key=lambda peer: abs(flops[peer] / flops[name] - 1))


def published_model(place: str, ours: nn.Module) -> nn.Module:
    """Return the model that ``PATH.py:function`` makes, with the weights of ours where they fit."""
    path, _, function = place.partition(":")
    file = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(file.stem, file) if file.is_file() else None
    if spec is None or spec.loader is None or not function:
        raise InputError(f"--published {place} is not allowed: give PATH.py:function of a file that exists")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
        theirs: nn.Module = getattr(module, function)()
    finally:
        sys.path.remove(str(file.parent))
    rename: Callable[[Any, nn.Module], Any] = getattr(module, "rename", lambda state, model: state)
    state = rename(ours.state_dict(), theirs)
    own = theirs.state_dict()
    if state.keys() == own.keys() and all(state[key].shape == own[key].shape for key in own):
        theirs.load_state_dict(state)
    else:
        print("the published model keeps weights of its own: their keys or shapes differ from ours")
    return theirs


def step(model: nn.Module, images: torch.Tensor, bf16: bool, train: bool) -> None:
    with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(images)
    if train:
        # Some nets return more than one head while they are trained.
        sum(part.float().sum() for part in (out if isinstance(out, tuple | list) else [out])).backward()
        model.zero_grad()


def compare(name: str, options: argparse.Namespace, bf16: bool, published: str | None) -> list[Row]:
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    images = torch.randn(options.batch, 3, options.size, options.size).contiguous(memory_format=layout)
    peer = options.peer or nearest_peer(name, options.size)
    arms = {"ours": build(name), "peer": build(peer)}
    if published:
        arms["published"] = published_model(published, arms["ours"])
        with torch.no_grad():
            first, second = (arms[arm].eval()(images) for arm in ("ours", "published"))
        print(f"{name}: outputs differ from the published code's by {float((first - second).abs().max()):.1e}")
    arms = {arm: model.to(memory_format=layout) for arm, model in arms.items()}
    rows = []
    for precision in ("fp32", "bf16") if bf16 else ("fp32",):
        for train in (False, True):
            for model in arms.values():
                model.train(train)
            runs = {arm: partial(step, model, images, precision == "bf16", train) for arm, model in arms.items()}
            times = medians(runs, options.rounds, clock)
            row: Row = {
                "model": name,
                "parameters (M)": count_parameters(arms["ours"]) / 1e6,
                "peer": peer,
                "pass": "forward and backward" if train else "forward",
                "precision": precision,
                "ms/image": 1000 * times["ours"] / len(images),
                "times as fast as the peer": times["peer"] / times["ours"],
                "times as fast as published": times["published"] / times["ours"] if published else None,
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--peer", help="model of timm to compare with; by default the nearest in multiply-adds")
    parser.add_argument("--published", metavar="PATH.py:function", help="the published code of the first model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="bf16 also where the processor has no units for it")
    parser.add_argument("--out", type=Path, help="write the table: .json or .md")
    options = parser.parse_args()
    bf16 = options.bf16 or preferred_precision() == "bf16"
    rows = []
    for number, name in enumerate(options.models):
        rows += compare(name, options, bf16, options.published if not number else None)
    print(f"{as_markdown(rows)}\n\n{what_was_timed()}")
    if options.out:
        save(rows, options.out)


if __name__ == "__main__":
    main()
