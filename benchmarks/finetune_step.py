"""Finetuning steps of EfficientNet-Lite0 on this CPU: tuned against plain float32 and the other plain ways.

    python benchmarks/finetune_step.py [--batch 64] [--size 224] [--rounds 3]

Each arm runs in a process of its own, because the allocator is set per process; the processes take turns.
"""

from __future__ import annotations

import argparse
import json

from interleave import median_seconds, run_arms

from vitrail.layers.processor import preferred_precision
from vitrail.models.factory import create_model
from vitrail.training.cpu import tune_for_cpu

ARMS = ("plain fp32", "channels-last fp32", "plain bf16", "channels-last bf16", "tuned")


def arm(name: str, batch: int, size: int) -> dict[str, object]:
    model = create_model("tf_efficientnet_lite0", num_classes=60)
    precision = preferred_precision() if name == "tuned" else name.rsplit(" ", 1)[-1]
    channels_last = not name.startswith("plain")
    chosen = ""
    if name == "tuned":
        report = tune_for_cpu(
            model, image_shape=(3, size, size), batch_size=batch, precision=precision, channels_last=True, seconds=60
        )
        chosen = f"{precision}; {report}"
    seconds, faults = median_seconds(model, (3, size, size), batch, precision, channels_last)
    return {"images_per_second": batch / seconds, "faults": faults, "chosen": chosen}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(arm(options.arm, options.batch, options.size)))
    else:
        run_arms(__file__, ARMS, options.rounds, ["--batch", str(options.batch), "--size", str(options.size)])
