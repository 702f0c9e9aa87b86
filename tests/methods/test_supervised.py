import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitrail.errors import InputError
from vitrail.methods.supervised.supervised import Supervised, supervised_loss


def slow_loss(logits, target, smoothing, weights, multilabel):
    """The definition, image by image and class by class."""
    total = 0.0
    for z, t in zip(logits, target):
        classes = len(z)
        if multilabel:
            for k in range(classes):
                p = 1 / (1 + math.exp(-z[k]))
                y = t[k] * (1 - smoothing) + smoothing / 2
                total -= weights[k] * (y * math.log(p) + (1 - y) * math.log(1 - p)) / classes
            continue
        norm = math.log(sum(math.exp(v) for v in z))
        for k in range(classes):
            y = (t[k] if isinstance(t, list) else float(t == k)) * (1 - smoothing) + smoothing / classes
            total -= weights[k] * y * (z[k] - norm)
    return total / len(logits)


@settings(max_examples=40)
@given(
    st.integers(1, 6),
    st.integers(2, 7),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.booleans(),
    st.sampled_from(["index", "soft", "multi"]),
    st.integers(0, 9),
)
def test_loss_equals_the_definition(n, classes, smoothing, weighted, kind, seed):
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(n, classes)) * 3, dtype=torch.float32)
    if kind == "index":
        target = torch.tensor(rng.integers(0, classes, n))
    elif kind == "soft":
        target = torch.tensor(rng.dirichlet(np.ones(classes), n), dtype=torch.float32)
    else:
        target = torch.tensor(rng.integers(0, 2, (n, classes)), dtype=torch.float32)
    weights = torch.tensor(rng.uniform(0.5, 2, classes), dtype=torch.float32) if weighted else None
    got = supervised_loss(logits, target, smoothing=smoothing, class_weights=weights, multilabel=kind == "multi")
    plain = weights.tolist() if weighted else [1.0] * classes
    assert float(got) == pytest.approx(
        slow_loss(logits.tolist(), target.tolist(), smoothing, plain, kind == "multi"), rel=1e-4, abs=1e-5
    )


def test_gradient_equals_finite_differences():
    logits = torch.randn(3, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 1])
    live = logits.float().requires_grad_()
    supervised_loss(live, target, smoothing=0.1).backward()
    # d/dz of the mean cross-entropy is (softmax - smoothed target) / N.
    smooth = torch.nn.functional.one_hot(target, 4) * 0.9 + 0.1 / 4
    assert torch.allclose(live.grad.double(), (logits.softmax(-1) - smooth) / 3, atol=1e-6)


def test_the_weighted_mean_of_a_batch_is_the_mean_over_its_parts():
    logits, target = torch.randn(8, 3), torch.randint(0, 3, (8,))
    weights = torch.tensor([0.2, 1.0, 3.0])
    whole = supervised_loss(logits, target, class_weights=weights)
    parts = [supervised_loss(logits[i::2], target[i::2], class_weights=weights) for i in (0, 1)]
    assert torch.allclose(whole, sum(parts) / 2)


def test_bf16_logits_lose_no_precision_in_the_loss():
    logits, target = torch.randn(4, 5).bfloat16(), torch.tensor([0, 1, 2, 3])
    assert supervised_loss(logits, target).dtype == torch.float32
    assert torch.equal(supervised_loss(logits, target), supervised_loss(logits.float(), target))


def test_the_method_trains():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    method = Supervised(model, class_weights=[1, 2, 3])
    batch = {"image": torch.randn(16, 3, 2, 2), "target": torch.randint(0, 3, (16,))}
    optimiser = torch.optim.SGD(method.parameters(), lr=0.5)
    first = None
    for _ in range(20):
        loss = method(batch)["loss"]
        first = first or loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.8 * first
    assert not any("class_weights" in key for key in method.state_dict())


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(InputError, match="smoothing"):
        Supervised(nn.Identity(), smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_asks_for_each_class_and_counts_mixed_ones_fully(smoothing):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    mixed = torch.tensor([[0.3, 0, 0.7, 0, 0], [0, 1.0, 0, 0, 0], [0, 0, 0, 0.01, 0.99]])
    method = Supervised(nn.Identity(), smoothing=smoothing, binary=True)
    present = mixed.gt(0).float().tolist()
    for target, wanted in ((mixed, present), (torch.tensor([0, 4, 2]), torch.eye(5)[[0, 4, 2]].tolist())):
        found = method({"image": logits, "target": target})["loss"]
        assert float(found) == pytest.approx(slow_loss(logits.tolist(), wanted, smoothing, [1.0] * 5, True), rel=1e-5)
