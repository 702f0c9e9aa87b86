"""Parts of nets after PVT v2, as Wave-ViT and GroupMamba: a stem, stages between norms, convolution in the MLP."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitrail.models.staged import through_blocks

AUTHORS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^module\.", ""),
    (r"^patch_embed(\d)\.conv\.", r"stages.\1.downsample."),
    (r"^patch_embed1\.proj\.", "stages.1.downsample.9."),
    (r"^patch_embed(\d)\.proj\.", r"stages.\1.downsample."),
    (r"^patch_embed(\d)\.norm\.", r"stages.\1.embed_norm."),
    (r"^block(\d)\.", r"stages.\1.blocks."),
    (r"^norm4\.", "norm."),
    (r"^norm(\d)\.", r"stages.\1.norm."),
    (r"^stages\.(\d)", lambda found: f"stages.{int(found[1]) - 1}"),
    (r"^post_network\.0\.", "post."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)
"""Patterns of the names that their authors give to these parts, and ours, to be replaced in this order."""


class ConvMlp(nn.Module):
    """A feed-forward layer with a depthwise convolution inside."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        inside = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(inside))


class Stage(nn.Module):
    """A stem or a downsampling, blocks, and a norm, which the last stage leaves to the head."""

    def __init__(self, downsample: nn.Module, dim: int, blocks: Sequence[nn.Module], *, norm: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.embed_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.embed_norm(self.downsample(x).permute(0, 2, 3, 1))
        return self.norm(through_blocks(self, x)).permute(0, 3, 1, 2)


def conv_stem(in_chans: int, inside: int, dim: int, stride: int) -> nn.Sequential:
    """Return four convolutions; the first halves the size, and the last where ``stride`` is 4."""
    layers: list[nn.Module] = []
    for before, width, step in ((in_chans, 7, 2), (inside, 3, 1), (inside, 3, 1)):
        conv = nn.Conv2d(before, inside, width, step, width // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(inside), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(inside, dim, 3, stride // 2, 1))


def init_weights(module: nn.Module) -> None:
    """Begin a linear layer or a convolution as these nets do; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
