"""The table, the plots and decoding.csv of a study's measured time of decoding."""

import csv
import io
import math
from typing import Any

import altair as alt

from offramp.report.decoding_times import DecodedPolicy, DecodingTimes
from offramp.report.look import SCREEN, Look
from offramp.report.study_curves import cost_curves
from offramp.report.study_plots import LARGEST_RATIO
from offramp.report.tables import Column, Table

NOT_TIMED = "Decoding was not timed: the weights of the runs are not there."


def decoding_table(times: DecodingTimes) -> Table:
    """A row for each model and policy, with a pair of columns for each batch."""
    header = [
        Column(title="Model"),
        Column(title="FLOPs%", kind="number"),
        Column(title="PPL", kind="number"),
    ]
    for batch in times.batches:
        header += [
            Column(title=f"tokens/s, batch {batch}", kind="number"),
            Column(title="to standard", kind="number"),
            Column(title=f"first token, ms, batch {batch}", kind="number"),
            Column(title="to standard", kind="number"),
        ]
    rows = []
    for each in times.policies:
        cells = [_name(each), f"{each.flops_pct:.1f}", f"{each.ppl:.3f}"]
        for batch in times.batches:
            cells += [
                f"{each.tokens_per_s[batch]:,.0f}",
                f"{each.to_standard[batch]:.2f}",
                f"{1000 * each.first_token_s[batch]:,.1f}",
                f"{each.first_to_standard[batch]:.2f}",
            ]
        rows.append(tuple(cells))
    return Table(
        title="Measured time of decoding",
        header=tuple(header),
        rows=tuple(rows),
        notes=(how(times),),
    )


def how(times: DecodingTimes) -> str:
    """How decoding was timed, in words."""
    rounds = "1 round" if times.rounds == 1 else f"{times.rounds} rounds"
    about = times.environment
    return (
        f"The models of the first seed decode {times.new_tokens} tokens of the test text after "
        f"prompts of {times.prompt_tokens} tokens, in turns in each of {rounds}; figures are "
        "medians over the rounds, and of ratios in the same round. Tokens/s counts the tokens "
        "after the first of each text, of all texts together. Tokens leave where the policy lets "
        "them leave in windows of the training length; prompts run at full depth. PPL and FLOPs% "
        f"are means over the seeds. All of this took {times.seconds:.0f} s with "
        f"{about.get('threads')} threads on {about.get('cores')} cores ({about.get('platform')}); "
        "other work on the machine adds time."
    )


def decoding_csv(times: DecodingTimes) -> str:
    """The same figures as comma-separated values, a line for each model, policy and batch."""
    out = io.StringIO()
    names = ("label", "confidence", "missing_kv", "threshold", "flops_pct", "ppl")
    measured = ("mean_layers", "tokens_per_s", "to_standard", "first_token_s", "first_to_standard")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*names, "batch_size", *measured))
    for each in times.policies:
        about = [getattr(each, name) for name in names]
        for batch in times.batches:
            writer.writerow((*about, batch, *(getattr(each, name)[batch] for name in measured)))
    return out.getvalue()


def decoding_chart(times: DecodingTimes, batch: int, look: Look = SCREEN) -> alt.LayerChart:
    """PPL against tokens a second: a curve a recipe, and the static models."""
    best = min(each.ppl for each in times.policies)
    shown = [each for each in times.policies if each.ppl < LARGEST_RATIO * best]
    static = [
        {**_record(each, batch), "text": each.label, "kind": _kind(each.label)}
        for each in shown
        if not each.early_exits
    ]
    routed = [
        {**_record(each, batch), "recipe": each.label, "place": each.flops_pct}
        for each in shown
        if each.early_exits
    ]
    tooltip = [alt.Tooltip("recipe:N")]
    tooltip += [
        alt.Tooltip(f"{name}:Q", format=".3f") for name in ("ppl", "tokens_per_s", "flops_pct")
    ]
    axis = alt.X("tokens_per_s:Q", title=f"speed (tokens/s, batch {batch}, measured)")
    chart = cost_curves(routed, static, axis, tooltip, look)
    title = f"PPL against measured tokens/s of decoding, batch {batch}"
    return chart.properties(
        title=look.title(title, width=chart.width),
        description=f"Lower and further right is better. Dashed: static models. {how(times)}",
    )


def _record(each: DecodedPolicy, batch: int) -> dict[str, Any]:
    return {
        "ppl": each.ppl,
        "tokens_per_s": each.tokens_per_s[batch],
        "flops_pct": each.flops_pct,
    }


def _kind(label: str) -> str:
    """The kind of a static model: whether its blocks share keys and values, and from where."""
    return label.partition(", source ")[2] or "plain"


def _name(each: DecodedPolicy) -> str:
    if not each.early_exits:
        return each.label
    if each.confidence is None:
        return f"{each.label}, full depth"
    where = "" if math.isinf(each.threshold) else f" {each.threshold:.3g}"
    return f"{each.label}, {each.confidence}{where} ({each.missing_kv})"
