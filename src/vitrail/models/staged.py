"""Nets of stages: timm's surface, which is the same for all, and what timm keeps of their variants."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, SelectAdaptivePool2d, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.pooling import global_pooling


class StagedNet(nn.Module):
    """A net whose features after each stage are (B, C, H, W), or (B, C, T, H, W) of clips, with timm's surface.

    A constructor sets ``num_features``, ``head_hidden_size``, ``feature_info``, ``drop``, ``stages``, each with its
    ``blocks``, and what comes before and behind them; then it calls ``reset_classifier``.
    """

    BEFORE: ClassVar[str] = r"^stem"
    """Names of what comes before the stages."""
    BEHIND: ClassVar[str] = r"^norm\."
    """Names of what comes behind them, but for the classifier."""

    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    stages: nn.Sequential
    drop: nn.Module
    head: nn.Module
    global_pool: SelectAdaptivePool2d

    def no_weight_decay(self) -> set[str]:
        """Return patterns of matrices that are not decayed: none; vectors never are."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into groups by depth."""
        apart = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.norm", (99998,))]
        rest = (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.", None if coarse else (0,))
        names = [name for name, _ in self.named_parameters()]
        patterns = [*([] if coarse else apart), rest, (self.BEHIND, (99999,))]
        blocks = [entry for entry in patterns if any(re.match(entry[0], name) for name in names)]
        return {"stem": self.BEFORE, "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping what is inside them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """Return the classifier of the pooled features."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, on the device and in the type of the present weights.

        Args:
            num_classes: outputs; 0 leaves the pooled features.
            global_pool: as in the constructor; None leaves it. ``""``, without classifier, gives ``forward_features``.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pooling(global_pool, num_classes)
        self.put_head()

    def put_head(self) -> None:
        """Set ``head`` for ``num_classes``."""
        self.head = self.linear_head(self.head_hidden_size) if self.num_classes else nn.Identity()

    def linear_head(self, width: int, std: float = 0.02) -> nn.Linear:
        """Return a new linear classifier of vectors of that width."""
        place = next(self.stages.parameters())
        head = nn.Linear(width, self.num_classes, device=place.device, dtype=place.dtype)
        trunc_normal_(head.weight, std=std)
        nn.init.zeros_(head.bias)
        return head

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map behind the last stage, (B, C, H, W), or (B, C, T, H, W) of clips."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or with ``pre_logits`` the pooled features (B, C)."""
        if x.ndim == 5 and self.global_pool.pool_type:
            x = x.flatten(2, 3)  # a clip is pooled as one high plane
        pooled = self.global_pool(x)
        return pooled if pre_logits else self.head(self.drop(pooled))

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, classes)."""
        return self.forward_head(self.forward_features(x))


def through_blocks(stage: Any, x: Tensor, *more: Any) -> Tensor:
    """Return ``x`` after all ``blocks`` of a stage, computed again in the backward pass if ``grad_checkpointing``."""
    for block in stage.blocks:
        x = checkpoint(block, x, *more) if stage.grad_checkpointing and stage.training else block(x, *more)
    return x


class Block(nn.Module):
    """Attention, then a feed-forward layer, each behind a norm and added to what came in.

    Args:
        dim: C.
        attn: takes and returns (B, ..., C).
        mlp_ratio: hidden width of the feed-forward layer over C.
        drop_path: stochastic depth of both, in [0, 1).
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, *, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ..., C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def check_stages(stem_stride: int, strides: Sequence[int] = (2, 4), **options: Sequence[Any]) -> None:
    """Refuse what makes no net of four stages.

    Args:
        stem_stride: pixels per place of the first stage.
        strides: those that there are.
        **options: by name, those that have an entry for each stage.

    Raises:
        InputError: a stride that there is not, or entries of another number.
    """
    for name, values in options.items():
        if len(values) != 4:
            raise InputError(f"{name} = {tuple(values)} has {len(values)} entries: give one for each of four stages")
    if stem_stride not in strides:
        *some, last = strides
        raise InputError(f"stem_stride = {stem_stride} is not allowed: give {', '.join(map(str, some))} or {last}")


# ---- what timm keeps of a variant ------------------------------------------------------------------------------------


def cfg(side: int = 224, **own: Any) -> dict[str, Any]:
    """Return the configuration of a published variant: ImageNet, ``side`` pixels, a last stride of 32."""
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (side // 32, side // 32),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head",
        **own,
    }


def nano_cfg(**own: Any) -> dict[str, Any]:
    """Return the configuration of a variant of ours for small images: ten classes, 32 pixels, a last stride of 16."""
    small = {"num_classes": 10, "pool_size": (2, 2), "interpolation": "bilinear"}
    return cfg(32, **{**small, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **own})


def create(
    kind: type[nn.Module],
    variant: str,
    pretrained: bool,
    weights: Callable[..., Any],
    *,
    stages: int = 4,
    **options: Any,
) -> Any:
    """Build a variant, by timm.

    Args:
        kind: the net.
        variant: its registered name.
        pretrained: whether to load weights, as timm's entry points take it.
        weights: the net's ``checkpoint_filter_fn``.
        stages: how many it has.
        **options: of the net.
    """
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=weights,
        feature_cfg={"out_indices": tuple(range(stages)), "flatten_sequential": True},
        **options,
    )
