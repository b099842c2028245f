"""Build the documentation site, without a network: ``make docs``, or this script.

The pages of the repository are copied in the folders that they have, so that one relative link
works on GitHub and on the site. Two kinds of links are changed: a notebook becomes a page, and a
folder becomes its README.md. Files that a page links to are copied with it. The build fails if a
link or its anchor leads nowhere.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CONFIG = HERE / "zensical.toml"
SHIM = HERE / "iframe-worker.js"
GENERATED = ("docs/reference.md", "docs/commands.md")
LINK = re.compile(r"(\]\()([^)\s#]+)")
FENCE = re.compile(r"^(```[\w-]+) .*$", flags=re.MULTILINE)


def sources() -> list[str]:
    """Return the Markdown pages and the notebooks, by their paths in the repository."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*.md")]
    found += ROOT.glob("examples/*.ipynb")
    return sorted(path.relative_to(ROOT).as_posix() for path in found if HERE not in path.parents)


def pages() -> list[str]:
    """Return the pages of the site by the paths that they are built from."""
    return sorted([*map(page_of, sources()), *GENERATED])


def page_of(name: str) -> str:
    """Return the page that a file becomes."""
    return f"{name.removesuffix('.ipynb')}.md" if name.endswith(".ipynb") else name


def navigation(nav: list[Any], pages: Iterable[str]) -> list[Any]:
    """Add the pages that a navigation does not name to the end of its guides."""
    named, pages = set(leaves(nav)), set(pages)
    if missing := sorted(named - pages):
        raise SystemExit(f"{CONFIG}: expected pages that exist, got {', '.join(missing)}")
    sections = {
        name: part for parts in nav if isinstance(parts, dict) for name, part in parts.items()
    }
    for page in sorted(pages - named):
        japanese = page.startswith("docs/ja/") or page.endswith(".ja.md")
        sections["日本語" if japanese else "Guides"].append(page)
    return nav


def leaves(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation."""
    if isinstance(nav, str):
        yield nav
        return
    for part in nav.values() if isinstance(nav, dict) else nav:
        yield from leaves(part)


def stage(folder: Path) -> None:
    """Write the pages and what they link to into a folder."""
    for name in sources():
        text = notebook(name, folder) if name.endswith(".ipynb") else read(ROOT / name)
        text = FENCE.sub(r"\1", text)  # a block of code has a language, and nothing else
        write(folder / page_of(name), linked(name, text, folder))
    write(folder / "docs/reference.md", read(HERE / "reference.md"))
    write(folder / "docs/commands.md", commands())
    write(folder / SHIM.name, read(SHIM))


def linked(name: str, text: str, folder: Path) -> str:
    """Return a page with the links of the site, and copy the files that it links to."""

    def changed(link: re.Match[str]) -> str:
        place = (ROOT / name).parent / link[2]
        if place.is_dir():
            return f"{link[1]}{link[2].rstrip('/')}/README.md"
        kept = place.resolve()
        if kept.is_file() and ROOT in kept.parents and kept.suffix not in (".md", ".ipynb"):
            copy = folder / kept.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept, copy)
        return link[1] + page_of(link[2])

    return LINK.sub(changed, text)


def notebook(name: str, folder: Path) -> str:
    """Return a notebook as a page; its plots are written beside it."""
    from nbconvert import MarkdownExporter

    plots = {"output_files_dir": f"{Path(name).stem}_files"}
    text, made = MarkdownExporter().from_filename(str(ROOT / name), resources=plots)
    for path, content in made["outputs"].items():
        place = (folder / name).parent / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return str(text)


def commands() -> str:
    """Return the help of all commands as a page."""
    from offramp.cli.app import app

    text = app.generate_docs().replace("# offramp\n", "# Command line\n", 1)
    text = re.sub(r"## Table of Contents\n.*?(?=\*\*Commands)", "", text, flags=re.DOTALL)
    return text.replace("(#offramp-install", "(#offramp---install")  # the anchor of its heading


def read(path: Path) -> str:
    """Return the text of a file."""
    return path.read_text(encoding="utf-8")


def write(path: Path, text: str) -> None:
    """Write a text and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def render(folder: Path, nav: list[Any]) -> Path:
    """Turn FOLDER/pages into FOLDER/site; a broken link is an error."""
    config = tomllib.loads(read(CONFIG))["project"]
    config |= {"docs_dir": "pages", "site_dir": "site", "nav": nav}
    config["plugins"]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT / "src")]
    write(folder / "mkdocs.yml", json.dumps(config))  # zensical reads YAML, which JSON is
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "site"


def build(folder: Path) -> Path:
    """Build the site in a folder, and return the folder of its HTML."""
    for package in ("nbconvert", "mkdocstrings", "zensical"):
        if find_spec(package) is None:
            raise SystemExit(f'docs: expected {package}; install it by pip install "offramp[docs]"')
    for part in ("pages", "site"):
        shutil.rmtree(folder / part, ignore_errors=True)
    stage(folder / "pages")
    site = render(folder, navigation(tomllib.loads(read(CONFIG))["project"]["nav"], pages()))
    for page in [*site.glob("*.ja.html"), *site.glob("docs/ja/*.html")]:
        write(page, read(page).replace('<html lang="en"', '<html lang="ja"', 1))
    return site


if __name__ == "__main__":
    print(f"Open {build(ROOT / 'build' / 'docs') / 'index.html'}")
