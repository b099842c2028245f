"""The page of ``offramp serve`` in a real browser: what it shows, says, asks for and never does.

Most tests answer the page's requests themselves, so that every token and error is known.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

import offramp

FILES = Path(offramp.__file__).parent / "serving" / "page"
ORIGIN = "http://offramp.test"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
NAMES = ("chromium", "chromium-browser", "google-chrome")
MODEL = {
    "num_layers": 6,
    "exit_layers": [2, 4, 6],
    "exits_trained": True,
    "confidences": ["max_prob", "margin", "entropy", "saturation", "patience", "gain"],
    "default_confidence": "gain",
    "flops_pct": {"2": 40.0, "4": 70.0, "6": 100.0},
    "max_tokens": 512,
    "chat": True,
    "certificate": None,
}


def find_chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found and Path(found).exists():
        return found
    reason = "no chromium: install it or name it in $CHROMIUM"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


def token(text: str, layer: int, confidence: float = 0.5) -> dict:
    return {"id": 1, "text": text, "exit_layer": layer, "confidence": confidence}


def stream(*chunks: list[dict], done: bool = True, **end: object) -> str:
    """The events of a text: its tokens in chunks, then its end."""
    about: list[dict] = [{"offramp": {"tokens": tokens}} for tokens in chunks]
    if done:
        figures = {"tokens": [], "mean_layers": 3.5, "flops_pct": 61.0, "tokens_per_s": 44.0, **end}
        about.append({"offramp": figures, "finish": "stop"})
    lines = [
        {
            "choices": [{"index": 0, "text": "", "finish_reason": each.get("finish")}],
            "offramp": each["offramp"],
        }
        for each in about
    ]
    text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines)
    return text + ("data: [DONE]\n\n" if done else "")


class Seen:
    """A page, what it asked for, and what it complained of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.asked: list[tuple[str, dict | None]] = []
        self.complaints: list[str] = []
        page.on("request", self.note_request)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self.note)

    def note_request(self, request) -> None:
        self.asked.append((request.url, request.post_data_json if request.post_data else None))

    def note(self, message) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    @property
    def bodies(self) -> list[dict]:
        return [body for _, body in self.asked if body is not None]

    def run(self, prompt: str = "The ") -> None:
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.get_by_role("button", name="Run").click()

    def tokens(self, method: str = "exit"):
        return self.page.locator(f"[data-method={method}] .text .token")

    def figure(self, name: str, method: str = "exit"):
        return self.page.locator(f"[data-method={method}] [data-figure={name}]")


class Canned:
    """Answers to a page's requests, each made of a status and a body."""

    def __init__(self) -> None:
        self.model: dict = dict(MODEL)
        self.models: tuple[int, str] | None = None
        self.answer: tuple[int, str] | None = (200, stream([token("fox", 2)]))
        self.needs: str | None = None

    def __call__(self, route: Route) -> None:
        path = route.request.url.removeprefix(ORIGIN)
        if path == "/" or path.startswith("/page/"):
            file = FILES / (path.removeprefix("/page/") if path != "/" else "index.html")
            headers = {"Content-Security-Policy": "default-src 'self'"}
            headers["Content-Type"] = TYPES[file.suffix]
            route.fulfill(status=200, headers=headers, body=file.read_text(encoding="utf-8"))
            return
        listed = {"data": [{"id": "tiny", "object": "model", "offramp": self.model}]}
        answer = (200, json.dumps(listed)) if path == "/v1/models" else self.answer
        if self.needs and route.request.headers.get("authorization") != f"Bearer {self.needs}":
            answer = (401, json.dumps({"error": {"message": "api key: expected another"}}))
        if answer is None:
            route.abort("connectionreset")
            return
        route.fulfill(
            status=answer[0], headers={"Content-Type": "text/event-stream"}, body=answer[1]
        )


@pytest.fixture(scope="module")
def pages(browser) -> Iterator[Page]:
    """One page for all tests: each loads it again."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    yield page
    page.close()


@pytest.fixture
def canned(pages) -> Iterator[Canned]:
    answers = Canned()
    pages.route("**/*", answers)
    yield answers
    pages.unroute("**/*")


@pytest.fixture
def seen(pages, canned) -> Iterator[Seen]:
    """The page, which a test may load again with other answers; it must not complain."""
    pages.set_viewport_size({"width": 1280, "height": 900})
    seen = Seen(pages)
    pages.goto(ORIGIN)
    yield seen
    for event in ("request", "pageerror", "console"):
        pages._impl_obj.remove_all_listeners(event)


def in_order(seen: Seen) -> None:
    assert seen.complaints == []
    assert {url.split("/")[2] for url, _ in seen.asked} == {"offramp.test"}


def test_tokens_have_the_colour_and_the_height_of_their_depth(seen, canned):
    canned.answer = (200, stream([token("The", 6)], [token(" quick", 2), token(" fox", 4)]))
    seen.run()
    tokens = seen.tokens()
    expect(tokens).to_have_count(3)
    backgrounds = tokens.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundImage)")
    assert len(set(backgrounds)) == 3
    legend = seen.page.locator("#legend .token")
    drawn = legend.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundImage)")
    assert [drawn[2], drawn[0], drawn[1]] == backgrounds
    assert seen.page.locator("#legend").inner_text().split("\n") == ["2", "4", "6 (full depth)"]
    expect(seen.figure("tokens")).to_have_text("3")
    expect(seen.figure("layers")).to_have_text("3.5 of 6")
    expect(seen.figure("flops")).to_have_text("61%")
    expect(seen.figure("speed")).to_have_text("44.0")
    expect(seen.page.locator("#status")).to_contain_text("Done: Exits: 3 tokens")
    in_order(seen)


def test_figures_are_live_before_the_end(seen, canned):
    canned.answer = (200, stream([token("a", 6), token("b", 2)], done=False))
    seen.run()
    expect(seen.figure("layers")).to_have_text("4.0 of 6")
    expect(seen.figure("flops")).to_have_text("70%")
    expect(seen.page.get_by_role("alert")).to_have_text(
        "The connection was lost before the text was complete."
    )
    in_order(seen)


def test_text_is_text(seen, canned):
    """Markup, line breaks, white space, parts of characters and marks that turn text."""
    wild = ["<b>", "<script>alert(1)</script>", "\n", " ", "\t", "", "é", "\u202e", "\x1b[2J", "\0"]
    canned.answer = (200, stream([token(text, 2) for text in wild]))
    seen.run('<img src="/x" onerror="alert(1)">\n')
    expect(seen.tokens()).to_have_count(len(wild))
    shown = seen.tokens().evaluate_all("all => all.map(t => t.textContent)")
    assert shown == [*wild[:7], "\\u202e", "\\u001b[2J", "\\u0000"]
    marks = seen.tokens().evaluate_all("all => all.map(t => t.dataset.mark ?? null)")
    assert marks == [None, None, "↵", None, "→", "·", None, None, None, None]
    widths = seen.tokens().evaluate_all("all => all.map(t => t.getBoundingClientRect().width)")
    assert min(widths) > 2
    assert seen.page.locator(".text b, .text script, .text img").count() == 0
    tops = seen.tokens().evaluate_all("all => all.map(t => t.getBoundingClientRect().bottom)")
    assert tops[3] > tops[1]
    in_order(seen)


def test_depth_is_a_number_on_hover_and_focus(seen, canned):
    canned.answer = (200, stream([token("The", 6, 1.0), token(" fox", 2, 0.25), token("", 6)]))
    seen.run()
    line = seen.page.locator("#token")
    seen.tokens().nth(1).hover()
    expect(line).to_have_text('" fox": layer 2 of 6, confidence 0.250')
    badge = "t => getComputedStyle(t, '::after').content"
    assert seen.tokens().nth(1).evaluate(badge) == '"layer 2"'
    seen.page.mouse.move(0, 0)
    seen.tokens().nth(0).focus()
    expect(line).to_have_text('"The": layer 6 of 6, confidence 1.000')
    seen.page.keyboard.press("ArrowRight")
    expect(line).to_contain_text("layer 2 of 6")
    assert seen.tokens().nth(1).evaluate(badge) == '"layer 2"'
    seen.page.keyboard.press("End")
    expect(line).to_contain_text("without text of its own: layer 6 of 6")
    seen.page.keyboard.press("Home")
    expect(line).to_contain_text('"The"')
    in_order(seen)


def test_the_slider_asks_again(seen, canned):
    seen.run()
    expect(seen.tokens()).to_have_count(1)
    slider = seen.page.get_by_role("slider")
    slider.focus()
    with seen.page.expect_request("**/v1/completions"):
        seen.page.keyboard.press("ArrowLeft")
        seen.page.keyboard.press("ArrowLeft")
    first, second = seen.bodies
    assert (first["threshold"], second["threshold"]) == (0.9, 0.88)
    assert first["prompt"] == "The "
    assert "confidence" not in first  # the server's own
    assert first["stream"] is True
    expect(seen.page.locator("#threshold-value")).to_have_text("0.88")
    seen.page.get_by_label("Confidence").select_option("max_prob")
    seen.page.wait_for_function("document.querySelector('#status').textContent.startsWith('Done')")
    in_order(seen)


def test_side_by_side_runs_one_prompt_three_ways(seen, canned):
    canned.answer = (200, stream([token("fox", 2)], acceptance_rate=0.5))
    seen.page.get_by_label("Side by side").check()
    seen.run("The ")
    for method in ("full", "exit", "speculative"):
        expect(seen.tokens(method)).to_have_count(1)
    expect(seen.page.locator("#status")).to_contain_text("Done")
    full, exits, speculative = seen.bodies
    assert {body["prompt"] for body in seen.bodies} == {"The "}
    assert "threshold" not in full
    assert "speculative" not in full
    assert exits["threshold"] == 0.9
    assert speculative["speculative"] is True
    assert "threshold" not in speculative
    expect(seen.figure("accepted", "speculative")).to_have_text("50%")
    expect(seen.page.get_by_text("Rejected drafts count, too.")).to_be_visible()
    tops = "all => all.map(t => t.getBoundingClientRect().top)"
    assert len(set(seen.page.locator(".column").evaluate_all(tops))) == 1
    seen.page.set_viewport_size({"width": 400, "height": 900})
    assert len(set(seen.page.locator(".column").evaluate_all(tops))) == 3
    width, shown = seen.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width <= shown
    in_order(seen)


def test_the_chat_template_is_the_servers(seen, canned):
    seen.page.get_by_text("More options").click()
    seen.page.get_by_label("chat template").check()
    seen.run("Hello")
    expect(seen.tokens()).to_have_count(1)
    assert seen.asked[-1][0] == f"{ORIGIN}/v1/chat/completions"
    assert seen.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]
    in_order(seen)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((429, "{}"), "The server is busy: as many requests wait as may. Try again in a moment."),
        ((400, '{"error": {"message": "threshold: expected a number"}}'), "expected a number"),
        ((413, "<html>"), "The request is larger than the server takes."),
        ((500, ""), "The server refused the request (500)."),
        (None, "The server does not answer. Is it still running?"),
        ((200, "data: "), "The connection was lost before the text was complete."),
        ((200, 'data: {"error": {"message": "logits"}}\n\n'), "The server stopped: logits"),
        ((200, "data: {\n\n"), "The page failed: "),
    ],
)
def test_errors_are_said_in_words(seen, canned, answer, said):
    canned.answer = answer
    seen.run()
    expect(seen.page.get_by_role("alert")).to_contain_text(said)
    expect(seen.page.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "true")
    canned.answer = (200, stream([token("fox", 2)]))
    seen.run()
    expect(seen.tokens()).to_have_count(1)
    expect(seen.page.get_by_role("alert")).to_have_text("")


def test_a_key_is_asked_for_where_the_server_needs_one(seen, canned):
    assert not seen.page.get_by_label("API key").is_visible()
    canned.needs = "secret"
    seen.page.goto(ORIGIN)
    expect(seen.page.get_by_label("API key")).to_be_focused()
    expect(seen.page.get_by_role("alert")).to_contain_text("needs an API key")
    seen.page.keyboard.type("wrong")
    seen.page.get_by_role("button", name="Use this key").click()
    expect(seen.page.get_by_role("alert")).to_contain_text("needs an API key")
    seen.page.get_by_label("API key").fill("secret")
    seen.page.keyboard.press("Enter")
    expect(seen.page.get_by_label("API key")).to_be_hidden()
    expect(seen.page.locator("#model")).to_contain_text("tiny: 6 layers, exits 2, 4")
    expect(seen.page.get_by_role("alert")).to_have_text("")
    assert seen.bodies == []
    seen.run()
    expect(seen.tokens()).to_have_count(1)


def test_a_certificate_bounds_the_slider(seen, canned):
    canned.model["certificate"] = {
        "thresholds": [0.4, "inf"],
        "confidence": "margin",
        "missing_kv": "recompute",
    }
    seen.page.goto(ORIGIN)
    slider = seen.page.get_by_role("slider")
    expect(slider).to_have_attribute("min", "0.4")
    seen.run()
    expect(seen.tokens()).to_have_count(1)
    slider.fill("0.5")
    expect(seen.page.locator("#status")).to_contain_text("Done")
    seen.run()
    expect(seen.page.locator("#status")).to_contain_text("Done")
    first, *_, last = seen.bodies
    assert (first["threshold"], last["threshold"]) == ([0.4, "inf"], [0.5, "inf"])
    assert (first["confidence"], first["missing_kv"]) == ("margin", "recompute")
    seen.page.get_by_label("Full depth").check()
    seen.run()
    expect(seen.tokens("full")).to_have_count(1)
    assert seen.bodies[-1]["threshold"] == "inf"
    in_order(seen)


@pytest.mark.parametrize("trained", [False, True])
def test_untrained_exits_are_said(seen, canned, trained):
    canned.model["exits_trained"] = trained
    seen.page.goto(ORIGIN)
    expect(seen.page.locator("#model")).to_contain_text("tiny")
    expect(seen.page.get_by_text("exits of this model were never trained")).to_be_visible(
        visible=not trained
    )


def test_a_model_without_exits_runs_at_full_depth(seen, canned):
    canned.model |= {"exit_layers": [6], "confidences": [], "default_confidence": None}
    canned.answer = (200, stream([token("fox", 6)]))
    seen.page.goto(ORIGIN)
    expect(seen.page.locator("#model")).to_contain_text("no exits")
    expect(seen.page.get_by_role("slider")).to_be_disabled()
    seen.run()
    expect(seen.tokens("full")).to_have_count(1)
    assert "threshold" not in seen.bodies[-1]
    in_order(seen)


def test_keys_alone_are_enough(seen, canned):
    page = seen.page
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("The ")
    page.keyboard.press("Control+Enter")
    expect(seen.tokens()).to_have_count(1)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.className")
        )
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if reached[-1] == "token":
            break
    assert {"threshold", "confidence", "run", "stop", "token"} <= set(reached)
    in_order(seen)


def test_every_control_has_a_name(seen):
    names = seen.page.locator("input, select, textarea, button").evaluate_all(
        "all => all.map(e => (e.labels?.[0] ?? e).textContent.trim())"
    )
    assert all(names), names


@pytest.fixture(scope="module")
def served(trained) -> Iterator[str]:
    """The address of a server of a tiny trained model, started as it is typed."""
    pytest.importorskip("fastapi")
    command = [sys.executable, "-m", "offramp", "serve", str(trained), "--port", "0"]
    limits = ["--max-new-tokens", "4000", "--capacity", "4096", "--slots", "2", "--threads", "1"]
    with subprocess.Popen([*command, *limits], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        try:
            assert found, "the server did not start"
            yield found[0]
        finally:
            process.terminate()


@pytest.fixture
def real(browser, served) -> Iterator[Seen]:
    """The page of a real server."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    seen = Seen(page)
    answer = page.goto(served)
    assert answer.header_value("content-security-policy").startswith("default-src 'self'")
    yield seen
    page.close()
    assert seen.complaints == []
    assert {url.split("/")[2] for url, _ in seen.asked} == {served.split("/")[2]}


def colours(seen: Seen, method: str = "exit") -> set[str]:
    found = seen.tokens(method).evaluate_all(
        "all => all.map(t => getComputedStyle(t).backgroundImage)"
    )
    return set(found[1:])  # the first token runs all layers


def done(seen: Seen) -> None:
    expect(seen.page.locator("#status")).to_contain_text("Done", timeout=30_000)


def test_a_prompt_is_typed_and_the_slider_changes_the_colours(real):
    page = real.page
    page.get_by_text("More options").click()
    page.get_by_label("New tokens").fill("40")
    page.get_by_label("Prompt", exact=True).press_sequentially("The quick ")
    page.keyboard.press("Control+Enter")
    done(real)
    expect(real.tokens()).to_have_count(40)
    slider = page.get_by_role("slider")
    seen = []
    for key in ("Home", "End"):
        slider.focus()
        with page.expect_response("**/v1/completions"):
            page.keyboard.press(key)
        done(real)
        expect(real.tokens()).to_have_count(40)
        seen.append(colours(real))
        expect(real.figure("layers")).to_have_text("1.1 of 4" if key == "Home" else "4.0 of 4")
    lowest, highest = seen
    assert (len(lowest), len(highest)) == (1, 1)
    assert lowest != highest
    assert real.figure("flops").inner_text() != "–"
    assert float(real.figure("speed").inner_text()) > 0


def test_drafts_give_the_text_of_full_depth_beside_it(real):
    real.page.get_by_label("Side by side").check()
    real.run("The quick ")
    done(real)
    texts = [real.page.locator(f"[data-method={each}] .text") for each in ("full", "speculative")]
    assert texts[0].inner_text() == texts[1].inner_text() != "The quick "
    assert real.figure("accepted", "speculative").inner_text().endswith("%")


def test_escape_stops_a_text_and_the_page_goes_on(real):
    real.page.get_by_text("More options").click()
    real.page.get_by_label("New tokens").fill("4000")
    real.run("The quick ")
    expect(real.tokens().nth(3)).to_be_attached()
    real.page.keyboard.press("Escape")
    expect(real.page.locator("#status")).to_have_text("Stopped.")
    count = real.tokens().count()
    assert 4 <= count < 4000
    real.page.get_by_label("New tokens").fill("5")
    real.page.get_by_role("button", name="Run").click()
    done(real)
    expect(real.tokens()).to_have_count(5)
