"""The designs of a survey of Mamba in medical imaging: for sequences, classification, segmentation and restoration.

Bansal et al., "A Comprehensive Survey of Mamba Architectures for Medical Image Analysis: Classification, Segmentation,
Restoration and Beyond" (2024), arXiv 2410.02362. The survey has no code; each design follows that of its own authors:
MedMamba (Yue and Li, arXiv 2403.03849), VM-UNet (Ruan and Xiang, arXiv 2402.02491), U-Mamba (Ma, Li and Wang, arXiv
2401.04722), MambaIR (Guo et al., arXiv 2402.15648). ``evaluate.sliding_window`` applies a net to images of any size.

Shapes: B images of H x W places, or of any S1 x S2 (x S3), C channels, L places in all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block as TransformerBlock
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.mamba import SS2D, Mamba, MambaBlock
from vitrail.layers.scan.lti import S4, S4D, S5
from vitrail.layers.scan.orders import Order, cross, inverse, raster, rearrange, snake, windows
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks

# ---- the core layers, in a net for sequences -------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention of several heads, the layer that the others are compared with."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"num_heads = {num_heads} does not divide a width of {dim}: give a divisor of it")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, C)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class _First(nn.Module):
    """The output alone of a layer that also returns its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


LAYERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "s4": lambda dim, states, length: S4(dim, states, length),
    "s4d": lambda dim, states, length: S4D(dim, states),
    "s5": lambda dim, states, length: _First(S5(dim, states)),
    "s6": lambda dim, states, length: Mamba(dim, states=states),
    "attention": lambda dim, states, length: Attention(dim, 4),
}
"""From C, the states and the longest sequence to a causal layer on (B, L, C)."""


class SequenceNet(nn.Module):
    """A net for sequences: linear layer, blocks of one of the core layers, linear layer.

    A block is that of S4: norm, layer, GELU, and a gated linear unit, added to what came in. Mamba, which has its own
    gate, and attention have the same block.

    Args:
        in_dim: numbers at each step.
        out_dim: outputs, at each step.
        dim: C.
        depth: blocks.
        layer: a name of ``LAYERS``.
        states: N of a layer with states.
        length: the longest sequence, which S4 has to know, and to which the places of attention are embedded.

    Raises:
        UnknownName: another layer.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dim: int = 32,
        depth: int = 2,
        layer: str = "s4d",
        states: int = 16,
        length: int = 1024,
    ) -> None:
        super().__init__()
        if layer not in LAYERS:
            raise unknown("layer for sequences", layer, LAYERS, f"there are {', '.join(LAYERS)}")
        self.enter = nn.Linear(in_dim, dim)
        # Alone among the layers, attention does not know the order of what it reads.
        self.places = nn.Parameter(0.02 * torch.randn(length, dim)) if layer == "attention" else None
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.mixers = nn.ModuleList(LAYERS[layer](dim, states, length) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(depth))
        self.leave = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, out_dim) for (B, L, in_dim)."""
        x = self.enter(x)
        if self.places is not None:
            x = x + self.places[: x.shape[1]]
        for norm, mixer, gate in zip(self.norms, self.mixers, self.gates, strict=True):
            x = x + F.glu(gate(F.gelu(mixer(norm(x)))), dim=-1)
        return self.leave(x)


# ---- classification: MedMamba ----------------------------------------------------------------------------------------


class SSConvSSM(nn.Module):
    """Half of the channels through convolutions, half through SS2D, shuffled, and added to what came in.

    Args:
        dim: C, even.
        drop_path: stochastic depth of the half with SS2D, in [0, 1).
    """

    def __init__(self, dim: int, *, drop_path: float = 0.0) -> None:
        super().__init__()
        half = dim // 2
        self.norm = nn.LayerNorm(half)
        self.mixer = SS2D(half)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.local = nn.Sequential(
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 3, padding=1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        left, right = x.chunk(2, -1)
        right = self.drop_path(self.mixer(self.norm(right)))
        left = self.local(left.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + torch.stack((left, right), -1).flatten(-2)


class PatchMerging(nn.Module):
    """Four neighbours become one place of twice the channels; an odd plane is filled up with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H / 2, W / 2, 2 C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PatchEmbed(nn.Module):
    """Patches of size^2 pixels become places, and their channels are normed; edges are filled up with zeros."""

    def __init__(self, in_chans: int, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Conv2d(in_chans, dim, size, size)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H / size, W / size)."""
        x = F.pad(x, (0, -x.shape[3] % self.size, 0, -x.shape[2] % self.size))
        return self.norm(self.proj(x))


class Stage(nn.Module):
    """Patch merging (none in the first stage), then blocks; takes and returns (B, C, H, W)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.downsample(x.permute(0, 2, 3, 1))
        return through_blocks(self, x).permute(0, 3, 1, 2)


class MedMamba(StagedNet):
    """MedMamba with timm's surface; features at four strides for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        depths: blocks of each stage.
        dims: width of each stage, even; each is twice the one before.
        patch_size: pixels of a side of a place in the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout after the patch embedding, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1); the authors
            train with 0.1.

    Raises:
        InputError: widths that do not double, or of another number than depths; a pooling that is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        patch_size: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(dims) or dims[0] % 2 or any(b != 2 * a for a, b in pairwise(dims)):
            raise InputError(
                f"dims = {tuple(dims)} for depths = {tuple(depths)}: give an even width for the first stage, twice "
                "that for the second, and so on, one for each"
            )
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = PatchEmbed(in_chans, dims[0], patch_size)
        self.stem_drop, self.drop = nn.Dropout(drop_rate), nn.Identity()
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages, self.feature_info = [], []
        for number, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            downsample = PatchMerging(dim // 2) if number else nn.Identity()
            stages.append(Stage(downsample, [SSConvSSM(dim, drop_path=next(rates)) for _ in range(depth)]))
            self.feature_info.append(
                {"num_chs": dim, "reduction": patch_size * 2**number, "module": f"stages.{number}"}
            )
        self.stages = nn.Sequential(*stages)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_linear)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def no_weight_decay(self) -> set[str]:
        """Return patterns of matrices that are not decayed: with ``A_logs`` at 0 all states forget at one pace."""
        return {"*.A_logs"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) of the last stage."""
        return self.stages(self.stem_drop(self.stem(x)))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- segmentation of planes: VM-UNet ---------------------------------------------------------------------------------


class PatchExpand(nn.Module):
    """A place becomes factor^2 places, whose channels are normed.

    Args:
        dim: C, a multiple of factor^2 / expand.
        factor: of the sides.
        expand: channels of the linear layer over C.
    """

    def __init__(self, dim: int, factor: int, expand: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, expand * dim, bias=False)
        self.norm = nn.LayerNorm(expand * dim // factor**2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, factor H, factor W, C expand / factor^2)."""
        x = self.expand(x).unflatten(-1, (self.factor, self.factor, -1))  # (B, H, W, rows, columns, C)
        return self.norm(x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2))


class VMUNet(nn.Module):
    """VM-UNet: a U-Net of blocks of VMamba, whose skips are added.

    Args:
        in_chans: input channels; one channel that comes in the place of three is repeated.
        num_classes: outputs for each pixel, before a sigmoid or a softmax.
        depths: blocks of the encoder's stages. The paper's runs have the default, its code's default is (2, 2, 9, 2).
        decoder_depths: blocks of the decoder's, from the coarsest; the code's default is (2, 9, 2, 2).
        dim: width of the first stage; it doubles with each.
        drop_path_rate: stochastic depth of the last block of the encoder and of the first of the decoder, in [0, 1);
            the authors train with 0.2.

    Raises:
        InputError: an encoder and a decoder of different numbers of stages; a width that four does not divide.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        dim: int = 96,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(decoder_depths) or dim % 4:
            raise InputError(
                f"depths = {tuple(depths)}, decoder_depths = {tuple(decoder_depths)} and dim = {dim}: give as many "
                "stages on the way up as down, and a multiple of 4"
            )
        self.in_chans = in_chans
        self.multiple = 4 * 2 ** (len(depths) - 1)
        self.stem = PatchEmbed(in_chans, dim, 4)
        dims = [dim * 2**number for number in range(len(depths))]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.merges, self.down = nn.ModuleList(), nn.ModuleList()
        for number, (width, depth) in enumerate(zip(dims, depths, strict=True)):
            self.merges.append(PatchMerging(width // 2) if number else nn.Identity())
            self.down.append(_vss_blocks(width, depth, rates))
        rates = iter(torch.linspace(drop_path_rate, 0, sum(decoder_depths), device="cpu").tolist())
        self.expands, self.up = nn.ModuleList(), nn.ModuleList()
        for number, (width, depth) in enumerate(zip(reversed(dims), decoder_depths, strict=True)):
            self.expands.append(PatchExpand(2 * width, 2, 2) if number else nn.Identity())
            self.up.append(_vss_blocks(width, depth, rates))
        self.final = PatchExpand(dim, 4, 4)
        self.head = nn.Conv2d(dim // 4, num_classes, 1)
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes, H, W).

        Raises:
            InputError: sides that the strides do not divide.
        """
        _check_sides(x, 2, self.multiple)
        if x.shape[1] == 1 and self.in_chans == 3:
            x = x.expand(-1, 3, -1, -1)
        x = self.stem(x).permute(0, 2, 3, 1)
        skips = []
        for merge, blocks in zip(self.merges, self.down, strict=True):
            x = merge(x)
            skips.append(x)
            x = blocks(x)
        for number, (expand, blocks) in enumerate(zip(self.expands, self.up, strict=True)):
            x = blocks(expand(x + skips[-number] if number else x))
        return self.head(self.final(x).permute(0, 3, 1, 2))


def _vss_blocks(dim: int, depth: int, rates: Iterator[float]) -> nn.Sequential:
    blocks = (MambaBlock(SS2D(dim), nn.LayerNorm(dim), drop_path=next(rates)) for _ in range(depth))
    return nn.Sequential(*blocks)


# ---- segmentation of planes and volumes: U-Mamba, and nets of the same frame without it or with attention ------------

SCANS: dict[str, Callable[[tuple[int, ...]], Sequence[Order]]] = {
    "raster": lambda shape: (raster(shape),),
    "both": lambda shape: (raster(shape), raster(shape)[::-1]),
    "cross": cross,
    "snake": lambda shape: (snake(shape),),
    "windows": lambda shape: (windows(shape, (4,) * len(shape)),),
}
"""Orders in which Mamba reads a plane or a volume: line after line, that and backwards, along every axis there and
back, line after line without jumps, and window after window."""


class MapMamba(nn.Module):
    """A layer norm and Mamba over the places of a map; as published, what came in is not added.

    Args:
        width: C; with ``channel_tokens``, the number of places.
        scan: a name of ``SCANS``; each of its orders has a Mamba of its own, and their results are added up.
        axes: 2 or 3.
        channel_tokens: scan the channels, each of which is described by its places, in the place of the places.
    """

    def __init__(self, width: int, scan: str, axes: int, *, channel_tokens: bool = False) -> None:
        super().__init__()
        if scan not in SCANS:
            raise unknown("scan", scan, SCANS, f"there are {', '.join(SCANS)}")
        self.orders, self.channel_tokens = SCANS[scan], channel_tokens
        self.norm = nn.LayerNorm(width)
        count = 1 if channel_tokens else len(self.orders((2,) * axes))
        self.mixers = nn.ModuleList(Mamba(width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, S1, ...)."""
        kind = x.device.type
        # As published: a long scan needs its precision.
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            y = x.to(self.norm.weight.dtype).flatten(2)
            y = self._scanned(y, x.shape[2:])
        return y.reshape(x.shape).to(x.dtype)

    def _scanned(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.channel_tokens:
            return self.mixers[0](self.norm(x))
        x = self.norm(x.transpose(1, 2))
        parts = [
            rearrange(mixer(rearrange(x, order)), inverse(order))
            for mixer, order in zip(self.mixers, self.orders(tuple(shape)), strict=True)
        ]
        return torch.stack(parts).sum(0).transpose(1, 2)


class MapAttention(nn.Module):
    """A block of a transformer over the places of a map; the convolutions around it know where they are."""

    def __init__(self, width: int, num_heads: int = 4) -> None:
        super().__init__()
        self.block = TransformerBlock(width, num_heads, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, S1, ...)."""
        return self.block(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class ResidualBlock(nn.Module):
    """Two convolutions, instance norms and leaky ReLUs; what came in is added, through a convolution if it must."""

    def __init__(self, axes: int, in_dim: int, dim: int, stride: int = 1, *, project: bool = False) -> None:
        super().__init__()
        conv, norm = _CONV[axes], _NORM[axes]
        self.conv1 = conv(in_dim, dim, 3, stride, 1)
        self.norm1 = norm(dim, affine=True)
        self.conv2 = conv(dim, dim, 3, 1, 1)
        self.norm2 = norm(dim, affine=True)
        self.skip = conv(in_dim, dim, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, S1, ...)."""
        inside = F.leaky_relu(self.norm1(self.conv1(x)))
        return F.leaky_relu(self.norm2(self.conv2(inside)) + self.skip(x))


_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MIXERS = ("none", "mamba", "attention")


class ResidualUNet(nn.Module):
    """A residual U-Net for planes or volumes, with Mamba or attention after the stages of its encoder that say so.

    With ``none`` everywhere it is a U-Net; ``u_mamba`` builds the published nets; Mamba where there are many places
    and attention where there are few make a hybrid of the three.

    Args:
        axes: 2 for planes, 3 for volumes.
        in_chans: input channels.
        num_classes: outputs for each pixel.
        dims: width of each stage.
        mixers: of each stage, names of ``MIXERS``.
        blocks: residual blocks of each stage.
        decoder_blocks: of each stage of the decoder, from the coarsest, one fewer than stages.
        scan: how Mamba reads a map, a name of ``SCANS``.
        image_size: sides of the images, to which the net is then tied: where a map has no more places than channels,
            Mamba scans channels, as published. None scans places everywhere, at any size.
        finest_skip: give the last stage of the decoder what the first one of the encoder found.
        deep_supervision: return the logits of all stages of the decoder, the finest first, for training.

    Raises:
        InputError: axes that are not 2 or 3; lists that do not fit each other; an image size that does not fit.
        UnknownName: another mixer or scan.
    """

    def __init__(
        self,
        axes: int = 2,
        in_chans: int = 1,
        num_classes: int = 2,
        dims: Sequence[int] = (32, 64, 128, 256),
        mixers: Sequence[str] = ("none", "none", "none", "mamba"),
        blocks: Sequence[int] = (2, 2, 1, 1),
        decoder_blocks: Sequence[int] = (2, 2, 1),
        scan: str = "raster",
        image_size: Sequence[int] | None = None,
        finest_skip: bool = True,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if axes not in _CONV:
            raise InputError(f"axes = {axes} is not allowed: give 2 for planes or 3 for volumes")
        if not len(dims) == len(mixers) == len(blocks) == len(decoder_blocks) + 1 or len(dims) < 2:
            raise InputError(
                f"dims, mixers and blocks have {len(dims)}, {len(mixers)} and {len(blocks)} entries and decoder_blocks "
                f"{len(decoder_blocks)}: give one for each of two or more stages, and one fewer for the decoder"
            )
        self.axes, self.multiple = axes, 2 ** (len(dims) - 1)
        self.finest_skip, self.deep_supervision = finest_skip, deep_supervision
        self.image_size = None if image_size is None else tuple(image_size)
        if self.image_size is not None and (
            len(self.image_size) != axes or any(s % self.multiple for s in self.image_size)
        ):
            raise InputError(
                f"image_size = {self.image_size} is not allowed: give {axes} sides that {self.multiple} divides"
            )
        self.stem = self._blocks(in_chans, dims[0], blocks[0], 1)
        self.stages, self.mixers = nn.ModuleList(), nn.ModuleList()
        for number, (dim, mixer, count) in enumerate(zip(dims, mixers, blocks, strict=True)):
            self.stages.append(self._blocks(dims[max(number - 1, 0)], dim, count, 2 if number else 1))
            self.mixers.append(self._mixer(mixer, dim, number, scan))
        self.up, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for number, count in enumerate(decoder_blocks):
            below, dim = dims[-1 - number], dims[-2 - number]
            self.up.append(_CONV[axes](below, dim, 1))
            self.decoder.append(self._blocks(2 * dim if self._has_skip(number) else dim, dim, count, 1))
            self.heads.append(_CONV[axes](dim, num_classes, 1))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # all have one

    def _has_skip(self, number: int) -> bool:
        return self.finest_skip or number < len(self.stages) - 2

    def _blocks(self, in_dim: int, dim: int, count: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(self.axes, in_dim, dim, stride, project=True)
        return nn.Sequential(first, *(ResidualBlock(self.axes, dim, dim) for _ in range(count - 1)))

    def _mixer(self, name: str, dim: int, stage: int, scan: str) -> nn.Module:
        if name not in MIXERS:
            raise unknown("mixer", name, MIXERS, f"there are {', '.join(MIXERS)}")
        if name == "none":
            return nn.Identity()
        if name == "attention":
            return MapAttention(dim)
        places = math.inf if self.image_size is None else math.prod(side // 2**stage for side in self.image_size)
        if places <= dim:
            return MapMamba(int(places), scan, self.axes, channel_tokens=True)
        return MapMamba(dim, scan, self.axes)

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, classes, S1, ...), or with ``deep_supervision`` a list of them, the finest first.

        Raises:
            InputError: sides that the strides do not divide, or other than ``image_size``.
        """
        _check_sides(x, self.axes, self.multiple)
        if self.image_size is not None and x.shape[2:] != self.image_size:
            raise InputError(
                f"the net is for images of {self.image_size} and got {tuple(x.shape[2:])}: build it with image_size = "
                "None, or use vitrail.evaluate.sliding_window"
            )
        x = self.stem(x)
        skips = []
        for stage, mixer in zip(self.stages, self.mixers, strict=True):
            x = mixer(stage(x))
            skips.append(x)
        logits = []
        for number, (up, stage, head) in enumerate(zip(self.up, self.decoder, self.heads, strict=True)):
            x = up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = stage(torch.cat((x, skips[-number - 2]), 1) if self._has_skip(number) else x)
            if self.deep_supervision or number + 1 == len(self.up):
                logits.append(head(x))
        return logits[::-1] if self.deep_supervision else logits[0]


def u_mamba(
    place: str = "bot",
    axes: int = 2,
    in_chans: int = 1,
    num_classes: int = 2,
    stages: int = 6,
    dim: int = 32,
    max_dim: int | None = None,
    blocks: int = 2,
    decoder_blocks: int = 2,
    image_size: Sequence[int] | None = None,
    **options: Any,
) -> ResidualUNet:
    """Return U-Mamba as its authors' code builds it from a plan of nnU-Net.

    Args:
        place: ``bot``, Mamba after the last stage; or ``enc``, after every stage of a volume's encoder and every
            second one of a plane's, the last among them.
        axes: 2 for planes, 3 for volumes.
        in_chans: input channels.
        num_classes: outputs for each pixel.
        stages: of the encoder, 2 or more.
        dim: width of the first stage; it doubles with each, up to ``max_dim``.
        max_dim: by default nnU-Net's 512 for planes and 320 for volumes.
        blocks, decoder_blocks: of a stage in the fine half of the encoder and of the decoder's; the coarse stages of
            the encoder have one, and so have the decoder's last.
        image_size: sides of the images, which ``enc`` needs to be as published; see ``ResidualUNet``.
        **options: ``scan`` and ``deep_supervision`` of ``ResidualUNet``.

    Raises:
        InputError: fewer than two stages, or as ``ResidualUNet``.
        UnknownName: another place.
    """
    if place not in ("bot", "enc"):
        raise unknown("place of Mamba", place, ("bot", "enc"), "there are bot and enc")
    if stages < 2:
        raise InputError(f"stages = {stages} is not allowed: give 2 or more")
    most = (512 if axes == 2 else 320) if max_dim is None else max_dim
    every = 1 if axes == 3 else 2
    with_mamba = {stages - 1} if place == "bot" else set(range(stages - 1, -1, -every))
    return ResidualUNet(
        axes,
        in_chans,
        num_classes,
        [min(dim * 2**number, most) for number in range(stages)],
        ["mamba" if number in with_mamba else "none" for number in range(stages)],
        [blocks if number < math.ceil(stages / 2) else 1 for number in range(stages)],
        [decoder_blocks if number < math.ceil(stages / 2) else 1 for number in range(stages - 1)],
        image_size=image_size if place == "enc" else None,
        finest_skip=axes == 3,  # as in the authors' two files
        **options,
    )


def _check_sides(x: Tensor, axes: int, multiple: int) -> None:
    if x.ndim != axes + 2 or any(side % multiple or side == 0 for side in x.shape[2:]):
        raise InputError(
            f"images {tuple(x.shape)} must be (B, C, {', '.join(f'S{k + 1}' for k in range(axes))}) with sides that "
            f"{multiple} divides: pad them, or use vitrail.evaluate.sliding_window"
        )


# ---- restoration: MambaIR --------------------------------------------------------------------------------------------


class ChannelAttentionBlock(nn.Module):
    """Convolutions through fewer channels, each of which is then weighed by its mean.

    Args:
        dim: C, at least 30.
        light: depthwise and dilated convolutions in the place of whole ones.
    """

    def __init__(self, dim: int, light: bool) -> None:
        super().__init__()
        if light:
            half = dim // 2
            self.convs = nn.Sequential(
                nn.Conv2d(dim, half, 1),
                nn.Conv2d(half, half, 3, padding=1, groups=half),
                nn.GELU(),
                nn.Conv2d(half, dim, 1),
                nn.Conv2d(dim, dim, 3, padding=2, groups=dim, dilation=2),
            )
        else:
            self.convs = nn.Sequential(
                nn.Conv2d(dim, dim // 3, 3, padding=1), nn.GELU(), nn.Conv2d(dim // 3, dim, 3, padding=1)
            )
        squeezed = dim // 30
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.convs(x)
        return x * self.weigh(x)


class RestorationBlock(nn.Module):
    """SS2D, then convolutions with channel attention, each added to what came in times a learnt factor."""

    def __init__(self, dim: int, states: int, expand: float, light: bool, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer = SS2D(dim, states=states, expand=expand)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.skip_scale = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim)
        self.local = ChannelAttentionBlock(dim, light)
        self.skip_scale2 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = x * self.skip_scale + self.drop_path(self.mixer(self.norm(x)))
        return x * self.skip_scale2 + self.local(self.norm2(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _Group(nn.Module):
    """Blocks and a convolution, added to what came in, (B, H, W, C)."""

    def __init__(self, dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.blocks(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


RGB_MEAN = (0.4488, 0.4371, 0.4040)
UPSAMPLERS = ("", "pixelshuffle", "pixelshuffledirect")


class MambaIR(nn.Module):
    """MambaIR: groups of state-space blocks between two convolutions, for denoising and super-resolution.

    Args:
        in_chans: channels of the images, whose values are in [0, 1].
        dim: C, at least 30.
        depths: blocks of each group.
        states: N.
        expand: inner width of SS2D over C.
        upscale: of the sides: a power of 2, or 3.
        upsampler: ``""`` adds what the net finds to its input, for denoising; ``pixelshuffle`` enlarges in steps;
            ``pixelshuffledirect`` at once, with lighter blocks.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1); the
            authors train with 0.1.

    Raises:
        InputError: a width below 30, or a scale that is not allowed.
        UnknownName: another upsampler.
    """

    mean: Tensor

    def __init__(
        self,
        in_chans: int = 1,
        dim: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        states: int = 16,
        expand: float = 1.2,
        upscale: int = 1,
        upsampler: str = "",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if upsampler not in UPSAMPLERS:
            raise unknown("upsampler", upsampler, UPSAMPLERS, "there are '', pixelshuffle and pixelshuffledirect")
        if dim < 30 or upscale < 1 or (upscale != 3 and upscale & (upscale - 1)) or (not upsampler and upscale != 1):
            raise InputError(
                f"dim = {dim} and upscale = {upscale} with upsampler {upsampler!r} are not allowed: give a width from "
                "30, and a power of 2 or 3, which is 1 without upsampler"
            )
        self.upsampler = upsampler
        # The published net keeps it out of its weights.
        mean = torch.tensor(RGB_MEAN) if in_chans == 3 else torch.zeros(1)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.first = nn.Conv2d(in_chans, dim, 3, padding=1)
        self.norm = nn.LayerNorm(dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        light = upsampler == "pixelshuffledirect"
        self.groups = nn.Sequential(
            *(
                _Group(dim, [RestorationBlock(dim, states, expand, light, next(rates)) for _ in range(depth)])
                for depth in depths
            )
        )
        self.last_norm = nn.LayerNorm(dim)
        self.after = nn.Conv2d(dim, dim, 3, padding=1)
        if light:
            self.out = nn.Sequential(nn.Conv2d(dim, upscale**2 * in_chans, 3, padding=1), nn.PixelShuffle(upscale))
        elif upsampler:
            layers: list[nn.Module] = [nn.Conv2d(dim, 64, 3, padding=1), nn.LeakyReLU()]
            for factor in [3] if upscale == 3 else [2] * (upscale.bit_length() - 1):
                layers += [nn.Conv2d(64, factor**2 * 64, 3, padding=1), nn.PixelShuffle(factor)]
            self.out = nn.Sequential(*layers, nn.Conv2d(64, in_chans, 3, padding=1))
        else:
            self.out = nn.Sequential(nn.Conv2d(dim, in_chans, 3, padding=1))
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Return images (B, channels, upscale H, upscale W)."""
        x = x - self.mean
        first = self.first(x)
        inside = self.last_norm(self.groups(self.norm(first.permute(0, 2, 3, 1))))
        y = self.out(self.after(inside.permute(0, 3, 1, 2)) + first)
        return (y if self.upsampler else x + y) + self.mean


# ---- the authors' weights --------------------------------------------------------------------------------------------

_MIXER = ((r"\.ln_1\.", ".norm."), (r"\.self_attention\.", ".mixer."))
_MEDMAMBA = ((r"^patch_embed\.", "stem."), (r"^layers\.", "stages."), (r"\.conv33conv33conv11\.", ".local."), *_MIXER)
_VMUNET = (
    (r"^patch_embed\.", "stem."),
    (r"^layers_up\.(\d+)\.upsample\.", r"expands.\1."),
    (r"^layers_up\.(\d+)\.blocks\.", r"up.\1."),
    (r"^layers\.(\d+)\.blocks\.", r"down.\1."),
    (r"^final_up\.", "final."),
    (r"^final_conv\.", "head."),
    *_MIXER,
)
_MAMBAIR = (
    (r"^conv_first\.", "first."),
    (r"^norm\.", "last_norm."),
    (r"^patch_embed\.norm\.", "norm."),
    (r"^layers\.(\d+)\.residual_group\.", r"groups.\1."),
    (r"^layers\.", "groups."),
    (r"^conv_after_body\.", "after."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.conv_blk\.cab\.(\d+)\.attention\.", r".local.weigh."),
    (r"\.conv_blk\.cab\.", ".local.convs."),
    *_MIXER,
)
_UMAMBA = (
    (r"^encoder\.", ""),
    (r"^decoder\.stages\.", "decoder."),
    (r"^decoder\.upsample_layers\.(\d+)\.conv\.", r"up.\1."),
    (r"^decoder\.seg_layers\.", "heads."),
    (r"\.conv3\.", ".skip."),
    (r"\.conv(\d)\.(conv|norm)\.", r".\2\1."),
    (r"^mamba_layers\.(\d+)\.mamba\.", r"mixers.\1.mixers.0."),
    (r"^mamba_layers\.", "mixers."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights of ``MedMamba``, ``VMUNet``, U-Mamba or ``MambaIR`` under our names.

    Weights of a VMamba classifier begin a ``VMUNet`` as its authors begin it: they fill its encoder and, in the
    opposite order, the blocks of its decoder; what they lack, or have more of, stays as the model has it.
    """
    weights = state_dict
    for name in ("model", "state_dict", "params", "network_weights"):
        weights = weights.get(name, weights)
    ours = model.state_dict()
    if ours.keys() <= weights.keys():
        return weights
    weights = {re.sub(r"^(?:module\.)?(?:vmunet\.)?", "", key): value for key, value in weights.items()}
    if isinstance(model, MambaIR):
        return _mambair(weights, model)
    if isinstance(model, ResidualUNet):
        bottom = rf"mamba_layers.{len(model.stages) - 1}."
        # Theirs is written three times: their decoder holds the encoder, and their blocks list their parts again.
        once = {key: value for key, value in weights.items() if not re.search(r"^decoder\.encoder\.|all_modules", key)}
        return {_rename(re.sub(r"^mamba_layer\.", bottom, key), _UMAMBA): value for key, value in once.items()}
    table, merge = (_MEDMAMBA, "stages.{}.downsample") if isinstance(model, MedMamba) else (_VMUNET, "merges.{}")
    new = {}
    for key, value in weights.items():
        # Their stage ends with the patch merging that ours begins with.
        found = re.fullmatch(r"layers\.(\d+)\.downsample(\..*)", key)
        new[merge.format(int(found[1]) + 1) + found[2] if found else _rename(key, table)] = value
    if isinstance(model, MedMamba) or any(key.startswith("up.") for key in new):
        return new
    last = max(int(key.split(".")[1]) for key in ours if key.startswith("down."))
    for key in [key for key in new if key.startswith("down.")]:
        _, level, rest = key.split(".", 2)
        new[f"up.{last - int(level)}.{rest}"] = new[key]
    return {key: new[key] if key in new and new[key].shape == value.shape else value for key, value in ours.items()}


def _mambair(weights: Mapping[str, Any], model: MambaIR) -> dict[str, Any]:
    light = model.upsampler == "pixelshuffledirect"
    last = len(model.out) - 1
    tails = (
        (r"^conv_before_upsample\.", "out."),
        (r"^upsample\.(\d+)\.", lambda found: f"out.{int(found[1]) + (0 if light else 2)}."),
        (r"^conv_last\.", f"out.{last}."),
    )
    return {_rename(key, (*_MAMBAIR, *tails)): value for key, value in weights.items()}


def _rename(key: str, table: Sequence[tuple[str, Any]]) -> str:
    for pattern, name in table:
        key = re.sub(pattern, name, key)
    return key


# ---- the variants ----------------------------------------------------------------------------------------------------


# The authors' training scales pixels to [-1, 1].
_OWN: dict[str, Any] = {
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "stem.proj",
}
default_cfgs = generate_default_cfgs(
    {
        "medmamba_nano": nano_cfg(**_OWN),
        "medmamba_t": cfg(**_OWN),
        "medmamba_s": cfg(**_OWN),
        "medmamba_s12": cfg(**_OWN),
        "medmamba_b": cfg(**_OWN),
        "medmamba_b16": cfg(**_OWN),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MedMamba:
    net: MedMamba = create(MedMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


_BASE: dict[str, Any] = {"dims": (128, 256, 512, 1024)}


@register_model
def medmamba_nano(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128), "patch_size": 2}
    return _create("medmamba_nano", pretrained, **{**own, **kwargs})


@register_model
def medmamba_t(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """15 M parameters."""
    return _create("medmamba_t", pretrained, **kwargs)


@register_model
def medmamba_s(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """19 M parameters: the small net of the authors' code."""
    return _create("medmamba_s", pretrained, **{"depths": (2, 2, 8, 2), **kwargs})


@register_model
def medmamba_s12(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """24 M parameters: the small net of the paper's tables, which has four blocks more than that of its code."""
    return _create("medmamba_s12", pretrained, **{"depths": (2, 2, 12, 2), **kwargs})


@register_model
def medmamba_b(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """41 M parameters: the base net of the authors' code."""
    return _create("medmamba_b", pretrained, **{**_BASE, "depths": (2, 2, 12, 2), **kwargs})


@register_model
def medmamba_b16(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """48 M parameters: the base net of the paper's tables, which has four blocks more than that of its code."""
    return _create("medmamba_b16", pretrained, **{**_BASE, "depths": (2, 2, 16, 2), **kwargs})
