"""Training steps of ViT-Tiny/4 at 32 pixels on this CPU: tuned against plain bfloat16 autocast.

    python benchmarks/attention_training.py [--batch 256] [--rounds 3]

Each arm runs in a process of its own, because the allocator is set per process; the processes take turns.
"""

from __future__ import annotations

import argparse
import json

from interleave import median_seconds, run_arms

from vitrail.layers.processor import preferred_precision
from vitrail.models.factory import create_model
from vitrail.training.cpu import tune_for_cpu

ARMS = ("plain bf16", "tuned bf16", "tuned, preferred precision")


def arm(name: str, batch: int) -> dict[str, object]:
    model = create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4)
    precision = preferred_precision() if "preferred" in name else "bf16"
    chosen = ""
    if name != "plain bf16":
        chosen = str(tune_for_cpu(model, image_shape=(3, 32, 32), batch_size=batch, precision=precision))
    seconds, faults = median_seconds(model, (3, 32, 32), batch, precision)
    return {"images_per_second": batch / seconds, "faults": faults, "chosen": f"{precision}; {chosen}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(arm(options.arm, options.batch)))
    else:
        run_arms(__file__, ARMS, options.rounds, ["--batch", str(options.batch)])
