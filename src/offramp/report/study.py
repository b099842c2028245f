"""A study's table and plot, from the content of its study.json."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import altair as alt

from offramp.models.checkpoint import replacing
from offramp.report.plots import PALETTE, WIDTH, data_chart, layer, save_png

Content = Mapping[str, Any]
ROUTED_AT = "80"
KINDS = ("exit", f"routed, {ROUTED_AT}% of compute", "last layer")


def write(content: Content, out: Path) -> None:
    """``table.md`` and ``figure.png``, each whole or not at all."""
    with replacing(out / "table.md") as aside:
        aside.write_text(markdown(content), encoding="utf-8")
    with replacing(out / "figure.png") as aside:
        save_png(figure(content), aside)


def markdown(content: Content) -> str:
    """What was asked, how, and a row for each recipe and static model."""
    rows = [
        "| recipe | exit PPL | last layer's PPL | PPL at 65% | PPL at 80% | "
        "ratio to static at 80% | p (Holm) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in by_final(content):
        exits = " / ".join(_spread(stat) for _, stat in early_exits(row))
        p_value = "" if row["p_value"] is None else f"{row['p_value']:.3f}"
        rows.append(
            f"| {row['label']} | {exits} | {_spread(row['final_ppl'])} | "
            f"{_spread(row['ppl_at']['65'])} | {_spread(row['ppl_at']['80'])} | "
            f"{_spread(row['ratio_to_static_at']['80'], digits=3)} | {p_value} |"
        )
    for layers, ppls in static_ppls(content).items():
        mean = sum(ppls) / len(ppls)
        compute = next(
            entry["compute_pct"] for entry in content["static"] if entry["layers"] == layers
        )
        rows.append(
            f"| static, {layers} layers ({compute:.0f}% of compute) | | {mean:.2f} | | | | |"
        )
    return "\n".join(
        [
            f"# Study: {content['study']}",
            "",
            content["question"],
            "",
            f"Text: {content['text']['corpus']}; {content['text']['split']}. "
            f"{content['train_tokens']:,} training tokens a run, {len(content['seeds'])} seeds; "
            "mean ± sample standard deviation. Compute is layers run / layers in the model, "
            f'missing_kv = "{content["missing_kv"]}". Thresholds are quantiles on the held-out '
            "text; PPL between them is interpolated. Static: a shallower model trained on the "
            "same tokens, interpolated between its depths.",
            "",
            *rows,
            "",
        ]
    )


def figure(content: Content) -> alt.LayerChart:
    """Exit, routed and last PPL of each recipe, and the static models as lines."""
    records = list(_records(content))
    order = [row["label"] for row in by_final(content)]
    y = alt.Y("recipe:N", sort=order, title=None).axis(labelLimit=0)
    x = alt.X("ppl:Q", title="PPL (logarithmic axis)").scale(type="log", nice=False, padding=12)
    colour = alt.Color("kind:N", title=None).scale(domain=list(KINDS), range=list(PALETTE[:3]))
    base = data_chart(records)
    marks = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=x, y=y, color=colour.legend(alt.Legend(orient="top", labelLimit=0))
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q", y=y, color=colour)
    bars = bars.encode(x=alt.X("low:Q", title="PPL (logarithmic axis)").scale(type="log"))
    static = [
        {"ppl": sum(ppls) / len(ppls), "text": f"static {layers}"}
        for layers, ppls in static_ppls(content).items()
    ]
    lines = data_chart(static)
    rules = lines.mark_rule(strokeDash=[4, 4], color="#808080").encode(x="ppl:Q")
    words = lines.mark_text(align="left", dx=3, dy=-6, color="#808080").encode(
        x="ppl:Q", y=alt.value(0), text="text:N"
    )
    return layer(rules, words, bars, marks).properties(
        width=WIDTH, height=24 * len(order), title=content["question"]
    )


def by_final(content: Content) -> list[Mapping[str, Any]]:
    """The summary's rows, the best last layer first."""
    return sorted(content["summary"], key=lambda row: row["final_ppl"]["mean"])


def early_exits(row: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """(layer, PPL) of the exits below the last layer."""
    exits = sorted((int(layer), stat) for layer, stat in row["exit_ppl"].items())
    return exits[:-1]


def static_ppls(content: Content) -> dict[int, list[float]]:
    """{layers: a PPL for each seed}, deepest first."""
    found: dict[int, list[float]] = {}
    for entry in sorted(content["static"], key=lambda entry: -entry["layers"]):
        found.setdefault(entry["layers"], []).append(entry["ppl"])
    return found


def _records(content: Content) -> Iterator[dict[str, Any]]:
    for row in content["summary"]:
        shown = [(KINDS[0], stat) for _, stat in early_exits(row)]
        shown += [(KINDS[1], row["ppl_at"][ROUTED_AT]), (KINDS[2], row["final_ppl"])]
        for kind, stat in shown:
            std = stat["std"] or 0.0
            yield {
                "recipe": row["label"],
                "kind": kind,
                "ppl": stat["mean"],
                "low": stat["mean"] - std,
                "high": stat["mean"] + std,
            }


def _spread(stat: Mapping[str, Any], *, digits: int = 2) -> str:
    if stat["std"] is None:
        return f"{stat['mean']:.{digits}f}"
    return f"{stat['mean']:.{digits}f} ± {stat['std']:.{digits}f}"
