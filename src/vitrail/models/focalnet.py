"""FocalNet: focal modulation in the place of attention, in nets of stages and in ones that keep their resolution.

Yang, Li, Dai, Gao, "Focal Modulation Networks" (NeurIPS 2022), arXiv 2203.11926. The nets of stages are timm's. The
isotropic ones, which timm does not have, and a nano for small images are built from its class, begun as the authors'
code begins them. The modulation itself, for other models, is ``vitrail.edits.focal_modulation``, and what a net's
modulators and gates look like ``vitrail.evaluate.modulator``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import LayerNorm2d
from timm.models import focalnet as timms
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vitrail.errors import InputError
from vitrail.layers.padded_conv import PaddedConv2d
from vitrail.layers.pooling import global_pooling
from vitrail.models.staged import cfg, create, nano_cfg


class FocalNet(timms.FocalNet):
    """timm's FocalNet with patches of any side, for images of any size, begun as the authors' code begins it.

    Args:
        patch_size: side and stride of the stem's patches; 2 or 4 with ``use_overlap_down``.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        global_pool: as in timm, such as ``"avg"``; ``""`` only without classifier.
        embed_dim: width of the first stage; it doubles with each.
        depths: blocks of each stage.
        focal_levels, focal_windows: of each stage: convolutions, and the side of the first.
        use_overlap_down: patches overlap, of any size of image; else images are filled with zeros to whole patches.
        **kwargs: as for ``timm.models.focalnet.FocalNet``.

    Raises:
        InputError: a patch size that is not allowed, settings of stages of several numbers, or no pooling with a
            classifier.
    """

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        focal_levels: Sequence[int] = (2, 2, 2, 2),
        focal_windows: Sequence[int] = (3, 3, 3, 3),
        use_overlap_down: bool = False,
        **kwargs: Any,
    ) -> None:
        if patch_size < 1 or (use_overlap_down and patch_size not in (2, 4)):
            allowed = "2 or 4 with use_overlap_down" if use_overlap_down else "1 or more"
            raise InputError(f"focalnet: patch_size = {patch_size} is not allowed: give {allowed}")
        if not len(depths) == len(focal_levels) == len(focal_windows):
            raise InputError(
                f"focalnet: depths = {tuple(depths)}, focal_levels = {tuple(focal_levels)} and focal_windows = "
                f"{tuple(focal_windows)} are of several lengths: give one of each for every stage"
            )
        global_pooling(global_pool, num_classes)
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=tuple(depths),
            focal_levels=tuple(focal_levels),
            focal_windows=tuple(focal_windows),
            use_overlap_down=use_overlap_down,
            **kwargs,
        )
        weight = self.stem.proj.weight
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        norm = partial(LayerNorm2d, eps=1e-5)
        self.stem = timms.Downsample(in_chans, embed_dim, patch_size, use_overlap_down, norm, **place)  # type: ignore[arg-type]
        strides = [patch_size * 2**stage for stage in range(len(depths))]
        if not use_overlap_down:
            self.stem.proj = PaddedConv2d(in_chans, embed_dim, patch_size, patch_size, **place)
            self.stem.proj.multiple = strides[-1]
        for info, stride in zip(self.feature_info, strides):
            info["reduction"] = stride
        # The authors give a distribution of their own to what is a linear layer there, and timm to all.
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.endswith((".f", ".modulation.proj", ".fc1", ".fc2")):
                module.reset_parameters()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Set the number of classes and the pooling; ``""``, without classifier, gives ``forward_features``.

        Raises:
            InputError: a pooling that does not exist, or none for a classifier.
        """
        kind = self.head.global_pool.pool_type if global_pool is None else global_pool
        global_pooling(kind, num_classes)
        super().reset_classifier(num_classes, global_pool, reset_other)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, or timm's, under timm's names.

    Args:
        state: a checkpoint, with or without ``model`` around it and ``module.`` before its names.
        model: the FocalNet that they are for, of timm or of ours.
    """
    state = state.get("model", state)
    weights = {key.removeprefix("module."): value for key, value in state.items()}
    found: Mapping[str, Any] = timms.checkpoint_filter_fn(weights, model)  # type: ignore[arg-type]
    return found


# ---- the variants ----------------------------------------------------------------------------------------------------


_PLACES: dict[str, Any] = {"first_conv": "stem.proj", "classifier": "head.fc", "license": "mit"}
_ISO: dict[str, Any] = {**_PLACES, "crop_pct": 0.9, "pool_size": (14, 14)}
default_cfgs = generate_default_cfgs(
    {
        "focalnet_nano": nano_cfg(**_PLACES),
        "focalnet_tiny_iso": cfg(**_ISO),
        "focalnet_small_iso": cfg(**_ISO),
        "focalnet_base_iso": cfg(**_ISO),
    }
)


def _isotropic(variant: str, pretrained: bool, embed_dim: int, **options: Any) -> FocalNet:
    shape = {"patch_size": 16, "depths": (12,), "focal_levels": (3,), "focal_windows": (3,), "embed_dim": embed_dim}
    net: FocalNet = create(FocalNet, variant, pretrained, checkpoint_filter_fn, stages=1, **{**shape, **options})
    return net


@register_model
def focalnet_nano(pretrained: bool = False, **kwargs: Any) -> FocalNet:
    """0.4 M parameters, for images of 28 to 64 pixels; overlapping patches as in the published nets from L up."""
    options = {
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (1, 1, 2, 1),
        "use_overlap_down": True,
        "drop_path_rate": 0.0,
    }
    net: FocalNet = create(FocalNet, "focalnet_nano", pretrained, checkpoint_filter_fn, **{**options, **kwargs})
    return net


@register_model
def focalnet_tiny_iso(pretrained: bool = False, **kwargs: Any) -> FocalNet:
    """6 M parameters, 12 blocks on patches of 16 pixels; trained with stochastic depth 0.2."""
    return _isotropic("focalnet_tiny_iso", pretrained, 192, **kwargs)


@register_model
def focalnet_small_iso(pretrained: bool = False, **kwargs: Any) -> FocalNet:
    """22 M parameters, 12 blocks on patches of 16 pixels; trained with stochastic depth 0.2."""
    return _isotropic("focalnet_small_iso", pretrained, 384, **kwargs)


@register_model
def focalnet_base_iso(pretrained: bool = False, **kwargs: Any) -> FocalNet:
    """87 M parameters, 12 blocks on patches of 16 pixels, norms behind layers; trained with stochastic depth 0.2."""
    late = {"use_post_norm": True, "layerscale_value": 1e-4}
    return _isotropic("focalnet_base_iso", pretrained, 768, **{**late, **kwargs})
