import numpy as np
import pytest
import torch
from torch import nn

from vitrail.edits.nested_head import nested_head, nested_logits
from vitrail.errors import InputError
from vitrail.evaluate.cascade import GRID, Cascade, fit_cascade, nearest_right, nested_answers
from vitrail.models import create_model


def slow_thresholds(confidence, right):
    """Try every threshold of every pair, image by image."""
    found = []
    for level in range(len(confidence) - 1):
        best, best_threshold = -1, None
        for threshold in np.linspace(0.1, 1, 100):
            hits = 0
            for i in range(confidence.shape[1]):
                hits += right[level, i] if confidence[level, i] > threshold else right[level + 1, i]
            if hits > best:
                best, best_threshold = hits, threshold
        found.append(best_threshold)
    return found


@pytest.mark.parametrize("dims", [(8, 16, 32), (4, 8)])
def test_thresholds_and_levels_are_the_slow_loop(dims):
    rng = np.random.default_rng(len(dims))
    confidence = rng.uniform(0.1, 1, (len(dims), 60))
    right = rng.uniform(size=confidence.shape) < confidence
    cascade = fit_cascade(dims, confidence, right)
    assert cascade.thresholds == pytest.approx(slow_thresholds(confidence, right))
    for most in (None, 1, 2, len(dims)):
        used = len(dims) if most is None else most
        wanted = []
        for i in range(60):
            level = used - 1
            for j in range(used - 1):
                if confidence[j, i] > cascade.thresholds[j]:
                    level = j
                    break
            wanted.append(level)
        levels = cascade.levels(confidence, most)
        assert levels.tolist() == wanted
        assert cascade.expected_dim(levels) == pytest.approx(sum(dims[level] for level in wanted) / 60)


def test_of_equally_good_thresholds_the_smallest_is_taken():
    right = np.ones((2, 3), bool)
    assert fit_cascade((8, 16), np.full((2, 3), 0.5), right).thresholds == (GRID[0],)


def test_an_image_takes_no_more_numbers_than_it_needs():
    torch.manual_seed(0)
    model = nested_head(dims=(4, 16), independent=True)(create_model("small_resnet_nano", num_classes=3)).train()
    images = torch.randn(12, 3, 16, 16)
    model.eval()
    levels = [nested_logits(model, images, dim).softmax(1).max(1) for dim in (4, 16, 128)]
    confidence = np.stack([level.values.detach().numpy() for level in levels])
    cascade = Cascade((4, 16, 128), tuple(np.quantile(confidence[:2], 0.6, axis=1)))
    chosen = cascade.levels(confidence)
    assert set(chosen) == {0, 1, 2}
    answers, dims = cascade.classify(model.train(), images)
    assert model.training
    assert dims.tolist() == [(4, 16, 128)[level] for level in chosen]
    assert answers.tolist() == [int(levels[level].indices[i]) for i, level in enumerate(chosen)]


@pytest.mark.parametrize("several", [False, True])
def test_answers_come_in_the_order_of_the_images(several):
    model = nested_head(dims=(4, 16))(create_model("small_resnet_nano", num_classes=3)).eval()
    images = torch.randn(5, 3, 16, 16)
    target = torch.tensor([0, 1, 2, 1, 0])
    given = nn.functional.one_hot(target, 3) | nn.functional.one_hot((target + 1) % 3, 3) if several else target
    confidence, right, embeddings, targets = nested_answers(model, [(images[:3], given[:3]), (images[3:], given[3:])])
    assert targets.tolist() == given.tolist()
    assert confidence.shape == right.shape == (3, 5)
    assert embeddings.shape == (5, 128)
    for level, dim in enumerate((4, 16, 128)):
        sure, said = nested_logits(model, images, dim).softmax(1).max(1)
        np.testing.assert_allclose(confidence[level], sure.detach().numpy(), rtol=1e-4)
        hits = [bool(given[i, said[i]]) if several else bool(said[i] == given[i]) for i in range(5)]
        assert right[level].tolist() == hits


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_nearest_neighbours_are_the_slow_loop(dim):
    rng = np.random.default_rng(dim)
    queries, database = (rng.standard_normal((count, 5)).astype(np.float32) for count in (7, 11))
    truth, labels = rng.integers(0, 3, 7), rng.integers(0, 3, 11)
    near = []
    for query in queries[:, :dim]:
        cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in database[:, :dim]]
        near.append(int(np.argmax(cosines)))
    assert nearest_right(dim, queries, truth, database, labels) == pytest.approx(np.mean(truth == labels[near]))
    hot, other = np.eye(3)[truth], np.eye(3)[labels]
    assert nearest_right(dim, queries, hot, database, other) == pytest.approx(np.mean(truth == labels[near]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_cascade((8, 16), np.zeros((2, 3)), np.zeros((3, 3))), r"\(2, 3\) and answers \(3, 3\)"),
        (lambda: fit_cascade((8,), np.zeros((2, 3)), np.zeros((2, 3))), "cascade of 1 dimensions"),
        (lambda: fit_cascade((8,), np.zeros((1, 0)), np.zeros((1, 0))), "one image or more"),
        (lambda: nested_answers(nn.Linear(2, 2), []), "Linear is not nested"),
        (
            lambda: nested_answers(nested_head()(create_model("small_resnet_nano", num_classes=3)), []),
            "no image was given",
        ),
        (lambda: Cascade((1,), ()).classify(nn.Linear(2, 2), torch.zeros(1, 2)), "Linear is not nested"),
    ],
)
def test_what_cannot_be_a_cascade_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()
