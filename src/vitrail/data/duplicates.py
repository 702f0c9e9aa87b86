"""Near duplicates: a perceptual hash finds candidates, a second look at small pictures confirms them.

The hash is pHash (Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010) but for its
threshold. pHash compares each DCT coefficient with their median, which is about zero; in symmetric or flat pictures
many coefficients are zero too, and the noise of a JPEG decides their bits. A threshold a little above zero leaves those
bits alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

HASH_DISTANCE = 4
"""Bits, of 64, in which the hashes of near duplicates may differ."""
CORRELATION = 0.997
"""Least correlation of the grey values of near duplicates at 16 x 16 pixels."""
CHROMA_DIFFERENCE = 16
"""Largest difference of the colours (Cb, Cr) of near duplicates at 4 x 4 pixels, unless one of the two is grey."""
ASPECT_DIFFERENCE = 0.1
"""Largest difference of the logarithms of the aspect ratios of near duplicates."""
BLANK = 3
"""Largest difference of the values of a channel in a blank image."""
SIGNATURE_BYTES = 16 * 16 + 4 * 4 * 2

WINDOW = 20_000
"""Neighbours with which an image is compared per band, at most, lest thousands of look-alikes take quadratic time."""
_BLOCK = 1 << 12
_DEAD_ZONE = 0.1  # of the root mean square of the coefficients
_BANDS = HASH_DISTANCE + 1


def _coefficients() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of the 32-point DCT that are needed, and the coefficients' places in the order of the bits."""
    k, n = np.arange(9)[:, None], np.arange(32)[None]
    basis = np.cos(np.pi * (2 * n + 1) * k / 64)
    places = sorted(((i, j) for i in range(9) for j in range(9) if i + j), key=lambda p: (max(p), p))[:64]
    # Each band of the search gets coefficients of all frequencies, as high ones alone tell few images apart.
    order = [places[i] for band in range(_BANDS) for i in range(band, 64, _BANDS)]
    rows, columns = np.array(order).T
    return basis, rows, columns


_BASIS, _ROWS, _COLUMNS = _coefficients()
_WIDTHS = [len(range(band, 64, _BANDS)) for band in range(_BANDS)]


class Look(NamedTuple):
    """Of one image: grey values (32, 32) uint8, the signature for ``same_picture``, and whether it is blank."""

    grey: np.ndarray
    signature: bytes
    blank: bool


def look(image: Image.Image) -> Look:
    """Describe an RGB image."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=2.0))
    colours = image.resize((4, 4), Image.Resampling.BOX, reducing_gap=2.0).convert("YCbCr")
    signature = _luma(grey[None]).tobytes() + np.asarray(colours)[..., 1:].tobytes()
    flat = int(grey.max()) - int(grey.min()) <= 8  # only then is it worth looking at all pixels
    return Look(grey, signature, flat and int(np.ptp(np.asarray(image), axis=(0, 1)).max()) <= BLANK)


def look_at_grey(pixels: np.ndarray) -> list[Look]:
    """Describe grey images of one size (B, H, W) uint8 together, as ``look`` does to within rounding.

    One by one, tens of thousands of tiny images would spend their time between the calls.
    """
    vertical, horizontal = (_resizing(side) for side in pixels.shape[1:])
    # Pillow, too, rounds and clips in between, though it may begin with the columns where that is cheaper.
    rows = np.rint(pixels.astype(np.float32) @ horizontal.T).clip(0, 255)  # (B, H, 32)
    greys = np.rint(vertical @ rows).clip(0, 255).astype(np.uint8)  # (B, 32, 32)
    blank = np.ptp(pixels, axis=(1, 2)) <= BLANK
    lumas = _luma(greys)
    no_colour = b"\x80" * 32
    return [
        Look(*look) for look in zip(greys, (luma.tobytes() + no_colour for luma in lumas), blank.tolist(), strict=True)
    ]


@lru_cache(maxsize=64)
def _resizing(side: int) -> np.ndarray:
    """Return Pillow's Lanczos resize of ``side`` values to 32 as a matrix (32, side): what it does to unit vectors."""
    units = Image.fromarray(np.eye(side, dtype=np.float32))
    return np.asarray(units.resize((side, 32), Image.Resampling.LANCZOS))


def _luma(greys: np.ndarray) -> np.ndarray:
    """Return the mean of each 2 x 2 pixels: (B, 16, 16) uint8."""
    sums = greys.reshape(-1, 16, 2, 16, 2).sum((2, 4), dtype=np.uint16)
    return ((sums + 2) >> 2).astype(np.uint8)


def perceptual_hash(grey: np.ndarray) -> np.ndarray:
    """Return the hashes (B,) uint64 of grey pictures (B, 32, 32)."""
    spectrum = _BASIS @ grey.astype(np.float64) @ _BASIS.T  # (B, 9, 9)
    values = spectrum[:, _ROWS, _COLUMNS]  # (B, 64)
    threshold = _DEAD_ZONE * np.sqrt((values**2).mean(1, keepdims=True))
    # A flat picture has values of rounding noise only, above a threshold of the same noise.
    bits = values > np.maximum(threshold, 1e-6)
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(">u8").astype(np.uint64)[:, 0]


def candidate_pairs(hashes: np.ndarray, window: int = WINDOW) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of images whose hashes differ in at most ``HASH_DISTANCE`` bits, each pair once, in blocks.

    Of two such hashes, cut into one band more than that, one band at least is equal in both. So for each band the
    images are sorted by it and compared with those of the same value. Memory: some 40 bytes per image.

    Args:
        hashes: (N,) uint64.
        window: images of the same band are compared with this many neighbours at most.

    Yields:
        Two arrays of positions in ``hashes``, 4,096 pairs or fewer.
    """
    masks = _band_masks()
    for band, mask in enumerate(masks):
        # Sorting by the whole hash within a band puts the most alike side by side, for the window.
        order = np.lexsort((hashes, hashes & mask))
        value = (hashes & mask)[order]
        end = np.searchsorted(value, value, side="right")
        start = np.arange(len(order))
        found: list[tuple[np.ndarray, np.ndarray]] = []
        waiting = 0
        for shift in range(1, window + 1):
            start = start[start + shift < end[start]]
            if not len(start):
                break
            for block in range(0, len(start), 1 << 20):
                a, b = order[start[block : block + (1 << 20)]], order[start[block : block + (1 << 20)] + shift]
                differing = hashes[a] ^ hashes[b]
                near = np.bitwise_count(differing) <= HASH_DISTANCE
                for earlier in masks[:band]:  # found there already
                    near &= (differing & earlier) != 0
                found.append((a[near], b[near]))
                waiting += int(near.sum())
            if waiting >= 4 * _BLOCK or len(found) >= 1000:
                yield from _blocks(found)
                found, waiting = [], 0
        yield from _blocks(found)


def _band_masks() -> list[np.uint64]:
    masks, high = [], 64
    for width in _WIDTHS:
        masks.append(np.uint64(((1 << width) - 1) << (high - width)))
        high -= width
    return masks


def _blocks(found: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if not found:
        return
    a, b = (np.concatenate(side) for side in zip(*found, strict=True))
    for block in range(0, len(a), _BLOCK):
        yield a[block : block + _BLOCK], b[block : block + _BLOCK]


def same_picture(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return which pairs of signatures (P, 288) uint8 show the same picture, up to size, compression and brightness."""
    a, b = first[:, :256].astype(np.float32), second[:, :256].astype(np.float32)
    a -= a.mean(1, keepdims=True)
    b -= b.mean(1, keepdims=True)
    product = np.einsum("pi,pi->p", a, b)
    norms = np.einsum("pi,pi->p", a, a) * np.einsum("pi,pi->p", b, b)
    alike = (norms > 0) & (product >= CORRELATION * np.sqrt(norms))
    chroma_a, chroma_b = first[:, 256:].astype(np.int16), second[:, 256:].astype(np.int16)
    grey = (abs(chroma_a - 128).max(1) <= 4) | (abs(chroma_b - 128).max(1) <= 4)
    return alike & (grey | (abs(chroma_a - chroma_b).max(1) <= CHROMA_DIFFERENCE))


def near_duplicates(hashes: np.ndarray, signatures: np.ndarray, aspects: np.ndarray, parent: np.ndarray) -> None:
    """Unite near duplicates in the forest ``parent``.

    Args:
        hashes: (N,) uint64.
        signatures: (N, 288) uint8, may be memory-mapped.
        aspects: (N,), logarithms of width / height.
        parent: (N,) int64, changed in place; see ``unite``.
    """
    sketches = _sketches(signatures)
    # For vectors of length one, |a - b|^2 = 2 - 2 ab, and a projection only shortens; 0.002 is for its 16 bits.
    reach = 2 - 2 * CORRELATION + 0.002
    for a, b in candidate_pairs(hashes):
        possible = abs(aspects[a] - aspects[b]) <= ASPECT_DIFFERENCE
        difference = sketches[a].astype(np.float32) - sketches[b]
        possible &= np.einsum("pi,pi->p", difference, difference) <= reach
        a, b = a[possible], b[possible]
        same = same_picture(signatures[a], signatures[b])
        unite(parent, a[same], b[same])


def _sketches(signatures: np.ndarray) -> np.ndarray:
    """Return the coarsest 15 DCT coefficients of each normalised grey picture: (N, 15) float16.

    They rule out most candidates without a look at the signatures themselves.
    """
    k, n = np.arange(4)[:, None], np.arange(16)[None]
    basis = np.cos(np.pi * (2 * n + 1) * k / 32) * np.where(k, np.sqrt(2 / 16), np.sqrt(1 / 16))
    projection = np.einsum("ui,vj->uvij", basis, basis).reshape(16, 256)[1:].astype(np.float32)  # orthonormal rows
    sketches = np.empty((len(signatures), 15), np.float16)
    step = 512
    for start in range(0, len(signatures), step):
        luma = signatures[start : start + step, :256].astype(np.float32)
        luma -= luma.mean(1, keepdims=True)
        luma /= np.maximum(np.linalg.norm(luma, axis=1, keepdims=True), 1e-6)
        sketches[start : start + step] = luma @ projection.T
    return sketches


def embedding_duplicates(vectors: np.ndarray, parent: np.ndarray, similarity: float) -> None:
    """Unite images whose embeddings have at least this cosine, comparing blocks with blocks.

    Args:
        vectors: (N, D) float32 of length one, may be memory-mapped.
        parent: (N,) int64, changed in place; see ``unite``.
        similarity: least cosine, 0 to 1.
    """
    size = 2048
    for start, other in itertools.combinations_with_replacement(range(0, len(vectors), size), 2):
        a, b = np.nonzero(vectors[start : start + size] @ vectors[other : other + size].T >= similarity)
        a, b = a + start, b + other
        unite(parent, a[a < b], b[a < b])


def find(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Return the roots of ``nodes`` in a forest, and shorten their paths."""
    roots = parent[nodes]
    while True:
        above = parent[roots]
        if np.array_equal(above, roots):
            break
        roots = above
    parent[nodes] = roots
    return roots


def unite(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Join the trees of ``a[i]`` and ``b[i]`` for every i; the smallest number of a tree becomes its root.

    Args:
        parent: (N,) int64, ``np.arange(N)`` at first; changed in place.
    """
    while len(a):
        root_a, root_b = find(parent, a), find(parent, b)
        apart = root_a != root_b
        a, b = a[apart], b[apart]
        low, high = np.minimum(root_a[apart], root_b[apart]), np.maximum(root_a[apart], root_b[apart])
        # Where one root is joined to several, one of them wins, and the others are still apart in the next round.
        parent[high] = low
