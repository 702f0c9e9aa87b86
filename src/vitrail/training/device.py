"""Where and how a recipe is computed: accelerator, precision, normalisation on the device."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from vitrail.data.preprocess import Preprocess
from vitrail.errors import InputError
from vitrail.methods.method import Method
from vitrail.training.recipe import Recipe

T = TypeVar("T")


def resolved(value: T | Literal["auto"]) -> T:
    """Return a value of a recipe that has been decided."""
    if value == "auto":
        raise InputError("the recipe leaves a value at 'auto'; give values, or use `vitrail fit`")
    return value


def require_resolved(recipe: Recipe) -> None:
    """Raise an ``InputError`` that names what training needs and the recipe leaves open."""
    sections = ("augment.", "optim.", "train.")
    before = {"train.head_start", "train.freeze"}  # the caller's, done when training begins
    keys = [key for key in recipe.unresolved() if key.startswith(sections) and key not in before]
    if keys:
        raise InputError(f"the recipe leaves {', '.join(keys)} at 'auto'; give values, or use `vitrail fit`")


def _without_fp16(device: str) -> InputError:
    return InputError(
        f"train.precision = 'fp16' cannot be used on {device!r}; use 'bf16' or 'fp32', as by --set train.precision=fp32"
    )


def require_precision(recipe: Recipe) -> None:
    """Raise an ``InputError`` if there is no accelerator and the recipe asks for what only one computes in."""
    if recipe.train.precision == "fp16" and not torch.accelerator.is_available():
        raise _without_fp16("cpu")


def create_accelerator(recipe: Recipe) -> Accelerator:
    """Build the accelerator for the recipe's precision, on the best device or as ``accelerate launch`` says."""
    # Its state is one per process and refuses another precision, but a comparison trains several recipes in turn.
    AcceleratorState._reset_state()
    precision = recipe.train.precision
    try:
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    except ValueError as error:
        raise InputError(f"train.precision = {precision!r} cannot be used here: {error}") from None
    if precision == "fp16" and accelerator.scaler is None:
        raise _without_fp16(accelerator.device.type)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            f"accelerate is set to {accelerator.distributed_type}; only plain data parallelism is supported: "
            "run `accelerate config`, or `accelerate launch --multi_gpu`"
        )
    return accelerator


def place(method: Method, recipe: Recipe, device: torch.device) -> None:
    """Bring ``method`` to its device, memory layout and way of keeping activations."""
    method.to(device)
    if recipe.train.channels_last is True:
        method.to(memory_format=torch.channels_last)
    if recipe.train.grad_checkpointing:
        enable = getattr(method.model, "set_grad_checkpointing", None)
        if enable is None:
            raise InputError(f"train.grad_checkpointing: {type(method.model).__name__} has none; set it to false")
        enable(True)


class Normalise(nn.Module):
    """Turn uint8 pixels (B, 3, H, W) into what the model sees, on the device they are on."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess, channels_last: bool) -> None:
        super().__init__()
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.register_buffer("mean", 255 * torch.tensor(preprocess.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(preprocess.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float32 (B, 3, H, W)."""
        pixels = pixels.to(self.mean.device, non_blocking=True)
        return pixels.to(torch.float32, memory_format=self.layout).sub_(self.mean).div_(self.std)
