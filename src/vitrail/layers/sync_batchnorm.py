"""Batch normalisation over the joint batch of all processes, on any device and backend.

``torch.nn.SyncBatchNorm`` works on accelerators only. This one needs nothing but ``all_gather`` and ``all_reduce``, so
that gloo processes on CPUs train exactly what one process would. The statistics of the processes, of any sizes, are
merged after Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
(1979); the backward follows Ioffe and Szegedy, "Batch Normalization" (2015), section 3, with its two sums taken over
all processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitrail.errors import InputError


class _JointNormalise(torch.autograd.Function):
    """Map x (B, C, ...) to its normalised form, and return the joint mean (C,), variance (C,) and count as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x.float()
        axes = [0, *range(2, x.ndim)]
        count = values.new_tensor([x.numel() // x.shape[1]])
        if x.numel():
            var, mean = torch.var_mean(values, axes, correction=0)
        else:
            var = mean = values.new_zeros(x.shape[1])
        mine = torch.cat([mean, var, count])  # (2C + 1,)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        means, variances, counts = torch.stack(every).tensor_split(
            [x.shape[1], 2 * x.shape[1]], dim=1
        )  # (W, C), (W, 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean) ** 2) * counts).sum(0) / total
        scale = torch.rsqrt(var + eps)
        normal = (values - _per_channel(mean, x)) * _per_channel(scale, x)
        ctx.save_for_backward(normal, scale, total)
        ctx.mark_non_differentiable(mean, var, total)
        return normal, mean, var, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        normal, scale, total = ctx.saved_tensors
        axes = [0, *range(2, grad.ndim)]
        sums = torch.stack([grad.sum(axes), (grad * normal).sum(axes)])  # (2, C)
        dist.all_reduce(sums)
        mean_grad, mean_product = sums / total
        inner = grad - _per_channel(mean_grad, grad) - normal * _per_channel(mean_product, grad)
        return inner * _per_channel(scale, grad), None


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation whose training statistics are those of the joint batch; in evaluation it is the plain layer.

    It shares the parameters and buffers of ``source``. Input (B, C, ...) of at least two dimensions; a process may have
    no sample (B = 0).
    """

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__(0, source.eps, source.momentum, affine=False, track_running_stats=False)
        self.num_features, self.affine = source.num_features, source.affine
        self.track_running_stats, self.training = source.track_running_stats, source.training
        # The dictionaries themselves, so that a tensor replaced in one layer is replaced in the other.
        self._parameters, self._buffers = source._parameters, source._buffers

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...) in the type of ``x``."""
        if not (self.training or self.running_mean is None):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        normal, mean, var, count = _JointNormalise.apply(x, self.eps)
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._track(mean, var * (count / (count - 1).clamp(min=1)))
        if self.affine:
            normal = torch.addcmul(_per_channel(self.bias, x), normal, _per_channel(self.weight, x))
        return normal.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else torch.tensor(self.momentum)
        self.running_mean.lerp_(mean, share.to(mean))
        self.running_var.lerp_(var, share.to(var))


class SyncBatchNormAct(SyncBatchNorm):
    """The same for timm's normalisation with dropout and activation in one module."""

    def __init__(self, source: BatchNormAct2d) -> None:
        super().__init__(source)
        self.drop, self.act = source.drop, source.act

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated (B, C, H, W)."""
        return self.act(self.drop(super().forward(x)))


_FORMS: dict[type[_BatchNorm], Callable[[Any], SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm,
    nn.BatchNorm2d: SyncBatchNorm,
    nn.BatchNorm3d: SyncBatchNorm,
    BatchNormAct2d: SyncBatchNormAct,
}


@contextlib.contextmanager
def synchronised_batchnorm(module: nn.Module) -> Iterator[None]:
    """Replace, for the time of a ``with`` block, every batch normalisation inside ``module`` by its joint form.

    Parameters and buffers are shared, so what was learnt is in the original layers afterwards.

    Raises:
        InputError: a normalisation of an unknown kind, which would silently stay apart.
    """
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, _BatchNorm)
    ]
    for _, name, child in places:
        if type(child) not in _FORMS:
            raise InputError(
                f"train.sync_batchnorm: {name!r} is a {type(child).__name__}, which cannot be synchronised; "
                "set train.sync_batchnorm=false"
            )
    # One module may stand in several places; so does its replacement.
    forms = {child: _FORMS[type(child)](child) for _, _, child in places}
    try:
        for parent, name, child in places:
            setattr(parent, name, forms[child])
        yield
    finally:
        for parent, name, child in places:
            child.train(forms[child].training)
            setattr(parent, name, child)
