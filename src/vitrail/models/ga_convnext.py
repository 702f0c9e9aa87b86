"""GA-ConvNeXt: ConvNeXt whose stages are brought together at one stride, and Gramian attention heads on top.

Ryu, Han and Lim, "Gramian Attention Heads are Strong yet Efficient Vision Learners" (ICCV 2023), arXiv 2310.16483, and
the authors' code (Lab-LVM/imagenet-models). The stages are timm's; the heads are those of ``edits.gramian_heads``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn

from vitrail.edits.gramian_heads import GramianHeads
from vitrail.errors import InputError
from vitrail.models.staged import StagedNet, cfg, check_stages, create, nano_cfg


class Aggregate(nn.Module):
    """A bottleneck with squeeze and excitation that makes one map of what comes from all stages.

    Args:
        dim_in: channels of all maps together.
        dim: of the result; inside it has a quarter.
        drop_path: stochastic depth, in [0, 1).
    """

    def __init__(self, dim_in: int, dim: int, drop_path: float) -> None:
        super().__init__()
        width = dim // 4
        self.downsample = nn.Sequential(nn.Conv2d(dim_in, dim, 1), nn.BatchNorm2d(dim))
        self.conv1 = nn.Conv2d(dim_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = SqueezeExcite(width, rd_ratio=0.25)
        self.conv3 = nn.Conv2d(width, dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, dim, H, W)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.se(F.relu(self.bn2(self.conv2(y))))
        return F.relu(self.downsample(x) + self.drop_path(self.bn3(self.conv3(y))))


class GAConvNeXt(StagedNet):
    """GA-ConvNeXt with timm's surface, for images of any size; features of its stages at strides 4, 8, 16, 32.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dims: width of each of the four stages; the last is that of the aggregated map too.
        depths: blocks of each.
        between: maps taken from inside the third stage, besides its last.
        heads: Gramian heads.
        gram_dim: channels whose Gramian a head takes.
        width: channels of the attention in a head, a multiple of 8.
        stem_stride: 2 or 4 pixels per place of the first stage.
        global_pool: of the aggregated map where there is no classifier: one of ``layers.pooling.POOLS``.
        drop_rate: dropout before the heads, in [0, 1).
        drop_path_rate: stochastic depth of the heads' blocks, rising linearly from 0 at the first block, in [0, 1).

    Raises:
        InputError: stages of another number, or ``between``, heads, a stride or a pooling that are not allowed.
    """

    BEHIND = r"^aggregate\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (96, 192, 384, 688),
        depths: Sequence[int] = (3, 3, 9, 3),
        between: int = 2,
        heads: int = 5,
        gram_dim: int = 192,
        width: int = 168,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages(stem_stride, dims=dims, depths=depths)
        if not 0 <= between < depths[2]:
            raise InputError(f"between = {between} is not allowed: give 0 to {depths[2] - 1}, inside the third stage")
        self.num_classes, self.between = num_classes, between
        self.num_features = self.head_hidden_size = dims[3]
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], stem_stride, stem_stride), LayerNorm2d(dims[0]))
        rates = torch.linspace(0, drop_path_rate, sum(depths) + 1, device="cpu").split([*depths, 1])
        parts: dict[str, Any] = {
            "ls_init_value": 1e-6,
            "norm_layer": LayerNorm2d,
            "norm_layer_cl": partial(nn.LayerNorm, eps=1e-6),
        }
        stages = []
        self.feature_info = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            before = dims[max(i - 1, 0)]
            stage = ConvNeXtStage(
                before, dim, stride=2 if i else 1, depth=depth, drop_path_rates=rates[i].tolist(), **parts
            )
            stages.append(stage)
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.aggregate = Aggregate(sum(dims) + between * dims[2], dims[3], drop_path_rate)
        self.drop = nn.Dropout(drop_rate)
        self._heads: dict[str, Any] = {"heads": heads, "gram_dim": gram_dim, "width": width}
        self._drop_path = drop_path_rate
        self.reset_classifier(num_classes, global_pool)
        for module in [*self.stages.modules(), *self.stem, *self.aggregate.modules()]:
            if isinstance(module, nn.Linear | nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def put_head(self) -> None:
        """Set the heads for ``num_classes``."""
        self.head = nn.Identity()
        if not self.num_classes:
            return

        def layer() -> nn.Module:
            return ConvNeXtBlock(self._heads["gram_dim"], drop_path=self._drop_path, ls_init_value=1e-6)

        place = next(self.stages.parameters())
        heads = GramianHeads(self.num_features, self.num_classes, layer=layer, **self._heads)
        self.head = heads.to(place.device, place.dtype).train(self.training)  # they norm by the batch

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the aggregated map (B, C, H/16, W/16)."""
        x = self.stem(x)
        maps: list[Tensor] = []
        inside: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            if number != 2:
                x = stage(x)
            else:
                blocks: Any = stage.blocks
                step = len(blocks) // (self.between + 1)
                x = stage.downsample(x)  # type: ignore[operator]
                for count, block in enumerate(blocks, 1):
                    x = checkpoint(block, x) if stage.grad_checkpointing and self.training else block(x)
                    if count % step == 0 and len(inside) < self.between:
                        inside.append(x)
            maps.append(x)
        size = (maps[2].shape[2], maps[2].shape[3])
        finer = [F.adaptive_avg_pool2d(each, size) for each in maps[:2]]
        coarser = F.interpolate(maps[3], size, mode="bilinear")
        aggregated: Tensor = self.aggregate(torch.cat((*finer, *inside, maps[2], coarser), 1))
        return aggregated

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or with ``pre_logits`` the pooled map (B, C), from which no head begins."""
        return self.global_pool(x) if pre_logits or not self.num_classes else self.head(self.drop(x))


# ---- the authors' weights --------------------------------------------------------------------------------------------

_AUTHORS = (
    (r"^module\.", ""),
    (r"^stages\.4\.", "aggregate."),
    (r"^gram_(contraction|embedding)\.(\d+)\.", r"head.heads.\2.\1."),
    (r"^gram_layer\.(\d+)\.blocks\.0\.", r"head.heads.\1.layer."),
    (r"^(?:ga)\.(\d+)\.", r"head.heads.\1."),
    (r"^fc\.(\d+)\.", r"head.heads.\1.fc."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, those averaged over steps if there are any, under our names."""
    state = next((state_dict[key] for key in ("state_dict_ema", "state_dict") if key in state_dict), state_dict)
    ours = {}
    for key, value in state.items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        ours[key] = value.flatten(2) if re.search(r"^head\.heads\.\d+\.mlp\.fc\d\.weight", key) else value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {
        "ga_convnext_nano": nano_cfg(),
        "ga_convnext_tiny_688": cfg(crop_pct=0.875),
        "ga_convnext_tiny_768": cfg(crop_pct=0.875),
        "ga_convnext_small_688": cfg(crop_pct=0.875),
        "ga_convnext_small_768": cfg(crop_pct=0.875),
        "ga_convnext_base_976": cfg(crop_pct=0.875),
        "ga_convnext_base_1024": cfg(crop_pct=0.875),
    }
)
_S: dict[str, Any] = {"depths": (3, 3, 27, 3), "between": 4}
_768: dict[str, Any] = {"dims": (96, 192, 384, 768), "width": 192}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> GAConvNeXt:
    net: GAConvNeXt = create(GAConvNeXt, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def ga_convnext_nano(pretrained: bool = False, **kwargs: Any) -> GAConvNeXt:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "between": 1, "heads": 3, "gram_dim": 16, "width": 16}
    return _create("ga_convnext_nano", pretrained, **{**own, "stem_stride": 2, **kwargs})


@register_model
def ga_convnext_tiny_688(pretrained: bool = False, **kwargs: Any) -> GAConvNeXt:
    """48 M parameters; trained with stochastic depth 0.2."""
    return _create("ga_convnext_tiny_688", pretrained, **kwargs)


@register_model
def ga_convnext_tiny_768(pretrained: bool = False, **kwargs: Any) -> GAConvNeXt:
    """54 M parameters."""
    return _create("ga_convnext_tiny_768", pretrained, **{**_768, **kwargs})


@register_model
def ga_convnext_small_688(pretrained: bool = False, **kwargs: Any) -> GAConvNeXt:
    """70 M parameters; trained with stochastic depth 0.4."""
    return _create("ga_convnext_small_688", pretrained, **{**_S, **kwargs})


@register_model
def ga_convnext_small_768(pretrained: bool = False, **kwargs: Any) -> GAConvNeXt:
    """77 M parameters."""
    return _create("ga_convnext_small_768", pretrained, **{**_S, **_768, **kwargs})


@register_model
def ga_convnext_base_976(pretrained: bool = False, **kwargs: Any) -> GAConvNeXt:
    """124 M parameters; trained with stochastic depth 0.5."""
    own = {**_S, "dims": (128, 256, 512, 976), "width": 240}
    return _create("ga_convnext_base_976", pretrained, **{**own, **kwargs})


@register_model
def ga_convnext_base_1024(pretrained: bool = False, **kwargs: Any) -> GAConvNeXt:
    """129 M parameters."""
    own = {**_S, "dims": (128, 256, 512, 1024), "width": 256}
    return _create("ga_convnext_base_1024", pretrained, **{**own, **kwargs})
