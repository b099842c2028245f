"""Every result file as a chart: both themes, any size, axes with units, series with styles."""

import json
import re
import runpy
from pathlib import Path

import pytest

from offramp.errors import ConfigError
from offramp.report.charts import chart_of
from offramp.report.drawing import picture_size, save_chart, spec_of
from offramp.report.result import ResultTable

HERE = Path(__file__).parent
STUDIES = HERE.parents[2] / "docs" / "studies"


def frontier_of(shift):
    return [
        {"ppl": 5 + shift + n / 10, "compute_pct": 100.0 - 9 * n, "flops_pct": 101.0 - 9 * n}
        for n in range(8)
    ]


def measure(name, shift):
    part = {
        "exit_layer": 2,
        "risk_coverage": {
            "coverage": [n / 50 for n in range(51)],
            "risk": [n / 60 + shift for n in range(51)],
        },
        "reliability": {"confidence": [0.1, None, 0.9], "accuracy": [0.2, 0.5, 0.8]},
    }
    return {"confidence": name, "exits": [part], "frontier": frontier_of(shift)}


TEXT = {"corpus": {"name": "a text"}, "n_tokens": 1000, "missing_kv": "recompute"}
CONTENTS = {
    "sweep": {
        "rows": [
            {"threshold": t, "ppl": 5 + t, "compute_pct": 90 - 30 * t, "flops_pct": 91 - 30 * t}
            for t in (0.1, 0.5, 0.9)
        ],
        **TEXT,
    },
    "probe": {
        "oracle_layers": 3.0,
        "exits": [
            {"exit_layer": n, "agreement": n / 6, "coverage": {"0.5": n / 8, "0.9": n / 12}}
            for n in range(1, 7)
        ],
    },
    "bench": {
        "bandwidth_gb_s": 20.0,
        "rows": [
            {"method": name, "tokens_per_s": {"median": 20, "min": 18, "max": 21}}
            for name in ("full", "exits", "speculative")
        ],
    },
    "certificate": {
        "p_values": [1e-9, 0.001, 0.04, 0.2],
        "assumptions": {"path": [[0.99], [0.9], [0.8], [0.7]]},
        "delta": 0.05,
        "risk": "disagreement",
        "epsilon": 0.02,
        "thresholds": [0.8],
    },
    "check": {"p_broken": 0.5, "risk": 0.01, "epsilon": 0.02, "verdict": "holds"},
    "metrics": {
        "metrics": [
            {"step": str(n), "loss": str(9 - n), "validation_ppl_2": "7", "validation_ppl_6": "5"}
            for n in range(6)
        ]
    },
    "confidence": {
        "measures": [measure(name, n / 20) for n, name in enumerate(("max_prob", "gain", "gate"))],
        **TEXT,
    },
    "scale": json.loads((STUDIES / "scale" / "study.json").read_text()),
    "study": json.loads((STUDIES / "alpha" / "study.json").read_text()),
    "reproduction": runpy.run_path(str(HERE / "conftest.py"))["make_results"](),
}
WITHOUT_UNIT = {"exit layer", "training step", "p-value", None}


def parts(node, key):
    """Every value of a key in a specification."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for name, child in node.items():
            if name != "datasets":
                yield from parts(child, key)
    elif isinstance(node, list):
        for child in node:
            yield from parts(child, key)


@pytest.mark.parametrize("kind", CONTENTS)
def test_axes_have_a_title_with_a_unit(kind):
    spec = spec_of(chart_of(CONTENTS[kind]))
    titles = set()
    for encoding in parts(spec, "encoding"):
        for axis in ("x", "y"):
            if isinstance(encoding.get(axis), dict) and "title" in encoding[axis]:
                titles.add(encoding[axis]["title"])
    assert titles - {None}
    for title in titles - WITHOUT_UNIT:
        assert re.search(r"\(.+\)|from careful to bold", title), title


@pytest.mark.parametrize("kind", ["probe", "metrics", "confidence", "study", "reproduction"])
def test_coloured_lines_have_line_styles_of_their_own(kind):
    def units(node):
        if isinstance(node, dict):
            mark = node.get("mark", {})
            if (mark if isinstance(mark, str) else mark.get("type")) == "line":
                yield node
            for name in ("layer", "concat", "vconcat", "hconcat"):
                for child in node.get(name, ()):
                    yield from units(child)

    lines = [
        unit
        for unit in units(spec_of(chart_of(CONTENTS[kind])))
        if "field" in unit.get("encoding", {}).get("color", {})
    ]
    assert lines
    for unit in lines:
        colour, dash = unit["encoding"]["color"], unit["encoding"]["strokeDash"]
        assert dash["field"] == colour["field"]
        assert dash["scale"]["domain"] == colour["scale"]["domain"]
        first = [str(each) for each in dash["scale"]["range"][:5]]
        assert len(set(first)) == len(first)


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_picture_for_paper_is_as_wide_as_a_column(kind):
    chart = chart_of(CONTENTS[kind], theme="paper")
    width, height = picture_size(chart)
    assert abs(width - 252) <= 1.5
    assert 40 < height < 900
    spec = spec_of(chart)
    assert spec["config"]["background"] == "transparent"
    assert max(size for size in parts(spec, "fontSize")) <= 8


@pytest.mark.parametrize("theme", ["screen", "paper"])
def test_a_picture_has_the_size_that_was_asked_for(theme):
    for kind in ("sweep", "check"):
        chart = chart_of(CONTENTS[kind], theme=theme, width=400, height=260)
        width, height = picture_size(chart)
        assert abs(width - 400) <= 1.5
        assert abs(height - 260) <= 1.5


def test_a_size_without_room_for_the_plot_is_refused():
    table = ResultTable(rows=[], content=CONTENTS["study"])
    with pytest.raises(ConfigError, match="height: expected room for the plot"):
        chart_of(CONTENTS["confidence"], theme="paper", height=150)
    with pytest.raises(ConfigError, match="width: expected a number from 150 to 4000, got 20"):
        table.plot(width=20)
    with pytest.raises(ConfigError, match="theme: expected screen or paper, got 'x'"):
        table.plot(theme="x")


@pytest.mark.parametrize(("ending", "beginning"), [("svg", b"<svg"), ("pdf", b"%PDF")])
def test_a_picture_for_paper_has_no_background(tmp_path, ending, beginning):
    path = tmp_path / f"picture.{ending}"
    save_chart(ResultTable(rows=[], content=CONTENTS["sweep"]).plot(theme="paper"), path)
    assert path.read_bytes().startswith(beginning)
    if ending == "svg":
        assert 'fill="white"' not in path.read_text()


def test_a_sweep_of_many_thresholds_names_those_that_have_room():
    rows = [
        {"threshold": n / 400, "ppl": 5 + (n / 400) ** 3, "compute_pct": 100 - n / 8}
        for n in range(400)
    ]
    spec = spec_of(chart_of({"rows": rows}))
    [words] = [part for part in spec["layer"] if part["mark"].get("type") == "text"]
    texts = words["data"]["values"] if "values" in words["data"] else None
    texts = texts or spec["datasets"][words["data"]["name"]]
    assert 5 < len(texts) < 200
