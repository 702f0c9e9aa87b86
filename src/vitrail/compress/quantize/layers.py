"""Quantised layers of any network: which layers there are, in what order, and what stands in for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitrail.compress.quantize.quantiser import AffineQuantiser, channel_range, check_bits
from vitrail.data.batches import Batches
from vitrail.errors import InputError

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weights are quantised, subclasses such as timm's padded convolutions included."""


@dataclass(frozen=True)
class LayerFacts:
    """One layer, as a forward pass met it.

    Attributes:
        name: of the module.
        inputs: elements that go in, per image.
        macs: multiply-adds, per image.
    """

    name: str
    inputs: int
    macs: int


def trace(model: nn.Module, batches: Batches) -> list[LayerFacts]:
    """Return the layers that one pass calls exactly once, in the order of their calls.

    A layer that several places share, or whose weight is used without a call, has no input of its own to quantise.

    Raises:
        InputError: there are no calibration images, or the network has no such layer.
    """
    images = first_images(batches).to(next(model.parameters()).device)
    calls: list[LayerFacts] = []
    handles = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Any = module.weight
            macs = output.numel() * weight.numel() // weight.shape[0]
            calls.append(LayerFacts(name, inputs[0].numel() // len(images), macs // len(images)))

        return note

    for name, module in model.named_modules():
        if isinstance(module, KINDS):
            handles.append(module.register_forward_hook(hook(name)))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    counts = Counter(call.name for call in calls)
    found = [call for call in calls if counts[call.name] == 1]
    if not found:
        raise InputError(f"{type(model).__name__} has no convolution or linear layer to quantise")
    return found


def first_images(batches: Batches) -> Tensor:
    """Return the first batch of images (B, 3, H, W), or raise when there is none."""
    for images, _ in batches():
        if images.ndim != 4 or not images.is_floating_point():
            raise InputError(
                f"calibration images are {images.dtype} of shape {tuple(images.shape)}: give normalised floats "
                "(B, 3, H, W)"
            )
        return images
    raise InputError("compression needs calibration images: give at least one batch")


class _StandIn(nn.Module):
    """Stands in for a layer, which answers what a network asks besides calling it: ``weight``, ``in_features`` ..."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class QuantLayer(_StandIn):
    """A layer whose weight, per output channel, and whose input, per tensor, are quantised; all can be trained.

    Args:
        layer: the float layer; its weight has the output channels first.
        bits: of the weight and of the input.
        low, high: range of the input, scalars.
    """

    def __init__(self, layer: nn.Module, bits: int, low: Tensor, high: Tensor) -> None:
        super().__init__(layer)
        weight: Any = layer.weight
        self.weight_quantiser = AffineQuantiser(bits, *channel_range(weight))
        self.input_quantiser = AffineQuantiser(bits, low.reshape(1).to(weight), high.reshape(1).to(weight))
        self.after: nn.Module = nn.Identity()

    @property
    def bits(self) -> int:
        """Width of weight and input."""
        return self.weight_quantiser.bits

    def quantised_weight(self) -> Tensor:
        """Return the weight on its grid."""
        weight: Any = self.layer.weight
        return self.weight_quantiser(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the quantised input with the quantised weight."""
        weight = {"weight": self.quantised_weight()}
        return self.after(functional_call(self.layer, weight, (self.input_quantiser(x),)))


class FixedQuantLayer(_StandIn):
    """A quantised layer when all is decided: constants, in the form that a runtime computes.

    The weight is held on its grid, in floats, beside its scale and zero point. The input goes through QuantizeLinear
    and DequantizeLinear in an ONNX file if it has 8 bits; other widths, which ONNX lacks, are written as arithmetic.
    """

    input_scale: Tensor
    input_zero: Tensor
    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(self, source: QuantLayer) -> None:
        super().__init__(source.layer)
        self.bits = source.bits
        with torch.no_grad():
            weight: Any = self.layer.weight
            weight.copy_(source.quantised_weight())
            self.register_buffer("weight_scale", source.weight_quantiser.scale.clone())
            self.register_buffer("weight_zero", source.weight_quantiser.zero.to(torch.int32))
            self.register_buffer("input_scale", source.input_quantiser.scale[0].clone())
            self.register_buffer("input_zero", source.input_quantiser.zero[0].to(torch.int32))

    def integers(self) -> Tensor:
        """Return the stored weight: integers from 0 to ``2 ** bits - 1``, int32."""
        weight: Any = self.layer.weight
        return (weight / self.weight_scale + self.weight_zero).round().to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the quantised input."""
        if self.bits == 8 and torch.onnx.is_in_onnx_export():
            constants = self.input_scale, self.input_zero.to(torch.uint8)
            kind: Any = {"shape": x.shape, "version": 13}
            stored = torch.onnx.ops.symbolic("QuantizeLinear", (x, *constants), dtype=torch.uint8, **kind)
            x = torch.onnx.ops.symbolic("DequantizeLinear", (stored, *constants), dtype=x.dtype, **kind)
        else:
            stored = (x / self.input_scale + self.input_zero).clamp(0, 2**self.bits - 1).round()
            x = (stored - self.input_zero) * self.input_scale
        return self.layer(x)

    def extra_repr(self) -> str:
        """Name the width."""
        return f"bits={self.bits}"


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the module ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def fix(model: nn.Module) -> nn.Module:
    """Replace every ``QuantLayer`` by its constants, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLayer):
            replace(model, name, FixedQuantLayer(module))
    return model


def weight_bytes(weight: Tensor, bits: int) -> float:
    """Return the bytes of a quantised weight (C, ...): its integers, and a float scale and a zero point per channel."""
    return weight.numel() * check_bits(bits) / 8 + weight.shape[0] * (4 + bits / 8)


def float_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
