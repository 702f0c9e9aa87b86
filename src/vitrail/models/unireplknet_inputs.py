"""What UniRepLKNet takes besides images: sound, video, point clouds and time series, each made into an image first.

Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and
Image Recognition" (CVPR 2024), arXiv 2311.15599, section "Generalizing UniRepLKNet beyond Image", and the folders
Audio, Video, Point and Time-Series of the authors' code. The net behind the embedding is the one for images, unchanged
but for its input channels: ``nn.Sequential(AudioImage(), unireplknet_s(in_chans=1, num_classes=35))`` hears commands.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from vitrail.errors import InputError


def _check(x: Tensor, form: str, *, axes: int, last: int | None = None) -> None:
    if x.ndim != axes or (last is not None and x.shape[-1] != last):
        raise InputError(f"an input of shape {tuple(x.shape)} is not allowed: give {form}")


# ---- sound -----------------------------------------------------------------------------------------------------------

QUIET = torch.finfo(torch.float32).eps
"""The least energy that has a logarithm."""


def mel_windows(bins: int, points: int, rate: int) -> Tensor:
    """Return triangles (bins, points / 2), evenly spaced in mel from 20 Hz to half the rate, over a spectrum's bins."""

    def mel(frequency: Tensor) -> Tensor:
        return 1127 * torch.log1p(frequency / 700)

    ends = mel(torch.tensor([20.0, rate / 2], dtype=torch.float64))
    corners = torch.linspace(float(ends[0]), float(ends[1]), bins + 2, dtype=torch.float64)
    left, middle, right = (corners[i : i + bins, None] for i in range(3))
    place = mel(torch.arange(points // 2, dtype=torch.float64) * rate / points)
    rise, fall = (place - left) / (middle - left), (right - place) / (right - middle)
    return torch.minimum(rise, fall).clamp_min(0).float()


class AudioImage(nn.Module):
    """Log-mel spectrogram as an image of one channel, as Kaldi computes it: frequencies by time.

    Windows of 25 ms every 10 ms lose their mean, are pre-emphasised (0.97) and weighted by Hann; the logarithms of
    their energies in mel bands are cut or filled with zeros to a number of frames and normalised to half a standard
    deviation. In training a band of each may be silenced (SpecAugment), before normalisation.

    Args:
        rate: samples a second.
        bins: mel bands F.
        frames: T.
        mean, std: of the log energies; the authors' are those of Speech Commands v2.
        frequency_mask, time_mask: widest bands that are silenced in training; the authors take 48 and 48.
    """

    mels: Tensor
    window: Tensor

    def __init__(
        self,
        rate: int = 16_000,
        bins: int = 128,
        frames: int = 128,
        mean: float = -6.845978,
        std: float = 5.5654526,
        frequency_mask: int = 0,
        time_mask: int = 0,
    ) -> None:
        super().__init__()
        self.length, self.step = int(rate * 0.025), int(rate * 0.01)
        self.points = 1 << (self.length - 1).bit_length()
        self.frames, self.mean, self.std = frames, mean, std
        self.masks = (frequency_mask, time_mask)
        self.register_buffer("window", torch.hann_window(self.length, periodic=False), persistent=False)
        self.register_buffer("mels", mel_windows(bins, self.points, rate), persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        """Return images (B, 1, F, T) of waves (B, samples) in [-1, 1].

        Raises:
            InputError: another shape, or less than one window of samples.
        """
        _check(waves, "waves (B, samples)", axes=2)
        if waves.shape[1] < self.length:
            raise InputError(f"{waves.shape[1]} samples are too few: give {self.length}, one window of 25 ms, or more")
        waves = waves - waves.mean(1, keepdim=True)
        pieces = waves.unfold(1, self.length, self.step)  # (B, frames, window)
        pieces = pieces - pieces.mean(-1, keepdim=True)
        before = torch.cat((pieces[..., :1], pieces[..., :-1]), -1)
        pieces = (pieces - 0.97 * before) * self.window
        energy = torch.fft.rfft(pieces, self.points).abs().square()[..., : self.points // 2]
        image = (energy @ self.mels.T).clamp_min(QUIET).log().transpose(1, 2)  # (B, F, frames)
        image = F.pad(image, (0, self.frames - image.shape[-1]))
        if self.training:
            image = self._silence(image)
        return ((image - self.mean) / (2 * self.std))[:, None]

    def _silence(self, image: Tensor) -> Tensor:
        for axis, most in enumerate(self.masks, start=1):
            count, size = len(image), image.shape[axis]
            width = torch.rand(count, 1, device=image.device) * most
            start = torch.rand(count, 1, device=image.device) * (size - width).clamp_min(0)
            place = torch.arange(size, device=image.device)
            band = (place >= start.floor()) & (place < start.floor() + width.floor())
            image = image.masked_fill(band.unsqueeze(3 - axis), 0.0)
        return image


def audio_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy of logits (B, classes) and targets (B, classes) in [0, 1], which may be mixed."""
    return F.binary_cross_entropy_with_logits(logits, targets)


# ---- video -----------------------------------------------------------------------------------------------------------


def squarest(count: int) -> tuple[int, int]:
    """Return rows <= columns with rows * columns = count, as near to a square as there are."""
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    return rows, count // rows


class VideoImage(nn.Module):
    """Lay the frames of a clip out on one large image: 16 frames of 224 pixels give 896 pixels.

    Args:
        woven: as the authors' code does it, which only reinterprets memory: a row of the image is then made of rows of
            one frame, one behind the other. False is as the paper has it: the frames side by side in reading order.
    """

    def __init__(self, *, woven: bool = False) -> None:
        super().__init__()
        self.woven = woven

    def forward(self, clips: Tensor) -> Tensor:
        """Return images (B, C, rows h, columns w) of clips (B, C, frames, h, w).

        Raises:
            InputError: another shape.
        """
        _check(clips, "clips (B, C, frames, h, w)", axes=5)
        batch, channels, frames, height, width = clips.shape
        rows, columns = squarest(frames)
        if not self.woven:
            clips = clips.unflatten(2, (rows, columns)).transpose(3, 4)  # (B, C, rows, h, columns, w)
        return clips.reshape(batch, channels, rows * height, columns * width)


def video_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, classes) with numbers (B,), smoothed by 0.1, or with mixed targets."""
    return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.ndim == 2 else 0.1)


# ---- point clouds ----------------------------------------------------------------------------------------------------

_Q = math.pi / 4
VIEWS = (
    *((turn * 2 * _Q, 0.0, 2 * _Q) for turn in range(4)),
    *((turn * _Q, tilt * _Q, 2 * _Q) for turn in (5, 7) for tilt in (-1, 1)),
    *((0.0, tilt * 2 * _Q, 2 * _Q) for tilt in (-1, 1)),
)
"""Angles about x, y and z from which a cloud is looked at; the first four go round it."""


def rotation(angles: Tensor) -> Tensor:
    """Return the matrices (V, 3, 3) that turn about z, then y, then x by angles (V, 3) about x, y, z."""
    cos, sin = angles.cos(), angles.sin()
    one, zero = torch.ones_like(cos[:, 0]), torch.zeros_like(cos[:, 0])

    def matrix(*values: Tensor) -> Tensor:
        return torch.stack(values, -1).unflatten(-1, (3, 3))

    (cx, cy, cz), (sx, sy, sz) = cos.unbind(-1), sin.unbind(-1)
    about_x = matrix(one, zero, zero, zero, cx, -sx, zero, sx, cx)
    about_y = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    about_z = matrix(cz, -sz, zero, sz, cz, zero, zero, zero, one)
    return about_x @ about_y @ about_z


def pixels_of(points: Tensor, side: int) -> Tensor:
    """Return row and column (B, P, 2), from 1 to side - 2, of each point's x and y (B, P, 3) on a centred square."""
    low, high = points[..., :2].amin(1, keepdim=True), points[..., :2].amax(1, keepdim=True)
    step = (high - low).amax(-1, keepdim=True).clamp_min(1e-12) / (side - 3)
    place = ((points[..., :2] - low) / step).floor().long().clamp(max=side - 3) + 1
    centre = (place.amax(1, keepdim=True) + place.amin(1, keepdim=True)) // 2
    return place + (side - 1) // 2 - centre


class ViewFusion(nn.Module):
    """Let the views of one cloud attend to each other's 7 x 7 patches, and mix the result with what came in."""

    def __init__(self, dim: int, inside: int = 128, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(dim, inside, 7, 7, bias=False)
        self.norm1 = nn.LayerNorm(inside)
        self.qkv = nn.Linear(inside, 3 * heads * inside, bias=False)
        self.proj = nn.Linear(heads * inside, inside)
        self.mlp = nn.Sequential(
            nn.LayerNorm(inside), nn.Linear(inside, 2 * inside), nn.GELU(), nn.Linear(2 * inside, inside)
        )
        self.back = nn.Sequential(nn.Conv2d(inside, dim, 3, padding=1), nn.GELU())
        self.mix = nn.Sequential(nn.Conv2d(2 * dim, dim, 1), nn.GELU())

    def forward(self, x: Tensor, views: int) -> Tensor:
        """Return (B V, C, side, side)."""
        patches = self.patches(x)
        height, width = patches.shape[-2:]
        tokens = patches.flatten(2).unflatten(0, (-1, views)).transpose(2, 3).flatten(1, 2)  # (B, V h w, c)
        qkv = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        tokens = tokens + self.proj(F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))
        tokens = tokens + self.mlp(tokens)
        patches = tokens.unflatten(1, (views, -1)).flatten(0, 1).transpose(1, 2).unflatten(2, (height, width))
        return self.mix(torch.cat((self.back(F.interpolate(patches, size=x.shape[-2:])), x), 1))


class PointImage(nn.Module):
    """Project a point cloud from several sides onto images of three learnt colours.

    A feature of each point and its neighbours is drawn, as 3 x 3 pixels, where the point is seen; features that meet
    are added. Convolutions and an exchange between the views follow, and the colours are normalised as ImageNet's.

    Args:
        side: pixels of an image, at least 8.
        views: images of a cloud, the first so many of ``VIEWS``.
        neighbours: points, itself among them, that a point's feature sees.
        dim: width of the features, a multiple of 4.

    Raises:
        InputError: numbers out of range.
    """

    turns: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, side: int = 224, views: int = 4, neighbours: int = 32, dim: int = 64) -> None:
        super().__init__()
        if side < 8 or not 1 <= views <= len(VIEWS) or neighbours < 1 or dim < 4 or dim % 4:
            raise InputError(
                f"side = {side}, views = {views}, neighbours = {neighbours}, dim = {dim} are not allowed: give a side "
                f"of 8 or more, 1 to {len(VIEWS)} views, 1 neighbour or more, and a dim that is a multiple of 4"
            )
        self.side, self.views, self.neighbours = side, views, neighbours
        self.register_buffer("turns", rotation(torch.tensor(VIEWS[:views])), persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1), persistent=False)
        self.lift = nn.Linear(3, 8)
        self.edge = nn.Linear(16, dim, bias=False)
        self.edge_norm = nn.GroupNorm(4, dim)
        self.proj = nn.Linear(dim, dim)
        self.image_block = nn.Sequential(BasicBlock(dim, dim), nn.Conv2d(dim, dim, 1))
        self.fusion = ViewFusion(dim)
        self.colour = nn.Conv2d(dim, 3, 1)

    def forward(self, points: Tensor) -> Tensor:
        """Return images (B views, 3, side, side) of points (B, P, 3).

        Raises:
            InputError: another shape, or fewer points than neighbours.
        """
        _check(points, "points (B, P, 3)", axes=3, last=3)
        if points.shape[1] < self.neighbours:
            raise InputError(f"{points.shape[1]} points are too few: give {self.neighbours}, the neighbours, or more")
        seen = points[:, None] @ self.turns.to(points).transpose(1, 2)  # (B, V, P, 3)
        drawn = self._drawn(pixels_of(seen.flatten(0, 1), self.side), self.features(points))
        image = self.colour(self.fusion(self.image_block(drawn), self.views)).sigmoid()
        return (image - self.mean) / self.std

    def features(self, points: Tensor) -> Tensor:
        """Return what each point knows of its neighbours, (B, P, C)."""
        near = torch.cdist(points, points).topk(self.neighbours, largest=False, sorted=False).indices  # (B, P, k)
        own = self.lift(points)  # (B, P, 8)
        batch = torch.arange(len(points), device=points.device)[:, None, None]
        other, own = own[batch, near], own[:, :, None].expand(-1, -1, self.neighbours, -1)
        edges = self.edge(torch.cat((other - own, own), -1))  # (B, P, k, C)
        edges = F.leaky_relu(self.edge_norm(edges.flatten(1, 2).transpose(1, 2)), 0.2)
        return self.proj(edges.unflatten(2, near.shape[1:]).amax(-1).transpose(1, 2))

    def _drawn(self, place: Tensor, features: Tensor) -> Tensor:
        near = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], device=place.device)
        place = place[:, :, None] + near  # (B V, P, 9, 2)
        flat = place[..., 0] * self.side + place[..., 1]
        flat = flat + torch.arange(len(flat), device=flat.device)[:, None, None] * self.side**2
        values = features.repeat_interleave(self.views, 0)[:, :, None].expand(-1, -1, 9, -1)
        image = values.new_zeros(len(place) * self.side**2, values.shape[-1])
        image = image.index_add(0, flat.flatten(), values.flatten(0, 2))
        return image.view(-1, self.side, self.side, values.shape[-1]).permute(0, 3, 1, 2)


class PointClassifier(nn.Module):
    """Classify a point cloud by the images of its views: their features side by side, pooled and normalised.

    Args:
        embed: makes the images.
        net: a net with ``forward_features`` and ``num_features``.
        num_classes: outputs.
    """

    def __init__(self, embed: PointImage, net: Any, num_classes: int) -> None:
        super().__init__()
        self.embed, self.net = embed, net
        width = embed.views * net.num_features
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        """Return logits (B, classes) of points (B, P, 3)."""
        features = self.net.forward_features(self.embed(points)).mean((2, 3))
        return self.head(self.norm(features.unflatten(0, (-1, self.embed.views)).flatten(1)))


def point_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy with class numbers (B,), of which 0.2 goes to the other classes in equal parts."""
    classes = logits.shape[1]
    share = 0.2 / (classes - 1)
    # torch spreads a smoothing over all classes, the right one among them.
    return F.cross_entropy(logits, targets, label_smoothing=share * classes)


# ---- time series -----------------------------------------------------------------------------------------------------


class SeriesImage(nn.Module):
    """Embed windows of time series and read every node's embedding as an image of one channel.

    The values of the moments before, at and after each moment (in a circle) and the features of its date are projected,
    and the place of the node, if it has one, is added: (B, L, n D) becomes (B n, L, D'), and that (B n, 1, H, W) with
    H W = L D'. The authors take L = 48, n = 350, D' = 768 and H = W = 192.

    Args:
        variables: D, series of a node.
        nodes: n.
        dim: D'.
        date_features: numbers that describe a moment's date; 0 is none.
        places: (n, p), coordinates of the nodes, standardised; None is none.
        drop_rate: dropout of the embedding.
    """

    places: Tensor | None

    def __init__(
        self,
        variables: int,
        nodes: int = 1,
        dim: int = 768,
        date_features: int = 4,
        places: Tensor | None = None,
        drop_rate: float = 0.05,
    ) -> None:
        super().__init__()
        self.variables, self.nodes = variables, nodes
        self.value = nn.Conv1d(variables, dim, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.value.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.date = nn.Linear(date_features, dim, bias=False) if date_features else None
        self.register_buffer("places", places, persistent=False)
        self.place = None if places is None else nn.Linear(places.shape[1], dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, series: Tensor, dates: Tensor | None = None) -> Tensor:
        """Return images (B n, 1, H, W) of series (B, L, n D) and the features of their dates (B, L, f).

        Raises:
            InputError: another shape, or dates that are missing or not wanted.
        """
        _check(series, f"series (B, L, {self.nodes} x {self.variables})", axes=3, last=self.nodes * self.variables)
        if (dates is None) != (self.date is None):
            raise InputError("dates and date_features go together: give both, or neither (date_features = 0)")
        batch, length = series.shape[:2]
        x = series.unflatten(-1, (self.nodes, -1)).permute(0, 2, 3, 1).flatten(0, 1)  # (B n, D, L)
        x = self.value(x).transpose(1, 2)  # (B n, L, D')
        if self.date is not None:
            x = x + self.date(dates).repeat_interleave(self.nodes, 0)
        if self.place is not None:
            x = x + self.place(self.places).repeat(batch, 1)[:, None]
        return self.drop(x).reshape(len(x), 1, *squarest(length * x.shape[-1]))


class Forecaster(nn.Module):
    """Forecast time series: normalise the window, embed it as images, and project what the net finds in them.

    Each series is normalised by its own mean and deviation over the window, with a learnt scale and shift per variable,
    and put back behind. The authors' decoder, Corrformer's, is not part of UniRepLKNet: here the last map, which is not
    pooled so that it keeps the phase, goes through one linear layer.

    Args:
        embed: makes the images.
        net: a net for them with ``forward_features``, of one input channel.
        length: L, moments of a window.
        horizon: moments to forecast.
    """

    def __init__(self, embed: SeriesImage, net: Any, length: int, horizon: int) -> None:
        super().__init__()
        self.embed, self.net, self.length, self.horizon = embed, net, length, horizon
        self.scale = nn.Parameter(torch.ones(embed.variables))
        self.shift = nn.Parameter(torch.zeros(embed.variables))
        rows, columns = squarest(length * embed.value.out_channels)
        last = net.feature_info[-1]["reduction"]
        self.head = nn.Linear(net.num_features * -(-rows // last) * -(-columns // last), horizon * embed.variables)
        nn.init.zeros_(self.head.weight)  # begins as the mean of the window
        nn.init.zeros_(self.head.bias)

    def forward(self, series: Tensor, dates: Tensor | None = None) -> Tensor:
        """Return forecasts (B, horizon, n D) of series (B, L, n D) with the features of their dates (B, L, f).

        Raises:
            InputError: a window of another length, or what ``SeriesImage`` does not take.
        """
        if series.shape[1] != self.length:
            raise InputError(f"a window of {series.shape[1]} moments is not allowed: give {self.length}")
        mean = series.mean(1, keepdim=True).detach()
        deviation = (series.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        scale, shift = self.scale.repeat(self.embed.nodes), self.shift.repeat(self.embed.nodes)
        images = self.embed((series - mean) / deviation * scale + shift, dates)
        found = self.head(self.net.forward_features(images).flatten(1))
        found = found.view(-1, self.embed.nodes, self.horizon, self.embed.variables).transpose(1, 2).flatten(2)
        return (found - shift) / (scale + 1e-10) * deviation + mean


def series_loss(forecast: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error of forecasts (B, horizon, n D)."""
    return F.mse_loss(forecast, truth)
