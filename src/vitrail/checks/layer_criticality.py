"""Layer criticality: does the way a net is trained decide which of its layers its decisions depend on?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.app.build import build_model, preprocess_of
from vitrail.checks.check import Context, Verdict, paired
from vitrail.data.batches import batches_of
from vitrail.data.index import Index
from vitrail.data.preprocess import Preprocess
from vitrail.evaluate.layer_criticality import run as criticality
from vitrail.training.recipe import Recipe

NET: dict[str, Any] = {"model.name": "small_resnet_nano", "model.options": {"stem_stride": 2}}
PLAIN: dict[str, Any] = {"augment.policy": "none", "method.options": {"smoothing": 0.0}}
STRONG: dict[str, Any] = {
    "augment.policy": "shift",
    "augment.rand_augment": 9,
    "augment.erase": 0.25,
    "augment.mixup": 0.2,
    "augment.cutmix": 1.0,
}
ARMS = ("plain", "strong augmentation", "self-supervised", "adversarial")
BATCH, RATE, DECAY = 64, 3e-3, 0.05
HEAD_SHARE = 0.25
"""Of the self-supervised arm's passes, what trains the linear classifier."""
ATTACK_STEPS, RADIUS = 2, 0.1
"""Of the attacks in training; the radius is in the net's normalised pixels, which span 2: 0.1 is 12.75 grey levels."""


def run(ctx: Context) -> Verdict:
    """Train one net in four ways at equal numbers of image passes and put their profiles side by side."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    passes = 600 if ctx.quick else 40_000
    images = 32 if ctx.quick else 500
    profiles: dict[str, list[np.ndarray]] = {name: [] for name in ARMS}
    rows = []
    layers: list[str] = []
    for seed in ctx.seeds:
        recipe = ctx.recipe(index, NET, seed)
        for name in ARMS:
            model, preprocess = _trained(ctx, name, index, recipe, seed, passes)
            held_out = ctx.held_out(index, preprocess, most=images)
            found = criticality(
                model,
                held_out,
                seeds=(0,) if ctx.quick else (0, 1, 2),
                fresh=partial(build_model, recipe.model, len(index.classes)),
            )
            layers = [row["layer"] for row in found.table]
            profile = np.array([row["criticality"] for row in found.table])
            profiles[name].append(profile)
            clean, attacked = _accuracies(model, held_out)
            early, late = _halves(profile)
            rows.append(
                {
                    "arm": name,
                    "seed": seed,
                    "top1": clean,
                    "top1_attacked": attacked,
                    "mean": float(profile.mean()),
                    "early": early,
                    "late": late,
                }
            )
    tilt = {name: [early - late for early, late in map(_halves, found)] for name, found in profiles.items()}
    mean = {name: [float(profile.mean()) for profile in found] for name, found in profiles.items()}
    between, within = _distances(profiles)
    tilted = "criticality of the first half of the layers less that of the second"
    return Verdict(
        [
            paired(
                "the profiles of differently trained nets differ more than those of one training with other seeds",
                "mean absolute difference of criticality over the layers",
                {"other training": between, "other seed": within},
                ours="other training",
                against="other seed",
            ),
            paired(
                "self-supervised pretraining moves criticality from late to early layers",
                tilted,
                tilt,
                ours="self-supervised",
                against="plain",
            ),
            paired(
                "strong augmentation moves criticality from late to early layers",
                tilted,
                tilt,
                ours="strong augmentation",
                against="plain",
            ),
            paired(
                "adversarial training makes layers more critical",
                "mean criticality of all layers",
                mean,
                ours="adversarial",
                against="plain",
            ),
        ],
        notes=[
            f"Every arm has {passes:,} image passes through the net, forward and backward: a step of an attack counts "
            f"as one, and so does each view of a self-supervised pair; {HEAD_SHARE:.0%} of that arm's train its head.",
            f"Attacks stay within {RADIUS} of normalised pixels, which span 2, in {ATTACK_STEPS} steps.",
            "A residual net of ten convolutions on small images; the paper's are fully trained ResNet-50.",
        ],
        tables={
            "criticality": [
                {"layer": layer, **{name: float(np.mean(found, axis=0)[i]) for name, found in profiles.items()}}
                for i, layer in enumerate(layers)
            ],
            "arms": rows,
        },
    )


def _halves(profile: np.ndarray) -> tuple[float, float]:
    """Return the mean criticality of the first and the second half of the layers, without the classifier."""
    body = profile[:-1]
    half = len(body) // 2
    return float(body[:half].mean()), float(body[-half:].mean())


def _distances(profiles: dict[str, list[np.ndarray]]) -> tuple[list[float], list[float]]:
    """Return, per seed, the mean distance to the next seed's profiles of other trainings, and of the same training."""
    count = len(profiles[ARMS[0]])
    between: list[float] = []
    within: list[float] = []
    for i in range(count):
        gaps = {
            (one, two): float(np.abs(profiles[one][i] - profiles[two][(i + 1) % count]).mean())
            for one in ARMS
            for two in ARMS
        }
        between.append(float(np.mean([gap for (one, two), gap in gaps.items() if one != two])))
        within.append(float(np.mean([gap for (one, two), gap in gaps.items() if one == two])))
    return between, within


# ---- the arms --------------------------------------------------------------------------------------------------------


def _trained(
    ctx: Context, name: str, index: Index, recipe: Recipe, seed: int, passes: int
) -> tuple[nn.Module, Preprocess]:
    if name in ("plain", "strong augmentation"):
        own = PLAIN if name == "plain" else STRONG
        epochs = passes / len(index.rows("train"))
        arm = ctx.train(index, name.replace(" ", "-"), seed, {**NET, **own, "train.epochs": epochs})
        return arm.model, arm.preprocess
    ctx.tell(f"{name}, seed {seed}")
    torch.manual_seed(seed)
    model = build_model(recipe.model, len(index.classes))
    preprocess = preprocess_of(model, recipe)
    stream = partial(_stream, index, preprocess, np.random.default_rng(seed))
    if name == "adversarial":
        _descend(model.train(), partial(_adversarial_loss, model), stream, passes // (1 + ATTACK_STEPS))
    else:
        surface: Any = model
        project = nn.Sequential(nn.Linear(surface.num_features, 128), nn.ReLU(), nn.Linear(128, 64))
        both = nn.ModuleList([model, project]).train()
        _descend(both, partial(_contrastive_loss, surface, project), stream, int((1 - HEAD_SHARE) * passes) // 2)
        model.eval()  # the head learns on the features that are evaluated
        _descend(surface.get_classifier(), partial(_linear_loss, surface), stream, int(HEAD_SHARE * passes))
    return model.eval(), preprocess


def _stream(
    index: Index, preprocess: Preprocess, draw: np.random.Generator, images: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of training images, in a new order each time round, until ``images`` were given."""
    rows = index.rows("train")
    while images > 0:
        order = draw.permutation(rows)[:images]
        images -= len(order)
        yield from batches_of(index, order, preprocess, batch_size=BATCH)()


def _descend(
    trained: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    stream: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    images: int,
) -> None:
    """Train on ``images`` images with the optimiser and the schedule of the other arms."""
    optimiser = torch.optim.AdamW(trained.parameters(), lr=RATE, weight_decay=DECAY)
    seen = 0
    for batch, target in stream(images):
        progress = seen / images
        warm = min(1.0, (progress + BATCH / images) / 0.05)
        optimiser.param_groups[0]["lr"] = RATE * warm * max(0.01, 0.5 * (1 + math.cos(math.pi * progress)))
        optimiser.zero_grad()
        loss_of(batch, target).backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        seen += len(batch)


def _adversarial_loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Madry et al. (2018): the loss at the worst image that projected gradient ascent finds nearby."""
    return _entropy(model(_attack(model, images, target)), target)


def _attack(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Return images within ``RADIUS`` (largest change of a pixel) that raise the loss."""
    moved = images + torch.empty_like(images).uniform_(-RADIUS, RADIUS)
    for _ in range(ATTACK_STEPS):
        moved = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(_entropy(model(moved), target), moved)
        step = moved.detach() + 2.5 * RADIUS / ATTACK_STEPS * slope.sign()
        moved = torch.clamp(images + (step - images).clamp(-RADIUS, RADIUS), -1, 1)
    return moved.detach()


def _contrastive_loss(model: Any, project: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Chen et al., SimCLR (2020): of all views in the batch, find the one of the same image; labels are not used."""
    views = torch.cat((_view(images), _view(images)))
    features = model.forward_head(model.forward_features(views), pre_logits=True)
    projected = F.normalize(project(features), dim=1)
    scores = (projected @ projected.T / 0.2).fill_diagonal_(float("-inf"))
    count = len(images)
    return F.cross_entropy(scores, torch.arange(2 * count).roll(count))


def _view(images: Tensor) -> Tensor:
    """Return randomly scaled, shifted and shaded images."""
    count = len(images)
    zoom = torch.empty(count, 1).uniform_(0.6, 1.0)
    shift = torch.empty(count, 2).uniform_(-1, 1) * (1 - zoom)
    place = torch.zeros(count, 2, 3)
    place[:, 0, 0] = place[:, 1, 1] = zoom[:, 0]
    place[:, :, 2] = shift
    grid = F.affine_grid(place, list(images.shape), align_corners=False)
    cut = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.5, 1.5)
    brightness = torch.empty(count, 1, 1, 1).uniform_(-0.3, 0.3)
    return (cut * contrast + brightness).clamp(-1, 1)


def _linear_loss(model: Any, images: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
    return _entropy(model.get_classifier()(features), target)


def _entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy; several labels of one image share the target."""
    return F.cross_entropy(logits, target if target.ndim == 1 else target / target.sum(1, keepdim=True).clamp_min(1))


def _accuracies(model: nn.Module, held_out: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> tuple[float, float]:
    """Return the share of images that are answered rightly, as they are and attacked."""
    right = attacked = count = 0
    for images, target in held_out():
        best = target if target.ndim == 1 else target.argmax(1)
        moved = _attack(model, images, target)
        with torch.no_grad():
            right += int((model(images).argmax(1) == best).sum())
            attacked += int((model(moved).argmax(1) == best).sum())
        count += len(images)
    return right / count, attacked / count
