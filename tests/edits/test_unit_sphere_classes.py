import copy

import pytest
import torch
from torch import nn

from exact import normal, same
from once import quick_run
from vitrail.checks import hyperspherical as check
from vitrail.edits.unit_sphere_classes import UnitSphereHead, unit_sphere_classes
from vitrail.errors import InputError
from vitrail.models import create_model


def slow_logits(head, x):
    """The published layers one after another: dense, normalised to length s, dense without bias."""
    logits = []
    for feature in x:
        if isinstance(head.embedding, nn.Linear):
            feature = head.embedding.weight @ feature + head.embedding.bias
        point = head.scale * feature / feature.square().sum() ** 0.5
        logits.append(torch.stack([sum(point * row) for row in head.weight]))
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("features", "embed_dim", "classes", "scale"), [(5, 3, 4, 10.0), (7, 0, 2, 3.0), (2, 9, 1, 20)]
)
def test_logits_are_the_slow_loop(features, embed_dim, classes, scale):
    torch.manual_seed(0)
    head = UnitSphereHead(features, classes, embed_dim=embed_dim, scale=scale).double()
    x = normal(4, features).requires_grad_()
    same(head(x), slow_logits(head, x), [x, *head.parameters()])
    torch.testing.assert_close(head(x), head.classify(head.embed(x)))
    assert head.embed(x).shape == (4, embed_dim or features)
    head.constrain()
    assert float(head(x).detach().abs().max()) <= scale


def test_the_axis_of_the_features():
    head = UnitSphereHead(6, 3, embed_dim=4, axis=1).double()
    x = normal(2, 6, 4, 5)
    by_place = UnitSphereHead(6, 3, embed_dim=4).double()
    by_place.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(x), by_place(x.movedim(1, -1)).movedim(-1, 1))


def test_it_begins_on_the_sphere_as_published():
    torch.manual_seed(0)
    head = UnitSphereHead(128, 2000)
    torch.testing.assert_close(head.weight.detach().norm(dim=1), torch.ones(2000))
    torch.testing.assert_close(head.weight.detach().mean(0), torch.zeros(60), rtol=0, atol=0.02)
    assert (head.scale, head.embedding.out_features) == (10, 60)
    assert float(head.embedding.weight.detach().abs().max()) == pytest.approx((6 / 188) ** 0.5, rel=0.01)
    assert not head.embedding.bias.any()


def test_the_constraint_brings_vectors_back_and_turns_none():
    head = UnitSphereHead(3, 4, embed_dim=0).double()
    directions = head.weight.detach().clone()
    with torch.no_grad():
        head.weight *= torch.tensor([0.1, 1.0, 3.0, 7.0]).double()[:, None]
    head.constrain()
    torch.testing.assert_close(head.weight.detach(), directions, rtol=1e-6, atol=1e-7)


def test_logits_are_of_single_precision_under_autocast_and_in_half():
    head, x = UnitSphereHead(16, 5, embed_dim=0), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(x.bfloat16())
    torch.testing.assert_close(found, head(x.bfloat16().float()))
    half = copy.deepcopy(head).bfloat16()
    assert half(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(half(x.bfloat16()), head(x), rtol=0.05, atol=0.2)


@pytest.mark.parametrize(
    ("name", "options"), [("small_resnet_nano", {}), ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1})]
)
def test_a_backbone_gets_it_and_its_features_stay(name, options):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    unit_sphere_classes(embed_dim=12, scale=5.0)(model)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), before)
    head = model.get_classifier()
    assert (type(head), head.scale, head.embedding.out_features) == (UnitSphereHead, 5.0, 12)
    assert head.out_features == model.num_classes == 7
    torch.testing.assert_close(model(x), head(before))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unit_sphere_classes(embed_dim=-1), "embed_dim = -1 .*1 or more, or 0"),
        (lambda: unit_sphere_classes(embed_dim=2.5), "embed_dim = 2.5"),
        (lambda: unit_sphere_classes(scale=0), "scale = 0 .*above 0"),
        (lambda: unit_sphere_classes(scale=float("inf")), "scale = inf"),
        (lambda: unit_sphere_classes()(nn.Sequential(nn.Softsign())), "no linear classifier in Sequential.*Softsign"),
    ],
)
def test_what_does_not_fit_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_examples_are_drawn_of_each_class():
    pool = (torch.arange(12.0)[:, None], torch.arange(12) % 3)
    embeddings, targets = check.drawn(pool, 2, 0)
    assert targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(embeddings[:, 0].long() % 3, targets)
    assert len(set(embeddings.flatten().tolist())) == 6
    assert not torch.equal(check.drawn(pool, 2, 1)[0], embeddings)
    assert len(check.drawn(pool, 20, 1)[0]) == 12


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert set(verdict.findings[0].arms) == {"normalised softmax", "triplet"}
    assert len(verdict.findings) == 6
    rows = verdict.tables["novel classes"]
    assert len(rows) == 4 * 3
    for row in rows:
        assert row["joint_novel"] <= row["disjoint"]
    costs = {row["arm"]: row["parameters"] for row in verdict.tables["cost of the arms"]}
    assert costs["triplet"] == costs["normalised softmax"]
