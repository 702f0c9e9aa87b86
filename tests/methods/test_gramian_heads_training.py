import math

import pytest
import torch
from torch import nn

from exact import normal
from vitrail.edits.gramian_heads import GramianHeads
from vitrail.errors import InputError
from vitrail.methods.supervised.gramian_heads_training import GramianHeadTraining, gramian_head_losses
from vitrail.models import create_model


def slow(logits, target, smoothing, bce):
    """Loop over heads, images and classes."""
    images, heads, classes = logits.shape
    probabilities = logits.softmax(-1)
    together = logits.detach().mean(1).softmax(-1)
    supervised = apart = 0
    for k in range(heads):
        for i in range(images):
            for c in range(classes):
                wanted = (1 - smoothing) * float(target[i] == c) + smoothing / classes
                p = probabilities[i, k, c]
                if bce:
                    yes = torch.sigmoid(logits[i, k, c])
                    supervised += -(wanted * yes.log() + (1 - wanted) * (1 - yes).log()) / (images * classes)
                else:
                    supervised += -wanted * p.log() / images
                apart += together[i, c] * (together[i, c].log() - p.log()) / (images * classes)
    return supervised, apart


@pytest.mark.parametrize(
    ("smoothing", "bce", "heads"), [(0.0, False, 2), (0.2, False, 3), (0.1, True, 2), (0.0, True, 1)]
)
def test_the_losses_are_the_slow_loop(smoothing, bce, heads):
    logits = normal(4, heads, 3).float().requires_grad_()
    target = torch.tensor([0, 2, 1, 2])
    ours = gramian_head_losses(logits, target, smoothing=smoothing, bce=bce)
    theirs = slow(logits, target, smoothing, bce)
    for got, wanted in zip(ours, theirs):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        slopes = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (got, wanted)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_several_labels_are_not_smoothed_over_classes():
    logits, target = normal(4, 2, 3).float(), torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]])
    wanted = sum(nn.functional.binary_cross_entropy_with_logits(logits[:, k], target * 0.8 + 0.1) for k in range(2))
    for bce in (False, True):
        found, _ = gramian_head_losses(logits, target, smoothing=0.2, bce=bce, multilabel=True)
        torch.testing.assert_close(found, wanted)


def test_the_method_weighs_and_leaves_a_model_of_one_answer():
    torch.manual_seed(0)
    model = create_model("ga_convnext_nano", num_classes=3)
    method = GramianHeadTraining(model, decorrelation=-0.5, smoothing=0.1).train()
    batch = {"image": torch.randn(4, 3, 32, 32), "target": torch.tensor([0, 1, 2, 1])}
    found = method(batch)
    torch.testing.assert_close(found["loss"], found["supervised"] - 0.5 * found["apart"])
    model.head.apart = True
    parts = gramian_head_losses(model(batch["image"]), batch["target"], smoothing=0.1)
    torch.testing.assert_close((found["supervised"], found["apart"]), parts)
    model.head.apart = False
    assert model(batch["image"]).shape == (4, 3)
    assert math.isfinite(float(GramianHeadTraining(model, bce=True)(batch)["loss"].detach()))

    def broken(x):
        raise RuntimeError

    model.stem.forward = broken
    with pytest.raises(RuntimeError):
        method(batch)
    assert not model.head.apart
    assert any(isinstance(module, GramianHeads) for module in model.modules())


def test_a_step_drives_heads_apart():
    torch.manual_seed(0)
    distances = []
    for weight in (0.0, -50.0):
        logits = (0.1 * normal(4, 3, 5).float()).requires_grad_()
        supervised, apart = gramian_head_losses(logits, torch.tensor([0, 1, 2, 3]))
        (slope,) = torch.autograd.grad(supervised + weight * apart, logits)
        distances.append(float(gramian_head_losses(logits - 0.5 * slope, torch.tensor([0, 1, 2, 3]))[1]))
    assert distances[1] > distances[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decorrelation": 0.1}, "decorrelation = 0.1 .*0 or less"),
        ({"decorrelation": float("-inf")}, "decorrelation = -inf"),
        ({"smoothing": 1}, r"smoothing = 1 .*\[0, 1\)"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        GramianHeadTraining(create_model("ga_convnext_nano", num_classes=3), **options)


def test_a_model_without_heads_is_refused():
    with pytest.raises(InputError, match="Linear has none: use ga_convnext_"):
        GramianHeadTraining(nn.Linear(2, 2))
