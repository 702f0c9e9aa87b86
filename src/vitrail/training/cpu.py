"""Faster training steps on CPUs with the same mathematics, chosen by measurement.

Some of torch's operators have a slow backward on CPUs for the shapes of image models, and which ones depends on
processor, precision, layout and shape. ``tune_for_cpu`` records the operators that a model calls, times the equal forms
that ``vitrail.layers`` has for them, and switches those modules whose form is at least 5 % faster. The switch is a pair
of hooks that work only while gradients are recorded in training mode: the modules, their state and what they export
stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vitrail.errors import InputError
from vitrail.layers.attention import attention
from vitrail.layers.clamp import clamp
from vitrail.layers.depthwise import DIRECT_COLUMNS, DepthwiseForm, depthwise_conv2d
from vitrail.layers.processor import keep_memory

Precision = Literal["fp32", "bf16", "fp16"]
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Switches = dict[str, dict[str, str]]
"""Module name -> operator -> form."""
_GAIN = 1.05  # smaller gains are not told from noise by a few repetitions


@dataclass(frozen=True)
class Choice:
    """The form taken for one operator at one shape."""

    operator: str
    """``attention``, ``depthwise`` or ``clamp``."""
    shape: str
    """What was measured, in words."""
    form: str
    """``torch`` where nothing was faster."""
    ratio: float
    """Time of torch's own form over that of the form taken, forward and backward."""
    modules: int
    """Modules of the model that call the operator at this shape."""


@dataclass
class CpuReport:
    """What ``tune_for_cpu`` chose; ``undo`` takes it back."""

    choices: list[Choice] = field(default_factory=list)
    images_per_second: float = 0.0
    """Of the step that is used from now on; 0 when nothing was measured."""
    ratio: float = 1.0
    """Time of the plain step over that of the tuned step."""
    memory_kept: bool = False
    switches: Switches = field(default_factory=dict)
    """The forms by module; ``apply_switches`` sets them again, so that a resumed run computes what it did before."""
    handles: list[RemovableHandle] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return the report in words."""
        if not self.images_per_second:
            return ["no CPU tuning: the model is on another device"]
        taken = [choice for choice in self.choices if choice.form != "torch"]
        lines = [f"CPU step: {self.ratio:.2f}x torch's own, {self.images_per_second:.1f} images/s"]
        lines += [f"  {c.operator} {c.shape}: {c.form}, {c.ratio:.2f}x ({c.modules} modules)" for c in taken]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "ratio": self.ratio,
            "images_per_second": self.images_per_second,
            "memory_kept": self.memory_kept,
            "switches": self.switches,
            "choices": [vars(choice) for choice in self.choices],
        }


@dataclass(frozen=True)
class _Site:
    """One operator call of a model: enough to repeat it on random tensors."""

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    channels_last: bool
    options: tuple[Any, ...]

    def __str__(self) -> str:
        size = "x".join(map(str, self.shapes[0][1:]))
        window = f", window {self.shapes[1][2]}x{self.shapes[1][3]}" if self.operator == "depthwise" else ""
        return f"{size}{window} in {str(self.dtype).removeprefix('torch.')}"


def tune_for_cpu(
    model: nn.Module,
    *,
    image_shape: tuple[int, int, int],
    batch_size: int,
    precision: str,
    channels_last: bool = False,
    seconds: float = 20.0,
) -> CpuReport:
    """Switch the slow operators of ``model`` to faster equal forms, for training on this CPU.

    The results agree to the rounding of ``precision``. Parameters, buffers, random state and ``state_dict`` are not
    touched. A model on another device is left alone.

    Args:
        model: any module from images (B, *image_shape).
        image_shape: channels, height, width.
        batch_size: images per forward pass in training.
        precision: of autocast: ``"fp32"`` (none), ``"bf16"`` or ``"fp16"``.
        channels_last: layout in which images and weights will be trained.
        seconds: bound of the measurements; what is not reached keeps torch's form.

    Raises:
        InputError: no such precision.
    """
    if precision not in _TYPES:
        raise InputError(f"precision = {precision!r} is not allowed: give one of {', '.join(_TYPES)}")
    report = CpuReport()
    if any(tensor.device.type != "cpu" for tensor in model.parameters()):
        return report
    report.memory_kept = keep_memory()
    end = time.perf_counter() + seconds
    # Half a million pixels show the ranking of the forms; the whole batch would take minutes at large sizes.
    batch_size = max(2, min(batch_size, 2**19 // (image_shape[1] * image_shape[2]) or 2))
    with torch.random.fork_rng(devices=[]):
        twin = copy.deepcopy(model).train()
        images = torch.randn(batch_size, *image_shape)
        if channels_last:
            twin = twin.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        found = _record(twin, images, precision, channels_last)
        forms: dict[_Site, str] = {}
        for site in dict.fromkeys(site for sites in found.values() for site in sites):
            form, ratio = _fastest(site) if time.perf_counter() < end else (None, 1.0)
            if form is not None:
                forms[site] = form
            calls = sum(site in sites for sites in found.values())
            report.choices.append(Choice(site.operator, str(site), form or "torch", ratio, calls))
        chosen = {
            name: {site.operator: forms[site] for site in sites if site in forms} for name, sites in found.items()
        }
        chosen = {name: switch for name, switch in chosen.items() if switch}
        plain, tuned = _compare(twin, images, precision, chosen)
        report.ratio, report.images_per_second = plain / tuned, batch_size / tuned
    if report.ratio < 0.95:  # less is noise beside the measurements of the operators
        report.choices = [Choice(c.operator, c.shape, "torch", 1.0, c.modules) for c in report.choices]
        report.ratio, report.images_per_second = 1.0, batch_size / plain
    else:
        report.switches, report.handles = chosen, apply_switches(model, chosen)
    return report


def apply_switches(model: nn.Module, switches: Switches) -> list[RemovableHandle]:
    """Switch modules to the forms of an earlier report; returns the hooks, whose ``remove`` takes that back."""
    handles = []
    for name, forms in switches.items():
        module, hooks = model.get_submodule(name), _Hooks(forms)
        handles.append(module.register_forward_pre_hook(hooks.before, prepend=True))
        handles.append(module.register_forward_hook(hooks.after, always_call=True))
    return handles


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", _TYPES[precision], enabled=precision != "fp32")


def _step(model: nn.Module, images: Tensor, precision: str) -> float:
    start = time.perf_counter()
    with _autocast(precision):
        out = model(images)
    out = next(iter(out.values())) if isinstance(out, dict) else out
    out.float().square().mean().backward()
    model.zero_grad()
    return time.perf_counter() - start


def _compare(model: nn.Module, images: Tensor, precision: str, chosen: Switches) -> tuple[float, float]:
    """Return the seconds of a plain and a tuned step, taken in turn; the least of two tells most under load."""
    plain, tuned = [], []
    for _ in range(3):
        plain.append(_step(model, images, precision))
        handles = apply_switches(model, chosen)
        tuned.append(_step(model, images, precision))
        for handle in handles:
            handle.remove()
    return min(plain[1:]), min(tuned[1:])


# ---- operators -------------------------------------------------------------------------------------------------------


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, tuple[Any, ...]] | None:
    """Return the operator's name and its arguments in one order, or None for a call that has no other form."""
    if func is F.scaled_dot_product_attention:
        if kwargs.get("enable_gqa") or args[0].ndim != 4:
            return None
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        defaults = (None, None, None, None, 0.0, False, None)
        return "attention", _bind(names, defaults, args, kwargs)
    if func is torch.conv2d:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        bound = _bind(names, (None, None, None, 1, 0, 1, 1), args, kwargs)
        x, weight, bias, stride, padding, dilation, groups = bound
        one_each = x.ndim == 4 and groups == x.shape[1] == weight.shape[0] > 1
        if not one_each or isinstance(padding, str) or _pair(dilation) != (1, 1):
            return None
        return "depthwise", (x, weight, bias, _pair(stride), _pair(padding))
    if func is F.hardtanh:
        x, low, high, inplace = _bind(
            ("input", "min_val", "max_val", "inplace"), (None, -1.0, 1.0, False), args, kwargs
        )
        return "clamp", (x, float(low), float(high), inplace)
    return None


def _bind(
    names: tuple[str, ...], defaults: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    return (*args, *(kwargs.get(name, default) for name, default in zip(names[len(args) :], defaults[len(args) :])))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _run(operator: str, bound: tuple[Any, ...], form: str) -> Tensor:
    if operator == "attention":
        return attention(*bound, form=form)
    if operator == "clamp":
        x, low, high, inplace = bound
        return clamp(x, low, high, inplace=inplace)
    # The form stands in front of autocast, so it casts as autocast would.
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        bound = tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in bound)
    parts = form.split("+")
    how = DepthwiseForm("columns" in parts, "weight-fp32" in parts, "input-fp32" in parts)
    return depthwise_conv2d(*bound, form=how)


def _candidates(site: _Site) -> list[str]:
    """Return the names of the forms, besides torch's own, that may be faster."""
    low = site.dtype != torch.float32
    if site.operator == "attention":
        return ["plain", *(["fused_fp32"] if low else [])]
    if site.operator == "clamp":
        return ["kept-output"]
    parts = [
        *(["columns"] if site.shapes[1][3] > DIRECT_COLUMNS else []),
        *(["weight-fp32", "input-fp32"] if low else []),
    ]
    return ["+".join(some) for n in range(1, len(parts) + 1) for some in combinations(parts, n)]


def _fastest(site: _Site) -> tuple[str | None, float]:
    """Return the fastest form (None: torch's own) and the ratio of torch's time to its time."""
    forms = [None, *_candidates(site)]
    if len(forms) == 1:
        return None, 1.0
    layout = torch.channels_last if site.channels_last else torch.contiguous_format
    tensors = [
        torch.randn(shape, dtype=site.dtype).contiguous(
            memory_format=layout if len(shape) == 4 and site.operator != "attention" else torch.contiguous_format
        )
        for shape in site.shapes
    ]

    def once(form: str | None) -> float:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        start = time.perf_counter()
        # What is clamped in place is a result, as in a model, and never a leaf.
        inputs = [leaf * 1 for leaf in leaves] if site.operator == "clamp" else leaves
        out = _torch(site, inputs) if form is None else _run(site.operator, _arguments(site, inputs), form)
        out.backward(out.detach())
        return time.perf_counter() - start

    times: dict[str | None, float] = {}
    for repeat in range(4):
        for form in forms:
            taken = once(form)
            if repeat:  # the first call of each form prepares kernels
                times[form] = min(taken, times.get(form, taken))
    best = min(forms, key=lambda form: times[form])
    ratio = times[None] / times[best]
    return (best, ratio) if best is not None and ratio >= _GAIN else (None, 1.0)


def _arguments(site: _Site, tensors: list[Tensor]) -> tuple[Any, ...]:
    if site.operator == "depthwise":
        return (*tensors, None, *site.options)
    return (*tensors, *site.options)


def _torch(site: _Site, tensors: list[Tensor]) -> Tensor:
    if site.operator == "attention":
        query, key, value = tensors
        return F.scaled_dot_product_attention(query, key, value)
    if site.operator == "depthwise":
        stride, padding = site.options
        return torch.conv2d(tensors[0], tensors[1], None, stride, padding, 1, tensors[1].shape[0])
    return F.hardtanh(tensors[0], *site.options)


# ---- recording and switching -----------------------------------------------------------------------------------------


def _site(operator: str, bound: tuple[Any, ...], channels_last: bool) -> _Site:
    tensors = bound[: {"attention": 3, "depthwise": 2, "clamp": 1}[operator]]
    dtype = tensors[0].dtype
    if operator != "clamp" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    options = {"attention": (), "depthwise": bound[3:], "clamp": bound[1:]}[operator]
    return _Site(operator, tuple(tuple(t.shape) for t in tensors), dtype, channels_last, options)


class _Recorder(TorchFunctionMode):
    """Notes, for the innermost module that runs, the operators it calls."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.running: list[str] = []
        self.found: dict[str, list[_Site]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = _call(func, args, kwargs or {})
        if call is not None and self.running:
            self.found.setdefault(self.running[-1], []).append(_site(*call, self.channels_last))
        return func(*args, **(kwargs or {}))


def _record(model: nn.Module, images: Tensor, precision: str, channels_last: bool) -> dict[str, list[_Site]]:
    recorder = _Recorder(channels_last)

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: recorder.running.append(name)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        recorder.running.pop()

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(name)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        with torch.no_grad(), _autocast(precision), recorder:
            model(images)
    return recorder.found


class _Switch(TorchFunctionMode):
    """While its module runs, takes other forms of some operators."""

    def __init__(self, forms: dict[str, str]) -> None:
        super().__init__()
        self.forms = forms

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = _call(func, args, kwargs or {})
        if call is not None and call[0] in self.forms:
            return _run(*call, self.forms[call[0]])
        return func(*args, **(kwargs or {}))


class _Hooks:
    """Enters a switch before a module's forward and leaves it after, also when that raises or runs inside another."""

    def __init__(self, forms: dict[str, str]) -> None:
        self.forms = forms
        self.entered: list[_Switch | None] = []

    def before(self, module: nn.Module, args: Any) -> None:
        switch = _Switch(self.forms) if module.training and torch.is_grad_enabled() else None
        self.entered.append(switch)
        if switch is not None:
            switch.__enter__()

    def after(self, module: nn.Module, args: Any, out: Any) -> None:
        switch = self.entered.pop() if self.entered else None
        if switch is not None:
            switch.__exit__(None, None, None)
