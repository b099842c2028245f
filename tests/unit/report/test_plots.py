import json
import warnings

import pytest

from offramp.report import exit_ppl, frontier, save_png, seed_spread, threshold_curves
from offramp.report.points import MEASURED, PUBLISHED

ALPHA_07, ALL_LAYERS = "Asymmetric | α=0.7 <b>", "All layers, α=0.7"
CHARTS = (frontier, threshold_curves, seed_spread, exit_ppl)


def records(chart):
    """Every record that a chart draws."""

    def walk(node):
        if isinstance(node, dict):
            yield from node.get("values", []) if "values" in node else ()
            for child in node.values():
                yield from walk(child)
        elif isinstance(node, list):
            for child in node:
                yield from walk(child)

    spec = chart.to_dict()
    everything = list(walk(spec)) + [
        row for rows in spec.get("datasets", {}).values() for row in rows
    ]
    return [record for record in everything if isinstance(record, dict)]


def drawn(chart, kind):
    found = [record for record in records(chart) if record.get("kind") == kind]
    return {(r["method"], r["threshold"], r["ppl"], r["compute"]) for r in found}


def test_frontier_draws_published_points_of_its_epoch(corpus):
    assert drawn(frontier(corpus), PUBLISHED) == {
        (ALPHA_07, 0.95, 22.95, 65.0),
        ("Standard", None, 34.86, 100.0),
    }
    assert drawn(frontier(corpus, epoch="last"), PUBLISHED) == {
        (ALPHA_07, 0.95, 31.46, 60.2),
        (ALL_LAYERS, 0.95, 54.9, 54.0),
    }


def test_frontier_draws_measured_operating_points(corpus):
    points = drawn(frontier(corpus), MEASURED)
    assert points == {
        (ALPHA_07, 0.95, 27.0, 60.0),
        (ALL_LAYERS, 0.95, 29.0, 60.0),
        ("Standard", None, 35.0, 100.0),
    }


def test_frontier_band_is_one_deviation(corpus):
    start = next(
        r
        for r in records(frontier(corpus))
        if "kind" not in r and r["method"] == ALPHA_07 and r["threshold"] == 0.0
    )
    assert (start["ppl"], start["low"], start["high"]) == (32.0, 30.0, 34.0)


def test_rows_by_another_name_share_the_curve(corpus):
    for chart in CHARTS:
        assert "The same by another name" not in json.dumps(chart(corpus).to_dict())


def test_seed_spread_draws_every_seed(corpus):
    dots = [r for r in records(seed_spread(corpus)) if "seed" in r and r["method"] == ALPHA_07]
    assert [(dot["seed"], dot["ppl"]) for dot in dots] == [(0, 25.0), (1, 27.0), (2, 29.0)]


def test_published_point_without_compute_is_kept_out_of_the_frontier_only(corpus):
    corpus["tables"]["baselines"][0]["published"]["compute_pct"] = None
    assert "Standard" not in {method for method, *_ in drawn(frontier(corpus), PUBLISHED)}
    assert ("Standard", None, 34.86, None) in drawn(seed_spread(corpus), PUBLISHED)


def test_ppl_axis_turns_logarithmic_only_for_wide_ranges(corpus):
    assert "logarithmic" in json.dumps(exit_ppl(corpus).to_dict())  # exit 2 is at 400
    assert "logarithmic" not in json.dumps(frontier(corpus).to_dict())


def test_method_keeps_its_colour(corpus):
    def colours(chart):
        layer = chart.to_dict()["layer"][0]
        scale = layer["encoding"]["color"]["scale"]
        return dict(zip(scale["domain"], scale["range"], strict=True))

    first, second = colours(frontier(corpus)), colours(exit_ppl(corpus))
    assert len(set(first.values())) == len(first) == 3
    assert second[ALPHA_07] == first[ALPHA_07]


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("seeds", ["results", "one_seed"])
def test_charts_become_images(chart, seeds, request, tmp_path):
    corpus = request.getfixturevalue(seeds)["corpora"]["pangram"]
    path = tmp_path / "chart.png"
    save_png(chart(corpus), path, scale=1)
    image = path.read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(image[at : at + 4]) for at in (16, 20))
    assert 700 < width < 1300
    assert 200 < height < 900


def test_one_seed_draws_no_band(one_seed):
    corpus = one_seed["corpora"]["pangram"]
    for chart in CHARTS:
        assert not [record for record in records(chart(corpus)) if "low" in record]


def test_charts_without_published_figures_promise_none(corpus):
    for row in (row for rows in corpus["tables"].values() for row in rows):
        row["published"] = row["distance_in_std"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chart in (frontier, threshold_curves, seed_spread):
            spec = json.dumps(chart(corpus).to_dict())
            assert PUBLISHED not in spec
            assert "Diamonds" not in spec
