"""The report as a reader opens it: from a file, in a real browser, with no network."""

import os
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from offramp.report import write_report
from offramp.report.charts import chart_of, read_result
from offramp.report.drawing import save_chart
from offramp.report.study import write
from offramp.report.study_json import read_study, read_times

STUDY = Path(__file__).parents[2] / "docs" / "studies" / "alpha"
FIXTURE = Path(__file__).parents[1] / "unit" / "report" / "conftest.py"
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found and Path(found).exists():
        return found
    reason = "no chromium: install it or name it in $CHROMIUM"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Opened:
    """A page, the requests it made and what it complained of."""

    def __init__(self, page: Page, path: Path):
        self.page, self.url = page, path.as_uri()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self.note)
        page.goto(self.url)
        page.wait_for_selector("html[data-charts]", state="attached", timeout=30_000)

    def note(self, message) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["wide light", "narrow dark"])
def opened(request, browser, tmp_path_factory) -> Opened:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(runpy.run_path(str(FIXTURE))["make_results"](), path)
    narrow = request.param == "narrow dark"
    page = browser.new_page(
        viewport={"width": 400 if narrow else 1200, "height": 800},
        color_scheme="dark" if narrow else "light",
    )
    opened = Opened(page, path)
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    page.wait_for_function(
        "[...document.querySelectorAll('.chart')].every(c => c.querySelector('svg'))"
    )
    return opened


def test_every_chart_is_drawn(opened):
    charts = opened.page.locator(".chart")
    assert charts.count() == 2 * 6  # two corpora; frontier and thresholds for either epoch
    for index in range(charts.count()):
        chart = charts.nth(index)
        assert chart.locator("svg").count() == 1
        assert chart.locator("svg .mark-symbol path, svg .mark-line path").count() > 0
        box = chart.locator("svg").bounding_box()
        assert box["height"] > 150
        assert 250 < box["width"] <= chart.bounding_box()["width"] + 1


def test_published_markers_are_drawn(opened):
    published = opened.page.locator(".chart").first.locator(
        'svg [aria-label*="kind: published in the document"]'
    )
    assert published.count() == 2
    assert published.first.bounding_box()["width"] > 5


def test_no_complaint_and_no_request_but_the_page(opened):
    assert opened.complaints == []
    assert opened.requests == [opened.url]


def test_tokens_have_the_colour_of_their_exit(opened):
    colours = opened.page.eval_on_selector_all(
        ".passage >> nth=0 >> .token",
        "tokens => tokens.map(token => getComputedStyle(token).backgroundColor)",
    )
    first, third = colours[0], colours[2]
    assert first != third
    assert "rgba(0, 0, 0, 0)" not in colours
    assert colours == [first, first, third, first, third, third]


def test_white_space_is_kept(opened):
    passage = opened.page.locator(".passage").first
    assert passage.inner_text() == "<b> \n&"
    marks = passage.locator("[data-mark]")
    assert [marks.nth(index).get_attribute("data-mark") for index in range(2)] == ["·", "↵"]


def test_page_does_not_scroll_sideways(opened):
    width, shown = opened.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width <= shown


def test_legend_picks_one_method_out(opened):
    chart = opened.page.locator(".chart").first
    lines = chart.locator("svg .mark-line path")
    opacities = "paths => paths.map(path => Number(path.getAttribute('opacity')))"
    assert len(set(lines.evaluate_all(opacities))) == 1
    chart.locator("svg .role-legend-label text").first.click()
    opened.page.wait_for_timeout(300)
    assert sorted(lines.evaluate_all(opacities)) == [0.12, 0.9]


def test_a_studys_page_draws_one_plot_and_the_others_when_they_are_unfolded(browser, tmp_path):
    width = 1200
    times = read_times(STUDY / "timing.json")
    write(read_study(STUDY / "study.json"), times, tmp_path)
    page = browser.new_page(viewport={"width": width, "height": 800})
    opened = Opened(page, tmp_path / "report.html")
    drawn = page.locator(".chart svg")
    assert drawn.count() == 1
    assert drawn.first.bounding_box()["width"] <= width
    page.get_by_text("More plots (6)").click()
    page.wait_for_function("document.querySelectorAll('.chart svg').length == 7")
    for index in range(7):
        assert drawn.nth(index).bounding_box()["height"] > 150
    page.get_by_text("Tables (6)").click()
    assert page.get_by_role("region", name="Static models").is_visible()
    wide, shown = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= shown
    assert opened.complaints == []
    assert opened.requests == [opened.url]


COVERED = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll(".mark-text.role-mark text")].filter(
      text => text.textContent.trim() && getComputedStyle(text).display !== "none");
    const boxes = texts.map(text => text.getBoundingClientRect());
    const inside = (box, x, y) =>
      x > box.left + 1 && x < box.right - 1 && y > box.top + 1 && y < box.bottom - 1;
    const points = [];
    for (const path of svg.querySelectorAll(".mark-line.role-mark path")) {
      const matrix = path.getScreenCTM(), length = path.getTotalLength();
      for (let at = 0; at <= length; at += 2)
        points.push(path.getPointAtLength(at).matrixTransform(matrix));
    }
    for (const path of svg.querySelectorAll(".mark-symbol.role-mark path")) {
      const box = path.getBoundingClientRect();
      points.push({x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2});
    }
    boxes.forEach((box, at) => {
      if (points.some(({x, y}) => inside(box, x, y))) found.push(texts[at].textContent);
      boxes.slice(at + 1).forEach((other, next) => {
        if (box.left < other.right - 1 && other.left < box.right - 1 &&
            box.top < other.bottom - 1 && other.top < box.bottom - 1)
          found.push(texts[at].textContent + " on " + texts[at + 1 + next].textContent);
      });
    });
    found.push(`labels: ${texts.length > 0}`);
  }
  return found;
}"""
"""Labels that cover a curve, a point or another label, as the browser draws them."""


@pytest.mark.parametrize(("theme", "name"), [("screen", "exits"), ("paper", "alpha")])
def test_no_label_covers_a_curve_or_another_label(theme, name, browser, tmp_path):
    out = tmp_path / f"{name}.svg"
    save_chart(chart_of(read_result(STUDY.parent / name / "study.json"), theme=theme), out)
    page = browser.new_page()
    page.set_content(out.read_text())
    assert page.evaluate(COVERED) == ["labels: true"]


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1280, "light")])
def test_a_studys_page_fits_its_window(width, scheme, browser, tmp_path):
    long = "a-name-without-any-space-" * 12
    result = read_study(STUDY / "study.json")
    result = replace(result, text={**result.text, "corpus": long}, question=long)
    write(result, read_times(STUDY / "timing.json"), tmp_path)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = Opened(page, tmp_path / "report.html")
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    page.wait_for_function("document.querySelectorAll('.chart svg').length == 7")
    wide, shown = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= shown
    assert set(page.evaluate(COVERED)) == {"labels: true"}
    hints = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(box => ["
        "box.scrollWidth > box.clientWidth + 1,"
        "getComputedStyle(box.previousElementSibling).display !== 'none',"
        "getComputedStyle(box).maskImage !== 'none'])"
    )
    assert hints
    for scrolls, *shows in hints:
        assert shows == [scrolls, scrolls]
    assert any(scrolls for scrolls, *_ in hints) or width > 400
    if width == 400:
        page.evaluate("document.querySelectorAll('.scroll').forEach(b => { b.scrollLeft = 9999; })")
        page.wait_for_function("document.querySelectorAll('.scroll[data-more=left]').length > 0")
        assert page.locator(".scroll[data-more=right]").count() == 0
    assert opened.complaints == []
