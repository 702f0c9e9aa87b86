"""XCiT: attention between channels instead of tokens, at a cost that is linear in the tokens.

El-Nouby et al., "XCiT: Cross-Covariance Image Transformers" (NeurIPS 2021), arXiv 2106.09681, and the authors' code
(facebookresearch/xcit). The nets are timm's; the nano is built from its class, for small images and images of any size.
Without labels they are trained by ``vitrail.methods.selfsup.dino``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.xcit import Xcit, conv3x3
from timm.models.xcit import checkpoint_filter_fn as timms_filter
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.pooling import checked_pool
from vitrail.models.staged import nano_cfg

PATCHES = (4, 8, 16)
POOLS = ("token", "avg", "")
FORMATS = ("NCHW", "NLC")


class XCiT(Xcit):
    """timm's XCiT for images of any size, and for patches of four pixels too.

    A side that patches do not divide has one more, as the convolutions that make them fill up with zeros. Positions are
    sines of the place as a share of the side, so that there are as many as are needed.

    Args:
        img_size: side in pixels, or height and width; any will do.
        patch_size: 4, or 8 or 16 as published.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        global_pool: ``"token"``, ``"avg"``, or ``""`` without classifier.
        embed_dim: width.
        depth: blocks of cross-covariance attention.
        num_heads: groups of channels that attend to each other; they divide the width.
        mlp_ratio: hidden width of the feed-forward layers over the width.
        cls_attn_layers: blocks behind them, in which the class token attends to the patches.
        **kwargs: as for ``timm.models.xcit.Xcit``.

    Raises:
        InputError: patches, a pooling or a number that are not allowed, or heads that do not divide the width.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        cls_attn_layers: int = 2,
        **kwargs: Any,
    ) -> None:
        if patch_size not in PATCHES:
            raise InputError(f"xcit: patch_size = {patch_size} is not allowed: give 4, 8 or 16")
        # The first convolution that makes patches has half the width, or a quarter or an eighth of it.
        least = {
            "embed_dim": (embed_dim, patch_size // 2),
            "depth": (depth, 1),
            "cls_attn_layers": (cls_attn_layers, 1),
        }
        for name, (value, allowed) in least.items():
            if value < allowed:
                raise InputError(f"xcit: {name} = {value} is not allowed: give {allowed} or more")
        if int(embed_dim * mlp_ratio) < 1:
            raise InputError(f"xcit: mlp_ratio = {mlp_ratio} is not allowed: give what leaves a hidden width")
        if num_heads < 1 or embed_dim % num_heads:
            raise InputError(f"xcit: num_heads = {num_heads} does not divide embed_dim = {embed_dim}: give a divisor")
        checked_pool(global_pool, num_classes, POOLS)
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(size) < 1:
            raise InputError(f"xcit: img_size = {img_size} is not allowed: give 1 or more")
        super().__init__(
            img_size=tuple(-(-side // 16) * 16 for side in size),  # type: ignore[arg-type]
            patch_size=max(patch_size, 8),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            cls_attn_layers=cls_attn_layers,
            **kwargs,
        )
        if patch_size == 4:
            act = kwargs.get("act_layer") or nn.GELU
            half = embed_dim // 2
            self.patch_embed.proj = nn.Sequential(conv3x3(in_chans, half, 2), act(), conv3x3(half, embed_dim, 2))
            self.patch_embed.patch_size = 4
            for info in self.feature_info:
                info["reduction"] = 4

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: outputs; 0 leaves the pooled features.
            global_pool: as in the constructor; None leaves it.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        checked_pool(self.global_pool if global_pool is None else global_pool, num_classes, POOLS)
        super().reset_classifier(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return what blocks give for the patches, and the final features, as timm's ``Xcit`` does.

        Raises:
            InputError: another format than ``"NCHW"`` and ``"NLC"``.
        """
        if output_fmt not in FORMATS:
            raise InputError(f"xcit: output_fmt = {output_fmt!r} is not allowed: give one of {', '.join(FORMATS)}")
        return super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the authors' weights under timm's names.

    Args:
        state: a checkpoint, with or without ``model`` around it; or all of a training by DINO, of which the teacher's
            backbone is taken.
        model: the XCiT that they are for, of timm or of ours.
    """
    state = state.get("model", state.get("teacher", state))
    names = {key: re.sub(r"^(module\.)?(backbone\.)?", "", key) for key in state}
    apart = any("backbone." in key for key in state)
    found = {name: state[key] for key, name in names.items() if not apart or "backbone." in key}
    weights: dict[str, Any] = timms_filter(found, model)
    return weights


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs({"xcit_nano": nano_cfg(pool_size=None, first_conv="patch_embed.proj.0.0")})


@register_model
def xcit_nano(pretrained: bool = False, **kwargs: Any) -> XCiT:
    """0.2 M parameters, for images of 28 to 64 pixels; ours, not the paper's: patches of 4 pixels, three blocks."""
    options: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 3.0,
        "cls_attn_layers": 1,
        "tokens_norm": True,
    }
    options |= kwargs
    model: XCiT = build_model_with_cfg(
        XCiT,
        "xcit_nano",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(options["depth"])), "feature_cls": "getter"},
        **options,
    )
    return model
