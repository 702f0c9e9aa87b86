"""NASNet's search space: of two kinds of cells, what each block reads, does and how it joins it.

Zoph, Vasudevan, Shlens, Le, "Learning Transferable Architectures for Scalable Image Recognition" (CVPR 2018), arXiv
1707.07012, section 3. A block is five decisions: two hidden states among the cell's two inputs and the blocks before,
an operation for each of them, and a combination. Cells of B blocks are 10 B decisions. How many cells are stacked and
how wide is no part of the space: what was found in a small net is built larger by other options.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.nasnet import CELLS, COMBINATIONS, OPERATIONS, read_genotype
from vitrail.search.strategy import Architecture, Cost

PARTS = 5
"""Decisions of a block: left and right state, left and right operation, combination."""


class CellSpace:
    """The space of genotypes of B blocks, as ``models.nasnet.NASNET_A`` is one but for its output.

    An architecture's output is what no block reads, and its value of ``model.options.genotype`` in a recipe.

    Args:
        blocks: B of each cell, 1 or more; published: 5.
        operations: names of ``models.nasnet.OPERATIONS``; None takes all thirteen, as published.
        combinations: of ``"add"`` and ``"concat"``, as published.
        model: the net whose cells they are, which takes ``genotype``.
        options: of that net; for a search a small one.

    Raises:
        InputError: no blocks, or an operation or combination that there is not.

    Example:
        space = CellSpace(); space.build(space.sample(numpy.random.default_rng(0)), num_classes=10)
    """

    def __init__(
        self,
        *,
        blocks: int = 5,
        operations: Sequence[str] | None = None,
        combinations: Sequence[str] = COMBINATIONS,
        model: str = "nasnet_nano",
        options: dict[str, Any] | None = None,
    ) -> None:
        if blocks < 1:
            raise InputError(f"blocks = {blocks} is not allowed: give 1 or more")
        names = tuple(OPERATIONS) if operations is None else tuple(operations)
        for kind, given, allowed in (
            ("operations", names, tuple(OPERATIONS)),
            ("combinations", combinations, COMBINATIONS),
        ):
            if not given or not set(given) <= set(allowed) or len(set(given)) < len(given):
                raise InputError(f"{kind} = {list(given)} is not allowed: give some of {', '.join(allowed)}, each once")
        self.blocks, self.operations, self.combinations = blocks, names, tuple(combinations)
        self.model, self.options = model, dict(options or {})

    @property
    def choices(self) -> tuple[int, ...]:
        """How many options each of the 10 B decisions has; the normal cell's come first."""
        kinds = len(self.operations), len(self.operations), len(self.combinations)
        cell = [count for block in range(self.blocks) for count in (block + 2, block + 2, *kinds)]
        return tuple(cell) * len(CELLS)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Draw each decision alike from its options."""
        return self.decode([int(rng.integers(count)) for count in self.choices])

    def encode(self, architecture: Architecture) -> tuple[int, ...]:
        """Return the option that each decision took.

        Raises:
            InputError: a genotype that is not of this space.
        """
        code: list[int] = []
        for kind, plan in read_genotype(architecture).items():
            names = {name for block in plan.blocks for name in (block.left_op, block.right_op)}
            strange = names - set(self.operations) | {block.combine for block in plan.blocks} - set(self.combinations)
            read = {state for block in plan.blocks for state in (block.left, block.right)}
            if strange or len(plan.blocks) != self.blocks or read & set(plan.output):
                raise InputError(
                    f"genotype.{kind} is not of this space: give {self.blocks} blocks of {', '.join(self.operations)} "
                    f"and {', '.join(self.combinations)}, and no output that a block reads"
                )
            for block in plan.blocks:
                operations = (self.operations.index(name) for name in (block.left_op, block.right_op))
                code += [block.left, block.right, *operations, self.combinations.index(block.combine)]
        return tuple(code)

    def decode(self, code: Sequence[int]) -> Architecture:
        """Return the genotype of these options.

        Raises:
            InputError: another number of decisions, or an option that one does not have.
        """
        if len(code) != len(self.choices) or not all(0 <= at < n for at, n in zip(code, self.choices, strict=True)):
            raise InputError(
                f"the code {list(code)} is not allowed: give {len(self.choices)} numbers from 0, below {self.choices}"
            )
        genotype: Architecture = {}
        for number, kind in enumerate(CELLS):
            blocks = []
            for block in range(self.blocks):
                first = PARTS * (number * self.blocks + block)
                left, right, left_op, right_op, combine = (int(at) for at in code[first : first + PARTS])
                names = self.operations[left_op], self.operations[right_op], self.combinations[combine]
                blocks.append([left, right, *names])
            genotype[kind] = {"blocks": blocks}
        return genotype

    def mutate(self, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        """Return a genotype that differs in one decision, drawn from those that have another option."""
        code = list(self.encode(architecture))
        place = int(rng.choice([at for at, count in enumerate(self.choices) if count > 1]))
        code[place] = (code[place] + int(rng.integers(1, self.choices[place]))) % self.choices[place]
        return self.decode(code)

    def cost(self, architecture: Architecture, *, img_size: int = 32) -> Cost:
        """Count the parameters of its net, and the multiply-adds for an image of ``img_size`` pixels a side."""
        with torch.device("meta"):
            model = self.build(architecture).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.zeros(1, 3, img_size, img_size))
        return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2)

    def build(self, architecture: Architecture, *, num_classes: int = 10, **options: Any) -> nn.Module:
        """Return its net: a plain model, which ``create_model`` gives by name and options.

        Args:
            architecture: a genotype.
            num_classes: outputs of the classifier.
            **options: of the net, in place of the space's: more ``cells`` or ``filters`` transfer it to a larger one.
        """
        genotype = copy.deepcopy(architecture)
        return create_model(self.model, num_classes=num_classes, **{**self.options, **options, "genotype": genotype})
