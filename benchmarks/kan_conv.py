"""A training step of Kolmogorov-Arnold convolutions against a plain convolution of equal shape, on this CPU.

    python benchmarks/kan_conv.py [--channels 32] [--side 16] [--batch 16] [--rounds 9] [--out ratios.md]

A step is a forward and a backward pass of one 3x3 layer with batch normalisation, without the optimiser. The arms take
turns in one process; each is reported as a ratio of the plain convolution, a normalisation and a SiLU.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn
from turns import Row, as_markdown, clock, save, what_was_timed

from vitrail.layers.kan_layers import FORMS, BottleneckKANConv, KANConv

LARGEST_WAVELET = 32
"""Channels up to which wavelets are timed: they make as many maps as there are pairs of channels."""


def arms(channels: int) -> dict[str, nn.Module]:
    """Return the layers by name, the plain one first."""
    own: dict[str, Any] = {"padding": 1, "norm": "batch", "affine": True}
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    found: dict[str, nn.Module] = {"plain": nn.Sequential(conv, nn.BatchNorm2d(channels), nn.SiLU())}
    for basis in FORMS:
        if basis != "wavelet" or channels <= LARGEST_WAVELET:
            found[basis] = KANConv(channels, channels, 3, basis=basis, **own)
    found["rbf, 5 bumps"] = KANConv(channels, channels, 3, basis="rbf", grid_size=5, **own)
    for basis in ("gram", "rbf", "relu"):
        found[f"bottleneck {basis}"] = BottleneckKANConv(channels, channels, 3, basis=basis, **own)
    return found


def measure(channels: int, side: int, batch: int, rounds: int) -> list[Row]:
    """Return a row for each arm."""
    images = torch.randn(batch, channels, side, side, requires_grad=True)
    layers = arms(channels)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(rounds + 1):
        for name, layer in layers.items():
            start = clock()
            layer(images).square().mean().backward()
            if number:  # the first round warms up
                seconds[name].append(clock() - start)
    base = statistics.median(seconds["plain"])
    return [
        {
            "layer": name,
            "parameters": sum(p.numel() for p in layers[name].parameters()),
            "step over plain": statistics.median(found) / base,
        }
        for name, found in seconds.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measure(options.channels, options.side, options.batch, options.rounds)
    print(as_markdown(rows))
    print(what_was_timed())
    if options.out:
        save(rows, options.out)
