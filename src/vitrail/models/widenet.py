"""WideNet: a transformer of one attention layer and one mixture of experts, which all depths share but for their norms.

Xue, Shi, Wei, Lou, Liu and You, "Go Wider Instead of Deeper" (AAAI 2022), arXiv 2107.11817, and the authors' code
(XueFuzhao/WideNet_Code). Depth costs no parameters but two norms, and what is saved buys experts; since norms differ,
tokens go to other experts at other depths. We follow the code in what the paper does not say: a GELU behind both layers
of an expert, a class token of zeros that the mean includes, and a tanh layer before the classifier. The experts are
``vitrail.layers.experts``; ``vitrail.methods.supervised.balanced_experts`` is the training, with the balance loss.

Shapes: B images, N places of patches and the class token, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.layers.experts import MixtureOfExperts
from vitrail.layers.positions import resampled
from vitrail.models.plain import PlainNet, State, create_plain, padded, plain_cfg, plain_nano_cfg


class Attention(nn.Module):
    """Self-attention of all places.

    Args:
        dim: C.
        num_heads: a divisor of it.
        drop: dropout of what it gives, in [0, 1).
    """

    def __init__(self, dim: int, num_heads: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        # As published: Xavier's rule, applied to weights of (C, heads, C / heads) and its reverse, which it reads as
        # convolutions. They begin smaller than as matrices.
        width = dim // num_heads
        nn.init.uniform_(self.qkv.weight, -1, 1).data.mul_((6 / (dim * (num_heads + width))) ** 0.5)
        nn.init.uniform_(self.proj.weight, -1, 1).data.mul_((6 / (dim * (num_heads + 1))) ** 0.5)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, n, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.drop(self.proj(found.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """What a depth has of its own: two norms, and its stochastic depth."""

    def __init__(self, dim: int, *, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, balance: Tensor, attention: nn.Module, experts: nn.Module) -> State:
        """Return (B, N, C), and the sum of the balance losses so far."""
        x = x + self.drop_path(attention(self.norm1(x)))
        said, own = experts(self.norm2(x))
        return x + self.drop_path(said), balance + own


class WideNet(PlainNet):
    """WideNet with timm's surface, for images of any size.

    Args:
        img_size: side in pixels for which there are positions; those of other sizes are interpolated.
        patch_size: side of a patch in pixels.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 leaves it off.
        embed_dim: C.
        depth: blocks.
        num_heads: a divisor of C.
        hidden: width inside an expert.
        experts: how many; 1 is a plain transformer whose depths share their weights.
        top_k: experts of a token.
        capacity: room of an expert in training over its share of the tokens.
        shared_norms: whether all depths share their norms too, which the paper compares with.
        representation: whether there is a tanh layer before the classifier, as published.
        global_pool: ``"avg"``, of all places and the class token; ``""`` only without classifier.
        drop_rate: dropout before the classifier, in [0, 1).
        proj_drop_rate: dropout of embedded patches, attention and experts, in [0, 1); published: 0.1.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first, in [0, 1).

    Raises:
        InputError: sizes below 1, heads that do not divide C, experts, a rate or a pooling that are not allowed.
    """

    BEFORE = r"^(?:patch_embed|pos_embed|class_pos|attention|experts)"
    BEHIND = r"^(?:norm|representation)\."

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int = 4096,
        experts: int = 4,
        top_k: int = 2,
        capacity: float = 1.2,
        shared_norms: bool = False,
        representation: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "hidden": hidden,
        }
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        if not 0 <= proj_drop_rate < 1:
            raise InputError(f"proj_drop_rate = {proj_drop_rate} is not allowed: give a rate in [0, 1)")
        if num_heads < 1 or embed_dim % num_heads:
            raise InputError(f"num_heads = {num_heads} does not divide a width of {embed_dim}: give a divisor of it")
        side = -(-img_size // patch_size)
        self.num_features = self.head_hidden_size = embed_dim
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        # The class token is zeros and never learns: its position is all that it is.
        self.class_pos = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, side, side, embed_dim))
        self.embed_drop = nn.Dropout(proj_drop_rate)
        self.attention = Attention(embed_dim, num_heads, drop=proj_drop_rate)
        self.experts = MixtureOfExperts(embed_dim, hidden, experts, top_k=top_k, capacity=capacity, drop=proj_drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, drop_path=rate) for rate in rates)
        if shared_norms:
            for block in self.blocks[1:]:
                block.norm1, block.norm2 = self.blocks[0].norm1, self.blocks[0].norm2
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=1e-6)
        self.representation: nn.Module = nn.Identity()
        if representation:
            self.representation = nn.Sequential(_dense(embed_dim, embed_dim, self.class_pos), nn.Tanh())
        self.drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self.reset_classifier(num_classes, global_pool)

    # ---- from image to features

    def begin(self, x: Tensor) -> tuple[State, tuple[int, ...]]:
        """Return the class token and the patches with their positions, a balance loss of 0, and the patches' grid."""
        x = self.patch_embed(padded(x, self.patch_embed.kernel_size))
        grid = (x.shape[2], x.shape[3])
        patches = x.flatten(2).transpose(1, 2) + resampled(self.pos_embed, grid).flatten(1, 2)
        x = torch.cat((self.class_pos.expand(x.shape[0], -1, -1).to(patches.dtype), patches), 1)
        return (self.embed_drop(x), x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))), grid

    def pass_through(self, block: nn.Module, *state: Any) -> State:
        """Return the state after a block, which is given the layers that all share."""
        found: State = block(*state, self.attention, self.experts)
        return found

    def places(self, state: State, grid: tuple[int, ...]) -> Tensor:
        """Return the patches."""
        found: Tensor = state[0][:, 1:]
        return found

    def forward_balanced(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, and the sum of the balance losses of all depths, a scalar: as many as depths if even."""
        state = self.final_state(self.begin(x)[0])
        return self.forward_head(self.end(state)), state[1]

    # ---- classifier

    def no_weight_decay(self) -> set[str]:
        """Return patterns of tensors that are not decayed: positions, and biases of the experts, kept side by side."""
        return {"pos_embed", "class_pos", "experts.experts.fc?_bias"}

    def linear_head(self) -> nn.Linear:
        """Return a new classifier of the pooled features, behind the tanh layer."""
        return _dense(self.num_features, self.num_classes, self.class_pos)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or with ``pre_logits`` what the classifier takes, (B, C)."""
        if not self.global_pool:
            return x
        pooled: Tensor = self.representation(x.mean(1))
        return pooled if pre_logits else self.head(self.drop(pooled))


def _dense(before: int, after: int, like: Tensor) -> nn.Linear:
    """Return a linear layer that begins as Keras' do, on the device and of the type of a weight."""
    layer = nn.Linear(before, after, device=like.device, dtype=like.dtype)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---- the variants ----------------------------------------------------------------------------------------------------

default_cfgs = generate_default_cfgs(
    {
        "widenet_nano": plain_nano_cfg(),
        "widenet_base": plain_cfg(),
        "widenet_large": plain_cfg(),
        "widenet_huge": plain_cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> WideNet:
    net: WideNet = create_plain(WideNet, variant, pretrained, **kwargs)
    return net


@register_model
def widenet_nano(pretrained: bool = False, **kwargs: Any) -> WideNet:
    """0.1 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    own = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "hidden": 128}
    return _create("widenet_nano", pretrained, **{**own, **kwargs})


@register_model
def widenet_base(pretrained: bool = False, **kwargs: Any) -> WideNet:
    """30 M parameters, of which 25 M are four experts."""
    return _create("widenet_base", pretrained, **kwargs)


@register_model
def widenet_large(pretrained: bool = False, **kwargs: Any) -> WideNet:
    """41 M parameters, for 24 depths."""
    return _create("widenet_large", pretrained, **{"embed_dim": 1024, "depth": 24, "num_heads": 16, **kwargs})


@register_model
def widenet_huge(pretrained: bool = False, **kwargs: Any) -> WideNet:
    """63 M parameters, for 32 depths."""
    own = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "hidden": 5120}
    return _create("widenet_huge", pretrained, **{**own, **kwargs})
