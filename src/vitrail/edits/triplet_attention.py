"""Triplet attention: three branches, each of which gates a tensor by what two of its axes say together.

Misra et al., "Rotate to Attend: Convolutional Triplet Attention Module" (WACV 2021). A branch turns one axis of
(C, H, W) to the front, pools it to its maximum and mean ("Z-pool"), and convolves the two maps into one gate. The
module is the mean of the three gated tensors. It has no channel reduction and 300 parameters, whatever the width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models._efficientnet_blocks import ConvBnAct
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.func import functional_call

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError


class AttentionGate(nn.Module):
    """Gate over the last two axes of a tensor, from the maximum and the mean over its second.

    Args:
        kernel_size: side of the convolution, odd.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1, momentum=0.01)
        # The published nets draw all their convolutions so.
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the gate (B, 1, I, J), in (0, 1), of x (B, D, I, J)."""
        # Forward and backward, this maximum takes half the time of amax, which shares gradients between ties.
        pooled = torch.stack((x.max(1).values, x.mean(1)), dim=1)  # (B, 2, I, J)
        return self.norm(self.conv(pooled)).sigmoid()


class TripletAttention(nn.Module):
    """Scale (B, C, H, W) by the mean of gates over (C, W), (H, C) and (H, W).

    Args:
        kernel_size: side of the three convolutions, odd; 7 and 3 are published.
        spatial: have the branch over (H, W).
        still: start the branch over (H, W) with a gate of 1/2 everywhere, as the published ResNets do.

    Raises:
        InputError: the kernel size is even or below 1; in ``forward``, the input has not four axes.
    """

    def __init__(self, kernel_size: int = 7, *, spatial: bool = True, still: bool = False) -> None:
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"triplet_attention: kernel_size = {kernel_size!r} is not allowed: give an odd number")
        self.cw = AttentionGate(kernel_size)
        self.hc = AttentionGate(kernel_size)
        self.hw = AttentionGate(kernel_size) if spatial else None
        if still and self.hw is not None:
            nn.init.zeros_(self.hw.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated (B, C, H, W)."""
        if x.ndim != 4:
            raise InputError(
                f"triplet_attention works on (B, C, H, W) and met {tuple(x.shape)}: "
                "name layers of such an output with modules='a pattern of their names'"
            )
        gates = [
            self.cw(x.transpose(1, 2)).transpose(1, 2),  # (B, H, C, W) -> (B, C, 1, W)
            self.hc(x.transpose(1, 3)).transpose(1, 3),  # (B, W, H, C) -> (B, C, H, 1)
        ]
        if self.hw is not None:
            gates.append(self.hw(x))  # (B, 1, H, W)
        # One product with the mean of the gates instead of the mean of three products.
        return x * (sum(gates[1:], gates[0]) / len(gates))


def triplet_attention(*, kernel_size: int = 7, spatial: bool = True, modules: str | None = None) -> Edit:
    """Return the edit that adds triplet attention to a convolutional network.

    It goes to the end of every residual branch, before the addition: in ResNets after the last normalisation, in
    MobileNetV2 and its kin also of the blocks that add nothing, as published. In other nets of timm it is put before
    the ``drop_path`` of each block that has convolutions and adds a branch of (B, C, H, W).

    Args:
        kernel_size: side of the three convolutions, odd.
        spatial: have the branch over (H, W).
        modules: regular expression; the module then goes after every layer whose whole dotted name matches, and nowhere
            else.

    Raises:
        InputError: an argument out of range; or, from the edit, a network without such places (the text lists what it
            has) or one that keeps its channels last.

    Example:
        >>> model = triplet_attention()(timm.create_model("resnet50"))                       # doctest: +SKIP
        >>> model = triplet_attention(modules="layer[34]")(timm.create_model("resnet50"))    # doctest: +SKIP
    """
    TripletAttention(kernel_size)  # refuse a wrong size now, not when the edit is applied
    try:
        pattern = None if modules is None else re.compile(modules)
    except (re.error, TypeError) as error:
        raise InputError(
            f"triplet_attention: modules = {modules!r} is no regular expression ({error}): "
            r"give one that matches whole names of layers, such as 'layer\d\.\d'"
        ) from None

    def attention(*, still: bool = False) -> TripletAttention:
        return TripletAttention(kernel_size, spatial=spatial, still=still)

    def edit(model: nn.Module) -> nn.Module:
        if getattr(model, "output_fmt", "NCHW") != "NCHW":
            raise InputError(
                f"triplet_attention: {type(model).__name__} keeps its channels last, which the module cannot use: "
                "take a convolutional network such as resnet50"
            )
        if pattern is None:
            places = _places(model)
            what = "residual block with convolutions (modules='a pattern of names' puts it elsewhere)"
            return replace_modules(model, lambda _, m: m in places, lambda block: _finish(block, attention), what=what)
        named = pattern.fullmatch
        what = f"layer whose whole name matches {modules!r}"
        return replace_modules(
            model, lambda name, _: bool(named(name)), lambda layer: nn.Sequential(layer, attention()), what=what
        )

    return edit


def _places(model: nn.Module) -> set[nn.Module]:
    """Return the residual blocks whose branch can end with the module."""
    places: set[nn.Module] = set()
    slots: dict[nn.Module, nn.Module] = {}
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            places.add(block)
        elif _inverted(block):
            # A plain convolution of these nets is no block; a block that adds nothing is one, as published.
            if block.has_skip or not isinstance(block, ConvBnAct):
                places.add(block)
        elif getattr(block, "drop_path", False) is None:
            block.drop_path = nn.Identity()
        slot = getattr(block, "drop_path", None)
        if (
            block not in places
            and isinstance(slot, nn.Module)
            and any(isinstance(m, nn.Conv2d) for m in block.modules())
        ):
            slots[slot] = block
    return places | {slots[slot] for slot in _passed_once(model, list(slots))}


def _inverted(block: nn.Module) -> bool:
    """Return whether this is a block of MobileNetV2's kin: attention of theirs may have ``has_skip``, too."""
    return hasattr(block, "has_skip") and "drop_path" in dict(block.named_children())


def _passed_once(model: nn.Module, slots: list[nn.Module]) -> list[nn.Module]:
    """Return those of ``slots`` that a (B, C, H, W) passes once in a pass of the model; others would stay idle."""
    if not slots:
        return []
    seen: dict[nn.Module, list[int]] = {slot: [] for slot in slots}
    hooks = [slot.register_forward_hook(lambda m, _, output: seen[m].append(output.ndim)) for slot in slots]
    modes = {module: module.training for module in model.modules()}
    # Shapes alone are followed: on the meta device nothing is computed.
    state = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    try:
        with torch.no_grad():
            functional_call(model.eval(), state, torch.zeros(1, channels, *size, device="meta"))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"triplet_attention cannot follow an image through {type(model).__name__} ({reason}): "
            "name its places with modules='a pattern of names'"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return [slot for slot, dimensions in seen.items() if dimensions == [4]]


def _finish(block: Any, attention: Callable[..., TripletAttention]) -> nn.Module:
    """Put the module at the end of the residual branch of a block of timm."""
    if isinstance(block, (BasicBlock, Bottleneck)):
        # Their slot for attention is where the paper has it.
        block.se = attention(still=True) if block.se is None else nn.Sequential(block.se, attention(still=True))
    elif _inverted(block):
        # These skip drop_path where they add nothing, so it goes after the layer before that.
        names = [name for name, _ in block.named_children()]
        last = names[names.index("drop_path") - 1]
        setattr(block, last, nn.Sequential(getattr(block, last), attention()))
    else:
        block.drop_path = nn.Sequential(attention(), block.drop_path)
    return block


_BRANCHES = {"ChannelGateH": "cw", "ChannelGateW": "hc", "SpatialGate": "hw"}
_PUBLISHED = re.compile(
    r"(layer\d+\.\d+)\.triplet_attention\.(cw|hc|hw|ChannelGateH|ChannelGateW|SpatialGate)\.(?:conv|spatial)\.(conv|bn)"
)


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the authors' weights under the names of timm's ResNet or MobileNetV2 with this edit.

    Args:
        state: of their checkpoint's ``state_dict``, with or without ``module.`` before its names.
        model: the edited model of timm.

    Raises:
        InputError: the tensors are not those of the model.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = model.state_dict()
    if "features.0.0.weight" in state:  # MobileNetV2: other names, the same tensors in the same order
        renamed = dict(zip(own, state.values()))
    else:
        renamed = {
            _PUBLISHED.sub(
                lambda m: f"{m[1]}.se.{_BRANCHES.get(m[2], m[2])}.{'norm' if m[3] == 'bn' else 'conv'}", key
            ): value
            for key, value in state.items()
        }
    wrong = [key for key in own if key not in renamed or renamed[key].shape != own[key].shape]
    if wrong or len(state) != len(own):
        raise InputError(
            f"the checkpoint has {len(state)} tensors and {type(model).__name__} has {len(own)}"
            + (f"; {wrong[0]} is missing or of another shape" if wrong else "")
            + ": create the variant of the checkpoint, with as many classes, and edit it with the same kernel_size"
        )
    return renamed
