"""Compute the gradients of every method and edit in two processes, as the training loop does, and write them down."""

from __future__ import annotations

import sys
from pathlib import Path

import broken
import torch
import torch.distributed as dist
from method_contract import IMAGES, PARTS, Method
from probes import gradients, labels, step, unsettled
from subjects import edits, methods
from torch.nn.parallel import DistributedDataParallel

from vitrail.methods.supervised.supervised import Supervised


def subjects() -> list[Method]:
    """Return the methods of the catalogue, and two that are broken."""
    return [*(method for _, method in methods()), broken.method(broken.Summed), broken.method(broken.WrongGradient)]


def main(folder: Path) -> None:
    """Each process takes its share of the images; the processes' gradients are averaged, hence the factor."""
    rank, part = dist.get_rank(), PARTS[dist.get_rank()]
    for subject in subjects():
        try:
            method = subject.build()
            share = (part.stop - part.start) / IMAGES
            terms = step(DistributedDataParallel(method), subject.batch(part), share * len(PARTS))
            values = {"loss": share * terms["loss"].detach(), "gradients": gradients(method)}
        except Exception as error:  # noqa: BLE001 - of one method, which its own test reports
            values = {"error": f"{type(error).__name__}: {error}"}
        torch.save(values, folder / f"{subject.name}.{rank}.pt")
    for _, subject in edits():
        try:
            method = Supervised(unsettled(subject.build())).train()
            step(
                DistributedDataParallel(method), {"image": subject.images(IMAGES)[part], "target": labels(IMAGES)[part]}
            )
            values = {"gradients": gradients(method)}
        except Exception as error:  # noqa: BLE001 - of one edit, which its own test reports
            values = {"error": f"{type(error).__name__}: {error}"}
        torch.save(values, folder / f"{subject.name}.{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
