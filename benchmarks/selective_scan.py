"""The selective scan on this CPU, forward and backward: every form against a careful Python loop, and mambapy.

    python benchmarks/selective_scan.py [--rounds 3] [--shape 8,384,196,16]     batch, channels, length, states
    python benchmarks/selective_scan.py --memory [--form portable]              peak of a form

The loop is the reference form, whose backward is linear in the length.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vitrail.layers.scan import selective_scan

SHAPES = ((8, 384, 196, 16), (2, 384, 3136, 16), (1, 192, 16384, 16))


def inputs(batch: int, channels: int, length: int, states: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    values = {
        "u": torch.randn(batch, channels, length),
        "delta": torch.rand(batch, channels, length) / 10,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(batch, states, length),
        "C": torch.randn(batch, states, length),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def with_mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    steps, values = delta.transpose(1, 2).unsqueeze(-1), u.transpose(1, 2).unsqueeze(-1)  # (B, L, D, 1)
    states = pscan((steps * A).exp(), steps * B.transpose(1, 2).unsqueeze(2) * values)
    return (states @ C.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


def arms() -> dict[str, Callable[..., Tensor]]:
    found = {
        form: lambda form=form, **given: selective_scan(**given, form=form)[0]
        for form in ("reference", "portable", "compiled")
    }
    try:
        import mambapy.pscan  # noqa: F401
    except ImportError:
        return found
    return {**found, "mambapy": with_mambapy}


def seconds(function: Callable[..., Tensor], given: dict[str, Tensor]) -> tuple[float, float]:
    start = time.perf_counter()
    y = function(**given)
    middle = time.perf_counter()
    y.sum().backward()
    return middle - start, time.perf_counter() - middle


def compare(shape: tuple[int, ...], rounds: int) -> None:
    given = inputs(*shape)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms()}
    seconds(arms()["compiled"], given)  # compiles
    for _ in range(rounds):
        for name, function in arms().items():
            times[name].append(seconds(function, given))
    median = {name: [statistics.median(part) for part in zip(*runs, strict=True)] for name, runs in times.items()}
    loop = sum(median["reference"])
    for name, (forward, backward) in median.items():
        whole = loop / (forward + backward)
        print(f"{shape!s:24} {name:10} {1e3 * forward:9.1f} + {1e3 * backward:9.1f} ms  {whole:7.2f}x", flush=True)


def memory(form: str) -> None:
    given = inputs(1, 192, 16384, 16)
    seconds(arms()[form], inputs(1, 16, 64, 16))  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y = arms()[form](**given)
    y.sum().backward()
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    size = sum(value.nbytes for value in [*given.values(), y])
    of = f"{peak / size:.2f}x inputs and output ({size / 1e6:.0f} MB)"
    print(f"{form}: peak of forward and backward {peak / 1e6:.0f} MB, {of}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--form", default="compiled")
    options = parser.parse_args()
    if options.memory:
        memory(options.form)
    else:
        for shape in [tuple(map(int, options.shape.split(",")))] if options.shape else SHAPES:
            compare(shape, options.rounds)
