"""The documentation site: its navigation, and the built pages as a reader opens them."""

import importlib.util
import os
import re
import shutil
import tomllib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from subprocess import CalledProcessError
from types import ModuleType

import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import sync_playwright

import offramp
from offramp.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "site"


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_site", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = load_build()


def nav() -> list:
    return tomllib.loads((FOLDER / "zensical.toml").read_text("utf-8"))["project"]["nav"]


def test_the_navigation_leads_through_the_pages():
    first = [part if isinstance(part, str) else next(iter(part)) for part in nav()]
    assert first == [
        "README.md",
        "docs/quickstart.md",
        "examples/tutorial.md",
        "Guides",
        "Studies",
        "Reference",
        "docs/glossary.md",
        "日本語",
    ]


def test_the_navigation_covers_every_page_once():
    pages = BUILD.pages()
    found = Counter(BUILD.leaves(BUILD.navigation(nav(), pages)))
    assert set(found) == set(pages)
    assert set(found.values()) == {1}
    assert {"docs/python.md", "docs/studies/alpha/README.md", "docs/reference.md"} <= set(pages)


def test_a_new_page_is_in_the_navigation_without_being_named():
    pages = [*BUILD.pages(), "docs/new.md", "docs/ja/new.md", "README.fr.md"]
    sections = {
        name: parts
        for section in BUILD.navigation(nav(), pages)
        if isinstance(section, dict)
        for name, parts in section.items()
    }
    assert {"README.fr.md", "docs/new.md"} <= set(sections["Guides"])
    assert "docs/ja/new.md" in sections["日本語"]


def test_a_page_that_is_named_and_missing_is_one_sentence():
    pages = [page for page in BUILD.pages() if page != "docs/glossary.md"]
    with pytest.raises(SystemExit, match=r"expected pages that exist, got docs/glossary\.md$"):
        BUILD.navigation(nav(), pages)


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(BUILD, "find_spec", lambda package: None)
    with pytest.raises(SystemExit, match=r'^docs: expected nbconvert; .* "offramp\[docs\]"$'):
        BUILD.build(tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: offramp\.(\w+)$", (FOLDER / "reference.md").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == set(offramp.__all__) - {"__version__"}


# ---- the built site ----------------------------------------------------------------------------

FETCHED = ("script", "img", "source", "iframe", "link", "video", "audio", "embed", "object", "use")
MADE = ("docs/reference.md", "docs/commands.md", "examples/tutorial.md", "examples/afternoon.md")
"""Pages that are made from something else than Markdown."""


class Parsed(HTMLParser):
    """The tags of a page's article, and the addresses that a browser fetches by itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.article = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in FETCHED and given.get("rel") not in ("canonical", "next", "prev"):
            names = ("src", "href", "srcset", "data", "poster")
            self.fetched += [value for name in names if (value := given.get(name))]
        self.article = self.article or tag == "article"
        if self.article:
            self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self.article = self.article and tag != "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_zensical()
    return BUILD.build(tmp_path_factory.mktemp("docs"))


def find_chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        assert not os.environ.get("CI"), "no chromium: install it or name it in $CHROMIUM"
        pytest.skip("no chromium: install it or name it in $CHROMIUM")
    return found


def needs_zensical() -> None:
    if importlib.util.find_spec("zensical") is None and not os.environ.get("CI"):
        pytest.skip('no zensical: install it by pip install ".[docs]"')


def html_of(page: str) -> str:
    name = re.sub("(^|/)README$", r"\1index", page.removesuffix(".md"))
    return f"{name}.html"


@pytest.mark.slow
def test_a_page_has_what_it_has_on_github(site):
    """Its headings, lists, tables, blocks of code, images and links are those of CommonMark."""
    markdown = MarkdownIt("commonmark").enable("table")
    for page in BUILD.pages():
        found = Parsed((site / html_of(page)).read_text("utf-8")).tags
        assert found["h1"] == 1, page
        if page not in MADE:
            html = markdown.render((ROOT / page).read_text("utf-8"))
            wanted = Parsed(f"<article>{html}</article>").tags
            for tag in ("h2", "h3", "h4", "p", "li", "tr", "td", "pre", "img", "strong", "em"):
                assert found[tag] == wanted[tag], (page, tag)


@pytest.mark.slow
def test_a_page_of_another_language_says_so(site):
    for page, language in (("README.md", "en"), ("README.ja.md", "ja")):
        assert f'<html lang="{language}"' in (site / html_of(page)).read_text("utf-8")
    assert '<html lang="ja"' in (site / "docs/ja/quickstart.html").read_text("utf-8")


@pytest.mark.slow
def test_the_site_needs_no_other_host(site):
    """Scripts, styles, fonts and images are files of the site."""
    for path in site.rglob("*.html"):
        fetched = Parsed(path.read_text("utf-8")).fetched
        assert any(address.endswith(".css") for address in fetched), path
        assert not [address for address in fetched if re.match(r"(https?:)?//", address)], path
        missing = [address for address in fetched if not (path.parent / address).is_file()]
        assert not missing or path.name == "404.html", path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text("utf-8")), path


@pytest.mark.slow
def test_the_references_are_complete(site):
    python = (site / "docs/reference.html").read_text("utf-8")
    for name in ("load", "EarlyExitLM.certify", "GenerateConfig.threshold", "ConfigError"):
        assert re.search(rf'id="offramp\.[\w.]*{name}"', python), name
    command_line = (site / "docs/commands.html").read_text("utf-8")
    for name in COMMANDS:
        assert f'id="offramp-{name}"' in command_line
    assert "--max-new-tokens" in command_line


@pytest.mark.slow
def test_the_tutorial_shows_its_outputs(site):
    tutorial = (site / "examples/tutorial.html").read_text("utf-8")
    assert "shallow_pct" in tutorial
    pictures = [name for name in Parsed(tutorial).fetched if name.startswith("tutorial_files/")]
    assert len(pictures) == 1
    assert (site / "examples" / pictures[0]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_link_that_leads_nowhere_is_an_error(tmp_path, capfd):
    needs_zensical()
    page = tmp_path / "pages" / "README.md"
    page.parent.mkdir()
    page.write_text("# Title\n\n[a](docs/nowhere.md) [b](README.md#nowhere) [c](#title)\n")
    with pytest.raises(CalledProcessError):
        BUILD.render(tmp_path, ["README.md"])
    assert "2 issues found" in "".join(capfd.readouterr())


@pytest.mark.slow
def test_search_finds_a_page_without_a_network(site):
    requests: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else 0)
        page.goto((site / "docs/quickstart.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.keyboard.press("/")
        page.keyboard.type("acceptance rate")
        page.wait_for_selector("text=Prompt lookup", timeout=30_000)
        browser.close()
    assert not complaints
    assert not [url for url in requests if url.startswith("http")]
