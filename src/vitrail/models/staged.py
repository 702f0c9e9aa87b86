"""Nets of stages: timm's surface, which is the same for all, and what timm keeps of their variants."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint
from torch import Tensor, nn

from vitrail.layers.pooling import global_pooling


class StagedNet(nn.Module):
    """A net whose features after each stage are (B, C, H, W), with timm's surface.

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
        """Return the map behind the last stage, (B, C, H, W)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or with ``pre_logits`` the pooled features (B, C)."""
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
