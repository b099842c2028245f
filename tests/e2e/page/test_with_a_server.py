"""The page of ``offramp serve`` in a browser, with a server of a tiny model."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from driven_page import Seen
from playwright.sync_api import expect


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
