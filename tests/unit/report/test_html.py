import re

import pytest

from offramp.errors import CheckpointError
from offramp.report import html, write_report


@pytest.fixture
def page(results, tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(results, path)
    return path.read_text(encoding="utf-8")


def test_page_escapes_labels_and_text(page):
    body = page[page.index("<body>") : page.index("window.vegaEmbed")]
    assert "Asymmetric | α=0.7 &lt;b&gt;" in body
    assert "claim 1 &lt;i&gt;" in body
    assert "Two epochs &lt;stand&gt; in one document." in body
    assert "offramp reproduce --seeds &lt;n&gt;" in body
    assert "Corpus other &lt;text&gt;" in body
    assert not re.search(r"α=0\.7 <b>|<stand>|<text>|<n>|claim \d <i>", body)
    assert r"\u003cb\u003e" in body  # and within the charts' specifications


def test_tokens_carry_exit_confidence_and_white_space(page):
    token = '<span class="token exit-{}" title="exit layer {}, confidence {} at the first exit"{}>'
    assert token.format(1, 1, "0.990", "") + "&lt;</span>" in page
    assert token.format(1, 1, "0.960", ' data-mark="·"') + " </span>" in page
    assert token.format(3, 3, "0.250", ' data-mark="↵"') + "\n</span>" in page
    assert "exit layer 3: 3 of 6 tokens" in page


def test_exits_have_colours_of_their_own(page):
    hues = dict(re.findall(r"\.exit-(\d+) { --hue: ([\d.]+); }", page))
    assert hues == {"1": "205.0", "3": "35.0"}
    assert html.exit_hue(1, 1) == html.SHALLOW_HUE


def test_order_of_contents(page):
    titles = re.findall(
        r"<(?:h3|h4|summary)>(.*?)</", page[page.index("<main>") : page.index('id="corpus-2"')]
    )
    shown = [title.replace("&#39;", "'") for title in titles]
    assert shown[0] == "PPL against Compute%, best epoch"
    assert [title for title in shown if f"<summary>{title}</" in page.replace("&#39;", "'")] == [
        "Each finding, with its interval and p-value",
        "The document's tables",
        "Thresholds, epochs, seeds and exits",
        "The document's explanations",
        "Which exit each token took",
        "Protocol, power and notes",
    ]
    assert page.index("1 of the document&#39;s 6 findings holds") < page.index("<main>")
    assert '<span class="badge red">does not hold</span>' in page


def test_page_loads_nothing_and_holds_the_libraries_once(page):
    assert page.count("window.vegaEmbed") == 1
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"""(src|href)=["'](?!#)|url\(|@import""", markup)
    assert page.count("<script") == page.count("</script>")


def test_failed_write_leaves_the_old_page(results, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*arguments):
        raise OSError("no room")

    monkeypatch.setattr(html.Path, "replace", fail)
    with pytest.raises(CheckpointError, match="cannot be written: no room"):
        write_report(results, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_one_seed_and_no_passages(one_seed, tmp_path):
    for corpus in one_seed["corpora"].values():
        corpus["passages"] = corpus["notes"] = corpus["explanations"] = []
    write_report(one_seed, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Which exit each token took" not in page
    assert "over 1 seed," in page
