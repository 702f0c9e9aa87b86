"""NASNet: a net stacked of two kinds of cells that a search found, one that keeps the size and one that halves it.

Zoph, Vasudevan, Shlens, Le, "Learning Transferable Architectures for Scalable Image Recognition" (CVPR 2018), arXiv
1707.07012, and the authors' code (tensorflow/models, research/slim/nets/nasnet). What a search decides about the cells
is a *genotype*, plain values that a recipe holds; how many cells of what width are stacked is a user's choice. The
space of genotypes is ``vitrail.search.cell_space``, the search ``vitrail.search.controller``.

Shapes: B images, F filters of a cell; a hidden state of a cell is (B, F, H, W), or 2 F where a block concatenates.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_conv2d, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.models.staged import StagedNet, cfg, nano_cfg

NASNET_A: dict[str, Any] = {
    "normal": {
        "blocks": [
            [0, 1, "sep_5x5", "sep_3x3", "add"],
            [1, 1, "sep_5x5", "sep_3x3", "add"],
            [0, 1, "avg_pool_3x3", "identity", "add"],
            [1, 1, "avg_pool_3x3", "avg_pool_3x3", "add"],
            [0, 0, "sep_3x3", "identity", "add"],
        ],
        "output": [1, 2, 3, 4, 5, 6],
    },
    "reduction": {
        "blocks": [
            [0, 1, "sep_5x5", "sep_7x7", "add"],
            [0, 1, "max_pool_3x3", "sep_7x7", "add"],
            [0, 1, "avg_pool_3x3", "sep_5x5", "add"],
            [3, 2, "identity", "avg_pool_3x3", "add"],
            [2, 0, "sep_3x3", "max_pool_3x3", "add"],
        ],
        "output": [3, 4, 5, 6],
    },
}
"""The published cells. A block: the two hidden states that it reads, what it does to each, and how it joins them. State
0 is the cell's input, 1 that of the cell before, 2 the first block. A cell gives the states of ``output``; where it is
left out those that no block reads, which is the paper's rule. The published cells each give one that is read, too."""
CELLS = ("normal", "reduction")
COMBINATIONS = ("add", "concat")
STEMS = ("imagenet", "small")

# ---- operations ------------------------------------------------------------------------------------------------------


class Pool(nn.Module):
    """Pooling of TensorFlow's size and place: what lies beyond the border counts for nothing."""

    def __init__(self, kind: str, width: int, stride: int) -> None:
        super().__init__()
        self.kind, self.width, self.stride = kind, width, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H / stride, W / stride), rounded up."""
        # At stride 2 an even side has its windows half a place further to the right than an odd one.
        shift = [int(self.stride == 2 and side % 2 == 0) for side in x.shape[-2:]]
        padding = [self.width // 2 - each for each in shift]
        if self.kind == "max":
            return F.max_pool2d(x, self.width, self.stride, padding, ceil_mode=True)
        return F.avg_pool2d(x, self.width, self.stride, padding, ceil_mode=True, count_include_pad=False)


class Halving(nn.Module):
    """Half the size and any width: two convolutions of every other place, the second of those between, side by side."""

    def __init__(self, before: int, after: int, eps: float) -> None:
        super().__init__()
        self.conv1 = _conv(before, after // 2, 1)
        self.conv2 = _conv(before, after - after // 2, 1)
        self.bn = nn.BatchNorm2d(after, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, after, H / 2, W / 2), rounded up."""
        between = F.pad(x, (0, 1, 0, 1))[..., 1::2, 1::2]
        return self.bn(torch.cat((self.conv1(x[..., ::2, ::2]), self.conv2(between)), 1))


def _conv(before: int, after: int, width: int | tuple[int, int], stride: int | tuple[int, int] = 1, **own: Any) -> Any:
    """Return a convolution that pads as TensorFlow does; a halving of an even side begins one place later."""
    return create_conv2d(before, after, width, stride=stride, padding="same", **own)


def _layers(eps: float, *convs: Any) -> nn.Sequential:
    """Return convolutions with normalisation and, between them, ReLU; the first ReLU is the cell's affair."""
    layers: list[nn.Module] = []
    for conv in convs:
        conv = conv if isinstance(conv, list) else [conv]
        layers += [nn.ReLU(inplace=True)] if layers else []
        layers += [*conv, nn.BatchNorm2d(conv[-1].out_channels, eps)]
    return nn.Sequential(*layers)


def _separable(width: int, before: int, after: int, stride: int, eps: float) -> nn.Module:
    """Return a depthwise and a 1x1 convolution without anything between them, and both again."""

    def once(before: int, stride: int) -> list[nn.Module]:
        return [_conv(before, before, width, stride, groups=before), _conv(before, after, 1)]

    return _layers(eps, once(before, stride), once(after, 1))


def _pool(kind: str, width: int, before: int, after: int, stride: int, eps: float) -> nn.Module:
    pool = Pool(kind, width, stride)
    if before == after:
        return pool
    # An identity of another width has the same two layers under the same names, as the authors' has.
    layers = _layers(eps, _conv(before, after, 1))
    return nn.Sequential(OrderedDict([("pool", pool), *layers.named_children()]))


def _identity(before: int, after: int, stride: int, eps: float) -> nn.Module:
    """Return nothing to do, or the least that halves the size or changes the width."""
    return nn.Identity() if before == after and stride == 1 else _layers(eps, _conv(before, after, 1, stride))


def _square(width: int, before: int, after: int, stride: int, eps: float, **own: Any) -> nn.Module:
    return _layers(eps, _conv(before, after, width, stride, **own))


def _crossed(width: int, before: int, after: int, stride: int, eps: float) -> nn.Module:
    """Return a convolution across, then one down."""
    across, down = _conv(before, after, (1, width), (1, stride)), _conv(after, after, (width, 1), (stride, 1))
    return _layers(eps, across, down)


OPERATIONS: dict[str, Any] = {
    "identity": _identity,
    "conv_1x3_3x1": partial(_crossed, 3),
    "conv_1x7_7x1": partial(_crossed, 7),
    "dilated_3x3": partial(_square, 3, dilation=2),
    "avg_pool_3x3": partial(_pool, "avg", 3),
    "max_pool_3x3": partial(_pool, "max", 3),
    "max_pool_5x5": partial(_pool, "max", 5),
    "max_pool_7x7": partial(_pool, "max", 7),
    "conv_1x1": partial(_square, 1),
    "conv_3x3": partial(_square, 3),
    "sep_3x3": partial(_separable, 3),
    "sep_5x5": partial(_separable, 5),
    "sep_7x7": partial(_separable, 7),
}
"""The paper's thirteen, by name."""


class Operation(nn.Module):
    """An operation of ``OPERATIONS`` on a hidden state, and the stochastic depth behind it.

    Args:
        name: of ``OPERATIONS``.
        before, after: channels.
        stride: 1 or 2.
        eps: of the normalisations.
        drop_path: probability that an image goes without it; identities are never dropped, as published.
    """

    def __init__(self, name: str, before: int, after: int, stride: int, eps: float, drop_path: float) -> None:
        super().__init__()
        self.body = OPERATIONS[name](before, after, stride, eps)
        self.rectified = not (isinstance(self.body, nn.Identity) or "pool" in name)
        """Whether it is given the state behind a ReLU."""
        self.drop_path = DropPath(drop_path) if drop_path and name != "identity" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, after, H / stride, W / stride)."""
        return self.drop_path(self.body(x))


# ---- cells -----------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """What a block reads, does and how it joins it."""

    left: int
    right: int
    left_op: str
    right_op: str
    combine: str


class CellPlan(NamedTuple):
    """One kind of cell of a genotype, checked: its blocks and the states that it gives."""

    blocks: tuple[Block, ...]
    output: tuple[int, ...]


def read_genotype(genotype: Mapping[str, Any]) -> dict[str, CellPlan]:
    """Return the cells of a genotype.

    Args:
        genotype: as ``NASNET_A``: for ``"normal"`` and for ``"reduction"`` a table with ``blocks``, a list of
            ``[left, right, operation of left, operation of right, "add" or "concat"]``, and where the output is not
            just what no block reads, ``output``, a list of numbers of states.

    Raises:
        InputError: what is wrong with it, and where.
    """
    if not isinstance(genotype, Mapping) or set(genotype) != set(CELLS):
        given = sorted(genotype) if isinstance(genotype, Mapping) else type(genotype).__name__
        raise InputError(f"genotype: {given} is not allowed: give a table with {' and '.join(CELLS)}")
    return {kind: _read_cell(kind, genotype[kind]) for kind in CELLS}


def _read_cell(kind: str, cell: Any) -> CellPlan:
    blocks = cell.get("blocks") if isinstance(cell, Mapping) and set(cell) <= {"blocks", "output"} else None
    if not isinstance(blocks, Sequence) or not blocks:
        raise InputError(f"genotype.{kind} = {cell!r} is not allowed: give a table with blocks, and output or not")
    read: list[Block] = []
    for number, block in enumerate(blocks):
        place = f"genotype.{kind}.blocks.{number}"
        if not isinstance(block, Sequence) or len(block) != len(Block._fields):
            raise InputError(f"{place} = {block!r} is not allowed: give [{', '.join(Block._fields)}]")
        entry = Block(*block)
        for state in (entry.left, entry.right):
            _check_state(place, state, number + 2)
        for operation in (entry.left_op, entry.right_op):
            if operation not in OPERATIONS:
                raise unknown(f"operation of {place}", str(operation), OPERATIONS)
        if entry.combine not in COMBINATIONS:
            raise unknown(f"combination of {place}", str(entry.combine), COMBINATIONS)
        read.append(entry)
    used = {state for entry in read for state in (entry.left, entry.right)}
    unused = [state for state in range(len(read) + 2) if state not in used]
    output = cell.get("output", unused)
    if not isinstance(output, Sequence) or not output:
        raise InputError(f"genotype.{kind}.output = {output!r} is not allowed: give a list of states, or leave it out")
    for state in output:
        _check_state(f"genotype.{kind}.output", state, len(read) + 2)
    lost = sorted(set(unused) - set(output))
    if lost or len(set(output)) < len(output):
        raise InputError(
            f"genotype.{kind}.output = {list(output)} is not allowed: name once each state that no block reads, "
            f"which are {unused}, and others if you like"
        )
    return CellPlan(tuple(read), tuple(output))


def _check_state(place: str, state: Any, count: int) -> None:
    if isinstance(state, bool) or not isinstance(state, int) or not 0 <= state < count:
        raise InputError(f"{place}: the state {state!r} is not allowed: give a number from 0 to {count - 1}")


class Cell(nn.Module):
    """A cell: blocks that each join what two operations make of two hidden states; it gives some states side by side.

    Args:
        plan: of the cell.
        width: channels of the input.
        before: channels of what came before it.
        filters: F.
        stride: 2 halves the size: operations on the two inputs do.
        align: what is done to what came before: ``"raw"`` nothing, in a net's first cell; ``"width"`` a convolution
            unless it has F channels; ``"halve"`` the same and half the size.
        keep: whether the next cell is given what came before this one in the place of its input, as the published
            large net has it behind a reduction.
        eps: of the normalisations.
        drop_path: stochastic depth of each operation.
    """

    def __init__(
        self,
        plan: CellPlan,
        width: int,
        before: int,
        filters: int,
        *,
        stride: int,
        align: str,
        keep: bool,
        eps: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.blocks, self.output, self.keep = plan.blocks, plan.output, keep
        self.squeeze = _layers(eps, _conv(width, filters, 1))
        self.align: nn.Module = nn.Identity()
        if align == "halve":
            self.align = Halving(before, filters, eps)
        elif align == "width" and before != filters:
            self.align = _layers(eps, _conv(before, filters, 1))
        widths = [filters, before if align == "raw" else filters]
        self.left, self.right = nn.ModuleList(), nn.ModuleList()
        for block in self.blocks:
            for side, state, name in (
                (self.left, block.left, block.left_op),
                (self.right, block.right, block.right_op),
            ):
                side.append(Operation(name, widths[state], filters, stride if state < 2 else 1, eps, drop_path))
            widths.append(filters * (1 + (block.combine == "concat")))
        # Of the two inputs, what the output has is brought to its size and width.
        self.join = nn.ModuleDict()
        for state in self.output:
            if state < 2 and stride == 2:
                self.join[str(state)] = Halving(widths[state], filters, eps)
            elif state < 2 and widths[state] != filters:
                self.join[str(state)] = _layers(eps, _conv(widths[state], filters, 1))
        self.out_channels = sum(filters if state < 2 else widths[state] for state in self.output)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Return (B, out_channels, H, W), or half the size, of the input and of what came before it."""
        aligned = before if isinstance(self.align, nn.Identity) else self.align(F.relu(before))
        states = [self.squeeze(F.relu(x)), aligned]
        rectified: dict[int, Tensor] = {}  # several operations read one state

        def apply(operation: nn.Module, state: int) -> Tensor:
            if not operation.rectified:
                return operation(states[state])
            if state not in rectified:
                rectified[state] = F.relu(states[state])
            return operation(rectified[state])

        for block, left, right in zip(self.blocks, self.left, self.right, strict=True):
            parts = apply(left, block.left), apply(right, block.right)
            states.append(parts[0] + parts[1] if block.combine == "add" else torch.cat(parts, 1))
        found = [
            self.join[str(state)](states[state]) if str(state) in self.join else states[state] for state in self.output
        ]
        return torch.cat(found, 1)


class Stage(nn.Module):
    """Cells of one size. It is given two maps, the input and what came before it, and gives two."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(cells)
        self.grad_checkpointing = False

    def forward(self, maps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the map of the last cell, and that which comes before it for the next."""
        x, before = maps
        for cell in self.blocks:
            kept = before if cell.keep else x
            x = checkpoint(cell, x, before) if self.grad_checkpointing and self.training else cell(x, before)
            before = kept
        return x, before


# ---- the net ---------------------------------------------------------------------------------------------------------


class NASNet(StagedNet):
    """A stack of cells with timm's surface, for images of any size.

    Features are behind a ReLU: with the stem ``"imagenet"`` at strides 4, 8, 16 and 32; with ``"small"`` at 1, 2 and 4,
    times ``stem_stride``.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        filters: F of the first cells; it doubles with each reduction.
            The paper calls a net (N @ its last features).
        cells: N, normal cells at each of three sizes.
        stem: ``"imagenet"``: a convolution and two reduction cells of F / 4 and F / 2 filters, F a multiple of 8;
            ``"small"``: a convolution.
        stem_width: channels of that convolution.
        stem_stride: of the ``"small"`` one, 1 or 2.
        genotype: of the cells, as ``NASNET_A``, which None stands for.
        skip_reduction: whether the cell behind a reduction is given what came before it, as the published large net
            has it, in the place of its input.
        norm_eps: of the normalisations; published: 1e-3, and 1e-5 for small images.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of each operation in the last cell, growing linearly from the first on, in
            [0, 1); ``nasnet:ScheduledDropPath`` lets it grow with training, too.

    Raises:
        InputError: a genotype that is none, or an argument out of range.
    """

    BEHIND = r"^head\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        filters: int = 44,
        cells: int = 4,
        stem: str = "imagenet",
        stem_width: int = 32,
        stem_stride: int = 2,
        genotype: Mapping[str, Any] | None = None,
        skip_reduction: bool = False,
        norm_eps: float = 1e-3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise unknown("stem", stem, STEMS)
        imagenet = stem == "imagenet"
        least = 8 if imagenet else 2
        if filters < least or filters % (4 if imagenet else 1):
            allowed = "a multiple of 4, 8 or more" if imagenet else "2 or more"
            raise InputError(f"filters = {filters} is not allowed: give {allowed}")
        if cells < 1 or stem_width < 1:
            raise InputError(f"cells = {cells}, stem_width = {stem_width} is not allowed: give 1 or more")
        if stem_stride not in (1, 2) or (imagenet and stem_stride != 2):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 2, or 1 with stem = 'small'")
        plans = read_genotype(NASNET_A if genotype is None else genotype)
        padding = {"padding": "valid" if imagenet else "same"}
        self.stem = nn.Sequential(
            create_conv2d(in_chans, stem_width, 3, stride=stem_stride, **padding), nn.BatchNorm2d(stem_width, norm_eps)
        )
        # A cell: its kind and its filters. The first stage of the large stem is a reduction alone.
        rest = [[("reduction", 2 * filters)], [("reduction", 4 * filters)]]
        layout = [[], *rest]
        if imagenet:
            layout = [[("reduction", filters // 4)], [("reduction", filters // 2)], *rest]
        for stage, width in zip(layout[-3:], (filters, 2 * filters, 4 * filters), strict=True):
            stage += [("normal", width)] * cells
        total = sum(map(len, layout))
        maps = [(stem_width, 0)] * 2  # channels and halvings of what came before, and of the input
        stages: list[Stage] = []
        self.feature_info = []
        for number, stage in enumerate(layout):
            built: list[Cell] = []
            for kind, width in stage:
                done = sum(len(each.blocks) for each in stages) + len(built)
                before, now = maps
                cell = Cell(
                    plans[kind],
                    now[0],
                    before[0],
                    width,
                    stride=2 if kind == "reduction" else 1,
                    align="raw" if not done else "halve" if before[1] != now[1] else "width",
                    keep=skip_reduction and kind == "reduction" and not (imagenet and number < 2),
                    eps=norm_eps,
                    drop_path=drop_path_rate * (done + 1) / total,
                )
                built.append(cell)
                maps = [before if cell.keep else now, (cell.out_channels, now[1] + (kind == "reduction"))]
            stages.append(Stage(built))
            stride = stem_stride * 2 ** maps[1][1]
            self.feature_info.append({"num_chs": maps[1][0], "reduction": stride, "module": f"stages.{number}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = maps[1][0]
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for module in self.stem.modules():
            _begin(module)
        for module in self.stages.modules():
            _begin(module)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map behind the last cell, (B, C, H, W), behind a ReLU."""
        x = self.stem(x)
        last, _ = self.stages((x, x))
        return F.relu(last)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return features of stages, and with them what ``forward_features`` gives, as timm's models do.

        Args:
            x: images (B, C, H, W).
            indices: numbers of stages; a number is that of the last ones, None takes all.
            norm: without meaning here.
            stop_early: leave out the stages behind the last that is wanted.
            output_fmt: ``"NCHW"``.
            intermediates_only: leave out what ``forward_features`` gives.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt = {output_fmt!r} is not allowed: NASNet's features are NCHW")
        taken, last = feature_take_indices(len(self.stages), indices)
        found = []
        x = self.stem(x)
        maps = (x, x)
        for number, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            maps = stage(maps)
            if number in taken:
                found.append(F.relu(maps[0]))
        return found if intermediates_only else (F.relu(maps[0]), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of these features, as timm's; return their numbers."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head or last + 1 < len(self.feature_info):
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return taken


def _begin(module: nn.Module) -> None:
    """Draw weights as published: normal, cut off at two deviations, of a variance of 2 over the fan out."""
    # On the meta device there is nothing to draw, and torch would take seconds over it.
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        fan_out = module.weight.shape[0] // module.groups * math.prod(module.kernel_size)
        std = math.sqrt(1.3 * 2 / fan_out)  # what is cut off is a fair part of the variance
        trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


# ---- the authors' weights --------------------------------------------------------------------------------------------

_CELL = (
    (r"^(?:conv_)?1x1\.", "squeeze.0."),
    (r"^beginning_bn\.", "squeeze.1."),
    (r"^prev_1x1\.", "align.0."),
    (r"^prev_bn\.", "align.1."),
    (r"^path(\d)_conv\.", r"align.conv\1."),
    (r"^final_path_bn\.", "align.bn."),
    (r"^comb_iter_(\d)\.(left|right)\.", r"\2.\1.body."),
    (r"body\.separable_\dx\d_1\.depthwise", "body.0."),
    (r"body\.separable_\dx\d_1\.pointwise", "body.1."),
    (r"body\.bn_sep_\dx\d_1\.", "body.2."),
    (r"body\.separable_\dx\d_2\.depthwise", "body.4."),
    (r"body\.separable_\dx\d_2\.pointwise", "body.5."),
    (r"body\.bn_sep_\dx\d_2\.", "body.6."),
    (r"body\.1x1\.", "body.0."),
    (r"body\.bn_1\.", "body.1."),
    (r"^reduction_(\d)\.path_conv\.", r"join.\1.0."),
    (r"^reduction_(\d)\.path_bn\.", r"join.\1.1."),
)
"""Names within a cell, of TensorFlow's checkpoint."""
_TIMM = (
    (r"^conv0\.conv\.", "conv0."),
    (r"^conv0\.bn\.", "conv0_bn."),
    (r"^last_linear\.", "final_layer.FC."),
    (r"\.conv_1x1\.conv\.", ".1x1."),
    (r"\.conv_1x1\.bn\.", ".beginning_bn."),
    (r"\.conv_prev_1x1\.conv\.", ".prev_1x1."),
    (r"\.conv_prev_1x1\.bn\.", ".prev_bn."),
    (r"\.path_(\d)\.conv\.", r".path\1_conv."),
    (r"\.comb_iter_(\d)_(left|right)\.", r".comb_iter_\1.\2."),
    (r"\.separable_(\d)\.(depthwise|pointwise)_conv2d\.", r".separable_0x0_\1.\2"),
    (r"\.bn_sep_(\d)\.", r".bn_sep_0x0_\1."),
)
"""timm's names in TensorFlow's, whose kernel sizes do not matter here."""
_LEAVES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return published weights under our names.

    Args:
        state_dict: those of timm's ``nasnetalarge``; or the authors', tensors by their names in TensorFlow's
            checkpoint, as ``cell_0/1x1/weights``. The auxiliary classifier, and that of 1001 classes for the
            background, are left out.
        model: a ``NASNet`` of as many cells.
    """
    if not any(re.match(r"(?:conv0|l1_stem)", key) for key in state_dict):
        return dict(state_dict)
    classes = cast(NASNet, model).num_classes
    found: dict[str, Any] = {}
    for key, value in state_dict.items():
        if key.startswith("aux_") or key.endswith("/ExponentialMovingAverage") or key == "global_step":
            continue
        name, array = _from_tensorflow(key, value) if "/" in key else (key, value)
        for pattern, new in () if "/" in key else _TIMM:
            name = re.sub(pattern, new, name)
        name = _our_name(name, model)
        if name.startswith("head.") and len(array) == classes + 1:
            array = array[1:]
        found[name] = array
    for name, own in model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # which TensorFlow does not count
            found.setdefault(name, own)
    return found


def _from_tensorflow(key: str, value: Any) -> tuple[str, Tensor]:
    """Return a name with points, and the array in the order of torch."""
    *scope, leaf = key.split("/")
    array = torch.as_tensor(value)
    if array.ndim == 4:
        array = array.permute(2, 3, 0, 1) if leaf == "depthwise_weights" else array.permute(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
    if leaf in ("depthwise_weights", "pointwise_weights"):
        return f"{'.'.join(scope)}.{leaf.removesuffix('_weights')}weight", array.contiguous()
    leaf = {"weights": "weight", "biases": "bias", **_LEAVES}[leaf]
    return f"{'.'.join(scope)}.{leaf}", array.contiguous()


def _our_name(name: str, model: nn.Module) -> str:
    """Return our name of a tensor that has TensorFlow's, with points."""
    for pattern, new in ((r"^(?:conv0|l1_stem_3x3)\.", "stem.0."), (r"^(?:conv0|l1_stem)_bn\.", "stem.1.")):
        name = re.sub(pattern, new, name)
    name = re.sub(r"^final_layer\.FC\.", "head.", name)
    found = re.match(r"(cell_stem|reduction_cell|cell)_(\d+)\.(.*)", name)
    if found is None:
        return name
    kind, number, rest = found[1], int(found[2]), found[3]
    first = len(cast(NASNet, model).stages) - 3  # stage of the first normal cell
    if kind == "cell_stem":
        stage, block = number, 0
    elif kind == "reduction_cell":
        stage, block = first + 1 + number, 0
    else:
        cells = cast(Stage, cast(NASNet, model).stages[first]).blocks
        depth = len(cells) - (first > 0)
        stage, block = first + number // depth, number % depth
        block += stage > 0  # behind a reduction
    for pattern, new in _CELL:
        rest = re.sub(pattern, new, rest)
    return f"stages.{stage}.blocks.{block}.{rest}"


# ---- variants --------------------------------------------------------------------------------------------------------

_INCEPTION: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.875}

default_cfgs = generate_default_cfgs(
    {
        "nasnet_nano": nano_cfg(pool_size=(4, 4)),
        "nasnet_cifar": nano_cfg(pool_size=(8, 8)),
        "nasnet_mobile": cfg(**_INCEPTION),
        "nasnet_large": cfg(331, **{**_INCEPTION, "crop_pct": 0.911}, pool_size=(11, 11)),
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> NASNet:
    stages = 3 if options.get("stem") == "small" else 4
    model: NASNet = build_model_with_cfg(
        NASNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(stages)), "feature_cls": "getter"},
        **options,
    )
    return model


_SMALL = {"stem": "small", "norm_eps": 1e-5}


@register_model
def nasnet_nano(pretrained: bool = False, **kwargs: Any) -> NASNet:
    """0.1 M parameters, for images of 28 to 64 pixels; ours, not the paper's."""
    own = {**_SMALL, "filters": 8, "cells": 1, "stem_width": 24}
    return _create("nasnet_nano", pretrained, **{**own, **kwargs})


@register_model
def nasnet_cifar(pretrained: bool = False, **kwargs: Any) -> NASNet:
    """3.3 M parameters, for images of 32 pixels: NASNet-A (6 @ 768); trained with paths dropped up to 0.4."""
    own = {**_SMALL, "filters": 32, "cells": 6, "stem_width": 96, "stem_stride": 1}
    return _create("nasnet_cifar", pretrained, **{**own, **kwargs})


@register_model
def nasnet_mobile(pretrained: bool = False, **kwargs: Any) -> NASNet:
    """5.3 M parameters and 564 M multiply-adds at 224 pixels: NASNet-A (4 @ 1056); trained with dropout 0.5."""
    return _create("nasnet_mobile", pretrained, **{"filters": 44, "cells": 4, "stem_width": 32, **kwargs})


@register_model
def nasnet_large(pretrained: bool = False, **kwargs: Any) -> NASNet:
    """88.7 M parameters and 23.8 G multiply-adds at 331 pixels: NASNet-A (6 @ 4032).

    Trained with dropout 0.5 and paths dropped up to 0.3.
    """
    own = {"filters": 168, "cells": 6, "stem_width": 96, "skip_reduction": True}
    return _create("nasnet_large", pretrained, **{**own, **kwargs})
