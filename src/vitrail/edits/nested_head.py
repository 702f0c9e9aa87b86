"""A nested head: any model answers from, and embeds images by, the first 8, 16, 32 ... numbers of its representation.

Kusupati et al., "Matryoshka Representation Learning" (NeurIPS 2022), arXiv 2205.13147. ``layers/nested.py`` has the
mathematics; ``mrl:MatryoshkaTraining`` trains it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vitrail.edits.surgery import Edit
from vitrail.errors import InputError
from vitrail.layers.nested import (
    NestedLinear,
    its_nested_classifier,
    linear_classifier,
    nested_classifier,
    truncated,
    with_embedding,
)


def nested_head(*, dims: Sequence[int] | None = None, independent: bool = False) -> Edit:
    """Return the edit that makes a model's linear classifier a nested one.

    The model's answer, its weights and what it exports stay as they are; ``nested_logits`` and ``nested_embeddings``
    give those of fewer dimensions. It is trained by the method ``mrl:MatryoshkaTraining``.

    Args:
        dims: growing, each from 1 to the width of the representation, which is added where it is missing; None: the
            powers of two from 8, as published.
        independent: have a classifier for each dimension (the paper's MRL), which that method alone trains; else all
            dimensions share one classifier's weights (MRL-E), which add nothing to the model.

    Raises:
        InputError: dimensions that are not so; or, from the edit, a model without one linear classifier (the text lists
            what it has), or whose classifier is nested already.

    Example:
        >>> model = nested_head()(timm.create_model("resnet50"))                     # doctest: +SKIP
        >>> nested_logits(model, images, 64), nested_embeddings(model, images, 64)   # doctest: +SKIP
    """
    if dims is not None and (not dims or list(dims) != sorted({d for d in dims if isinstance(d, int) and d > 0})):
        raise InputError(f"nested_head: dims = {dims!r} is not allowed: give growing whole numbers from 1")

    def edit(model: Any) -> nn.Module:
        if nested_classifier(model) is not None:
            raise InputError(f"nested_head: the classifier of {type(model).__name__} is nested already: edit it once")
        old = linear_classifier(model)
        found = [name for name, module in model.named_modules() if module is old]
        if old is None or not found:
            listed = ", ".join(sorted({type(module).__name__ for module in model.modules() if module is not model}))
            raise InputError(
                f"the edit found no single linear classifier in {type(model).__name__}; its modules are: {listed}"
            )
        new = NestedLinear(
            old.in_features,
            old.out_features,
            dims=dims,
            independent=independent,
            bias=old.bias is not None,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        new.weight, new.bias = old.weight, old.bias  # what it has learned serves the whole width
        model.set_submodule(found[0], new.train(old.training))
        return model

    return edit


def nested_logits(model: nn.Module, images: Tensor, dim: int) -> Tensor:
    """Return the logits (B, classes) that an edited model gives by the first ``dim`` numbers of its representation.

    Args:
        model: after the edit ``nested_head``.
        images: (B, 3, H, W), normalised.
        dim: one of the edit's.

    Raises:
        InputError: another dimension, or a model that is not nested.
    """
    head = its_nested_classifier(model)
    return head.logits(with_embedding(model, head, images)[1], dim)


def nested_embeddings(model: nn.Module, images: Tensor, dim: int | None = None) -> Tensor:
    """Return embeddings (B, dim) of images, of length one; arguments as of ``nested_logits``, None for all of it."""
    head = its_nested_classifier(model)
    dim = head.in_features if dim is None else dim
    head.check(dim)
    return truncated(with_embedding(model, head, images)[1], dim)


_PUBLISHED = re.compile(r"^(.+)\.nesting_classifier_(\d+)\.(weight|bias)$")


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the authors' weights under the names of a model with this edit.

    Args:
        state: their checkpoint, with or without ``module.`` before its names.
        model: the edited model, with a head of the checkpoint's kind.

    Raises:
        InputError: the head's tensors are not those of the model, or the net blurs before strided convolutions.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any("blur_filter" in key for key in state):
        raise InputError(
            "the checkpoint is of a net with blurred strides, which this model has not: train without them"
        )
    head = its_nested_classifier(model)
    (name,) = (name for name, module in model.named_modules() if module is head)
    last = len(head.smaller)
    renamed = {}
    for key, value in state.items():
        match = _PUBLISHED.match(key)
        if match:
            number = int(match[2])
            key = f"{name}.{match[3]}" if number == last else f"{name}.smaller.{number}.{match[3]}"
        renamed[key] = value
    own = model.state_dict()
    wrong = [
        key for key in own if key.startswith(f"{name}.") and getattr(renamed.get(key), "shape", 0) != own[key].shape
    ]
    if wrong or not set(renamed) <= set(own):
        first = (wrong or sorted(set(renamed) - set(own)))[0]
        raise InputError(
            f"the checkpoint does not fit {type(model).__name__}: {first} is missing or of another shape; edit it with "
            "the dims and the kind of head (independent) of the checkpoint, and as many classes"
        )
    return renamed
