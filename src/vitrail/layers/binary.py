"""Binary convolutions: filters that are signs with one scale each, inputs that are signs too, and both as single bits.

Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks"
(ECCV 2016). A filter W of n weights is nearest to alpha B with B = sign(W) and alpha = mean |W|: a
Binary-Weight-Network convolves with that. An XNOR-Network also takes the signs of its input I, before which stands a
normalisation, and multiplies its output by K, the mean of |I| over the channels and the window. Training keeps real
weights behind the signs. Afterwards weights are stored as bits, and a convolution counts the bits that differ.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitrail.errors import InputError

SERIAL_WORK = 1 << 20
"""Words to compare, some 50 microseconds, below which a second thread costs more than it saves."""


class _SignOfInput(torch.autograd.Function):
    """Sign in {-1, 1}; the gradient passes where |x| < 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _sign(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() < 1)


class _SignOfFilter(torch.autograd.Function):
    """Sign of the real weights W, whose gradient is, of the gradient G in alpha sign(W), as published:

    G (1/n + alpha [|W| < 1]) (1 - 1/c) n, with n weights of a filter and c of its channels.

    What arrives here is alpha G, for alpha multiplies the output. (1 - 1/c) is of the centring over channels. The
    factor n is the authors' for SGD; where steps do not depend on the scale of gradients, as in Adam, it is idle.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(weight.abs() < 1, alpha)
        return _sign(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        near, alpha = ctx.saved_tensors
        count, channels = near[0].numel(), near.shape[1]
        slope = near + 1 / (count * alpha.clamp_min(torch.finfo(alpha.dtype).tiny ** 0.5)).view(-1, 1, 1, 1)
        centred = 1 - 1 / channels if channels > 1 else 1.0
        return gradients[0] * slope * (centred * count), None


def _sign(x: Tensor) -> Tensor:
    # A bit has no third value: 0, which the published code's sign leaves 0, counts as 1.
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def input_scale(x: Tensor, conv: Any) -> Tensor:
    """Return K (B, groups, H', W'): |x|, averaged over the channels of each group and the window of ``conv``.

    The window counts what is outside of the image as 0.

    Args:
        x: (B, C, H, W).
        conv: has ``kernel_size``, ``stride``, ``padding``, ``dilation`` and ``groups``.
    """
    means = x.abs().unflatten(1, (conv.groups, -1)).mean(2)
    box = means.new_full((conv.groups, 1, *conv.kernel_size), 1 / (conv.kernel_size[0] * conv.kernel_size[1]))
    return F.conv2d(means, box, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _convolve(x: Tensor, signs: Tensor, alpha: Tensor, conv: Any) -> Tensor:
    """Return (x or sign x) * signs, times alpha and K, plus the bias, as ``conv`` says."""
    scale = input_scale(x, conv) if conv.scaled else None
    if conv.inputs:
        x = cast(Tensor, _SignOfInput.apply(x)) if torch.is_grad_enabled() else _sign(x)
    y = F.conv2d(x, signs.to(x.dtype), None, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = y * alpha.view(1, -1, 1, 1).to(y.dtype)
    if scale is not None:
        y = (y.unflatten(1, (conv.groups, -1)) * scale[:, :, None].to(y.dtype)).flatten(1, 2)
    return y if conv.bias is None else y + conv.bias.view(1, -1, 1, 1).to(y.dtype)


class BinaryConv2d(nn.Conv2d):
    """A convolution with filters alpha sign(W), and with ``inputs`` the block BatchNorm, sign, convolution, K.

    In training mode every forward pass first centres the real weights over their channels and clamps them to [-1, 1],
    in place, as the published code does before each step. Filters of one channel cannot be centred and are only
    clamped.

    Args:
        *args: as for ``nn.Conv2d``, with zeros for padding.
        inputs: take the signs of the normalised inputs, too: an XNOR-Network; else a Binary-Weight-Network.
        scaled: multiply by K, as the paper does; the published code leaves it out. Only with ``inputs``.
        eps: of the normalisation of the inputs.
        **kwargs: as for ``nn.Conv2d``.

    Raises:
        InputError: another padding than by numbers of zeros.
    """

    def __init__(self, *args: Any, inputs: bool = True, scaled: bool = True, eps: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            raise InputError(
                f"a binary convolution cannot pad by {self.padding!r} of {self.padding_mode!r}: give numbers, of zeros"
            )
        self.inputs, self.scaled = inputs, inputs and scaled
        place: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.norm = nn.BatchNorm2d(self.in_channels, eps=eps, **place) if inputs else None

    @classmethod
    def of(cls, conv: nn.Conv2d, **how: Any) -> Self:
        """Return the binary form of a convolution, with its weights for the real ones.

        Args:
            conv: a plain convolution.
            **how: ``inputs``, ``scaled``, ``eps``.
        """
        new = cls(
            conv.in_channels,
            conv.out_channels,
            cast(Any, conv.kernel_size),
            cast(Any, conv.stride),
            cast(Any, conv.padding),
            cast(Any, conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **how,
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the real weights, not decayed: that would shrink alpha and move no sign but by chance."""
        return [{"params": [self.weight], "weight_decay": 0.0}]

    @torch.no_grad()
    def settle(self) -> None:
        """Centre the real weights over their channels and clamp them to [-1, 1]."""
        if self.weight.shape[1] > 1:
            self.weight.sub_(self.weight.mean(1, keepdim=True))
        self.weight.clamp_(-1, 1)

    def alpha(self) -> Tensor:
        """Return the scale of each filter (O,)."""
        return self.weight.detach().abs().mean((1, 2, 3))

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, O, H', W')."""
        if self.training:
            self.settle()
        alpha = self.alpha()
        signs = _SignOfFilter.apply(self.weight, alpha) if torch.is_grad_enabled() else _sign(self.weight)
        return _convolve(input if self.norm is None else self.norm(input), cast(Tensor, signs), alpha, self)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{super().extra_repr()}, inputs={self.inputs}, scaled={self.scaled}"


# ---- bits ------------------------------------------------------------------------------------------------------------


class PackedConv2d(nn.Module):
    """A trained ``BinaryConv2d`` with its signs as bits: 1/32 of the bytes, and no gradient for them.

    On a CPU, in float32 and without gradients, signs meet signs by counting the bits that differ; ``form`` says whether
    they do. Elsewhere, and in ONNX files, which keep the bits, the signs are unpacked and convolved as floats. Both
    give the same sums, which are integers, and the same outputs but for the rounding of K.

    Args:
        conv: is not changed.
    """

    bits: Tensor
    alpha: Tensor
    bias: Tensor | None
    values: Tensor

    def __init__(self, conv: BinaryConv2d) -> None:
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = cast("tuple[int, ...]", conv.padding), conv.dilation
        self.groups, self.inputs, self.scaled = conv.groups, conv.inputs, conv.scaled
        self.size = conv.in_channels // conv.groups
        self.norm: nn.BatchNorm2d | None = deepcopy(conv.norm)
        place = conv.weight.device
        self.register_buffer("values", 2.0 ** torch.arange(8, device=place), persistent=False)
        # (O, taps, bytes): bit c % 8 of byte c // 8 is channel c's.
        positive = (conv.weight.detach() >= 0).flatten(2).transpose(1, 2)
        positive = F.pad(positive.to(torch.uint8), (0, -self.size % 8)).unflatten(2, (-1, 8))
        self.register_buffer("bits", (positive * self.values).sum(3).to(torch.uint8))
        self.register_buffer("alpha", conv.alpha())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self._made_of: tuple[int, int] | None = None
        self._filters: tuple[np.ndarray, np.ndarray] | None = None

    def signs(self) -> Tensor:
        """Return the filters (O, C, k, k) in {-1, 1}."""
        # Not by shifts: not all of what reads ONNX files has them for bytes.
        ones = (self.bits[..., None].to(self.alpha.dtype) / self.values).floor().remainder(2)
        signs = ones.flatten(2)[..., : self.size] * 2 - 1
        return signs.transpose(1, 2).unflatten(2, self.kernel_size)

    def form(self, x: Tensor) -> Literal["popcount", "float"]:
        """Return how ``x`` is convolved."""
        # A compiler and an exporter know plain operators alone.
        plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu")
        recorded = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        fits = self.inputs and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
        return "popcount" if fits and not plain and not recorded and _has_numba() else "float"

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, O, H', W')."""
        if self.norm is not None:
            x = self.norm(x)
        if self.form(x) == "float":
            return _convolve(x, self.signs(), self.alpha, self)
        with torch.no_grad():
            return self._count(x)

    def _count(self, x: Tensor) -> Tensor:
        kernels = _kernels()
        filters, ones = self._words()
        batch, _, *sides = x.shape
        count = -(-self.size // 64)
        height, width = (
            (side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, pad, dilation in zip(
                sides, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )
        if min(height, width) < 1:
            raise InputError(f"a map of {sides[0]} x {sides[1]} is smaller than the filters of {self.kernel_size}")
        planes = x.contiguous().flatten(2).numpy()
        words = np.empty((batch, self.groups, count, planes.shape[2]), np.int64)
        kernels.pack_signs(planes, words, self.size)
        means = np.empty((batch if self.scaled else 0, self.groups, planes.shape[2]), np.float32)
        kernels.mean_magnitude(planes, means, self.size)
        y = x.new_empty(batch, self.out_channels, height, width)
        bias = self.alpha.new_zeros(self.out_channels) if self.bias is None else self.bias
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.size)
        given = (words, means, filters, ones, (*sides, width), *geometry)
        out = (self.alpha.detach().numpy(), bias.detach().numpy(), y.flatten(2).numpy())
        _share(
            lambda image, first, last: kernels.convolve(image, first, last, *given, *out),
            (batch, height * width),
            kernels.LANES,
            filters.size,
        )
        return y

    def _words(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the filters in words of 64 bits, and how many bits of each tap are 1; made anew when bits change."""
        made_of = (self.bits.data_ptr(), -1 if self.bits.is_inference() else self.bits._version)
        if self._filters is None or made_of != self._made_of:
            taps = self.bits.numpy()
            words = np.pad(taps, ((0, 0), (0, 0), (0, -taps.shape[2] % 8))).view("<i8").astype(np.int64)
            words = words.reshape(len(taps), -1)
            words = np.ascontiguousarray(np.pad(words, ((0, 0), (0, -words.shape[1] % _kernels().ROWS))))
            self._filters = words, np.unpackbits(taps, axis=2).sum(2, dtype=np.float32)
            self._made_of = made_of
        return self._filters

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, inputs={self.inputs}, scaled={self.scaled}"
        )


def pack(model: nn.Module) -> nn.Module:
    """Return a copy of a trained model with all its binary convolutions packed, in evaluation mode.

    Raises:
        InputError: there is none.
    """
    packed = deepcopy(model).eval().requires_grad_(False)
    if isinstance(packed, BinaryConv2d):
        return PackedConv2d(packed).eval()
    found = [(parent, name) for parent in packed.modules() for name, child in parent.named_children()]
    found = [(parent, name) for parent, name in found if isinstance(getattr(parent, name), BinaryConv2d)]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no binary convolutions to pack: edit it with binary_convolution first"
        )
    for parent, name in found:
        setattr(parent, name, PackedConv2d(getattr(parent, name)).eval())
    return packed


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as safetensors, its binary convolutions as bits.

    Args:
        model: edited, or packed already.
        path: the file.

    Raises:
        InputError: the model has no binary convolutions.
    """
    if not any(isinstance(module, PackedConv2d) for module in model.modules()):
        model = pack(model)
    save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, path)


def load_packed(model: nn.Module, path: str | Path) -> nn.Module:
    """Return a packed copy of ``model`` with the weights of a file of ``save_packed``.

    Args:
        model: the same net with the same edits; its own weights do not matter.
        path: the file.

    Raises:
        InputError: the file is of another net.
    """
    packed = pack(model)
    try:
        packed.load_state_dict(load_file(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(
            f"{path} does not fit {type(model).__name__} ({reason}): build the net and its edits as they were saved"
        ) from None
    return packed


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@cache
def _kernels() -> Any:
    """Import the machine code, which takes a second, and some ten the first time on a machine."""
    from vitrail.layers import binary_kernels

    return binary_kernels


def _share(task: Callable[[int, int, int], None], shape: tuple[int, int], unit: int, work: int) -> None:
    """Call ``task(image, first, last)`` for all places of all images, on torch's number of threads.

    Args:
        task: frees the interpreter while it computes.
        shape: images and places.
        unit: places between ``first`` and ``last`` are a multiple of it, but for the last ones.
        work: words to compare for one place.
    """
    images, places = shape
    threads = torch.get_num_threads()
    if threads == 1 or images * places * work < SERIAL_WORK:
        for image in range(images):
            task(image, 0, places)
        return
    part = -(-places // (unit * -(-threads // images))) * unit
    calls = [(image, first, min(first + part, places)) for image in range(images) for first in range(0, places, part)]
    for done in [_pool(threads).submit(task, *call) for call in calls]:
        done.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "vitrail-binary")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads
