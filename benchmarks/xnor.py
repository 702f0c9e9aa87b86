"""Packed binary convolutions against torch's float32 convolution, on one thread and in one run.

    python benchmarks/xnor.py [--rounds 40] [--shape 1,256,14,14]     images, channels, rows, columns

Filters are of 3 x 3 and as many channels go out. Arms take turns and are timed by the thread's CPU time; packing the
input and scaling the output are part of the binary ones. The first call of a machine compiles for some ten seconds.
"""

from __future__ import annotations

import argparse

from vitrail.checks.xnor import timings

SHAPES = ((1, 256, 14, 14), (1, 64, 56, 56), (1, 128, 28, 28), (1, 512, 7, 7), (8, 256, 14, 14))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shape")
    options = parser.parse_args()
    for shape in [tuple(map(int, options.shape.split(",")))] if options.shape else SHAPES:
        for row in timings(options.rounds, shape):
            print(f"{shape!s:20} {row['convolution']:16} {row['ms']:8.3f} ms  {1 / row['share_of_fp32']:6.2f}x")
