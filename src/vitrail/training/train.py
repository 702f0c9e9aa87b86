"""The training loop.

One optimiser step, top-down: the processes agree on the size of the joint batch and on the length of the plan; the
batch is normalised and mixed on the device; its parts run forward and backward, weighted by their share of the joint
batch; the gradient is checked and clipped; optimiser, method and moving average follow.

Nothing random outlives a step: the order of the images, their views, the mixing and the dropout all derive from
(seed, epoch, step, process). A checkpoint therefore holds weights, optimiser and counters, and a run that goes on from
one computes the same numbers as a run that was never interrupted.

The weights that ship are those of the moving average where ``train.ema`` is on, else the trained ones; of the best
validation where ``train.patience`` is on, else of the last step.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import build_views
from vitrail.errors import RunError
from vitrail.layers.sync_batchnorm import synchronised_batchnorm
from vitrail.methods.method import Method
from vitrail.runs import RunFolder, write_text
from vitrail.training.balance import class_weights, image_weights
from vitrail.training.checkpoint import Checkpoints
from vitrail.training.device import Normalise, create_accelerator, place, require_resolved, resolved
from vitrail.training.mixing import mix
from vitrail.training.optim import Plan, create_optimizer, learning_rate, param_groups, set_learning_rate
from vitrail.training.pace import Pace
from vitrail.training.recipe import Recipe
from vitrail.training.validate import figures, pixel_cache, validate

if TYPE_CHECKING:
    from vitrail.data.index import Index

__all__ = ["Progress", "TrainResult", "class_weights", "train", "validate"]

Event = dict[str, Any]
Stop = Literal["finished", "budget", "patience"]

FREE_KEYS = {"minutes", "train.workers", "train.cache_mb", "train.checkpoint_seconds"}
"""Recipe keys that may change when a run goes on, beside all of ``[evaluate]`` and ``[deploy]``."""


@dataclass
class TrainResult:
    """What came out of training.

    Attributes:
        method: its ``model`` holds the weights that ship, in evaluation mode.
        history: the lines of ``metrics.jsonl``.
        figures: validation figures of the weights that ship: ``loss`` and ``top1`` or ``map``.
        epochs, steps: how far it came.
        seconds: time spent in training, over all starts of the run.
        images_per_second: over the training steps alone.
        stopped: the plan was done, cut by the deadline, or ended by ``train.patience``.
        failed: keys of the images that could not be read.
    """

    method: Method
    history: list[Event]
    figures: dict[str, float]
    epochs: float
    steps: int
    seconds: float
    images_per_second: float
    stopped: Stop
    failed: list[str]

    @property
    def model(self) -> nn.Module:
        """The network that ships."""
        return self.method.model


@dataclass
class Progress:
    """All of a run's state that is no tensor: plain values, part of every checkpoint."""

    plan: tuple[tuple[int, float], ...]
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    """``step`` and ``value`` of the best validation."""
    stale: int = 0
    """Validations since the best one."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the loss terms since the last line of ``metrics.jsonl``."""
    history: list[Event] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    """Images that could not be read, and the step at which that was seen."""
    stopped: Stop | None = None


def train(
    method: Method,
    index: Index,
    preprocess: Preprocess,
    recipe: Recipe,
    folder: RunFolder,
    *,
    deadline: float | None = None,
    events: Callable[[Event], None] | None = None,
) -> TrainResult:
    """Train ``method`` on the training split of ``index``, going on from the newest checkpoint in ``folder``.

    Args:
        method: trained in place; its class weights, if any, are the caller's to set.
        index: images and targets.
        preprocess: of the model.
        recipe: with nothing left at ``"auto"`` in its ``[augment]``, ``[optim]`` and ``[train]``.
        folder: gets ``checkpoints/`` and ``metrics.jsonl``.
        deadline: value of ``time.monotonic()`` at which everything is to be over, the final validation and checkpoint
            included; the plan is shortened to fit, and the learning rate with it.
        events: called in the main process with dictionaries whose ``"event"`` is ``start``, ``pace``, ``progress``,
            ``validation``, ``checkpoint``, ``replan``, ``warning`` or ``end``.

    Raises:
        InputError: the recipe is unresolved, or asks for what model or machine cannot do.
        RunError: a loss or gradient is not finite, a checkpoint cannot be written or read, or belongs to another run.
    """
    require_resolved(recipe)
    accelerator = create_accelerator(recipe)
    place(method, recipe, accelerator.device)
    joint = recipe.train.sync_batchnorm and accelerator.num_processes > 1
    with synchronised_batchnorm(method) if joint else contextlib.nullcontext():
        run = _Run(method, index, preprocess, recipe, folder, accelerator, deadline, events)
        try:
            return run.run()
        finally:
            accelerator.unwrap_model(run.wrapped, keep_fp32_wrapper=False)
            vars(method).pop("forward", None)  # left over from the wrapper, it would tie copies to this instance
            accelerator.free_memory()


class _Run:
    """The state of one call of ``train``."""

    def __init__(
        self,
        method: Method,
        index: Index,
        preprocess: Preprocess,
        recipe: Recipe,
        folder: RunFolder,
        accelerator: Accelerator,
        deadline: float | None,
        events: Callable[[Event], None] | None,
    ) -> None:
        self.method, self.index, self.preprocess, self.recipe = method, index, preprocess, recipe
        self.folder, self.accelerator = folder, accelerator
        self.tell: Callable[[Event], None] = events if events and accelerator.is_main_process else lambda event: None
        self.config = config = recipe.train

        self.rows, self.val_rows = index.rows("train"), index.rows("val")
        self.batch_size = resolved(config.batch_size)
        batches, rest = divmod(len(self.rows), self.batch_size)
        # Batch normalisation has no statistics of one image, so a remainder of one sits out this epoch.
        self.steps_per_epoch = max(batches + (rest > 1), 1)
        self.planned = max(round(resolved(config.epochs) * self.steps_per_epoch), 1)
        self.eval_steps = max(round(config.eval_every * self.steps_per_epoch), 1)
        self.log_steps = max(self.planned // 200, 1)
        self.pace = Pace(deadline, self.eval_steps, len(self.val_rows) / self.batch_size)
        self.weights = image_weights(index, self.rows) if config.balance == "sampler" else None
        self.views = build_views(method.views, preprocess, recipe.augment, recipe.data)
        mixing = recipe.augment.mixup or recipe.augment.cutmix
        self.mixed = [name for name, view in method.views.items() if view == "train" and mixing]
        self.cache = pixel_cache(index, recipe, folder)

        self.normalise = Normalise(preprocess, config.channels_last is True).to(accelerator.device)
        self.groups = param_groups(method, recipe.optim)
        self.parameters = [parameter for group in self.groups for parameter in group["params"]]
        decay = resolved(config.ema)
        self.ema = ModelEmaV3(method.model, decay=decay, use_warmup=True) if decay else None
        self.constrained = _constrained(method)
        self.ema_constrained = _constrained(self.ema.module) if self.ema else []
        self.wrapped, self.optimizer = accelerator.prepare(method, create_optimizer(self.groups, recipe.optim))

        self.checkpoints = Checkpoints(folder.checkpoints)
        self.saved_at = time.monotonic()
        self.told_at = -math.inf
        self.identity = _identity(recipe, preprocess, index, self.rows)
        self.progress = Progress(Plan.of(self.planned).points)
        # A device that works on its own is asked about a step only when the next one is queued.
        self.lag = 0 if accelerator.device.type == "cpu" else 1
        self.pending: deque[_Measured] = deque()
        # The processes talk about counts between their CPUs, so that no device has to be waited for.
        self.hosts: Any = dist.new_group(backend="gloo") if accelerator.num_processes > 1 and self.lag else None

    @property
    def plan(self) -> Plan:
        return Plan(self.progress.plan)

    def seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self.pace.started

    # ---- the course of a run

    def run(self) -> TrainResult:
        self.resume()
        progress = self.progress
        if progress.stopped is None:
            self.announce()
            self.method.train()
            self.pace.aside()
            while progress.stopped is None and progress.step < self.plan.total:
                self.epoch()
            self.validate()
            if progress.stopped is None:
                progress.stopped = "budget" if progress.step < self.planned else "finished"
            progress.failed = dict(itertools.chain(*gather_object([list(progress.failed.items())])))
            self.save()
        return self.ship()

    def epoch(self) -> None:
        """Train to the end of the present epoch, or of the plan."""
        progress = self.progress
        epoch, first = divmod(progress.step, self.steps_per_epoch)
        loader = make_loader(
            self.index,
            self.rows,
            self.views,
            batch_size=self.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            first_batch=first,
            shuffle=True,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=resolved(self.config.workers),
            cache=self.cache,
            weights=self.weights,
        )
        for batch in itertools.islice(loader, self.steps_per_epoch - first):
            counts, total = self.agree(len(batch["row"]))
            if total != self.plan.total:
                self.replan(total)
            if progress.step >= total:
                return
            self.note_failures(batch["failed"])
            if min(counts):
                self.step(batch, counts)
            progress.step += 1
            progress.images += sum(counts)
            progress.step_seconds += self.pace.step_done()
            self.report()
            if progress.step == total:
                return
            if progress.step % self.eval_steps == 0:
                self.validate()
                if progress.stopped is not None:
                    return
            waited = time.monotonic() - self.saved_at
            # Short epochs share a checkpoint, so that writing stays below a twentieth of the time.
            ended = progress.step % self.steps_per_epoch == 0 and waited >= 20 * self.pace.checkpoint
            if ended or waited >= self.config.checkpoint_seconds:
                self.save()

    def agree(self, count: int) -> tuple[list[int], int]:
        """Return the images of each process in this joint batch, and the length of the plan by the main one's clock."""
        mine = [count, self.pace.allowed(self.progress.step, self.plan.total, self.planned)]
        if self.accelerator.num_processes == 1:
            return mine[:1], mine[1]
        every = [torch.empty(2, dtype=torch.int64) for _ in range(self.accelerator.num_processes)]
        dist.all_gather(every, torch.tensor(mine), group=self.hosts)
        return [int(pair[0]) for pair in every], int(every[0][1])

    def replan(self, total: int) -> None:
        self.progress.plan = self.plan.bent(self.progress.step, total).points
        self.log("plan", {"step": self.progress.step, "total": total, "seconds": self.seconds()})
        self.tell({"event": "replan", "step": self.progress.step, "total": total})

    # ---- one step

    def step(self, batch: dict[str, Any], counts: list[int]) -> None:
        """Make one optimiser step on the joint batch, of which this process holds ``batch``.

        A method that alternates or nests optimisers will take over from here.
        """
        accelerator, step = self.accelerator, self.progress.step
        done = self.plan.progress(step + 1)
        _seed(accelerator.device, self.config.seed, step, accelerator.process_index)
        self.method.schedule(done)
        terms: dict[str, Tensor] = {}
        parts = min(self.config.accumulate, min(counts))
        for number, part in enumerate(_split(self.inputs(batch), parts), start=1):
            share = len(part["row"]) / sum(counts)
            with accelerator.no_sync(self.wrapped) if number < parts else contextlib.nullcontext():
                output = self.wrapped(part)
                # The gradients of the processes are averaged, hence their number.
                loss = output["loss"] * (share * len(counts))
                # As accelerator.backward does, without its search for packages at every call.
                (loss if accelerator.scaler is None else accelerator.scaler.scale(loss)).backward()
            for name, value in output.items():
                terms[name] = terms.get(name, 0) + value.detach().float() * share
        accelerator.unscale_gradients()
        norm = self.measure(terms)
        if self.recipe.optim.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.optim.clip_grad, norm)
        set_learning_rate(self.optimizer, self.learning_rate(done))
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        for module in self.constrained:
            module.constrain()
        self.method.after_step()
        if self.ema is not None:
            self.ema.update(self.method.model, step=step + 1)
            # A mean of what meets a constraint need not meet it.
            for module in self.ema_constrained:
                module.constrain()

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch on the device, normalised and mixed."""
        device = self.accelerator.device
        inputs = {name: batch[name].to(device, non_blocking=True) for name in ("target", "row")}
        inputs |= {name: self.normalise(batch[name]) for name in self.method.views}
        if self.mixed:
            rng = np.random.default_rng((self.config.seed, self.progress.step))
            inputs = mix(inputs, self.mixed, self.recipe.augment, len(self.index.classes), rng)
        return inputs

    def learning_rate(self, done: float) -> float:
        peak = resolved(self.recipe.optim.lr)
        return learning_rate(done, peak=peak, warmup=self.config.warmup, floor=self.config.min_lr)

    # ---- what must be finite

    def measure(self, terms: dict[str, Tensor]) -> Tensor:
        """Note loss terms and gradients, check those of the step that is due, and return the gradient's norm."""
        values = torch.stack(list(terms.values()))
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values)
        owners = [parameter for parameter in self.parameters if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in owners]))
        measured = _Measured(self.progress.step, list(terms), values, norms, torch.linalg.vector_norm(norms), owners)
        self.pending.append(measured)
        self.check(keep=self.lag)
        return measured.norm

    def check(self, keep: int = 0) -> None:
        """Read the measurements of all steps but the last ``keep``; raise if one is not finite."""
        while len(self.pending) > keep:
            measured = self.pending.popleft()
            terms = dict(zip(measured.names, measured.values.tolist()))
            wrong = [f"the loss term {name!r}" for name, value in terms.items() if not math.isfinite(value)]
            # A loss scaler meets gradients that overflow, skips the step and scales down.
            if self.accelerator.scaler is None and not math.isfinite(measured.norm.item()):
                wrong.append(f"the gradient of {measured.offender(self.method)!r}")
            if wrong:
                kept = self.checkpoints.steps()
                raise RunError(
                    f"training stopped at step {measured.step}: {wrong[0]} is not finite; in a new folder, try a lower "
                    "optim.lr, a longer train.warmup or train.precision=fp32 "
                    + (f"(the checkpoint of step {kept[0]} is kept)" if kept else "(no checkpoint was written yet)")
                )
            for name, value in {**terms, "steps": 1}.items():
                self.progress.window[name] = self.progress.window.get(name, 0.0) + value

    # ---- validation

    def validate(self) -> None:
        """Measure the weights as they would ship, unless that was done at this very step."""
        progress, start = self.progress, time.monotonic()
        if not len(self.val_rows) or self.validated_at(progress.step):
            return
        self.check()
        model = self.ema.module if self.ema else self.method.model
        logits, targets, rows = validate(
            model,
            self.index,
            self.preprocess,
            self.recipe,
            self.val_rows,
            accelerator=self.accelerator,
            cache=self.cache,
        )
        if not np.isfinite(logits).all():
            raise RunError(f"validation at step {progress.step}: the outputs are not finite; lower optim.lr")
        self.note_failures([self.index.key(row) for row in np.setdiff1d(self.val_rows, rows)])
        result = figures(logits, targets)
        value = result["map" if self.index.multilabel else "top1"]
        improved = not progress.best or value > progress.best["value"]
        if improved:
            progress.best = {"step": progress.step, "value": value}
        progress.stale = 0 if improved else progress.stale + 1
        if 0 < self.config.patience <= progress.stale and progress.step < self.plan.total:
            progress.stopped = "patience"
        line = {"step": progress.step, "epoch": progress.step / self.steps_per_epoch, **result, "images": len(rows)}
        self.log("val", {**line, "seconds": self.seconds()})
        self.tell({"event": "validation", "improved": improved, **line})
        self.pace.validation = time.monotonic() - start
        self.pace.aside()
        if improved and self.config.patience:
            self.save()

    def validated_at(self, step: int) -> dict[str, float]:
        """Return the figures measured at ``step``; empty if none were."""
        lines = [line for line in self.progress.history if line["kind"] == "val" and line["step"] == step]
        return {name: lines[-1][name] for name in ("loss", "top1", "map") if name in lines[-1]} if lines else {}

    # ---- what is told

    def announce(self) -> None:
        decayed = sum(len(group["params"]) for group in self.groups if group.get("weight_decay", True))
        self.tell(
            {
                "event": "start",
                "parameters": sum(parameter.numel() for parameter in self.method.model.parameters()),
                "trained": sum(parameter.numel() for parameter in self.parameters),
                "decayed": decayed,
                "undecayed": len(self.parameters) - decayed,
                "batch_size": self.batch_size,
                "devices": [str(self.accelerator.device)] * self.accelerator.num_processes,
                "precision": self.config.precision,
                "images": len(self.rows),
                "steps": self.plan.total,
                "steps_per_epoch": self.steps_per_epoch,
                "step": self.progress.step,
            }
        )

    def report(self) -> None:
        """Log about 200 lines in all, and tell about four times a second."""
        progress, pace, now = self.progress, self.pace, time.monotonic()
        due = progress.step % self.log_steps == 0 or progress.step == self.plan.total
        tell = len(pace.steps) >= 3 and now - self.told_at >= 0.25
        if not (due or tell):
            return
        terms = {name: value / progress.window["steps"] for name, value in progress.window.items() if name != "steps"}
        lr = self.learning_rate(self.plan.progress(progress.step))
        line = {"step": progress.step, "epoch": progress.step / self.steps_per_epoch, "lr": lr, **terms}
        if tell:
            eta = pace.remaining(self.plan.total - progress.step)
            if math.isinf(self.told_at):
                self.tell({"event": "pace", "expected_seconds": self.seconds() + eta})
            speed = {"total": self.plan.total, "images_per_second": self.batch_size / pace.step(), "eta": eta}
            self.tell({"event": "progress", **line, **speed})
            self.told_at = now
        if due and terms:
            self.log("train", {**line, "seconds": self.seconds()})
            progress.window = {}

    def log(self, kind: str, values: Event) -> None:
        """Add a line to the history and to ``metrics.jsonl``."""
        line = {"kind": kind, **values}
        self.progress.history.append(line)
        if self.accelerator.is_main_process:
            try:
                with self.folder.metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise RunError(
                    f"cannot write {self.folder.metrics}: {error.strerror}; mend this and run the same command again "
                    "(the checkpoints are intact)"
                ) from error

    def note_failures(self, keys: list[str]) -> None:
        failed = self.progress.failed
        for key in keys:
            if key not in failed:
                failed[key] = self.progress.step
                self.warn(f"cannot read {key}; it is left out")
        if len(failed) > 32 + self.progress.images:
            raise RunError(
                f"{len(failed)} images cannot be read any more, the first is {next(iter(failed))}; check that the data "
                "are still there and run the same command again (the checkpoints are intact)"
            )

    # ---- what is kept

    def save(self) -> None:
        """Write a checkpoint, in the main process."""
        self.check()
        start = time.monotonic()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "identity": self.identity,
                "progress": json.dumps({**asdict(self.progress), "seconds": self.seconds()}),
                "method": self.method.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
            best = [int(self.progress.best["step"])] if self.config.patience and self.progress.best else []
            self.checkpoints.save(self.progress.step, state, also=best)
            self.pace.checkpoint = time.monotonic() - start
            self.tell({"event": "checkpoint", "step": self.progress.step, "seconds": self.pace.checkpoint})
        self.pace.aside()
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one, and bring ``metrics.jsonl`` to the same step."""
        state = self.checkpoints.latest(self.warn)
        if state is not None:
            self.compare(state["identity"])
            values = json.loads(state["progress"])
            self.progress = Progress(**{**values, "plan": tuple(map(tuple, values["plan"]))})
            self.load(state)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        # No process may write before all have read.
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_text(self.folder.metrics, "".join(json.dumps(line) + "\n" for line in self.progress.history))

    def load(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])

    def warn(self, text: str) -> None:
        self.tell({"event": "warning", "text": text})

    def compare(self, identity: dict[str, str]) -> None:
        """Refuse a checkpoint of another recipe or other data."""
        keys = sorted(key for key in {*identity, *self.identity} if identity.get(key) != self.identity.get(key))
        if keys:
            shown = ", ".join(f"{key} ({identity.get(key)} there, {self.identity.get(key)} now)" for key in keys[:5])
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise RunError(
                f"the checkpoints in {self.checkpoints.folder} belong to another run: {shown}{more}; use the same "
                "recipe and data, or another folder"
            )

    def ship(self) -> TrainResult:
        """Put the weights that ship into the model."""
        progress = self.progress
        assert progress.stopped is not None
        step = progress.step
        if self.config.patience and progress.best and progress.best["step"] != step:
            try:
                self.load(self.checkpoints.load(int(progress.best["step"])))
                step = int(progress.best["step"])
            except RunError as error:
                self.warn(f"{error}; the last weights ship instead of the best")
        if self.ema is not None:
            self.method.model.load_state_dict(self.ema.module.state_dict())
        self.method.eval()
        result = TrainResult(
            method=self.method,
            history=progress.history,
            figures=self.validated_at(step),
            epochs=progress.step / self.steps_per_epoch,
            steps=progress.step,
            seconds=progress.history[-1]["seconds"] if progress.history else 0.0,
            images_per_second=progress.images / progress.step_seconds if progress.step_seconds else 0.0,
            stopped=progress.stopped,
            failed=sorted(progress.failed),
        )
        self.tell({"event": "end", "stopped": result.stopped, "steps": result.steps, **result.figures})
        return result


@dataclass
class _Measured:
    """Figures of one step, still on the device."""

    step: int
    names: list[str]
    values: Tensor
    norms: Tensor
    norm: Tensor
    owners: list[nn.Parameter]

    def offender(self, method: Method) -> str:
        """Return the name of the first parameter whose gradient is not finite."""
        finite = self.norms.isfinite().tolist()
        guilty = self.owners[finite.index(False)] if False in finite else self.owners[0]
        return next(name for name, parameter in method.named_parameters() if parameter is guilty)


def _constrained(whole: nn.Module) -> list[Any]:
    """Return the modules whose parameters must meet a constraint, which ``constrain()`` brings about after a step."""
    return [module for module in whole.modules() if callable(getattr(module, "constrain", None))]


def _split(inputs: dict[str, Any], parts: int) -> Iterator[dict[str, Any]]:
    if parts == 1:
        yield inputs
        return
    pieces = {name: value.tensor_split(parts) for name, value in inputs.items()}
    for number in range(parts):
        yield {name: piece[number] for name, piece in pieces.items()}


def _seed(device: torch.device, *numbers: int) -> None:
    """Seed what a step on ``device`` may draw from; torch.manual_seed visits every kind of device there could be."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _identity(recipe: Recipe, preprocess: Preprocess, index: Index, rows: np.ndarray) -> dict[str, str]:
    """Return what must be the same for a run to go on: recipe keys and their values, and digests of the rest."""
    values: dict[str, str] = {}
    for section, content in recipe.model_dump(mode="json", exclude={"evaluate", "deploy"}).items():
        entries = content.items() if isinstance(content, dict) else [("", content)]
        values |= {f"{section}.{key}".rstrip("."): json.dumps(value) for key, value in entries}
    digest = hashlib.sha256(json.dumps(index.classes).encode())
    digest.update(rows.astype(np.int64).tobytes())
    values = {key: value for key, value in values.items() if key not in FREE_KEYS}
    return {**values, "the preprocessing": str(preprocess.to_dict()), "the training images": digest.hexdigest()[:12]}
