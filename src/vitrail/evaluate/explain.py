"""Where a model looks: Grad-CAM and Grad-CAM++.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization" (2017), and
Chattopadhay et al., "Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep Convolutional Networks"
(2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.errors import InputError

_MIN_GRID = 4
"""A map with fewer places on a side shows nothing; an earlier layer is taken instead."""


def grad_cam(model: nn.Module, pixels: Tensor, target: int | None = None) -> np.ndarray:
    """Return how much each place of the image speaks for a class: float32 (H, W) in [0, 1].

    The map comes from the deepest layer that still has a grid of at least 4 x 4 places on which the class depends. For
    a transformer that reads its class token only, this is the input of the last block: the patches leave that block
    without an effect on the result.

    Args:
        model: a timm or Vitrail model; its mode and gradients are left as they were.
        pixels: normalised, (1, 3, H, W).
        target: class number; None is the class that the model predicts.

    Raises:
        InputError: more than one image, an unknown class, or a model without a spatial layer.
    """
    activation, slope = _explained_layer(model, pixels, target)
    return _as_map(slope.mean(dim=(2, 3), keepdim=True), activation, pixels)


def grad_cam_plus_plus(model: nn.Module, pixels: Tensor, target: int | None = None) -> np.ndarray:
    """Return how much each place of the image speaks for a class: float32 (H, W) in [0, 1].

    A channel's weight is the sum of its positive slopes, each divided by a term that grows with slope and activation,
    so that one strong channel does not drown the others. It supposes activations from 0 upwards, as after a ReLU. Layer
    and arguments are those of ``grad_cam``.

    Raises:
        InputError: as ``grad_cam``.
    """
    activation, slope = _explained_layer(model, pixels, target)
    # With Y = exp(S) the paper's second and third derivatives are powers of the slope of S, times Y, which cancels.
    below = 2 * slope**2 + activation.sum(dim=(2, 3), keepdim=True) * slope**3
    alpha = torch.where(below == 0, 0, slope**2 / below)
    return _as_map((alpha * slope.relu()).sum(dim=(2, 3), keepdim=True), activation, pixels)


def _as_map(weights: Tensor, activation: Tensor, pixels: Tensor) -> np.ndarray:
    """Return the weighted sum over the channels, where it is positive, at the size of the image, scaled to 1."""
    cam = torch.relu((weights * activation).sum(dim=1, keepdim=True))  # (1, 1, h, w)
    cam = nn.functional.interpolate(cam, pixels.shape[2:], mode="bilinear", align_corners=False)[0, 0]
    return (cam / cam.max().clamp_min(1e-12)).float().cpu().numpy()


def _explained_layer(model: nn.Module, pixels: Tensor, target: int | None) -> tuple[Tensor, Tensor]:
    """Return a layer's output and the slope of the class's logit with respect to it, both (1, C, h, w)."""
    if pixels.ndim != 4 or len(pixels) != 1:
        raise InputError(f"Grad-CAM explains one image at a time: give pixels (1, 3, H, W), not {tuple(pixels.shape)}")
    outputs: list[Tensor] = []
    names = [info["module"] for info in getattr(model, "feature_info", None) or []]
    known = dict(model.named_modules())
    hooks = [
        known[name].register_forward_hook(lambda _module, _input, output: outputs.append(output))
        for name in dict.fromkeys(names)
        if name in known
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            features = model.forward_features(pixels.detach().requires_grad_())  # type: ignore[operator]
            logits = model.forward_head(features)  # type: ignore[operator]
            if target is None:
                target = int(logits[0].argmax())
            elif not 0 <= target < logits.shape[1]:
                raise InputError(f"class {target} does not exist: the model has classes 0 to {logits.shape[1] - 1}")
            outputs.append(features)
            layers = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
            slopes = torch.autograd.grad(logits[0, target], layers, allow_unused=True) if layers else ()
    except AttributeError as error:
        raise InputError(f"Grad-CAM needs a model with timm's forward_features and forward_head: {error}") from None
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    best: tuple[Tensor, Tensor] | None = None
    for layer, slope in zip(reversed(layers), reversed(slopes)):
        activation, change = (
            _grid(model, layer.detach()),
            _grid(model, torch.zeros_like(layer) if slope is None else slope),
        )
        if activation is None or change is None:
            continue
        if best is None or not best[1].any() or (min(best[0].shape[2:]) < _MIN_GRID and change.any()):
            best = activation, change
    if best is None:
        raise InputError(
            f"Grad-CAM cannot explain {type(model).__name__} at {pixels.shape[2]} x {pixels.shape[3]} pixels: "
            "none of its layers has a grid of places; use a larger img_size or a convolutional or patch-based model"
        )
    return best


def overlay(image: np.ndarray, cam: np.ndarray) -> Image.Image:
    """Return the image with the map laid over it, transparent where the map is 0.

    Args:
        image: uint8 (H, W, 3).
        cam: (H, W) in [0, 1].
    """
    if image.shape[:2] != cam.shape:
        raise InputError(f"an image of shape {image.shape} and a map of shape {cam.shape} differ in size")
    stops = np.array([0.0, 0.35, 0.7, 1.0])
    colours = np.array([[68, 1, 84], [190, 45, 100], [250, 140, 50], [252, 240, 150]])
    heat = np.stack([np.interp(cam, stops, colours[:, channel]) for channel in range(3)], axis=-1)
    share = 0.65 * np.sqrt(cam)[..., None]
    return Image.fromarray((image * (1 - share) + heat * share).round().astype(np.uint8))


def cam_sheet(models: Sequence[nn.Module], image: np.ndarray, pixels: Tensor, target: int | None = None) -> Image.Image:
    """Return the maps of several models side by side: Grad-CAM above, Grad-CAM++ below.

    Args:
        models: one column each, in this order, to the right of the image.
        image: uint8 (H, W, 3).
        pixels: the image as the models take it, (1, 3, H, W).
        target: class number; None is the class that each model predicts.

    Raises:
        InputError: as ``grad_cam``.
    """
    rows = [
        np.concatenate([image, *(np.asarray(overlay(image, explain(model, pixels, target))) for model in models)], 1)
        for explain in (grad_cam, grad_cam_plus_plus)
    ]
    return Image.fromarray(np.concatenate(rows))


def _grid(model: Any, values: Tensor) -> Tensor | None:
    """Return a layer's output as (1, C, h, w) with more than one place, or None."""
    if values.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
        values = values.permute(0, 3, 1, 2)
    elif values.ndim == 3:
        tokens = values[:, getattr(model, "num_prefix_tokens", 0) :]  # (1, N, C)
        height, width = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (0, 0)
        if height * width != tokens.shape[1]:  # another image size than the model was built for
            height = width = round(tokens.shape[1] ** 0.5)
            if height * width != tokens.shape[1]:
                return None
        values = tokens.transpose(1, 2).reshape(1, tokens.shape[2], height, width)
    return values if values.ndim == 4 and values.shape[2] * values.shape[3] > 1 else None
