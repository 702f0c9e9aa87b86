"""Nets whose nodes choose among spaces of activations: an S-KAN of vectors and an S-ConvKAN of images.

Yang et al., "Activation Space Selectable Kolmogorov-Arnold Networks" (2024), arXiv 2408.08338. What widths and depths
the paper has is not known here: see the card.

    net = SKAN((2, 8, 1))       # function fitting
    ...                         # full training
    select(net)                 # each node keeps one space
    ...                         # selective training
    reparameterize_model(net)   # timm's: prune what was not chosen
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.selectable_kan import DEFAULT, SelectableKAN
from vitrail.models.staged import StagedNet, nano_cfg, through_blocks


class SKAN(nn.Sequential):
    """An S-KAN: layers of vectors whose nodes choose among spaces of activations.

    Args:
        widths: nodes that come in, of each hidden layer, and that go out.
        spaces, size: as of ``SelectableKAN``.

    Raises:
        InputError: fewer than two widths, or what a layer does not allow.
    """

    def __init__(self, widths: Sequence[int], spaces: Sequence[str] = DEFAULT, size: int = 4) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise InputError(f"widths = {tuple(widths)} is not allowed: give two or more numbers of nodes")
        own: dict[str, Any] = {"spaces": spaces, "size": size, "bias": True}
        super().__init__(*[SelectableKAN(a, b, **own) for a, b in pairwise(widths)])


def _norm(norm: str, dim: int) -> nn.Module:
    return nn.BatchNorm2d(dim) if norm == "batch" else nn.GroupNorm(1, dim)


class Block(nn.Module):
    """A convolution with selectable activations and a normalisation; no other activation follows."""

    def __init__(self, in_dim: int, dim: int, spaces: Sequence[str], size: int, norm: str) -> None:
        super().__init__()
        self.conv = SelectableKAN(in_dim, dim, 3, 1, 1, spaces=spaces, size=size)
        self.norm = _norm(norm, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return self.norm(self.conv(x))


class Stage(nn.Module):
    """Pooling, and blocks."""

    def __init__(self, pool: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.pool, self.blocks = pool, nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return through_blocks(self, self.pool(x))


class SConvKAN(StagedNet):
    """An S-ConvKAN with timm's surface; features at strides 1, 2, 4, ...

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dims: width of each stage; poolings are between stages.
        depth: blocks of each stage.
        spaces, size: as of ``SelectableKAN``.
        norm: "batch", or "group" for one group of all channels.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).

    Raises:
        InputError: no stage or block, another normalisation, or what a layer or the pooling does not allow.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (32, 64, 128),
        depth: int = 1,
        spaces: Sequence[str] = DEFAULT,
        size: int = 4,
        norm: str = "batch",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise InputError(f"norm = {norm!r} is not allowed: give 'batch' or 'group'")
        if not dims or depth < 1:
            raise InputError(f"dims = {tuple(dims)} with depth = {depth} makes no net: give one of each or more")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 3, padding=1, bias=False), _norm(norm, dims[0]))
        stages, self.feature_info = [], []
        for number, dim in enumerate(dims):
            before = dims[max(number - 1, 0)]
            blocks: list[nn.Module] = [Block(before if not n else dim, dim, spaces, size, norm) for n in range(depth)]
            pool = nn.MaxPool2d(2, 2, ceil_mode=True) if number else nn.Identity()
            stages.append(Stage(pool, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 2**number, "module": f"stages.{number}"})
        self.stages = nn.Sequential(*stages)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into groups by depth."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        return {
            "stem": self.BEFORE,
            "blocks": [(blocks, None), *([(r"^head\.", (99999,))] if self.num_classes else [])],
        }

    def no_weight_decay(self) -> set[str]:
        """Return patterns of matrices that are not decayed: the shares of spaces, for decay would even them out."""
        return {"*.shares"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map behind the last stage, (B, C, H, W)."""
        return self.stages(self.stem(x))


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Return the weights as they are: none are published."""
    return state


default_cfgs = generate_default_cfgs({"sconvkan_nano": nano_cfg(pool_size=(8, 8), first_conv="stem.0")})


@register_model
def sconvkan_nano(pretrained: bool = False, **kwargs: Any) -> SConvKAN:
    """A small S-ConvKAN of ours."""
    options = {"dims": (8, 16, 32), **kwargs}
    features = {"out_indices": tuple(range(len(options["dims"]))), "flatten_sequential": True}
    return build_model_with_cfg(SConvKAN, "sconvkan_nano", pretrained, feature_cfg=features, **options)
