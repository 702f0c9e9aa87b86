"""Trains and validates in as many processes as it is launched in, and writes down what every process saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_runs import PREPROCESS, MemoryIndex, TinyNet, folder, recipe
from timm.layers import BatchNormAct2d
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vitrail.layers.sync_batchnorm import SyncBatchNorm, SyncBatchNormAct, synchronised_batchnorm
from vitrail.methods.supervised.supervised import Supervised
from vitrail.training.train import train

# 77 images leave a joint batch of 13 at the end of each epoch: 7 and 6; the 33 validation images are shared 17 and 16.
INDEX = MemoryIndex(77, 33)
SGD = {"optim__name": "sgd", "optim__lr": 0.05, "optim__momentum": 0.9, "train__ema": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "batchnorm": {},
    # Mixing pairs alike where the joint batch is divisible by four, so the 13 are left out here.
    "mixing": {"norm": False, "augment__mixup": 0.4, "augment__cutmix": 1.0, "train__epochs": 0.8},
    "accumulate": {"norm": False, "train__accumulate": 3},
    "sampler": {"train__balance": "sampler", "train__epochs": 1},
}


class Interrupted(Exception):
    pass


class Breaking(Supervised):
    """Stops after some step, in all processes alike."""

    def __init__(self, model: nn.Module, step: int | None = None) -> None:
        super().__init__(model)
        self.step, self.steps = step, 0

    def after_step(self) -> None:
        self.steps += 1
        if self.steps == self.step:
            raise Interrupted


def run(path: Path, norm: bool = True, step: int | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    trained = Breaking(TinyNet(norm=norm), step)
    return train(trained, INDEX, PREPROCESS, recipe(**{**SGD, **options}), folder(path))


def train_all(out: Path) -> None:
    """Every case: gradients of each step, shipped weights, figures, in ``<case>.pt``."""
    rank = int(os.environ.get("RANK", 0))
    gradients: list[list[torch.Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        gradients.append([parameter.grad.clone() for group in groups for parameter in group["params"]])

    handle = register_optimizer_step_pre_hook(note)
    for name, options in CASES.items():
        gradients.clear()
        result = run(out / name, **options)
        assert type(getattr(result.model.norm, "weight", None)) in (nn.Parameter, type(None))
        assert type(result.model.norm) in (nn.BatchNorm2d, nn.Identity)
        values = {
            "gradients": list(gradients),
            "weights": result.method.state_dict(),
            "history": [{k: v for k, v in line.items() if k != "seconds"} for line in result.history],
            "figures": result.figures,
            "failed": result.failed,
        }
        torch.save(values, out / f"{name}.{rank}.pt")
    handle.remove()


def interrupt(out: Path) -> None:
    """A run that stops in the middle of an epoch and goes on."""
    rank = dist.get_rank()
    try:
        run(out / "interrupted", step=8, train__checkpoint_seconds=0.0)
    except Interrupted:
        pass
    else:
        raise AssertionError("was not interrupted")
    result = run(out / "interrupted", train__checkpoint_seconds=0.0)
    torch.save(result.method.state_dict(), out / f"interrupted.{rank}.pt")


def normalise(out: Path) -> None:
    """Batch normalisation of uneven shares of one batch: outputs, gradients, statistics."""
    rank = dist.get_rank()
    for number, (layer, shape, shares) in enumerate(norm_cases()):
        torch.manual_seed(number)
        x = 3 * torch.randn(shape) + 1
        upstream = torch.randn(shape)
        holder = nn.Sequential(layer)
        mine = slice(0, shares[0]) if rank == 0 else slice(shares[0], None)
        with synchronised_batchnorm(holder):
            assert isinstance(holder[0], SyncBatchNorm | SyncBatchNormAct)
            part = x[mine].clone().requires_grad_()
            for _ in range(2):
                y = holder(part)
            (y * upstream[mine]).sum().backward()
        assert holder[0] is layer
        parameters = [parameter.grad for parameter in layer.parameters()]
        for gradient in parameters:
            dist.all_reduce(gradient)
        values = {"y": y.detach(), "dx": part.grad, "parameters": parameters, "buffers": dict(layer.named_buffers())}
        torch.save(values, out / f"norm{number}.{rank}.pt")


def norm_cases() -> list[tuple[nn.Module, tuple[int, ...], tuple[int, int]]]:
    torch.manual_seed(7)
    layers: list[tuple[nn.Module, tuple[int, ...], tuple[int, int]]] = [
        (nn.BatchNorm2d(5), (8, 5, 3, 4), (4, 4)),
        (nn.BatchNorm2d(5, momentum=None), (7, 5, 2, 2), (6, 1)),
        (nn.BatchNorm2d(4, affine=False), (3, 4, 3, 3), (3, 0)),
        (nn.BatchNorm2d(4, track_running_stats=False), (6, 4, 1, 1), (1, 5)),
        (nn.BatchNorm1d(6), (5, 6), (2, 3)),
        (BatchNormAct2d(5), (6, 5, 3, 3), (2, 4)),
    ]
    for layer, _, _ in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
    return layers


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    train_all(place)
    interrupt(place)
    normalise(place)
