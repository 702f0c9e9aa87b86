"""Continuous Thought Machines: does synchrony over ticks solve parity where an LSTM of the same size does not?

And do more ticks help, and do images that are easy take fewer of them?
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.app.build import count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.data.index import Index
from vitrail.data.synthetic.puzzles import parity_batches
from vitrail.methods.supervised.ctm_training import CTMTraining
from vitrail.models.ctm import Attention, Bits, ParityCTM, Synchronisation, ThoughtMachine

NET: dict[str, Any] = {
    "dim": 64,
    "input_dim": 32,
    "num_heads": 4,
    "synch_out": 16,
    "synch_action": 16,
    "memory": 8,
    "memory_dim": 4,
    "temperature": 0.2,
}
"""Of the parity machines, whose neurons begin louder than published: a hundredth of the published steps are trained."""
TRAINING = "vitrail.methods.supervised.ctm_training:CTMTraining"
PASSES = 6_400
"""Of images, for each net that sees images."""
CERTAIN = 0.8
"""At which thought ends, as in the paper."""
TEST_SEED = 10_000


@dataclass(frozen=True)
class Size:
    """Of parity: places, ticks of the machine and of its short twin, steps, sequences of a step and held out."""

    bits: int = 16
    ticks: int = 16
    few: int = 4
    steps: int = 2_000
    batch: int = 32
    test: int = 1_024


QUICK = Size(ticks=4, few=2, steps=3, batch=8, test=32)


class LSTMAtTicks(nn.Module):
    """The published baseline: an LSTM that attends to the same tokens at each tick by its hidden state.

    Args:
        bits: N.
        ticks: T.
        dim: width of the LSTM.
        input_dim, num_heads: as the machine's.
    """

    def __init__(self, bits: int, ticks: int, dim: int, input_dim: int, num_heads: int) -> None:
        super().__init__()
        self.positions, self.ticks = bits, ticks
        self.bits = Bits(input_dim)
        self.kv_proj = nn.Sequential(nn.Linear(input_dim, input_dim), nn.LayerNorm(input_dim))
        self.q_proj = nn.Linear(dim, input_dim)
        self.attention = Attention(input_dim, num_heads, 0.0)
        self.cell = nn.LSTMCell(input_dim, dim)
        bound = math.sqrt(1 / dim)
        self.start = nn.Parameter(torch.empty(2, dim).uniform_(-bound, bound))
        self.head = nn.Linear(dim, 2 * bits)

    certainty = ThoughtMachine.certainty

    def forward_ticks(self, x: Tensor) -> Tensor:
        """Return the logits after every tick, (B, T, 2 N), of signs (B, N)."""
        seen = self.attention.keys_values(self.kv_proj(self.bits(x)))
        hidden, cell = (start.expand(x.shape[0], -1) for start in self.start)
        after = []
        for _ in range(self.ticks):
            hidden, cell = self.cell(self.attention(self.q_proj(hidden), *seen), (hidden, cell))
            after.append(hidden)
        return self.head(torch.stack(after, 1))


def lstm_like(machine: ParityCTM, size: Size) -> LSTMAtTicks:
    """Return an LSTM with as many parameters as a machine, as near as a whole width comes."""
    wanted, low, high = count_parameters(machine), 1, 4096
    build = {"bits": size.bits, "ticks": machine.ticks, "input_dim": NET["input_dim"], "num_heads": NET["num_heads"]}
    with torch.device("meta"):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if count_parameters(LSTMAtTicks(dim=middle, **build)) > wanted else (middle, high)
    return LSTMAtTicks(dim=low, **build)


def run(ctx: Context) -> Verdict:
    """Train three nets on parity at equal numbers of steps, and two on images; count ticks until they are certain."""
    size = QUICK if ctx.quick else Size()
    curves: dict[str, list[np.ndarray]] = {"ctm": [], "few ticks": [], "lstm": []}
    solved: dict[str, list[float]] = {name: [] for name in curves}
    answers: dict[str, list[float]] = {name: [] for name in curves}
    sizes: dict[str, int] = {}
    for seed in ctx.seeds:
        for name in curves:
            ctx.tell(f"parity, {name}, seed {seed}")
            torch.manual_seed(seed)
            machine = ParityCTM(size.bits, ticks=size.few if name == "few ticks" else size.ticks, **NET)
            net: Any = lstm_like(machine, size) if name == "lstm" else machine
            # The published LSTM answers, and learns, at its last tick: it was the only one that served.
            train_parity(CTMTraining(net, choice="last" if name == "lstm" else "certain"), seed, size)
            right, certainty = parity_test(net, size)
            tick = np.full(len(right), net.ticks - 1) if name == "lstm" else certainty.argmax(1)
            chosen = right[np.arange(len(right)), tick]
            curves[name].append(right.mean((0, 2)))
            answers[name].append(float(chosen.mean()))
            solved[name].append(float(chosen.all(1).mean()))
            sizes[name] = count_parameters(net)
    early = max(size.ticks // 4, 1)
    within = {
        "last tick": [float(curve[-1]) for curve in curves["ctm"]],
        f"tick {early}": [float(curve[early - 1]) for curve in curves["ctm"]],
    }
    images = image_arms(ctx)
    ticks = [ticks_by_difficulty(ctx, *images[seed]) for seed in ctx.seeds]
    quantity = f"share of the {size.bits} places of a sequence answered rightly; half by chance"
    return Verdict(
        [
            paired(
                f"after as many steps, a machine solves more of cumulative parity of {size.bits} signs than an LSTM of "
                "the same size and ticks",
                quantity,
                {name: answers[name] for name in ("ctm", "lstm")},
                ours="ctm",
                against="lstm",
            ),
            paired(
                f"a machine of {size.ticks} ticks solves more than one of {size.few}",
                quantity,
                {name: answers[name] for name in ("ctm", "few ticks")},
                ours="ctm",
                against="few ticks",
            ),
            paired(
                "of one machine, the last tick is more accurate than an early one",
                quantity,
                within,
                ours="last tick",
                against=f"tick {early}",
            ),
            paired(
                "images that a plain net finds easy take fewer ticks until the machine is certain",
                f"ticks until a certainty of {CERTAIN}, or all, mean over held-out images",
                {name: [found[name] for found in ticks] for name in ("easy", "hard")},
                ours="easy",
                against="hard",
                higher_is_better=False,
            ),
            bounded(
                "synchrony by its recursion is the direct sum",
                "largest difference in double precision, as a share of the largest synchrony",
                recursion_gap(),
                at_most=1e-12,
            ),
        ],
        notes=[
            f"Parity: {size.steps:,} steps of {size.batch} new sequences for each net, AdamW at 2e-3 with a cosine; "
            "the paper trains 200,000 steps of 64 on 64 signs, with a thousand neurons, which is not shown. Width, "
            "learning rate and the temperature that neurons begin with were set by two short runs of the machine "
            "alone, on a seed of their own; number of steps by the minutes that a check may take.",
            "The LSTM is the published baseline: one layer, the same tokens, attention, ticks and training but for the "
            "last tick in place of the most certain one.",
            "Images: easy and hard are the halves of the held-out images of which a residual net, trained as long, has "
            "the smaller and the larger loss. ImageNet and mazes are not shown.",
        ],
        tables={
            "parity": [
                {"net": name, "parameters": sizes[name], "places": _mean(answers[name]), "whole": _mean(solved[name])}
                for name in curves
            ],
            "accuracy by tick": [
                {
                    "tick": tick + 1,
                    **{
                        name: _mean([curve[tick] for curve in runs]) if tick < len(runs[0]) else None
                        for name, runs in curves.items()
                    },
                }
                for tick in range(size.ticks)
            ],
            "ticks of images": [
                {
                    "images": name,
                    "ticks": _mean([found[name] for found in ticks]),
                    "top1": _mean([found[f"{name} top1"] for found in ticks]),
                }
                for name in ("easy", "hard")
            ],
            "cost of the arms": [arm_cost(name, arm) for name, arm in zip(("ctm", "plain"), images[ctx.seeds[0]][1:])],
        },
    )


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def train_parity(method: CTMTraining, seed: int, size: Size) -> None:
    """Train a net at ticks on streams of parity."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3, weight_decay=0.0)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=size.steps + 1, pct_start=0.05)
    for batch in islice(parity_batches(size.bits, size.batch, seed=seed), size.steps):
        optimizer.zero_grad(set_to_none=True)
        method(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        method.after_step()
        pace.step()


@torch.inference_mode()
def parity_test(net: Any, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Return which answers to held-out sequences are right, (B, T, N) of 0 and 1, and the certainty, (B, T)."""
    batch = next(parity_batches(size.bits, size.test, seed=TEST_SEED))
    logits = net.forward_ticks(batch["image"])
    said = logits.unflatten(-1, (size.bits, 2)).argmax(-1)
    right = said == batch["target"].unsqueeze(1)
    return right.numpy().astype(float), net.certainty(logits).numpy()


def image_arms(ctx: Context) -> dict[int, tuple[Index, Arm, Arm]]:
    """Train a machine and a plain net on images, for each seed."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    shared = {"train.epochs": epochs, "train.batch_size": 32}
    own = {"model.name": "ctm_nano", "method.name": TRAINING}
    return {
        seed: (
            index,
            ctx.train(index, "ctm", seed, {**shared, **own}),
            ctx.train(index, "plain", seed, {**shared, "model.name": "small_resnet_nano"}),
        )
        for seed in ctx.seeds
    }


@torch.inference_mode()
def ticks_by_difficulty(ctx: Context, index: Index, machine: Arm, plain: Arm) -> dict[str, float]:
    """Return mean ticks until certain, and accuracy, of the easy and the hard half of held-out images."""
    ticks, right, losses = [], [], []
    net: Any = machine.model
    for images, target in ctx.held_out(index, machine.preprocess, most=64 if ctx.quick else 1_000)():
        logits, taken = net.forward_until(images, CERTAIN)
        ticks.append(taken)
        right.append(logits.argmax(1) == target)
        losses.append(F.cross_entropy(plain.model(images), target, reduction="none"))
    taken, hits, loss = (torch.cat(parts).double() for parts in (ticks, right, losses))
    easy = loss <= loss.median()
    halves = {"easy": easy, "hard": ~easy}
    found = {name: float(taken[half].mean()) for name, half in halves.items()}
    return found | {f"{name} top1": float(hits[half].mean()) for name, half in halves.items()}


def recursion_gap() -> float:
    """Return how far the recursion is from sum_k e^{-d (t-k)} z_i z_j / sqrt(sum_k e^{-d (t-k)})."""
    generator = torch.Generator().manual_seed(0)
    module = Synchronisation(torch.randint(9, (2, 30), generator=generator)).double()
    active = torch.randn(40, 9, 4, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        module.decay.copy_(torch.rand(30, generator=generator))
        ages = torch.arange(40)[:, None] - torch.arange(40)
        weights = (-module.decay * ages.clamp(min=0)[..., None]).exp() * (ages >= 0)[..., None]  # (T, T, S)
        above = torch.einsum("tks,ksb->tsb", weights, active[:, module.pairs[0]] * active[:, module.pairs[1]])
        direct = above / weights.sum(1).sqrt().unsqueeze(-1)
        return float((module(active) - direct).abs().max() / direct.abs().max())
