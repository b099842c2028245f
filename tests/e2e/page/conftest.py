"""A browser, and the page of the server in it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))

from driven_page import ORIGIN, Canned, Seen, find_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


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
