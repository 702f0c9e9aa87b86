"""Mamba in medical imaging: does it do the work of attention in a U-Net, with less, and what do its scans remember?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.app.build import count_parameters
from vitrail.checks.check import Context, Verdict, bounded, paired
from vitrail.evaluate.sliding_window import sliding_window
from vitrail.models.medical_mamba import ResidualUNet, SequenceNet, u_mamba

SIDE, LARGE = 32, 48
"""Pixels of the phantoms to learn from, and of those held out, which go through the nets window by window."""
CLASSES = 3
DIMS, BLOCKS, DECODER = (8, 16, 32, 64), (2, 2, 1, 1), (2, 2, 1)
BATCH, STEPS = 8, 120
"""Phantoms in a step, none of which comes twice, and steps, for every net."""
LENGTH, TOKENS = 96, 6
"""Steps of a sequence, and how many of them a net has to remember."""
DELAY = 64
LAYERS = ("s4", "s4d", "s5", "s6", "attention")
SEQUENCES, SEQUENCE_STEPS = 32, 150


def run(ctx: Context) -> Verdict:
    """Train nets of one frame on phantoms and layers of one frame on sequences, at equal budgets; weigh the memory."""
    dice: dict[str, list[float]] = {name: [] for name in NETS}
    recalled: dict[str, list[float]] = {name: [] for name in LAYERS}
    delayed: dict[str, list[float]] = {name: [] for name in LAYERS}
    steps, sequence_steps = (1, 1) if ctx.quick else (STEPS, SEQUENCE_STEPS)
    held_out, sequences = (2, 8) if ctx.quick else (64, 256)
    for seed in ctx.seeds:
        for name, build in NETS.items():
            ctx.tell(f"{name}, seed {seed}")
            dice[name].append(segment(build, seed, steps=steps, held_out=held_out))
        for layer in LAYERS:
            ctx.tell(f"{layer}, seed {seed}")
            for task, values in ((selective_copying, recalled), (delayed_signal, delayed)):
                values[layer].append(task(layer, seed, steps=sequence_steps, held_out=sequences))
    sizes = (16, 32) if ctx.quick else (32, 64, 128, 256)
    costs = [cost(name, build, side) for name, build in NETS.items() for side in sizes]
    growth = {name: _growth([row for row in costs if row["net"] == name]) for name in NETS}
    quantity = "mean Dice of two structures on held-out phantoms"
    return Verdict(
        [
            paired(
                "U-Mamba segments phantoms better than a U-Net of the same frame with attention in the same places",
                quantity,
                dice,
                ours="u_mamba",
                against="transformer",
            ),
            paired(
                "U-Mamba segments phantoms better than a U-Net of the same frame without it",
                quantity,
                dice,
                ours="u_mamba",
                against="u_net",
            ),
            bounded(
                "the multiply-adds of U-Mamba grow no faster than the number of its pixels",
                "exponent of the multiply-adds over the pixels, from the smallest image to the largest",
                growth["u_mamba"],
                at_most=1.05,
            ),
            bounded(
                "U-Mamba keeps less for its backward pass than the U-Net with attention",
                "ratio of the bytes that they keep, at the largest image",
                _kept(costs, "u_mamba") / _kept(costs, "transformer"),
                at_most=1.0,
            ),
            paired(
                "S6, whose steps depend on what it reads, recalls more tokens from among blanks than S4, whose do not",
                f"share of {TOKENS} tokens recalled from {LENGTH} steps",
                recalled,
                ours="s6",
                against="s4",
            ),
            paired(
                "S4, which begins as a memory of the past, repeats a signal of long ago better than S6",
                f"share of the variance explained of a signal of {DELAY} steps before",
                delayed,
                ours="s4",
                against="s6",
            ),
        ],
        notes=[
            f"Every net sees {STEPS * BATCH:,} phantoms, every layer {SEQUENCE_STEPS * SEQUENCES:,} sequences, none "
            "twice; the rates of learning are the same for all.",
            "U-Mamba is the published design with Mamba in the encoder, made small; the nets with attention and with "
            "both have it in the same two stages, and the one without has nothing there.",
            "Phantoms are noisy ellipses and vessels: no patient's image, and nets of under half a million parameters.",
            "Bytes kept are counted once a storage; attention is torch's fused one, which does not keep its scores.",
            "Multiply-adds do not count the scan, which is elementwise and linear by its definition; the seconds do.",
        ],
        tables={
            "cost against size": costs,
            "all nets, Dice": _means(dice),
            "all layers, selective copying": _means(recalled),
            "all layers, delayed signal": _means(delayed),
        },
    )


# ---- segmentation ----------------------------------------------------------------------------------------------------


def _with(deep: str, early: str) -> Callable[[int], nn.Module]:
    """Return how to build a net with these mixers where U-Mamba has Mamba."""
    return lambda side: ResidualUNet(
        2, 1, CLASSES, DIMS, ("none", early, "none", deep), BLOCKS, DECODER, finest_skip=False
    )


NETS: dict[str, Callable[[int], nn.Module]] = {
    "u_mamba": lambda side: u_mamba("enc", 2, 1, CLASSES, stages=4, dim=8, image_size=(side, side)),
    "u_net": _with("none", "none"),
    "transformer": _with("attention", "attention"),
    "hybrid": _with("attention", "mamba"),
}


def phantoms(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images (N, 1, S, S) of ellipses (1) and of vessels (2) that cross them, and their labels (N, S, S).

    Both are only a little brighter than the noise, the vessels are as bright as small bright grains that are none.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, 1, 1, generator=generator)

    rows, columns = torch.meshgrid(*[torch.arange(side) / side - 0.5] * 2, indexing="ij")
    middle = 0.5 * (draw(count, 2) - 0.5)
    turn, axes = math.pi * draw(count), 0.12 + 0.2 * draw(count, 2)
    y, x = rows - middle[:, 0], columns - middle[:, 1]
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    ellipse = (along / axes[:, 0]) ** 2 + (across / axes[:, 1]) ** 2 < 1
    bend, phase, tilt = 0.1 + 0.1 * draw(count), 6 * draw(count), draw(count) - 0.5
    line = bend * (6 * columns + phase).sin() + tilt * columns + 0.4 * (draw(count) - 0.5)
    vessel = (rows - line).abs() < 1.2 / side
    labels = torch.where(vessel, 2, ellipse.long())
    grains = torch.rand(count, side, side, generator=generator) < 0.02
    clean = 0.6 * (labels == 1) + 1.2 * ((labels == 2) | grains)
    noise = torch.randn(count, side, side, generator=generator)
    return (clean + 0.5 * noise).unsqueeze(1), labels


def segment(build: Callable[[int], nn.Module], seed: int, *, steps: int, held_out: int) -> float:
    """Return the mean Dice on held-out, larger phantoms of a net trained on small ones."""
    torch.manual_seed(seed)
    net = build(SIDE)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        images, labels = phantoms(BATCH, SIDE, generator)
        logits = net(images)
        overlap = soft_dice(logits.softmax(1), labels)
        return F.cross_entropy(logits, labels) + 1 - overlap

    _train(net, loss, steps, rate=2e-3)
    images, labels = phantoms(held_out, LARGE, torch.Generator().manual_seed(10_000 + seed))
    found = sliding_window(net.eval(), images, (SIDE, SIDE), overlap=0.5, batch_size=16).argmax(1)
    return float(soft_dice(F.one_hot(found, CLASSES).movedim(-1, 1).float(), labels))


def soft_dice(shares: Tensor, labels: Tensor) -> Tensor:
    """Return the mean Dice of the classes but the background, for shares (N, K, S, S) and labels (N, S, S)."""
    truth = F.one_hot(labels, CLASSES).movedim(-1, 1).to(shares.dtype)
    both, either = (shares * truth).sum((0, 2, 3)), (shares + truth).sum((0, 2, 3))
    return ((2 * both + 1e-6) / (either + 1e-6))[1:].mean()


def cost(name: str, build: Callable[[int], nn.Module], side: int) -> dict[str, Any]:
    """Return what a net costs at a side: multiply-adds, bytes kept for a backward pass, seconds forward and back."""
    torch.manual_seed(0)
    net, image = build(side), torch.zeros(1, 1, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(side).to("meta")(image.to("meta"))
    kept: dict[int, int] = {}

    def weigh(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    own = {value.untyped_storage().data_ptr() for value in net.parameters()}
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda value: value):
        out = net(image)
    out.square().mean().backward()
    seconds = time.perf_counter() - start
    return {
        "net": name,
        "side": side,
        "parameters": count_parameters(net),
        "madds_m": counter.get_total_flops() / 2e6,
        "kept_mb": sum(size for place, size in kept.items() if place not in own) / 1e6,
        "seconds": seconds,
    }


def _growth(rows: list[dict[str, Any]]) -> float:
    first, last = rows[0], rows[-1]
    return math.log(last["madds_m"] / first["madds_m"]) / (2 * math.log(last["side"] / first["side"]))


def _kept(costs: list[dict[str, Any]], name: str) -> float:
    return float([row for row in costs if row["net"] == name][-1]["kept_mb"])


# ---- sequences -------------------------------------------------------------------------------------------------------


def selective_copying(layer: str, seed: int, *, steps: int, held_out: int) -> float:
    """Return the share of tokens recalled, in their order, at the end of a sequence in which they lie among blanks."""
    torch.manual_seed(seed)
    net = SequenceNet(8, 8, layer=layer, length=LENGTH + TOKENS)
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(1, 7, (count, TOKENS), generator=generator)
        places = torch.rand(count, LENGTH, generator=generator).argsort(1)[:, :TOKENS].sort(1).values
        sequence = torch.zeros(count, LENGTH + TOKENS, dtype=torch.long).scatter(1, places, tokens)
        sequence[:, LENGTH:] = 7  # asks for the next token
        return F.one_hot(sequence, 8).float(), tokens

    def loss() -> Tensor:
        x, tokens = draw(SEQUENCES)
        return F.cross_entropy(net(x)[:, LENGTH:].transpose(1, 2), tokens)

    _train(net, loss, steps, rate=4e-3)
    with torch.no_grad():
        x, tokens = draw(held_out)
        return float((net.eval()(x)[:, LENGTH:].argmax(-1) == tokens).float().mean())


def delayed_signal(layer: str, seed: int, *, steps: int, held_out: int) -> float:
    """Return the share of the variance explained of a smooth random signal, ``DELAY`` steps after it was read."""
    torch.manual_seed(seed)
    net = SequenceNet(1, 1, layer=layer, length=2 * DELAY)
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.hann_window(9, periodic=False)
    smooth = (smooth / smooth.square().sum().sqrt()).view(1, 1, -1)

    def draw(count: int) -> Tensor:
        noise = torch.randn(count, 1, 2 * DELAY + 8, generator=generator)
        return F.conv1d(noise, smooth).transpose(1, 2)

    def error(x: Tensor) -> Tensor:
        return F.mse_loss(net(x)[:, DELAY:], x[:, :-DELAY])

    _train(net, lambda: error(draw(SEQUENCES)), steps, rate=4e-3)
    with torch.no_grad():
        net.eval()
        x = draw(held_out)
        return float(1 - error(x) / x[:, :-DELAY].var())


def _train(net: nn.Module, loss: Callable[[], Tensor], steps: int, *, rate: float) -> None:
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 2))
    net.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def _means(arms: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"arm": name, "mean": sum(values) / len(values)} for name, values in arms.items()]
