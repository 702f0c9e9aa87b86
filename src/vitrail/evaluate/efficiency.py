"""How much of a machine a model uses: latency = operations / (peak x efficiency), operator by operator.

Lavin, "On the Efficiency of Convolutional Neural Networks" (2024), arXiv 2404.03617. A model's *ideal* latency is what
its multiply-adds take at the machine's peak; the *efficiency gap* lies between that and its actual latency. The
*waterline* carries the roofline model to a sequence of operators: one whose operations per byte lie below the machine's
own ratio waits for memory, and even a perfect implementation of it takes what its bytes take.

The machine is measured in the same run as the models, in turns, so that what else it does meets all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vitrail.errors import InputError
from vitrail.evaluate.suite import evaluating
from vitrail.report.plots import AMBER, BLUE, INK, LINE, TEAL, WIDTH, short, svg_plot

SIDES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
"""Of the square matrices whose product shows the peak; the faster size counts."""
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Bytes of the array that is copied to show the bandwidth: more than the last cache holds."""


# ---- the model of efficiency -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a machine can do.

    Attributes:
        peak: operations a second; a multiply-add is two.
        bandwidth: bytes a second, read and written.
    """

    peak: float
    bandwidth: float

    @property
    def balance(self) -> float:
        """Operations per byte at which arithmetic and memory take equally long: the waterline."""
        return self.peak / self.bandwidth


def latency(macs: float, peak: float, efficiency: float = 1.0) -> float:
    """Return the seconds that ``macs`` multiply-adds take at that share of ``peak`` operations a second."""
    return 2 * macs / (peak * efficiency)


def efficiency(macs: float, seconds: float, peak: float) -> float:
    """Return the share of ``peak`` operations a second that ``macs`` multiply-adds in ``seconds`` are."""
    return latency(macs, peak) / seconds


@dataclass(frozen=True)
class Operator:
    """One operator of a model, as it ran.

    Attributes:
        layer: name of the innermost module that called it; "" for the model itself.
        name: of the operator, as ``convolution``.
        macs: multiply-adds.
        read, written: bytes of its arguments and of its results, as if neither were in a cache.
        seconds: it took, median over the rounds.
    """

    layer: str
    name: str
    macs: int
    read: int
    written: int
    seconds: float

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return 2 * self.macs / self.bytes if self.bytes else 0.0

    def attainable(self, machine: Machine) -> float:
        """Return the seconds that arithmetic or memory, whichever takes longer, needs."""
        return max(latency(self.macs, machine.peak), self.bytes / machine.bandwidth)

    def waits_for_memory(self, machine: Machine) -> bool:
        """Whether it lies below the waterline."""
        return self.intensity < machine.balance


@dataclass(frozen=True)
class Profile:
    """One model on one machine.

    Attributes:
        name: of the model.
        batch: images of a pass.
        seconds: of a pass, unobserved, median over the rounds.
        machine: measured in the same rounds.
        operators: in the order in which they ran.
        unknown: names of operators of our own or of others whose multiply-adds nobody has told torch: they count as 0.
    """

    name: str
    batch: int
    seconds: float
    machine: Machine
    operators: tuple[Operator, ...]
    unknown: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-adds of a pass."""
        return sum(operator.macs for operator in self.operators)

    @property
    def ideal(self) -> float:
        """Seconds of a pass at the machine's peak."""
        return latency(self.macs, self.machine.peak)

    @property
    def attainable(self) -> float:
        """Seconds of a pass if every operator reached the roof above it."""
        return sum(operator.attainable(self.machine) for operator in self.operators)

    @property
    def efficiency(self) -> float:
        """Computational efficiency: the share of the peak that a pass makes use of."""
        return efficiency(self.macs, self.seconds, self.machine.peak)

    @property
    def gap(self) -> float:
        """How many times the ideal latency a pass takes."""
        return 1 / self.efficiency

    @property
    def unattributed(self) -> float:
        """Seconds of a pass outside its operators; below 0 where observing them cost more than that."""
        return self.seconds - sum(operator.seconds for operator in self.operators)

    @property
    def memory_bound(self) -> float:
        """Share of the attainable latency that waits for memory."""
        waiting = [o.attainable(self.machine) for o in self.operators if o.waits_for_memory(self.machine)]
        return sum(waiting) / self.attainable

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; times in milliseconds of a pass."""
        return {
            **summary(self),
            "operations_per_second": self.machine.peak,
            "bytes_per_second": self.machine.bandwidth,
            "unknown_operators": list(self.unknown),
            "operators": [
                {
                    "layer": o.layer,
                    "operator": o.name,
                    "macs": o.macs,
                    "bytes_read": o.read,
                    "bytes_written": o.written,
                    "operations_per_byte": o.intensity,
                    "ideal_ms": 1e3 * latency(o.macs, self.machine.peak),
                    "attainable_ms": 1e3 * o.attainable(self.machine),
                    "measured_ms": 1e3 * o.seconds,
                    "waits_for_memory": o.waits_for_memory(self.machine),
                }
                for o in self.operators
            ],
        }


def summary(profile: Profile) -> dict[str, Any]:
    """Return a row of a table of models; times in milliseconds of a pass."""
    return {
        "model": profile.name,
        "batch": profile.batch,
        "gmacs": profile.macs / 1e9,
        "ideal_ms": 1e3 * profile.ideal,
        "attainable_ms": 1e3 * profile.attainable,
        "actual_ms": 1e3 * profile.seconds,
        "unattributed_ms": 1e3 * profile.unattributed,
        "efficiency": profile.efficiency,
        "gap": profile.gap,
        "memory_bound": profile.memory_bound,
    }


# ---- measuring -------------------------------------------------------------------------------------------------------


def profile_models(
    models: Mapping[str, nn.Module],
    size: tuple[int, int] | Mapping[str, tuple[int, int]],
    *,
    batch: int = 1,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Profile]:
    """Measure models and the machine in turns: a product of matrices, a copy, and each model unobserved and observed.

    Args:
        models: name -> model, on one device and of one floating-point type; left as they were.
        size: height and width of the images, for all or for each.
        batch: images of a pass.
        rounds: of which medians are taken, 1 or more; one more comes before them.
        clock: seconds; ``time.thread_time`` disregards other processes where one thread computes.
        tell: takes a line of text about progress.

    Raises:
        InputError: no models, a number that is not allowed, models on several devices or of several types, or a model
            that does not take such images or does not run the same operators each time.
    """
    if not models:
        raise InputError("there are no models to profile: give one or more")
    for name, number in {"batch": batch, "rounds": rounds}.items():
        if number < 1:
            raise InputError(f"{name} = {number} is not allowed: give 1 or more")
    places = {(parameter.device, parameter.dtype) for model in models.values() for parameter in model.parameters()}
    if len(places) != 1:
        raise InputError("models to profile together need parameters, on one device and of one type")
    device, dtype = places.pop()
    sizes = {name: size[name] if isinstance(size, Mapping) else size for name in models}
    inputs = {}
    for name, model in models.items():
        channels = _channels(model)
        inputs[name] = torch.randn(batch, channels, *sizes[name], device=device, dtype=dtype)
    products = _products(device, dtype)
    copy = _copy(device)

    def seconds(work: Callable[[], object]) -> float:
        start = _now(device, clock)
        work()
        return _now(device, clock) - start

    peaks: list[list[float]] = [[] for _ in products]
    copies: list[float] = []
    passes: dict[str, list[float]] = defaultdict(list)
    traces: dict[str, list[list[Operator]]] = defaultdict(list)
    unknown: dict[str, set[str]] = {name: set() for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for number in range(rounds + 1):  # the first warms up
            tell(f"round {number} of {rounds}")
            for times, (work, _) in zip(peaks, products):
                times.append(seconds(work))
            copies.append(seconds(copy[0]))
            for name, model in models.items():
                try:
                    passes[name].append(seconds(partial(model, inputs[name])))
                except (RuntimeError, ValueError, AssertionError) as error:
                    height, width = sizes[name]
                    raise InputError(
                        f"{name} does not take {batch} images of {height} x {width} pixels ({error}): give another size"
                    ) from error
                trace = _Trace(device, clock)
                with _named(model, trace), trace:
                    model(inputs[name])
                traces[name].append(trace.operators)
                unknown[name] |= trace.unknown
    machine = Machine(
        peak=max(operations / statistics.median(times[1:]) for times, (_, operations) in zip(peaks, products)),
        bandwidth=copy[1] / statistics.median(copies[1:]),
    )
    return [
        Profile(
            name,
            batch,
            statistics.median(passes[name][1:]),
            machine,
            tuple(_medians(name, traces[name][1:])),
            tuple(sorted(unknown[name])),
        )
        for name in models
    ]


def _channels(model: nn.Module) -> int:
    """Return how many channels the first convolution or the configuration takes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    config = getattr(model, "pretrained_cfg", None) or {}
    return int(config.get("input_size", (3,))[0])


def _now(device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def _products(device: torch.device, dtype: torch.dtype) -> list[tuple[Callable[[], object], int]]:
    """Return what multiplies matrices of each size, with its operations."""
    works: list[tuple[Callable[[], object], int]] = []
    for side in SIDES.get(device.type, SIDES["cpu"]):
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        works.append((partial(torch.mm, left, right, out=torch.empty_like(left)), 2 * side**3))
    return works


def _copy(device: torch.device) -> tuple[Callable[[], object], int]:
    """Return what copies an array, with the bytes that it reads and writes."""
    count = COPIED.get(device.type, COPIED["cpu"])
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    return partial(target.copy_, source), 2 * count


@contextmanager
def _named(model: nn.Module, trace: _Trace) -> Iterator[None]:
    """Tell the trace which module of the model is running."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: trace.layers.append(name)))
        handles.append(module.register_forward_hook(lambda *_: (trace.layers.pop(), None)[1], always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Trace(TorchDispatchMode):
    """Times every operator that computes, and counts its multiply-adds and bytes."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        super().__init__()
        self.device, self.clock = device, clock
        self.layers = [""]
        self.operators: list[Operator] = []
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note it unless it only looks at memory in another way, or sets it aside."""
        kwargs = kwargs or {}
        start = _now(self.device, self.clock)
        out = func(*args, **kwargs)
        seconds = _now(self.device, self.clock) - start
        packet = func._overloadpacket
        name = packet.__name__
        if func.is_view or name in ("detach", "empty", "empty_strided", "empty_like", "lift_fresh", "_unsafe_view"):
            return out
        macs = 0
        if packet in flop_registry:
            macs = int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
        elif func.namespace != "aten":
            self.unknown.add(str(packet))
        # A value that is given to be overwritten is not read.
        read = [value for key, value in kwargs.items() if key != "out"]
        self.operators.append(Operator(self.layers[-1], name, macs, _bytes((args, read)), _bytes(out), seconds))
        return out


def _bytes(values: Any) -> int:
    """Return the bytes of tensors; what is repeated along an axis without being stored counts once."""
    total = 0
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.numel():
            stored = 1
            for length, stride in zip(value.shape, value.stride()):
                stored *= length if stride else 1
            total += stored * value.element_size()
    return total


def _medians(model: str, traces: Sequence[Sequence[Operator]]) -> Iterator[Operator]:
    """Join what rounds saw of the same operators."""
    if len({tuple((o.layer, o.name) for o in trace) for trace in traces}) != 1:
        raise InputError(f"{model} does not run the same operators at every pass, so they cannot be compared")
    for same in zip(*traces):
        first: Operator = same[0]
        middle = statistics.median(operator.seconds for operator in same)
        yield Operator(first.layer, first.name, first.macs, first.read, first.written, middle)


# ---- plots -----------------------------------------------------------------------------------------------------------


@svg_plot
def efficiency_gap_plot(profiles: Sequence[Profile]) -> tuple[str, Figure] | None:
    """Draw each model's ideal, attainable and actual latency of an image, and the share of the peak that it uses."""
    if not profiles:
        return None
    figure = Figure(figsize=(WIDTH, 1.0 + 0.36 * len(profiles)), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", visible=False)
    for y, profile in enumerate(profiles):
        ideal, attainable, actual = (
            1e3 * value / profile.batch for value in (profile.ideal, profile.attainable, profile.seconds)
        )
        axes.plot((ideal, actual), (y, y), color=LINE, lw=5, solid_capstyle="round", zorder=1)
        marks = ((ideal, TEAL, "ideal"), (attainable, AMBER, "attainable"), (actual, BLUE, "actual"))
        for value, colour, label in marks:
            axes.scatter([value], [y], s=30, color=colour, zorder=3, linewidths=0, label=None if y else label)
        axes.annotate(
            f"{profile.efficiency:.1%} of peak",
            (max(actual, ideal), y),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=7.5,
        )
    axes.set_xlim(0, 1.35 * axes.get_xlim()[1])
    axes.set_yticks(range(len(profiles)), [short(profile.name, 24) for profile in profiles])
    axes.set(ylim=(len(profiles) - 0.5, -0.5), xlabel="milliseconds an image")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=3)
    return "Efficiency gap", figure


@svg_plot
def waterline_plot(profile: Profile) -> tuple[str, Figure] | None:
    """Draw a model's operators in order: as wide as the bytes they move, as high as their operations per byte.

    The filled area is arithmetic. Up to the waterline, the machine's own operations per byte, it is topped up with what
    the machine could have computed while it waited for memory; both together are the attainable latency times the
    peak.
    """
    moved = [operator for operator in profile.operators if operator.bytes]
    if not moved:
        return None
    balance = profile.machine.balance
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    edges = [0.0]
    for operator in moved:
        edges.append(edges[-1] + operator.bytes / 1e6)
    heights = [operator.intensity for operator in moved]
    water = [max(height, balance) for height in heights]
    axes.stairs(water, edges, baseline=heights, fill=True, color=AMBER, alpha=0.3, label="waiting for memory")
    axes.stairs(heights, edges, fill=True, color=BLUE, alpha=0.85, label="arithmetic")
    axes.axhline(balance, color=AMBER, lw=1.2)
    axes.annotate(f"{balance:.3g}", (edges[-1], balance), (3, 0), textcoords="offset points", va="center", color=AMBER)
    axes.set(xlim=(0, edges[-1]), ylim=(0, max(*heights, 1.6 * balance)), ylabel="operations per byte")
    axes.set_xlabel("megabytes moved, operator by operator")
    waits = f"{1e3 * profile.attainable:.3g} ms attainable, {profile.memory_bound:.0%} of it waiting"
    axes.set_title(f"{short(profile.name, 28)}: {waits}", pad=20)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, borderpad=0)
    return f"Waterline of {profile.name}", figure
