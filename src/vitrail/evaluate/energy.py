"""The energy that a model takes for an image: read from the machine's counters, or estimated from what it computes.

Counters are RAPL's of the processor packages (Linux, ``/sys/class/powercap``) and NVML's of a GPU. A machine that has
none, or does not let one read them, has the proxy: multiply-adds and bytes of each convolution and linear layer, at
Horowitz's prices ("Computing's energy problem", ISSCC 2014, 45 nm). The proxy ranks nets; its joules are no machine's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.evaluate.suite import evaluating

RAPL = Path("/sys/class/powercap")
JOULES_PER_MAC = 4.6e-12
"""A product and a sum in float32."""
JOULES_PER_BYTE = 160e-12
"""640 pJ for 32 bits of DRAM."""


@dataclass(frozen=True)
class Energy:
    """What an image takes.

    Attributes:
        joules: for one image.
        source: the counter, or ``proxy``.
        macs, bytes: of convolutions and linear layers, for one image; weights count once for a batch.
    """

    joules: float
    source: Literal["rapl", "nvml", "proxy"]
    macs: float
    bytes: float


class Rapl:
    """The energy of all processor packages, in joules, since the meter was made.

    Args:
        root: where the kernel has the counters.
    """

    def __init__(self, root: Path = RAPL) -> None:
        self.domains: list[Path] = []
        self.last: dict[Path, int] = {}
        for domain in sorted(root.glob("intel-rapl:*")) if root.is_dir() else []:
            # intel-rapl:0:1 is a part of intel-rapl:0. Most systems let root alone read them.
            if domain.name.count(":") == 1:
                try:
                    self.last[domain] = int((domain / "energy_uj").read_text())
                except (OSError, ValueError):
                    continue
                self.domains.append(domain)
        self.total = 0

    def read(self) -> float:
        """Return the joules so far; to be called before a counter comes round twice, within a minute or so."""
        for domain in self.domains:
            now = int((domain / "energy_uj").read_text())
            if now < self.last[domain]:
                self.total += int((domain / "max_energy_range_uj").read_text())
            self.total += now - self.last[domain]
            self.last[domain] = now
        return self.total / 1e6


def counter(device: torch.device, root: Path = RAPL) -> tuple[Literal["rapl", "nvml"], Callable[[], float]] | None:
    """Return the name of the counter of a device and what reads its joules, or None where there is none to read."""
    if device.type == "cuda" and importlib.util.find_spec("pynvml") is not None:
        import pynvml

        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:
            return None
        return "nvml", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    rapl = Rapl(root)
    return ("rapl", rapl.read) if device.type == "cpu" and rapl.domains else None


def measure_energy(model: nn.Module, images: Tensor, *, repeats: int = 10, root: Path = RAPL) -> Energy:
    """Return what one image takes, the machine's idle power and all else that it does with it counted in.

    Args:
        model: takes ``images``; on their device.
        images: a batch (B, C, H, W).
        repeats: passes over the batch that are measured, after one that is not.
        root: of the kernel's counters.

    Raises:
        InputError: no pass, or no image.
    """
    if repeats < 1 or not len(images):
        raise InputError(f"repeats = {repeats} with {len(images)} images is not allowed: give one or more of each")
    with evaluating(model), torch.no_grad():
        macs, moved = work(model, images)
        found = counter(images.device, root)
        if found is None:
            return Energy(JOULES_PER_MAC * macs + JOULES_PER_BYTE * moved, "proxy", macs, moved)
        source, read = found
        _wait(images.device)
        start = read()
        for _ in range(repeats):
            model(images)
        _wait(images.device)
        return Energy((read() - start) / (repeats * len(images)), source, macs, moved)


@torch.no_grad()
def work(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return multiply-adds and bytes of the convolutions and linear layers of a model, for one of these images.

    Bytes are of inputs, outputs and weights, each moved once for the batch, on the meta device too.
    """
    totals = [0.0, 0.0]

    def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        places = output.numel() // layer.weight.shape[0]
        totals[0] += places * layer.weight.numel()
        totals[1] += sum(value.numel() * value.element_size() for value in (inputs[0], output, layer.weight))

    with _hooked(model, count):
        model(images)
    return totals[0] / len(images), totals[1] / len(images)


@contextmanager
def _hooked(model: nn.Module, count: Callable[..., None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
