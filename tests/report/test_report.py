import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from report_content import EVIL, content, picture

from vitrail.report import report
from vitrail.report.report import Example, ReportContent, audit_keys, render, thumbnail, write_report

SECTIONS = """summary certainty learning confusion classes calibration errors pairs corruptions data runtimes
explanations reproduce warnings""".split()  # noqa: SIM905
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, text, and checks that tags are balanced."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        assert self.open == []
        self.ids = [value for _, values in self.tags for name, value in values if name == "id"]
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def sections(self):
        return [dict(attrs)["id"] for tag, attrs in self.tags if tag == "section"]


@pytest.fixture
def sketched(monkeypatch):
    """Spare the drawing where the test is about the page."""
    for name in ("curve", "reliability_plot", "confusion_plot", "corruption_plot", "class_counts_plot", "runtime_plot"):
        monkeypatch.setattr(report.plots, name, lambda data, *_: "<svg></svg>" if data else "")


@pytest.fixture(scope="module")
def full():
    return render(content())


def test_every_section_is_there_in_order(full):
    page = Page(full)
    assert page.sections() == SECTIONS
    links = {dict(attrs).get("href") for tag, attrs in page.tags if tag == "a"}
    assert {f"#{name}" for name in SECTIONS} <= links
    for words in ("How sure are we?", "58.9 %", "openvino", "Wilson", "4 293 to train on", "168 megapixels"):
        assert words in page.text, words


def test_nothing_is_fetched_from_anywhere(full):
    for tag, attrs in Page(full).tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "poster"):
                assert value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"https?://|url\((?!#)|@import", full)
    assert "default-src 'none'" in full


def test_ids_are_unique_and_references_resolve(full):
    ids = Page(full).ids
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="|url\()#([^")]+)', full):
        assert target in ids


def test_names_are_text_and_never_markup(full):
    assert EVIL not in full
    assert "<script" not in full
    page = Page(full)
    assert EVIL in page.text
    assert "$x_1$ & 'quotes' \"double\"" in page.text  # neither markup nor mathematics
    evil = "'><img src=x onerror=alert(1)>"
    other = content()
    other.history, other.calibration, other.audit = [], {}, {}  # drawn above
    other.summary["model"] = other.summary["pretrained"] = evil
    other.title = other.recipe = other.split = evil
    other.commands = [evil]
    other.worst = [Example(picture(0), evil, evil, 0.5, evil)]
    assert not any(name == "onerror" for _, attrs in Page(render(other)).tags for name, _ in attrs)


def test_plots_take_the_colours_of_the_page(full):
    plots = re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL)
    assert len(plots) >= 8
    for svg in plots:
        assert "var(--" in svg
        assert not re.search(r"fill: ?#(?!000000)|stroke: ?#(?!000000)", svg), re.findall(
            "(?:fill|stroke): ?#.{6}", svg
        )[:3]
        assert "DejaVu" not in svg


def test_a_nested_model_is_told_by_dimension(sketched):
    some = content()
    some.summary["nested"] = {
        "images": 900,
        "database": 1234,
        "table": [
            {"dim": 8, "bytes": 32, "top1": 0.512, "neighbour_top1": 0.478},
            {"dim": 16, "bytes": 64, "top1": 0.625, "neighbour_top1": 0.587},
        ],
    }
    page = Page(render(some))
    assert page.sections() == [*SECTIONS[:5], "nested", *SECTIONS[5:]]
    assert ("a", [("href", "#nested")]) in page.tags
    for words in ("900 held-out images", "1 234 training images", "8 32 51.2 % 47.8 % 16 64 62.5 % 58.7 %"):
        assert words.replace(" %", "\u202f%") in page.text or words in page.text, words


@pytest.mark.parametrize(
    ("part", "empty", "section"),
    [
        ("audit", {}, "data"),
        ("history", [], "learning"),
        ("calibration", {}, "calibration"),
        ("worst", [], "errors"),
        ("pairs", [], "pairs"),
        ("explanations", [], "explanations"),
    ],
)
def test_a_missing_part_is_left_out(sketched, part, empty, section):
    some = content()
    setattr(some, part, empty)
    page = Page(render(some))
    assert page.sections() == [name for name in SECTIONS if name != section]
    assert f"#{section}" not in {
        dict(attrs).get("href") for tag, attrs in page.tags if tag == "a" and section != "pairs"
    }


@pytest.mark.parametrize("key", ["corruption", "runtimes", "confusion", "per_class", "top1_interval", "onnx", "int8"])
def test_a_missing_key_of_the_summary_is_no_error(sketched, key):
    for value in (None, "gone"):
        some = content()
        if value is None:
            some.summary[key] = None
        else:
            del some.summary[key]
        assert Page(render(some)).sections()


def test_a_summary_alone_makes_a_report():
    assert Page(render(ReportContent({}))).sections() == ["summary"]
    page = Page(render(ReportContent({"model": "resnet18", "top1": 0.5, "n_eval": 10})))
    assert page.sections() == ["summary", "certainty"]
    assert "resnet18 reaches 50.0 % top-1 accuracy on 10 held-out images" in page.text


def test_several_labels(sketched):
    page = Page(render(content(8, 120, multilabel=True)))
    assert page.sections() == [name for name in SECTIONS if name not in ("confusion", "pairs")]
    assert "Mean average precision" in page.text
    assert "bootstrap over images" in page.text


def test_a_thousand_classes_and_many_findings_stay_small(sketched):
    big = content(1000, 3000)
    html = render(big)
    assert len(html) < 3_000_000
    assert Page(html).sections() == SECTIONS
    assert "The other" in html


def test_pictures_are_bounded_in_number_and_bytes(sketched):
    lavish = content()
    photo = picture(1).resize((1200, 900))
    lavish.worst = [Example(photo, "a", "b", 0.9)] * 500
    lavish.explanations = [Example(photo, "a", "b", 0.9, overlay=photo)] * 500
    for finding in ("exact_duplicates", "near_duplicates"):
        lavish.audit[finding]["examples"] = [
            [{"key": f"{finding}{i}{j}", "labels": ["a"], "split": None} for j in range(20)] for i in range(20)
        ]
    keys = audit_keys(lavish.audit)
    assert len(keys) <= 4 * report.MAX_GROUPS * report.GROUP_IMAGES + report.MAX_BLANK
    lavish.pictures = dict.fromkeys(keys, photo)
    uris = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', render(lavish))
    assert len(uris) <= 24 + 24 + 16 + 72
    for _, code in uris:
        assert len(code) < 40_000
        assert max(Image.open(io.BytesIO(base64.b64decode(code))).size) <= 160


def test_small_images_keep_their_pixels(sketched):
    digit = Image.effect_noise((8, 8), 50).convert("RGB")
    html = render(ReportContent({}, worst=[Example(digit, "1", "7")]))
    kind, code = re.search(r'src="data:image/(\w+);base64,([^"]+)" alt="[^"]*" class="tiny"', html).groups()
    assert kind == "png"
    assert Image.open(io.BytesIO(base64.b64decode(code))).tobytes() == digit.tobytes()


def test_thumbnails_are_small_and_leave_the_image_alone():
    image = Image.new("RGBA", (400, 100))
    small = thumbnail(image)
    assert small.size == (160, 40)
    assert small.mode == "RGB"
    assert image.size == (400, 100)


def test_audit_keys_are_those_shown():
    some = content()
    keys = audit_keys(some.audit)
    assert {"a/1.png", "c/2.png", "e/1.png", "f/2.png", "blank/1.png"} <= set(keys)
    assert audit_keys({}) == []


def test_the_file_is_written(tmp_path):
    some = ReportContent({"model": "résumé"})
    write_report(tmp_path / "report.html", some)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(some)


def test_values_are_written_for_people():
    assert report.percent(0.5891) == "58.9\u202f%"
    assert report.percent(None) == "–"
    assert [report.count(n) for n in (12, 8123, 3_400_000, 2.5e9)] == ["12", "8\u202f123", "3.4 M", "2.5 G"]
    assert [report.size(n) for n in (12, 3_600, 13_500_000)] == ["12 bytes", "3.6 kB", "13.5 MB"]
    assert [report.duration(s) for s in (3.456, 352, 7300)] == ["3.46 s", "6 min", "2 h 02 min"]
