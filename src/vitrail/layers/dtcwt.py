"""One level of the dual-tree complex wavelet transform of maps: six directions of complex detail, and its inverse.

Kingsbury, "Complex Wavelets for Shift Invariant Analysis and Filtering of Signals" (2001), and Selesnick, Baraniuk and
Kingsbury, "The Dual-Tree Complex Wavelet Transform" (2005). The first level has symmetric filters of odd length and no
decimation of the low band; the four phases of a detail band are the real and imaginary parts of the two trees. The
filters are Kingsbury's near-symmetric ones of 13 and 19 taps (``near_sym_b``), exact here as ratios of integers.

Filtering along one axis is a product with a matrix that holds the extension at the border, too: on the maps of nets,
of tens of places, that is several times faster than depthwise convolutions.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

LOW_ANALYSIS = ((-9, 0, 114, -240, -247, 1520, 2844), 5120)
"""The first taps up to the middle one, as multiples of 1 / 5120."""
LOW_SYNTHESIS = ((81, 0, -1539, -2160, 8208, 27360, -63816, -59280, 343786, 641600), 1146880)


def _taps(half: tuple[tuple[int, ...], int]) -> Tensor:
    first = torch.tensor(half[0], dtype=torch.float64) / half[1]
    return torch.cat((first, first[:-1].flip(0)))


def _modulated(taps: Tensor) -> Tensor:
    """Return the filter moved by half the sampling rate: the high band's, of a low one of the other bank."""
    offsets = torch.arange(len(taps)) - len(taps) // 2
    return taps * (1 - 2 * (offsets % 2))


def _filtering(taps: Tensor, length: int) -> Tensor:
    """Return the matrix (n, n) that filters n values, which go on beyond both ends as in a mirror behind the end."""
    reach = len(taps) // 2
    places = torch.arange(length)[:, None] + torch.arange(-reach, reach + 1)
    places = places % (2 * length)
    places = torch.minimum(places, 2 * length - 1 - places)
    return taps.new_zeros(length, length).scatter_add_(1, places, taps.expand(length, -1))


def analysis_matrix(length: int) -> Tensor:
    """Return the matrix (2 n, n) to the low band of n values and, behind it, the high one; float64."""
    return torch.cat([_filtering(taps, length) for taps in (_taps(LOW_ANALYSIS), _modulated(_taps(LOW_SYNTHESIS)))])


def synthesis_matrix(length: int) -> Tensor:
    """Return the matrix (n, 2 n) from both bands back to n values; float64."""
    return torch.cat([_filtering(taps, length) for taps in (_taps(LOW_SYNTHESIS), _modulated(_taps(LOW_ANALYSIS)))], 1)


class DualTree(nn.Module):
    """One level of the transform and its inverse, in float32 at least.

    Args:
        size: height and width of the maps it is meant for, whose matrices it keeps; others are allowed.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        for axis, side in enumerate(size):
            side += side % 2
            self.register_buffer(f"analysis{axis}", analysis_matrix(side).float(), persistent=False)
            self.register_buffer(f"synthesis{axis}", synthesis_matrix(side).float(), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take a map apart.

        Args:
            x: (B, H, W, C); an odd side is made even by its last row or column again.

        Returns:
            The low band (B, 2 h, 2 w, C), not decimated, and the complex bands of details along 15, 45, 75, 105, 135
            and 165 degrees, (6, B, h, w, C, 2), where h and w are H / 2 and W / 2, rounded up.
        """
        with _exactly(x):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            below, right = x.shape[1] % 2, x.shape[2] % 2
            if below:
                x = torch.cat((x, x[:, -1:]), 1)
            if right:
                x = torch.cat((x, x[:, :, -1:]), 2)
            height, width = x.shape[1:3]
            down, across = self._matrix("analysis", 0, height, x), self._matrix("analysis", 1, width, x)
            bands = across @ (down @ x.flatten(2)).unflatten(2, (width, -1))  # (B, 2 H, 2 W, C)
            low = bands[:, :height, :width]
            details = bands[:, height:, :width], bands[:, height:, width:], bands[:, :height, width:]
            pairs = [_to_complex(band) for band in details]
            high = torch.stack([one for one, _ in pairs] + [other for _, other in reversed(pairs)])
        return low, high

    def inverse(self, low: Tensor, high: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Put a map together.

        Args:
            low: (B, 2 h, 2 w, C).
            high: (6, B, h, w, C, 2).
            size: H and W of the map, odd ones too; None is that of ``low``.

        Returns:
            (B, H, W, C).
        """
        with _exactly(low):
            low = low.to(torch.promote_types(low.dtype, torch.float32))
            height, width = low.shape[1:3]
            one, other = high.to(low.dtype).chunk(2)
            tall, both, wide = (_to_real(*pair) for pair in zip(one, other.flip(0), strict=True))
            bands = torch.cat((torch.cat((low, wide), 2), torch.cat((tall, both), 2)), 1)
            down, across = self._matrix("synthesis", 0, height, low), self._matrix("synthesis", 1, width, low)
            x = (down @ (across @ bands).flatten(2)).unflatten(2, (width, -1))
        return x if size is None else x[:, : size[0], : size[1]]

    def _matrix(self, kind: str, axis: int, length: int, like: Tensor) -> Tensor:
        kept: Tensor = getattr(self, f"{kind}{axis}")
        # What is kept has 24 bits, also after a change of its type.
        if min(kept.shape) == length and kept.dtype == like.dtype == torch.float32:
            return kept
        return (analysis_matrix if kind == "analysis" else synthesis_matrix)(length).to(like)


def _exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast: in bfloat16 a map would not come together again."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _to_complex(band: Tensor) -> tuple[Tensor, Tensor]:
    """Return both trees' coefficients (B, h, w, C, 2) of a band (B, 2 h, 2 w, C), whose phases a b / c d they are."""
    band = band * math.sqrt(0.5)
    a, b, c, d = (band[:, row::2, column::2] for row in (0, 1) for column in (0, 1))
    return torch.stack((a - d, b + c), -1), torch.stack((a + d, b - c), -1)


def _to_real(one: Tensor, other: Tensor) -> Tensor:
    """Return the band of which ``_to_complex`` made these."""
    total, difference = (one + other) * math.sqrt(0.5), (one - other) * math.sqrt(0.5)
    a, b = total.unbind(-1)
    d, c = difference.unbind(-1)
    rows = torch.stack((torch.stack((a, b), 3), torch.stack((c, -d), 3)), 2)  # (B, h, 2, w, 2, C)
    return rows.flatten(3, 4).flatten(1, 2)
