"""Classes as subspaces against classes as vectors: accuracy, and what the features are worth for other classes.

The paper trains on ImageNet and transfers to six other sets by a linear classifier. Here a small residual net learns
every other class of the data, and a logistic regression on its frozen features learns the rest. All arms see the same
images. Beside the linear classifier stand two simple alternatives: cosines with one unit vector per class, under the
same scale, and rows that span subspaces but are trained as any other weights, neither orthonormal nor on a manifold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from vitrail.checks.check import Arm, Context, Verdict, arm_cost, bounded, paired
from vitrail.data.batches import Batches
from vitrail.data.subset import ClassSubset
from vitrail.edits.classifier import replace_classifiers
from vitrail.edits.grassmann_classes import GrassmannHead, drift
from vitrail.edits.surgery import Edit

DIMENSIONS = (1, 2, 4, 8)
GAMMA = 25.0
COSINE = "vitrail.edits.unit_sphere_classes:unit_sphere_classes"
PASSES = 5_000
"""Of images, for each arm: some ten seconds for each of 21 nets on one core."""
MOST = 2_000
"""Images on which the features are judged, of each kind."""
DRIFT = 1e-5


class FreeHead(GrassmannHead):
    """The same logits of rows that are trained as any other weights."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Leave them to the recipe."""
        return []

    def constrain(self) -> None:
        """Leave them as they are."""


def free_rows(*, k: int) -> Edit:
    """Return the edit that puts ``FreeHead`` in the place of a linear classifier."""

    def build(features: int, classes: int, axis: int) -> nn.Module:
        return FreeHead(features, classes, k=k, gamma=GAMMA, axis=axis)

    return lambda model: replace_classifiers(model, build)


def run(ctx: Context) -> Verdict:
    """Train all arms on every other class, and a logistic regression on their features on the rest."""
    whole = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    seen, unseen = ClassSubset(whole, whole.classes[::2]), ClassSubset(whole, whole.classes[1::2])
    epochs = 0.1 if ctx.quick else PASSES / len(seen.rows("train"))
    common = {"model.options": {"stem_stride": 2}, "train.epochs": epochs}
    dimensions = DIMENSIONS[::3] if ctx.quick else DIMENSIONS
    edits: dict[str, list[dict[str, Any]]] = {
        "softmax": [],
        "cosine": [{"name": COSINE, "options": {"embed_dim": 0, "scale": GAMMA}}],
        "free, k = 8": [{"name": "vitrail.checks.gcr:free_rows", "options": {"k": 8}}],
        **{f"k = {k}": [{"name": "gcr", "options": {"k": k, "gamma": GAMMA}}] for k in dimensions},
    }
    arms: dict[str, list[Arm]] = {
        name: [ctx.train(seen, name, seed, {**common, "model.edits": own}) for seed in ctx.seeds]
        for name, own in edits.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}
    transfer: dict[str, list[float]] = {name: [] for name in arms}
    spread: dict[str, list[float]] = {name: [] for name in arms}
    rows: list[dict[str, Any]] = []
    most = 100 if ctx.quick else MOST
    for name, trained in arms.items():
        for seed, arm in zip(ctx.seeds, trained, strict=True):
            train = features(arm.model, ctx.training_images(unseen, arm.preprocess, most=most))
            test = features(arm.model, ctx.held_out(unseen, arm.preprocess, most=most))
            transfer[name].append(linear_transfer(train, test))
            spread[name].append(angle_within(*features(arm.model, ctx.held_out(seen, arm.preprocess, most=most))))
            head: Any = arm.model.get_classifier()  # type: ignore[operator]
            rows.append(
                {
                    "arm": name,
                    "seed": seed,
                    "top1": arm.top1,
                    "transfer": transfer[name][-1],
                    "angle_within_classes": spread[name][-1],
                    "drift": drift(head.weight) if isinstance(head, GrassmannHead) else None,
                }
            )
    drifts = [row["drift"] for row in rows if row["arm"].startswith("k = ")]
    accuracy = "top-1 of the classes it was trained on, held-out images"
    worth = "top-1 of a logistic regression on the features, classes the net never saw"
    return Verdict(
        [
            paired(
                "classes of eight dimensions are more accurate than a linear classifier",
                accuracy,
                top1,
                ours="k = 8",
                against="softmax",
            ),
            paired(
                "features trained with classes of eight dimensions transfer better than those of a linear classifier",
                worth,
                transfer,
                ours="k = 8",
                against="softmax",
            ),
            paired(
                "classes of eight dimensions are more accurate than one unit vector each",
                accuracy,
                top1,
                ours="k = 8",
                against="cosine",
            ),
            paired(
                "features trained with classes of eight dimensions transfer better than those of one unit vector each",
                worth,
                transfer,
                ours="k = 8",
                against="cosine",
            ),
            paired(
                "subspaces that move on the Grassmannian are more accurate than rows that are trained freely",
                accuracy,
                top1,
                ours="k = 8",
                against="free, k = 8",
            ),
            paired(
                "features vary more within a class of eight dimensions than within one of one dimension",
                "mean angle of two features of a class, held-out images, degrees",
                spread,
                ours="k = 8",
                against="k = 1",
            ),
            bounded(
                "training leaves the rows of every class orthonormal",
                "largest entry of S S' - 1 after training",
                max(drifts),
                at_most=DRIFT,
            ),
        ],
        notes=[
            f"{len(seen.rows('train')):,} training images of {len(seen.classes)} classes, {epochs:.3g} epochs for "
            f"every arm; the logistic regression sees {len(train[0]):,} images of the {len(unseen.classes)} others.",
            f"The scale gamma is {GAMMA:g} wherever features are of length one, as published; subspaces learn at 100 "
            "times the rate of the recipe's AdamW, as published for Swin-T.",
            "A net of 128 features on small images, and few classes: ImageNet and its transfer are not shown.",
        ],
        tables={"arms": rows, "cost of the arms": [arm_cost(name, trained[0]) for name, trained in arms.items()]},
    )


@torch.no_grad()
def features(model: nn.Module, data: Batches) -> tuple[Tensor, Tensor]:
    """Return what the classifier is given, (N, C), and the targets (N,)."""
    surface: Any = model
    found = [(surface.forward_head(surface.forward_features(x), pre_logits=True), target) for x, target in data()]
    return torch.cat([x for x, _ in found]), torch.cat([target for _, target in found])


def linear_transfer(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy of a logistic regression of standardised features."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*(part.numpy() for part in train))
    return float(model.score(*(part.numpy() for part in test)))


def angle_within(x: Tensor, targets: Tensor) -> float:
    """Return the mean angle, in degrees, between two features (N, C) of one class, each class counting alike."""
    means = []
    for number in targets.unique():
        own = F.normalize(x[targets == number].double(), dim=1)
        if len(own) > 1:
            apart = ~torch.eye(len(own), dtype=torch.bool)
            means.append(float((own @ own.T)[apart].clamp(-1, 1).acos().rad2deg().mean()))
    return float(np.mean(means))
