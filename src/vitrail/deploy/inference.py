"""Prepare a trained model for inference on this CPU: the same function, computed faster.

Each step works on a copy, and its outputs are compared with those of the original on a seeded batch: what moves them by
more than the tolerance is taken back, and so is what is meant to be faster and is not. Steps, in this order:

    re-parameterise      what folds itself: modules with ``reparameterize``, ``fuse`` or ``switch_to_deploy``
    fold                 normalisations with stored statistics, and layer scales, into the linear map beside them
    fused attention      one kernel in place of products and a softmax; position biases computed once, with four axes
    channels last        the layout of images and convolutions
    bf16                 weights and activations, where the processor multiplies them faster
    pack                 weights laid out once for the processor, activations in the pass of the layer before
    compile              on request: torch's compiler with the weights as constants

Which layers may be folded is seen, not guessed: a batch is followed through the model, and a layer is folded into its
neighbour only if nothing else reads what passes between the two.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale, LayerScale2d
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.pos_embed_rel import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.tiny_vit import Attention as TinyVitAttention
from timm.models.vision_transformer import LayerScale as VitLayerScale
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vitrail.deploy.export import quiet
from vitrail.deploy.reparameterise import foldable, reparameterise
from vitrail.errors import InputError
from vitrail.layers.packed import activation_code, can_pack, pack
from vitrail.layers.processor import preferred_precision

Precision = Literal["auto", "fp32", "bf16"]
Change = Callable[[nn.Module], int]
"""Changes a model in place; returns how many layers it changed."""

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest difference of an output, as a share of the original's largest value."""
GAIN = 1.02
"""Smaller gains of a whole model are not told from noise by a few rounds; of one layer, the square of it."""
ROUNDS = 3
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
_LAYER_SCALES = (LayerScale, VitLayerScale)


@dataclass(frozen=True)
class Step:
    """One step, and what became of it."""

    name: str
    status: Literal["applied", "refused", "not needed"]
    layers: int = 0
    """Modules that it changed."""
    reason: str = ""
    """Why it, or a part of it, was left out: one line."""
    difference: float | None = None
    """Of the outputs after it from those of the original, as a share of the original's largest value."""


@dataclass
class OptimiseReport:
    """What ``optimise`` did and what it is worth."""

    steps: list[Step] = field(default_factory=list)
    precision: str = "fp32"
    tolerance: float = TOLERANCE["fp32"]
    difference: float = 0.0
    """Largest difference of an output from the original's, as a share of the original's largest value."""
    batch: tuple[int, ...] = ()
    """Shape of the images that everything was measured on."""
    before_ms: float = 0.0
    """For that batch, the original model; the least of interleaved rounds."""
    after_ms: float = 0.0
    threads: int = 1

    @property
    def ratio(self) -> float:
        """Time of the original over that of the prepared model."""
        return self.before_ms / self.after_ms if self.after_ms else 1.0

    def __getitem__(self, name: str) -> Step:
        """Return a step by its name."""
        return next(step for step in self.steps if step.name == name)

    def __str__(self) -> str:
        size = "x".join(map(str, self.batch))
        head = (
            f"{self.ratio:.2f}x: {self.before_ms:.1f} ms to {self.after_ms:.1f} ms for {size} in {self.precision}; "
            f"outputs differ by {self.difference:.1e} (allowed: {self.tolerance:.0e})"
        )
        rows = [
            f"  {step.name}: {step.status}"
            + (f", {step.layers} layers" if step.layers else "")
            + (f"; {step.reason}" if step.reason else "")
            for step in self.steps
        ]
        return "\n".join([head, *rows])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        own = {name: value for name, value in vars(self).items() if name != "steps"}
        return {**own, "batch": list(self.batch), "ratio": self.ratio, "steps": [vars(step) for step in self.steps]}


class Prepared(nn.Module):
    """A model made ready by ``optimise``: takes float32 images and returns float32, whatever it computes in.

    Args:
        net: the changed copy.
        precision: of its weights.
        channels_last: whether it wants its images so.
        compiled: run it through torch's compiler, which takes minutes at the first call for each shape.
    """

    def __init__(self, net: nn.Module, precision: str = "fp32", channels_last: bool = False, compiled: bool = False):
        super().__init__()
        self.net, self.precision, self.channels_last, self.compiled = net, precision, channels_last, compiled
        self._run: Callable[[Tensor], Any] | None = None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Return what the model returns of images (B, C, H, W)."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        low = self.precision == "bf16"
        images = images.to(torch.bfloat16 if low else images.dtype).contiguous(memory_format=layout)
        out = self._compiled(images) if self.compiled else self.net(images)
        return torch.utils._pytree.tree_map_only(Tensor, _widened, out) if low else out

    def _compiled(self, images: Tensor) -> Any:
        import torch._inductor.config as inductor

        if self._run is None:
            self._run = torch.compile(self.net, dynamic=False)
        # Freezing makes the weights constants, which are laid out for the processor once.
        with inductor.patch(freezing=True), quiet():
            return self._run(images)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the compiled code out: it is of this process."""
        return {**self.__dict__, "_run": None}


@dataclass(frozen=True)
class Optimised:
    """A prepared model, and how it came about."""

    model: Prepared
    report: OptimiseReport


def optimise(
    model: nn.Module, *, images: Tensor | None = None, precision: Precision = "auto", compile: bool = False
) -> Optimised:
    """Prepare a model for inference on this CPU.

    The model is not changed. The prepared one takes batches of other lengths too, and images of other sizes where the
    model does; it cannot be trained. It takes some fifty forward passes of ``images`` to find out what is worth it.

    Args:
        model: any module from images (B, C, H, W) to tensors, of ours, timm's or other; on the CPU, in float32.
        images: what to measure on, in the size and number to come; None is two seeded images of the model's own size.
        precision: ``"fp32"``, ``"bf16"``, or ``"auto"``: bf16 where it is faster and within its tolerance.
        compile: use torch's compiler as well, which takes minutes.

    Returns:
        ``model`` and ``report``.

    Raises:
        InputError: another device or type, a wrong precision, or a model that does not take the images.

    Example:
        >>> done = optimise(timm.create_model("resnet50").eval())    # doctest: +SKIP
        >>> print(done.report); logits = done.model(images)          # doctest: +SKIP
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"precision = {precision!r} is not allowed: give 'auto', 'fp32' or 'bf16'")
    wrong = {
        f"{t.dtype} on {t.device}" for t in model.parameters() if t.dtype != torch.float32 or t.device.type != "cpu"
    }
    if wrong:
        raise InputError(
            f"optimise works on float32 weights on the CPU, and the model has {', '.join(sorted(wrong))}: "
            "call model.float().cpu() first"
        )
    work = _Work(model, _example(model) if images is None else images)
    work.attempt("re-parameterise", _reparameterisations(work.net))
    work.attempt("fold", _folds(work.net, work.images))
    work.attempt("fused attention", _attention(work.net), measured=True)
    work.lay_out()
    if precision != "fp32":
        work.round(forced=precision == "bf16")
    unpacked = work.net
    work.attempt("pack", work.packings(), measured=True)
    if compile:
        work.compile(unpacked)
    else:
        work.report.steps.append(Step("compile", "not needed", reason="not asked for: compile=True takes minutes"))
    return work.finish(forced=precision == "bf16")


def _example(model: nn.Module) -> Tensor:
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else None
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if size is None or first is None:
        raise InputError(
            f"{type(model).__name__} does not say which images it takes: give images, a batch (B, C, H, W) such as "
            "torch.randn(2, 3, 224, 224)"
        )
    return torch.randn(2, first.in_channels, *size[1:], generator=torch.Generator().manual_seed(0))


class _Work:
    """One optimisation under way: ``net`` is what holds so far."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.images = images
        self.original = copy.deepcopy(model).requires_grad_(False)
        self.original.eval()
        try:
            with torch.no_grad():
                self.expected = tree_leaves(self.original(images))
        except Exception as error:  # a model may refuse its images in any way
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{type(model).__name__} does not take images of {tuple(images.shape)} ({reason}): give others"
            ) from error
        self.net = copy.deepcopy(self.original)
        self.report = OptimiseReport(batch=tuple(images.shape), threads=torch.get_num_threads())
        self.how: dict[str, Any] = {"precision": "fp32", "channels_last": False, "compiled": False}

    def prepared(self, net: nn.Module, **how: Any) -> Prepared:
        return Prepared(net, **{**self.how, **how}).eval()

    def difference(self, net: nn.Module) -> float:
        """Return the largest difference of an output, as a share of the largest value; infinite if none compares."""
        found = tree_leaves(net(self.images))
        if len(found) != len(self.expected):
            return float("inf")
        worst = 0.0
        for got, wanted in zip(found, self.expected):
            if not isinstance(wanted, Tensor) or wanted.numel() == 0:
                continue
            if got.shape != wanted.shape:
                return float("inf")
            off = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-12)
            worst = max(worst, float(off)) if not off.isnan() else float("inf")
        return worst

    def race(self, *nets: nn.Module) -> list[float]:
        """Return seconds of each, taken in turn; the least of a few rounds tells most under load."""
        least = [float("inf")] * len(nets)
        with torch.no_grad():
            for turn in range(ROUNDS + 1):
                for place, net in enumerate(nets):
                    start = _clock()
                    net(self.images)
                    if turn:  # the first prepares kernels
                        least[place] = min(least[place], _clock() - start)
        return least

    def try_out(self, net: nn.Module, measured: bool, **how: Any) -> tuple[str, float | None]:
        """Return why a changed net cannot take the place of the present one ("" if it can), and its difference."""
        new = self.prepared(net, **how)
        try:
            difference = self.difference(new)
            allowed = TOLERANCE[new.precision]
            if not difference <= allowed:
                return f"outputs would differ by {difference:.1e}, and {allowed:.0e} is allowed", difference
            if measured:
                now, then = self.race(self.prepared(self.net), new)
                if now < GAIN * then:
                    return f"no faster here: {now / then:.2f}x", difference
        except Exception as error:  # noqa: BLE001 - a changed model may break in any way
            return f"it failed: {' '.join(str(error).split())[:160] or type(error).__name__}", None
        return "", difference

    def attempt(self, name: str, changes: Sequence[Change], *, measured: bool = False) -> None:
        """Make the changes that hold: all together or, where that fails, those that do one by one."""
        if not changes:
            self.report.steps.append(Step(name, "not needed", reason="the model has nothing of the kind"))
            return
        reason, difference, made = self._make(changes, measured)
        if reason and len(changes) > 1 and not reason.startswith("no faster"):
            left = 0
            for change in changes:
                failed, one, some = self._make([change], measured)
                made, left = made + some, left + bool(failed)
                difference = difference if failed else one
            reason = f"{left} of {len(changes)} left out: together, {reason}"
        status: Literal["applied", "refused"] = "applied" if made else "refused"
        self.report.steps.append(Step(name, status, made, reason, difference))

    def _make(self, changes: Sequence[Change], measured: bool) -> tuple[str, float | None, int]:
        net = copy.deepcopy(self.net)
        try:
            count = sum(change(net) for change in changes)
        except Exception as error:  # noqa: BLE001 - what folds itself may break in any way
            return f"it failed: {' '.join(str(error).split())[:160] or type(error).__name__}", None, 0
        reason, difference = self.try_out(net, measured)
        if not reason:
            self.net = net
        return reason, difference, 0 if reason else count

    def lay_out(self) -> None:
        """Put channels last if that is faster."""
        count = sum(isinstance(module, nn.Conv2d) for module in self.net.modules())
        if self.images.ndim != 4 or not count:
            self.report.steps.append(Step("channels last", "not needed", reason="the model has no convolutions"))
            return
        net = copy.deepcopy(self.net).to(memory_format=torch.channels_last)
        reason, difference = self.try_out(net, True, channels_last=True)
        if not reason:
            self.net, self.how["channels_last"] = net, True
        status: Literal["applied", "refused"] = "refused" if reason else "applied"
        self.report.steps.append(Step("channels last", status, 0 if reason else count, reason, difference))

    def round(self, *, forced: bool) -> None:
        """Compute in bf16 if the processor has units for it, that is faster, and the outputs stay near enough."""
        if not forced and preferred_precision() != "bf16":
            reason = "this processor multiplies no faster in bf16"
            self.report.steps.append(Step("bf16", "refused", reason=reason))
            return
        net = copy.deepcopy(self.net).to(torch.bfloat16)
        reason, difference = self.try_out(net, not forced, precision="bf16")
        if not reason:
            self.net, self.how["precision"] = net, "bf16"
        status: Literal["applied", "refused"] = "refused" if reason else "applied"
        count = sum(1 for module in net.modules() if next(module.parameters(recurse=False), None) is not None)
        self.report.steps.append(Step("bf16", status, 0 if reason else count, reason, difference))

    def packings(self) -> list[Change]:
        """Return the layers whose packed form is faster on what they are given."""
        layout = torch.channels_last if self.how["channels_last"] else torch.contiguous_format
        images = self.images.to(torch.bfloat16 if self.how["precision"] == "bf16" else torch.float32)
        return _packings(self.net, images.contiguous(memory_format=layout))

    def compile(self, unpacked: nn.Module) -> None:
        """Compile, if there is a compiler and its code is faster."""
        if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
            reason = "no C++ compiler was found, and torch.compile needs one: install g++"
            self.report.steps.append(Step("compile", "refused", reason=reason))
            return
        reason, difference = self.try_out(unpacked, True, compiled=True)
        if not reason:
            self.net, self.how["compiled"] = unpacked, True
        status: Literal["applied", "refused"] = "refused" if reason else "applied"
        self.report.steps.append(Step("compile", status, 0 if reason else 1, reason, difference))

    def finish(self, *, forced: bool) -> Optimised:
        """Measure the original against what it has become, and keep it if that is slower and was not asked for."""
        final, report = self.prepared(self.net), self.report
        report.precision, report.tolerance = final.precision, TOLERANCE[final.precision]
        report.difference = self.difference(final)
        before, after = self.race(self.original, final)
        if after > GAIN * before and not forced:  # steps that gain alone can lose together
            report.steps.append(Step("all", "refused", reason=f"no faster here: {before / after:.2f}x; none is kept"))
            final, after = Prepared(self.original).eval(), before
            report.precision, report.tolerance, report.difference = "fp32", TOLERANCE["fp32"], 0.0
        report.before_ms, report.after_ms = 1000 * before, 1000 * after
        return Optimised(final, report)


def _clock() -> float:
    """Return seconds; where one thread computes, those of it alone, which other processes do not lengthen."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


# ---- what passes from one layer to another alone ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Link:
    """What ``giver`` returns goes to ``taker`` and nowhere else."""

    giver: str
    taker: str
    shape: tuple[int, ...]


class _Readers(TorchFunctionMode):
    """Counts the torch functions that read each of the tensors it was told of."""

    LOOKS = frozenset({"size", "dim", "numel", "stride", "is_contiguous", "ndimension", "is_floating_point"})

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}
        self.reads: dict[int, int] = defaultdict(int)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in self.kept]
        versions = [t._version for t in tensors]
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        for tensor, version in zip(tensors, versions):
            looked = name in self.LOOKS or (name == "__get__" and not isinstance(out, Tensor))
            passed_on = out is tensor and tensor._version == version  # as dropout does when nothing is trained
            if not looked and not passed_on:
                self.reads[id(tensor)] += 1
        return out


def _follow(model: nn.Module, images: Tensor) -> tuple[list[_Link], dict[str, list[tuple[int, ...]]]]:
    """Follow a batch; return the links between layers without children, and the shapes that each layer was given."""
    readers = _Readers()
    gave: dict[int, list[str]] = defaultdict(list)
    took: dict[int, list[str]] = defaultdict(list)
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    inplace = {module: module.inplace for module in model.modules() if getattr(module, "inplace", False) is True}

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                shapes[name].append(tuple(args[0].shape))
                if id(args[0]) in readers.kept:
                    took[id(args[0])].append(name)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and not any(out is value for value in args):
                readers.kept[id(out)] = out  # kept alive, so that no other tensor has its number
                gave[id(out)].append(name)

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            # A layer that changes its input in place returns the tensor that it was given.
            if module in inplace:
                vars(module)["inplace"] = False
            if name and (not any(True for _ in module.children()) or isinstance(module, BatchNormAct2d)):
                if isinstance(module, nn.Identity | nn.Dropout | DropPath):
                    continue
                handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
        with torch.no_grad(), readers:
            results = tree_leaves(model(images))
    finally:
        for handle in handles:
            handle.remove()
        for module, value in inplace.items():
            vars(module)["inplace"] = value
    for tensor in results:
        if isinstance(tensor, Tensor):
            readers.reads[id(tensor)] += 1
    links = [
        _Link(givers[0], took[key][0], tuple(readers.kept[key].shape))
        for key, givers in gave.items()
        if len(givers) == 1 and len(took[key]) == 1 and readers.reads[key] == 1
    ]
    return [link for link in links if len(shapes[link.giver]) == 1 and len(shapes[link.taker]) == 1], shapes


# ---- the steps -------------------------------------------------------------------------------------------------------


def _reparameterisations(model: nn.Module) -> list[Change]:
    found = sum(foldable(module) is not None for module in model.modules() if module is not model)

    def change(net: nn.Module) -> int:
        reparameterise(net).requires_grad_(False)
        return found

    return [change] if found else []


def _folds(model: nn.Module, images: Tensor) -> list[Change]:
    """Return a change for each normalisation or layer scale that can go into the linear map before or after it."""
    modules = dict(model.named_modules())
    links, _ = _follow(model, images)
    changes: dict[str, Change] = {}
    for link in links:
        giver, taker = modules[link.giver], modules[link.taker]
        if _scales(taker, giver, link.shape):
            changes.setdefault(link.taker, partial(_fold_after, link=link))
    for link in links:
        giver, taker = modules[link.giver], modules[link.taker]
        if _scales(giver, taker, link.shape) and not _pads(taker):
            changes.setdefault(link.giver, partial(_fold_before, link=link))
    return list(changes.values())


def _scales(layer: nn.Module, linear: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a layer scales and shifts the very axis that the linear map sums over or gives."""
    if isinstance(layer, BatchNormAct2d) or type(layer) in _BATCH_NORMS:
        stored = getattr(layer, "running_mean", None) is not None
        return stored and (type(linear) in _CONVOLUTIONS or (type(linear) is nn.Linear and len(shape) == 2))
    if type(layer) is LayerScale2d:
        return type(linear) is nn.Conv2d
    return type(layer) in _LAYER_SCALES and type(linear) is nn.Linear


def _pads(linear: nn.Module) -> bool:
    """Return whether zeros come in at the edges, which a shift before the map would not have reached."""
    return isinstance(linear, _CONVOLUTIONS) and (
        isinstance(linear, Conv2dSame) or isinstance(linear.padding, str) or any(linear.padding)
    )


def _scale_and_shift(layer: Any) -> tuple[Tensor, Tensor]:
    """Return what a layer multiplies by and adds, in double precision."""
    if hasattr(layer, "gamma"):
        return layer.gamma.detach().double(), torch.zeros_like(layer.gamma, dtype=torch.float64)
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().double()
    shift = -layer.running_mean.double() * scale
    return scale, shift if layer.bias is None else shift + layer.bias.detach().double()


def _set(linear: Any, weight: Tensor, bias: Tensor) -> None:
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
    linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)


def _fold_after(net: nn.Module, link: _Link) -> int:
    """Fold a scale and shift into the linear map before it."""
    linear, layer = net.get_submodule(link.giver), net.get_submodule(link.taker)
    scale, shift = _scale_and_shift(layer)
    weight = linear.weight.detach().double()  # type: ignore[operator]  # (out, ...)
    bias = shift if linear.bias is None else linear.bias.double() * scale + shift  # type: ignore[operator]
    _set(linear, weight * scale.view(-1, *[1] * (weight.ndim - 1)), bias)
    net.set_submodule(link.taker, layer.act if isinstance(layer, BatchNormAct2d) else nn.Identity())
    return 1


def _fold_before(net: nn.Module, link: _Link) -> int:
    """Fold a scale and shift into the linear map after it."""
    layer, linear = net.get_submodule(link.giver), net.get_submodule(link.taker)
    scale, shift = _scale_and_shift(layer)
    weight = linear.weight.detach().double()  # type: ignore[operator]  # (out, in / groups, ...)
    groups, axes = getattr(linear, "groups", 1), [1] * (weight.ndim - 2)
    # Outputs of group g see the inputs of group g.
    scale, shift = (v.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1) for v in (scale, shift))
    added = (weight * shift.view(*shift.shape, *axes)).flatten(1).sum(1)
    _set(
        linear,
        weight * scale.view(*scale.shape, *axes),
        added if linear.bias is None else linear.bias.double() + added,  # type: ignore[operator]
    )
    net.set_submodule(link.giver, nn.Identity())
    return 1


class FixedBias(nn.Module):
    """A position bias of attention, computed once; in the place of timm's ``RelPosBias`` and its kin.

    Args:
        bias: (heads, N, N) or (1, heads, N, N).
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        # With three axes torch's fused attention goes to its slow path.
        self.register_buffer("bias", bias.detach().clone().reshape(1, *bias.shape[-3:]))

    def get_bias(self) -> Tensor:
        """Return the bias (1, heads, N, N)."""
        bias: Tensor = self.bias  # type: ignore[assignment]
        return bias

    def forward(self, scores: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Return scores (B, heads, N, N) with the bias added."""
        return scores + self.get_bias()


class FusedGlobalAttention(nn.Module):
    """GCViT's attention in windows, also with the query of the whole image, by torch's fused kernel.

    Args:
        layer: timm's, whose layers are taken over.
    """

    def __init__(self, layer: WindowAttentionGlobal) -> None:
        super().__init__()
        self.num_heads, self.use_global = layer.num_heads, layer.use_global
        self.qkv, self.proj, self.rel_pos = layer.qkv, layer.proj, layer.rel_pos

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """Return (B, N, C) of x (B, N, C); the windows of one image lie beside each other."""
        batch, places, width = x.shape
        parts = self.qkv(x).view(batch, places, -1, self.num_heads, width // self.num_heads)
        parts = parts.permute(2, 0, 3, 1, 4).unbind(0)  # two or three of (B, heads, N, D)
        if self.use_global and q_global is not None:
            whole = q_global.reshape(len(q_global), places, self.num_heads, -1).transpose(1, 2)
            parts = (whole.repeat_interleave(batch // len(whole), dim=0), *parts)
        query, key, value = parts
        out = F.scaled_dot_product_attention(query, key, value, self.rel_pos.get_bias())
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, places, width))
        return mixed


class FusedTinyVitAttention(nn.Module):
    """TinyViT's attention with its bias computed once, in the four axes that torch's fused kernel wants.

    Args:
        layer: timm's, whose layers are taken over.
    """

    def __init__(self, layer: TinyVitAttention) -> None:
        super().__init__()
        self.num_heads, self.sizes = layer.num_heads, [layer.key_dim, layer.key_dim, layer.val_dim]
        self.norm, self.qkv, self.proj = layer.norm, layer.qkv, layer.proj
        self.rel_pos = FixedBias(layer.get_attention_biases(layer.attention_biases.device))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, C) of x (B, N, C)."""
        batch, places, _ = x.shape
        parts = self.qkv(self.norm(x)).view(batch, places, self.num_heads, -1).transpose(1, 2)  # (B, heads, N, 2 D + E)
        query, key, value = parts.split(self.sizes, dim=-1)
        out = F.scaled_dot_product_attention(query, key, value, self.rel_pos.get_bias())
        mixed: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return mixed


_FUSED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    WindowAttentionGlobal: FusedGlobalAttention,
    TinyVitAttention: FusedTinyVitAttention,
}
_BIASES = (RelPosBias, RelPosBiasTf, RelPosMlp)


def _attention(model: nn.Module) -> list[Change]:
    """Return a change that computes position biases once, and one for each kind of attention that can be fused."""

    def fix(net: nn.Module) -> int:
        names = [name for name, module in net.named_modules() if type(module) in _BIASES]
        for name in names:
            net.set_submodule(name, FixedBias(net.get_submodule(name).get_bias()))  # type: ignore[operator]
        return len(names)

    def fuse(kind: type[nn.Module], net: nn.Module) -> int:
        names = [name for name, module in net.named_modules() if type(module) is kind]
        for name in names:
            if kind in _FUSED:
                net.set_submodule(name, _FUSED[kind](net.get_submodule(name)))
            else:
                vars(net.get_submodule(name))["fused_attn"] = True
        return len(names)

    kinds = {type(m) for m in model.modules() if type(m) in _FUSED or getattr(m, "fused_attn", None) is False}
    biased = any(type(module) in _BIASES for module in model.modules())
    changes: list[Change] = [fix] if biased else []
    return changes + [partial(fuse, kind) for kind in sorted(kinds, key=lambda kind: kind.__name__)]


def _packings(model: nn.Module, images: Tensor) -> list[Change]:
    """Return a change for all layers whose packed form is faster than their own, each timed on what it is given."""
    modules = dict(model.named_modules())
    links, shapes = _follow(model, images)
    follows = {link.giver: link.taker for link in links if activation_code(modules[link.taker])}
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    gains: dict[Any, bool] = {}
    chosen = []
    for name, layer in modules.items():
        if name not in shapes or not can_pack(layer):
            continue
        activation = modules[follows[name]] if name in follows else None
        key = (shapes[name][0], layer.weight.shape, repr(layer), repr(activation))
        if key not in gains:
            gains[key] = _gains(layer, activation, shapes[name][0], images.dtype, layout)
        if gains[key]:
            chosen.append((name, follows.get(name)))

    def change(net: nn.Module) -> int:
        for name, after in chosen:
            layer = net.get_submodule(name)
            if after is None:
                net.set_submodule(name, pack(layer))
            else:
                net.set_submodule(name, pack(layer, net.get_submodule(after)))
                net.set_submodule(after, nn.Identity())
        return len(chosen)

    return [change] if chosen else []


def _gains(
    layer: nn.Module,
    activation: nn.Module | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> bool:
    """Return whether the packed form of a layer and its activation is faster."""
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=layout) if x.ndim == 4 and isinstance(layer, nn.Conv2d) else x
    packed, least = pack(layer, activation), [float("inf")] * 2
    with torch.no_grad():
        for turn in range(2 * ROUNDS):
            for place, run in enumerate((lambda: _plain(layer, activation, x), lambda: packed(x))):
                start = _clock()
                run()
                if turn:
                    least[place] = min(least[place], _clock() - start)
    return least[0] > GAIN**2 * least[1]


def _plain(layer: nn.Module, activation: nn.Module | None, x: Tensor) -> Any:
    return layer(x) if activation is None else activation(layer(x))


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
