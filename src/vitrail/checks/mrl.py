"""Matryoshka representations: what is one nested net worth at each dimension, against a net trained for each?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitrail.checks.check import Arm, Context, Verdict, bounded, paired
from vitrail.data.index import Index
from vitrail.evaluate.cascade import fit_cascade, nearest_right, nested_answers
from vitrail.layers.nested import its_nested_classifier
from vitrail.retrieve.adaptive import AdaptiveIndex, mean_average_precision, search_madds

PASSES = 4_000
"""Of images, for each arm: minutes for twenty-one nets on two cores."""
NEIGHBOURS, SHORTLIST = 10, 200
LOST = 0.01
"""Of mean average precision, that ranking a shortlist anew may cost: what 'equally accurate' is read as."""


def run(ctx: Context) -> Verdict:
    """Train a net for each dimension, one whose classifiers are nested, and one whose single classifier is."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    epochs = 0.05 if ctx.quick else PASSES / len(index.rows("train"))
    dims = (8, 128) if ctx.quick else (8, 16, 32, 64, 128)
    common = {"model.name": "small_resnet_nano", "train.epochs": epochs, "method.name": "mrl:MatryoshkaTraining"}

    def train(name: str, seed: int, independent: bool, weights: Sequence[float]) -> dict[str, Any]:
        edit = {"name": "mrl", "options": {"dims": list(dims), "independent": independent}}
        own = {"model.edits": [edit], "method.options": {"weights": list(weights)}}
        return _measured(ctx, index, ctx.train(index, name, seed, {**common, **own}))

    found: dict[str, list[dict[str, Any]]] = {
        "MRL": [train("mrl", seed, True, [1.0] * len(dims)) for seed in ctx.seeds],
        "MRL-E": [train("mrl-e", seed, False, [1.0] * len(dims)) for seed in ctx.seeds],
    }
    # One whose other dimensions weigh nothing is a net of fixed features, as published: it reads the first ones.
    fixed = [
        [train(f"fixed-{dim}", seed, True, [float(dim == other) for other in dims]) for seed in ctx.seeds]
        for dim in dims
    ]
    few = dims[:-1]
    mean: dict[str, dict[str, list[float]]] = {
        what: {name: [float(np.mean([run[what][dim] for dim in few])) for run in runs] for name, runs in found.items()}
        for what in ("top1", "neighbour_top1")
    }
    for what, values in mean.items():
        values["separate"] = [
            float(np.mean([fixed[level][i][what][dim] for level, dim in enumerate(few)])) for i in range(len(ctx.seeds))
        ]
    mean["neighbour_top1"]["components"] = [
        float(np.mean([fixed[-1][i]["components"][dim] for dim in few])) for i in range(len(ctx.seeds))
    ]
    cascades = [run["cascade"] for run in found["MRL"]]
    rivals = [
        next((dim for level, dim in enumerate(dims) if fixed[level][i]["top1"][dim] >= cascade["top1"]), dims[-1])
        for i, cascade in enumerate(cascades)
    ]
    search = [_search(run, dims) for run in found["MRL"]]
    rows = [
        {
            "net": name,
            "seed": seed,
            "dim": dim,
            "top1": runs[i]["top1"][dim],
            "neighbour_top1": runs[i]["neighbour_top1"][dim],
        }
        for name, runs in {**found, **{f"fixed {dim}": fixed[level] for level, dim in enumerate(dims)}}.items()
        for i, seed in enumerate(ctx.seeds)
        for dim in (dims if name in found else [int(name.split()[1])])
    ]
    return Verdict(
        [
            paired(
                "at equal accuracy the cascade of a nested net takes fewer numbers than a net of fixed features",
                "numbers per held-out image: expected of the cascade; of the smallest fixed net that is as accurate",
                {"cascade": [cascade["dim"] for cascade in cascades], "fixed": [float(dim) for dim in rivals]},
                ours="cascade",
                against="fixed",
                higher_is_better=False,
            ),
            paired(
                "below the whole width a nested net classifies better than nets trained for each dimension",
                "top-1 on held-out images, mean over dimensions",
                mean["top1"],
                ours="MRL",
                against="separate",
            ),
            paired(
                "below the whole width nearest neighbours of nested embeddings are right more often",
                "top-1 of the nearest training image, mean over dimensions",
                mean["neighbour_top1"],
                ours="MRL",
                against="separate",
            ),
            paired(
                "cut nested embeddings find better than as many principal components of the widest net's",
                "top-1 of the nearest training image, mean over dimensions",
                mean["neighbour_top1"],
                ours="MRL",
                against="components",
            ),
            paired(
                "one classifier for each dimension is better than one for all",
                "top-1 on held-out images, mean over dimensions",
                mean["top1"],
                ours="MRL",
                against="MRL-E",
            ),
            bounded(
                "a shortlist by the fewest numbers, ranked by all, loses nothing to speak of",
                f"mAP@{NEIGHBOURS} lost against searching by all numbers, mean over seeds",
                float(np.mean([each["searched by all"] - each["ranked anew"] for each in search])),
                at_most=LOST,
            ),
        ],
        notes=[
            f"{len(index.rows('train')):,} training images, {epochs:.3g} epochs for every net; all see as many images, "
            "and separate nets together as many times more as there are dimensions.",
            "Thresholds of the cascade are learned from a fifth of the held-out images, as published, and it is judged "
            "on the others; the authors add the flipped image's answer, which is not done here.",
            "A net of under a million parameters, 128 numbers wide, and ten classes: ImageNet is not shown.",
        ],
        tables={
            "dimensions": rows,
            "cascade": [{"seed": seed, **cascade} for seed, cascade in zip(ctx.seeds, cascades)],
            "retrieval": [{"seed": seed, **each} for seed, each in zip(ctx.seeds, search)],
            "time of a search": _times(2_000 if ctx.quick else 50_000, 64 if ctx.quick else 512),
        },
    )


def _measured(ctx: Context, index: Index, arm: Arm) -> dict[str, Any]:
    """Return a net's accuracy and that of nearest neighbours by dimension, its cascade, and its embeddings."""
    most = 100 if ctx.quick else 2_000
    held_out, training = (take(index, arm.preprocess, most=most) for take in (ctx.held_out, ctx.training_images))
    confidence, right, queries, truth = nested_answers(arm.model, held_out())
    _, _, database, labels = nested_answers(arm.model, training())
    dims = its_nested_classifier(arm.model).dims
    held = np.arange(len(truth)) % 5 == 0
    cascade = fit_cascade(dims, confidence[:, held], right[:, held])
    levels = cascade.levels(confidence[:, ~held])
    _, _, axes = np.linalg.svd(database - database.mean(0), full_matrices=False)
    rotated = [(part - database.mean(0)) @ axes.T for part in (queries, database)]
    return {
        "top1": {dim: float(right[level].mean()) for level, dim in enumerate(dims)},
        "neighbour_top1": {dim: nearest_right(dim, queries, truth, database, labels) for dim in dims},
        "components": {dim: nearest_right(dim, rotated[0], truth, rotated[1], labels) for dim in dims},
        "cascade": {
            "dim": cascade.expected_dim(levels),
            "top1": float(right[:, ~held][levels, np.arange(len(levels))].mean()),
            "top1_of_all_numbers": float(right[-1, ~held].mean()),
            "thresholds": ", ".join(f"{threshold:.2f}" for threshold in cascade.thresholds),
        },
        "vectors": (queries, truth, database, labels),
    }


def _search(run: dict[str, Any], dims: Sequence[int]) -> dict[str, float]:
    """Return mAP of searches by the fewest and by all numbers, of a ranked shortlist and of a funnel; and the cost."""
    queries, truth, database, labels = run["vectors"]
    wide, lengths = dims[1:], [max(NEIGHBOURS, SHORTLIST >> step) for step in range(len(dims) - 1)]
    lengths = [min(length, len(database)) for length in lengths]
    short = AdaptiveIndex(database, dims[0])
    ways = {
        "searched by the fewest": short.search(queries, NEIGHBOURS),
        "searched by all": AdaptiveIndex(database, dims[-1]).search(queries, NEIGHBOURS),
        "ranked anew": short.adaptive(queries, NEIGHBOURS, shortlist=lengths[0]),
        "funnel": short.funnel(queries, NEIGHBOURS, dims=wide, shortlists=lengths),
    }
    cost = {
        "madds, all": float(search_madds(len(database), dims[-1])),
        "madds, ranked anew": float(search_madds(len(database), dims[0], dims=dims[-1:], shortlists=lengths[:1])),
        "madds, funnel": float(search_madds(len(database), dims[0], dims=wide, shortlists=lengths)),
    }
    return {name: mean_average_precision(rows, truth, labels, NEIGHBOURS) for name, rows in ways.items()} | cost


def _times(count: int, width: int) -> list[dict[str, Any]]:
    """Return milliseconds of a query among random vectors: by all numbers, and by 16 with a shortlist ranked anew."""
    vectors = np.random.default_rng(0).standard_normal((count, width), np.float32)
    queries, rows = vectors[:20] + 0.1, []
    for kind in ("exact", "hnsw"):
        few, whole = (
            AdaptiveIndex(vectors[: count // (1 if kind == "exact" else 10)], d, kind=kind) for d in (16, width)
        )
        ways = {
            f"{kind}, {width} numbers": lambda index=whole: index.search(queries, NEIGHBOURS),
            f"{kind}, 16 numbers, {SHORTLIST} ranked anew": lambda index=few: index.adaptive(queries, NEIGHBOURS),
        }
        for name, way in ways.items():
            spent = []
            for _ in range(3):
                start = time.perf_counter()
                way()
                spent.append(time.perf_counter() - start)
            rows.append(
                {"search": name, "vectors": len(few.embeddings), "ms_per_query": 1e3 * min(spent) / len(queries)}
            )
    return rows
