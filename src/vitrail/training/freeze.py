"""Keep the first layers of a pretrained network as they are: what a short finetuning leaves alone costs no backward."""

from __future__ import annotations

from typing import Any

from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.models import group_parameters
from torch import nn

from vitrail.errors import InputError


def freeze(model: nn.Module, share: float) -> None:
    """Freeze the first ``share`` of the layers, and the statistics and scales of every batch normalisation, in place.

    Args:
        model: with timm's ``group_matcher``, which says what a layer is and in which order they come.
        share: of the layers from the input, in [0, 1]; 0 changes nothing. The classifier is never frozen.

    Raises:
        InputError: the model does not say what its layers are.
    """
    if not share:
        return
    surface: Any = model
    if not hasattr(model, "group_matcher"):
        raise InputError(f"train.freeze = {share:g}: {type(model).__name__} does not group its layers; set it to 0")
    layers: dict[str, int] = group_parameters(model, surface.group_matcher(coarse=False), reverse=True)
    first = sorted(set(layers.values()))[: round(share * len(set(layers.values())))]
    found = surface.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)  # timm's distilled nets have two
    head = {id(parameter) for part in heads for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        if layers.get(name) in first and id(parameter) not in head:
            parameter.requires_grad_(False)
    # Statistics of small batches of new images would spoil what the frozen layers were trained with.
    freeze_batch_norm_2d(model)


def thaw(model: nn.Module) -> None:
    """Undo ``freeze``: every parameter can be trained again, and batch normalisations are what they were."""
    unfreeze_batch_norm_2d(model)
    model.requires_grad_(True)
