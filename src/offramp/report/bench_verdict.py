"""The sentences under the tables of ``offramp bench``."""

from collections.abc import Mapping, Sequence
from typing import Any

from offramp.report.bench import Row, sections_of

CLEARLY_FASTER = 1.02
"""Times full depth that a method must reach to be called faster."""
PEERS = {
    "hf": "generate of transformers",
    "hf_prompt_lookup": "prompt lookup of transformers",
    "hf_early_exit": "the early-exit assistant of transformers",
}
_LLAMA = "llama_cpp_"


def bench_verdict(content: Mapping[str, Any]) -> str:
    """Which method is fastest, and what confident exit and speculation did beside full depth.

    A sentence for each weight format; llama.cpp with fewer bits is compared with the first one.
    """
    sections = {
        name: rows
        for name, rows in sections_of(content["rows"]).items()
        if any(row["method"] == "full" for row in rows)
    }
    lines = [_of_format(rows) for rows in sections.values()]
    if len(sections) > 1:
        lines = [f"{name}: {line}" for name, line in zip(sections, lines, strict=True)]
    return "\n".join([*lines, *_with_other_bits(content["rows"], sections)])


def _of_format(rows: Sequence[Row]) -> str:
    fastest = max(rows, key=lambda row: row["speedup_vs_full"])
    if fastest["speedup_vs_full"] < CLEARLY_FASTER:
        fastest = next(row for row in rows if row["method"] == "full")
    sentences = [f"{_name(fastest, rows)} is fastest here"]
    if fastest["method"] != "full":
        same = "identical" if fastest["identical_to_greedy"] else "different"
        times = fastest["speedup_vs_full"]
        sentences[0] += f": {_times(times)} full depth, with {same} tokens"
        sentences[0] += _quality(fastest, rows, " and ")
        if fastest["speedup_vs_full_worst"] < 1 < times:
            sentences[0] += ", but slower on at least one prompt"
    for best in _best_of_each_kind(rows):
        if best is not fastest:
            sentences.append(_beside_full(best, rows))
    return " ".join(f"{_capital(sentence)}." for sentence in sentences)


def _capital(sentence: str) -> str:
    return sentence if sentence.startswith("llama.cpp") else sentence[0].upper() + sentence[1:]


def _best_of_each_kind(rows: Sequence[Row]) -> list[Row]:
    """The fastest rows of drafts, of llama.cpp, and of confident exit by each measure."""
    kinds: dict[str, list[Row]] = {"speculative": [], _LLAMA: []}
    for row in rows:
        method = row["method"]
        if method.startswith("exit@"):
            kinds.setdefault(f"exit by {_measure(method)}", []).append(row)
        for kind in ("speculative", _LLAMA):
            if method.startswith(kind):
                kinds[kind].append(row)
    return [max(own, key=lambda row: row["speedup_vs_full"]) for own in kinds.values() if own]


def _beside_full(row: Row, rows: Sequence[Row]) -> str:
    """Sentence on a method that is not the fastest: its speed, and why it is slow if it is."""
    name, times = _name(row, rows), row["speedup_vs_full"]
    if abs(times - 1) < CLEARLY_FASTER - 1:
        return f"{name} is as fast as full depth{_quality(row, rows)}"
    if times > 1:
        return f"{name} is {_times(times)} full depth{_quality(row, rows)}"
    if row["method"].startswith(_LLAMA):
        return f"{name} is slower than full depth ({_times(times)}){_quality(row, rows)}"
    if row["acceptance_rate"] is not None:
        reason = f"{100 * row['acceptance_rate']:.0f}% of the drafted tokens were accepted"
    elif row["method"].startswith("speculative@"):
        reason = "it made no drafts, because they did not pay"
    else:
        reason = "evaluating the exits costs more than the layers it saves"
    return f"{name} is slower than full depth ({_times(times)}): {reason}"


def _with_other_bits(rows: Sequence[Row], sections: Mapping[str, Sequence[Row]]) -> list[str]:
    """A sentence on the fastest row of llama.cpp whose bits no weight format of the run has."""
    timed = {id(row) for own in sections.values() for row in own}
    others = [row for row in rows if id(row) not in timed and row["method"].startswith(_LLAMA)]
    if not others:
        return []
    first = next(iter(sections))
    best = max(others, key=lambda row: row["speedup_vs_full"])
    quality = _quality(best, sections[first])
    return [
        f"{_name(best, rows)} is {_times(best['speedup_vs_full'])} full depth in {first}{quality}."
    ]


def _quality(row: Row, rows: Sequence[Row], before: str = ", with ") -> str:
    """What a method's PPL is if it differs from that of full depth."""
    full = next(each for each in rows if each["method"] == "full")
    own, whole = (f"{each['ppl']:.4g}" if each["ppl"] else "" for each in (row, full))
    return f"{before}PPL {own} instead of {whole}" if own and whole and own != whole else ""


def _measure(method: str) -> str:
    """The confidence measure in the name of a method: exit@X:KV is by max_prob."""
    _, *measure, _ = method.split(":")
    return measure[0] if measure else "max_prob"


def _name(row: Row, rows: Sequence[Row]) -> str:
    kind, _, options = row["method"].partition("@")
    if kind == "exit":
        full = next(each for each in rows if each["method"] == "full")
        share = 100 * row["mean_layers"] / full["mean_layers"]
        measure = _measure(row["method"])
        by = "" if measure == "max_prob" else f"{measure}, "
        return f"confident exit at {share:.0f}% of the layers ({by}{options.rpartition(':')[2]})"
    if kind == "speculative":
        return "speculative decoding"
    if kind.startswith(_LLAMA):
        return f"llama.cpp with {kind.removeprefix(_LLAMA)} weights"
    return PEERS.get(kind, "full depth" if kind == "full" else row["method"])


def _times(times: float) -> str:
    return f"{times:.3g} times" if times < 10 else f"{times:.0f} times"
