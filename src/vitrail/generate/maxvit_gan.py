"""MaxViT-GAN: a generator of images whose every stage attends over the whole image, then locally, then convolves.

Tu et al., "MaxViT: Multi-Axis Vision Transformer" (ECCV 2022), arXiv 2204.01697, sections 4.4, A.4 and B.4. A latent
code becomes a map of 8 x 8 places; in each stage the map attends to an embedding of the code, which modulates it, and
goes through blocks of MaxViT with their order reversed and batch normalisation throughout; shuffled pixels double its
sides. What the paper does not say is as in the earlier GAN that it follows (google-research/hit-gan).

Shapes: B images, H x W places, C channels, E channels of the embedding, Z numbers of a latent code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_tf_
from timm.models.maxxvit import MbConvBlock, PartitionAttention2d, model_cfgs
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitrail.errors import InputError, RunError, unknown

START = 8
"""Places on a side of the first map, and of blocks and grids."""
TOKENS = 16
"""Places of the embedding."""
EPS = 1e-3
"""Of batch normalisation."""
ORDERS = {"GA-BA-C": ("grid", "block", "conv"), "C-BA-GA": ("conv", "block", "grid")}
"""Orders of grid attention, block attention and convolution that the paper compares; the first is its generator's."""

# ---- the generator ---------------------------------------------------------------------------------------------------


def _norm(dim: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=EPS)


class CrossAttention(nn.Module):
    """Attention of a map to an embedding, then a feed-forward layer; all heads share their keys and values.

    Args:
        dim: C.
        embed_dim: E.
        dim_head: width of a head; it divides C.
    """

    def __init__(self, dim: int, embed_dim: int, dim_head: int) -> None:
        super().__init__()
        self.dim_head = dim_head
        self.norm1 = _norm(dim)
        self.query = nn.Conv2d(dim, dim, 1)
        self.key_value = nn.Linear(embed_dim, 2 * dim_head)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.norm2 = _norm(dim)
        self.mlp = nn.Sequential(nn.Conv2d(dim, 4 * dim, 1), nn.GELU(), nn.Conv2d(4 * dim, dim, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, C, H, W) of a map (B, C, H, W) and an embedding (B, N, E)."""
        query = self.query(self.norm1(x)).flatten(2).unflatten(1, (-1, self.dim_head)).transpose(2, 3)
        key, value = self.key_value(embedding)[:, None].chunk(2, dim=3)  # (B, 1, N, d)
        heads = (-1, query.shape[1], -1, -1)
        y = F.scaled_dot_product_attention(query, key.expand(heads), value.expand(heads))  # (B, n, H W, d)
        x = x + self.proj(y.transpose(2, 3).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class GeneratorStage(nn.Module):
    """Cross-attention, then blocks of MaxViT.

    Args:
        dim, embed_dim, dim_head: as for ``CrossAttention``.
        depth: blocks.
        order: one of ``ORDERS``.
    """

    def __init__(self, dim: int, embed_dim: int, dim_head: int, depth: int, order: str) -> None:
        super().__init__()
        published = model_cfgs["maxvit_tiny_tf"]
        attention = replace(
            published.transformer_cfg,
            dim_head=dim_head,
            window_size=(START, START),
            grid_size=(START, START),
            norm_layer="batchnorm2d",
            norm_eps=EPS,
        )
        self.cross = CrossAttention(dim, embed_dim, dim_head)
        self.blocks = nn.Sequential(
            *(
                MbConvBlock(dim, dim, cfg=published.conv_cfg)
                if part == "conv"
                else PartitionAttention2d(dim, part, attention)
                for _ in range(depth)
                for part in ORDERS[order]
            )
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, C, H, W) of a map (B, C, H, W) and an embedding (B, N, E)."""
        return self.blocks(self.cross(x, embedding))


class MaxViTGenerator(nn.Module):
    """The generator of MaxViT-GAN.

    Args:
        latent_dim: Z.
        channels: width of each stage, from the map of 8 x 8 places on; each doubles its sides, so that five make images
            of 128 pixels. One that is followed by another is a multiple of 4.
        depth: blocks of each stage.
        dim_head: width of a head; it divides all of ``channels``.
        order: of the parts of a block, one of ``ORDERS``.

    Attributes:
        image_size: side of the images, in pixels.

    Raises:
        InputError: a latent code of no numbers, no stage, no block, heads that do not divide a width, or another order.

    Example:
        >>> MaxViTGenerator(channels=(64, 32), depth=1)(torch.randn(2, 256)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        latent_dim: int = 256,
        channels: Sequence[int] = (256, 256, 128, 128, 64),
        depth: int = 2,
        dim_head: int = 32,
        order: str = "GA-BA-C",
    ) -> None:
        super().__init__()
        _refuse(latent_dim, channels, depth, dim_head, order)
        self.latent_dim = latent_dim
        self.image_size = START * 2 ** (len(channels) - 1)
        width = channels[0]
        self.start = nn.Linear(latent_dim, width * START**2)
        self.embed = nn.Linear(latent_dim, width * TOKENS)
        self.position = nn.Parameter(trunc_normal_tf_(torch.empty(1, TOKENS, width), std=0.02))
        self.embed_norm = nn.BatchNorm1d(width, eps=EPS)
        self.stages = nn.ModuleList(GeneratorStage(dim, width, dim_head, depth, order) for dim in channels)
        self.upsample = nn.ModuleList(
            nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(dim // 4, wide, 1) if dim // 4 != wide else nn.Identity())
            for dim, wide in itertools.pairwise(channels)
        )
        self.to_rgb = nn.Sequential(_norm(channels[-1]), nn.Conv2d(channels[-1], 3, 1))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                trunc_normal_tf_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, latent: Tensor) -> Tensor:
        """Return images (B, 3, S, S), about -1 to 1, of latent codes (B, Z), standard normal."""
        x = self.start(latent).unflatten(1, (-1, START, START))
        embedding = self.embed(latent).unflatten(1, (TOKENS, -1)) + self.position
        embedding = self.embed_norm(embedding.transpose(1, 2)).transpose(1, 2)  # (B, N, E)
        for stage, upsample in itertools.zip_longest(self.stages, self.upsample):
            x = stage(x, embedding)
            if upsample is not None:
                x = upsample(x)
        return self.to_rgb(x)


def _refuse(latent_dim: int, channels: Sequence[int], depth: int, dim_head: int, order: str) -> None:
    if order not in ORDERS:
        raise unknown("order of a generator's blocks", order, ORDERS)
    if latent_dim < 1 or not channels or depth < 1:
        raise InputError(
            f"maxvit_gan: latent_dim = {latent_dim}, channels = {tuple(channels)} and depth = {depth} are not allowed: "
            "give 1 number, stage and block or more"
        )
    for width in channels:
        if dim_head < 1 or width % dim_head or width < dim_head:
            raise InputError(
                f"maxvit_gan: dim_head = {dim_head} does not divide a width of {width}: give a divisor of all channels"
            )
    if any(width % 4 for width in channels[:-1]):
        raise InputError(
            f"maxvit_gan: channels = {tuple(channels)} cannot be shuffled: give multiples of 4 but for the last"
        )


# ---- the discriminator -----------------------------------------------------------------------------------------------


class Blur(nn.Module):
    """Halve a map of even sides with a binomial filter of 4 x 4 places."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", row[:, None] * row, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H / 2, W / 2) of (B, C, H, W)."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)


class DiscriminatorBlock(nn.Module):
    """A residual block that halves the sides of a map.

    Args:
        dim, dim_out: channels before and after it.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.skip = nn.Sequential(Blur(), nn.Conv2d(dim, dim_out, 1, bias=False))
        self.convs = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.LeakyReLU(0.2),
            Blur(),
            nn.Conv2d(dim, dim_out, 3, padding=1),
            nn.LeakyReLU(0.2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', H / 2, W / 2) of (B, C, H, W)."""
        return (self.convs(x) + self.skip(x)) / math.sqrt(2.0)


class Discriminator(nn.Module):
    """The residual discriminator of StyleGAN2 as the authors' earlier GAN has it.

    Args:
        channels: width at each size of the map, from the image's down to 4 x 4 places; each halves its sides, so that
            six are for images of 128 pixels.

    Attributes:
        image_size: side of the images, in pixels.

    Raises:
        InputError: fewer than two widths, or one of no channels.
    """

    def __init__(self, channels: Sequence[int] = (128, 256, 512, 512, 512, 512)) -> None:
        super().__init__()
        if len(channels) < 2 or min(channels) < 1:
            raise InputError(
                f"maxvit_gan: channels = {tuple(channels)} of a discriminator are not allowed: give two widths or more"
            )
        self.image_size = 4 * 2 ** (len(channels) - 1)
        last = channels[-1]
        self.convs = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, padding=1),
            nn.LeakyReLU(0.2),
            *(DiscriminatorBlock(dim, dim_out) for dim, dim_out in itertools.pairwise(channels)),
            nn.Conv2d(last, last, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.head = nn.Sequential(nn.Linear(16 * last, last), nn.LeakyReLU(0.2), nn.Linear(last, 1))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return a logit for each image, (B,), larger for what looks real, of images (B, 3, S, S)."""
        return self.head(self.convs(images).flatten(1)).squeeze(1)


# ---- training --------------------------------------------------------------------------------------------------------

LOSSES = ("non-saturating", "hinge")


def generator_loss(fake: Tensor, kind: str = "non-saturating") -> Tensor:
    """Return the loss of a generator, a mean over images.

    Args:
        fake: the discriminator's logits of generated images (B,).
        kind: one of ``LOSSES``.

    Raises:
        InputError: another kind.
    """
    _known(kind)
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "non-saturating") -> Tensor:
    """Return the loss of a discriminator without its penalty, a mean over images.

    Args:
        real, fake: its logits of real and of generated images (B,).
        kind: one of ``LOSSES``.

    Raises:
        InputError: another kind.
    """
    _known(kind)
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def _known(kind: str) -> None:
    if kind not in LOSSES:
        raise unknown("loss of a GAN", kind, LOSSES)


class GanTraining:
    """Adversarial training of a generator, as published: both networks learn in one step, from one set of images.

    Args:
        generator, discriminator: for images of one size.
        loss: one of ``LOSSES``; the first as published.
        penalty: weight of the squared gradient of the discriminator's logits at real images (R1), 0 or more.
        lr: learning rate of both optimisers (Adam with betas of 0 and 0.99), positive.
        ema: decay of the moving average of the generator, whose images ``sample`` gives, in [0, 1). The first ten
            steps take the weights themselves.

    Raises:
        InputError: networks for images of two sizes, or a value out of its range.

    Example:
        >>> gan = GanTraining(MaxViTGenerator(), Discriminator())
        >>> for images in batches:  # (B, 3, 128, 128), -1 to 1
        ...     terms = gan.step(images)
    """

    def __init__(
        self,
        generator: MaxViTGenerator,
        discriminator: Discriminator,
        *,
        loss: str = "non-saturating",
        penalty: float = 10.0,
        lr: float = 1e-4,
        ema: float = 0.999,
    ) -> None:
        _known(loss)
        if generator.image_size != discriminator.image_size:
            raise InputError(
                f"maxvit_gan: the generator makes images of {generator.image_size} pixels and the discriminator takes "
                f"{discriminator.image_size}: give channels for one size"
            )
        if penalty < 0 or lr <= 0 or not 0 <= ema < 1:
            raise InputError(
                f"maxvit_gan: penalty = {penalty}, lr = {lr} and ema = {ema} are not allowed: give 0 or more, a "
                "positive number, and a number from 0 to below 1"
            )
        self.generator, self.discriminator = generator.train(), discriminator.train()
        self.loss, self.penalty = loss, penalty
        self.average = ModelEmaV3(generator, decay=ema, update_after_step=9)
        self.optimizers = [
            torch.optim.Adam(net.parameters(), lr=lr, betas=(0.0, 0.99)) for net in (generator, discriminator)
        ]
        self.steps = 0

    def step(self, images: Tensor) -> dict[str, float]:
        """Learn from a batch.

        Args:
            images: real ones (B, 3, S, S), from -1 to 1, of as many pixels as the generator's; B is 2 or more.

        Returns:
            The losses ``"generator"`` and ``"discriminator"``, and the weighted ``"penalty"``, which is not in them.

        Raises:
            InputError: images of another shape.
            RunError: a loss is not finite; nothing was learned from this batch.
        """
        side = self.generator.image_size
        if images.ndim != 4 or len(images) < 2 or images.shape[1:] != (3, side, side):
            raise InputError(
                f"maxvit_gan: images of shape {tuple(images.shape)} are not allowed: give (B, 3, {side}, {side}) with "
                "2 images or more"
            )
        latent = torch.randn(len(images), self.generator.latent_dim, device=images.device, dtype=images.dtype)
        fake = self.discriminator(self.generator(latent))
        real, penalty = self._judge_real(images)
        losses = {
            "generator": generator_loss(fake, self.loss),
            "discriminator": discriminator_loss(real, fake, self.loss),
            "penalty": penalty,
        }
        terms = {name: float(value.detach()) for name, value in losses.items()}
        self.steps += 1
        wrong = [name for name, value in terms.items() if not math.isfinite(value)]
        if wrong:
            raise RunError(f"maxvit_gan: at step {self.steps} the {wrong[0]} term is not finite: lower lr")
        # Both gradients are taken before either network moves.
        nets = (self.generator, self.discriminator)
        for net, loss in zip(nets, (losses["generator"], losses["discriminator"] + penalty)):
            parameters = list(net.parameters())
            for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
                parameter.grad = slope
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(self.generator, step=self.steps)
        return terms

    def _judge_real(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of real images (B,), and the penalty on their gradients."""
        images = images.detach().requires_grad_()
        real = self.discriminator(images)
        if not self.penalty:
            return real, real.new_zeros(())
        (slope,) = torch.autograd.grad(real.sum(), images, create_graph=True)
        return real, self.penalty * slope.square().sum((1, 2, 3)).mean()

    def fit(self, batches: Iterable[Tensor]) -> list[dict[str, float]]:
        """Take a step for each batch of images, and return the terms of all."""
        return [self.step(images) for images in batches]

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Return new images (count, 3, S, S) from -1 to 1, of the averaged generator.

        Args:
            count: 1 or more.
            seed: of the latent codes.

        Raises:
            InputError: no image is asked for.
        """
        if count < 1:
            raise InputError(f"maxvit_gan: count = {count} is not allowed: give 1 or more")
        place = next(self.generator.parameters())
        latent = torch.randn(count, self.generator.latent_dim, generator=torch.Generator().manual_seed(seed))
        images: Any = self.average.module.eval()(latent.to(place))
        return images.clamp(-1, 1)
