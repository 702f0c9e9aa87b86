"""Block fusion: a residual block's convolution and feed-forward layer at once, so that what is inside stays in cache.

Lavin, "On the Efficiency of Convolutional Neural Networks" (2024), arXiv 2404.03617. Layer by layer, the hidden values
of the block, several times as many as it takes and gives, go through memory; depth first, they never leave the chip.
The block, with its norms folded into it, is

    z = conv(x),  h = act(U z + a),  y = x + V h + b

for images x (B, C, H, W), a grouped k x k convolution, U (R, C) and V (C, R). For inference: there are no gradients.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitrail.errors import InputError, MissingExtra, unknown

FORMS = ("layers", "depth_first", "triton")
ACTIVATIONS = {"relu": torch.relu_, "silu": lambda x: F.silu(x, inplace=True)}
HIDDEN = 1 << 20
"""Bytes of hidden values at a time in ``depth_first``: about the second-level cache of a core."""
CONVOLVED = 1 << 23
"""Bytes of convolved values at a time, in whole images: a share of the last cache."""
TILE = 8
"""Rows and columns of places that a program of ``triton`` takes."""
WIDEST = 256
"""Channels up to which ``triton`` keeps a tile in registers."""


def fused_block(
    x: Tensor,
    conv: Tensor,
    conv_bias: Tensor,
    exp: Tensor,
    exp_bias: Tensor,
    prj: Tensor,
    prj_bias: Tensor,
    *,
    act: str = "relu",
    form: str | None = None,
) -> Tensor:
    """Return x + V act(U conv(x) + a) + b, (B, C, H, W), in channels-last memory.

    Args:
        x: images (B, C, H, W); of another type than the weights, it is converted to theirs.
        conv: weights (C, C / groups, k, k), k odd.
        conv_bias: (C,).
        exp: U, (R, C).
        exp_bias: a, (R,).
        prj: V, (C, R).
        prj_bias: b, (C,).
        act: ``"relu"`` or ``"silu"``.
        form: ``"layers"``, layer by layer; ``"depth_first"``, for CPUs, which holds few hidden values at a time;
            ``"triton"``, one kernel for GPUs, for groups of 16 channels or a divisor and at most ``WIDEST`` channels.
            None: what suits the device.

    Raises:
        InputError: an unknown activation or form, or weights that do not fit each other, or the form.
        MissingExtra: Triton was asked for and is not installed.
    """
    if act not in ACTIVATIONS:
        raise unknown("activation", act, ACTIVATIONS)
    if form is not None and form not in FORMS:
        raise unknown("form of the fused block", form, FORMS)
    channels, inside, side, across = conv.shape
    hidden = len(exp)
    if side != across or side % 2 == 0 or channels % inside:
        raise InputError(
            f"the convolution of a fused block has weights {tuple(conv.shape)}: give an odd square kernel and groups "
            f"whose width divides the channels"
        )
    wanted = {"x": (x.shape[1], channels), "exp": (tuple(exp.shape), (hidden, channels))}
    wanted["prj"] = (tuple(prj.shape), (channels, hidden))
    for name, (given, fits) in wanted.items():
        if given != fits:
            raise InputError(f"a fused block of {channels} channels takes {name} of {fits}, not {given}")
    reason = _not_for_triton(channels, inside)
    if form == "triton" and reason:
        raise InputError(f"form = triton takes {reason}: choose another form")
    if form is None:
        form = "layers" if x.is_cuda else "depth_first"
        if x.is_cuda and not reason and _has_triton():
            form = "triton"
    weights = (conv, conv_bias, exp, exp_bias, prj, prj_bias)
    x = x.to(conv.dtype)
    if form == "layers":
        return _layers(x, *weights, act)
    fused: Tensor = _fused(x.contiguous(memory_format=torch.channels_last), *weights, act, form)
    return fused


def _layers(x: Tensor, conv: Tensor, c: Tensor, exp: Tensor, a: Tensor, prj: Tensor, b: Tensor, act: str) -> Tensor:
    z = F.conv2d(x, conv, c, padding=conv.shape[2] // 2, groups=len(conv) // conv.shape[1])
    hidden = ACTIVATIONS[act](F.conv2d(z, exp[:, :, None, None], a))
    return x + F.conv2d(hidden, prj[:, :, None, None], b)


@torch.library.custom_op("vitrail::fused_block", mutates_args=())
def _fused(
    x: Tensor, conv: Tensor, c: Tensor, exp: Tensor, a: Tensor, prj: Tensor, b: Tensor, act: str, form: str
) -> Tensor:
    run = _triton if form == "triton" else _depth_first
    return run(x, conv, c, exp, a, prj, b, act)


@_fused.register_fake
def _(
    x: Tensor, conv: Tensor, c: Tensor, exp: Tensor, a: Tensor, prj: Tensor, b: Tensor, act: str, form: str
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@register_flop_formula(torch.ops.vitrail.fused_block)
def _operations(x: Any, conv: Any, c: Any, exp: Any, *rest: Any, **more: Any) -> int:
    batch, channels, height, width = x
    return 2 * batch * height * width * channels * (conv[1] * conv[2] * conv[3] + 2 * exp[0])


# ---- depth first, on CPUs --------------------------------------------------------------------------------------------


def _depth_first(
    x: Tensor, conv: Tensor, c: Tensor, exp: Tensor, a: Tensor, prj: Tensor, b: Tensor, act: str
) -> Tensor:
    """Convolve a few images, then take a few places at a time through both matrices."""
    batch, channels, height, width = x.shape
    size, groups = x.element_size(), channels // conv.shape[1]
    out = x.new_empty(batch, height, width, channels)
    images = max(1, CONVOLVED // (height * width * channels * size))
    places = max(1, HIDDEN // (len(exp) * size))
    hidden = x.new_empty(min(places, min(images, batch) * height * width), len(exp))
    up, down, activate = exp.t(), prj.t(), ACTIVATIONS[act]
    for some, into in zip(x.split(images), out.split(images)):
        convolved = F.conv2d(some, conv, c, padding=conv.shape[2] // 2, groups=groups)
        parts = (rows.split(places) for rows in (_rows(convolved), _rows(some), into.view(-1, channels)))
        for z, before, after in zip(*parts):
            part = activate(torch.addmm(a, z, up, out=hidden[: len(z)]))
            torch.addmm(b, part, down, out=after).add_(before)
    return out.permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """Return the places of all images, (B H W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


# ---- one kernel, on GPUs ---------------------------------------------------------------------------------------------


def _not_for_triton(channels: int, inside: int) -> str:
    """Return what the kernel needs and these widths are not, or nothing."""
    if 16 % inside:
        return f"groups of 1, 2, 4, 8 or 16 channels, not {inside}"
    return f"at most {WIDEST} channels, not {channels}" if channels > WIDEST else ""


def _triton(x: Tensor, conv: Tensor, c: Tensor, exp: Tensor, a: Tensor, prj: Tensor, b: Tensor, act: str) -> Tensor:
    batch, channels, height, width = x.shape
    out = torch.empty_like(x, memory_format=torch.channels_last)
    weights = [value.contiguous() for value in (conv, c, exp, a, prj, b)]
    grid = (-(-width // TILE), -(-height // TILE), batch)
    with torch.cuda.device_of(x):  # nothing, on a CPU
        _kernels().fused_block[grid](
            x, out, *weights, height, width, channels, len(exp), **constants(channels, conv, act)
        )
    return out


def constants(channels: int, conv: Tensor, act: str) -> dict[str, Any]:
    """Return what the kernel is compiled for, for these channels and convolution."""
    blocks = 1 << (-(-channels // 16) - 1).bit_length()
    return {
        "INSIDE": conv.shape[1],
        "SIDE": conv.shape[2],
        "TILE": TILE,
        "BLOCKS": blocks,
        "CHUNK": 32 if blocks > 4 else 64,
        "SILU": act == "silu",
        # float32 in full, as torch does unless told otherwise
        "PRECISION": "ieee" if conv.dtype == torch.float32 else "tf32",
        "num_warps": 4 if blocks <= 4 else 8,
    }


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _kernels() -> ModuleType:
    """Import the kernel, and Triton, which takes a second; the interpreter has to be asked for before."""
    try:
        return importlib.import_module("vitrail.layers.block_fusion_triton")
    except ImportError as error:
        raise MissingExtra(
            f"form = triton needs the package triton, which cannot be imported ({error}): it comes with torch "
            "for CUDA; install that, or choose another form"
        ) from error
