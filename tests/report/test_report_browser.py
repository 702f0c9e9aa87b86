"""The report as a browser shows it."""

import shutil

import pytest
from report_content import content

from vitrail.report.report import write_report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=["single", "many", "multilabel"])
def address(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    some = {"single": (10,), "many": (60,), "multilabel": (8, 100, True)}[request.param]
    write_report(path, content(*some))
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    pages = []

    def opened(width, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        pages.append(page)
        page.complaints, page.fetched = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.fetched.append(request.url))
        page.goto(address)
        page.wait_for_load_state("networkidle")
        return page

    yield opened
    for page in pages:
        page.close()


def test_it_opens_without_a_complaint_or_a_request(visit, address):
    page = visit(1200)
    assert page.complaints == []
    assert [url for url in page.fetched if not url.startswith("data:")] == [address]
    assert page.locator("h1").inner_text() == "photos"
    assert page.locator("section").count() >= 12
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate(
        "[...document.querySelectorAll('svg.plot')].every(svg => svg.getBoundingClientRect().height > 60)"
    )


@pytest.mark.parametrize("width", [320, 360, 768])
def test_no_page_scrolls_sideways(visit, width):
    page = visit(width)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Whatever is wider than the page lies in a box that scrolls by itself.
    wide = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg')
              && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []


def test_the_dark_is_dark(visit):
    luminance = """() => { const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const mean = c => rgb(c).reduce((a, b) => a + b) / 3;
        const text = document.querySelector('svg.plot text');
        return [mean(getComputedStyle(document.body).backgroundColor), mean(getComputedStyle(document.body).color),
                mean(getComputedStyle(text).fill)] }"""
    paper, ink, plot = visit(1200, "dark").evaluate(luminance)
    assert paper < 50
    assert ink > 180
    assert plot > 120
    paper, ink, plot = visit(1200, "light").evaluate(luminance)
    assert paper > 230
    assert ink < 60
    assert plot < 130
