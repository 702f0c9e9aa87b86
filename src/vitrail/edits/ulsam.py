"""ULSAM: subspace attention, one map of attention for each group of channels, at almost no cost.

Saini et al., "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks" (WACV
2020). The channels are divided into g groups, the subspaces. In each, a 1 x 1 depthwise convolution, a maximum over
3 x 3 places and a 1 x 1 convolution to one channel give a map, its softmax over all places is the attention A, and the
group becomes A * x + x. It is put behind a block of a compact net, or in the place of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.func import functional_call

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError

BLOCKS = (DepthwiseSeparableConv, InvertedResidual, BasicBlock, Bottleneck, ConvNeXtBlock)
"""Of timm, that can be numbered: MobileNetV1 and V2 and their kin, ResNets, ConvNeXt."""


class Ulsam(nn.Module):
    """Attend to places of (B, C, H, W), in each group of channels by itself.

    All groups are computed together: what the published module does in a loop over its subspaces.

    Args:
        channels: C, divisible by ``groups``.
        groups: g, the number of subspaces; 1, 4, 8 and 16 are published.

    Raises:
        InputError: a number out of range; in ``forward``, another shape.
    """

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        _refuse_groups(groups)
        if channels % groups:
            raise InputError(
                f"ulsam: {channels} channels cannot be divided into {groups} equal groups: give another groups=, or "
                "other layers="
            )
        self.groups = groups
        # A momentum of 0.9 is the published one: the running statistics are almost those of the last batch.
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.conv_point = nn.Conv2d(channels, groups, 1, groups=groups)
        self.bn_point = nn.BatchNorm2d(groups, momentum=0.9)

    def attention(self, x: Tensor) -> Tensor:
        """Return the maps (B, g, H, W), each of sum 1, for x (B, C, H, W)."""
        x = self.pool(self.bn_dws(self.conv_dws(x)).relu())
        maps = self.bn_point(self.conv_point(x)).relu()
        return maps.flatten(2).softmax(-1).view_as(maps)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        if x.ndim != 4:
            raise InputError(
                f"ulsam works on (B, C, H, W) and met {tuple(x.shape)}: name layers of such an output with "
                "modules='a pattern of their names'"
            )
        groups = x.unflatten(1, (self.groups, -1))  # (B, g, C / g, H, W)
        return (groups * self.attention(x)[:, :, None] + groups).flatten(1, 2)


def ulsam(
    *,
    groups: int = 4,
    substitute: bool = False,
    layers: Sequence[int] | None = None,
    modules: str | None = None,
) -> Edit:
    """Return the edit that inserts subspace attention behind blocks of a net, or substitutes it for them.

    Layers are numbered as in the paper: the first convolution is 1, and the blocks follow. Published for MobileNetV2
    (18 layers): inserted behind 17; substituted for 14, for 17, for 11 and 14, for 16 and 17, for 14 and 17, and for
    13, 14, 16 and 17. Published for MobileNetV1 (14 layers): inserted behind layers of 512 channels and one of 1024,
    and substituted for one of 512, such as 12.

    Args:
        groups: g; 1, 4, 8 and 16 are published.
        substitute: put the module in the place of blocks that keep the shape of what they are given, rather than behind
            blocks.
        layers: numbers of blocks; None: the last that keeps the shape, at a sixteenth of the image's side or more. In
            the maps after it a small image is one place, and there is nothing to attend to.
        modules: regular expression; the layers whose whole dotted name matches, in place of ``layers``.

    Raises:
        InputError: an argument out of range; or, from the edit, a net without such blocks, numbers that it has not, a
            block that changes the shape, or channels that cannot be divided into the groups.

    Example:
        >>> model = ulsam(substitute=True, layers=[14, 17])(timm.create_model("mobilenetv2_100"))   # doctest: +SKIP
        >>> model = ulsam(groups=8, modules="layer3")(timm.create_model("resnet18"))                # doctest: +SKIP
    """
    _refuse_groups(groups)
    if layers is not None and modules is not None:
        raise InputError("ulsam: layers and modules both say where it goes: give one of them")
    if layers is not None and not (layers and all(isinstance(number, int) for number in layers)):
        raise InputError(f"ulsam: layers = {layers!r} is not allowed: give numbers of blocks, such as [14, 17]")
    try:
        pattern = None if modules is None else re.compile(modules)
    except (re.error, TypeError) as error:
        raise InputError(
            f"ulsam: modules = {modules!r} is no regular expression ({error}): "
            r"give one that matches whole names of layers, such as 'blocks\.4\.2'"
        ) from None

    def edit(model: nn.Module) -> nn.Module:
        if getattr(model, "output_fmt", "NCHW") != "NCHW":
            raise InputError(
                f"ulsam: {type(model).__name__} keeps its channels last, which the module cannot use: "
                "take a convolutional network such as mobilenetv2_100"
            )
        if pattern is not None:
            named = [module for name, module in model.named_modules() if name and pattern.fullmatch(name)]
            what = f"layer whose whole name matches {modules!r}"
        else:
            named = list(_chosen(model, layers).values())
            what = "block of a MobileNet, ResNet or ConvNeXt (modules='a pattern of names' names other layers)"
        shapes = _shapes(model, named)
        if pattern is None and layers is None:
            side = _image_size(model)[-1]
            named = [block for block in named if _fits(*shapes[block], side)][-1:]
        new = {block: _made(block, *shapes[block], groups, substitute) for block in named}
        return replace_modules(
            model,
            lambda _, module: module in new,
            lambda module: new[module] if substitute else nn.Sequential(module, new[module]),
            what=what,
        )

    return edit


def numbered_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """Return the blocks of a net by their numbers: the first convolution is 1, so that they begin with 2."""
    return dict(enumerate((module for module in model.modules() if isinstance(module, BLOCKS)), start=2))


def _chosen(model: nn.Module, layers: Sequence[int] | None) -> dict[int, nn.Module]:
    blocks = numbered_blocks(model)
    missing = [number for number in layers or () if number not in blocks]
    if missing and blocks:
        raise InputError(
            f"ulsam: {type(model).__name__} has no layer {missing[0]}: its blocks are numbered from 2 to {max(blocks)}"
        )
    return blocks if layers is None else {number: blocks[number] for number in layers if number in blocks}


def _fits(given: tuple[int, ...], returned: tuple[int, ...], side: int) -> bool:
    return given == returned and 16 * returned[-1] >= side


def _image_size(model: nn.Module) -> tuple[int, ...]:
    """Return channels, height and width of the images that a model was made for."""
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    return channels, *(getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]


def _made(
    block: nn.Module, given: tuple[int, ...], returned: tuple[int, ...], groups: int, substitute: bool
) -> nn.Module:
    if len(returned) != 4:
        raise InputError(
            f"ulsam works on (B, C, H, W), and {type(block).__name__} returns the shape {returned}: name other layers"
        )
    if substitute and given != returned:
        raise InputError(
            f"ulsam cannot be substituted for a {type(block).__name__} that makes {given[1:]} into {returned[1:]}: "
            "choose one that keeps the shape, or insert it with substitute=false"
        )
    return Ulsam(returned[1], groups)


def _shapes(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the shapes that each layer is given and returns in a pass of the model; only shapes are computed."""
    seen: dict[nn.Module, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def look(module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        seen[module] = tuple(given[0].shape), tuple(getattr(returned, "shape", ()))

    hooks = [layer.register_forward_hook(look) for layer in layers]
    if not hooks:
        return seen
    modes = {module: module.training for module in model.modules()}
    state = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    try:
        with torch.no_grad():
            functional_call(model.eval(), state, torch.zeros(1, *_image_size(model), device="meta"))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"ulsam cannot follow an image through {type(model).__name__} ({reason}): take another model"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return {layer: seen.get(layer, ((), ())) for layer in layers}


def _refuse_groups(groups: object) -> None:
    if not isinstance(groups, int) or groups < 1:
        raise InputError(f"ulsam: groups = {groups!r} is not allowed: give a whole number from 1, such as 4")


_PUBLISHED = re.compile(r"(.*?)subspaces\.(\d+)\.((?:conv|bn)_(?:dws|point)\.\w+)")


def checkpoint_filter_fn(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the tensors of the authors' subspaces joined into those of one module.

    Args:
        state: of a net or a module with the published ULSAM; other names pass as they are.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    joined: dict[str, Tensor] = {}
    for key, value in state.items():
        found = _PUBLISHED.fullmatch(key)
        if found is None:
            joined[key] = value
        else:
            parts.setdefault(found[1] + found[3], {})[int(found[2])] = value
    for key, subspaces in parts.items():
        values = [subspaces[number] for number in sorted(subspaces)]
        joined[key] = torch.cat(values) if values[0].ndim else values[0]
    return joined
