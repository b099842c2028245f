"""The charts of the commands' results: each a pure function from a content and a look."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from offramp.report.drawing import data_chart, layer
from offramp.report.look import Look
from offramp.report.series import Plane, Record, curves, domain_of, label_layers, label_records
from offramp.report.text import missing_kv_text

Content = Mapping[str, Any]
SIZE = (480, 320)
PPL = "PPL (per token)"
FLOPS = "FLOPs% (of full depth, with heads and gates)"
COMPUTE = "Compute% (of all layers)"
FEW_STEPS = 60


def sweep_chart(content: Content, look: Look) -> Any:
    """PPL against cost, a point for each threshold, which is named where there is room."""
    rows = content["rows"]
    by = "flops_pct" if rows[0].get("flops_pct") is not None else "compute_pct"
    points: list[Record] = [
        {"text": _threshold(row["threshold"]), "ppl": float(row["ppl"]), "cost": float(row[by])}
        for row in rows
    ]
    across = domain_of([point["cost"] for point in points])
    up = domain_of([point["ppl"] for point in points])
    size = look.size(*SIZE)
    x = alt.X("cost:Q", title=FLOPS if by == "flops_pct" else COMPUTE)
    x = x.scale(domain=across, nice=False, zero=False)
    y = alt.Y("ppl:Q", title=PPL).scale(domain=up, nice=False, zero=False)
    path = sorted(points, key=lambda point: point["cost"])
    wanted = [({"text": point["text"]}, [point]) for point in points]
    plane = Plane(("cost", across), ("ppl", up), size)
    labels = [record for record in label_records(wanted, [path], plane, look.font_size) if record]
    colour = look.palette[0]
    tooltip = [alt.Tooltip("text:N", title="threshold"), "ppl:Q", "cost:Q"]
    base = data_chart(path).encode(x=x, y=y)
    line = base.mark_line(color=colour, strokeWidth=look.line).encode(order="cost:Q")
    marks = base.mark_point(filled=True, color=colour, size=look.point, opacity=1)
    words = label_layers(labels, x, y, look, alt.value(colour))
    title = f"Thresholds on {content.get('confidence', 'max_prob')}"
    return layer(line, marks.encode(tooltip=tooltip), *words).properties(
        width=size[0], height=size[1], title=look.title(title, _text_of(content), width=size[0])
    )


def _text_of(content: Content) -> str:
    """The text and the meaning of a result; a CSV file does not say."""
    if "corpus" not in content:
        return ""
    return (
        f"{content['n_tokens']:,} tokens of {content['corpus']['name']}; {missing_kv_text(content)}"
    )


def check_chart(content: Content, look: Look) -> Any:
    """The risk on new text beside what was promised."""
    points = [
        {"of": "measured on new text", "risk": content["risk"]},
        {"of": "promised at most", "risk": content["epsilon"]},
    ]
    width, height = look.size(SIZE[0], 40)
    chart = data_chart(points).mark_bar(color=look.palette[1])
    x = alt.X("risk:Q", title="risk (mean over the sequences, 0 to 1)")
    return chart.encode(x=x, y=alt.Y("of:N", title=None, sort=None)).properties(
        width=width,
        height=height,
        title=look.title(f"Drift check: {content['verdict']}", width=width),
    )


def bench_chart(content: Content, look: Look) -> Any:
    """Tokens per second of every method, from the slowest run to the fastest."""
    several = len(content.get("formats", ())) > 1
    points = [
        {
            "method": f"{row['method']} ({row['weights']})" if several else row["method"],
            **row["tokens_per_s"],
        }
        for row in content["rows"]
    ]
    width, height = look.size(SIZE[0], 20 * max(1, len(points)))
    y = alt.Y("method:N", title=None, sort=None).axis(labelLimit=max(width / 2, 90))
    x = alt.X("median:Q", title="speed (tokens per second)")
    bars = data_chart(points).mark_bar(color=look.palette[1]).encode(x=x, y=y)
    spread = data_chart(points).mark_rule(strokeWidth=look.line)
    spread = spread.encode(x=alt.X("min:Q"), x2="max:Q", y=y)
    subtitle = "median of the runs; line: slowest to fastest run"
    return layer(bars, spread).properties(
        width=width, height=height, title=look.title("Decoding", subtitle, width=width)
    )


def probe_chart(content: Content, look: Look) -> Any:
    """What each exit knows: agreement with the last layer, and coverage by level."""
    points: list[Record] = [
        {"exit layer": row["exit_layer"], "share": 100 * value, "of": name}
        for row in content["exits"]
        for name, value in (
            ("agrees with the last layer", row["agreement"]),
            *((f"max_prob >= {level}", share) for level, share in row["coverage"].items()),
        )
    ]
    width, height = look.size(*SIZE)
    x = alt.X("exit layer:Q", title="exit layer").scale(zero=False).axis(tickMinStep=1)
    y = alt.Y("share:Q", title="share of the tokens (%)").scale(domain=[0, 100])
    names = list(dict.fromkeys(point["of"] for point in points))
    drawn = curves(points, names, by="of", x=x, y=y, look=look, order="exit layer")
    return layer(*drawn).properties(
        width=width, height=height, title=look.title("What each exit knows", width=width)
    )


def certificate_chart(content: Content, look: Look) -> Any:
    """The p-value of each step of the path, until the first that is above delta."""
    values = content["p_values"] or []
    path = content["assumptions"]["path"]
    points = [
        {"step": step, "p": max(float(p), 1e-12), "threshold": _threshold(path[step])}
        for step, p in enumerate(values)
    ]
    width, height = look.size(*SIZE)
    base = data_chart(points).encode(
        x=alt.X("step:Q", title="step of the path, from careful to bold").axis(tickMinStep=1),
        y=alt.Y("p:Q", title="p-value").scale(type="log"),
        tooltip=["step:Q", "p:Q", "threshold:N"],
    )
    colour = look.palette[0]
    line = base.mark_line(color=colour, strokeWidth=look.line)
    marks = base.mark_point(filled=True, color=colour, size=look.point, opacity=1)
    level = data_chart([{"p": content["delta"] or 1.0}])
    level = level.mark_rule(strokeDash=[4, 4], strokeWidth=look.line).encode(y="p:Q")
    title = f"Certificate: {content['risk']} at most {content['epsilon']:g}"
    subtitle = f"thresholds {_threshold(content['thresholds'])}; dashed: delta"
    return layer(line, marks, level).properties(
        width=width, height=height, title=look.title(title, subtitle, width=width)
    )


def metrics_chart(content: Content, look: Look) -> Any:
    """Loss and validation PPL against the step, from metrics.csv."""
    rows: Sequence[Mapping[str, str]] = content["metrics"]
    points: list[Record] = [
        {"step": int(row["step"]), "value": float(value), "of": name}
        for row in rows
        for name, value in row.items()
        if value and (name == "loss" or name.startswith("validation_ppl"))
    ]
    width, height = look.size(SIZE[0], 0.7 * SIZE[1])
    panels = []
    for title, is_loss in (("loss (nats per token)", True), ("validation PPL (per token)", False)):
        part = [point for point in points if (point["of"] == "loss") is is_loss]
        if not part:
            continue
        names = list(dict.fromkeys(point["of"] for point in part))
        x = alt.X("step:Q", title="training step").axis(tickMinStep=1)
        y = alt.Y("value:Q", title=title).scale(zero=False)
        drawn = curves(part, names, by="of", x=x, y=y, look=look, order="step")
        panels.append(layer(*drawn).properties(width=width, height=height))
    if not panels:
        raise ValueError("expected a loss or a validation PPL, found none")
    return alt.vconcat(*panels).resolve_scale(color="independent", shape="independent")


def _threshold(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
