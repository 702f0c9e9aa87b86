import yaml
from report_content import EVIL, content

from vitrail.report.model_card import render_model_card, write_model_card
from vitrail.report.report import ReportContent


def parts(text):
    empty, front, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


def test_front_matter_and_sections():
    some = content()
    front, body = parts(render_model_card(some))
    assert front["pipeline_tag"] == "image-classification"
    metrics = {m["name"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["top-1 accuracy"] == round(some.summary["top1"], 4)
    headings = [line[3:] for line in body.splitlines() if line.startswith("## ")]
    assert headings == ["Intended use", "Data", "Results", "Limits", "How to use", "How to reproduce"]
    assert "95 % interval" in body
    assert "only 3 images of class 'owl'" in body
    assert "\n\n\n" not in body


def test_names_cannot_leave_their_place():
    some = content()
    some.title = 'x"\nlicense: evil\n---\n# y | z'
    some.summary["model"] = "a`b"
    text = render_model_card(some)
    front, body = parts(text)
    assert "license" not in front
    assert front["model-index"][0]["name"] == some.title
    assert EVIL not in body
    assert "<script" not in body
    assert "`a'b`" in body
    assert "y \\| z" in body


def test_several_labels_and_missing_figures():
    front, body = parts(render_model_card(content(8, 100, multilabel=True)))
    assert front["model-index"][0]["results"][0]["metrics"][0]["name"] == "mean average precision"
    assert "several per image" in body
    front, body = parts(render_model_card(ReportContent({"macro_f1": 0.5})))
    assert "| macro F1 | 50.0 % |" in body
    parts(render_model_card(ReportContent({})))


def test_the_interval_stands_beside_its_figure():
    _, body = parts(render_model_card(content(8, 100, multilabel=True)))
    line = next(line for line in body.splitlines() if "95 % interval" in line)
    assert line.startswith("| micro F1 ")


def test_the_file_is_written(tmp_path):
    write_model_card(tmp_path / "MODEL_CARD.md", content())
    assert (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8").startswith("---\n")
