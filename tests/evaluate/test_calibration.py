import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from vitrail.evaluate import calibration, scores
from vitrail.evaluate.calibration import calibrate, expected_calibration_error, fit_temperature, gaps, reliability


def drawn(n, width, scale, seed=0):
    """Logits whose softmax is the truth, multiplied by ``scale``: the right temperature is ``scale``."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((n, width))
    targets = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return (scale * logits).astype(np.float32), targets


def slow_ece(confidence, correct, bins=15):
    """As written by Guo et al., one image at a time."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return total


@pytest.mark.parametrize("slice_elements", [50, 1 << 21])
def test_error_is_the_papers(monkeypatch, slice_elements):
    monkeypatch.setattr(scores, "_SLICE", slice_elements)
    logits, targets = drawn(400, 5, 2.0)
    probs = torch.softmax(torch.tensor(logits), 1)
    confidence, predicted = (part.numpy() for part in probs.max(1))
    measured = expected_calibration_error(logits, targets)
    assert measured == pytest.approx(slow_ece(confidence.tolist(), predicted == targets), abs=1e-6)
    for norm, value in zip(("l1", "max"), gaps(reliability(logits, targets))):
        reference = multiclass_calibration_error(probs, torch.tensor(targets), 5, n_bins=15, norm=norm)
        assert value == pytest.approx(float(reference), abs=1e-5)


def test_error_of_several_labels_is_over_decisions():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((80, 4))
    targets = (rng.random((80, 4)) < 0.4).astype(np.float32)
    probs = (1 / (1 + np.exp(-logits))).ravel()
    assert expected_calibration_error(logits, targets) == pytest.approx(slow_ece(probs, targets.ravel()), abs=1e-6)
    assert sum(reliability(logits, targets)["count"]) == 320


def test_empty_bins_have_no_mean():
    diagram = reliability(np.array([[9.0, 0.0]]), np.array([0]))
    assert diagram["count"][-1] == 1
    assert diagram["accuracy"][0] is None
    assert diagram["accuracy"][-1] == 1
    assert len(diagram["edges"]) == 16


def test_bins_hold_their_upper_edge():
    assert reliability(np.zeros((1, 2)), np.array([0]), bins=2)["count"] == [1, 0]  # a confidence of exactly a half


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_temperature_is_found(scale):
    assert fit_temperature(*drawn(6000, 8, scale)) == pytest.approx(scale, rel=0.07)


def test_temperature_of_several_labels_is_found():
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((3000, 5))
    targets = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    assert fit_temperature(3 * logits, targets) == pytest.approx(3, rel=0.07)


def test_temperature_is_the_best_of_a_grid():
    logits, targets = drawn(300, 4, 3.0)

    def loss(temperature):
        return scores.nll(logits, targets, temperature).sum() + np.log(temperature) ** 2 / 2

    found = fit_temperature(logits, targets)
    assert loss(found) <= min(loss(t) for t in np.geomspace(0.05, 20, 400)) + 1e-3


@pytest.mark.parametrize("n", [1, 5, 400])
def test_a_faultless_model_gets_a_temperature_within_bounds(n):
    targets = np.arange(n) % 3
    sure = fit_temperature(20 * np.eye(3, dtype=np.float32)[targets], targets)
    weak = fit_temperature(0.01 * np.eye(3, dtype=np.float32)[targets], targets)
    wrong = fit_temperature(20 * np.eye(3, dtype=np.float32)[targets], (targets + 1) % 3)
    for temperature in (sure, weak, wrong):
        assert 0.05 <= temperature <= 20
    assert sure == pytest.approx(1, abs=0.01)  # nothing to gain, so nothing is changed


def test_large_arrays_are_fitted_on_a_part(monkeypatch):
    logits, targets = drawn(6000, 8, 2.0)
    whole = fit_temperature(logits, targets)
    monkeypatch.setattr(calibration, "_FIT_ELEMENTS", 8 * 3000)
    part = fit_temperature(logits, targets)
    assert part != whole
    assert part == pytest.approx(whole, rel=0.1)


def test_calibration_helps_and_is_measured_on_unused_images():
    logits, targets = drawn(3000, 6, 3.0)
    result = calibrate(logits, targets)
    assert result["temperature"] == pytest.approx(3, rel=0.1)
    assert result["ece_calibrated"] < 0.25 * result["ece"]
    assert result["nll_calibrated"] < result["nll"]
    assert result["ece"] == pytest.approx(expected_calibration_error(logits, targets))
    assert sum(result["before"]["count"]) == sum(result["after"]["count"]) == 3000
    assert calibrate(logits, targets) == result


def test_cross_fitting_is_less_favourable_than_reuse():
    """With few images, the temperature fitted on the very images looks better than it is."""
    gains = []
    for seed in range(20):
        logits, targets = drawn(20, 3, 1.0, seed)
        result = calibrate(logits, targets)
        reused = scores.nll(logits, targets, result["temperature"]).mean()
        gains.append(result["nll_calibrated"] - reused)
    assert np.mean(gains) > 0.01


@pytest.mark.parametrize("n", [1, 2, 3])
def test_calibrate_with_hardly_any_image(n):
    result = calibrate(*drawn(n, 3, 1.0))
    assert 0 <= result["ece_calibrated"] <= 1
