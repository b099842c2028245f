"""The chart of ``offramp evaluate``: a metric of each task against the cost of its tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from offramp.report.drawing import data_chart, layer
from offramp.report.look import Look
from offramp.report.series import Plane, Record, domain_of, label_layers, label_records

SIZE = (480, 240)
COSTS = {"flops_pct": "FLOPs% (of scored or generated tokens)", "mean_layers": "mean layers"}
KINDS = ("full depth", "exits", "static model")


def evaluation_chart(content: Mapping[str, Any], look: Look) -> Any:
    """One panel for each task, with its first metric and the harness's standard error."""
    rows = content["evaluations"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    panels = [_panel(task, [row for row in rows if row["task"] == task], look) for task in tasks]
    return alt.vconcat(*(panel for panel in panels if panel is not None))


def _panel(task: str, rows: Sequence[Mapping[str, Any]], look: Look) -> Any:
    """Return the panel of a task; None for one without a metric."""
    metric = next(iter(rows[0]["metrics"]), None)
    if metric is None:
        return None
    by = "mean_layers" if any(row["flops_pct"] is None for row in rows) else "flops_pct"
    points = [_point(row, metric, by) for row in rows if row["metrics"].get(metric) is not None]
    size = look.size(*SIZE)
    across = domain_of([point["cost"] for point in points], room=0.1)
    up = domain_of([value for point in points for value in (point["low"], point["high"])])
    x = alt.X("cost:Q", title=COSTS[by]).scale(domain=across, nice=False, zero=False)
    y = alt.Y("value:Q", title=metric).scale(domain=up, nice=False, zero=False)
    wanted = [({"text": point["text"]}, [point]) for point in points]
    bars = [[{**point, "value": point[end]} for end in ("low", "high")] for point in points]
    plane = Plane(("cost", across), ("value", up), size)
    labels = [record for record in label_records(wanted, bars, plane, look.font_size) if record]
    colour = look.palette[0]
    spread = data_chart(points).mark_rule(color=colour, strokeWidth=look.line)
    low = alt.Y("low:Q", title=metric).scale(domain=up, nice=False, zero=False)
    dots = data_chart(points).mark_point(filled=True, color=colour, size=look.point, opacity=1)
    tooltip = [alt.Tooltip("text:N", title="method"), "value:Q", "cost:Q"]
    shape = alt.Shape("kind:N", title=None, sort=KINDS)
    return layer(
        spread.encode(x=x, y=low, y2="high:Q"),
        dots.encode(x=x, y=y, shape=shape, tooltip=tooltip),
        *label_layers(labels, x, y, look, alt.value(colour)),
    ).properties(
        width=size[0],
        height=size[1],
        title=look.title(task, "± the harness's standard error", width=size[0]),
    )


def _point(row: Mapping[str, Any], metric: str, by: str) -> Record:
    value, error = float(row["metrics"][metric]), float(row["stderr"].get(metric) or 0)
    kind = KINDS[2] if row["method"].startswith("static") else KINDS[row["method"] != "full"]
    return {
        "text": row["method"],
        "kind": kind,
        "cost": float(row[by] or 0),
        "value": value,
        "low": value - error,
        "high": value + error,
    }
