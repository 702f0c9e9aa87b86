"""A head that widens for each group of classes by itself, and learns each group at its own pace.

Gao et al., "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN" (2017), arXiv 1711.07607: a
fully connected output of 100,000 classes has s_2 weights for each, so that s_2 must be small; structurally connected
layers give every group of classes ("vertical") s_2 units of its own, to which no other group is connected. A group's
logits are scaled to length one and multiplied by a factor that is learned, and that starts at the root of their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.edits.surgery import Edit
from vitrail.errors import InputError
from vitrail.layers.label_tree import class_groups
from vitrail.layers.large_output import Part

Pace = Literal["group", "class", "none"]
SPREAD = 1e-3
"""What the first factors differ by, as published: 'mean and variance' of sqrt(N_v) and 1e-3, read as a deviation."""


class StructuralHead(nn.Module):
    """Two hidden layers and an output that are connected by groups of classes.

    With S_b features in, M groups and N classes the weights are, as published, s_b s_1 + s_1 s_2 M + s_2 N; with a
    first layer for each group, (s_b s_1 + s_1 s_2) M + s_2 N; with s_g of the s_2 units shared, s_b s_1 + s_1 s_g +
    s_1 (s_2 - s_g) M + s_2 N, which for s_g = s_2 is a fully connected head.

    Args:
        dim: s_b.
        groups: class numbers of each group; every class once.
        s1: width of the first hidden layer, of each if ``first`` is "own".
        s2: width of the second for each group.
        shared: s_g, units of the second that all groups share, from 0 to s_2.
        first: "shared", one first layer for all groups; "own", one for each.
        pace: whose factors are learned: "group", the published choice, or "class"; "none" leaves logits as they are.

    Raises:
        InputError: an argument out of range, or a group of one class whose pace is to be learned.
    """

    def __init__(
        self,
        dim: int,
        groups: Sequence[Sequence[int]],
        *,
        s1: int,
        s2: int,
        shared: int = 0,
        first: Literal["shared", "own"] = "shared",
        pace: Pace = "group",
    ) -> None:
        super().__init__()
        _check(s1, s2, shared, first, pace)
        self.groups = class_groups(groups, sum(map(len, groups)))
        if shared > s2:
            raise InputError(f"structural_head: shared = {shared} is not allowed: give at most s2 = {s2}")
        if pace != "none" and min(map(len, self.groups)) < 2:
            raise InputError(
                "structural_head: a group of one class has no length to scale: join it to another, or set pace='none'"
            )
        self.pace, count = pace, len(self.groups)
        self.first = nn.ModuleList(nn.Linear(dim, s1) for _ in range(count if first == "own" else 1))
        self.common = nn.Linear(s1, shared) if shared else None
        self.second = nn.ModuleList(nn.Linear(s1, s2 - shared) for _ in range(count if shared < s2 else 0))
        self.out = nn.ModuleList(nn.Linear(s2, len(group)) for group in self.groups)
        if pace != "none":
            starts = [math.sqrt(len(group)) for group in self.groups for _ in (group if pace == "class" else (0,))]
            self.factor = nn.Parameter(torch.tensor(starts) + SPREAD * torch.randn(len(starts)))
        order = [label for group in self.groups for label in group]
        place = torch.empty(len(order), dtype=torch.long)
        place[torch.tensor(order)] = torch.arange(len(order))
        self.register_buffer("place", place, persistent=False)

    place: Tensor
    """Of each class, its number among the groups' classes in their order."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, N), in the order of the class numbers, of features (B, S_b)."""
        return torch.cat([part() for part in self.parts(x)], 1)[:, self.place]

    def parts(self, x: Tensor) -> list[Part]:
        """Return what computes the logits (B, N_v) of each group."""
        hidden = [F.relu(layer(x)) for layer in self.first]
        common = [] if self.common is None else [F.relu(self.common(hidden[0]))]

        def part(v: int) -> Part:
            def logits() -> Tensor:
                own = [F.relu(self.second[v](hidden[v % len(hidden)]))] if len(self.second) else []
                return self._paced(self.out[v](torch.cat((*common, *own), 1)), v)

            return logits

        return [part(v) for v in range(len(self.groups))]

    def _paced(self, logits: Tensor, v: int) -> Tensor:
        """Return a group's logits at its pace."""
        if self.pace == "none":
            return logits
        start = sum(map(len, self.groups[:v]))
        factor = self.factor[v] if self.pace == "group" else self.factor[start : start + logits.shape[1]]
        return F.normalize(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1) * factor


def structural_head(
    *,
    groups: int | Sequence[Sequence[int]] = 2,
    s1: int | None = None,
    s2: int | None = None,
    shared: int = 0,
    first: Literal["shared", "own"] = "shared",
    pace: Pace = "group",
) -> Edit:
    """Return the edit that puts a structurally connected head in the place of a model's linear classifier.

    Args:
        groups: the class numbers of each group, every class once, as ``LabelTree.groups`` gives them; or how many
            groups, runs of about equally many classes.
        s1: width of the first hidden layer; None: 4 times that of the features; published: 4096 for 1024.
        s2: width of the second, for each group; None: half of that of the features; published: 512.
        shared: units of the second layer that all groups share; ``s2`` makes it fully connected.
        first: "shared" for one first layer, or "own" for one for each group.
        pace: "group" or "class" for logits of learned scale, "none" for plain ones.

    Raises:
        InputError: an argument out of range; or, from the edit, groups that are not of the model's classes, or a model
            without one linear classifier (the text lists what it has).

    Example:
        >>> model = structural_head(groups=20)(timm.create_model("resnet50"))           # doctest: +SKIP
    """
    _check(1 if s1 is None else s1, 1 if s2 is None else s2, shared, first, pace)

    def edit(model: Any) -> nn.Module:
        old = model.get_classifier() if hasattr(model, "get_classifier") else None
        layers = (
            [layer for layer in old.modules() if isinstance(layer, nn.Linear)] if isinstance(old, nn.Module) else []
        )
        found = [name for name, module in model.named_modules() if module is old]
        if len(layers) != 1 or layers[0].out_features != model.num_classes or not found:
            listed = ", ".join(sorted({type(module).__name__ for module in model.modules() if module is not model}))
            raise InputError(
                f"the edit found no single linear classifier in {type(model).__name__}; its modules are: {listed}"
            )
        like = layers[0]
        width = like.in_features
        new = StructuralHead(
            width,
            class_groups(groups, like.out_features),
            s1=4 * width if s1 is None else s1,
            s2=max(width // 2, shared, 1) if s2 is None else s2,
            shared=shared,
            first=first,
            pace=pace,
        )
        model.set_submodule(found[0], new.to(like.weight.device, like.weight.dtype).train(model.training))
        return model

    return edit


def _check(s1: int, s2: int, shared: int, first: str, pace: str) -> None:
    for name, value, least in (("s1", s1, 1), ("s2", s2, 1), ("shared", shared, 0)):
        if not isinstance(value, int) or value < least:
            raise InputError(f"structural_head: {name} = {value!r} is not allowed: give a whole number from {least}")
    for name, word, allowed in (("first", first, ("shared", "own")), ("pace", pace, ("group", "class", "none"))):
        if word not in allowed:
            raise InputError(f"structural_head: {name} = {word!r} is not allowed: choose one of {', '.join(allowed)}")
    if first == "own" and shared:
        raise InputError("structural_head: shared units have no first layer to read where first='own': leave one out")
