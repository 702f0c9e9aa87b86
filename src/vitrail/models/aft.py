"""Attention-free transformers: image classifiers, and images read and written as sequences of sub-pixels.

Zhai et al., "An Attention Free Transformer" (2021), arXiv 2105.14103, sections 5.1 and 5.3. The classifiers are DeiT's
transformer with AFT-full in the place of attention; or with AFT-conv, and then without positions and class token, so
that they take any size. The autoregressive net predicts every sub-pixel from those before it in the raster. The layers
are ``vitrail.layers.aft``; the authors have published no code.

Shapes: B images of N patches, h x w; L = N places, or N + 1 with the class token; C channels; T sub-pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.layers.aft import AFT, AFTConv, AFTFull, AFTLocal, AFTSimple, Grid
from vitrail.layers.aft import State as Kept
from vitrail.layers.positions import resampled
from vitrail.models.plain import PlainNet, State, create_plain, plain_cfg, plain_nano_cfg

MIXERS = ("conv", "full")
CAUSAL_MIXERS = ("local", "simple", "full", "conv")
POOLS = ("token", "avg", "")


class Block(nn.Module):
    """An AFT layer, then a feed-forward layer, each normalised before and added to what came in.

    Args:
        dim: C.
        mixer: the layer.
        mlp_ratio: hidden width of the feed-forward layer over C.
        drop: share of what a branch adds that is dropped, in [0, 1).
        drop_path: probability that a branch is left out in training.

    Raises:
        InputError: a feed-forward layer without width.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, mlp_ratio: float, *, drop: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if int(dim * mlp_ratio) < 1:
            raise InputError(
                f"mlp_ratio = {mlp_ratio} is not allowed: give what leaves a hidden width of 1 or more of {dim}"
            )
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Return (B, L, C)."""
        x = x + self.drop_path(self.drop(self.mixer(self.norm1(x), grid)))
        return x + self.drop_path(self.drop(self.mlp(self.norm2(x))))

    def step(self, x: Tensor, state: Kept | None, grid: Grid) -> tuple[Tensor, Kept]:
        """Return the output (B, C) at one more position, and what the layer keeps."""
        mixer: Any = self.mixer
        mixed, state = mixer.step(self.norm1(x), state, grid)
        x = x + self.drop(mixed)
        return x + self.drop(self.mlp(self.norm2(x))), state


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        trunc_normal_(module.weight, std=0.02)


# ---- classification --------------------------------------------------------------------------------------------------


class AFTNet(PlainNet):
    """A classifier with timm's surface; features at one stride after any block, for images of any size.

    Args:
        img_size: side in pixels that AFT-full learns positions and biases for; they are interpolated for other sizes.
        patch_size: side of a patch in pixels; an image that patches do not cover gets zeros at its right and lower
            edges.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        embed_dim: C.
        depth: blocks.
        mixer: ``"conv"``, without positions and class token; or ``"full"``, with both.
        heads: of AFT-conv.
        kernel_size: side of AFT-conv's windows, in patches, odd.
        rank: of AFT-full's biases; None learns all of them, for one size.
        mlp_ratio: hidden width of the feed-forward layers over C.
        global_pool: ``"token"``, ``"avg"`` of the patches, or, only without classifier, ``""``; None is the class token
            where there is one.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: a mixer or a pooling that there is not, or a number that is not allowed.
    """

    BEFORE = r"^(?:cls_token|pos_embed|patch_embed)"

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        mixer: str = "conv",
        heads: int = 32,
        kernel_size: int = 11,
        rank: int | None = 128,
        mlp_ratio: float = 4.0,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise unknown("mixer", mixer, MIXERS, f"there are {' and '.join(MIXERS)}")
        numbers = {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim, "depth": depth}
        for name, value in numbers.items():
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        self.num_features = self.head_hidden_size = embed_dim
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, flatten=False, strict_img_size=False, dynamic_img_pad=True
        )
        side = -(-img_size // patch_size)
        self.grid = (side, side)
        self.cls_token = self.pos_embed = None
        if mixer == "full":
            self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
            self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, 1 + side * side, embed_dim), std=0.02))
        self.num_prefix_tokens = int(mixer == "full")

        def layer() -> AFT:
            if mixer == "conv":
                return AFTConv(embed_dim, heads, kernel_size)
            return AFTFull(embed_dim, self.grid, rank=rank, prefix=1)

        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, layer(), mlp_ratio, drop_path=rate) for rate in rates)
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=1e-6)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self.drop = nn.Dropout(drop_rate)
        own = "token" if mixer == "full" else "avg"
        self.reset_classifier(num_classes, own if global_pool is None else global_pool)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of tensors that are not decayed: of linear layers alone the matrices are."""
        if self.cls_token is None:
            return {"*.mixer.bias.weight"}
        return {"cls_token", "pos_embed", "*.mixer.bias.*"}

    def pools(self) -> tuple[str, ...]:
        """Return what ``global_pool`` may be."""
        return POOLS if self.cls_token is not None else POOLS[1:]

    def begin(self, x: Tensor) -> tuple[State, Grid]:
        """Return the sequence (B, L, C), the class token first, and the grid of its patches, which layers need too."""
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None and self.pos_embed is not None:
            token, patches = self.pos_embed.split([1, self.grid[0] * self.grid[1]], 1)
            places = resampled(patches.unflatten(1, self.grid), grid).flatten(1, 2)
            x = torch.cat([(self.cls_token + token).expand(x.shape[0], -1, -1), x + places], 1)
        return (x, grid), grid

    def pass_through(self, block: nn.Module, *state: Any) -> State:
        """Return the state after a block."""
        return block(*state), state[1]

    def places(self, state: State, grid: tuple[int, ...]) -> Tensor:
        """Return the patches."""
        found: Tensor = state[0][:, self.num_prefix_tokens :]
        return found

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with ``pre_logits`` the pooled features (B, C)."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool:
            x = x[:, self.num_prefix_tokens :].mean(1)
        return x if pre_logits else self.head(self.drop(x))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return our weights as they are; those of a ViT or a DeiT, of the same widths, as an AFT net begins from them.

    As the paper does, positions, class token, queries and keys are left out: what the model has stays.
    """
    state = state_dict.get("model", state_dict)
    if not any(".attn.qkv." in key for key in state):
        return state
    ours = dict(model.state_dict())
    for key, value in state.items():
        name = key.replace(".attn.", ".mixer.")
        if name.endswith((".mixer.qkv.weight", ".mixer.qkv.bias")):
            dim = len(value) // 3
            ours[name] = torch.cat([ours[name][:-dim], value[-dim:].to(ours[name])])
        elif name not in ("cls_token", "pos_embed"):
            ours[name] = value
    return ours


# ---- images as sequences ---------------------------------------------------------------------------------------------


class PixelAFT(nn.Module):
    """An autoregressive net of images: every sub-pixel has a probability given those before it in the raster.

    The colours of a pixel follow each other; embeddings and the head are the same for all of them.

    Args:
        img_size: side in pixels, or height and width.
        in_chans: colours.
        levels: values of a sub-pixel.
        embed_dim: C.
        depth: blocks.
        mixer: ``"local"`` as published, ``"simple"``, ``"full"`` or ``"conv"``, the latter with windows on the plane of
            rows and sub-pixels.
        window: of AFT-local, in sub-pixels.
        rank: of the biases of AFT-local and AFT-full; None learns all T x T.
        heads: of AFT-conv.
        kernel_size: of AFT-conv, rows and sub-pixels, odd; or the side of a square.
        mlp_ratio: hidden width of the feed-forward layers over C.
        drop_rate: dropout of the embedding and of what blocks add, in [0, 1).

    Raises:
        InputError: a mixer that there is not, or a number that is not allowed.
    """

    def __init__(
        self,
        img_size: int | Grid = 32,
        in_chans: int = 3,
        levels: int = 256,
        embed_dim: int = 256,
        depth: int = 24,
        mixer: str = "local",
        window: int = 256,
        rank: int | None = 64,
        heads: int = 16,
        kernel_size: int | Grid = 11,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        if mixer not in CAUSAL_MIXERS:
            raise unknown("mixer", mixer, CAUSAL_MIXERS, f"there are {', '.join(CAUSAL_MIXERS)}")
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        numbers = {
            "img_size": min(size),
            "in_chans": in_chans,
            "levels": levels,
            "embed_dim": embed_dim,
            "depth": depth,
        }
        for name, value in numbers.items():
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        if not 0 <= drop_rate < 1:
            raise InputError(f"drop_rate = {drop_rate} is not allowed: give a rate in [0, 1)")
        self.shape, self.levels = (in_chans, *size), levels
        self.grid = (size[0], size[1] * in_chans)
        self.length = math.prod(self.shape)

        def layer() -> AFT:
            if mixer == "conv":
                return AFTConv(embed_dim, heads, kernel_size, causal=True)
            if mixer == "simple":
                return AFTSimple(embed_dim, causal=True)
            if mixer == "full":
                return AFTFull(embed_dim, self.length, rank=rank, causal=True)
            return AFTLocal(embed_dim, self.length, window=window, rank=rank, causal=True)

        self.embed = nn.Embedding(levels + 1, embed_dim)  # the last is what comes before the first sub-pixel
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(self.length, embed_dim), std=0.02))
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(Block(embed_dim, layer(), mlp_ratio, drop=drop_rate) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, levels)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of tensors that are not decayed: of linear layers alone the matrices are."""
        biases = {name.replace("blocks.0.", "*.", 1) for name, _ in self.named_parameters() if ".0.mixer.bias." in name}
        return {"embed.weight", "pos_embed"} | biases

    def sequence(self, images: Tensor) -> Tensor:
        """Return the sub-pixels (B, T) of images, as class numbers.

        Args:
            images: whole numbers from 0 to below ``levels``, (B, in_chans, H, W).

        Raises:
            InputError: images of another shape or type, or with other values.
        """
        if images.is_floating_point() or tuple(images.shape[1:]) != self.shape:
            raise InputError(
                f"images {tuple(images.shape)} of {images.dtype} are not allowed: give whole numbers of shape "
                f"(B, {', '.join(str(side) for side in self.shape)})"
            )
        values = images.permute(0, 2, 3, 1).flatten(1).long()
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.levels:
            raise InputError(
                f"images with values of {int(values.min())} to {int(values.max())}: give 0 to {self.levels - 1}"
            )
        return values

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every sub-pixel given those before it, (B, T, levels).

        Args:
            images: as of ``sequence``.
        """
        return self.logits(self.sequence(images))

    def logits(self, values: Tensor) -> Tensor:
        """Return the logits (B, T, levels) of sub-pixels (B, T)."""
        before = F.pad(values[:, :-1], (1, 0), value=self.levels)
        x = self.drop(self.embed(before) + self.pos_embed)
        for block in self.blocks:
            x = block(x, self.grid)
        return self.head(self.norm(x))

    def bits_per_dim(self, images: Tensor) -> Tensor:
        """Return the negative log-likelihood of each image in bits for each of its sub-pixels, (B,).

        Its mean is what is minimised in training.

        Args:
            images: as of ``sequence``.
        """
        values = self.sequence(images)
        nats = F.cross_entropy(self.logits(values).float().flatten(0, 1), values.flatten(), reduction="none")
        return nats.view(values.shape).mean(1) / math.log(2)

    def step(self, values: Tensor | None, states: list[Kept] | None, batch: int = 1) -> tuple[Tensor, list[Kept]]:
        """Return the logits (B, levels) of the next sub-pixel, and what the layers keep.

        What AFT-simple keeps, AFT-local and, on its rows, AFT-conv does not grow with the sub-pixels before.

        Args:
            values: the sub-pixel before, (B,); None at the first.
            states: of the step before; None at the first.
            batch: B, at the first step.
        """
        place = states[0].time if states else 0
        if values is None:
            values = torch.full((batch,), self.levels, device=self.pos_embed.device)
        x = self.drop(self.embed(values) + self.pos_embed[place])
        kept = []
        for number, block in enumerate(self.blocks):
            x, after = block.step(x, states[number] if states else None, self.grid)  # type: ignore[operator]
            kept.append(after)
        return self.head(self.norm(x)), kept

    @torch.no_grad()
    def sample(self, count: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, sub-pixel by sub-pixel; in evaluation mode.

        Args:
            count: images.
            temperature: what logits are divided by; above 0.
            generator: of the draws.

        Returns:
            (count, in_chans, H, W) of int64, from 0 to below ``levels``.

        Raises:
            InputError: a count or a temperature that is not allowed.
        """
        if count < 1 or not temperature > 0:
            raise InputError(f"count = {count} and temperature = {temperature}: give 1 image or more, and above 0")
        training = self.training
        self.eval()
        values: list[Tensor] = []
        states = None
        for _ in range(self.length):
            logits, states = self.step(values[-1] if values else None, states, count)
            shares = (logits.float() / temperature).softmax(-1)
            values.append(torch.multinomial(shares, 1, generator=generator)[:, 0])
        self.train(training)
        colours, height, width = self.shape
        return torch.stack(values, 1).view(count, height, width, colours).permute(0, 3, 1, 2)


def jittered(images: Tensor, *, most: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """Return images as the autoregressive net is trained on: each flipped or not, and made lighter or darker.

    Args:
        images: (B, in_chans, H, W), from 0 to 255.
        most: that is added to or taken from all sub-pixels of an image; they stay from 0 to 255.
        generator: of the draws.
    """
    flipped = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
    added = torch.randint(-most, most + 1, (len(images), 1, 1, 1), generator=generator).to(images.device)
    return (torch.where(flipped, images.flip(3), images).long() + added).clamp(0, 255)


# ---- the variants ----------------------------------------------------------------------------------------------------

_OWN: dict[str, Any] = {"first_conv": "patch_embed.proj"}
_SMALL: dict[str, Any] = {"embed_dim": 384}
default_cfgs = generate_default_cfgs(
    {
        "aft_conv_nano": plain_nano_cfg(**_OWN),
        "aft_full_tiny": plain_cfg(**_OWN),
        "aft_full_small": plain_cfg(**_OWN),
        "aft_conv_tiny_32_11": plain_cfg(**_OWN),
        "aft_conv_tiny_192_11": plain_cfg(**_OWN),
        "aft_conv_small_16_11": plain_cfg(**_OWN),
        "aft_conv_small_384_11": plain_cfg(**_OWN),
        "aft_conv_small_384_15": plain_cfg(**_OWN),
        "aft_conv_base_32_25": plain_cfg(384, crop_pct=1.0, **_OWN),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> AFTNet:
    net: AFTNet = create_plain(AFTNet, variant, pretrained, checkpoint_filter_fn, maps=3, **kwargs)
    return net


@register_model
def aft_conv_nano(pretrained: bool = False, **kwargs: Any) -> AFTNet:
    """0.2 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "heads": 8, "kernel_size": 5}
    return _create("aft_conv_nano", pretrained, **{**own, **kwargs})


@register_model
def aft_full_tiny(pretrained: bool = False, **kwargs: Any) -> AFTNet:
    """6.3 M parameters; biases between all positions, factorised with 128 numbers each."""
    return _create("aft_full_tiny", pretrained, **{"mixer": "full", **kwargs})


@register_model
def aft_full_small(pretrained: bool = False, **kwargs: Any) -> AFTNet:
    """22.7 M parameters."""
    return _create("aft_full_small", pretrained, **{**_SMALL, "mixer": "full", **kwargs})


@register_model
def aft_conv_tiny_32_11(pretrained: bool = False, **kwargs: Any) -> AFTNet:
    """5.4 M parameters; 32 heads with windows of 11 x 11."""
    return _create("aft_conv_tiny_32_11", pretrained, **kwargs)


@register_model
def aft_conv_tiny_192_11(pretrained: bool = False, **kwargs: Any) -> AFTNet:
    """6.0 M parameters; a window for each channel."""
    return _create("aft_conv_tiny_192_11", pretrained, **{"heads": 192, **kwargs})


@register_model
def aft_conv_small_16_11(pretrained: bool = False, **kwargs: Any) -> AFTNet:
    """20.3 M parameters; 16 heads."""
    return _create("aft_conv_small_16_11", pretrained, **{**_SMALL, "heads": 16, **kwargs})


@register_model
def aft_conv_small_384_11(pretrained: bool = False, **kwargs: Any) -> AFTNet:
    """22.5 M parameters; a window for each channel."""
    return _create("aft_conv_small_384_11", pretrained, **{**_SMALL, "heads": 384, **kwargs})


@register_model
def aft_conv_small_384_15(pretrained: bool = False, **kwargs: Any) -> AFTNet:
    """23.0 M parameters; windows of 15 x 15."""
    return _create("aft_conv_small_384_15", pretrained, **{**_SMALL, "heads": 384, "kernel_size": 15, **kwargs})


@register_model
def aft_conv_base_32_25(pretrained: bool = False, **kwargs: Any) -> AFTNet:
    """79.9 M parameters, for 384 pixels; in the paper it begins from DeiT's weights."""
    own = {"img_size": 384, "embed_dim": 768, "kernel_size": 25}
    return _create("aft_conv_base_32_25", pretrained, **{**own, **kwargs})
