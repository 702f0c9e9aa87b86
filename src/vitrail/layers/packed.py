"""Convolutions and linear layers for inference on CPUs: weights laid out once, the activation in the same pass.

torch's own layers lay their weights out for the processor at every call, and an activation after them reads and writes
the whole tensor once more. oneDNN, which torch ships, does both in one pass. These operators are private to torch,
where its compiler uses them, so they are used in this file alone; what they cannot do, the plain layer does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.activations import GELU as TimmGELU
from timm.layers.activations import GELUTanh
from timm.layers.activations import Swish as TimmSwish
from torch import Tensor, nn

TYPES = (torch.float32, torch.bfloat16)


def can_pack(layer: nn.Module) -> bool:
    """Return whether this layer has a packed form here: a plain convolution in two axes or a plain linear layer."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if type(layer) is nn.Conv2d:
        return not isinstance(layer.padding, str) and layer.padding_mode == "zeros" and layer.weight.dtype in TYPES
    return type(layer) is nn.Linear and layer.weight.dtype in TYPES


def activation_code(module: nn.Module) -> tuple[str, str | None] | None:
    """Return what oneDNN calls an activation, with its algorithm, or None for one that it does not fuse."""
    if type(module) in (nn.GELU, TimmGELU, GELUTanh):
        tanh = type(module) is GELUTanh or getattr(module, "approximate", "none") == "tanh"
        return "gelu", "tanh" if tanh else "none"
    plain = {nn.ReLU: "relu", nn.SiLU: "swish", TimmSwish: "swish", nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid"}
    return (plain[type(module)], None) if type(module) in plain else None


class _Packed(nn.Module):
    """Holds the packed weight, made when it is first wanted and again when the weight has changed."""

    weight: Tensor

    def _begin(self, activation: nn.Module | None) -> None:
        self.activation = nn.Identity() if activation is None else activation
        code = None if activation is None else activation_code(activation)
        self.code, self.algorithm = code or ("none", None)
        self._packed: Tensor | None = None
        self._made_of: tuple[int, int] | None = None

    def _usable(self, x: Tensor) -> bool:
        # A compiler and an exporter know the plain operators, and fuse and pack by themselves.
        plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu")
        records = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return not plain and not records and x.device.type == "cpu" and x.dtype == self.weight.dtype and x.numel() > 0

    def _current(self, x: Tensor) -> Tensor:
        made_of = (self.weight.data_ptr(), -1 if self.weight.is_inference() else self.weight._version)
        if self._packed is None or made_of != self._made_of:
            with torch.no_grad():
                self._packed, self._made_of = self._pack(x), made_of
        return self._packed

    def _pack(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed weight out: it is of this machine, and has no storage to copy."""
        return {**self.__dict__, "_packed": None}


class PackedLinear(_Packed, nn.Linear):
    """A linear layer and the activation that follows it.

    Args:
        layer: its weights are shared, not copied.
        activation: module of ``activation_code``, or None.
    """

    def __init__(self, layer: nn.Linear, activation: nn.Module | None = None) -> None:
        nn.Linear.__init__(self, layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self._begin(activation)

    def _pack(self, x: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), x.numel() // x.shape[-1])
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features)."""
        if not self._usable(x):
            out: Tensor = self.activation(F.linear(x, self.weight, self.bias))
            return out
        out = torch.ops.mkldnn._linear_pointwise(x, self._current(x), self.bias, self.code, [], self.algorithm)
        return out


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution and the activation that follows it.

    Args:
        layer: its weights are shared, not copied.
        activation: module of ``activation_code``, or None.
    """

    def __init__(self, layer: nn.Conv2d, activation: nn.Module | None = None) -> None:
        nn.Conv2d.__init__(
            self,
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            device="meta",
        )
        self.weight, self.bias = layer.weight, layer.bias
        self._begin(activation)

    def _pack(self, x: Tensor) -> Tensor:
        weight = self.weight.detach().contiguous().to_mkldnn()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed: Tensor = reorder(weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape))
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, H', W')."""
        if x.ndim != 4 or not self._usable(x):
            out: Tensor = self.activation(self._conv_forward(x, self.weight, self.bias))
            return out
        out = torch.ops.mkldnn._convolution_pointwise(
            x,
            self._current(x),
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            self.code,
            [],
            self.algorithm,
        )
        return out


def pack(layer: nn.Module, activation: nn.Module | None = None) -> nn.Module:
    """Return the packed form of a layer for which ``can_pack`` holds, sharing its weights."""
    packed = PackedLinear(layer, activation) if isinstance(layer, nn.Linear) else PackedConv2d(layer, activation)  # type: ignore[arg-type]
    return packed.train(layer.training)
