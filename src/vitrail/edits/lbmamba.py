"""LBMamba in the mixers of a net: scans that also look ahead inside short windows, and no scan from the other end.

Zhang et al., "LBMamba: Locally Bi-directional Mamba" (TMLR 2025), arXiv 2506.15976, and the authors' code
(cvlab-stonybrook/LBMamba). What a place cannot see, behind its window, the next mixer sees, which reads from the other
end: two mixers together see all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail.edits.surgery import Edit, replace_modules
from vitrail.errors import InputError, unknown
from vitrail.layers.mamba import SS2D, BidirectionalMamba, Mamba, Memory
from vitrail.layers.scan import selective_scan
from vitrail.layers.scan.local import local_scan
from vitrail.layers.scan.orders import Order

SWEEPS = ("half", "all")


class LocalMamba(Mamba):
    """Mamba's mixer with the locally bidirectional scan.

    Args:
        dim: C.
        window: places of a window; None is as published, by the length.
        reverse: read from the last place.
        states, width, expand, rank: as for ``Mamba``.
    """

    def __init__(self, dim: int, *, window: int | None = None, reverse: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.window, self.reverse = window, reverse
        self.scan = partial(local_scan, window=window)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, C)."""
        y, _ = super().stream(x.flip(1) if self.reverse else x)
        return y.flip(1) if self.reverse else y

    def stream(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Raise InputError: what is read later changes what is ahead in a window."""
        raise InputError("a locally bidirectional mixer needs the whole sequence: call it, or stream with Mamba")

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"window={self.window}, reverse={self.reverse}"


class SomeOrders:
    """Some of the orders of a plane: ``orders`` of a mixer that is left with fewer scans.

    Args:
        orders: from the plane's sides to all orders.
        kept: which of them.
    """

    def __init__(self, orders: Callable[[tuple[int, int]], Sequence[Order]], kept: Sequence[int]) -> None:
        self.orders, self.kept = orders, tuple(kept)

    def __call__(self, shape: tuple[int, int]) -> list[Order]:
        """Return the orders of a plane of this shape."""
        orders = self.orders(shape)
        return [orders[index] for index in self.kept]


def lbmamba(*, window: int | None = None, sweeps: str = "half") -> Edit:
    """Put the locally bidirectional scan into every mixer of a net, in the place of the selective scan.

    Vim's mixer keeps its way there, with its weights, and loses the way back; every other one reads from the last
    place. A mixer of planes loses the scan of each pair of orders of which one is the other backwards, every other one
    the first, so that VMamba's four orders become two. A mixer that reads one way, as Mamba's, keeps its way.

    Args:
        window: places of a window; None is as published, by the length: 4 to 128 places, 8 to 256, 16 beyond.
        sweeps: of ``SWEEPS``; ``"all"`` changes the scans alone and leaves all ways and weights.

    Raises:
        InputError: an option out of range; or, from the edit, a model without selective scans (the text lists what it
            has).

    Example:
        >>> model = lbmamba(window=8)(timm.create_model("vim_tiny"))          # doctest: +SKIP
    """
    if window is not None and (not isinstance(window, int) or window < 2):
        raise InputError(f"lbmamba: window = {window!r} is not allowed: give 2 places or more")
    if sweeps not in SWEEPS:
        raise unknown("sweeps of lbmamba", sweeps, SWEEPS, f"there are {', '.join(SWEEPS)}")

    def edit(model: nn.Module) -> nn.Module:
        turns = 0  # of mixers that lose a way

        def build(mixer: Any) -> nn.Module:
            nonlocal turns
            found: Any = mixer
            backwards = turns % 2 == 1
            if type(mixer) is Mamba:
                found = _one_way(mixer, window, reverse=False)
            elif sweeps == "half" and isinstance(mixer, BidirectionalMamba):
                found, turns = _one_way(mixer, window, backwards), turns + 1
            elif sweeps == "half" and isinstance(mixer, SS2D) and _halve(mixer, backwards):
                turns += 1
            for part in found.modules():
                if _scans(part):
                    part.scan = partial(local_scan, window=window)
            return cast(nn.Module, found)

        return replace_modules(model, lambda _, module: _scans(module), build, what="mixer with a selective scan")

    return edit


def _scans(module: nn.Module) -> bool:
    return getattr(module, "scan", None) is selective_scan


def _one_way(mixer: Mamba, window: int | None, reverse: bool) -> LocalMamba:
    """Return Mamba's mixer, or the way there of Vim's, its weights themselves."""
    with torch.device("meta"):
        found = LocalMamba(1, states=mixer.states, rank=mixer.rank, window=window, reverse=reverse)
    for name, child in mixer.named_children():
        if name != "back":
            setattr(found, name, child)
    for name, parameter in mixer.named_parameters(recurse=False):
        setattr(found, name, parameter)
    return found


def _halve(mixer: SS2D, backwards: bool) -> bool:
    """Leave one scan of each pair of opposite orders, and return whether there was a pair."""
    orders = mixer.orders((15, 17))  # wide enough to tell orders apart
    count, dropped = len(orders), set()
    for index, order in enumerate(orders):
        for other in range(index):
            if other not in dropped and (order[::-1] == orders[other]).all():
                dropped.add(other if backwards else index)
                break
    if not dropped:
        return False
    kept = [index for index in range(count) if index not in dropped]
    mixer.orders = SomeOrders(mixer.orders, kept)
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
        old = getattr(mixer, name)
        by_order = old.detach().unflatten(0, (count, -1))[kept].flatten(0, 1)
        setattr(mixer, name, nn.Parameter(by_order, requires_grad=old.requires_grad))
    return True
