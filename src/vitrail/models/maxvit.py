"""MaxViT: convolution, attention in blocks and attention over a grid, in every block of the net.

Tu, Talebi, Zhang, Yang, Milanfar, Bovik, Li, "MaxViT: Multi-Axis Vision Transformer" (ECCV 2022), arXiv 2204.01697. A
block cuts the map into windows of neighbouring places and attends inside each; a grid of as many cells takes one place
of each cell, all of the same offset, and attends over the whole image. Both have windows of one size, so that the cost
is linear in pixels. The nets are timm's, for sizes that their windows divide; ``any_size`` lets one take others, and
the nano is one of these. The generator of the paper is in ``generate/maxvit_gan.py``.

Shapes: B images, H x W places, windows or grids of h x w = N places, n heads of width d, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models.maxxvit import MaxxVit, PartitionAttentionCl, model_cfgs
from timm.models.maxxvit import checkpoint_filter_fn as timms_filter
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.pooling import global_pooling
from vitrail.layers.windows import from_windows, to_windows
from vitrail.models.staged import create, nano_cfg

# ---- grids -----------------------------------------------------------------------------------------------------------


def to_grids(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Take a map apart into sets of places that lie on a regular grid over all of it.

    Args:
        x: (B, H, W, C); zeros fill it up at its right and lower edges where a grid does not divide it.
        grid: rows and columns (h, w) of cells. Set (i, j) has place (i, j) of each cell.

    Returns:
        (B ceil(H / h) ceil(W / w), h, w, C), the sets of a map in reading order of their offsets.
    """
    rows, columns = grid
    x = F.pad(x, (0, 0, 0, -x.shape[2] % columns, 0, -x.shape[1] % rows))
    batch, height, width, channels = x.shape
    x = x.reshape(batch, rows, height // rows, columns, width // columns, channels)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, channels)


def from_grids(grids: Tensor, height: int, width: int) -> Tensor:
    """Put the sets of ``to_grids`` together again and cut off what it filled up.

    Args:
        grids: (B ceil(H / h) ceil(W / w), h, w, C).
        height, width: H and W of the map.

    Returns:
        (B, H, W, C).
    """
    rows, columns, channels = grids.shape[1:]
    tall, wide = -(-height // rows), -(-width // columns)
    x = grids.reshape(-1, tall, wide, rows, columns, channels).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, rows * tall, columns * wide, channels)[:, :height, :width]


class Partition(PartitionAttentionCl):
    """timm's attention in blocks or over a grid, with its feed-forward layer, for maps of any size.

    What fills up a map that the windows do not divide is seen by nobody.

    Args:
        given: timm's layer, whose parts, and so whose weights, these are.
    """

    def __init__(self, given: PartitionAttentionCl) -> None:
        nn.Module.__init__(self)
        self.partition_block = given.partition_block
        self.partition_size = given.partition_size
        for name, part in given.named_children():
            self.add_module(name, part)
        self.train(given.training)

    def cut(self, x: Tensor) -> Tensor:
        """Return (B windows, h, w, C) of (B, H, W, C), which zeros fill up."""
        return (to_windows if self.partition_block else to_grids)(x, self.partition_size)

    def join(self, places: Tensor, height: int, width: int) -> Tensor:
        """Return (B, H, W, C) of what ``cut`` gives."""
        return (from_windows if self.partition_block else from_grids)(places, height, width)

    def _partition_attn(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        places, real = self.cut(x), None
        if places.numel() > x.numel():
            whole = torch.ones(1, height, width, 1, dtype=torch.bool, device=x.device)
            real = self.cut(whole).flatten(1)  # (windows, N)
        y = self._attend(places.flatten(1, 2), real, batch)
        return self.join(y.unflatten(1, self.partition_size), height, width)

    def _attend(self, x: Tensor, real: Tensor | None, batch: int) -> Tensor:
        """Attend inside windows (B windows, N, C), to real places alone."""
        attention: Any = self.attn
        heads, kinds = attention.num_heads, 3
        if attention.head_first:
            parts = attention.qkv(x).unflatten(2, (heads, kinds, -1)).permute(3, 0, 2, 1, 4)
        else:
            parts = attention.qkv(x).unflatten(2, (kinds, heads, -1)).permute(2, 0, 3, 1, 4)
        bias = attention.rel_pos.get_bias()  # (1, n, N, N) or (n, N, N)
        bias = bias.reshape(1, *bias.shape[-3:])
        if real is not None:
            # The windows of an image stand beside its heads, so that the bias need not be repeated for each image.
            bias = torch.where(real[:, None, None], bias, float("-inf")).flatten(0, 1)[None]
            parts = parts.reshape(kinds, batch, -1, *parts.shape[3:])  # (3, B, windows n, N, d)
        query, key, value = parts.unbind(0)
        drop = attention.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), drop)
        y = y.reshape(x.shape[0], heads, *y.shape[2:]).transpose(1, 2).flatten(2)
        return attention.proj_drop(attention.proj(y))


def any_size(model: nn.Module) -> nn.Module:
    """Let one of timm's MaxViT take images of any size, and return it; where its windows divide a map it is unchanged.

    Args:
        model: a ``maxvit_*`` of timm, also one of ``features_only=True``.

    Raises:
        InputError: nothing in the model attends in blocks or over a grid as MaxViT does.

    Example:
        >>> model = any_size(timm.create_model("maxvit_tiny_tf_224"))
        >>> model(torch.zeros(1, 3, 250, 333)).shape
        torch.Size([1, 1000])
    """
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, PartitionAttentionCl)]
    if not found:
        raise InputError(f"a {type(model).__name__} has no blocks of MaxViT: give a maxvit_*_tf_* of timm")
    for name, part in found:
        model.set_submodule(name, Partition(part))
    return model


# ---- the net ---------------------------------------------------------------------------------------------------------


class MaxViT(MaxxVit):
    """timm's MaxViT for images of any size, begun as the authors' code begins it.

    Args:
        stem_stride: 2 as published, or 1 for small images.
        stem_width: channels of the stem's two convolutions.
        embed_dim: width C of each stage; each halves the map.
        depths: blocks of each stage.
        dim_head: width of a head; it divides all of ``embed_dim``.
        window_size: side of a block, and of the grid, in places.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        global_pool: as in timm, such as ``"avg"``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: another stride, stages of several numbers, no window, heads that do not divide a width, or no
            pooling with a classifier.
    """

    def __init__(
        self,
        stem_stride: int = 2,
        stem_width: int = 64,
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        dim_head: int = 32,
        window_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        _refuse(stem_stride, stem_width, embed_dim, depths, dim_head, window_size)
        global_pooling(global_pool, num_classes)
        published = model_cfgs["maxvit_tiny_tf"]
        window = (window_size, window_size)
        shape = replace(
            published,
            embed_dim=tuple(embed_dim),
            depths=tuple(depths),
            block_type=("M",) * len(depths),
            stem_width=stem_width,
            head_hidden_size=embed_dim[-1],
            transformer_cfg=replace(published.transformer_cfg, dim_head=dim_head, window_size=window, grid_size=window),
            weight_init="normal",  # of deviation 0.02 with biases of zero, for convolutions as well
        )
        super().__init__(
            shape,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        any_size(self)
        self.stem.conv1.stride = (stem_stride, stem_stride)
        self.stem.stride = stem_stride
        for place, info in enumerate(self.feature_info):
            info["reduction"] = stem_stride * 2**place
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into groups by depth."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Set the number of classes and the pooling; ``""``, without classifier, leaves a map.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        global_pooling(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool, reset_other)


def _refuse(
    stem_stride: int,
    stem_width: int,
    embed_dim: Sequence[int],
    depths: Sequence[int],
    dim_head: int,
    window_size: int,
) -> None:
    if stem_stride not in (1, 2):
        raise InputError(f"maxvit: stem_stride = {stem_stride} is not allowed: give 1 or 2")
    if len(embed_dim) != len(depths) or min(depths) < 1:
        raise InputError(
            f"maxvit: embed_dim = {tuple(embed_dim)} and depths = {tuple(depths)} are not allowed: give one width, and "
            "1 block or more, for every stage"
        )
    if stem_width < 1:
        raise InputError(f"maxvit: stem_width = {stem_width} is not allowed: give 1 channel or more")
    if window_size < 1:
        raise InputError(f"maxvit: window_size = {window_size} is not allowed: give 1 place or more")
    for width in embed_dim:
        if dim_head < 1 or width % dim_head:
            raise InputError(
                f"maxvit: dim_head = {dim_head} does not divide a width of {width}: give a divisor of all of embed_dim"
            )


# ---- the authors' weights --------------------------------------------------------------------------------------------

_BLOCK = r"^block_(\d+)_(\d+)/"
_NAMES = (
    (r"^stem/conv_0/", "stem.conv1."),
    (r"^stem/norm_0/", "stem.norm1."),
    (r"^stem/conv_1/", "stem.conv2."),
    (rf"{_BLOCK}mbconv/shortcut_conv/", r"\1.\2.conv.shortcut.expand."),
    (rf"{_BLOCK}mbconv/pre_norm/", r"\1.\2.conv.pre_norm."),
    (rf"{_BLOCK}mbconv/expand_conv/", r"\1.\2.conv.conv1_1x1."),
    (rf"{_BLOCK}mbconv/expand_norm/", r"\1.\2.conv.norm1."),
    (rf"{_BLOCK}mbconv/depthwise_conv/", r"\1.\2.conv.conv2_kxk."),
    (rf"{_BLOCK}mbconv/depthwise_norm/", r"\1.\2.conv.norm2."),
    (rf"{_BLOCK}mbconv/se/reduce_conv2d/", r"\1.\2.conv.se.fc1."),
    (rf"{_BLOCK}mbconv/se/expand_conv2d/", r"\1.\2.conv.se.fc2."),
    (rf"{_BLOCK}mbconv/shrink_conv/", r"\1.\2.conv.conv3_1x1."),
    (rf"{_BLOCK}attn_layer_norm(_1)?/", r"\1.\2.attn\3.norm1."),
    (rf"{_BLOCK}attention(_1)?/([qkvo])/", r"\1.\2.attn\3.attn.\4."),
    (rf"{_BLOCK}attention(_1)?/relative_bias", r"\1.\2.attn\3.attn.rel_pos.relative_position_bias_table"),
    (rf"{_BLOCK}ffn_layer_norm(_1)?/", r"\1.\2.attn\3.norm2."),
    (rf"{_BLOCK}ffn(_1)?/expand_dense/", r"\1.\2.attn\3.mlp.fc1."),
    (rf"{_BLOCK}ffn(_1)?/shrink_dense/", r"\1.\2.attn\3.mlp.fc2."),
    (r"^(\d+)\.(\d+)\.attn_1\.", r"\1.\2.attn_grid."),
    (r"^(\d+)\.(\d+)\.attn\.", r"\1.\2.attn_block."),
    (r"^(\d+)\.(\d+)\.", lambda found: f"stages.{int(found[1])}.blocks.{int(found[2])}."),
    (r"\.attn\.o\.", ".attn.proj."),
    (r"^final_layer_norm/", "head.norm."),
    (r"^cls_head/inner_dense/", "head.pre_logits.fc."),
    (r"^cls_head/logit_dense/", "head.fc."),
    (r"\.(kernel|depthwise_kernel|gamma)$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.moving_mean$", ".running_mean"),
    (r"\.moving_variance$", ".running_var"),
)
"""The names of variables in the authors' code, and timm's."""
_AVERAGE = "/ExponentialMovingAverage"


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, or timm's, under timm's names; a table of relative positions is resized to a window.

    The authors' checkpoints are of TensorFlow: read their variables with ``tf.train.load_checkpoint`` and store them
    under their own names, as tensors. Moving averages go before the variables that they are of, as in the authors'
    evaluation.

    Args:
        state: variables by name, with or without ``:0`` behind it.
        model: the MaxViT that they are for, of timm or of ours.
    """
    if "stem.conv1.weight" in state:
        return timms_filter(dict(state), model)
    wanted, found = model.state_dict(), {}
    for name in sorted(state, key=lambda name: _AVERAGE in name):
        key = name.removesuffix(":0").replace(_AVERAGE, "").removeprefix("maxvit/")
        for pattern, ours in _NAMES:
            key = re.sub(pattern, ours, key)
        found[key] = _as_torch(key, name, torch.as_tensor(state[name]))
    for key in [key for key in found if key.endswith((".attn.q.weight", ".attn.q.bias"))]:
        parts = [found.pop(key.replace(".attn.q.", f".attn.{kind}.")) for kind in "qkv"]
        found[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return timms_filter({key: value for key, value in found.items() if key in wanted}, model)


def _as_torch(key: str, name: str, value: Tensor) -> Tensor:
    """Return a variable of TensorFlow in the shape of torch: outputs first."""
    if "depthwise_kernel" in name:
        return value.permute(2, 3, 0, 1)
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)
    if re.search(r"\.attn\.[qkv]\.", key):
        return value.flatten(-2).T if value.ndim == 3 else value.flatten()
    if key.endswith(".attn.proj.weight"):
        return value.flatten(0, 1).T
    return value.T if value.ndim == 2 else value


# ---- the nano --------------------------------------------------------------------------------------------------------

default_cfgs = generate_default_cfgs(
    {"maxvit_nano": nano_cfg(pool_size=(4, 4), first_conv="stem.conv1", classifier="head.fc")}
)


@register_model
def maxvit_nano(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """0.3 M parameters, for images of 28 to 64 pixels; three stages, blocks and grids of 4 by 4 places."""
    shape: dict[str, Any] = {
        "stem_stride": 1,
        "stem_width": 16,
        "embed_dim": (16, 32, 64),
        "depths": (1, 1, 2),
        "dim_head": 16,
        "window_size": 4,
    }
    options = {**shape, **kwargs}
    maps = len(options["depths"]) + 1  # that of the stem is the first
    net: MaxViT = create(MaxViT, "maxvit_nano", pretrained, checkpoint_filter_fn, stages=maps, **options)
    return net
