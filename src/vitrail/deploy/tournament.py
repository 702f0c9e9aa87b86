"""The tournament of runtimes: who answers fastest on this machine without losing accuracy.

Every contestant gets the same pixels, all cores and the same images, in one process. Latencies are medians of rounds in
which the contestants take turns, so that a machine that slows down for a while slows down all of them.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import nn

from vitrail.data.preprocess import Preprocess
from vitrail.deploy import graph
from vitrail.deploy.export import quiet
from vitrail.deploy.int8 import quantise
from vitrail.deploy.interface import LOGITS, PIXELS
from vitrail.deploy.runtime import RUNTIMES, compile_openvino, open_session, openvino_precision
from vitrail.errors import InputError, MissingExtra
from vitrail.runs import RunFolder
from vitrail.training.recipe import DeployConfig

Pixels = np.ndarray
"""uint8 (N, h, w, 3) as ``Preprocess`` returns them."""
Contestant = Callable[[Pixels], np.ndarray]
"""From pixels to logits (N, C)."""

BATCH = 16
REFERENCE, BASELINE = "eager", "onnxruntime"
ORDER = (
    REFERENCE,
    "eager-channels-last",
    "compiled-bf16",
    BASELINE,
    "onnxruntime-int8",
    "openvino",
    "openvino-int8",
)
INT8_RUNTIMES = ("onnxruntime-int8", "openvino-int8")
# Seconds that building a contestant takes besides running the network.
BUILD_SECONDS = {"compiled-bf16": 90.0, "onnxruntime-int8": 5.0}
# Seconds for the timed rounds, at most, and turns of each contestant.
RACE_SECONDS, TURNS = 20.0, 30


@dataclass
class Entry:
    """One contestant and how it did; figures that were not measured are None."""

    name: str
    status: Literal["ok", "refused", "unavailable", "skipped"] = "ok"
    reason: str = ""
    """Why it is not ``"ok"``: one line."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    latency_ms: float | None = None
    """For one image."""
    latency_ms_16: float | None = None
    """For a batch of 16."""
    throughput: float | None = None
    """Images per second in batches of 16."""
    top1: float | None = None
    """Share of the validation sample answered rightly; multi-label: the most probable class is one of the image's."""
    agreement: float | None = None
    """Share of the sample answered as the reference does."""
    drop: float | None = None
    """Top-1 of the reference less its own."""
    drop_interval: tuple[float, float] | None = None
    """Of the drop, 95 %, from the images on which exactly one of the two is right."""
    bytes: int | None = None
    """Size of the weights or the file."""


@dataclass
class TournamentResult:
    """All contestants, and the one that ships."""

    entries: list[Entry]
    winner: str
    """A name of ``vitrail.deploy.runtime.RUNTIMES``."""
    images: int
    """Size of the validation sample."""
    threads: int
    target_ms: float | None = None

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of a contestant."""
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def meets_target(self) -> bool | None:
        """Whether the winner is as fast as asked for; None if nothing was asked for."""
        latency = self[self.winner].latency_ms
        return None if self.target_ms is None or latency is None else latency <= self.target_ms

    def to_dict(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds of it: plain values for JSON."""
        int8 = self._int8()
        winner = self[self.winner]
        ships = f"{self.winner}, {winner.latency_ms:.2f} ms per image" if winner.latency_ms else self.winner
        if self.meets_target is not None:
            ships += f" (target {self.target_ms:g} ms: {'met' if self.meets_target else 'missed'})"
        return {
            "onnx": {name: getattr(self[BASELINE], name) for name in ("latency_ms", "latency_ms_16", "bytes")},
            "int8": {
                "accepted": int8.status == "ok",
                "reason": int8.reason,
                "runtime": int8.name,
                **{name: getattr(int8, name) for name in ("top1", "drop", "latency_ms", "latency_ms_16", "bytes")},
            },
            "runtimes": [asdict(entry) for entry in self.entries],
            "runtime_images": self.images,
            "threads": self.threads,
            "winner": self.winner,
            "ships": ships,
            "target_ms": self.target_ms,
            "meets_target": self.meets_target,
        }

    def _int8(self) -> Entry:
        """Return the fastest accepted INT8 entry, or ONNX Runtime's with its reason."""
        accepted = [self[name] for name in INT8_RUNTIMES if self[name].status == "ok"]
        return min(accepted, key=_latency) if accepted else self["onnxruntime-int8"]


def tournament(
    model: nn.Module,
    preprocess: Preprocess,
    folder: str | Path,
    *,
    onnx_path: str | Path,
    calibration: Callable[[], Iterator[Pixels]],
    validation: Callable[[], Iterator[tuple[Pixels, np.ndarray]]],
    config: DeployConfig,
    deadline: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> TournamentResult:
    """Measure the runtimes on this machine and choose the one that ships.

    A quantised or bf16 contestant is accepted only if its top-1 drops by at most ``config.max_drop`` and it is faster
    than ONNX Runtime in fp32 here. ``model.int8.onnx`` stays in the folder only if a runtime that reads it is accepted.

    Args:
        model: takes normalised floats (N, 3, h, w), returns logits (N, C); it is the reference and is not changed.
        preprocess: as in the exported file.
        folder: the run folder.
        onnx_path: the model as ``export_onnx`` wrote it.
        calibration: starts a stream of pixels for INT8.
        validation: starts a stream of pixels with targets: class numbers (N,) or multi-hot (N, C).
        config: what may ship.
        deadline: value of ``time.monotonic`` at which to be done; what does not fit is skipped and says so.
        progress: called with a line of text for each contestant.

    Raises:
        InputError: no validation image came.
    """
    contest = _Contest(model, preprocess, RunFolder(folder), Path(onnx_path), calibration, validation, config)
    contest.deadline, contest.tell = deadline, progress or (lambda text: None)
    contest.measure_reference()
    contest.enter()
    contest.race()
    contest.judge()
    return contest.result()


class _Contest:
    """One tournament under way."""

    deadline: float | None
    tell: Callable[[str], None]

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        folder: RunFolder,
        onnx_path: Path,
        calibration: Callable[[], Iterator[Pixels]],
        validation: Callable[[], Iterator[tuple[Pixels, np.ndarray]]],
        config: DeployConfig,
    ) -> None:
        self.network = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
        self.preprocess, self.folder, self.onnx_path, self.config = preprocess, folder, onnx_path, config
        self.calibration, self.validation = calibration, validation
        self.entries: dict[str, Entry] = {}
        self.running: dict[str, Contestant] = {}
        self.weight_bytes = sum(value.numel() * value.element_size() for value in self.network.state_dict().values())

    def left(self) -> float:
        return math.inf if self.deadline is None else self.deadline - time.monotonic()

    # ---- accuracy

    def measure_reference(self) -> None:
        """Answer the validation images, as many as an eighth of the time allows, with the eager network."""
        started = time.monotonic()
        until = started + self.left() / 8
        eager = _eager(self.network, self.preprocess)
        answers, hits = [], []
        for pixels, targets in self.validation():
            answers.append(eager(pixels).argmax(1))
            hits.append(_hits(answers[-1], targets))
            if time.monotonic() > until:
                break
        if not answers:
            raise InputError("cannot compare runtimes without validation images: give at least one batch")
        self.answers, self.hits = np.concatenate(answers), np.concatenate(hits)
        self.images = len(self.answers)
        self.seconds = (time.monotonic() - started) / self.images
        self.one = pixels[:1]
        self.entries[REFERENCE] = Entry(
            REFERENCE, top1=float(self.hits.mean()), agreement=1.0, drop=0.0, bytes=self.weight_bytes
        )
        self.running[REFERENCE] = eager

    def measure(self, entry: Entry, contestant: Contestant) -> None:
        """Fill in the accuracy of a contestant on the reference's images."""
        answers, hits = [], []
        count = 0
        for pixels, targets in self.validation():
            taken = min(len(pixels), self.images - count)
            answers.append(contestant(pixels[:taken]).argmax(1))
            hits.append(_hits(answers[-1], targets[:taken]))
            count += taken
            if count == self.images:
                break
        right = np.concatenate(hits)
        lost, won = int((self.hits & ~right).sum()), int((right & ~self.hits).sum())
        entry.top1 = float(right.mean())
        entry.agreement = float((np.concatenate(answers) == self.answers).mean())
        entry.drop = (lost - won) / self.images
        # Normal approximation for paired proportions; where the two always agree it has no width.
        half = 1.96 * math.sqrt(max(lost + won - (lost - won) ** 2 / self.images, 0.0)) / self.images
        entry.drop_interval = (entry.drop - half, entry.drop + half)

    # ---- contestants

    def enter(self) -> None:
        """Build the contestants that are wanted, installed and affordable, the likeliest to ship first."""
        config = self.config
        self.try_one(BASELINE, self.onnxruntime, always=True)
        self.try_one("onnxruntime-int8", self.int8, off="deploy.int8 is false" if not config.int8 else "")
        off = "deploy.openvino is false" if config.openvino is False else ""
        self.try_one("openvino", self.openvino, off=off)
        if not off and not self.folder.onnx_int8.is_file():
            off = "there is no INT8 file: see onnxruntime-int8"
        self.try_one("openvino-int8", self.openvino_int8, off=off)
        self.try_one("eager-channels-last", self.channels_last)
        off = "deploy.compile is false" if config.compile is False else ""
        if config.compile == "auto" and self.deadline is None:
            off = "it takes minutes to build and cannot ship: set deploy.compile = true to measure it"
        self.try_one("compiled-bf16", self.compiled, off=off)

    def try_one(self, name: str, build: Callable[[Entry], Contestant], *, off: str = "", always: bool = False) -> None:
        entry = self.entries[name] = Entry(name)
        needed = BUILD_SECONDS.get(name, 1.0) + self.images * self.seconds
        if name == "onnxruntime-int8":
            needed += self.config.calibration_images * self.seconds
        if off:
            entry.status, entry.reason = "skipped", off
        elif needed > self.left() and not always:
            entry.status = "skipped"
            entry.reason = f"it takes about {needed:.0f} s and {max(self.left(), 0.0):.0f} s are left"
        else:
            try:
                contestant = build(entry)
                if entry.top1 is None:
                    self.measure(entry, contestant)
                self.running[name] = contestant
            except MissingExtra as error:
                entry.status, entry.reason = "unavailable", str(error)
            except Exception as error:  # compilers and runtimes raise classes of their own
                if always:
                    raise
                entry.status = "unavailable"
                entry.reason = f"it failed here: {' '.join(str(error).split())[:200] or type(error).__name__}"
        self.tell(f"{name}: {entry.reason or f'top-1 {entry.top1:.1%}'}")

    def onnxruntime(self, entry: Entry) -> Contestant:
        entry.bytes = self.onnx_path.stat().st_size
        return _onnxruntime(self.onnx_path)

    def int8(self, entry: Entry) -> Contestant:
        entry.precision = "int8"
        path = self.folder.onnx_int8
        started = time.monotonic()
        for keep_edges in (False, True):
            quantise(self.onnx_path, path, self.calibration(), keep_edges=keep_edges)
            contestant = _onnxruntime(path)
            self.measure(entry, contestant)
            again = time.monotonic() - started < self.left()
            if not self.drops(entry) or not again:
                break
        entry.bytes = path.stat().st_size
        return contestant

    def openvino(self, entry: Entry) -> Contestant:
        entry.precision = "bf16" if openvino_precision() == "bf16" else "fp32"
        entry.bytes = self.onnx_path.stat().st_size
        return _openvino(self.onnx_path)

    def openvino_int8(self, entry: Entry) -> Contestant:
        entry.precision = "int8"
        contestant = _openvino(self.folder.onnx_int8)
        entry.bytes = self.folder.onnx_int8.stat().st_size
        return contestant

    def channels_last(self, entry: Entry) -> Contestant:
        entry.bytes = self.weight_bytes
        network = copy.deepcopy(self.network).to(memory_format=torch.channels_last)
        return _eager(network, self.preprocess, torch.channels_last)

    def compiled(self, entry: Entry) -> Contestant:
        entry.precision, entry.bytes = "bf16", self.weight_bytes
        if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
            raise MissingExtra("no C++ compiler was found, and torch.compile needs one: install g++")
        return _compiled(self.network, self.preprocess)

    # ---- speed

    def race(self) -> None:
        """Let the contestants take turns, and keep the median of each."""
        until = time.monotonic() + min(RACE_SECONDS, max(self.left(), 0.0)) / 2
        for entry, latency in self.turns(self.one, until):
            entry.latency_ms = latency
        until = time.monotonic() + min(RACE_SECONDS / 2, max(self.left(), 0.0))
        for entry, latency in self.turns(np.repeat(self.one, BATCH, axis=0), until):
            entry.latency_ms_16 = latency
            entry.throughput = 1000 * BATCH / latency

    def turns(self, pixels: Pixels, until: float) -> Iterator[tuple[Entry, float]]:
        """Yield each entry with its median in milliseconds: of 3 to 30 rounds, of 1 if the deadline has passed."""
        spent: dict[str, list[float]] = {name: [] for name in self.running}
        for contestant in self.running.values():
            contestant(pixels)
        for turn in range(TURNS):
            for name, contestant in self.running.items():
                # One call to settle: the threads of the one before spin for a while, and the caches are its own.
                contestant(pixels)
                started = time.perf_counter()
                contestant(pixels)
                spent[name].append(time.perf_counter() - started)
            if time.monotonic() > until and (turn >= 2 or self.left() < 0):
                break
        for name, seconds in spent.items():
            yield self.entries[name], 1000 * float(np.median(seconds))

    # ---- verdict

    def drops(self, entry: Entry) -> bool:
        # A sample cannot show less than one image; the small amount is for rounding.
        return entry.drop is not None and entry.drop > self.config.max_drop + 1e-9

    def judge(self) -> None:
        """Refuse what loses accuracy, and what is rounded to fewer bits without being faster for it."""
        baseline = _latency(self.entries[BASELINE])
        for entry in self.entries.values():
            if entry.status != "ok" or entry.name in (REFERENCE, BASELINE):
                continue
            if self.drops(entry):
                entry.status = "refused"
                entry.reason = (
                    f"top-1 drops by {entry.drop:.2%} on {self.images} images; "
                    f"deploy.max_drop allows {self.config.max_drop:.2%}"
                )
            elif entry.precision != "fp32" and _latency(entry) >= baseline:
                entry.status = "refused"
                entry.reason = (
                    f"no faster here: {_latency(entry):.2f} ms per image against {baseline:.2f} ms "
                    "of ONNX Runtime in fp32"
                )
        if not any(self.entries[name].status == "ok" for name in INT8_RUNTIMES):
            self.folder.onnx_int8.unlink(missing_ok=True)

    def result(self) -> TournamentResult:
        shippable = [self.entries[name] for name in RUNTIMES if self.entries[name].status == "ok"]
        winner = min(shippable, key=_latency)
        result = TournamentResult(
            [self.entries[name] for name in ORDER],
            winner.name,
            self.images,
            torch.get_num_threads(),
            self.config.target_ms,
        )
        self.tell(f"ships: {result.to_dict()['ships']}")
        return result


def _latency(entry: Entry) -> float:
    return math.inf if entry.latency_ms is None else entry.latency_ms


def _hits(answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return whether each answer is right: the class number, or one of the classes of a multi-hot row."""
    if targets.ndim == 1:
        return answers == targets
    return targets[np.arange(len(answers)), answers] > 0.5


def _eager(
    network: nn.Module, preprocess: Preprocess, memory_format: torch.memory_format = torch.contiguous_format
) -> Contestant:
    def run(pixels: Pixels) -> np.ndarray:
        with torch.inference_mode():
            inputs = torch.from_numpy(preprocess.normalise(pixels)).contiguous(memory_format=memory_format)
            return network(inputs).numpy()

    return run


def _compiled(network: nn.Module, preprocess: Preprocess) -> Contestant:
    """Compile for one image and for a full batch; other sizes are filled up to a batch."""
    import torch._inductor.config as inductor

    compiled = torch.compile(copy.deepcopy(network), dynamic=False)

    def run(pixels: Pixels) -> np.ndarray:
        count = len(pixels)
        if count not in (1, BATCH):
            return np.concatenate(
                [
                    run(np.concatenate([part, np.repeat(part[:1], BATCH - len(part), axis=0)]))[: len(part)]
                    for part in (pixels[start : start + BATCH] for start in range(0, count, BATCH))
                ]
            )
        # Freezing makes the weights constants, which are laid out for the processor once.
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), inductor.patch(freezing=True), quiet():
            return compiled(torch.from_numpy(preprocess.normalise(pixels))).float().numpy()

    return run


def _onnxruntime(path: Path) -> Contestant:
    session = open_session(graph.network_from(onnx.load(path), PIXELS).SerializeToString())

    def run(pixels: Pixels) -> np.ndarray:
        return session.run([LOGITS], {PIXELS: np.moveaxis(pixels, -1, 1).astype(np.float32, order="C")})[0]

    return run


def _openvino(path: Path) -> Contestant:
    network, _ = compile_openvino(path)
    return lambda pixels: network(pixels)[LOGITS]
