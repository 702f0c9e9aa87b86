import math

import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.methods.supervised.multi_instance import MultiInstance, multi_instance_loss


def slow_loss(logits, target):
    """Class by class: a positive counts as often as there are classes for each positive of its image."""
    total = 0.0
    for z, t in zip(logits, target):
        weight = len(z) / max(sum(t), 1)
        for k in range(len(z)):
            p = 1 / (1 + math.exp(-z[k]))
            total -= weight * t[k] * math.log(p) + (1 - t[k]) * math.log(1 - p)
    return total / (len(logits) * len(logits[0]))


@pytest.mark.parametrize(("images", "classes"), [(1, 2), (3, 7), (5, 31)])
def test_loss_equals_the_definition(images, classes):
    logits = torch.randn(images, classes) * 2
    target = (torch.rand(images, classes) < 0.3).float()
    target[0] = 0  # nothing in the image
    got = multi_instance_loss(logits, target)
    assert float(got) == pytest.approx(slow_loss(logits.tolist(), target.tolist()), rel=1e-5)


def test_gradient_equals_the_definition():
    logits = torch.randn(4, 9, requires_grad=True)
    target = (torch.rand(4, 9) < 0.4).float()
    multi_instance_loss(logits, target).backward()
    weight = 9 / target.sum(1, keepdim=True).clamp(min=1)
    p = logits.detach().sigmoid()
    expected = (-weight * target * (1 - p) + (1 - target) * p) / logits.numel()
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_half_precision_loses_nothing_in_the_loss():
    logits, target = torch.randn(2, 5).bfloat16(), torch.ones(2, 5)
    assert multi_instance_loss(logits, target).dtype == torch.float32
    assert torch.equal(multi_instance_loss(logits, target), multi_instance_loss(logits.float(), target))


def test_the_method_trains():
    method = MultiInstance(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), multilabel=True)
    batch = {"image": torch.randn(16, 3, 2, 2), "target": (torch.rand(16, 6) < 0.3).float()}
    optimiser = torch.optim.SGD(method.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        loss = method(batch)["loss"]
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]


def test_targets_that_do_not_fit_are_refused():
    for target in (torch.zeros(4, dtype=torch.int64), torch.zeros(4, 5), torch.zeros(3, 6)):
        with pytest.raises(InputError, match=r"give both as \(images, classes\)"):
            multi_instance_loss(torch.zeros(4, 6), target)


def test_one_label_per_image_is_refused():
    with pytest.raises(InputError, match="instances above 1"):
        MultiInstance(nn.Identity(), multilabel=False)
