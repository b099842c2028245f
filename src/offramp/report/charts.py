"""A chart of any result file: what ``offramp plot`` and a result's ``.plot()`` draw."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from offramp.errors import ConfigError
from offramp.files import replacing
from offramp.reading import read_json
from offramp.report.confidence import confidence_plot
from offramp.report.plots import PALETTE, data_chart, frontier, layer, spec_of, vegalite_version
from offramp.report.study_plots import frontiers
from offramp.report.study_result import StudyResult
from offramp.report.text import missing_kv_text
from offramp.schema import fitting
from offramp.training.metrics_file import read_metrics, read_rows

Content = Mapping[str, Any]
WIDTH, HEIGHT = 480, 320
_DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError)


def read_result(path: Path) -> Content:
    """The content of a result file: JSON, or the ``metrics.csv`` of a training run."""
    if path.suffix.lower() == ".csv":
        return _csv(path)
    content = read_json(path)
    return content if isinstance(content, Mapping) else {}


def _csv(path: Path) -> Content:
    """The metrics.csv of a training run, or the table of a sweep."""
    rows = read_rows(path)
    if not rows:
        raise ConfigError(f"{path}: expected a CSV file with rows, got none")
    if "threshold" not in rows[0]:
        return {"metrics": read_metrics(path)}
    costs = ("ppl", "compute_pct", "flops_pct")
    try:
        numbers = [{key: float(row[key]) for key in costs if row.get(key)} for row in rows]
    except ValueError as error:
        raise ConfigError(f"{path}: expected numbers under {', '.join(costs)}: {error}") from None
    return {"rows": [{**row, **found} for row, found in zip(rows, numbers, strict=True)]}


def chart_of(content: Content) -> Any:
    """The Altair chart of a result file's content; a ConfigError for what is no result."""
    draw = next((draw for key, draw in _KINDS.items() if key in content), None)
    if draw is None:
        raise ConfigError(
            "file: expected a result of offramp sweep, confidence, calibrate, probe, bench, train "
            "(metrics.csv), study, recipe or reproduce, got something else"
        )
    try:
        chart = draw(content)
        chart.to_dict()
    except _DAMAGED as error:
        raise ConfigError(
            f"file: expected a whole result file, got one that cannot be drawn: {error!r}"
        ) from None
    return chart


def save_chart(chart: Any, path: Path) -> None:
    """Write a chart as PNG, SVG or PDF, by the name's ending; whole or not at all."""
    spec, version = spec_of(chart), vegalite_version()
    ending = path.suffix.lower()
    try:
        data = _drawn(spec, version, ending)
    except ValueError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"file: expected a result with something to draw: {reason}") from None
    with replacing(path) as aside:
        aside.write_bytes(data)


def _drawn(spec: dict[str, Any], version: str, ending: str) -> bytes:
    if ending == ".svg":
        return vl_convert.vegalite_to_svg(spec, vl_version=version).encode()
    if ending == ".pdf":
        pdf: bytes = vl_convert.vegalite_to_pdf(spec, vl_version=version)
        return pdf
    png: bytes = vl_convert.vegalite_to_png(spec, vl_version=version, scale=2)
    return png


def _sweep(content: Content) -> Any:
    """PPL against cost, a point for each threshold, and every exit alone."""
    rows = content["rows"]
    by = "flops_pct" if rows[0].get("flops_pct") is not None else "compute_pct"
    points = [
        {"threshold": _threshold(row["threshold"]), "ppl": float(row["ppl"]), "cost": row[by]}
        for row in rows
    ]
    x = alt.X("cost:Q", title="FLOPs%" if by == "flops_pct" else "Compute%").scale(zero=False)
    y = alt.Y("ppl:Q", title="PPL").scale(zero=False)
    base = data_chart(points).encode(x=x, y=y)
    labels = base.mark_text(align="left", dx=7, dy=-5).encode(text="threshold:N")
    line = base.mark_line(point=True, color=PALETTE[0]).encode(order="cost:Q")
    return layer(line, labels).properties(
        width=WIDTH,
        height=HEIGHT,
        title=alt.Title(
            f"Thresholds on {content.get('confidence', 'max_prob')}",
            subtitle=_text_of(content),
        ),
    )


def _text_of(content: Content) -> str:
    """The text and the meaning of a result; a CSV file does not say."""
    if "corpus" not in content:
        return ""
    return (
        f"{content['n_tokens']:,} tokens of {content['corpus']['name']}; {missing_kv_text(content)}"
    )


def _check(content: Content) -> Any:
    """The risk on new text beside what was promised."""
    points = [
        {"of": "measured on new text", "risk": content["risk"]},
        {"of": "promised at most", "risk": content["epsilon"]},
    ]
    chart = data_chart(points).mark_bar(color=PALETTE[0])
    return chart.encode(x=alt.X("risk:Q"), y=alt.Y("of:N", title=None, sort=None)).properties(
        width=WIDTH, title=f"Drift check: {content['verdict']}"
    )


def _bench(content: Content) -> Any:
    """Tokens per second of every method, from the slowest run to the fastest."""
    several = len(content.get("formats", ())) > 1
    points = [
        {
            "method": f"{row['method']} ({row['weights']})" if several else row["method"],
            **row["tokens_per_s"],
        }
        for row in content["rows"]
    ]
    y = alt.Y("method:N", title=None, sort=None)
    x = alt.X("median:Q", title="tokens per second")
    bars = data_chart(points).mark_bar(color=PALETTE[0]).encode(x=x, y=y)
    spread = data_chart(points).mark_rule(strokeWidth=2).encode(x="min:Q", x2="max:Q", y=y)
    return layer(bars, spread).properties(
        width=WIDTH,
        title=alt.Title("Decoding", subtitle="median of the runs; line: slowest to fastest run"),
    )


def _probe(content: Content) -> Any:
    """What each exit knows: agreement with the last layer, and coverage by level."""
    points = [
        {"exit layer": row["exit_layer"], "share": 100 * value, "of": name}
        for row in content["exits"]
        for name, value in (
            ("agrees with the last layer", row["agreement"]),
            *((f"max_prob >= {level}", share) for level, share in row["coverage"].items()),
        )
    ]
    chart = data_chart(points).mark_line(point=True)
    return chart.encode(
        x=alt.X("exit layer:Q").scale(zero=False),
        y=alt.Y("share:Q", title="tokens (%)").scale(domain=[0, 100]),
        color=alt.Color("of:N", title=None, sort=None),
    ).properties(width=WIDTH, height=HEIGHT, title="What each exit knows")


def _certificate(content: Content) -> Any:
    """The p-value of each step of the path, until the first that is above delta."""
    values = content["p_values"] or []
    path = content["assumptions"]["path"]
    points = [
        {"step": step, "p": max(float(p), 1e-12), "threshold": _threshold(path[step])}
        for step, p in enumerate(values)
    ]
    line = data_chart(points).mark_line(point=True, color=PALETTE[0])
    line = line.encode(
        x=alt.X("step:Q", title="step of the path, from careful to bold"),
        y=alt.Y("p:Q", title="p-value").scale(type="log"),
        tooltip=["step:Q", "p:Q", "threshold:N"],
    )
    level = data_chart([{"p": content["delta"] or 1.0}]).mark_rule(strokeDash=[4, 4])
    return layer(line, level.encode(y="p:Q")).properties(
        width=WIDTH,
        height=HEIGHT,
        title=alt.Title(
            f"Certificate: {content['risk']} at most {content['epsilon']:g}",
            subtitle=f"thresholds {_threshold(content['thresholds'])}; dashed: delta",
        ),
    )


def _metrics(content: Content) -> Any:
    """Loss and validation PPL against the step, from metrics.csv."""
    rows: Sequence[Mapping[str, str]] = content["metrics"]
    points = [
        {"step": int(row["step"]), "value": float(value), "of": name}
        for row in rows
        for name, value in row.items()
        if value and (name == "loss" or name.startswith("validation_ppl"))
    ]
    chart = data_chart(points).mark_line(point=len(rows) < 60)
    panels = []
    for title, test in (("loss", "=="), ("validation PPL", "!=")):
        part = chart.transform_filter(f"datum.of {test} 'loss'").encode(
            x=alt.X("step:Q"),
            y=alt.Y("value:Q", title=title).scale(zero=False),
            color=alt.Color("of:N", title=None),
        )
        panels.append(part.properties(width=WIDTH, height=HEIGHT * 0.7))
    return alt.vconcat(*panels)


def _reproduction(content: Content) -> Any:
    return alt.vconcat(*(frontier(corpus) for corpus in content["corpora"].values()))


def _study(content: Content) -> Any:
    """PPL against FLOPs%, by the study's first measure: a curve a recipe, and static models."""
    result = fitting(StudyResult, content)
    return frontiers(result, *result.families[0])


def _threshold(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


_KINDS: dict[str, Callable[[Content], Any]] = {
    "measures": confidence_plot,
    "bandwidth_gb_s": _bench,
    "oracle_layers": _probe,
    "p_values": _certificate,
    "p_broken": _check,
    "metrics": _metrics,
    "study": _study,
    "corpora": _reproduction,
    "rows": _sweep,
}
"""The kinds of content, by a key that only they have; the first that fits."""
