"""What ``vitrail.deploy.optimise`` gains over eager PyTorch and over bf16 autocast, at 224 pixels.

    python benchmarks/optimise.py [--models resnet50 ...] [--batch 8] [--rounds 5] [--compile] [--out table.md]

Weights are random: only speed and agreement are looked at. Ratios are of medians of interleaved rounds in one process.
bf16 autocast is timed only where the processor has units for it, unless --bf16 says so: emulated, it takes minutes.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from torch import nn
from turns import Row, as_markdown, clock, save, what_was_timed

from vitrail.deploy import optimise
from vitrail.evaluate.turns import medians
from vitrail.layers.processor import keep_memory, preferred_precision
from vitrail.models import create_model

MODELS = (
    "swin_tiny_patch4_window7_224",
    "xcit_tiny_12_p16_224",
    "maxvit_tiny_tf_224",
    "gcvit_xxtiny",
    "convnext_tiny",
    "deit3_small_patch16_224",
    "tiny_vit_5m_224",
    "resnet50",
    "resnext50_32x4d",
    "focalnet_tiny_srf",
)


@torch.inference_mode()
def eager(model: nn.Module, images: torch.Tensor, bf16: bool = False) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(images)


def compare(name: str, images: torch.Tensor, rounds: int, compiled: bool, bf16: bool) -> Row:
    torch.manual_seed(0)
    model = create_model(name, num_classes=1000).eval()
    found = {"optimise": optimise(model, images=images)}
    if compiled:
        found["optimise + compile"] = optimise(model, images=images, compile=True)
    arms = {"eager": partial(eager, model, images)}
    if bf16:
        arms["bf16 autocast"] = partial(eager, model, images, True)
    arms |= {arm: partial(done.model, images) for arm, done in found.items()}
    times = medians(arms, rounds, clock)
    row: Row = {"model": name, "eager ms/image": 1000 * times["eager"] / len(images)}
    for arm in ("bf16 autocast", "optimise", "optimise + compile"):
        row[arm] = times["eager"] / times[arm] if arm in times else None
    row["difference"] = f"{max(done.report.difference for done in found.values()):.0e}"
    steps = found["optimise"].report.steps
    row["steps"] = ", ".join(f"{step.name} ({step.layers})" for step in steps if step.status == "applied")
    if compiled and found["optimise + compile"].report["compile"].status != "applied":
        row["steps"] += f"; compile: {found['optimise + compile'].report['compile'].reason}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="optimise with torch.compile as well: minutes a model")
    parser.add_argument("--bf16", action="store_true", help="time bf16 autocast where it is emulated, too")
    parser.add_argument("--keep-memory", action="store_true", help="keep freed memory in the process, for all arms")
    parser.add_argument("--out", type=Path, help="write the table: .json or .md")
    options = parser.parse_args()
    if options.keep_memory:
        keep_memory()
    images = torch.randn(options.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    bf16 = options.bf16 or preferred_precision() == "bf16"
    rows = []
    for name in options.models:
        rows.append(compare(name, images, options.rounds, options.compile, bf16))
        print(rows[-1], flush=True)
    mean: Row = dict.fromkeys(rows[0])
    mean["model"] = "geometric mean"
    for arm in ("bf16 autocast", "optimise", "optimise + compile"):
        if all(row[arm] for row in rows):
            mean[arm] = math.exp(sum(math.log(row[arm]) for row in rows) / len(rows))
    rows.append(mean)
    print(f"{as_markdown(rows)}\n\nTimes as fast as eager fp32. {what_was_timed()}")
    if options.out:
        save(rows, options.out)


if __name__ == "__main__":
    main()
