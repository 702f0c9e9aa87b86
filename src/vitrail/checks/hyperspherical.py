"""Classes that were never trained: normalised softmax against triplets, pairs and plain softmax.

Half of the classes are held out. Each arm trains the same net on the other half; then every held-out class is enrolled
from a few examples, by the direction of their mean embedding, and images are answered among the new classes (disjoint)
or among all (joint). Where the classifier learned a vector for each trained class on the sphere, that stands for it;
the other arms have prototypes of training images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vitrail.checks.check import Arm, Context, Finding, Verdict, arm_cost, paired
from vitrail.data.index import Index
from vitrail.data.subset import ClassSubset
from vitrail.evaluate.novel_classes import Embedded, NovelAccuracy, embedded, novel_accuracy, prototypes

SPHERE: dict[str, Any] = {"model.edits": [{"name": "hyperspherical"}]}
PLAIN: dict[str, Any] = {"method.options": {"smoothing": 0.0}}
ARMS: dict[str, dict[str, Any]] = {
    "normalised softmax": {**SPHERE, **PLAIN},
    "triplet": {**SPHERE, "method.name": "hyperspherical:TripletTraining"},
    "contrastive": {**SPHERE, "method.name": "hyperspherical:ContrastiveTraining"},
    "softmax": PLAIN,
}
OURS = "normalised softmax"
PASSES = {"fashion": 7_000, "digits": 9_000}
"""Of images, for each arm."""
SHOTS = (1, 5, 20)
SHOWN = 5
"""Examples per new class in the findings."""
DRAWS = 10
"""Of the examples, over which an accuracy is a mean."""
MOST = 2_000
"""Images that are embedded, of each kind."""


def run(ctx: Context) -> Verdict:
    """Train all arms on half of the classes, and enrol the other half."""
    names = ("digits",) if ctx.quick or ctx.data is not None else ("fashion", "digits")
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    notes = []
    for name in names:
        whole = ctx.index(name, val_fraction=0.02) if name == "fashion" else ctx.index(name)
        seen, unseen = ClassSubset(whole, whole.classes[::2]), ClassSubset(whole, whole.classes[1::2])
        epochs = 0.1 if ctx.quick else PASSES[name] / len(seen.rows("train"))
        common = {"model.options": {"stem_stride": 2}, "train.epochs": epochs}
        for arm_name, own in ARMS.items():
            for seed in ctx.seeds:
                arm = ctx.train(seen, f"{name}-{arm_name.replace(' ', '-')}", seed, {**common, **own})
                for shots, found in judged(ctx, arm, seen, unseen, learned=arm_name == OURS).items():
                    rows.append({"data": name, "arm": arm_name, "seed": seed, "shots": shots, **vars(found)})
                if seed == ctx.seeds[0] and name == names[0]:
                    costs.append(arm_cost(arm_name, arm))
        notes.append(
            f"{name}: {len(seen.rows('train')):,} training images of {len(seen.classes)} classes, {epochs:.3g} epochs "
            f"for every arm; {len(unseen.classes)} classes are held out."
        )
    notes += [
        f"Accuracies are means over {DRAWS} draws of the examples; the findings have {SHOWN} of each new class, the "
        "table also 1 and 20. The paper enrols from all training images of the new classes.",
        "All arms but softmax embed features in 60 dimensions before the sphere; softmax has the features themselves.",
        "Small nets on small images: the paper's other sets are not shown.",
    ]

    def beats(data: str, other: str, scenario: str) -> Finding:
        values = {
            arm: [row[scenario] for row in rows if (row["data"], row["arm"], row["shots"]) == (data, arm, SHOWN)]
            for arm in (OURS, other)
        }
        where = "the new classes" if scenario == "disjoint" else "new and trained classes"
        return paired(
            f"{data}: among {where}, normalised softmax is more accurate than {other}",
            f"{scenario} accuracy with {SHOWN} examples of each new class, a share",
            values,
            ours=OURS,
            against=other,
        )

    findings = [
        beats(data, other, scenario) for data in names for other in list(ARMS)[1:] for scenario in ("disjoint", "joint")
    ]
    return Verdict(findings, notes, {"novel classes": rows, "cost of the arms": costs})


def judged(ctx: Context, arm: Arm, seen: Index, unseen: Index, *, learned: bool) -> dict[int, NovelAccuracy]:
    """Return an arm's accuracies by examples of each new class, as means over draws of these.

    Args:
        ctx, arm: as they are.
        seen, unseen: the trained and the new classes.
        learned: the vectors of trained classes are those of the classifier; else prototypes of training images.
    """
    most = 100 if ctx.quick else MOST
    pool = embedded(arm.model, ctx.training_images(unseen, arm.preprocess, most=most))
    queries = embedded(arm.model, ctx.held_out(unseen, arm.preprocess, most=most))
    trained = embedded(arm.model, ctx.held_out(seen, arm.preprocess, most=most))
    if learned:
        vectors = arm.model.get_classifier().weight.detach()  # type: ignore[operator]
    else:
        vectors = prototypes(embedded(arm.model, ctx.training_images(seen, arm.preprocess, most=most)))
    means = {}
    for shots in SHOTS:
        found = [vars(novel_accuracy(drawn(pool, shots, draw), queries, vectors, trained)) for draw in range(DRAWS)]
        means[shots] = NovelAccuracy(**{key: float(np.mean([each[key] for each in found])) for key in found[0]})
    return means


def drawn(pool: Embedded, shots: int, draw: int) -> Embedded:
    """Return up to ``shots`` examples of each class."""
    embeddings, targets = pool
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(draw))
    kept = torch.cat([order[targets[order] == number][:shots] for number in targets.unique()])
    return embeddings[kept], targets[kept]
