"""The smallest model that keeps every promise, registered as ``contract_twin``: the broken ones are made of it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

NAME = "contract_twin"


class Block(nn.Sequential):
    def __init__(self, wide: int, wider: int, stride: int, norm_layer: type[nn.Module]) -> None:
        super().__init__(nn.Conv2d(wide, wider, 3, stride, 1, bias=False), norm_layer(wider), nn.ReLU())


class Twin(nn.Module):
    def __init__(
        self,
        num_classes: int = 5,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        channels: tuple[int, int] = (8, 16),
        norm_layer: Any = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.num_features = self.head_hidden_size = channels[-1]
        self.grad_checkpointing = False
        self.stem = Block(in_chans, channels[0], 2, norm_layer)
        self.stages: Any = nn.Sequential(
            Block(channels[0], channels[0], 1, norm_layer), Block(channels[0], channels[1], 2, norm_layer)
        )
        self.feature_info = [
            {"num_chs": wide, "reduction": 2 * 2**number, "module": f"stages.{number}"}
            for number, wide in enumerate(channels)
        ]
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(self.stages, x)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        place = next(self.parameters())
        self.num_classes = num_classes
        self.global_pool, self.head = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            device=place.device,
            dtype=place.dtype,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        return set()


default_cfgs = generate_default_cfgs({NAME: {"input_size": (3, 32, 32), "classifier": "head", "first_conv": "stem.0"}})


def build(kind: type[Twin], pretrained: bool = False, **options: Any) -> nn.Module:
    """Create a model of the class or of one derived from it."""
    features = {"flatten_sequential": True, "out_indices": (0, 1)}
    return build_model_with_cfg(kind, NAME, pretrained, feature_cfg=features, **options)


@register_model
def contract_twin(pretrained: bool = False, **options: Any) -> nn.Module:
    return build(Twin, pretrained, **options)
