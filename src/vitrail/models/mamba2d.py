"""Mamba2D: a selective scan of the plane beside a convolution, in two stages; then self-attention, in two more.

Baty et al., "Mamba2D: A Natively Multi-Dimensional State-Space Model for Vision Tasks" (2024), arXiv 2412.16146, and
the authors' code of its second release (cocoalex00/Mamba2D), with which the published weights were trained. Layers
begin as torch makes them, as theirs do; what begins otherwise says so.

Shapes: B images, H x W places, C channels, R the rank of the step sizes, N states. Stages take and return (B, C, H, W);
what is inside of them works on (B, H, W, C).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.mamba import initial_rates, initial_steps, rates
from vitrail.layers.scan.plane import plane_scan
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg, through_blocks

STATES = 16
"""N of every published variant."""
HEAD_DIM = 32
"""Channels of a head of attention."""
MIXERS = ("scan", "scan_both", "scan_local", "attention")
"""What may mix the places of a stage: a scan from one corner, two scans from opposite corners, a scan beside a
convolution, self-attention."""

# ---- the scan --------------------------------------------------------------------------------------------------------


class PlaneScan(nn.Module):
    """A selective scan from the upper left corner, whose step sizes, B and C come of what is scanned.

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rank = math.ceil(dim / 16)
        self.x_proj = nn.Linear(dim, 2 * self.rank + 3 * STATES, bias=False)
        self.dt_top, self.dt_left = nn.Linear(self.rank, dim), nn.Linear(self.rank, dim)
        self.A_top_log, self.A_left_log = (nn.Parameter(initial_rates(dim, STATES)) for _ in range(2))  # (C, N)
        self.D = nn.Parameter(torch.ones(dim))
        steps = initial_steps(dim)
        for layer in (self.dt_top, self.dt_left):
            nn.init.uniform_(layer.weight, -(self.rank**-0.5), self.rank**-0.5)
            with torch.no_grad():
                layer.bias.copy_(steps)  # the same down and to the right

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        sizes = (self.rank, self.rank, STATES, STATES, STATES)
        top, left, enter_top, enter_left, leave = self.x_proj(x).split(sizes, -1)
        return plane_scan(
            x,
            F.softplus(self.dt_top(top)),
            F.softplus(self.dt_left(left)),
            rates(self.A_top_log),
            rates(self.A_left_log),
            enter_top,
            enter_left,
            leave,
            self.D,
        )


class StarReLU(nn.Module):
    """The square of ReLU, with a factor and an offset that are learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return what came in, changed element by element."""
        return self.scale * F.relu(x).square() + self.bias


class LocalPath(nn.Module):
    """A depthwise 3x3 convolution between two linear layers, twice as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pwconv1 = nn.Linear(dim, 2 * dim, bias=False)
        self.act1 = StarReLU()
        self.dwconv = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim, bias=False)
        self.act2 = StarReLU()
        self.pwconv2 = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = self.act1(self.pwconv1(x)).permute(0, 3, 1, 2)
        return self.pwconv2(self.act2(self.dwconv(x)).permute(0, 2, 3, 1))


class Mamba2DMixer(nn.Module):
    """A linear layer, GELU, the scan, GELU, a linear layer; the local path sees what came in, and is added.

    There is no gate, and no convolution before the scan, as Mamba has them.

    Args:
        dim: C.
        local: whether there is a local path.
        both: whether the mean is taken with a scan from the lower right corner, which has parameters of its own.
        backwards: whether the scan begins in the lower right corner; the local path does not turn.
    """

    def __init__(self, dim: int, *, local: bool = True, both: bool = False, backwards: bool = False) -> None:
        super().__init__()
        self.backwards = backwards
        self.local_norm = nn.LayerNorm(dim) if local else None
        self.local_path = LocalPath(dim) if local else None
        self.in_proj = nn.Linear(dim, dim)
        self.scan = PlaneScan(dim)
        self.scan_back = PlaneScan(dim) if both else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        inside = F.gelu(self.in_proj(x))
        y = _turned(self.scan(_turned(inside))) if self.backwards else self.scan(inside)
        if self.scan_back is not None:
            other = self.scan_back(inside) if self.backwards else _turned(self.scan_back(_turned(inside)))
            y = (y + other) / 2
        y = self.out_proj(F.gelu(y))
        if self.local_path is None:
            return y
        return y + self.local_path(self.local_norm(x))  # type: ignore[misc]  # there are both or neither


def _turned(x: Tensor) -> Tensor:
    """Turn a plane (B, H, W, C) by half a circle."""
    return x.flip(1, 2)


# ---- attention -------------------------------------------------------------------------------------------------------


class RotaryAttention(nn.Module):
    """Self-attention over the plane: half of a head's channels turn with the row, half with the column.

    Queries and keys are normalised after they have turned.

    Args:
        dim: C; there is one head for each 32 channels, and at least one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inside = max(1, dim // HEAD_DIM) * HEAD_DIM
        self.qkv = nn.Linear(dim, 3 * inside, bias=False)
        self.q_norm, self.k_norm = nn.LayerNorm(HEAD_DIM), nn.LayerNorm(HEAD_DIM)
        self.proj = nn.Linear(inside, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, -1, HEAD_DIM)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, n, L, d)
        angles = place_angles(height, width, device=x.device)
        query, key = self.q_norm(turn_pairs(query, angles)), self.k_norm(turn_pairs(key, angles))
        y = F.scaled_dot_product_attention(query, key, value)
        return self.proj(y.transpose(1, 2).reshape(batch, height, width, -1))


def place_angles(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return by how much each pair of a head's channels turns at each place, (H W, d / 2), in radians."""
    pairs = HEAD_DIM // 4  # of an axis
    speeds = 10_000.0 ** -(torch.arange(pairs, device=device) / pairs)
    down, across = (torch.arange(side, device=device)[:, None] * speeds for side in (height, width))
    down, across = (
        down[:, None].expand(height, width, pairs),
        across[None].expand(height, width, pairs),
    )
    return torch.cat((down, across), -1).flatten(0, 1)


def turn_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels of ``x`` (..., L, d) by ``angles`` (L, d / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)


# ---- the net ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each added to what came in times a factor for each channel."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, *, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.scale1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.scale2 = nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = x * self.scale1 + self.drop_path(self.mixer(self.norm1(x)))
        return x * self.scale2 + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """A 7x7 convolution, which makes the image smaller, and a norm."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride, (8 - stride) // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H / stride, W / stride)."""
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """A downsampling (none in the first stage), blocks, and a norm."""

    def __init__(self, dim_in: int | None, dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if dim_in is None else nn.Conv2d(dim_in, dim, 3, 2, 1)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        return self.norm(through_blocks(self, x)).permute(0, 3, 1, 2)


class MlpHead(nn.Module):
    """A classifier with one hidden layer, four times as wide."""

    def __init__(self, dim: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.norm = nn.LayerNorm(4 * dim)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(4 * dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        return self.fc2(self.drop(self.norm(F.gelu(self.fc1(x)))))


class Mamba2D(StagedNet):
    """Mamba2D with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        dims: width C of each stage.
        depths: blocks of each stage.
        mixers: of each stage, one of ``MIXERS``.
        alternate: whether the scan of every other block, from the second of a stage, begins in the opposite corner.
        mlp_ratio: hidden width of the feed-forward layers over C.
        stem_stride: 1, 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the last layer of the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: lists of different lengths, a mixer, a stride or a pooling that is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 9, 3),
        mixers: Sequence[str] = ("scan_local", "scan_local", "attention", "attention"),
        alternate: bool = True,
        mlp_ratio: float = 4.0,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(mixers) or not dims:
            raise InputError(
                f"dims = {tuple(dims)}, depths = {tuple(depths)} and mixers = {tuple(mixers)} are not of one length: "
                "give one of each for every stage"
            )
        wrong = [mixer for mixer in mixers if mixer not in MIXERS]
        if wrong:
            raise InputError(f"mixers: {wrong[0]!r} is not allowed: give one of {', '.join(MIXERS)}")
        if stem_stride not in (1, 2, 4):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 1, 2 or 4")
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop_rate = drop_rate
        self.stem = Stem(in_chans, dims[0], stem_stride)
        drops = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, (dim, depth, kind) in enumerate(zip(dims, depths, mixers, strict=True)):
            blocks = [
                Block(dim, _mixer(kind, dim, alternate and n % 2 == 1), mlp_ratio, drop_path=next(drops))
                for n in range(depth)
            ]
            stages.append(Stage(dims[i - 1] if i else None, dim, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features)
        self.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of matrices that are not decayed: with a logarithm at 0 all states forget at one pace."""
        names = {"*.A_top_log", "*.A_left_log"}
        return names if any(isinstance(module, PlaneScan) for module in self.modules()) else set()

    def put_head(self) -> None:
        """Set ``head``, which has a hidden layer, on the device and in the type of the present weights."""
        self.head = nn.Identity()
        if self.num_classes:
            place = self.norm.weight
            self.head = MlpHead(self.num_features, self.num_classes, self.drop_rate).to(place.device, place.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) of the last stage."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with ``pre_logits`` the pooled and normalised features (B, C)."""
        pooled = self.global_pool(x)
        if pooled.ndim == 2:
            pooled = self.norm(pooled)
        return pooled if pre_logits else self.head(pooled)


def _mixer(kind: str, dim: int, backwards: bool) -> nn.Module:
    if kind == "attention":
        return RotaryAttention(dim)
    return Mamba2DMixer(dim, local=kind == "scan_local", both=kind == "scan_both", backwards=backwards)


_AUTHORS = (
    (r"^(?:module|model)\.", ""),
    (r"^backbone\.", ""),
    (r"^ds\.stem\.conv\.", "stem.conv."),
    (r"^ds\.stem\.post_norm\.norm\.", "stem.norm."),
    (r"^ds\.ds(\d+)\.conv\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.MLP\.", ".mlp."),
    (r"\.res_scale([12])\.scale$", r".scale\1"),
    (r"\.token_mixer\.(?=x_proj|dt_proj|A._log|D)(.*?)_b(?=\.|$)", r".mixer.scan_back.\1"),
    (r"\.token_mixer\.(?=x_proj|dt_proj|A._log|D)", ".mixer.scan."),
    (r"\.token_mixer\.", ".mixer."),
    (r"\.dt_projT\.", ".dt_top."),
    (r"\.dt_projL\.", ".dt_left."),
    (r"\.AT_log$", ".A_top_log"),
    (r"\.AL_log$", ".A_left_log"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, of classifier or backbone, under our names."""
    if "stem.conv.weight" in state_dict:
        return state_dict
    own = model.state_dict()
    ours = {}
    for key, value in state_dict.get("state_dict", state_dict).items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        # In their stages the norm is what comes after the last block, and is numbered as if it were one.
        last = re.sub(r"^stages\.(\d+)\.blocks\.\d+\.(weight|bias)$", r"stages.\1.norm.\2", key)
        ours[last if last in own else key] = value
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


_OWN: dict[str, Any] = {"first_conv": "stem.conv", "classifier": "head.fc2"}
default_cfgs = generate_default_cfgs(
    {
        "mamba2d_nano": nano_cfg(**_OWN),
        "mamba2d_n": cfg(**_OWN),
        "mamba2d_t": cfg(**_OWN),
        "mamba2d_s": cfg(**_OWN),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Mamba2D:
    net: Mamba2D = create(Mamba2D, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def mamba2d_nano(pretrained: bool = False, **kwargs: Any) -> Mamba2D:
    """0.4 M parameters, for images of 16 to 64 pixels; ours, not the paper's, which calls ``mamba2d_n`` nano."""
    own = {"dims": (16, 32, 64, 96), "depths": (2, 2, 2, 1), "stem_stride": 2}
    return _create("mamba2d_nano", pretrained, **{**own, **kwargs})


@register_model
def mamba2d_n(pretrained: bool = False, **kwargs: Any) -> Mamba2D:
    """7 M parameters; trained without dropout and stochastic depth."""
    return _create("mamba2d_n", pretrained, **{"dims": (32, 64, 160, 256), **kwargs})


@register_model
def mamba2d_t(pretrained: bool = False, **kwargs: Any) -> Mamba2D:
    """27 M parameters; trained with dropout 0.15 and stochastic depth 0.175."""
    return _create("mamba2d_t", pretrained, **kwargs)


@register_model
def mamba2d_s(pretrained: bool = False, **kwargs: Any) -> Mamba2D:
    """50 M parameters; trained with dropout 0.4 and stochastic depth 0.4."""
    own = {"dims": (96, 192, 384, 576), "depths": (3, 12, 14, 3)}
    return _create("mamba2d_s", pretrained, **{**own, **kwargs})
