"""The Japanese pages have the sections, code, figures, images and links of the English ones."""

import posixpath
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
JAPANESE = {
    "README.md": "README.ja.md",
    "docs/quickstart.md": "docs/ja/quickstart.md",
    "docs/reproduction.md": "docs/ja/reproduction.md",
}
ENGLISH = {japanese: english for english, japanese in JAPANESE.items()}
PARTS = ("paragraph_open", "list_item_open", "fence", "table_open", "tr_open")
NUMBER = re.compile(r"(?<![A-Za-z0-9_.,])[-+]?[0-9]+(?:[.,][0-9]+)*%?(?![A-Za-z0-9_])")


@dataclass(kw_only=True)
class Section:
    """What a section has in common with its translation."""

    title: str
    level: int
    parts: list[str] = field(default_factory=list)
    "Kinds of its blocks: paragraphs, list items, blocks of code, tables and their rows."
    blocks: list[str] = field(default_factory=list)
    "Blocks of code, with their language."
    cells: list[list[str]] = field(default_factory=list)
    "The numbers in each cell of its tables."
    images: list[str] = field(default_factory=list)
    links: set[str] = field(default_factory=set)
    "Paths in the repository, those of the English pages."
    code: set[str] = field(default_factory=set)
    "Code within sentences."
    numbers: set[str] = field(default_factory=set)


NAMES = {
    "level": "level of heading",
    "parts": "paragraphs, list items or rows",
    "blocks": "blocks of code",
    "cells": "numbers in a table",
    "images": "images",
    "links": "links",
    "code": "code in sentences",
    "numbers": "numbers",
}


def sections(name: str, text: str) -> list[Section]:
    """Return the sections of a page; what comes before its first heading is one of them."""
    found = [Section(title="", level=0)]
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for token, after in pairwise([*tokens, Token("end", "", 0)]):
        if token.type == "heading_open":
            found.append(Section(title=after.content, level=int(token.tag[1])))
        section = found[-1]
        if token.type in PARTS and not names_itself(name, after):
            section.parts.append(token.type.removesuffix("_open"))
        if token.type == "fence":
            section.blocks.append(f"{token.info}\n{token.content}")
        if after.type == "inline" and not names_itself(name, after):
            numbers = numbers_of(after)
            section.numbers |= set(numbers)
            if token.type in ("td_open", "th_open"):
                section.cells.append(sorted(numbers))
            section.code |= {part.content for part in after.children if part.type == "code_inline"}
            section.links |= links(name, after)
            section.images += [
                place(name, part.attrs["src"]) for part in after.children if part.type == "image"
            ]
    return found


def numbers_of(inline: Token) -> list[str]:
    """Return the numbers of a sentence that are no code, such as 8, -0.3% or 2,048."""
    text = " ".join(part.content for part in inline.children if part.type == "text")
    return NUMBER.findall(text.replace("\u2212", "-"))


def links(name: str, inline: Token) -> set[str]:
    """Return where the links of a sentence lead."""
    return {place(name, part.attrs["href"]) for part in inline.children if part.type == "link_open"}


def place(name: str, link: str) -> str:
    """Return the path of a link in the repository; that of the English page for a Japanese one."""
    if "://" in link:
        return link
    path, _, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
    if path in ENGLISH or path in JAPANESE:  # where anchors are those of translated headings
        return ENGLISH.get(path, path)
    return f"{path}#{anchor}" if anchor else path


def names_itself(name: str, token: Token) -> bool:
    """Whether this is the line with which a page names its translation."""
    return token.type == "inline" and links(name, token) == {ENGLISH.get(name, name)}


def difference(english: str, japanese: str, english_text: str, japanese_text: str) -> str | None:
    """Return what differs between a page and its translation, as a sentence; None if nothing."""
    first, second = sections(english, english_text), sections(japanese, japanese_text)
    for one, other in zip(first, second, strict=False):
        for attribute, what in NAMES.items():
            here, there = getattr(one, attribute), getattr(other, attribute)
            if here != there:
                return (
                    f"{english}, section {one.title!r}, and {japanese}, section {other.title!r}: "
                    f"expected the same {what}, got {only(here, there)} and {only(there, here)}"
                )
    if len(first) != len(second):
        return (
            f"{english} and {japanese}: expected as many sections, got {len(first)} and "
            f"{len(second)}"
        )
    return None


def only(here: object, there: object) -> object:
    """Return what is here and not there; all of it if the order or a number differs."""
    if isinstance(here, set):
        return sorted(here - there)
    if isinstance(here, list):
        return [part for part in here if part not in there] or here
    return here


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("english", "japanese"), JAPANESE.items())
def test_a_page_and_its_translation_say_the_same(english, japanese):
    found = difference(english, japanese, read(english), read(japanese))
    assert found is None, found


@pytest.mark.parametrize("japanese", ENGLISH)
def test_a_translation_is_japanese_and_names_its_original(japanese):
    text = read(japanese)
    assert len(re.findall("[\u3040-\u30ff\u4e00-\u9fff]", text)) > 300
    head = sections(japanese, text)[1]
    first = MarkdownIt("commonmark").parse(text)[3:6]
    assert any(names_itself(japanese, token) for token in first), head.title


@pytest.mark.parametrize("english", JAPANESE)
def test_a_page_names_its_translation(english):
    first = MarkdownIt("commonmark").parse(read(english))[3:6]
    assert any(names_itself(english, token) for token in first)


PAGE = """# Title

[日本語](ja/quickstart.md)

It takes 8 minutes with `--full` ([models](models.md#heads)).

![a plot](images/plot.png)

```bash
offramp generate model "The "  # 1
```

| Claim | Found |
|---|---|
| alpha 0.7 is best | -3.1% to +4% |

## End

- one
- two, see the [title](#title)
"""
TRANSLATED = """# 題

[English](../quickstart.md) | 日本語

`--full` では 8 分かかります（[モデル](../models.md#heads)）。

![図](../images/plot.png)

```bash
offramp generate model "The "  # 1
```

| 主張 | 結果 |
|---|---|
| α は 0.7 が最良 | -3.1%〜+4% |

## 終わり

- 一
- 二、[題](#題)を参照
"""


def test_a_faithful_translation_has_no_difference():
    assert difference("docs/quickstart.md", "docs/ja/quickstart.md", PAGE, TRANSLATED) is None


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("8 分", "9 分", "the same numbers, got ['8'] and ['9']"),
        ("+4%", "+4.5%", "the same numbers in a table, got [['+4%', '-3.1%']]"),
        ("`--full`", "`--quick`", "the same code in sentences, got ['--full'] and ['--quick']"),
        ('"The "', '"A "', "the same blocks of code"),
        ("plot.png", "other.png", "the same images, got ['docs/images/plot.png']"),
        ("models.md#heads", "models.md", "the same links, got ['docs/models.md#heads']"),
        ("## 終わり", "### 終わり", "the same level of heading, got 2 and 3"),
        ("## 終わり\n", "", "the same paragraphs, list items or rows"),
        ("- 一\n", "", "the same paragraphs, list items or rows"),
        ("| α は 0.7 が最良 | -3.1%〜+4% |\n", "", "the same paragraphs, list items or rows"),
    ],
)
def test_a_difference_is_one_sentence(before, after, what):
    assert before in TRANSLATED
    changed = TRANSLATED.replace(before, after)
    found = difference("docs/quickstart.md", "docs/ja/quickstart.md", PAGE, changed)
    assert "\n" not in found
    assert what in found


def test_a_missing_section_is_a_difference():
    longer = f"{PAGE}\n## More\n"
    found = difference("docs/quickstart.md", "docs/ja/quickstart.md", longer, TRANSLATED)
    assert "expected as many sections, got 4 and 3" in found
