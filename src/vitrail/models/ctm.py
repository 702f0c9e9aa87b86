"""Continuous Thought Machines: neurons with private memories, whose synchrony over ticks looks at data and answers.

Darlow, Regan, Risi, Seely and Jones, "Continuous Thought Machines" (2025), arXiv 2505.05522, and the authors' code
(SakanaAI/continuous-thought-machines). At each internal tick, synapses mix what was seen with the activity of all
neurons; each neuron applies a small net of its own to the history of what it received; and how pairs of neurons have
fired together since the first tick is what attention asks with and what answers are read from. The training is
``vitrail.methods.supervised.ctm_training``; what to train on, ``vitrail.data.synthetic.puzzles``.

Shapes: B inputs, T ticks, D neurons, M entries of a history, S pairs of neurons, N tokens, P positions of an answer
with K classes each (an image has one). Neurons come first inside, so that a neuron's numbers lie together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import GroupNorm1
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import Tensor, nn

from vitrail.errors import InputError, unknown
from vitrail.models.staged import cfg, nano_cfg

PAIRINGS = ("first-last", "random", "random-pairing")
POOLS = ("certain", "last", "avg", "")
BOTTLENECK = 16
"""Width of the synapses at their narrowest."""
DECAYS = (0.0, 15.0)
"""What the learnt decays are held to."""

# ---- synchrony -------------------------------------------------------------------------------------------------------


def draw_pairs(pairing: str, neurons: int, count: int, *, last: bool = False, self_pairs: int = 0) -> Tensor:
    """Return pairs of neurons (2, S).

    Args:
        pairing: ``"first-last"``, each of the first ``count`` neurons (the last, with ``last``) with itself and each
            after it; ``"random"``, the same with two draws of ``count`` neurons, one to each side, which gives, as the
            first does, count (count + 1) / 2 pairs; ``"random-pairing"``, a draw of ``count`` pairs. Draws are with
            repetition.
        neurons: D.
        count: of neurons to a side.
        last: as above.
        self_pairs: how many of a random pairing are of a neuron with itself.

    Raises:
        InputError: a pairing that does not exist, or numbers that it cannot have.
    """
    if pairing not in PAIRINGS:
        raise unknown("pairing", pairing, PAIRINGS)
    if count < 1 or (pairing == "first-last" and count > neurons):
        raise InputError(
            f"{count} neurons of {neurons} cannot be paired by {pairing}: give 1 or more, {neurons} at most"
        )
    if not 0 <= self_pairs < count:
        raise InputError(f"self_pairs = {self_pairs} is not allowed for {count} pairs: give 0 to {count - 1}")
    if pairing == "random-pairing":
        pairs = torch.randint(neurons, (2, count))
        pairs[1, :self_pairs] = pairs[0, :self_pairs]
        return pairs
    if pairing == "first-last":
        sides = torch.arange(count).expand(2, count) + (neurons - count if last else 0)
    else:
        sides = torch.randint(neurons, (2, count))
    return torch.stack([side[place] for side, place in zip(sides, torch.triu_indices(count, count))])


class Synchronisation(nn.Module):
    """How pairs of neurons have fired together: their products, summed over ticks with a learnt decay.

    After ticks 0 to t the synchrony of a pair is sum_k e^{-d (t-k)} z_i^k z_j^k / sqrt(sum_k e^{-d (t-k)}) with a decay
    d of its own. The sum above is a_t = e^{-d} a_{t-1} + z_i^t z_j^t; the one below is of decays alone, and is known
    before the first tick.

    Args:
        pairs: (2, S), as of ``draw_pairs``.
    """

    pairs: Tensor

    def __init__(self, pairs: Tensor) -> None:
        super().__init__()
        self.register_buffer("pairs", pairs)
        self.decay = nn.Parameter(torch.zeros(pairs.shape[1]))

    @torch.no_grad()
    def hold(self) -> None:
        """Put decays that have learnt their way out of ``DECAYS`` back to the bound."""
        self.decay.clamp_(*DECAYS)

    def products(self, active: Tensor) -> Tensor:
        """Return z_i z_j, (.., S, B), of activities (.., D, B)."""
        return active.index_select(-2, self.pairs[0]) * active.index_select(-2, self.pairs[1])

    def rates(self, ticks: int) -> tuple[Tensor, Tensor]:
        """Return e^{-d}, (S, 1), and what sums over 1 to ``ticks`` ticks are multiplied by, (ticks, S, 1)."""
        # A decay outside its bounds counts as the bound, and learns all the same.
        decay = self.decay + (self.decay.clamp(*DECAYS) - self.decay).detach()
        decay = decay.to(torch.promote_types(decay.dtype, torch.float32)).unsqueeze(1)
        ages = torch.arange(ticks, device=decay.device, dtype=decay.dtype).view(-1, 1, 1)
        return (-decay).exp(), (-decay * ages).exp().cumsum(0).rsqrt()

    def forward(self, active: Tensor) -> Tensor:
        """Return the synchrony after each tick, (T, S, B), of activities (T, D, B)."""
        rate, scale = self.rates(len(active))
        total, totals = None, []
        for product in self.products(active).unbind(0):
            total = product if total is None else torch.addcmul(product, rate, total)
            totals.append(total)
        return torch.stack(totals) * scale


# ---- synapses, neurons, attention ------------------------------------------------------------------------------------


class SynapseBlock(nn.Sequential):
    """Dropout, a linear layer, a norm and SiLU."""

    def __init__(self, before: int, after: int, drop: float) -> None:
        super().__init__(nn.Dropout(drop), nn.Linear(before, after), nn.LayerNorm(after), nn.SiLU())


class Synapses(nn.Module):
    """A U-Net of linear layers from (B, C) to (B, D), its widths evenly from D to ``BOTTLENECK``.

    Args:
        before: C.
        neurons: D.
        depth: widths, 2 or more.
        drop: dropout before each layer but the first.
    """

    def __init__(self, before: int, neurons: int, depth: int, drop: float) -> None:
        super().__init__()
        widths = np.linspace(neurons, BOTTLENECK, depth).astype(int).tolist()
        self.first = SynapseBlock(before, neurons, 0.0)
        self.down = nn.ModuleList(SynapseBlock(wide, narrow, drop) for wide, narrow in pairwise(widths))
        self.up = nn.ModuleList(SynapseBlock(narrow, wide, drop) for wide, narrow in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(wide) for wide in widths[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D)."""
        kept = [self.first(x)]
        for block in self.down:
            kept.append(block(kept[-1]))
        x = kept.pop()
        for block, norm, skip in zip(reversed(self.up), reversed(self.norms), reversed(kept)):
            x = norm(block(x) + skip)
        return x


class NeuronLayer(nn.Module):
    """A linear layer of each neuron's own, (D, B, in) to (D, B, out), over a temperature that all share."""

    def __init__(self, neurons: int, before: int, after: int, drop: float, temperature: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(before + after)
        self.weight = nn.Parameter(torch.empty(neurons, before, after).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(neurons, 1, after))
        self.temperature = nn.Parameter(torch.full((1,), temperature))
        self.drop = nn.Dropout(drop)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias over the temperature."""
        return self.weight / self.temperature, self.bias / self.temperature

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return (D, B, out), given ``matrices``."""
        return torch.baddbmm(bias, self.drop(x), weight)


Matrices = list[tuple[Tensor, Tensor]]


class Neurons(nn.Module):
    """A net of each neuron's own, from its history (D, B, M) to its activity (D, B).

    Args:
        neurons: D.
        memory: M.
        hidden: width of the layer between; 0 is none, one linear layer and a gate.
        drop: dropout before each layer.
        temperature: at the start.
    """

    def __init__(self, neurons: int, memory: int, hidden: int, drop: float, temperature: float) -> None:
        super().__init__()
        widths = [memory, hidden, 1] if hidden else [memory, 1]
        self.layers = nn.ModuleList(
            NeuronLayer(neurons, before, 2 * after, drop, temperature) for before, after in pairwise(widths)
        )

    def matrices(self) -> Matrices:
        """Return those of all layers, the same for all ticks."""
        return [layer.matrices() for layer in self.layers]  # type: ignore[operator]

    def forward(self, history: Tensor, matrices: Matrices) -> Tensor:
        """Return (D, B)."""
        for layer, (weight, bias) in zip(self.layers, matrices):
            history = F.glu(layer(history, weight, bias))
        return history.squeeze(-1)


class Attention(nn.Module):
    """Attention of one query to the tokens of its input, whose keys and values are computed once for all ticks."""

    def __init__(self, dim: int, num_heads: int, drop: float) -> None:
        super().__init__()
        self.num_heads, self.drop = num_heads, drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, (B, heads, N, d), of tokens (B, N, C)."""
        dim = tokens.shape[-1]
        both = F.linear(tokens, self.qkv.weight[dim:], self.qkv.bias[dim:])
        keys, values = both.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return keys, values

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return (B, C) for queries (B, C)."""
        dim = query.shape[-1]
        query = F.linear(query, self.qkv.weight[:dim], self.qkv.bias[:dim])
        query = query.unflatten(-1, (self.num_heads, 1, -1))  # (B, heads, 1, d)
        drop = self.drop if self.training else 0.0
        return self.proj(F.scaled_dot_product_attention(query, keys, values, dropout_p=drop).flatten(1))


# ---- the machine -----------------------------------------------------------------------------------------------------


class Thought(NamedTuple):
    """The state between two ticks: histories (D, B, M), activities (D, B), decayed sums for attention (S, B)."""

    history: Tensor
    active: Tensor
    total: Tensor


Seen = tuple[Tensor, ...]
"""Of inputs, the same for all ticks: keys and values, or the input itself."""


class ThoughtMachine(nn.Module):
    """What all machines share, from tokens (or plain inputs) to answers. A subclass says what they see: ``see``.

    Args:
        num_classes: outputs, P K; 0 leaves the synchrony.
        token_dim: width of the tokens that are attended to; None takes inputs (B, ``input_dim``) as they are.
        ticks: T.
        dim: D.
        input_dim: width of what synapses are told of the input, a multiple of ``num_heads``.
        num_heads: of the attention.
        synch_out: neurons paired for answers.
        synch_action: neurons paired for attention.
        pairing: one of ``PAIRINGS``.
        self_pairs: of a random pairing, how many are of a neuron with itself.
        synapse_depth: widths of the synapses' U-Net; 1 is one gated layer.
        memory: M.
        memory_dim: hidden width of each neuron's net; 0 makes it linear.
        temperature: at the start, of neurons' layers, above 0. Published: 1, at which synchrony begins near 0.001.
        positions: P, of the answer.
        global_pool: which tick answers: ``"certain"``, the one with the least entropy; ``"last"``; ``"avg"``, the mean
            synchrony of all; or ``""``, every tick, only without classifier.
        drop_rate: dropout in synapses, attention and neurons, in [0, 1).
        nlm_drop_rate: another for neurons; None is the same.

    Raises:
        InputError: numbers out of range or that do not divide, a pairing or a pooling that does not exist.
    """

    def __init__(
        self,
        num_classes: int,
        token_dim: int | None,
        *,
        ticks: int,
        dim: int,
        input_dim: int,
        num_heads: int = 1,
        synch_out: int,
        synch_action: int = 0,
        pairing: str = "random-pairing",
        self_pairs: int = 0,
        synapse_depth: int = 1,
        memory: int,
        memory_dim: int,
        temperature: float = 1.0,
        positions: int = 1,
        global_pool: str = "certain",
        drop_rate: float = 0.0,
        nlm_drop_rate: float | None = None,
    ) -> None:
        super().__init__()
        counts = {"ticks": ticks, "dim": dim, "input_dim": input_dim, "num_heads": num_heads, "memory": memory}
        for name, value in {**counts, "synapse_depth": synapse_depth, "positions": positions}.items():
            if value < 1:
                raise InputError(f"{name} = {value} is not allowed: give 1 or more")
        if temperature <= 0:
            raise InputError(f"temperature = {temperature} is not allowed: give a number above 0, published: 1")
        if token_dim is not None and input_dim % num_heads:
            raise InputError(f"num_heads = {num_heads} does not divide input_dim = {input_dim}: give a divisor of it")
        if pairing == "first-last" and synch_out + synch_action > dim:
            raise InputError(
                f"synch_out = {synch_out} first and synch_action = {synch_action} last neurons are more than dim = "
                f"{dim}: give fewer, or another pairing"
            )
        if synapse_depth > 1 and dim < BOTTLENECK:
            raise InputError(f"dim = {dim} is not allowed with a U-Net of synapses: give {BOTTLENECK} or more")
        self.ticks, self.positions = ticks, positions
        self.out = Synchronisation(draw_pairs(pairing, dim, synch_out, self_pairs=self_pairs))
        self.num_features = self.head_hidden_size = self.out.pairs.shape[1]
        if token_dim is not None:
            self.action = Synchronisation(draw_pairs(pairing, dim, synch_action, last=True, self_pairs=self_pairs))
            self.kv_proj = nn.Sequential(nn.Linear(token_dim, input_dim), nn.LayerNorm(input_dim))
            self.q_proj = nn.Linear(self.action.pairs.shape[1], input_dim)
            self.attention = Attention(input_dim, num_heads, drop_rate)
        self.synapses: nn.Module
        if synapse_depth == 1:
            gated = nn.Linear(input_dim + dim, 2 * dim)
            self.synapses = nn.Sequential(nn.Dropout(drop_rate), gated, nn.GLU(), nn.LayerNorm(dim))
        else:
            self.synapses = Synapses(input_dim + dim, dim, synapse_depth, drop_rate)
        neurons_drop = drop_rate if nlm_drop_rate is None else nlm_drop_rate
        self.neurons = Neurons(dim, memory, memory_dim, neurons_drop, temperature)
        least, most = math.sqrt(1 / (dim + memory)), math.sqrt(1 / dim)
        self.start_history = nn.Parameter(torch.empty(dim, memory).uniform_(-least, least))
        self.start_active = nn.Parameter(torch.empty(dim).uniform_(-most, most))
        self.grad_checkpointing = False
        self.reset_classifier(num_classes, global_pool)

    # ---- ticks

    def see(self, x: Tensor) -> Seen:
        """Return what every tick sees of inputs."""
        raise NotImplementedError

    def _attend(self, tokens: Tensor) -> Seen:
        return self.attention.keys_values(self.kv_proj(tokens))

    def _start(self, batch: int) -> Thought:
        active = self.start_active.unsqueeze(1).expand(-1, batch)
        pairs = self.action.pairs.shape[1] if hasattr(self, "action") else 0
        return Thought(self.start_history.unsqueeze(1).expand(-1, batch, -1), active, active.new_zeros(pairs, batch))

    def _paces(self) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Return the decay of the sums for attention, and what they are multiplied by at each tick."""
        if not hasattr(self, "action"):
            return None, [None] * self.ticks
        rate, scales = self.action.rates(self.ticks)
        return rate, scales.unbind(0)

    def _tick(
        self, seen: Seen, thought: Thought, matrices: Matrices, rate: Tensor | None, scale: Tensor | None
    ) -> Thought:
        history, active, total = thought
        if rate is None or scale is None:
            observed = seen[0]
        else:
            total = rate * total + self.action.products(active)
            synchrony = (total * scale).t().to(active.dtype)
            observed = self.attention(self.q_proj(synchrony), *seen)
        received = self.synapses(torch.cat((observed, active.t()), 1))
        history = torch.cat((history[..., 1:], received.t().unsqueeze(-1)), -1)
        return Thought(history, self.neurons(history, matrices), total)

    def _ticked(self, *state: Any) -> Thought:
        if self.grad_checkpointing and self.training:
            after: Thought = checkpoint(self._tick, *state)
            return after
        return self._tick(*state)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the synchrony for answers after each tick, (B, T, S)."""
        seen, thought, matrices = self.see(x), self._start(x.shape[0]), self.neurons.matrices()
        rate, scales = self._paces()
        active = [thought.active]
        for scale in scales:
            thought = self._ticked(seen, thought, matrices, rate, scale)
            active.append(thought.active)
        # No tick waits for answers: they are read of all at once. The start counts as the first activity.
        return self.out(torch.stack(active))[1:].permute(2, 0, 1).to(thought.active.dtype)

    # ---- answers

    def certainty(self, logits: Tensor) -> Tensor:
        """Return one less the entropy over its maximum, a mean over positions, in [0, 1]: (..) of logits (.., P K)."""
        log_p = logits.unflatten(-1, (self.positions, -1))
        log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32)).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return 1 - (entropy / math.log(max(log_p.shape[-1], 2))).mean(-1)

    def forward_ticks(self, x: Tensor) -> Tensor:
        """Return the logits after every tick, (B, T, P K)."""
        return self.head(self.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the answer (B, P K) of synchronies (B, T, S), or with ``pre_logits`` the synchrony it is read of."""
        if self.global_pool == "certain" and self.num_classes:
            logits = self.head(x)
            tick = self.certainty(logits).argmax(1).view(-1, 1, 1)
            kept = x if pre_logits else logits
            return kept.gather(1, tick.expand(-1, 1, kept.shape[-1])).squeeze(1)
        if self.global_pool:
            x = x.mean(1) if self.global_pool == "avg" else x[:, -1]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer (B, P K) of the tick that ``global_pool`` names."""
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def forward_until(self, x: Tensor, certainty: float = 0.8) -> tuple[Tensor, Tensor]:
        """Think about each input until it is certain enough, and no longer.

        Args:
            x: inputs.
            certainty: at which an input's ticks end; above 1 none ends before the last.

        Returns:
            The most certain answers up to there, (B, P K), and the ticks that each took, from 1 to T, (B,).

        Raises:
            InputError: there is no classifier.
        """
        if not self.num_classes:
            raise InputError("without a classifier nothing is certain: call reset_classifier first")
        seen, thought, matrices = self.see(x), self._start(x.shape[0]), self.neurons.matrices()
        rate, scales = self._paces()
        out_rate, out_scales = self.out.rates(self.ticks + 1)
        total = self.out.products(thought.active)
        left = torch.arange(len(x), device=x.device)
        best = total.new_full((len(x),), -1.0)
        answers, ticks = x.new_zeros(len(x), self.num_classes, dtype=self.start_active.dtype), torch.zeros_like(left)
        for number, scale in enumerate(scales, 1):
            thought = self._tick(seen, thought, matrices, rate, scale)
            total = out_rate * total + self.out.products(thought.active)
            logits = self.head((total * out_scales[number]).t().to(thought.active.dtype))
            found = self.certainty(logits).to(best.dtype)
            ticks[left] = number
            better = found > best[left]
            answers[left[better]] = logits[better].to(answers.dtype)
            best[left[better]] = found[better]
            going = found < certainty
            if not going.any():
                break
            if not going.all():
                left, total = left[going], total[:, going]
                seen = tuple(part[going] for part in seen)
                thought = Thought(*(part[:, going] for part in thought))
        return answers, ticks

    # ---- timm's surface

    def no_weight_decay(self) -> set[str]:
        """Return patterns of what is not decayed: neurons' biases, which are vectors, and what thoughts start with."""
        return {"start_history", "neurons.*.bias"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute ticks again in the backward pass instead of keeping what is inside them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier, which the synchrony of each tick goes through."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, on the device and in the type of the present weights.

        Args:
            num_classes: outputs, a multiple of ``positions``; 0 leaves the synchrony, of the last tick where the most
                certain would answer.
            global_pool: as in the constructor; None leaves it.

        Raises:
            InputError: a pooling that does not exist, none for a classifier, or outputs that positions do not divide.
        """
        if global_pool is not None:
            if global_pool not in POOLS or (num_classes and not global_pool):
                raise InputError(
                    f"global_pool = {global_pool!r} is not allowed: give certain, last or avg, or '' with "
                    "num_classes = 0"
                )
            self.global_pool = global_pool
        if num_classes % self.positions:
            raise InputError(
                f"num_classes = {num_classes} is no multiple of positions = {self.positions}: give as many classes "
                "for each position"
            )
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            place = self.start_active
            self.head = nn.Linear(self.num_features, num_classes, device=place.device, dtype=place.dtype)


# ---- images and mazes ------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """A ResNet up to any of its stages, whose first convolution sees little: 3x3 and no stride, so that it must look.

    Args:
        in_chans: input channels, brought to three first.
        depths: blocks of one to four stages.
        bottleneck: whether blocks are of ResNet-50 and deeper.
        width: channels of the first stage, inside its blocks; doubled with each.
        norm_layer: as timm's ResNet.
    """

    def __init__(
        self, in_chans: int, depths: Sequence[int], bottleneck: bool, width: int, norm_layer: type[nn.Module]
    ) -> None:
        super().__init__()
        block: Any = Bottleneck if bottleneck else BasicBlock
        self.rgb = nn.Conv2d(in_chans, 3, 1)
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = norm_layer(width)
        stages, before = [], width
        for number, depth in enumerate(depths):
            planes, blocks = width * 2**number, []
            after = planes * block.expansion
            for place in range(depth):
                stride = 2 if number and not place else 1
                down: Any = None
                if stride != 1 or before != after:
                    down = downsample_conv(before, after, 1, stride, norm_layer=norm_layer)
                blocks.append(block(before, planes, stride, down, norm_layer=norm_layer))
                before = after
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.num_features = before

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H / s, W / s), s = 2 for one stage, doubled by each further."""
        x = F.relu(self.bn1(self.conv1(self.rgb(x))))
        return self.stages(F.max_pool2d(x, 3, 2, 1))


class CTM(ThoughtMachine):
    """A machine that looks at images of any size, with timm's surface; mazes are images whose answer is a route.

    As published, what it attends to does not say where in the image it lies.

    Args:
        in_chans: input channels.
        num_classes: outputs, P K; 0 leaves the synchrony.
        depths: of the ResNet's stages, one to four of them. The published ResNet-152 has 4 blocks in its second stage,
            and not 8.
        bottleneck, width, norm_layer: as ``Backbone``.
        **options: of ``ThoughtMachine``: ``ticks``, ``dim``, ``positions`` ...

    Raises:
        InputError: as ``ThoughtMachine``, or no stages or empty ones.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 4, 36, 3),
        bottleneck: bool = True,
        width: int = 64,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        **options: Any,
    ) -> None:
        if not 1 <= len(depths) <= 4 or min(depths) < 1:
            raise InputError(f"depths = {tuple(depths)} is not allowed: give the blocks of one to four stages")
        channels = width * 2 ** (len(depths) - 1) * (4 if bottleneck else 1)
        super().__init__(num_classes, channels, **options)
        self.backbone = Backbone(in_chans, depths, bottleneck, width, norm_layer)
        self.feature_info = [
            {"num_chs": channels, "reduction": 2 ** len(depths), "module": f"backbone.stages.{len(depths) - 1}"}
        ]

    def see(self, x: Tensor) -> Seen:
        """Return keys and values of images (B, in_chans, H, W)."""
        return self._attend(self.backbone(x).flatten(2).transpose(1, 2))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into groups by depth: stem, blocks, then all that thinks."""
        blocks = r"^backbone\.stages\.(\d+)" if coarse else r"^backbone\.stages\.(\d+)\.(\d+)"
        thinks = r"^(?:kv_proj|q_proj|attention|action|out|synapses|neurons|start)"
        return {"stem": r"^backbone\.(?:rgb|conv1|bn1)", "blocks": blocks, "thinks": thinks}


# ---- parity and sorting ----------------------------------------------------------------------------------------------


class ParityCTM(ThoughtMachine):
    """A machine for cumulative parity: of signs (B, N), after each place whether those below zero are odd in number.

    Its answer is (B, 2 N). All else begins as published; its scripts vary ticks and memory together: 1 and 1, 10 and 5,
    25 and 10, 50 and 25, 75 and 25, 100 and 50.

    Args:
        bits: N.
        **options: of ``ThoughtMachine``.
    """

    def __init__(self, bits: int = 64, **options: Any) -> None:
        published = {"ticks": 75, "dim": 1024, "input_dim": 512, "num_heads": 8, "synch_out": 32, "synch_action": 32}
        own = {"pairing": "random", "memory": 25, "memory_dim": 16, "positions": bits}
        options = {**published, **own, **options}
        super().__init__(2 * bits, options["input_dim"], **options)
        self.bits = Bits(options["input_dim"])

    def see(self, x: Tensor) -> Seen:
        """Return keys and values of signs, -1 or 1, (B, N)."""
        return self._attend(self.bits(x))


class Bits(nn.Module):
    """Tokens (B, N, C) of signs (B, N): which of two, and where, by an angle from 0 to 180 degrees."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sign = nn.Embedding(2, dim)
        self.place = nn.Linear(2, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, C)."""
        angle = torch.linspace(0, math.pi, x.shape[1], device=x.device, dtype=self.place.weight.dtype)
        return self.sign((x == 1).long()) + self.place(torch.stack((-angle.sin(), angle.cos()), -1))


class SortingCTM(ThoughtMachine):
    """A machine that sorts numbers (B, N), and says one place, or nothing yet, at a tick: no attention, no answer tick.

    Logits (B, T, N + 1) are of places, then of the blank; ``sorted_places`` reads them.

    Args:
        numbers: N.
        **options: of ``ThoughtMachine``.
    """

    def __init__(self, numbers: int = 30, **options: Any) -> None:
        published = {"ticks": 50, "dim": 512, "synch_out": 32, "synapse_depth": 4, "memory": 25, "memory_dim": 4}
        super().__init__(numbers + 1, None, input_dim=numbers, **{**published, **options})

    def see(self, x: Tensor) -> Seen:
        """Return the numbers themselves."""
        return (x,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of all ticks, (B, T, N + 1): the answer is a sequence."""
        return self.forward_ticks(x)


def sorted_places(logits: Tensor) -> list[list[int]]:
    """Return the places that a sorting machine says, in its order: of each tick the likeliest, without blanks.

    A place that is said again before another is said once.
    """
    blank = logits.shape[-1] - 1
    said = []
    for path in logits.argmax(-1).tolist():
        spoken = [place for place in path if place != blank]
        said.append([place for before, place in zip([None, *spoken], spoken) if place != before])
    return said


# ---- the authors' weights --------------------------------------------------------------------------------------------


_AUTHORS = (
    (r"^module\.", ""),
    (r"^initial_rgb\.", "backbone.rgb."),
    (r"^backbone\.embedding\.", "bits.sign."),
    (r"^positional_embedding\.projection\.", "bits.place."),
    (r"^backbone\.layer(\d)\.", lambda found: f"backbone.stages.{int(found[1]) - 1}."),
    (r"^attention\.in_proj_", "attention.qkv."),
    (r"^attention\.out_proj\.", "attention.proj."),
    (r"^synapses\.first_projection\.(\d)", lambda found: f"synapses.first.{int(found[1]) + 1}"),
    (r"^synapses\.(down|up)_projections\.", r"synapses.\1."),
    (r"^synapses\.skip_lns\.", "synapses.norms."),
    (r"^trace_processor\.0\.(\d)\.", lambda found: f"neurons.layers.{int(found[1]) // 2}."),
    (r"^start_activated_state$", "start_active"),
    (r"^start_trace$", "start_history"),
    (r"^decay_params_(action|out)$", r"\1.decay"),
    (r"^output_projector\.0\.", "head."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return the authors' weights, of images, mazes, parity or sorting, under our names and in our order."""
    if "start_active" in state_dict:
        return state_dict
    ours: dict[str, Any] = {}
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.get("model_state_dict", state_dict).items():
        for pattern, name in _AUTHORS:
            key = re.sub(pattern, name, key)
        if found := re.fullmatch(r"(action|out)_neuron_indices_(left|right)", key):
            sides.setdefault(found[1], {})[found[2]] = value
            continue
        if key.startswith("neurons."):
            last = key.rpartition(".")[2]
            key = key.removesuffix(last) + {"w1": "weight", "b1": "bias", "T": "temperature"}[last]
            # Theirs are (in, out, D) and (1, D, out).
            value = {"w1": lambda v: v.permute(2, 0, 1), "b1": lambda v: v.transpose(0, 1), "T": lambda v: v}[last](
                value
            )
        ours[key] = value
    for name, side in sides.items():
        left, right = side["left"], side["right"]
        if len(ours[f"{name}.decay"]) != len(left):  # each with each, which they pair anew at every tick
            rows, columns = torch.triu_indices(len(left), len(left))
            left, right = left[rows], right[columns]
        ours[f"{name}.pairs"] = torch.stack((left, right))
    return ours


# ---- the variants ----------------------------------------------------------------------------------------------------


_CROP: dict[str, Any] = {
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "pool_size": None,
    "first_conv": "backbone.rgb",
}
_CIFAR = {
    **_CROP,
    "num_classes": 10,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "crop_pct": 1.0,
}
_PLAIN = {**_CROP, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}
_SIGNED = {**_PLAIN, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


default_cfgs = generate_default_cfgs(
    {
        "ctm_nano": nano_cfg(first_conv="backbone.rgb"),
        "ctm_imagenet": cfg(**_CROP),
        "ctm_imagenet_75": cfg(**_CROP),
        "ctm_cifar10": cfg(32, **_CIFAR),
        "ctm_maze_large": cfg(99, **{**_PLAIN, "num_classes": 500}),
        "ctm_maze_medium": cfg(39, **{**_SIGNED, "num_classes": 500}),
        "ctm_maze_small": cfg(39, **{**_SIGNED, "num_classes": 250}),
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> CTM:
    return build_model_with_cfg(CTM, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **options)


_IMAGENET: dict[str, Any] = {"dim": 4096, "input_dim": 1024, "num_heads": 16, "memory": 25, "memory_dim": 64}
_MAZES: dict[str, Any] = {
    "depths": (3, 4),
    "bottleneck": False,
    "ticks": 75,
    "dim": 2048,
    "input_dim": 512,
    "synch_out": 64,
    "synch_action": 32,
    "pairing": "first-last",
    "memory": 25,
    "memory_dim": 32,
    "positions": 100,
}


@register_model
def ctm_nano(pretrained: bool = False, **kwargs: Any) -> CTM:
    """0.1 M parameters, 8 ticks, for images of 16 to 64 pixels; ours, with group normalisation for small batches."""
    own = {
        "depths": (1, 1),
        "bottleneck": False,
        "width": 16,
        "norm_layer": GroupNorm1,
        "ticks": 8,
        "dim": 128,
        "input_dim": 64,
        "num_heads": 4,
        "synch_out": 256,
        "synch_action": 64,
        "synapse_depth": 2,
        "memory": 5,
        "memory_dim": 8,
        "temperature": 0.2,
    }
    return _create("ctm_nano", pretrained, **{**own, **kwargs})


@register_model
def ctm_imagenet(pretrained: bool = False, **kwargs: Any) -> CTM:
    """50 ticks, ResNet-152, random pairs; trained with dropout 0.2 outside the neurons."""
    own = {"ticks": 50, "synch_out": 8196, "synch_action": 2048, "self_pairs": 32, "synapse_depth": 8}
    return _create("ctm_imagenet", pretrained, **{**_IMAGENET, **own, **kwargs})


@register_model
def ctm_imagenet_75(pretrained: bool = False, **kwargs: Any) -> CTM:
    """75 ticks, ResNet-152, each of 150 random neurons with each; trained with dropout 0.05."""
    own = {"ticks": 75, "synch_out": 150, "synch_action": 150, "pairing": "random", "synapse_depth": 12}
    return _create("ctm_imagenet_75", pretrained, **{**_IMAGENET, **own, **kwargs})


@register_model
def ctm_cifar10(pretrained: bool = False, **kwargs: Any) -> CTM:
    """50 ticks on the first stage of ResNet-18, at 32 pixels."""
    own = {"depths": (2,), "bottleneck": False, "ticks": 50, "dim": 256, "input_dim": 64, "num_heads": 16}
    own |= {"synch_out": 256, "synch_action": 512, "synapse_depth": 5, "memory": 15, "memory_dim": 64}
    return _create("ctm_cifar10", pretrained, **{**own, **kwargs})


@register_model
def ctm_maze_large(pretrained: bool = False, **kwargs: Any) -> CTM:
    """Mazes of 99 pixels, pixels from 0 to 1, routes of 100 moves; trained with dropout 0.1."""
    return _create("ctm_maze_large", pretrained, **{**_MAZES, "num_heads": 16, "synapse_depth": 8, **kwargs})


@register_model
def ctm_maze_medium(pretrained: bool = False, **kwargs: Any) -> CTM:
    """Mazes of 39 pixels, pixels from -1 to 1, routes of 100 moves; trained with dropout 0.1."""
    return _create("ctm_maze_medium", pretrained, **{**_MAZES, "num_heads": 8, "synapse_depth": 4, **kwargs})


@register_model
def ctm_maze_small(pretrained: bool = False, **kwargs: Any) -> CTM:
    """Mazes of 39 pixels or fewer, pixels from -1 to 1, routes of 50 moves; 50 ticks."""
    own = {"depths": (2,), "ticks": 50, "dim": 1024, "input_dim": 256, "num_heads": 4, "synch_out": 128}
    own |= {"synch_action": 128, "pairing": "random-pairing", "synapse_depth": 8, "positions": 50}
    return _create("ctm_maze_small", pretrained, **{**_MAZES, **own, **kwargs})
