"""The tables and the plot of ``offramp confidence``, ``calibrate`` and its check."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import altair as alt
from rich.table import Table

from offramp.report.command_charts import COMPUTE, FLOPS
from offramp.report.drawing import data_chart, layer, save_png
from offramp.report.fit import fit_table, literal_table
from offramp.report.look import SCREEN, Look
from offramp.report.series import curves
from offramp.report.text import missing_kv_text, ppl_text, threshold_text

Content = Mapping[str, Any]
Record = dict[str, Any]
PANEL = 340
RELIABILITY = "Reliability"


def confidence_table(content: Content, *, width: int = 120) -> Table:
    """One row for each measure and exit."""
    ppl = "  ".join(
        f"{layer}: {ppl_text(value, 3)}" for layer, value in content["exit_ppl"].items()
    )
    table = Table(
        title=f"{content['n_tokens']:,} tokens of {content['corpus']['name']}",
        caption=(
            "agreement: share of tokens where exit and last layer predict the same; AURC, AUROC "
            "and ECE say how well the score predicts this, ECE (target) how well it predicts the "
            "text"
            f"\nPPL by exit layer  {ppl}  ({missing_kv_text(content)})"
        ),
    )
    for column in ("confidence", "exit", "agreement", "AURC", "AUROC", "ECE", "ECE (target)"):
        table.add_column(column, justify="left" if column == "confidence" else "right")
    for measure in content["measures"]:
        for part in measure["exits"]:
            table.add_row(
                measure["confidence"],
                str(part["exit_layer"]),
                f"{100 * part['agreement']:.1f}%",
                f"{part['aurc']:.4f}",
                _or_dash(part["auroc"], ".3f"),
                _or_dash(part["ece"], ".3f"),
                _or_dash(part["ece_target"], ".3f"),
            )
    return fit_table(table, width, least_important=("ECE (target)", "ECE", "AUROC"))


def frontier_table(content: Content, *, width: int = 120) -> Table:
    """PPL of each measure at the costs of its frontier, interpolated at round FLOPs%."""
    measures = content["measures"]
    by = _cost_key(content)
    table = Table(title=f"PPL at {'FLOPs%' if by == 'flops_pct' else 'Compute%'}")
    table.add_column("", justify="right")
    for measure in measures:
        table.add_column(measure["confidence"], justify="right")
    for share in range(95, 0, -5):
        cells = [_or_dash(ppl_at(measure["frontier"], share, by), ".3f") for measure in measures]
        if set(cells) != {"-"}:
            table.add_row(str(share), *cells)
    dropped = ("saturation", "margin", "patience", "entropy", "gate")
    return fit_table(table, width, least_important=dropped)


def confidence_verdict(content: Content) -> str:
    """Which measure has the lowest PPL on average over the costs that all measures reach."""
    names = [measure["confidence"] for measure in content["measures"]]
    by = _cost_key(content)
    shares = list(range(95, 0, -5))
    found = {
        measure["confidence"]: [ppl_at(measure["frontier"], share, by) for share in shares]
        for measure in content["measures"]
    }
    common = [i for i in range(len(shares)) if all(found[name][i] is not None for name in names)]
    if not common:
        return "The measures reach no cost in common, so they cannot be compared."
    mean = {name: sum(found[name][i] or 0.0 for i in common) / len(common) for name in names}
    best = min(mean, key=lambda name: mean[name])
    cost = "FLOPs%" if by == "flops_pct" else "Compute%"
    beside_max_prob = best != "max_prob" and "max_prob" in mean
    return (
        f"{best} has the lowest PPL on average over {len(common)} costs from "
        f"{shares[common[-1]]} to {shares[common[0]]} {cost}: {mean[best]:.3f}"
        + (f" (max_prob: {mean['max_prob']:.3f})." if beside_max_prob else ".")
    )


def _cost_key(content: Content) -> str:
    first = content["measures"][0]["frontier"][0]
    return "compute_pct" if first["flops_pct"] is None else "flops_pct"


def ppl_at(frontier: list[Record], share: float, by: str) -> float | None:
    """The least PPL of a frontier at this cost, between neighbours; None beyond its ends."""
    found = []
    for before, after in pairwise(frontier):
        low, high = sorted((before, after), key=lambda row: float(row[by]))
        if low[by] <= share <= high[by]:
            weight = (share - low[by]) / (high[by] - low[by]) if high[by] > low[by] else 0.0
            found.append(low["ppl"] + weight * (high["ppl"] - low["ppl"]))
    return min(found, default=None)


def save_confidence_png(content: Content, path: Path) -> None:
    """Write ``confidence_plot`` as a picture."""
    save_png(confidence_plot(content), path)


def confidence_plot(content: Content, look: Look = SCREEN) -> alt.ConcatChart:
    """PPL against both costs; risk and coverage, and reliability, of the first exit."""
    names = list(dict.fromkeys(measure["confidence"] for measure in content["measures"]))
    points = list(_frontier_points(content))
    costs = {"compute_pct": COMPUTE}
    if any(point["flops_pct"] is not None for point in points):
        costs["flops_pct"] = FLOPS
    size = look.size(PANEL, (0.8 if look.columns > 1 else 0.5) * PANEL)

    def panel(records: list[Record], x: alt.X, y: alt.Y, order: str, title: str) -> alt.LayerChart:
        drawn = curves(records, names, by="confidence", x=x, y=y, look=look, order=order)
        behind = [_ideal(x, y, look)] if title == RELIABILITY else []
        return layer(*behind, *drawn).properties(
            width=size[0], height=size[1], title=look.title(title, width=size[0])
        )

    y = alt.Y("ppl:Q", title="PPL (per token)").scale(zero=False)
    panels = [
        panel(points, alt.X(f"{by}:Q", title=title).scale(zero=False), y, "order", "PPL and cost")
        for by, title in costs.items()
    ]
    exit_layer = content["measures"][0]["exits"][0]["exit_layer"]
    parts = [(measure["confidence"], measure["exits"][0]) for measure in content["measures"]]
    x = alt.X("coverage:Q", title="coverage (share of the tokens that leave)")
    y = alt.Y("risk:Q", title="risk (share of those that disagree)")
    panels.append(panel(_risk_coverage(parts), x, y, "coverage", "Risk and coverage"))
    x = alt.X("said:Q", title="score (probability)").scale(domain=[0, 1])
    y = alt.Y("true:Q", title="agreement (share of the tokens)").scale(domain=[0, 1])
    panels.append(panel(_reliability(parts), x, y, "said", RELIABILITY))
    return alt.concat(*panels, columns=look.columns).properties(
        title=look.title(
            f"Confidence on {content['n_tokens']:,} tokens of {content['corpus']['name']}",
            f"risk and reliability: exit layer {exit_layer} against the last layer; "
            f"{missing_kv_text(content)}",
            width=look.columns * size[0],
        )
    )


def _frontier_points(content: Content) -> Iterator[Record]:
    for measure in content["measures"]:
        for order, row in enumerate(measure["frontier"]):
            costs = {name: row[name] for name in ("ppl", "compute_pct", "flops_pct")}
            yield {"confidence": measure["confidence"], "order": order, **costs}


def _risk_coverage(parts: list[tuple[str, Record]]) -> list[Record]:
    return [
        {"confidence": name, "coverage": coverage, "risk": risk}
        for name, part in parts
        for coverage, risk in zip(*part["risk_coverage"].values(), strict=True)
    ]


def _reliability(parts: list[tuple[str, Record]]) -> list[Record]:
    return [
        {"confidence": name, "said": said, "true": true}
        for name, part in parts
        if part["reliability"]
        for said, true in zip(
            part["reliability"]["confidence"], part["reliability"]["accuracy"], strict=True
        )
        if said is not None
    ]


def _ideal(x: alt.X, y: alt.Y, look: Look) -> alt.Chart:
    """The line on which a score is the share that agrees."""
    ends = data_chart([{"said": 0, "true": 0}, {"said": 1, "true": 1}])
    line: alt.Chart = ends.mark_line(strokeDash=[4, 4], color=look.grey, strokeWidth=look.line)
    return line.encode(x=x, y=y)


def certificate_table(certificate: Content) -> Table:
    """What a certificate promises, from its JSON."""
    table = Table(title="Certificate", show_header=False, caption=f"sha256 {certificate['sha256']}")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    about = certificate["assumptions"]
    unit = about.get("unit", "sequence")
    flops = certificate["expected_flops_pct"]
    rows = {
        "promise": about["promise"],
        "text": about["text"],
        "not covered": about["not_covered"],
        f"{unit}s": f"{certificate['n']:,} of {about['sequence_tokens']} tokens",
        "test": _test_text(certificate),
        "confidence": certificate["confidence"],
        "thresholds": ", ".join(map(threshold_text, certificate["thresholds"])),
        "cost": f"Compute% {certificate['expected_compute_pct']:.1f}"
        + ("" if flops is None else f", FLOPs% {flops:.1f}"),
        "missing_kv": certificate["missing_kv"],
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return literal_table(table)


def _test_text(certificate: Content) -> str:
    """The method, and the test of its p-values; older certificates name none."""
    method = certificate.get("method", "ltt")
    if method != "ltt":
        return str(method)
    return f"ltt, {certificate['assumptions'].get('test', 'hoeffding-bentkus')}"


def certificate_verdict(certificate: Content) -> str:
    """What the certificate allows, in one sentence."""
    if all(str(threshold) == "inf" for threshold in certificate["thresholds"]):
        return "No token may exit early under this promise: the certificate is for the full model."
    flops = certificate["expected_flops_pct"]
    cost = certificate["expected_compute_pct"] if flops is None else flops
    thresholds = ", ".join(map(threshold_text, certificate["thresholds"]))
    return (
        f"Certified: with thresholds {thresholds} on {certificate['confidence']}, a token costs "
        f"{cost:.1f}% of the full model's "
        f"{'layers' if flops is None else 'FLOPs (heads and gates counted)'}."
    )


def drift_sentence(check: Content) -> str:
    """The verdict of ``calibrate --check``, in two sentences."""
    units = "prompts" if check.get("on") == "generation" else "sequences"
    measured = (
        f"risk {check['risk']:.4f} on {check['n']:,} new {units} ({check['risk_low']:.4f} to "
        f"{check['risk_high']:.4f}), promised at most {check['epsilon']:g}"
    )
    level = f"{check['level']:g}"
    if check["verdict"] == "undecided":
        return (
            f"Not decided: {measured}; neither that it is broken (p = {check['p_broken']:.2g}) nor "
            f"that it holds (p = {check['p_holds']:.2g}) is sure at level {level}. To decide it, "
            f"add {units} at the end and check again: looking again costs nothing."
        )
    sure = (
        f"This was sure after {check['decided_after']:,} {units} at level {level}, which covers "
        f"all looks while {units} are added at the end: looking again or stopping early costs "
        "nothing."
    )
    if check["verdict"] == "broken":
        return f"The promise is broken: {measured} (p = {check['p_broken']:.2g} if it held). {sure}"
    return f"The promise holds: {measured} (p = {check['p_holds']:.2g} if it were broken). {sure}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
