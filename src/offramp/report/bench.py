"""The terminal table of ``offramp bench``, and the verdict under it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.table import Table

from offramp.report.fit import fit_table

LEAST_IMPORTANT = ("range", "predicted", "worst prompt", "acceptance", "vs hf", "mean layers")
"""Columns that are dropped where the terminal is too narrow, the first one first."""
CLEARLY_FASTER = 1.02
"""Times full depth that a method must reach to be called faster."""
PEERS = {
    "hf": "generate of transformers",
    "hf_prompt_lookup": "prompt lookup of transformers",
    "hf_early_exit": "the early-exit assistant of transformers",
}


def bench_table(content: Mapping[str, Any], *, width: int) -> Table:
    """A row for each method, in a table of at most ``width`` characters."""
    config, block = content["config"], content["parts"]["block"]
    table = Table(
        title=(
            f"prompts: {config['prompts']} of {config['prompt_tokens']} tokens, "
            f"{config['max_new_tokens']} new tokens each; batch size {config['batch_size']}; "
            f"{content['dtype']}; repeats: {config['repeats']}, interleaved"
        ),
        caption=(
            f"median tokens/s after the first token; memory bandwidth is "
            f"{content['bandwidth_gb_s']:.0f} GB/s, so at most "
            f"{content['limit_tokens_per_s']:.1f} tokens/s for one prompt at full depth; a block "
            f"reads its weights at {100 * block['share_of_bandwidth']:.0f}% of the bandwidth"
        ),
    )
    columns = ("method", "tokens/s", "range", "predicted", "vs hf", "vs full", "worst prompt")
    for column in (*columns, "mean layers", "acceptance", "same tokens"):
        side: Literal["left", "right"] = "left" if column == "method" else "right"
        table.add_column(column, justify=side)
    for row in content["rows"]:
        rate = row["tokens_per_s"]
        table.add_row(
            row["method"],
            f"{rate['median']:.1f}",
            f"{rate['min']:.1f} to {rate['max']:.1f}",
            _number(row["predicted_tokens_per_s"], ".1f"),
            _number(row["speedup_vs_hf"], ".2f"),
            _number(row["speedup_vs_full"], ".2f"),
            _number(row["speedup_vs_full_worst"], ".2f"),
            _number(row["mean_layers"], ".1f"),
            "-" if row["acceptance_rate"] is None else f"{100 * row['acceptance_rate']:.0f}%",
            "yes" if row["identical_to_greedy"] else "no",
        )
    return fit_table(table, width, least_important=LEAST_IMPORTANT)


def bench_verdict(content: Mapping[str, Any]) -> str:
    """Which method is fastest, and what confident exit and speculation did beside full depth."""
    rows = content["rows"]
    fastest = max(rows, key=lambda row: row["speedup_vs_full"])
    if fastest["speedup_vs_full"] < CLEARLY_FASTER:
        fastest = next(row for row in rows if row["method"] == "full")
    name = _name(fastest, rows)
    sentences = [f"{name[0].upper()}{name[1:]} is fastest here"]
    if fastest["method"] != "full":
        same = "identical" if fastest["identical_to_greedy"] else "different"
        times = fastest["speedup_vs_full"]
        sentences[0] += f": {_times(times)} full depth, with {same} tokens"
        if fastest["speedup_vs_full_worst"] < 1 < times:
            sentences[0] += ", but slower on at least one prompt"
    for kind in ("speculative@", "exit@"):
        own = [row for row in rows if row["method"].startswith(kind)]
        if own and fastest not in own:
            best = max(own, key=lambda row: row["speedup_vs_full"])
            sentences.append(_beside_full(best, rows))
    return " ".join(f"{sentence}." for sentence in sentences)


def _beside_full(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Sentence on a method that is not the fastest: its speed, and why it is slow if it is."""
    name, times = _name(row, rows), row["speedup_vs_full"]
    name = f"{name[0].upper()}{name[1:]}"
    if f"{times:.2g}" == "1":
        return f"{name} is as fast as full depth"
    if times > 1:
        return f"{name} is {_times(times)} full depth"
    if row["acceptance_rate"] is not None:
        reason = f"{100 * row['acceptance_rate']:.0f}% of the drafted tokens were accepted"
    elif row["method"].startswith("speculative@"):
        reason = "it made no drafts, because they did not pay"
    else:
        reason = "evaluating the exits costs more than the layers it saves"
    return f"{name} is slower than full depth ({_times(times)}): {reason}"


def _name(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    kind, _, options = row["method"].partition("@")
    if kind == "exit":
        full = next(each for each in rows if each["method"] == "full")
        share = 100 * row["mean_layers"] / full["mean_layers"]
        return f"confident exit at {share:.0f}% of the layers ({options.rpartition(':')[2]})"
    if kind == "speculative":
        return "speculative decoding"
    return PEERS.get(kind, "full depth" if kind == "full" else row["method"])


def _times(times: float) -> str:
    return f"{times:.2g} times" if times < 10 else f"{times:.0f} times"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
