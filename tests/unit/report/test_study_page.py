"""A study's page: it begins with three conclusions and a plot; and its CSV files."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from offramp.report.look import SCREEN
from offramp.report.order import colours_of, values_of
from offramp.report.study import page, write
from offramp.report.study_conclusions import conclusions
from offramp.report.study_json import read_study, read_times
from offramp.report.study_plots import frontiers

STUDIES = Path(__file__).parents[3] / "docs" / "studies"


@pytest.fixture(scope="module")
def alpha():
    return read_study(STUDIES / "alpha" / "study.json")


@pytest.fixture(scope="module")
def times():
    return read_times(STUDIES / "alpha" / "timing.json")


def test_three_conclusions_without_p_values(alpha):
    found = conclusions(alpha)
    assert len(found) == 3
    assert not any("p = " in sentence for sentence in found)
    assert found[0].startswith("At 65% of FLOPs alpha 0.3 has the lowest PPL, 5.166: 0.5% lower")
    assert "(undecided with 3 seeds) and 5.0% higher" in found[0]
    assert found[1] == (
        "Compared with static models of equal cost, all 10 recipes are undecided; compared with "
        "the study's baseline, all 9 recipes are undecided."
    )
    assert found[2] == (
        "The last layer's PPL is 0.8 to 7.7% higher than that of the standard model, which has no "
        "exits; all 10 recipes are undecided."
    )


def test_conclusions_say_what_is_decided(alpha):
    places = {"alpha 0.1": (0.9, 0.01), "alpha 0.2": (1.2, 0.001), "alpha 0.3": (0.8, 0.04)}
    rows = []
    for row in alpha.summary:
        if row.label in places:
            mean, p_value = places[row.label]
            static = replace(row.to_static, mean=mean, p_holm=p_value)
            row = replace(row, to_static=static)
        rows.append(row)
    found = conclusions(replace(alpha, summary=tuple(rows)))
    assert "20.0% lower than that of static models of equal cost (decided)" in found[0]
    assert "of 10 recipes 2 are better, 1 is worse, 7 are undecided;" in found[1]
    one = conclusions(replace(alpha, summary=alpha.summary[4:8]))
    assert len(one) == 2
    assert one[0].startswith("At 65% of FLOPs the PPL is ")


def test_the_page_shows_one_plot_first_and_folds_the_rest(alpha, times):
    html = page(alpha, times)
    body = html[html.index("<main>") :]
    first = body.index("<details>")
    assert body[:first].count("<figure>") == 1
    assert body.count("<figure>") == 7
    assert "p = " not in html[html.index("<header>") : html.index("<main>") + first]
    assert [part.split("<")[0] for part in body.split("<summary>")[1:]] == [
        "All answers, with p-values",
        "More plots (6)",
        "Tables (6)",
        "How the figures were obtained",
    ]


def test_every_figure_is_in_a_csv_file(alpha, times, tmp_path):
    write(alpha, times, tmp_path)
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(row.ppl_at) for row in alpha.rows)
    first = alpha.rows[0]
    assert float(rows[0]["ppl"]) == first.ppl_at[50].mean
    assert float(rows[0]["to_static"]) == first.ratio_to_static_at[50].mean
    with (tmp_path / "frontiers.csv").open() as file:
        points = list(csv.DictReader(file))
    assert {point["recipe"] for point in points} == {
        *(run.label for run in alpha.runs),
        *(f"static {model.layers}" for model in alpha.static),
    }
    run = alpha.runs[0]
    curve = run.frontiers["gain"]["propagate"]
    mine = [
        float(point["ppl"])
        for point in points
        if (point["recipe"], point["seed"]) == (run.label, str(run.seed))
        and (point["confidence"], point["missing_kv"]) == ("gain", "propagate")
    ]
    assert mine == list(curve.ppl)
    assert not (tmp_path / "decoding.csv").exists()


def colour_of(chart):
    """The colours of the recipes' curves."""
    return next(
        part["encoding"]["color"]
        for part in chart["layer"]
        if part["mark"].get("type") == "line" and "color" in part["encoding"]
    )


def texts_of(chart):
    """What the labels of a chart say."""
    parts = [part for part in chart["layer"] if part["mark"].get("type") == "text"]
    return [record["text"] for part in parts for record in chart["datasets"][part["data"]["name"]]]


def test_ordered_recipes_have_sequential_colours_and_labels_instead_of_a_legend(alpha):
    chart = frontiers(alpha, "gain", "recompute").to_dict()
    colour = colour_of(chart)
    assert colour["legend"] is None
    of = dict(zip(colour["scale"]["domain"], colour["scale"]["range"], strict=True))
    assert (of["alpha 0.0"], of["alpha 1.0"]) == (SCREEN.ordered[0], SCREEN.ordered[-1])
    assert of["alpha 0.7, middle 1"] == SCREEN.other
    assert len(set(of.values())) == 12
    static = [f"static {n}" for n in range(2, 7)]
    assert sorted(texts_of(chart)) == sorted(
        [
            "alpha 0.0",
            "alpha 0.7, middle 1",
            *static,
            "static 1",
            *(f"{n / 10:g}" for n in range(1, 11)),
        ]
    )
    heads = read_study(STUDIES / "heads" / "study.json")
    plain = frontiers(heads, "gain", "recompute").to_dict()
    assert colour_of(plain)["legend"]["orient"] == "right"


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (["a 1", "a 2", "a 10"], {"a 1": 1, "a 2": 2, "a 10": 10}),
        (["lr:0.5", "lr:-1", "lr:3", "plain"], {"lr:0.5": 0.5, "lr:-1": -1, "lr:3": 3}),
        (["a 1", "a 2"], None),
        (["a 1", "b 2", "c 3"], None),
        (["one", "two", "three"], None),
        (["a 1", "a 2", "a 3", "x", "y"], None),
    ],
)
def test_what_counts_as_ordered(labels, values):
    assert values_of(labels) == values
    if values:
        assert len(set(colours_of(labels, values, SCREEN))) == len(labels)
