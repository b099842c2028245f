import io
import re

import pytest
from rich.console import Console

from offramp.report import markdown, rich_tables
from offramp.report.reproduction_tables import corpus_tables
from offramp.report.tables import Column, Table, terminal_table
from offramp.report.text import headline, p_text, value_text


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_row_has_published_beside_measured_and_every_seed(results):
    row = lines_of(markdown(results), "| Asymmetric")[0]
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
    assert cells[1:6] == ["best", "0.95", "22.95", "27.00 ± 2.00", "-2.03"]
    assert cells[6:10] == ["52.4", "61.0 ± 1.0", "65.0", "60.0 ± 0.0"]
    assert cells[10:] == ["1: 0.7, 3: 0.3", "25.00, 27.00, 29.00", "60.0, 61.0, 62.0"]


def test_markdown_escapes_pipes_and_tags(results):
    text = markdown(results)
    assert r"Asymmetric \| α=0.7 \<b>" in text
    assert not re.search(r"(?<!\\)<", text)
    tables = text.split("### ")
    for table in tables:
        widths = {
            len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines() if line[:1] == "|"
        }
        assert len(widths) <= 1, table


def test_markdown_names_figures_outside_two_deviations(corpus, results):
    outside = lines_of(markdown(results), "- Outside mean ± 2 std")
    per_corpus = outside[: len(outside) // 2]
    assert len(per_corpus) == 3  # 22.95 in both tables, 54.90; 31.46 and 34.86 lie inside
    assert (
        "All layers, α=0.7 at threshold 0.95, published PPL 54.90, lies 8.95 std above"
        in outside[2]
    )
    assert "published PPL 22.95, lies 2.03 std below the measured 27.00 ± 2.00." in outside[0]
    assert headline("x", corpus).endswith(
        "Of 4 published PPL figures, 2 lie within 2 standard deviations of the measured mean."
    )


def test_markdown_findings_and_the_rest(results):
    text = markdown(results)
    row = lines_of(text, "| 2 |")[0]
    for part in ("does not hold", r"22.95 \< 32.07", "5.5 ± 1.0", "0.042", r"\< 0.001"):
        assert part in row
    assert "1 of the document's 6 findings holds, 1 does not hold and 4 are undecided" in text
    assert "- 1 of the document's 6 findings holds, 1 does not hold and 4 are undecided." in text
    assert '"Depth-Adaptive Transformer"' in text
    assert "| Is exit 1 too sure? | 0.1 | - | undecided |" in text
    assert r"- Two epochs \<stand> in one document." in text
    assert r"| command | offramp reproduce --seeds \<n> |" in text
    assert "| best | 31.00 ± 1.00 | 401.00 ± 1.00 | 25.00 ± 1.00 |" in text


def test_one_seed_has_means_alone(one_seed):
    text = markdown(one_seed)
    assert "| 22.95 | 25.00 | - | 52.4 |" in text
    measured = re.sub(r"Measured: mean ± .*", "", text)
    assert "±" not in measured
    assert "over 1 seed," in text


def test_cells_match_headers(corpus):
    for table in corpus_tables(corpus):
        assert {len(row) for row in table.rows} == {len(table.header)}


@pytest.mark.parametrize(("p", "text"), [(None, "-"), (0.0009, "< 0.001"), (0.05, "0.050")])
def test_p_text(p, text):
    assert p_text(p) == text


def test_value_text_keeps_types_apart():
    assert value_text({"tied": False, "eps": 1e-6, "dim": 1024, "exits": [1, 3]}) == (
        "tied false, eps 1e-06, dim 1,024, exits 1, 3"
    )


def printed(tables, width):
    console = Console(width=width, record=True, force_terminal=False, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_terminal_tables_fit_and_read_no_markup(results, width):
    results["corpora"]["pangram"]["findings"][0]["claim"] = "[b]k[/b]"
    text = printed(rich_tables(results, width), width)
    assert "[b]k[/b]" in text
    assert "27.00 ± 2.00" in text
    assert "undecided" in text
    assert "…" not in text  # nothing is cut off
    assert max(map(len, text.splitlines())) <= width


def test_columns_are_dropped_in_their_order_only_where_there_is_no_room():
    header = (
        Column(title="Name", short="Name"),
        Column(title="A", short="first out", kind="number", dropped=1),
        Column(title="B", short="last out", kind="number", dropped=2),
        Column(title="C", short="kept", kind="number"),
    )
    table = Table(title="t", header=header, rows=(("some words", "1.0", "2.0", "3.0"),))
    wide, narrow, least = (printed([terminal_table("x", table, n)], n) for n in (40, 24, 12))
    assert "Not shown" not in wide
    assert "1.0" in wide
    assert "lack of width: first out." in " ".join(narrow.split())
    assert "2.0" in narrow
    assert "width: first out, last out." in " ".join(least.split())
    assert "3.0" in least


def test_direction_size_power_and_grid_are_in_the_tables(results):
    corpus = results["corpora"]["pangram"]
    for finding in corpus["findings"]:
        finding |= {"size": "smaller", "ci_pct": [-16.24, -6.1]}
    corpus["findings"][5]["size"] = None
    corpus["power"] = {
        **{"effect_pct": 10.0, "wanted": 0.9, "required_seeds": 51, "seeds": 3, "lowest": 0.1},
        **{"by_finding": {"1": 0.1, "2": 0.25}, "spreads": {"1": 0.166, "2": 0.1}},
        "spreads_from": "40 seeds",
    }
    row = corpus["tables"]["exp5_results"][0]
    corpus["grid"] = [{**row, "effect_pct": row["measured"]["ppl"], "ci_pct": None}]
    text = markdown(results)
    findings = lines_of(text, "| 1 | claim 1") + lines_of(text, "| 6 | claim 6")
    assert "| holds | smaller | -16.2 to -6.1 |" in findings[0]
    assert "| undecided | - | -16.2 to -6.1 |" in findings[2]
    assert "- Size against the published one: 5 smaller." in text
    assert "an effect of 10% is found with a probability of 0.10 to 0.25" in text
    assert "51 seeds give each finding at least 0.9" in text
    assert "| 2 | 0.25 | 0.100 |" in text
    assert "### Chosen alphas and thresholds" in text
    assert len(lines_of(text, "### Chosen")) == 1  # the other corpus has none


def test_results_of_an_earlier_version_are_shown_without_sizes(results):
    text = markdown(results)
    assert "| holds | - | - |" in text
    assert "Size against" not in text
    assert "Power" not in text
