import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from vitrail.errors import DataError, InputError
from vitrail.evaluate import scores
from vitrail.evaluate.metrics import confused_rows, evaluate, most_confused, wilson, worst_errors
from vitrail.evaluate.scores import probabilities


def single(n=200, width=7, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, width)).astype(np.float32) * 2
    targets = rng.integers(0, width, n)
    logits[np.arange(n), targets] += 1.5
    return logits, targets, [f"class {i}" for i in range(width)]


def several(n=150, width=6, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, width)).astype(np.float32) * 2
    return (
        logits,
        (logits + rng.standard_normal(logits.shape) * 2 > 0.5).astype(np.float32),
        [str(i) for i in range(width)],
    )


def softmax(logits):
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("slice_elements", [20, 1 << 21])
def test_single_label_figures_are_those_of_scikit_learn(monkeypatch, slice_elements):
    monkeypatch.setattr(scores, "_SLICE", slice_elements)
    logits, targets, names = single()
    result = evaluate(logits, targets, names)
    predicted, probs = logits.argmax(1), softmax(logits)
    one_hot = np.eye(7)[targets]
    assert result["top1"] == pytest.approx((predicted == targets).mean())
    assert result["top5"] == pytest.approx(top_k_accuracy_score(targets, probs, k=5))
    assert result["macro_f1"] == pytest.approx(f1_score(targets, predicted, average="macro"))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(targets, predicted))
    assert result["nll"] == pytest.approx(log_loss(targets, probs), rel=1e-5)
    assert result["brier"] == pytest.approx(((probs - one_hot) ** 2).sum(1).mean(), rel=1e-5)
    for i, row in enumerate(result["per_class"]):
        mine, said = targets == i, predicted == i
        assert row["support"] == mine.sum()
        assert row["precision"] == pytest.approx(precision_score(mine, said))
        assert row["recall"] == pytest.approx(recall_score(mine, said))
        assert row["f1"] == pytest.approx(f1_score(mine, said))
        assert row["average_precision"] == pytest.approx(average_precision_score(mine, probs[:, i]), rel=1e-5)
    assert sum(count for *_, count in result["confusion"]) == 200
    assert sum(count for true, said, count in result["confusion"] if true == said) == (predicted == targets).sum()


@pytest.mark.parametrize("slice_elements", [20, 1 << 21])
def test_multi_label_figures_are_those_of_scikit_learn(monkeypatch, slice_elements):
    monkeypatch.setattr(scores, "_SLICE", slice_elements)
    logits, targets, names = several()
    result = evaluate(logits, targets, names)
    probs = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert result["multilabel"]
    assert "top1" not in result
    assert result["map"] == pytest.approx(average_precision_score(targets, probs, average="macro"), rel=1e-5)
    assert result["micro_f1"] == pytest.approx(f1_score(targets, probs > 0.5, average="micro"))
    assert result["macro_f1"] == pytest.approx(f1_score(targets, probs > 0.5, average="macro"))
    assert result["brier"] == pytest.approx(((probs - targets) ** 2).mean(), rel=1e-5)
    cross = -(targets * np.log(probs) + (1 - targets) * np.log(1 - probs)).sum(1).mean()
    assert result["nll"] == pytest.approx(cross, rel=1e-5)
    low, high = result["micro_f1_interval"]
    assert low < result["micro_f1"] < high


def test_tied_scores_do_not_depend_on_the_order_of_the_images():
    rng = np.random.default_rng(0)
    logits = rng.integers(-1, 2, (120, 4)).astype(np.float32)
    targets = (rng.random((120, 4)) < 0.3).astype(np.float32)
    result = evaluate(logits, targets, list("abcd"))
    for i, row in enumerate(result["per_class"]):
        assert row["average_precision"] == pytest.approx(average_precision_score(targets[:, i], logits[:, i]))


def test_a_constant_model_is_right_on_the_first_class_only():
    targets = np.array([0, 1, 2, 3, 4, 5, 6, 7])
    result = evaluate(np.zeros((8, 8), np.float32), targets, list("abcdefgh"))
    assert result["top1"] == 1 / 8
    assert result["top5"] == 5 / 8


def test_classes_without_a_held_out_image_do_not_enter_the_means():
    logits, targets, names = single(width=5)
    wider = np.concatenate([logits, np.full((200, 2), -20, np.float32)], axis=1)
    plain = evaluate(logits, targets, names)
    result = evaluate(wider, targets, [*names, "empty a", "empty b"])
    assert result["empty_classes"] == ["empty a", "empty b"]
    assert result["per_class"][5]["recall"] is None
    assert result["per_class"][5]["f1"] is None
    assert result["per_class"][5]["average_precision"] is None
    for key in ("macro_f1", "balanced_accuracy", "top1"):
        assert result[key] == pytest.approx(plain[key])


def test_multi_label_without_any_label_is_no_crash():
    result = evaluate(np.full((3, 2), -1, np.float32), np.zeros((3, 2), np.float32), ["a", "b"])
    assert result["map"] == 0
    assert result["empty_classes"] == ["a", "b"]


@settings(max_examples=25)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 10_000), st.booleans())
def test_figures_are_valid_json_within_range(n, width, seed, multilabel):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, width)) * 10.0 ** rng.integers(-3, 4)
    targets = rng.integers(0, 2, (n, width)) if multilabel else rng.integers(0, width, n)
    result = evaluate(logits, targets, [str(i) for i in range(width)])
    json.dumps(result, allow_nan=False)
    for key in ("macro_f1", "ece", "mce"):
        assert 0 <= result[key] <= 1 + 1e-6
    if not multilabel:
        low, high = result["top1_interval"]
        assert 0 <= low <= result["top1"] + 1e-9
        assert result["top1"] - 1e-9 <= high <= 1


def test_huge_logits_stay_finite():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert np.isfinite(evaluate(logits, np.array([0, 0]), ["a", "b"])["nll"])
    assert np.isfinite(probabilities(logits, multilabel=True)).all()
    assert probabilities(logits, multilabel=True).tolist() == [[1, 0], [0, 1]]


def test_wilson_interval_against_its_formula():
    for right, n in ((0, 10), (7, 10), (477, 477), (300, 477)):
        p, z = right / n, 1.959963984540054
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert wilson(right, n) == pytest.approx([max(0, middle - half), min(1, middle + half)], abs=1e-9)


def test_most_confused_pairs_and_the_images_behind_them():
    targets = np.array([0, 0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 1, 1, 2, 1, 0, 2])
    logits = np.eye(3, dtype=np.float32)[predicted] * np.arange(1, 8, dtype=np.float32)[:, None]
    confusion = evaluate(logits, targets, ["cat", "dog", "owl"])["confusion"]
    pairs = most_confused(confusion, ["cat", "dog", "owl"], 2)
    assert [(p["true_name"], p["predicted_name"], p["count"]) for p in pairs] == [("cat", "dog", 2), ("dog", "cat", 1)]
    assert [p["share"] for p in pairs] == [0.5, 0.5]
    rows = np.arange(100, 107)
    assert confused_rows(logits, targets, rows, 0, 1) == [102, 101]  # the clearer one first
    assert confused_rows(logits, targets, rows, 2, 0) == []


def test_worst_errors_are_the_most_confident_ones():
    logits = np.array([[3, 0], [0, 5], [0, 1], [9, 0]], np.float32)
    targets = np.array([1, 0, 0, 0])
    worst = worst_errors(logits, targets, np.array([10, 11, 12, 13]), 2)
    assert [w["row"] for w in worst] == [11, 10]
    assert worst[0] | {"confidence": 0} == {"row": 11, "true": [0], "predicted": [1], "confidence": 0}
    assert worst[0]["confidence"] == pytest.approx(1 / (1 + np.exp(-5)))
    assert len(worst_errors(logits, targets, np.arange(4), 100)) == 3
    cooler = worst_errors(logits, targets, np.arange(4), 1, temperature=5)
    assert cooler[0]["confidence"] == pytest.approx(1 / (1 + np.exp(-1)))


def test_worst_errors_of_several_labels_know_missed_and_false_ones():
    logits = np.array([[-6.0, 2.0], [4.0, -1.0], [3.0, 3.0]])
    targets = np.array([[1, 1], [0, 0], [1, 1]])
    worst = worst_errors(logits, targets, np.arange(3))
    assert [w["row"] for w in worst] == [0, 1]
    assert worst[0]["true"] == [0, 1]
    assert worst[0]["predicted"] == [1]
    assert worst[0]["confidence"] == pytest.approx(1 / (1 + np.exp(-6)))


@pytest.mark.parametrize(
    ("logits", "targets", "names", "error", "words"),
    [
        (np.zeros((3, 2)), np.zeros(4, int), ["a", "b"], InputError, "do not fit"),
        (np.zeros((3, 2)), np.zeros((3, 3)), ["a", "b"], InputError, "do not fit"),
        (np.zeros((3, 2)), np.zeros(3, int), ["a"], InputError, "one name per logit"),
        (np.zeros((0, 2)), np.zeros(0, int), ["a", "b"], DataError, "no held-out image"),
        (np.zeros((3, 2)), np.array([0, 1, 2]), ["a", "b"], DataError, "2 classes"),
        (np.array([[0, 1], [np.nan, 0]]), np.array([0, 1]), ["a", "b"], DataError, "image 1 is not finite"),
    ],
)
def test_arrays_that_cannot_be_used_are_explained(logits, targets, names, error, words):
    with pytest.raises(error, match=words):
        evaluate(logits, targets, names)


def test_rows_must_match_the_images():
    with pytest.raises(InputError, match="one row per image"):
        worst_errors(np.zeros((3, 2)), np.zeros(3, int), np.arange(2))
