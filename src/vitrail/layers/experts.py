"""A mixture of experts: of several feed-forward layers, each token goes through the few that a router gives it to.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer" (ICLR 2017), with the
balance loss and the capacity of Fedus et al., "Switch Transformers" (2021), as "Go Wider Instead of Deeper" (AAAI 2022)
and its code have them for more than one expert a token.

Shapes: T tokens, E experts of which each token gets k, C channels, F channels inside an expert.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import InputError


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        gates: (T, E), factors of what experts say; 0 where a token does not go.
        probabilities: (T, E), of the router, over experts.
        chosen: (T, E), the k experts that the router chose for each token.
        kept: (T, E), those of them that had room for it.
    """

    gates: Tensor
    probabilities: Tensor
    chosen: Tensor
    kept: Tensor


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Return E times the sum over experts of its share of the tokens times its mean probability: 1 where all are equal.

    Args:
        probabilities: of the router, (T, E); the gradient goes through these alone.
        chosen: the k experts of each token, (T, E) booleans.

    Returns:
        A scalar, float32 at least.
    """
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    choices = chosen.to(probabilities.dtype)
    shares = (choices / choices.sum(1, keepdim=True)).mean(0)
    return probabilities.shape[1] * (shares * probabilities.mean(0)).sum()


def with_room(chosen: Tensor, capacity: int) -> Tensor:
    """Return which of the choices (T, E) are kept where an expert has room for its first ``capacity`` tokens."""
    return chosen & (chosen.long().cumsum(0) <= capacity)


class Experts(nn.Module):
    """E feed-forward layers of one shape, each of two linear layers that a GELU follows both.

    Args:
        experts: E.
        dim: C.
        hidden: F.
        drop: dropout behind each of the layers, in [0, 1).
    """

    def __init__(self, experts: int, dim: int, hidden: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.empty(experts, hidden, dim))
        self.fc1_bias = nn.Parameter(torch.empty(experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(experts, dim, hidden))
        self.fc2_bias = nn.Parameter(torch.empty(experts, dim))
        self.drop = nn.Dropout(drop)
        for weight, bias in zip((*self.fc1_weight, *self.fc2_weight), (*self.fc1_bias, *self.fc2_bias), strict=True):
            nn.init.xavier_uniform_(weight)
            nn.init.normal_(bias, std=1e-6)

    def each(self) -> list[tuple[Tensor, ...]]:
        """Return weights and biases of every expert: once for a pass, since a slice's gradient is as large as all."""
        parts = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        return list(zip(*(part.unbind(0) for part in parts), strict=True))

    def said(self, x: Tensor, expert: tuple[Tensor, ...]) -> Tensor:
        """Return what one expert, of ``each``, says of tokens (T, C)."""
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = expert
        inside = self.drop(F.gelu(F.linear(x, fc1_weight, fc1_bias), approximate="tanh"))
        return self.drop(F.gelu(F.linear(inside, fc2_weight, fc2_bias), approximate="tanh"))


class MixtureOfExperts(nn.Module):
    """Feed-forward experts, and a router that gives each token to k of them, weighted by its probabilities.

    In training an expert has room for its share of the tokens times ``capacity``, in the order of the batch; a token
    that finds no room gets nothing from it. In evaluation there is room for all, so that an image does not depend on
    those beside it.

    Args:
        dim: C.
        hidden: F.
        experts: E.
        top_k: k, up to E.
        capacity: room of an expert in training over its share of the tokens, above 0.
        noise: deviation of what is added to the router's logits in training; None is 1 / E, as published.
        drop: dropout inside the experts, in [0, 1).

    Raises:
        InputError: a number of experts, or of those for a token, or a capacity that is not allowed.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int = 4,
        *,
        top_k: int = 2,
        capacity: float = 1.2,
        noise: float | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if experts < 1 or not 1 <= top_k <= experts:
            raise InputError(
                f"experts = {experts} with top_k = {top_k} is not allowed: give 1 expert or more, and top_k from 1 to "
                "their number"
            )
        if not capacity > 0:
            raise InputError(f"capacity = {capacity} is not allowed: give a number above 0, such as 1.2")
        self.count, self.top_k, self.capacity = experts, top_k, capacity
        self.noise = 1 / experts if noise is None else noise
        self.router = nn.Linear(dim, experts, bias=False)
        nn.init.xavier_uniform_(self.router.weight)
        self.experts = Experts(experts, dim, hidden, drop=drop)

    def room(self, tokens: int) -> int:
        """Return how many of a batch's tokens an expert takes in training."""
        return int(tokens * self.capacity * self.top_k / self.count)

    def route(self, x: Tensor) -> Routing:
        """Return where tokens (T, C) go."""
        logits = self.router(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        probabilities = logits.softmax(-1)
        best = probabilities.topk(self.top_k, -1).indices
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, best, True)
        kept = chosen
        if self.training:
            kept = with_room(chosen, self.room(len(x)))
        return Routing(probabilities * kept, probabilities, chosen, kept)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the experts say of tokens (B, N, C), and the balance loss, a scalar."""
        tokens = x.flatten(0, -2)
        routing = self.route(tokens)
        gates = routing.gates.to(x.dtype)
        out = torch.zeros_like(tokens)
        if torch.compiler.is_exporting():
            # How many tokens an expert gets is known only when it runs: all go through all, and most count for nothing.
            for expert, gate in zip(self.experts.each(), gates.split(1, 1), strict=True):
                out = out + self.experts.said(tokens, expert) * gate
            return out.view(x.shape), balance_loss(routing.probabilities, routing.chosen)
        given = _rows(routing.kept, self.top_k)
        for expert, gate, rows in zip(self.experts.each(), gates.split(1, 1), given, strict=True):
            said = self.experts.said(tokens.index_select(0, rows), expert) * gate.index_select(0, rows)
            out = out.index_add(0, rows, said.to(out.dtype))
        return out.view(x.shape), balance_loss(routing.probabilities, routing.chosen)


def _rows(kept: Tensor, top_k: int) -> list[Tensor]:
    """Return the tokens of each expert. Where they cannot be told, on the meta device, each has its share."""
    if kept.is_meta:
        ends = [round(len(kept) * top_k * part / kept.shape[1]) for part in range(kept.shape[1] + 1)]
        return [kept.new_empty(end - start, dtype=torch.long) for start, end in pairwise(ends)]
    return [column.nonzero().squeeze(1) for column in kept.unbind(1)]
