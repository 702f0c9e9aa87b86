"""Classes that are subspaces: the logit is the length of a feature's projection on its class.

Wang, Li and Zhang, "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
Representation" (ICCV 2023), arXiv 2308.01547, as in the authors' code (innerlee/GCR).

A class is a point S of the Grassmannian, a k-dimensional subspace of the features, held as k orthonormal rows. A
feature x of length one has the logit gamma |S x|. Only the subspace matters, not the rows that span it. The gradient of
the subspaces is projected on the directions in which a subspace can change, and a step goes along a geodesic; all other
parameters keep their optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.edits.classifier import replace_classifiers
from vitrail.edits.surgery import Edit
from vitrail.errors import InputError

# ---- subspaces: (..., k, D) holds k orthonormal rows


def orthonormal(frame: Tensor) -> Tensor:
    """Return orthonormal rows that span the same subspaces as independent rows (..., k, D), in the same order.

    They are Gram and Schmidt's, got by Cholesky's factors: for rows that are nearly orthonormal already, as after an
    update or in a moving average, this is exact and cheap, and turns no sign, as a QR decomposition may.
    """
    factor, _ = torch.linalg.cholesky_ex(frame @ frame.mT)
    return torch.linalg.solve_triangular(factor, frame, upper=False)


def horizontal(frame: Tensor, gradient: Tensor) -> Tensor:
    """Return the part of a gradient (..., k, D) that changes the subspaces: what lies across them."""
    return gradient - (gradient @ frame.mT) @ frame


def geodesic(frame: Tensor, velocity: Tensor, time: float) -> Tensor:
    """Return where subspaces are that set out with a horizontal ``velocity`` (..., k, D), after a ``time``.

    With the decomposition G = V s U of the velocity: V cos(t s) V' S + V sin(t s) U. What is decomposed is the small
    matrix G G' = V s^2 V', so that directions in which nothing moves need no U.
    """
    # Of numbers that are not finite no decomposition is found; they reach the result by the velocity itself.
    squares, turn = torch.linalg.eigh((velocity @ velocity.mT).nan_to_num().double())
    speed = squares.clamp_min(0).sqrt()
    stay = (turn * (time * speed).cos().unsqueeze(-2)) @ turn.mT
    move = (turn * (time * torch.sinc(time * speed / math.pi)).unsqueeze(-2)) @ turn.mT
    return stay.to(frame) @ frame + move.to(frame) @ velocity


def drift(frame: Tensor) -> float:
    """Return how far rows (..., k, D) are from orthonormal: the largest entry of S S' - 1, as an absolute number."""
    frame = frame.detach().double()
    return float((frame @ frame.mT - torch.eye(frame.shape[-2], device=frame.device)).abs().max())


class GrassmannSGD(torch.optim.Optimizer):
    """Riemannian stochastic gradient descent with momentum, for parameters (..., k, D) with orthonormal rows.

    The momentum sums gradients as they come; what is across the subspaces at their present place is followed, along
    geodesics. There is no weight decay, as a subspace has no size. Numbers of half precision are updated in float32.

    Args:
        params: parameters, or groups with ``params``; a group may set the other arguments.
        lr: learning rate, 0 or more.
        momentum: in [0, 1); published: 0.9.
        reorthonormalise: steps after which rounding is taken out of the rows, counted from the first; published: 5.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        reorthonormalise: int = 5,
    ) -> None:
        if not 0 <= lr < math.inf:
            raise InputError(f"GrassmannSGD: lr = {lr!r} is not allowed: give 0 or more")
        if not 0 <= momentum < 1:
            raise InputError(f"GrassmannSGD: momentum = {momentum!r} is not allowed: give a number in [0, 1)")
        if not isinstance(reorthonormalise, int) or reorthonormalise < 1:
            raise InputError(f"GrassmannSGD: reorthonormalise = {reorthonormalise!r} is not allowed: give 1 or more")
        super().__init__(params, {"lr": lr, "momentum": momentum, "reorthonormalise": reorthonormalise})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; return what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["step"], state["momentum_buffer"] = 0, torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        frame = parameter.to(wide)
        frame = geodesic(frame, horizontal(frame, state["momentum_buffer"].to(wide)), -group["lr"])
        if state["step"] % group["reorthonormalise"] == 0:
            frame = orthonormal(frame)
        state["step"] += 1
        parameter.copy_(frame)


class GrassmannHead(nn.Module):
    """A classifier whose classes are subspaces of the features.

    Args:
        in_features: D.
        num_classes: K.
        k: dimension of each class, 1 to D; published: 8, and 1, 4, 16 and 32.
        gamma: logit of a feature that lies in its class, above 0; published: 25.
        lr_scale: learning rate of the subspaces, as a multiple of the recipe's, above 0.
        axis: of the input, that holds the features.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int = 8,
        gamma: float = 25.0,
        lr_scale: float = 100.0,
        axis: int = -1,
    ) -> None:
        super().__init__()
        if not isinstance(k, int) or k < 1:
            raise InputError(f"grassmann_classes: k = {k!r} is not allowed: give a whole number from 1; published is 8")
        if k > in_features:
            raise InputError(
                f"grassmann_classes: k = {k} is not allowed: the features have {in_features} dimensions, so give at "
                f"most {in_features}"
            )
        for name, value in {"gamma": gamma, "lr_scale": lr_scale}.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"grassmann_classes: {name} = {value!r} is not allowed: give a number above 0")
        self.in_features, self.out_features = in_features, num_classes
        self.gamma, self.lr_scale, self.axis = gamma, lr_scale, axis
        self.weight = nn.Parameter(torch.empty(num_classes, k, in_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw subspaces, all directions being equally likely."""
        columns = torch.linalg.qr(torch.randn_like(self.weight, dtype=torch.float32).mT).Q
        self.weight.copy_(columns.mT)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (..., K) of (..., D), or of what has D at ``axis``: 0 to gamma, in float32 or better."""
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self(x.float())
        wide = torch.promote_types(x.dtype, torch.float32)
        x = F.normalize(x.movedim(self.axis, -1).to(wide), dim=-1)
        parts = F.linear(x, self.weight.flatten(0, 1).to(wide)).unflatten(-1, self.weight.shape[:2])  # (..., K, k)
        return (self.gamma * torch.linalg.vector_norm(parts, dim=-1)).movedim(-1, self.axis)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the subspaces with their optimiser."""
        return [
            {"params": [self.weight], "optimizer": GrassmannSGD, "lr_scale": self.lr_scale, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def constrain(self) -> None:
        """Make the rows orthonormal again: a mean of subspaces over training, say, has shorter ones."""
        self.weight.copy_(orthonormal(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))))

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{self.in_features}, {self.out_features}, k={self.weight.shape[1]}, gamma={self.gamma}"


def grassmann_classes(*, k: int = 8, gamma: float = 25.0, lr_scale: float = 100.0) -> Edit:
    """Return the edit that replaces a model's linear classifier by one whose classes are k-dimensional subspaces.

    Any model with a linear classifier can have it, and any method that trains classifiers, trains it; a new one has
    random subspaces. The features before it are as they were: ``model.reset_classifier(n)`` puts a linear one in its
    place, for other classes.

    Args:
        k: dimension of each class, 1 or more, and at most that of the features; published: 8.
        gamma: logit of a feature that lies in its class, above 0; published: 25.
        lr_scale: learning rate of the subspaces, as a multiple of the recipe's, above 0. Published are rates of 0.1
            beside SGD of the same rate, 0.1 beside AdamW of 0.001, 0.3 beside LAMB of 0.005 and 0.004: multiples of 1,
            100, 60 and 75.

    Raises:
        InputError: a number out of range; or, from the edit, a model without a linear classifier (the text lists what
            it has), or with fewer features than k.

    Example:
        >>> model = grassmann_classes(k=8)(timm.create_model("resnet50d"))          # doctest: +SKIP
    """
    # Refuse a wrong number now, not when the edit is applied.
    GrassmannHead(k if isinstance(k, int) and k > 0 else 1, 1, k=k, gamma=gamma, lr_scale=lr_scale)

    def edit(model: nn.Module) -> nn.Module:
        def build(features: int, classes: int, axis: int) -> nn.Module:
            return GrassmannHead(features, classes, k=k, gamma=gamma, lr_scale=lr_scale, axis=axis)

        return replace_classifiers(model, build)

    return edit
