import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from report_content import content

from vitrail.report import plots


@pytest.fixture(scope="module")
def some():
    return content()


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_nothing_to_draw_is_no_plot():
    assert plots.curve([], "loss") == ""
    assert plots.curve([{"kind": "val", "epoch": 1, "loss": None}], "loss") == ""
    assert plots.curve([{"kind": "val", "epoch": 0.0, "loss": 2.0}], "loss") == ""  # a point is no curve
    assert plots.reliability_plot({"count": [0], "edges": [0, 1], "confidence": [None], "accuracy": [None]}, "x") == ""
    assert plots.confusion_plot([], ["a"]) == ""
    assert plots.corruption_plot({}) == ""
    assert plots.class_counts_plot({}) == ""
    assert plots.runtime_plot([], "x") == ""
    assert plots.runtime_plot([{"name": "x", "latency_ms": None}], "x") == ""


def test_confusion_shows_counts_and_names(some):
    svg = plots.confusion_plot([[0, 0, 41], [0, 1, 7], [1, 1, 53], [2, 2, 9]], ["<b>", "a" * 60, "$x_1$"])
    assert {"41", "7", "53", "<b>", "$x_1$"} <= set(texts(svg))
    assert not any(len(text or "") > 20 for text in texts(svg))


@pytest.mark.parametrize("classes", [41, 450])
def test_large_confusion_is_a_picture_of_bounded_size(classes):
    rng = np.random.default_rng(0)
    cells = np.unique(rng.integers(0, classes, (20_000, 2)), axis=0)
    svg = plots.confusion_plot([[*cell, 3] for cell in cells.tolist()], [str(i) for i in range(classes)])
    assert len(svg) < 400_000
    assert 'href="data:image/png;base64,' in svg
    assert ElementTree.fromstring(svg) is not None


def test_corruption_names_every_kind(some):
    shown = texts(plots.corruption_plot(some.summary["corruption"]))
    assert {"gaussian noise", "frost", "jpeg compression"} <= set(shown)
    assert any((text or "").startswith("clean 62") for text in shown)


def test_runtimes_show_what_was_measured(some):
    shown = texts(plots.runtime_plot(some.summary["runtimes"], "openvino"))
    assert {"openvino", "onnxruntime-int8", "3.4", "13.5"} <= set(shown)
    assert "compiled-bf16" not in shown


def test_curves_tell_training_from_validation(some):
    assert {"training", "validation"} <= set(texts(plots.curve(some.history, "loss")))
    assert "training" not in texts(plots.curve(some.history, "top1"))


def test_many_classes_are_a_curve():
    few = plots.class_counts_plot({f"name {i}": i for i in range(1, 6)})
    many = plots.class_counts_plot({f"name {i}": i for i in range(1, 500)})
    assert texts(few).index("name 5") < texts(few).index("name 1")
    assert "name 5" not in texts(many)


def test_a_users_matplotlib_style_changes_nothing():
    plain = plots.class_counts_plot({"a": 3, "b": 4})
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert plots.class_counts_plot({"a": 3, "b": 4}) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_the_same_data_give_the_same_bytes(some):
    drawn = [plots.reliability_plot(some.calibration["before"], "Before") for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert re.search(r"<svg class=\"plot\" viewBox=\"0 0 331", drawn[0])


@pytest.mark.parametrize(("name", "expected"), [("cat", "cat"), ("a\n b", "a b"), ("abcdefghijklmnop", "abcd…lmnop")])
def test_long_names_are_cut_in_the_middle(name, expected):
    assert plots.short(name, 10) == expected
