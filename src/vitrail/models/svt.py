"""SVT: early blocks mix wavelet bands, a gate the low one and complex matrices the details; late blocks attend.

Patro and Agneeswaran, "Scattering Vision Transformer: Spectral Mixing Matters" (NeurIPS 2023), arXiv 2311.01310, and
the authors' code (badripatro/svt). The transform is invertible, so that nothing is lost as by pooling. We follow the
code in what the paper does not say: one level of the transform, four groups of channels in the complex matrices, and
a block of attention from the mean of all places, which ends the net.

Shapes: B images, H x W places, C channels; h x w = H/2 x W/2 places of a detail band. Stages take (B, C, H, W) and
return it; what is inside them is (B, H, W, C).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.dtcwt import DualTree
from vitrail.models.conv_stage import AUTHORS, ConvMlp, Stage, conv_stem, init_weights
from vitrail.models.staged import StagedNet, cfg, create, nano_cfg

BLOCKS = 4
"""Groups of channels that the complex matrices mix among themselves."""
MIXINGS = ("channel", "channel_token")

# ---- mixing of wavelet bands -----------------------------------------------------------------------------------------


class EinsteinMlp(nn.Module):
    """Two complex linear layers on each block of a vector, with a ReLU of real and of imaginary parts between.

    Args:
        blocks: n, each with matrices of its own.
        size: s, numbers of a block.
    """

    def __init__(self, blocks: int, size: int) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.weight2 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.bias1 = nn.Parameter(0.02 * torch.randn(2, blocks, size))
        self.bias2 = nn.Parameter(0.02 * torch.randn(2, blocks, size))

    def forward(self, z: Tensor) -> Tensor:
        """Return (..., n s, 2): real and imaginary parts are the last axis."""
        return self.apply_with(z, self.weight1, self.bias1, self.weight2, self.bias2)

    @staticmethod
    def apply_with(z: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        """Return ``forward`` with weights (2, n, s, s) and biases (2, n, s)."""
        blocks, size = bias1.shape[1:]
        rows = z.reshape(-1, blocks, 2 * size).transpose(0, 1)  # (n, M, 2 s)
        rows = torch.baddbmm(_interleaved(bias1), rows, _as_real(weight1)).relu()
        rows = torch.baddbmm(_interleaved(bias2), rows, _as_real(weight2))
        return rows.transpose(0, 1).reshape(z.shape)


def _as_real(weight: Tensor) -> Tensor:
    """Return real matrices (n, 2 s, 2 s) that multiply as complex ones (2, n, s, s) do."""
    real, imaginary = weight
    from_real, from_imaginary = torch.stack((real, imaginary), -1), torch.stack((-imaginary, real), -1)
    return torch.stack((from_real, from_imaginary), 2).flatten(3, 4).flatten(1, 2)


def _interleaved(bias: Tensor) -> Tensor:
    return bias.movedim(0, -1).flatten(1)[:, None]  # (n, 1, 2 s)


class ScatterMixer(nn.Module):
    """Take a map apart into wavelet bands, mix within bands, and put it together again.

    The low band is multiplied with a weight for each channel and place, which is interpolated for maps of another
    size; the complex details of all places and directions go through the same ``EinsteinMlp`` over the channels.

    Args:
        dim: C, a multiple of 4.
        size: height and width of the maps it is meant for.
        tokens: whether a further one mixes the details along each row, with matrices of its own for each row.
    """

    def __init__(self, dim: int, size: tuple[int, int], *, tokens: bool = False) -> None:
        super().__init__()
        half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        self.transform = DualTree(size)
        self.gate = nn.Parameter(0.02 * torch.randn(dim, 2 * half[0], 2 * half[1]))
        self.channels = EinsteinMlp(BLOCKS, dim // BLOCKS)
        self.tokens = EinsteinMlp(half[0], half[1]) if tokens else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        low, high = self.transform(x)
        low = low * resized(self.gate[None], low.shape[1:3]).permute(0, 2, 3, 1)
        high = self.channels(high.to(self.gate.dtype))
        if self.tokens is not None:
            rows = high.permute(0, 1, 4, 2, 3, 5)  # (6, B, C, h, w, 2)
            size = (rows.shape[3], rows.shape[4])
            rows = self.tokens.apply_with(rows.flatten(3, 4), *_token_weights(self.tokens, size)).view(rows.shape)
            high = rows.permute(0, 1, 3, 4, 2, 5)
        return self.transform.inverse(low, high, (x.shape[1], x.shape[2])).to(x.dtype)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps (B, C, H, W) brought to another height and width by bilinear interpolation."""
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _token_weights(mlp: EinsteinMlp, size: tuple[int, int]) -> list[Tensor]:
    """Return the weights for h rows of w places: interpolated, and products of the same sum."""
    rows, columns = size
    if mlp.bias1.shape[1:] == size:
        return [mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2]
    scale = mlp.bias1.shape[2] / columns
    found = []
    for weight, bias in ((mlp.weight1, mlp.bias1), (mlp.weight2, mlp.bias2)):
        matrices = F.interpolate(weight[None], (rows, columns, columns), mode="trilinear", align_corners=False)[0]
        found += [scale * matrices, resized(bias[None], size)[0]]
    return found


class SplitMixer(nn.Module):
    """A 3x3 depthwise convolution of half of the channels, and of the others' bands both kinds of mixing.

    The halves are interleaved in the result. Published with the code, of which no published net has it.

    Args:
        dim: C, a multiple of 8.
        size: height and width of the maps it is meant for.
    """

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2)
        self.scatter = ScatterMixer(dim // 2, size, tokens=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        near, far = x.chunk(2, -1)
        near = self.conv(near.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return torch.stack((near, self.scatter(far)), -1).flatten(-2)


# ---- attention and blocks --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention among all places, or from one query alone.

    Args:
        dim: C.
        num_heads: a divisor of C.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, asking: Tensor | None = None) -> Tensor:
        """Return what ``asking`` (B, M, C), or without it ``x``, finds in ``x`` (B, N, C)."""
        asking = x if asking is None else asking
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q(asking), *self.kv(x).chunk(2, -1))
        )
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MapAttention(Attention):
    """Attention among the places of a map."""

    def forward(self, x: Tensor, asking: Tensor | None = None) -> Tensor:
        """Return (B, H, W, C)."""
        return super().forward(x.flatten(1, 2)).view(x.shape)


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each added to what came in."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, *, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """A block whose only query is one token, which sees itself and all places."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, token: Tensor, places: Tensor) -> Tensor:
        """Return the token (B, C) after it has seen the places (B, N, C)."""
        seen = self.norm1(torch.cat((token[:, None], places), 1))
        token = token + self.attn(seen, seen[:, :1])[:, 0]
        return token + self.mlp(self.norm2(token))


# ---- the net ---------------------------------------------------------------------------------------------------------


class SVT(StagedNet):
    """SVT with timm's surface; features at strides 4, 8, 16, 32 for images of any size.

    Args:
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        img_size: pixels, one number or height and width, that the weights of places are for; for other images they
            are interpolated.
        stem_dim: width of the first convolutions.
        dims: width C of the four stages.
        depths: blocks of the four stages.
        num_heads: heads of each stage, which divide its width.
        mlp_ratios: hidden width of the feed-forward layers over C, for each stage.
        scatter_stages: how many stages, from the first, mix wavelet bands, 0 to 4; the others attend. Their widths are
            multiples of 4.
        mixing: ``"channel"`` as published; ``"channel_token"`` has ``SplitMixer``, for widths that are multiples of 8.
        token_labels: whether a second classifier, of places, gives half of its largest logits to the answer, as
            published; ``TokenLabelling`` trains it.
        stem_stride: 2 or 4 pixels per place of the first stage.
        global_pool: one of ``layers.pooling.POOLS``; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: stages of another number, heads or groups that do not divide a width, a mixing that there is not,
            a size, a stride or a pooling that is not allowed.
    """

    BEFORE = r"^stages\.0\.downsample"
    BEHIND = r"^(?:post|norm)\."

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        stem_dim: int = 32,
        dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        scatter_stages: int = 1,
        mixing: str = "channel",
        token_labels: bool = False,
        stem_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        lists = {"dims": dims, "depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        for name, values in lists.items():
            if len(values) != 4:
                raise InputError(
                    f"{name} = {tuple(values)} has {len(values)} entries: give one for each of four stages"
                )
        if min(*depths, stem_dim) < 1:
            raise InputError(
                f"depths = {tuple(depths)} and stem_dim = {stem_dim} are not allowed: give 1 block and channel or more"
            )
        for dim, heads in zip(dims, num_heads, strict=True):
            if heads < 1 or dim % heads:
                raise InputError(f"num_heads = {heads} does not divide a width of {dim}: give a divisor of it")
        if not 0 <= scatter_stages <= 4:
            raise InputError(f"scatter_stages = {scatter_stages} is not allowed: give 0 to 4")
        if mixing not in MIXINGS:
            raise unknown("mixing", mixing, MIXINGS, f"there are {' and '.join(MIXINGS)}")
        divisor = BLOCKS if mixing == "channel" else 2 * BLOCKS
        for dim in dims[:scatter_stages]:
            if dim % divisor:
                raise InputError(f"dims = {dim} is not allowed in a stage of wavelets: give multiples of {divisor}")
        if stem_stride not in (2, 4):
            raise InputError(f"stem_stride = {stem_stride} is not allowed: give 2 or 4")
        height, width = to_2tuple(img_size)
        if min(height, width) < 1:
            raise InputError(f"img_size = {img_size} is not allowed: give 1 pixel or more")

        def mixer(stage: int) -> nn.Module:
            if stage >= scatter_stages:
                return MapAttention(dims[stage], num_heads[stage])
            stride = stem_stride * 2**stage
            kind = ScatterMixer if mixing == "channel" else SplitMixer
            return kind(dims[stage], (math.ceil(height / stride), math.ceil(width / stride)))

        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[Stage] = []
        self.feature_info = []
        for i, (dim, depth, ratio) in enumerate(zip(dims, depths, mlp_ratios, strict=True)):
            blocks = [Block(dim, mixer(i), ratio, drop_path=next(rates)) for _ in range(depth)]
            halving = nn.Conv2d(dims[i - 1], dim, 3, 2, 1) if i else conv_stem(in_chans, stem_dim, dim, stem_stride)
            stages.append(Stage(halving, dim, blocks, norm=i < 3))
            self.feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.post = ClassBlock(dims[-1], num_heads[-1], mlp_ratios[-1])
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.token_labels = token_labels
        self.aux_head: nn.Module | None = None
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_weights)

    def put_head(self) -> None:
        """Set the classifiers, on the device and in the type of the present weights."""
        super().put_head()
        if self.token_labels:
            norm = nn.LayerNorm(self.num_features, eps=1e-6).to(self.norm.weight)
            self.aux_head = nn.Sequential(norm, self.linear_head(self.num_features)) if self.num_classes else None

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, H/32, W/32)."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or with ``pre_logits`` the token after the last block, (B, C)."""
        pooled = self.global_pool(x)
        if pooled.ndim == 4:
            return pooled
        places = x.flatten(2).transpose(1, 2)
        token = self.norm(self.post(pooled, places))
        if pre_logits:
            return token
        logits = self.head(self.drop(token))
        return logits if self.aux_head is None else logits + 0.5 * self.aux_head(places).amax(1)


# ---- the authors' weights --------------------------------------------------------------------------------------------

_AUTHORS = (
    *AUTHORS,
    (r"^(stages\.\d\.blocks\.\d+)\.attn\.", r"\1.mixer."),
    (r"^aux_head\.", "aux_head.1."),
    (r"\.complex_weight_ll$", ".gate"),
    (r"\.complex_weight_lh_b([12])$", r".channels.bias\1"),
    (r"\.complex_weight_lh_([12])$", r".channels.weight\1"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights under our names, those of places brought to the model's size."""
    state = state_dict.get("model", state_dict.get("state_dict", state_dict))
    own = model.state_dict()
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if re.search(r"\.[xi]fm\.", key):
            continue  # the filters, which are no weights
        if not any(key.startswith(name) for name in ("stages.", "post.", "aux_head.0.", "aux_head.1.")):
            for pattern, name in _AUTHORS:
                key = re.sub(pattern, name, key)
        if key.endswith(".gate") and key in own:
            value = resized(value[None], own[key].shape[1:])[0]
        if not key.startswith("aux_head.") or key in own:
            ours[key] = value
    for part in ("weight", "bias"):
        # One norm serves both classifiers of the authors.
        if f"aux_head.0.{part}" in own and f"norm.{part}" in ours:
            ours.setdefault(f"aux_head.0.{part}", ours[f"norm.{part}"])
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


# Not that other sizes were refused: the weights of places are made for the size that a net is built for.
_OWN: dict[str, Any] = {"first_conv": "stages.0.downsample.0", "fixed_input_size": True}
default_cfgs = generate_default_cfgs(
    {
        "svt_nano": nano_cfg(**_OWN),
        "svt_h_s": cfg(**_OWN, crop_pct=0.96),
        "svt_h_b": cfg(**_OWN, crop_pct=0.96),
        "svt_h_l": cfg(**_OWN, crop_pct=0.96),
    }
)
_B: dict[str, Any] = {
    "stem_dim": 64,
    "dims": (64, 128, 320, 512),
    "depths": (3, 4, 12, 3),
    "num_heads": (2, 4, 10, 16),
}
_L: dict[str, Any] = {
    "stem_dim": 64,
    "dims": (96, 192, 384, 512),
    "depths": (3, 6, 18, 3),
    "num_heads": (3, 6, 12, 16),
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SVT:
    net: SVT = create(SVT, variant, pretrained, checkpoint_filter_fn, **kwargs)
    return net


@register_model
def svt_nano(pretrained: bool = False, **kwargs: Any) -> SVT:
    """0.4 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"img_size": 32, "stem_dim": 16, "dims": (16, 32, 64, 96), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 6)}
    return _create("svt_nano", pretrained, **{**own, "mlp_ratios": (4, 4, 4, 4), "stem_stride": 2, **kwargs})


@register_model
def svt_h_s(pretrained: bool = False, **kwargs: Any) -> SVT:
    """22 M parameters, with a classifier of places; trained with stochastic depth 0.1 and token labels."""
    return _create("svt_h_s", pretrained, **{"token_labels": True, **kwargs})


@register_model
def svt_h_b(pretrained: bool = False, **kwargs: Any) -> SVT:
    """33 M parameters, with a classifier of places; trained with stochastic depth 0.1 and token labels."""
    return _create("svt_h_b", pretrained, **{**_B, "token_labels": True, **kwargs})


@register_model
def svt_h_l(pretrained: bool = False, **kwargs: Any) -> SVT:
    """55 M parameters, with a classifier of places; trained with stochastic depth 0.3 and token labels."""
    return _create("svt_h_l", pretrained, **{**_L, "token_labels": True, **kwargs})
