"""The selective scan of a plane on this CPU: each form against the loop over places, and four scans of its lines.

    python benchmarks/plane_scan.py [--rounds 3] [--shape 2,28,28,64,16]     images, rows, columns, channels, states

Arms take turns in one process and are timed by its CPU time, on one thread: what else the machine does is not counted.
Lines are scanned as VMamba scans them, rows and columns from either end, with the reading and putting back.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vitrail.checks.mamba2d import scan_inputs
from vitrail.layers.scan import selective_scan
from vitrail.layers.scan.orders import cross, cross_merge, cross_scan
from vitrail.layers.scan.plane import plane_scan

SHAPES = ((8, 14, 14, 384, 16), (2, 28, 28, 128, 16), (2, 56, 56, 64, 16))
LOOP_PLACES = 28 * 28
"""Beyond which the loop is left out: its gradient takes minutes."""


def four_directions(
    u: Tensor, top: Tensor, left: Tensor, A: Tensor, A_left: Tensor, B: Tensor, B_left: Tensor, C: Tensor
) -> Tensor:
    orders = cross((u.shape[1], u.shape[2]))
    us, deltas, Bs, Cs = (cross_scan(x.flatten(1, 2), orders).transpose(2, 3) for x in (u, top, B, C))
    y, _ = selective_scan(us.flatten(1, 2), deltas.flatten(1, 2), A.repeat(4, 1), Bs, Cs)
    return cross_merge(y.unflatten(1, (4, -1)).transpose(2, 3), orders)


def seconds(function: Callable[..., Tensor], given: list[Tensor]) -> tuple[float, float]:
    start = time.process_time()
    y = function(*given)
    middle = time.process_time()
    torch.autograd.grad(y.sum(), given, allow_unused=True)
    return middle - start, time.process_time() - middle


def compare(shape: tuple[int, int, int, int, int], rounds: int) -> None:
    given = scan_inputs(shape)
    arms: dict[str, Callable[..., Tensor]] = {
        form: partial(plane_scan, form=form) for form in ("compiled", "portable", "reference")
    }
    arms["four directions"] = four_directions
    if shape[1] * shape[2] > LOOP_PLACES:
        del arms["reference"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, function in arms.items():
            if turn or name != "reference":  # the first turn compiles
                times[name].append(seconds(function, given))
    for name, runs in times.items():
        forward, backward = (statistics.median(part) for part in zip(*runs[name != "reference" :], strict=True))
        own = [statistics.median(part) for part in zip(*times["compiled"][1:], strict=True)]
        ratio = (forward + backward) / sum(own)
        print(f"{shape!s:24} {name:16} {1e3 * forward:9.1f} + {1e3 * backward:9.1f} ms  {ratio:7.2f}x the compiled's")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for shape in [tuple(map(int, options.shape.split(",")))] if options.shape else SHAPES:
        compare(shape, options.rounds)
