"""Measurements that several contracts share."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import check_parity, export_onnx
from vitrail.methods.method import Method

CLASSES = 5
TOLERANCE = 1e-4


def images(batch: int, side: int | tuple[int, int], channels: int = 3, seed: int = 0) -> Tensor:
    """Return noise (batch, channels, H, W), the same at every call."""
    height, width = (side, side) if isinstance(side, int) else side
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def labels(batch: int) -> Tensor:
    """Return class numbers that the images of ``images`` say nothing about."""
    return torch.arange(batch) * 3 % CLASSES


def unsettled(model: nn.Module) -> nn.Module:
    """Move all parameters and running statistics a little, so that what starts at zero is seen; return the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(0.1 * (spread or 1.0) * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand(buffer.shape, generator=generator))
    return model


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two tensors, as a share of the largest value."""
    assert ours.shape == theirs.shape, f"the shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ"
    scale = float(theirs.detach().abs().max())
    return float((ours.detach() - theirs.detach()).abs().max()) / max(scale, 1e-12)


def unreached(module: nn.Module) -> list[str]:
    """Return the trainable parameters that the last backward pass gave no gradient, or none but zeros, or no number."""
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any())
    ]


def cross_entropy_step(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the gradients of a cross-entropy; return the logits."""
    model.zero_grad(set_to_none=True)
    logits = model(x)
    F.cross_entropy(logits.float(), labels(len(x))).backward()
    return logits


@torch.no_grad()
def batch_does_not_matter(model: nn.Module, x: Tensor) -> None:
    """Raise unless evaluation gives the same twice, and gives an image the same whatever is beside it in the batch."""
    model.eval()
    together = model(x)
    assert gap(model(x), together) == 0, "two evaluations of the same images differ"
    alone = torch.cat([model(image[None]) for image in x])
    assert gap(alone, together) < TOLERANCE, "in evaluation, the logits of an image depend on the others in its batch"
    others = torch.cat([x[:1], 3 * x[1:].flip(0) + 1])
    assert gap(model(others)[:1], together[:1]) < TOLERANCE, (
        "in evaluation, the logits of an image depend on the others in its batch"
    )


def autocast_agrees(model: nn.Module, x: Tensor) -> None:
    """Raise unless a model gives about the same logits under bf16 autocast, and finite gradients."""
    model.eval()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
    assert gap(logits.float(), exact) < 0.1, "under bf16 autocast the logits are far from those in float32"
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.train()(x)
    F.cross_entropy(logits.float(), labels(len(x))).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), (
        "under bf16 autocast a gradient is not finite"
    )


@torch.no_grad()
def file_agrees(model: nn.Module, side: int) -> None:
    """Raise unless the ONNX file of a model gives its logits."""
    model.eval()
    preprocess = Preprocess((side, side), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pictures = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, preprocess, file, classes=[str(number) for number in range(CLASSES)])
        parity = check_parity(model, preprocess, file, [Image.fromarray(picture) for picture in pictures])
    scale = float(model(torch.from_numpy(preprocess.normalise(pictures))).abs().max())
    assert parity.max_abs_diff < 1e-3 * max(scale, 1), f"the ONNX file's logits are {parity.max_abs_diff:.2g} off"


def step(method: Method, batch: dict[str, Any], share: float = 1.0) -> dict[str, Tensor]:
    """Add the gradients of a share of the loss to those of the method; return its terms."""
    torch.manual_seed(3)
    terms = method(batch)
    (terms["loss"] * share).backward()
    return terms


def gradients(method: Method) -> dict[str, Tensor]:
    """Return the gradients by name."""
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in method.named_parameters()
        if value.requires_grad
    }


def the_same_gradients(ours: dict[str, Tensor], whole: dict[str, Tensor], where: str) -> None:
    """Raise unless two sets of gradients agree, each tensor to a share of its largest value or of the median's."""
    scale = float(torch.stack([value.abs().max() for value in whole.values()]).median())
    for name, value in whole.items():
        off = float((ours[name] - value).abs().max())
        assert off <= 1e-3 * max(float(value.abs().max()), scale), (
            f"{where} the gradient of {name} differs from that of the whole batch by {off:.2g}, "
            f"where it is at most {float(value.abs().max()):.2g}: the loss is not a mean over images"
        )


def half_frozen(model: nn.Module) -> nn.Module:
    """Put a model in training mode with some of it frozen and in evaluation mode, as after finetuning; return it."""
    model.train().requires_grad_(False)
    next(iter(model.children())).eval()
    next(iter(model.parameters())).requires_grad_(True)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """Return a copy of everything that can be changed about a model: weights, modes, gradients, hooks, attributes."""
    return {
        "weights": copy.deepcopy(model.state_dict()),
        "modes": {name: module.training for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name for name, parameter in model.named_parameters() if parameter.grad is not None},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "modules": {name: type(module) for name, module in model.named_modules()},
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Raise if the block changes the model in any way."""
    before, held = state(model), {name: id(parameter) for name, parameter in model.named_parameters()}
    yield
    after = state(model)
    weights, now = before.pop("weights"), after.pop("weights")
    assert list(weights) == list(now), "the model's tensors have other names than before"
    changed = [name for name, value in weights.items() if not torch.equal(value, now[name])]
    assert not changed, f"the model was changed: {changed[:5]}"
    for kind, values in before.items():
        assert after[kind] == values, f"the {kind} of the model's parts were changed"
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == held, "parameters were replaced"
