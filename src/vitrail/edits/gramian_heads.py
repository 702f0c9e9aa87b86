"""Gramian attention heads: several light classifiers, whose class tokens are made of how features go together.

Ryu, Han and Lim, "Gramian Attention Heads are Strong yet Efficient Vision Learners" (ICCV 2023), arXiv 2310.16483, and
the authors' code (Lab-LVM/imagenet-models). A head contracts a map to few channels, takes the Gramian matrix of these,
embeds its upper triangle as a class token, lets that attend to the map, and classifies it. The answer is the mean of
what the heads say; ``GramianHeadTraining`` drives them apart while they learn.

Shapes: B images, H x W = L places, C channels, g contracted channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitrail.edits.surgery import Edit
from vitrail.errors import InputError


def gramian(x: Tensor) -> Tensor:
    """Return the upper triangles of the Gramian matrices of maps, of length one.

    Args:
        x: (B, g, ...).

    Returns:
        (B, g (g + 1) / 2), row by row; float32 at least, as products of many places are summed.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return gramian(x.float())
    x = x.flatten(2)
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    products = x @ x.transpose(1, 2) / x.shape[2]
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1], device=x.device).unbind(0)
    return F.normalize(products[:, rows, columns])


class ClassAttention(nn.Module):
    """A class token attends to itself and to all places, in fewer channels than they have.

    Args:
        dim: C.
        width: channels of queries, keys and values together.
        num_heads: of the attention; a divisor of ``width``.
    """

    def __init__(self, dim: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, width, bias=False)
        self.k = nn.Linear(dim, width, bias=False)
        self.v = nn.Linear(dim, width, bias=False)
        self.proj = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the first token's (B, 1, C) of (B, 1 + L, C)."""
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (self.q(x[:, :1]), self.k(x), self.v(x))
        )
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class GroupedMlp(nn.Module):
    """A feed-forward layer in groups of channels, which are shuffled between its two products.

    Args:
        dim: C; the hidden width is 4 C.
        groups: a divisor of C.
    """

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.fc1 = nn.Conv1d(dim, 4 * dim, 1, groups=groups)
        self.fc2 = nn.Conv1d(4 * dim, dim, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 1, C)."""
        hidden = F.gelu(self.fc1(x.transpose(1, 2))).unflatten(1, (-1, self.groups))
        return self.fc2(hidden.transpose(1, 2).flatten(1, 2)).transpose(1, 2)


class GramianHead(nn.Module):
    """One head: contraction, Gramian, class token, attention, classifier.

    Args:
        dim: C.
        num_classes: K.
        gram_dim: g.
        width: channels of the attention.
        groups: of the embedding; a divisor of g (g + 1) / 2 and of C.
        mlp_groups: of the feed-forward layer.
        layer: makes what comes between contraction and Gramian, of (B, g, H, W).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        gram_dim: int,
        width: int,
        groups: int,
        mlp_groups: int,
        layer: Callable[[], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        pairs = gram_dim * (gram_dim + 1) // 2
        self.contraction = nn.Sequential(nn.Conv2d(dim, gram_dim, 1), nn.BatchNorm2d(gram_dim))
        self.layer = layer()
        self.embedding = nn.Sequential(nn.Conv2d(pairs, dim, 1, groups=groups), nn.BatchNorm2d(dim))
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ClassAttention(dim, width, min(8, width))
        self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GroupedMlp(dim, mlp_groups)
        self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-4))
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of a map (B, C, H, W)."""
        pairs = gramian(self.layer(self.contraction(x)))
        token = self.embedding(pairs.to(x.dtype)[:, :, None, None]).flatten(2).transpose(1, 2)  # (B, 1, C)
        tokens = torch.cat((token, x.flatten(2).transpose(1, 2)), 1)
        token = token + self.gamma_1 * self.attn(self.norm1(tokens))
        token = token + self.gamma_2 * self.mlp(self.norm2(token))
        return self.fc(token[:, 0])


class GramianHeads(nn.Module):
    """Several Gramian heads in the place of a classifier; the answer is the mean of theirs.

    Args:
        dim: C.
        num_classes: K.
        heads: their number, 1 or more; published: 5.
        gram_dim: g, 1 or more; published: 192.
        width: channels of the attention in each, a multiple of 8, or less than 8; None takes a quarter of C, as
            published, so rounded.
        groups: of the embedding of the Gramian; published: 8. None takes the most, up to 8, that fit.
        mlp_groups: of the feed-forward layers; published: 4 and 2. None takes the most, up to 4, that fit.
        prefix: tokens before the places of features (B, N, C), which are left out.
        layer: of ``GramianHead``.

    Raises:
        InputError: a number out of range, or groups that do not divide their channels.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        heads: int = 5,
        gram_dim: int = 192,
        width: int | None = None,
        groups: int | None = None,
        mlp_groups: int | None = None,
        prefix: int = 0,
        layer: Callable[[], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        for name, value in {"heads": heads, "gram_dim": gram_dim}.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"gramian_heads: {name} = {value!r} is not allowed: give a whole number from 1")
        pairs = gram_dim * (gram_dim + 1) // 2
        width = max(8, dim // 4 // 8 * 8) if width is None else width
        if width < 1 or width % min(8, width):
            raise InputError(f"gramian_heads: width = {width} is not allowed: give 1 to 8, or a multiple of 8")
        groups = _fitting(8, pairs, dim) if groups is None else groups
        mlp_groups = _fitting(4, dim) if mlp_groups is None else mlp_groups
        if groups < 1 or mlp_groups < 1 or pairs % groups or dim % groups or dim % mlp_groups:
            raise InputError(
                f"gramian_heads: groups = {groups} or mlp_groups = {mlp_groups} does not divide {pairs} pairs of "
                f"channels or a width of {dim}: give divisors, or leave them out"
            )
        self.in_features, self.prefix = dim, prefix
        self.apart = False
        self.heads = nn.ModuleList(
            GramianHead(
                dim,
                num_classes,
                gram_dim=gram_dim,
                width=width,
                groups=groups,
                mlp_groups=mlp_groups,
                layer=layer,
            )
            for _ in range(heads)
        )
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits (B, K), or while ``apart`` each head's (B, heads, K).

        Args:
            x: (B, C, H, W), (B, H, W, C) or (B, N, C).
        """
        if x.ndim == 3:
            x = x[:, self.prefix :].transpose(1, 2)[..., None]
        elif x.shape[1] != self.in_features:
            x = x.movedim(-1, 1)
        logits = torch.stack([head(x) for head in self.heads], 1)
        return logits if self.apart else logits.mean(1)


def _fitting(most: int, *channels: int) -> int:
    return max(n for n in range(1, most + 1) if all(count % n == 0 for count in channels))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def gramian_heads(*, heads: int = 5, gram_dim: int = 192) -> Edit:
    """Return the edit that puts new Gramian attention heads in the place of a model's pooling and classifier.

    Any backbone whose features behind the last stage are a map or tokens can have them. They are trained by the method
    ``ga_heads:GramianHeadTraining``; another method trains their mean answer.

    Args:
        heads: their number, 1 or more; published: 5.
        gram_dim: channels whose Gramian a head takes, 1 or more; published: 192, for features of 688 and more.

    Raises:
        InputError: a number out of range; or, from the edit, a model without a classifier that timm's surface
            tells of (the text lists what it has).

    Example:
        >>> model = gramian_heads(heads=3, gram_dim=48)(timm.create_model("resnet18"))          # doctest: +SKIP
    """
    GramianHeads(8, 1, heads=heads, gram_dim=gram_dim if not isinstance(gram_dim, int) or gram_dim < 1 else 1)

    def edit(model: Any) -> nn.Module:
        surface = all(hasattr(model, name) for name in ("get_classifier", "reset_classifier", "num_features"))
        old = model.get_classifier() if surface else None
        found = [name for name, module in model.named_modules() if module is old]
        weights = [value for value in old.parameters() if value.ndim > 1] if isinstance(old, nn.Module) else []
        if not found or not weights:
            listed = ", ".join(sorted({type(module).__name__ for module in model.modules() if module is not model}))
            raise InputError(f"the edit found no classifier in {type(model).__name__}; its modules are: {listed}")
        width = getattr(old, "in_features", None) or getattr(old, "in_channels", None)
        if width is None or getattr(model, "global_pool", None) == "":
            raise InputError(
                f"gramian_heads takes the place of a model's own pooling and linear classifier, and this "
                f"{type(model).__name__} has another, {type(old).__name__}: leave out the edit that put it there"
            )
        classes, like = model.num_classes, weights[0]
        known = set(model.modules())
        model.reset_classifier(0, "")
        for module in set(model.modules()) - known:
            module.training = model.training
        new = GramianHeads(
            width,
            classes,
            heads=heads,
            gram_dim=gram_dim,
            prefix=int(getattr(model, "num_prefix_tokens", 0)),
        )
        model.set_submodule(found[0], new.to(like.device, like.dtype).train(model.training))
        model.num_classes = classes
        return model

    return edit
