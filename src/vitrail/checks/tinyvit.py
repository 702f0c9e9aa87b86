"""TinyViT: is a net that was contracted step by step better than one that was thinned evenly to the same limits?

The paper contracts a net of tens of millions of parameters and trains the candidates on ImageNet. Here a net of under a
million is contracted under limits on parameters and speed, and candidates see a few thousand small images. For speed
stand multiply-adds, which are the same on every machine. What the label store and the replay of stored logits save is
not shown: they are missing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.check import Arm, Context, Verdict, arm_cost, paired
from vitrail.data.index import Index
from vitrail.models import create_model
from vitrail.search.contraction import Factors, Limits, contract
from vitrail.training.validate import validate

START = Factors(
    embed_dims=(32, 64, 128), depths=(2, 2, 4), window_sizes=(4, 4, 4), conv_ratio=4.0, mlp_ratio=4.0, head_dim=16
)
SMALL = Factors((16, 32, 48), (1, 1, 1), (4, 4, 4), conv_ratio=2.0, mlp_ratio=2.0, head_dim=16)
"""In place of it in quick mode."""
SIDE = 28
SHARE = 5
"""Of the large net's parameters one in five may be left, and its multiply-adds have to fall as far."""
STEPS, CANDIDATES = 3, 4
TRIED, TRAINED = 2_000, 8_000
"""Images that a candidate is scored after, and that each arm learns from."""


def run(ctx: Context) -> Verdict:
    """Contract a net in steps and at one go, thin it evenly, and train what comes out alike."""
    index = ctx.index("digits" if ctx.quick else "fashion")
    images = len(index.rows("train"))
    tried, trained = (64, 64) if ctx.quick else (TRIED, TRAINED)
    steps, candidates = (1, 1) if ctx.quick else (STEPS, CANDIDATES)
    start, share = (SMALL, 1.2) if ctx.quick else (START, SHARE)
    limits = Limits(params(start) / share, speed(start) * share)
    arms: dict[str, list[Arm]] = {"in steps": [], "at one go": [], "evenly": []}
    found: list[dict[str, Any]] = []
    for seed in ctx.seeds:

        def score(factors: Factors, seed: int = seed) -> float:
            arm = ctx.train(index, f"try-{abs(hash(factors))}", seed, settings(factors, tried / images))
            return on_validation(ctx, index, arm, factors)

        chosen = {
            name: contract(start, limits, params, speed, score, steps=number, candidates=each, seed=seed)[
                -1
            ].best.factors
            for name, number, each in (("in steps", steps, candidates), ("at one go", 1, steps * candidates))
        }
        chosen["evenly"] = thinned(start, limits)
        for name, factors in chosen.items():
            arms[name].append(ctx.train(index, name.replace(" ", "-"), seed, settings(factors, trained / images)))
            row = {"arm": name, "seed": seed, "parameters": params(factors), "madds": 1e9 / speed(factors)}
            found.append({**row, **{key: str(value) for key, value in factors.options().items()}})
    top1 = {name: [arm.top1 for arm in those] for name, those in arms.items()}
    quantity = "top-1 accuracy, held-out images"
    return Verdict(
        [
            paired(
                "Contracted step by step a net is more accurate than thinned evenly to the same limits.",
                quantity,
                top1,
                ours="in steps",
                against="evenly",
            ),
            paired(
                "Contracted step by step it is more accurate than contracted at one go, with as many nets tried.",
                quantity,
                top1,
                ours="in steps",
                against="at one go",
            ),
        ],
        notes=[
            f"{images:,} training images; each candidate sees {tried:,} of them, each arm {trained:,}.",
            f"At most {limits.params:,.0f} parameters and {1e9 / limits.throughput:,.0f} multiply-adds for an image of "
            f"{SIDE} pixels: the large net takes {share:g} times as much; {steps} steps of up to {candidates} "
            "candidates.",
            "Candidates are scored on validation images, arms on the test images that no choice has seen.",
            "The distillation that the paper's headline accuracy rests on is missing, and nothing here is about it.",
        ],
        tables={
            "what was found": found,
            "cost of the arms, first seed": [arm_cost(name, those[0]) for name, those in arms.items()],
        },
    )


def settings(factors: Factors, epochs: float) -> dict[str, Any]:
    """Return what a net is trained with."""
    return {
        "model.name": "tinyvit_nano",
        "model.options": factors.options(),
        "train.batch_size": 32,
        "train.epochs": epochs,
    }


def on_validation(ctx: Context, index: Index, arm: Arm, factors: Factors) -> float:
    """Return the share of validation images that an arm answers rightly."""
    recipe = ctx.recipe(index, settings(factors, 1.0))
    logits, targets, _ = validate(arm.model, index, arm.preprocess, recipe, index.rows("val"))
    return float((logits.argmax(1) == targets).mean())


@cache
def params(factors: Factors) -> int:
    """Return the parameters of a net."""
    return count_parameters(build(factors))


@cache
def speed(factors: Factors) -> float:
    """Return images per billion multiply-adds, in place of images a second."""
    with sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted on every device
        return 1e9 / count_flops(build(factors), (SIDE, SIDE))


def build(factors: Factors) -> nn.Module:
    """Return the net of some factors."""
    return create_model("tinyvit_nano", num_classes=10, **factors.options())


def thinned(start: Factors, limits: Limits) -> Factors:
    """Return the widest net within the limits of which every width is the same share of the large net's."""
    shares = (
        replace(
            start,
            embed_dims=tuple(width * sixteenths // 16 for width in start.embed_dims),
            head_dim=start.head_dim * sixteenths // 16,
        )
        for sixteenths in range(15, 0, -1)
    )
    return next(
        factors for factors in shares if params(factors) <= limits.params and speed(factors) >= limits.throughput
    )
