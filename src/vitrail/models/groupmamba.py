"""GroupMamba: a quarter of the channels is scanned in each of four directions, and a gate joins the quarters again.

Shaker et al., "GroupMamba: Efficient Group-Based Visual State Space Model" (CVPR 2025), arXiv 2407.13772, and the
authors' code (Amshaker/GroupMamba), with which the weights were trained. We follow the code in what the paper does not
say: a layer's output is multiplied with its normalised input, one norm serves twice, and a block on the mean of all
places ends the net. Its four scans are four modules; here they are one, with grouped matrices, which is faster.

Shapes: B images, H x W places, L = H W, C channels in G = 4 groups of d. Stages take (B, C, H, W) and return it;
what is inside them is (B, H, W, C).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.mamba import SS2D, ScanPaths
from vitrail.layers.scan.orders import cross, inverse, rearrange
from vitrail.layers.two_heads import TwoHeaded, fitting_heads
from vitrail.models.conv_stage import AUTHORS, ConvMlp, Stage, conv_stem, init_weights
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg

GROUPS = 4
"""G: as many as there are directions."""
REDUCTION = 16
"""Width of the gate inside, as a share of C."""
SCANS = ("grouped", "all")

# ---- the layer -------------------------------------------------------------------------------------------------------


class GroupScan(ScanPaths):
    """VMamba's mixer on each of four groups of channels, with one direction each: rows, columns, and both backwards.

    It equals four ``SS2D`` of d channels, one state and no expansion, each of one direction.

    Args:
        dim: C, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        width = dim // GROUPS
        super().__init__(GROUPS, width, math.ceil(width / 16), states=1)
        self.in_proj = nn.Parameter(trunc_normal_(torch.empty(GROUPS, 2 * width, width), std=0.02))
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.out_norm_weight = nn.Parameter(torch.ones(dim))
        self.out_norm_bias = nn.Parameter(torch.zeros(dim))
        self.out_proj = nn.Parameter(trunc_normal_(torch.empty(GROUPS, width, width), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        batch, height, width, channels = x.shape
        groups = x.view(batch, height * width, GROUPS, -1)
        inside, gate = torch.einsum("blgd,ged->bgel", groups, self.in_proj).chunk(2, 2)  # (B, G, d, L) each
        inside = F.silu(self.conv2d(inside.reshape(batch, channels, height, width)))
        orders = cross((height, width))
        sequences = inside.view(batch, GROUPS, -1, height * width).transpose(2, 3).unbind(1)  # (B, L, d) each
        y = self.along(torch.stack([rearrange(x, order) for x, order in zip(sequences, orders, strict=True)], 1))
        y = torch.stack([rearrange(x, inverse(order)) for x, order in zip(y.unbind(1), orders, strict=True)], 2)
        y = F.layer_norm(y, y.shape[-1:]).flatten(2) * self.out_norm_weight + self.out_norm_bias  # of each group
        y = y.unflatten(2, (GROUPS, -1)).to(gate.dtype) * F.silu(gate.permute(0, 3, 1, 2))  # (B, L, G, d)
        return torch.einsum("blgd,ged->blge", y, self.out_proj).reshape(x.shape)


class ModulatedGroupLayer(nn.Module):
    """Scans, times what they were given, times a gate for each channel that all channels open; then a linear layer.

    Args:
        dim: C.
        scan: a mixer of (B, H, W, C).
        modulation: whether there is a gate.
    """

    def __init__(self, dim: int, scan: nn.Module, *, modulation: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.scan = scan
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.modulation = modulation
        if modulation:
            self.fc1 = nn.Linear(dim, dim // REDUCTION)
            self.fc2 = nn.Linear(dim // REDUCTION, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = self.norm(x)
        y = self.scan(x) * self.skip_scale * x
        if self.modulation:
            affinity = self.fc2(F.relu(self.fc1(x.mean((1, 2))))).sigmoid()
            y = y * affinity[:, None, None]
        return self.proj(self.norm(y))  # the same norm again


class Block(nn.Module):
    """A layer of scans, then a feed-forward layer, each added to what came in."""

    def __init__(self, dim: int, mixer: ModulatedGroupLayer, mlp_ratio: float, *, drop_path: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """A block on one place, the mean of all: here the norm comes after the layer of scans."""

    def __init__(self, dim: int, mixer: ModulatedGroupLayer, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C)."""
        x = x + self.norm1(self.mixer(x[:, None, None])[:, 0, 0])
        return x + self.mlp(self.norm2(x))


# ---- the net ---------------------------------------------------------------------------------------------------------


class GroupMamba(TwoHeaded, StagedNet):
    """GroupMamba with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        stem_dim: width of the first convolutions.
        dims: width C of the four stages, multiples of 4, and of 16 or more with the gate.
        depths: blocks of the four stages.
        mlp_ratios: hidden width of the feed-forward layers over C, for each stage.
        scan: ``"grouped"`` as published: each direction has a quarter of the channels; ``"all"`` scans all channels
            in all four, which the paper compares with.
        modulation: whether a gate joins the groups, as published.
        distilled: whether there is a second classifier, as published, that learns from a teacher; a prediction is the
            mean of both. ``TwoHeadDistillation`` trains such a net.
        stem_stride: 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, a width that the groups do not divide, a kind of scan that there is not,
            a stride or a pooling that is not allowed.
    """

    BEFORE = r"^stages\.0\.downsample"
    BEHIND = r"^(?:post|norm)\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_dim: int = 32,
        dims: Sequence[int] = (64, 128, 348, 448),
        depths: Sequence[int] = (3, 4, 9, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        scan: str = "grouped",
        modulation: bool = True,
        distilled: bool = False,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(distilled=distilled)
        for name, values in {"dims": dims, "depths": depths, "mlp_ratios": mlp_ratios}.items():
            if len(values) != 4:
                raise InputError(
                    f"{name} = {tuple(values)} has {len(values)} entries: give one for each of four stages"
                )
        least = REDUCTION if modulation else GROUPS
        for dim in dims:
            if dim % GROUPS or dim < least:
                raise InputError(f"dims = {dim} is not allowed: give multiples of {GROUPS}, {least} or more")
        if scan not in SCANS:
            raise unknown("scan", scan, SCANS, f"there are {' and '.join(SCANS)}")
        if stem_stride not in (2, 4):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 2 or 4")

        def mixer(dim: int) -> ModulatedGroupLayer:
            scans = GroupScan(dim) if scan == "grouped" else SS2D(dim, states=1, expand=1)
            return ModulatedGroupLayer(dim, scans, modulation=modulation)

        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, (dim, depth, ratio) in enumerate(zip(dims, depths, mlp_ratios, strict=True)):
            blocks = [Block(dim, mixer(dim), ratio, drop_path=next(rates)) for _ in range(depth)]
            halving = nn.Conv2d(dims[i - 1], dim, 3, 2, 1) if i else conv_stem(in_chans, stem_dim, dim, stem_stride)
            stages.append(Stage(halving, dim, blocks, norm=i < 3))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.post = ClassBlock(dims[-1], mixer(dims[-1]), mlp_ratios[-1])
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of matrices that are not decayed: they set how fast states forget."""
        return {"*.A_logs", "*.dt_projs_bias"}

    def put_head(self) -> None:
        """Set the classifiers, on the device and in the type of the present weights."""
        self.put_heads(self.num_features, self.num_classes, self.norm.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits, or with ``pre_logits`` the pooled features after the last block, (B, C).

        In training, after ``set_distilled_training``: a pair of logits, of which the second learns from a teacher.
        """
        pooled = self.global_pool(x)
        if pooled.ndim == 4:
            return pooled
        pooled = self.norm(self.post(pooled))
        return pooled if pre_logits else self.logits(self.drop(pooled))


# ---- the authors' weights --------------------------------------------------------------------------------------------

_AUTHORS = (
    *AUTHORS,
    (r"\.attn\.", ".mixer."),
    (r"^dist_head\.", "head_dist."),
    (r"\.out_norm\.", ".out_norm_"),
    (r"\.(in|out)_proj\.weight$", r".\1_proj"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights under our names, four groups in one tensor.

    A net of one classifier gets the mean of both, which predicts the same.
    """
    state = state_dict.get("model", state_dict)
    if not any("mamba_g1" in key for key in state):
        return state
    ours: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        before, found, rest = re.sub(r"\.mamba_g(\d)\.", r".scan:\1:", key).partition(":")
        if found:
            number, _, name = rest.partition(":")
            groups.setdefault(f"{before}.{name}", {})[number] = value
        else:
            ours[key] = value
    for key, parts in groups.items():
        values = [value for _, value in sorted(parts.items())]
        ours[key] = torch.stack(values) if key.endswith(("in_proj", "out_proj")) else torch.cat(values)
    return fitting_heads(ours, model)


# ---- the variants ----------------------------------------------------------------------------------------------------


_OWN: dict[str, Any] = {"first_conv": "stages.0.downsample.0", "crop_pct": 0.875}
default_cfgs = generate_default_cfgs(
    {
        "groupmamba_nano": nano_cfg(**_OWN),
        "groupmamba_tiny": cfg(**_OWN),
        "groupmamba_small": cfg(**_OWN),
        "groupmamba_base": cfg(**_OWN),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> GroupMamba:
    net: GroupMamba = create(GroupMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def groupmamba_nano(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """0.4 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"stem_dim": 16, "dims": (16, 32, 64, 96), "depths": (1, 1, 2, 1), "mlp_ratios": (4, 4, 4, 4)}
    return _create("groupmamba_nano", pretrained, **{**own, "stem_stride": 2, **kwargs})


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """23 M parameters; trained with stochastic depth 0.05."""
    return _create("groupmamba_tiny", pretrained, **kwargs)


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """34 M parameters."""
    own = {"stem_dim": 64, "dims": (64, 128, 348, 512), "depths": (3, 4, 16, 3)}
    return _create("groupmamba_small", pretrained, **{**own, **kwargs})


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """57 M parameters."""
    own = {"stem_dim": 64, "dims": (96, 192, 424, 512), "depths": (3, 6, 21, 3)}
    return _create("groupmamba_base", pretrained, **{**own, **kwargs})
