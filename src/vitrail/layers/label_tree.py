"""A tree of labels: what is a black bird is a bird, and each of the tree's largest branches is a speciality.

Gao et al., "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN" (2017), arXiv 1711.07607, whose
classes are nodes of a tree in twenty verticals (bird, car, dish ...).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.errors import InputError


class LabelTree:
    """Classes whose names are paths, such as ``bird/perching bird/yellow-winged blackbird``.

    A class is above another if its whole path begins the other's; nodes without images need not be classes.

    Args:
        names: one per class, in the order of the class numbers.
        separator: between a node and what is below it.

    Raises:
        InputError: no name, or one twice.
    """

    def __init__(self, names: Sequence[str], *, separator: str = "/") -> None:
        if not names or len(set(names)) < len(names):
            raise InputError(f"a tree of {len(names)} labels, {len(set(names))} of them different: give each name once")
        number = {name: i for i, name in enumerate(names)}
        self.names = tuple(names)
        self.roots = [name.split(separator)[0] for name in names]
        above = [
            [number[path] for depth in range(len(parts)) if (path := separator.join(parts[: depth + 1])) in number]
            for parts in (name.split(separator) for name in names)
        ]
        deepest = max(map(len, above))
        # With each class's own number for padding, so that the table grows with the depth and not with the classes.
        self.above = torch.tensor([[i] * (deepest - len(found)) + found for i, found in enumerate(above)])

    def ancestors(self, label: int) -> list[int]:
        """Return the classes above one, from the root downwards, and itself at the end."""
        return list(dict.fromkeys(self.above[label].tolist()[::-1]))[::-1]

    def groups(self) -> list[list[int]]:
        """Return the classes of each branch from the root, which are the verticals, in the order of their first."""
        found: dict[str, list[int]] = {}
        for i, root in enumerate(self.roots):
            found.setdefault(root, []).append(i)
        return list(found.values())

    def expand(self, target: Tensor) -> Tensor:
        """Return targets in which what an image is, it is of every class above, too.

        Args:
            target: class numbers (B,), or probabilities or multi-hot (B, C).

        Returns:
            (B, C), float: the largest share of a class and of those below it.
        """
        count, above = len(self.names), self.above.to(target.device)
        if target.ndim == 1:
            return torch.zeros(len(target), count, device=target.device).scatter(1, above[target], 1.0)
        index = above.flatten().expand(len(target), -1)
        shares = target.float().repeat_interleave(above.shape[1], 1)
        return torch.zeros(len(target), count, device=target.device).scatter_reduce(1, index, shares, "amax")


def class_groups(groups: int | Sequence[Sequence[int]], classes: int) -> list[list[int]]:
    """Return groups of class numbers that hold every class once.

    Args:
        groups: the class numbers of each; or how many, which are then runs of about equally many classes.
        classes: how many there are.

    Raises:
        InputError: groups that do not.
    """
    if isinstance(groups, int):
        if not 1 <= groups <= classes:
            raise InputError(f"groups = {groups} is not allowed: there are {classes} classes; give 1 to that many")
        edges = [classes * i // groups for i in range(groups + 1)]
        return [list(range(start, end)) for start, end in zip(edges, edges[1:])]  # noqa: RUF007
    found = [list(group) for group in groups]
    if not all(found) or sorted(label for group in found for label in group) != list(range(classes)):
        raise InputError(
            f"{len(found)} groups of {sum(map(len, found))} class numbers are not allowed: give each of the {classes} "
            "classes, numbered from 0, once, and no empty group"
        )
    return found
