import pytest
import torch
from torch import nn

from exact import normal, same
from vitrail.edits.unit_sphere_classes import unit_sphere_classes
from vitrail.errors import InputError
from vitrail.layers.embedding import classify, embed
from vitrail.methods.supervised.metric_learning import (
    ContrastiveTraining,
    TripletTraining,
    contrastive_loss,
    squared_distances,
    triplet_loss,
)
from vitrail.models import create_model

TARGETS = [[0, 1, 0, 1, 2, 0, 1], [0, 0, 1, 1], [2, 0, 1, 3, 1], [0, 1, 2], [1, 1, 1], [0]]


def square(a, b):
    return ((a / a.norm() - b / b.norm()) ** 2).sum()


def slow_triplet(x, target, margin):
    terms = []
    for a in range(len(x)):
        others = [square(x[a], x[n]) for n in range(len(x)) if target[n] != target[a]]
        for p in range(len(x)):
            if p == a or target[p] != target[a] or not others:
                continue
            pair = square(x[a], x[p])
            harder = [value for value in others if value > pair]
            negative = min(harder) if harder else max(others)
            terms.append((pair - negative + margin).clamp_min(0))
    return sum(terms) / len(terms) if terms else x.sum() * 0


def slow_contrastive(x, target, margin):
    near, far = [], []
    for i in range(len(x)):
        for j in range(i):
            value = square(x[i], x[j])
            if target[i] == target[j]:
                near.append(value / 2)
            else:
                far.append((margin - value.sqrt()).clamp_min(0) ** 2 / 2)
    return sum(sum(terms) / len(terms) for terms in (near, far) if terms) + x.sum() * 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("margin", [0.2, 1.5])
def test_triplets_are_the_slow_loop(target, margin):
    x = normal(len(target), 3).requires_grad_()
    same(triplet_loss(x, torch.tensor(target), margin=margin)[None], slow_triplet(x, target, margin)[None], [x])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("margin", [0.7, 2.0])
def test_pairs_are_the_slow_loop(target, margin):
    x = normal(len(target), 3).requires_grad_()
    ours = contrastive_loss(x, torch.tensor(target), margin=margin)
    same(ours[None], slow_contrastive(x, target, margin)[None], [x])


def test_equal_images_have_a_finite_gradient():
    x = torch.tensor([[1.0, 0]] * 3, requires_grad=True)
    for loss in (triplet_loss, contrastive_loss):
        (slope,) = torch.autograd.grad(loss(x, torch.tensor([0, 0, 1])), x)
        assert slope.isfinite().all()


def test_distances_are_of_single_precision_under_autocast():
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = squared_distances(x.bfloat16())
    unit = nn.functional.normalize(x.bfloat16().float(), dim=1)
    torch.testing.assert_close(found, (unit[:, None] - unit).square().sum(-1), rtol=1e-5, atol=1e-6)


def model_of(edit):
    torch.manual_seed(0)
    model = create_model("small_resnet_nano", num_classes=3, channels=(8, 8, 8, 8))
    return unit_sphere_classes(embed_dim=5)(model) if edit else model


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize(("kind", "metric"), [(TripletTraining, triplet_loss), (ContrastiveTraining, contrastive_loss)])
def test_embeddings_learn_the_metric_and_the_classifier_what_they_are(kind, metric, edit):
    method = kind(model_of(edit), margin=0.9).eval()
    batch = {"image": torch.randn(6, 3, 16, 16), "target": torch.tensor([0, 1, 2, 0, 1, 2])}
    found = method(batch)
    embedding = embed(method.model, batch["image"])
    wanted = metric(embedding, batch["target"], margin=0.9)
    torch.testing.assert_close(found["metric"], wanted.detach())
    logits = classify(method.model, embedding)
    supervised = nn.functional.cross_entropy(logits, batch["target"])
    torch.testing.assert_close(found["supervised"], supervised.detach())
    torch.testing.assert_close(found["loss"].detach(), found["metric"] + found["supervised"])
    torch.testing.assert_close(logits, method.model(batch["image"]))
    # The backbone feels the metric alone, the classes' vectors the labels alone.
    vectors = method.model.get_classifier().weight
    stem = next(iter(method.model.parameters()))
    (ours, theirs) = (torch.autograd.grad(loss, stem, retain_graph=True)[0] for loss in (found["loss"], wanted))
    torch.testing.assert_close(ours, theirs)
    (ours, theirs) = (torch.autograd.grad(loss, vectors, retain_graph=True)[0] for loss in (found["loss"], supervised))
    torch.testing.assert_close(ours, theirs)


def test_published_margins():
    assert TripletTraining(model_of(False)).margin == 0.2
    assert ContrastiveTraining(model_of(False)).margin == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TripletTraining(model_of(False), margin=0), "margin = 0 .*up to 4"),
        (lambda: ContrastiveTraining(model_of(False), margin=2.1), "margin = 2.1 .*up to 2"),
        (lambda: ContrastiveTraining(model_of(False), margin=float("nan")), "margin = nan"),
        (lambda: TripletTraining(model_of(False), multilabel=True), "one label per image"),
        (lambda: TripletTraining(nn.Linear(2, 2)), "that of Linear is NoneType: choose"),
        (lambda: TripletTraining(create_model("small_resnet_nano", num_classes=0)), "is Identity"),
        (
            lambda: TripletTraining(model_of(False))({"image": torch.zeros(2, 3, 16, 16), "target": torch.eye(2)}),
            "set augment.mixup = 0",
        ),
    ],
)
def test_what_does_not_fit_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()
