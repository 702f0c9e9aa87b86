"""InceptionNeXt: ConvNeXt's block with its depthwise convolution split into a square, two bands and nothing.

Yu, Zhou, Yan, Wang, "InceptionNeXt: When Inception Meets ConvNeXt" (CVPR 2024). The nets are timm's; the nano is built
from its class, with a stem that takes small images and images of any size. The depthwise convolution itself, for other
models, is ``vitrail.edits.inception_depthwise``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.inception_next import InceptionDWConv2d, MetaNeXt
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.padded_conv import PaddedConv2d
from vitrail.layers.pooling import global_pooling
from vitrail.models.staged import nano_cfg


class InceptionNeXt(MetaNeXt):
    """timm's MetaNeXt for small images and images of any size.

    Args:
        stem_stride: side and stride of the stem's patches: 1, 2 or 4.
        in_chans: input channels.
        depths: blocks of each of one to four stages.
        dims: width per stage.
        num_classes: 0 leaves the classifier off.
        global_pool: as timm's, or ``""`` with ``num_classes = 0``: no pooling, and no layers of the head.
        **kwargs: as for ``timm.models.inception_next.MetaNeXt``.

    Raises:
        InputError: a stride or a number of stages out of range, or a pooling that does not go with a classifier.
    """

    def __init__(
        self,
        stem_stride: int = 4,
        in_chans: int = 3,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        num_classes: int = 1000,
        global_pool: str = "avg",
        **kwargs: Any,
    ) -> None:
        if stem_stride not in (1, 2, 4):
            raise InputError(f"inception_next: stem_stride = {stem_stride!r} is not allowed: give 1, 2 or 4")
        if not 1 <= len(depths) == len(dims) <= 4:
            raise InputError(
                f"inception_next: depths = {tuple(depths)} with dims = {tuple(dims)} is not allowed: give a number of "
                "blocks and a width for each of 1 to 4 stages"
            )
        global_pooling(global_pool, num_classes)  # refuses what does not go together
        super().__init__(in_chans, num_classes, global_pool or "avg", depths=depths, dims=dims, **kwargs)
        place = next(self.parameters())
        stem = PaddedConv2d(in_chans, dims[0], stem_stride, stem_stride, device=place.device, dtype=place.dtype)
        self._init_weights(stem)
        self.stem[0] = stem
        strides = [stem_stride * 2**stage for stage in range(len(dims))]
        for info, stride in zip(self.feature_info, strides):
            info["reduction"] = stride
        stem.multiple = strides[-1]
        if not global_pool:
            self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Set the number of classes and the pooling; ``""`` returns the features as they are."""
        if global_pool is not None:
            global_pooling(global_pool, num_classes)
        if global_pool != "":
            pool = "avg" if global_pool is None and not self.global_pool else global_pool
            super().reset_classifier(num_classes, pool, reset_other)
        else:
            self.num_classes, self.global_pool = 0, ""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) of features (B, C, H, W), or what the classifier takes."""
        return super().forward_head(x, pre_logits) if self.global_pool else x


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the authors' weights, whose names timm kept, without what they were saved in.

    Args:
        state: a checkpoint, with or without ``state_dict`` around it and ``module.`` before its names.
        model: the model that they are for.
    """
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}


_published = {"interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
default_cfgs = generate_default_cfgs(
    {"inception_next_nano": nano_cfg(**_published, first_conv="stem.0", classifier="head.fc2", license="apache-2.0")}
)


@register_model
def inception_next_nano(pretrained: bool = False, **kwargs: Any) -> InceptionNeXt:
    """0.3 M parameters, for images of 28 to 64 pixels; bands and branches as in the published atto."""
    options = {
        "depths": (1, 1, 2, 1),
        "dims": (16, 32, 64, 128),
        "stem_stride": 2,
        "token_mixers": partial(InceptionDWConv2d, band_kernel_size=9, branch_ratio=0.25),
    }
    model: InceptionNeXt = build_model_with_cfg(
        InceptionNeXt,
        "inception_next_nano",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**options, **kwargs},
    )
    return model
