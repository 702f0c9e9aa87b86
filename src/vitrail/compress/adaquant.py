"""AdaQuant: layer-wise calibration, integer programming for bits, and tuned statistics.

Hubara, Nahshan, Hanani, Banner and Soudry, "Improving Post Training Neural Quantization: Layer-wise Calibration and
Integer Programming" (ICML 2021), https://arxiv.org/abs/2006.10518. Batch norm is folded; then

1. each layer's weight, bias, and the ranges (scale and zero point) of its weight and its input are optimised so that
   its output on a few calibration images stays what it was (section 3.1): all layers for themselves ("parallel"), or
   each on what the quantised layers before it put out ("sequential");
2. an integer programme chooses the bits of each layer: the least loss within a size, or the least size within a loss,
   from what replacing one layer at a time costs (section 3.2);
3. batch-norm statistics are estimated anew on the quantised network and folded again (section 3.3), and
4. biases are tuned so that the output is the float network's (section 3.4).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.compress.allocate import Limit, allocate
from vitrail.compress.compressor import Budget, Compressed
from vitrail.compress.quantize.adaround import adaround
from vitrail.compress.quantize.capture import capture, mean_ranges, within
from vitrail.compress.quantize.folding import fold_batch_norms
from vitrail.compress.quantize.layers import (
    LayerFacts,
    QuantLayer,
    first_images,
    fix,
    float_bytes,
    replace,
    trace,
    weight_bytes,
)
from vitrail.compress.quantize.quantiser import check_bits
from vitrail.data.batches import Batches
from vitrail.errors import InputError, VitrailError

Layerwise = Literal["adaquant", "adaround", "none"]
Order = Literal["parallel", "sequential"]
LEAST_LOSS = 1e-6
"""What a lower width costs at least: fewer bits are never taken for nothing."""
EDGE_BITS = 8


def adaquant(
    layer: QuantLayer,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int = 1000,
    batch_size: int = 50,
    seed: int = 0,
    lr_weight: float = 1e-5,
    lr_bias: float = 1e-3,
    lr_weight_range: float = 1e-3,
    lr_input_range: float = 1e-1,
) -> None:
    """Optimise weight, bias and both ranges of ``layer`` for its output, in place (equation 1).

    Args:
        layer: quantised, in evaluation mode.
        inputs: what goes in, (N, ...).
        targets: what the float layer makes of it, (N, ...).
        steps: of Adam.
        batch_size: images per step, drawn anew for each.
        seed: of the batches.
        lr_weight, lr_bias, lr_weight_range, lr_input_range: learning rates, as published.
    """
    weight, bias = _parameters(layer)
    groups = [
        {"params": [weight], "lr": lr_weight},
        {"params": list(layer.input_quantiser.parameters()), "lr": lr_input_range},
        {"params": list(layer.weight_quantiser.parameters()), "lr": lr_weight_range},
    ]
    if bias is not None:
        groups.append({"params": [bias], "lr": lr_bias})
    optimiser = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randperm(len(inputs), generator=generator)[:batch_size]
        loss = F.mse_loss(layer(inputs[rows]), targets[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def compress(
    model: nn.Module,
    calibration: Batches,
    budget: Budget,
    *,
    bits: Sequence[int] = (8, 4),
    layerwise: Layerwise = "adaquant",
    order: Order = "parallel",
    keep_edges: bool = False,
    steps: int = 1000,
    batch_size: int = 50,
    retune_norms: bool = True,
    bias_steps: int = 100,
    seed: int = 0,
    memory_mb: float = 512.0,
    tell: Callable[[str], None] = lambda text: None,
) -> Compressed:
    """Quantise weights and inputs of all convolutions and linear layers.

    Args:
        model: any network; its layers that a pass calls once are quantised. It is not changed.
        calibration: 16 images suffice, more is better; the targets serve to allocate bits and to measure a drop.
        budget: bytes or bitops, and drop. With a drop the bytes are minimised, else the loss. What is done after the
            choice of bits (sequential order and tuning) is taken back if the network then exceeds the drop.
        bits: widths to choose from; one alone is used for all layers.
        layerwise: how a layer is optimised: by AdaQuant, by learned rounding alone (AdaRound), or not at all.
        order: what a layer is optimised on: the float network's activations, or those of the quantised layers before
            it. Bits are allocated with the former, as replacing one layer needs layers that stand for themselves.
        keep_edges: first and last layer have 8 bits.
        steps, batch_size: of the optimisation of a layer.
        retune_norms: estimate batch-norm statistics anew.
        bias_steps: steps of bias tuning, of a calibration batch each; 0 is off. The published code takes 4,000.
        seed: of all that is drawn.
        memory_mb: for activations that are held at a time, in megabytes; more makes parallel calibration faster.
        tell: takes a line of text about progress.

    Raises:
        InputError: an option out of its range, a bound that quantisation does not change, no calibration images, or
            targets that do not fit the network's outputs.
        VitrailError: the budget cannot be kept; says what can be had.
    """
    counts = {"steps": (steps, 1), "batch_size": (batch_size, 1), "bias_steps": (bias_steps, 0), "seed": (seed, 0)}
    widths = _check(budget, bits, layerwise, order, counts)
    if next(model.parameters(), None) is None:
        raise InputError(f"{type(model).__name__} has no convolution or linear layer to quantise")
    calibration = _not_empty(calibration)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    before = float_bytes([*model.parameters(), *model.buffers()])
    images = first_images(calibration).to(next(model.parameters()).device)
    teacher, statistics = fold_batch_norms(model, images)
    facts = trace(teacher, calibration)
    work = _Work(teacher, calibration, facts, layerwise, steps, batch_size, seed, memory_mb * 1e6)
    edges = {facts[0].name, facts[-1].name} if keep_edges else set()
    options = {layer.name: [EDGE_BITS] if layer.name in edges else widths for layer in facts}

    variants: dict[str, dict[int, QuantLayer]] = {layer.name: {} for layer in facts}
    if order == "sequential" and budget.drop is None and all(len(choice) == 1 for choice in options.values()):
        work.layerwise = "none"  # nothing is chosen by these variants, and the sequence optimises its own
    for width in sorted({width for choice in options.values() for width in choice}, reverse=True):
        which = [layer for layer in facts if width in options[layer.name]]
        tell(f"{len(which)} layers at {width} bits")
        for name, layer in work.parallel(which, width).items():
            variants[name][width] = layer

    network = copy.deepcopy(teacher)
    chosen, losses = _choose(network, work, budget, options, variants, tell)
    untuned, errors = (copy.deepcopy(network), dict(work.errors)) if budget.drop is not None else (None, work.errors)
    if order == "sequential":
        tell("each layer on what those before it put out")
        work.layerwise = layerwise
        work.sequential(network, chosen)
    if retune_norms and statistics:
        tell("batch-norm statistics")
        _retune_norms(network, calibration, statistics)
    if bias_steps:
        tell("biases")
        _tune_biases(network, teacher, calibration, facts[-1].name, bias_steps)
    if untuned is not None and budget.drop is not None:
        drop = _measure(network, calibration, True) - _measure(teacher, calibration, True)
        if drop > budget.drop + 1e-9:
            tell(f"taken back what followed the choice of bits: the drop would be {drop:.2%}")
            network, work.errors = untuned, errors
    network = fix(network).requires_grad_(False)
    sizes = _sizes(teacher, facts, chosen)
    report: dict[str, Any] = {
        "bytes": math.ceil(sum(sizes.values()) + _rest(teacher, facts)),
        "bytes_before": before,
        "bitops": sum(layer.macs * chosen[layer.name] ** 2 for layer in facts),
        "folded": len(statistics),
        "layers": [
            {
                "name": layer.name,
                "bits": chosen[layer.name],
                "bytes": math.ceil(sizes[layer.name]),
                "error_before": work.errors[layer.name, chosen[layer.name]][0],
                "error": work.errors[layer.name, chosen[layer.name]][1],
                "loss": losses.get(layer.name),
            }
            for layer in facts
        ],
    }
    return Compressed(network, report)


def _check(
    budget: Budget, bits: Sequence[int], layerwise: str, order: str, counts: Mapping[str, tuple[int, int]]
) -> list[int]:
    """Return the widths, largest first, or raise."""
    for name in ("flops", "latency_ms"):
        if getattr(budget, name) is not None:
            raise InputError(f"adaquant cannot keep a budget of {name}, which bits do not change: give bytes or bitops")
    for name, given, allowed in (
        ("layerwise", layerwise, ("adaquant", "adaround", "none")),
        ("order", order, ("parallel", "sequential")),
    ):
        if given not in allowed:
            raise InputError(f"adaquant: {name} = {given!r} is not allowed: give one of {', '.join(allowed)}")
    if isinstance(bits, str) or not isinstance(bits, Collection):
        raise InputError(f"adaquant: bits = {bits!r} is not allowed: give a list of widths, such as (8, 4) or (4,)")
    if not bits:
        raise InputError("adaquant: bits is empty: give one width or more, such as (8, 4)")
    for name, (count, least) in counts.items():
        if not (isinstance(count, Integral) and count >= least):
            raise InputError(f"adaquant: {name} = {count!r} is not allowed: give a whole number from {least}")
    return sorted({check_bits(width) for width in bits}, reverse=True)


def _not_empty(batches: Batches) -> Batches:
    """Return the stream without batches of no images, whose means are not numbers."""
    if not callable(batches):
        raise InputError(
            f"calibration images are a {type(batches).__name__}, which cannot be started again and again: give a "
            "function that returns an iterator of (images, targets), such as vitrail.data.batches.batches_of(...)"
        )
    return lambda: (batch for batch in batches() if len(batch[0]))


# ---- layer by layer


class _Work:
    """Quantises layers of one float network on one calibration set.

    ``errors`` holds, by layer and bits, the mean squared error of the layer's output before and after.
    """

    def __init__(
        self,
        teacher: nn.Module,
        calibration: Batches,
        facts: Sequence[LayerFacts],
        layerwise: Layerwise,
        steps: int,
        batch_size: int,
        seed: int,
        memory: float,
    ) -> None:
        self.teacher, self.calibration, self.facts = teacher, calibration, facts
        self.layerwise, self.steps, self.batch_size, self.seed, self.memory = layerwise, steps, batch_size, seed, memory
        self.images = sum(len(images) for images, _ in calibration())
        if next(iter(calibration()), None) is None:
            raise InputError("calibration images came once and then no more: give a function that starts them anew")
        self.ranges = mean_ranges(teacher, [layer.name for layer in facts], calibration)
        self.errors: dict[tuple[str, int], tuple[float, float]] = {}

    def parallel(self, which: Sequence[LayerFacts], width: int) -> dict[str, QuantLayer]:
        """Return the layers quantised to ``width`` bits, each on the float network's activations."""
        done = {}
        for group in within(which, self.images, self.memory):
            inputs = capture(self.teacher, [layer.name for layer in group], self.calibration)
            for name, given in inputs.items():
                done[name] = self.quantise(name, width, given, given)
        return done

    def sequential(self, network: nn.Module, chosen: dict[str, int]) -> None:
        """Quantise the layers of ``network`` anew, in order, each on what the quantised ones before it put out."""
        for layer in self.facts:
            replace(network, layer.name, copy.deepcopy(self.teacher.get_submodule(layer.name)))
        for layer in self.facts:
            given = capture(network, [layer.name], self.calibration)[layer.name]
            exact = capture(self.teacher, [layer.name], self.calibration)[layer.name]
            replace(network, layer.name, self.quantise(layer.name, chosen[layer.name], given, exact))

    def quantise(self, name: str, width: int, given: Tensor, exact: Tensor) -> QuantLayer:
        """Return a quantised copy of a layer, which on ``given`` does what the layer does on ``exact``."""
        source = self.teacher.get_submodule(name)
        layer = QuantLayer(copy.deepcopy(source), width, *self.ranges[name])
        with torch.no_grad():
            targets = torch.cat([source(part) for part in exact.split(self.batch_size)])
        before = after = self._error(layer, given, targets)
        if self.layerwise != "none":
            plain = copy.deepcopy(layer)
            layer.layer.requires_grad_()
            optimise = adaquant if self.layerwise == "adaquant" else adaround
            optimise(layer, given, targets, steps=self.steps, batch_size=self.batch_size, seed=self.seed)
            after = self._error(layer, given, targets)
            # The published rates are absolute and can be too large for a layer; it then stays as it was.
            if not after <= before:
                layer, after = plain, before
        self.errors[name, width] = before, after
        return layer.requires_grad_(False)

    def _error(self, layer: QuantLayer, given: Tensor, targets: Tensor) -> float:
        with torch.no_grad():
            parts = zip(given.split(self.batch_size), targets.split(self.batch_size), strict=True)
            return float(sum(F.mse_loss(layer(x), y, reduction="sum") for x, y in parts)) / targets.numel()


def _parameters(layer: QuantLayer) -> tuple[nn.Parameter, nn.Parameter | None]:
    inner: Any = layer.layer
    return inner.weight, inner.bias


# ---- bits


def _choose(
    network: nn.Module,
    work: _Work,
    budget: Budget,
    options: dict[str, list[int]],
    variants: dict[str, dict[int, QuantLayer]],
    tell: Callable[[str], None],
) -> tuple[dict[str, int], dict[str, float]]:
    """Put the variant of each layer that the budget allows into ``network``; return bits and measured losses by name.

    What lower widths cost is measured one layer at a time, all others at their highest, and taken to add up.
    """
    names = [layer.name for layer in work.facts]
    best = {name: max(options[name]) for name in names}
    for name in names:
        replace(network, name, variants[name][best[name]])
    by_accuracy = budget.drop is not None
    measured: dict[str, dict[int, float]] = {name: {best[name]: 0.0} for name in names}
    if any(len(options[name]) > 1 for name in names):
        tell("what fewer bits cost, layer by layer")
        base = _measure(network, work.calibration, by_accuracy)
        for name in names:
            for width in options[name]:
                if width != best[name]:
                    replace(network, name, variants[name][width])
                    measured[name][width] = max(_measure(network, work.calibration, by_accuracy) - base, LEAST_LOSS)
            replace(network, name, variants[name][best[name]])
    costs = [[measured[name][width] for width in options[name]] for name in names]
    stored = [[weight_bytes(_weight(work, name), width) for width in options[name]] for name in names]
    rest = _rest(work.teacher, work.facts)
    limits = []
    if budget.bytes is not None:
        limits.append(Limit("bytes of the quantised weights", stored, budget.bytes - rest))
    if budget.bitops is not None:
        macs = [[float(layer.macs * width**2) for width in options[layer.name]] for layer in work.facts]
        limits.append(Limit("bitops", macs, budget.bitops))

    def put(choice: list[int]) -> dict[str, int]:
        chosen = {name: options[name][k] for name, k in zip(names, choice, strict=True)}
        for name, width in chosen.items():
            replace(network, name, variants[name][width])
        return chosen

    if budget.drop is None:
        chosen = put(allocate(costs, limits))
    else:
        chosen = _within_drop(network, work, budget.drop, costs, stored, limits, put)
    return chosen, {name: measured[name][chosen[name]] for name in names}


def _within_drop(
    network: nn.Module,
    work: _Work,
    drop: float,
    costs: list[list[float]],
    stored: list[list[float]],
    limits: list[Limit],
    put: Callable[[list[int]], dict[str, int]],
) -> dict[str, int]:
    """Minimise the bytes within a drop of the accuracy: the programme's bound shrinks until the measured drop fits."""
    exact = _measure(work.teacher, work.calibration, True)
    bound = drop
    for attempt in range(8):
        last = attempt == 7
        chosen = put(allocate(stored, [*limits, Limit("drop", costs, 0.0 if last else bound)]))
        found = _measure(network, work.calibration, True) - exact
        if found <= drop + 1e-9:
            return chosen
        bound /= 2
    raise VitrailError(
        f"a drop of {drop:.2%} cannot be kept: with the most bits it is {found:.2%} on the calibration images; allow "
        "more, give more bits, or more steps"
    )


@torch.no_grad()
def _measure(network: nn.Module, batches: Batches, by_accuracy: bool) -> float:
    """Return the mean loss over the calibration images, or the share of wrong answers."""
    place = next(network.parameters()).device
    total, count = 0.0, 0
    for images, target in batches():
        logits, target = network(images.to(place)).float(), target.to(place)
        _check_targets(logits, target)
        if by_accuracy:
            right = logits.argmax(1)
            hit = right == target if target.ndim == 1 else target.gather(1, right[:, None])[:, 0] > 0.5
            total += float((~hit).sum())
        elif target.ndim == 1:
            total += float(F.cross_entropy(logits, target, reduction="sum"))
        else:
            loss = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
            total += float(loss.mean(1).sum())
        count += len(images)
    return total / count


def _check_targets(logits: Tensor, target: Tensor) -> None:
    classes = logits.shape[1]
    if target.ndim == 1 and not ((target >= 0) & (target < classes)).all():
        raise InputError(
            f"the calibration targets reach from {int(target.min())} to {int(target.max())}, and the network tells "
            f"{classes} classes apart: give images of the classes it was trained on"
        )
    if target.ndim == 2 and target.shape[1] != classes:
        raise InputError(
            f"the calibration targets are of {target.shape[1]} labels, and the network knows {classes}: give images "
            "with the labels it was trained on"
        )


def _weight(work: _Work, name: str) -> Tensor:
    weight: Any = work.teacher.get_submodule(name).weight
    return weight


def _sizes(teacher: nn.Module, facts: Sequence[LayerFacts], chosen: dict[str, int]) -> dict[str, float]:
    """Return the bytes of each quantised weight."""
    weights: dict[str, Any] = {layer.name: teacher.get_submodule(layer.name).weight for layer in facts}
    return {name: weight_bytes(weight, chosen[name]) for name, weight in weights.items()}


def _rest(teacher: nn.Module, facts: Sequence[LayerFacts]) -> float:
    """Return the bytes of what is not quantised: biases, embeddings, normalisations; and a scale per input."""
    quantised: list[Any] = [teacher.get_submodule(layer.name).weight for layer in facts]
    return float_bytes([*teacher.parameters(), *teacher.buffers()]) - float_bytes(quantised) + 8.0 * len(facts)


# ---- statistics


class _Norm(nn.Module):
    """Normalises each batch to a given mean and deviation per channel, and averages what it found."""

    def __init__(self, gamma: Tensor, beta: Tensor) -> None:
        super().__init__()
        self.gamma, self.beta = gamma, beta
        self.mean, self.var, self.images = torch.zeros_like(beta), torch.zeros_like(beta), 0

    def forward(self, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        var, mean = torch.var_mean(x, axes, correction=0)
        self.mean, self.var = self.mean + len(x) * mean, self.var + len(x) * var
        self.images += len(x)
        shape = (-1, *[1] * (x.ndim - 2))
        factor, shift = _factor_and_shift(self.gamma, self.beta, mean, var)
        return x * factor.view(shape) + shift.view(shape)


def _factor_and_shift(gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return what brings a channel of this mean and variance to mean beta and deviation gamma."""
    # As published, which adds the constant on both sides: a channel with the right variance is not touched.
    factor = ((gamma**2 + 1e-5) / (var + 1e-5)).sqrt()
    return factor, beta - mean * factor


@torch.no_grad()
def _retune_norms(network: nn.Module, batches: Batches, statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Bring each folded layer's output back to the mean and deviation that its batch norm gave it on training data.

    One pass, in which later layers see what earlier ones put out after correction. The integers of the weights stay;
    scales and biases change.
    """
    norms = {name: _Norm(gamma, beta) for name, (gamma, beta) in statistics.items()}
    layers: dict[str, Any] = {name: network.get_submodule(name) for name in norms}
    for name, norm in norms.items():
        layers[name].after = norm
    place = next(network.parameters()).device
    for images, _ in batches():
        network(images.to(place))
    for name, norm in norms.items():
        layer = layers[name]
        factor, shift = _factor_and_shift(norm.gamma, norm.beta, norm.mean / norm.images, norm.var / norm.images)
        wide = factor.view(-1, *[1] * (layer.layer.weight.ndim - 1))
        for tensor in (layer.layer.weight, layer.weight_quantiser.low, layer.weight_quantiser.span):
            tensor.mul_(wide)
        layer.layer.bias.mul_(factor).add_(shift)
        layer.after = nn.Identity()


def _tune_biases(network: nn.Module, teacher: nn.Module, batches: Batches, classifier: str, steps: int) -> None:
    """Tune all biases but the classifier's, so that the network's probabilities are the teacher's.

    As published: plain SGD at 0.1 on the divergence averaged over images and classes.
    """
    head = network.get_submodule(classifier)
    held = {id(parameter) for parameter in head.parameters()}
    biases = [p for name, p in network.named_parameters() if name.endswith("bias") and id(p) not in held]
    if not biases:
        return
    place = biases[0].device
    with torch.no_grad():
        wanted = [teacher(images.to(place)).softmax(1) for images, _ in batches()]
    for bias in biases:
        bias.requires_grad_()
    optimiser = torch.optim.SGD(biases, 0.1)
    step = 0
    while step < steps:
        for (images, _), probabilities in zip(batches(), wanted, strict=True):
            loss = F.kl_div(network(images.to(place)).log_softmax(1), probabilities, reduction="none").mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step == steps:
                break
    for bias in biases:
        bias.requires_grad_(False)
