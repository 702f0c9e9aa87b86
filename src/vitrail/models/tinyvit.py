"""TinyViT: convolutions, then attention in windows with a depthwise convolution between; small nets by contraction.

Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers" (ECCV 2022), arXiv 2207.10666, and the
authors' code (microsoft/Cream, folder TinyViT). The nets are timm's; the nano is built from its class. How the family
came about, by the contraction of a large net under limits, is in ``vitrail.search.contraction``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.tiny_vit import Attention as TimmsAttention
from timm.models.tiny_vit import TinyVit
from timm.models.tiny_vit import checkpoint_filter_fn as timms_filter
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.pooling import global_pooling
from vitrail.models.staged import create, nano_cfg

STRIDES = (2, 4)


class Attention(TimmsAttention):
    """timm's attention in a window, which keeps no biases from one forward pass to the next.

    What timm keeps in evaluation is out of date after ``load_state_dict``, and holds a graph that a second backward
    pass misses.
    """

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """Return what is added to the attention of any two places of a window, (heads, N, N)."""
        pairs: Any = self.attention_bias_idxs
        return self.attention_biases[:, pairs]


class TinyViT(TinyVit):
    """timm's TinyViT, with a finer stem where it is asked for; takes images of any size.

    Where windows do not divide a map, it is filled with zeros at its right and lower edges, which are attended to, as
    in the authors' code.

    Args:
        stem_stride: 2, or 4 as published.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        global_pool: as in timm, such as ``"avg"``; ``""`` only without classifier.
        embed_dims: width of each stage; the first is of convolutions.
        depths: blocks of each stage.
        num_heads: of each stage, which divide its width; that of the first is not used.
        window_sizes: side of the windows of each stage, in places; that of the first is not used.
        mlp_ratio: hidden width of a feed-forward layer over the stage's.
        mbconv_expand_ratio: hidden width of a convolutional block over the stage's.
        **kwargs: as for ``timm.models.tiny_vit.TinyVit``.

    Raises:
        InputError: a stride that is not allowed, settings of stages of several numbers, heads that do not divide a
            width, an empty stage or window, a ratio that leaves no channel, or no pooling with a classifier.
    """

    def __init__(
        self,
        stem_stride: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 576),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 18),
        window_sizes: Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 4.0,
        mbconv_expand_ratio: float = 4.0,
        **kwargs: Any,
    ) -> None:
        _refuse(stem_stride, embed_dims, depths, num_heads, window_sizes)
        for name, ratio in (("mlp_ratio", mlp_ratio), ("mbconv_expand_ratio", mbconv_expand_ratio)):
            if int(min(embed_dims) * ratio) < 1:
                raise InputError(
                    f"tinyvit: {name} = {ratio} leaves no hidden channels for embed_dims = {tuple(embed_dims)}: give "
                    "more"
                )
        global_pooling(global_pool, num_classes)
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dims=tuple(embed_dims),
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_sizes=tuple(window_sizes),
            mlp_ratio=mlp_ratio,
            mbconv_expand_ratio=mbconv_expand_ratio,
            **kwargs,
        )
        self.patch_embed.conv2.conv.stride = (stem_stride // 2, stem_stride // 2)
        for number, info in enumerate(self.feature_info):
            info["reduction"] = stem_stride * 2**number
        module: Any
        for module in self.modules():
            if isinstance(getattr(module, "attn", None), TimmsAttention):
                window = module.attn.resolution
                module.attn = Attention(module.dim, module.attn.key_dim, module.num_heads, 1, window)
        self.init_weights(needs_reset=False)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Set the number of classes and the pooling; ``""``, without classifier, gives ``forward_features``.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        global_pooling(self.head.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool, reset_other)


def _refuse(
    stem_stride: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_sizes: Sequence[int],
) -> None:
    if stem_stride not in STRIDES:
        raise InputError(f"tinyvit: stem_stride = {stem_stride} is not allowed: give 2 or 4")
    if not len(embed_dims) == len(depths) == len(num_heads) == len(window_sizes) >= 1:
        raise InputError(
            f"tinyvit: embed_dims = {tuple(embed_dims)}, depths = {tuple(depths)}, num_heads = {tuple(num_heads)} and "
            f"window_sizes = {tuple(window_sizes)} are of several lengths: give one of each for every stage"
        )
    if min(depths) < 1 or min(window_sizes) < 1:
        raise InputError(
            f"tinyvit: depths = {tuple(depths)} with window_sizes = {tuple(window_sizes)} is not allowed: give one "
            "block and windows of one place or more"
        )
    for dim, heads in list(zip(embed_dims, num_heads))[1:]:
        if heads < 1 or dim % heads:
            raise InputError(f"tinyvit: num_heads = {heads} does not divide a width of {dim}: give a divisor of it")


_NAMES = (
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    # The authors' stages end with the step to the next one, timm's begin with it.
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"stages.{int(found[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"\.c\.weight$", ".conv.weight"),
    (r"^norm_head\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""The authors' names, and timm's."""


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the authors' weights, or timm's, under timm's names and for the model's windows.

    Args:
        state: a checkpoint, with or without ``model`` around it; biases of windows of another size are interpolated.
        model: the TinyViT that they are for, of timm or of ours.
    """
    found = {}
    for key, value in state.get("model", state).items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        found[key] = value
    weights: dict[str, Any] = timms_filter(found, model)
    return weights


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {"tinyvit_nano": nano_cfg(pool_size=(4, 4), first_conv="patch_embed.conv1.conv", classifier="head.fc")}
)


@register_model
def tinyvit_nano(pretrained: bool = False, **kwargs: Any) -> TinyViT:
    """0.4 M parameters, for images of 28 to 64 pixels; three stages, windows of 4 places; ours, not the paper's."""
    shape: dict[str, Any] = {
        "stem_stride": 2,
        "embed_dims": (24, 48, 96),
        "depths": (1, 2, 2),
        "num_heads": (1, 2, 4),
        "window_sizes": (4, 4, 4),
        "drop_path_rate": 0.0,
    }
    shape |= kwargs
    net: TinyViT = create(
        TinyViT, "tinyvit_nano", pretrained, checkpoint_filter_fn, stages=len(shape["depths"]), **shape
    )
    return net
