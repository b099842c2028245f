"""Figures and sentences as text, so that they look the same in every table and on every page."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
Corpus = Mapping[str, Any]
Number = float | int  # JSON may hold 1 for 1.0

NONE = "-"
OUTSIDE = 2.0  # published figures further than this many standard deviations are named
VERDICTS = ("holds", "does not hold", "undecided")
SIZES = ("as published", "smaller", "larger", "opposite", "undecided")
SIZE_MEANING = (
    "Direction: is the effect there, by a test. Size: the published effect against the 95% "
    "interval of the measured one. It is undecided if the interval contains both zero and the "
    "published effect; a finding without a published figure has none."
)
SEED_TITLE = '"Experiment 5 & 6: Asymmetric Auxiliary Loss Training", in Japanese'
SEED_CITATION = (
    f"The seed document is {SEED_TITLE}; it builds on Elbayad et al. (2020), "
    '"Depth-Adaptive Transformer".'
)


def stat_text(stat: Mapping[str, Any] | None, digits: int) -> str:
    """`mean ± std`, or the mean alone where one seed leaves no standard deviation."""
    if stat is None:
        return NONE
    mean = f"{stat['mean']:.{digits}f}"
    return mean if stat["std"] is None else f"{mean} ± {stat['std']:.{digits}f}"


def number_text(value: Number | None, digits: int, sign: bool = False) -> str:
    """A figure with that number of digits; a dash where there is none."""
    return NONE if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def ppl_text(ppl: Number, digits: int = 2) -> str:
    """A PPL; a huge one, as of an untrained exit, in powers of ten."""
    return f"{ppl:.{digits}f}" if ppl < 1e6 else f"{ppl:.1e}"


def threshold_text(value: Any) -> str:
    """A threshold, or one for each exit separated by colons, with at most 6 significant digits."""
    values = value if isinstance(value, list | tuple) else [value]
    return ":".join(f"{float(each):g}" for each in values)


def missing_kv_text(content: Mapping[str, Any]) -> str:
    """What a result states as ``missing_kv``, and which of its exits are complete if only some."""
    text = f'missing_kv="{content["missing_kv"]}"'
    least, last = content.get("complete_from"), content.get("num_layers")
    if least is None or last is None or content["missing_kv"] == "exact":
        return text
    complete = [str(layer) for layer in content["exit_layers"] if least <= layer < last]
    exits = f"exit{'s' if len(complete) > 1 else ''} {', '.join(complete)}"
    return f"{text}, exact at {exits}" if complete else text


def p_text(p: Number | None) -> str:
    """A p-value; a very small one as a bound."""
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_phrase(p: Number | None) -> str:
    """`p = 0.012`, for use in a sentence."""
    if p is None:
        return "p not known"
    return f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"


def weights_text(weights: Mapping[str, Number]) -> str:
    """Loss weights by layer, such as `1: 0.7, 3: 0.3`."""
    return ", ".join(f"{layer}: {weight:g}" for layer, weight in weights.items()) or NONE


def value_text(value: object) -> str:
    """A setting's value; mappings and lists in one line."""
    match value:
        case None:
            return "none"
        case Mapping():
            return ", ".join(f"{key} {value_text(member)}" for key, member in value.items())
        case str():
            return value
        case Sequence():
            return ", ".join(map(value_text, value))
        case bool():
            return str(value).lower()
        case int():
            return f"{value:,}"
        case float():
            return f"{value:g}"
    return str(value)


def count_verdicts(corpus: Corpus) -> dict[str, int]:
    """How many findings have each verdict; every verdict is a key."""
    found = [finding["verdict"] for finding in corpus["findings"]]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def verdicts_text(corpus: Corpus) -> str:
    """`1 of the document's 6 findings holds, 2 do not hold and 3 are undecided`."""
    counts, total = count_verdicts(corpus), len(corpus["findings"])
    return (
        f"{counts['holds']} of the document's {total} findings "
        f"{'holds' if counts['holds'] == 1 else 'hold'}, {counts['does not hold']} "
        f"{'does' if counts['does not hold'] == 1 else 'do'} not hold and {counts['undecided']} "
        f"{'is' if counts['undecided'] == 1 else 'are'} undecided"
    )


def sizes_text(corpus: Corpus) -> str:
    """Return how many findings have each size, such as `Size: 3 smaller, 2 undecided.`"""
    found = [finding.get("size") for finding in corpus["findings"]]
    counts = [f"{found.count(size)} {size}" for size in SIZES if size in found]
    return f"Size against the published one: {', '.join(counts)}."


def interval_text(interval: Sequence[Number] | None) -> str:
    """Return an interval in percent, such as `-16.2 to -6.1`; a dash where there is none."""
    return NONE if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def power_text(power: Mapping[str, Any]) -> str:
    """Return what the number of seeds can find, as a sentence."""
    seeds, lowest = power["seeds"], power["lowest"]
    most = max(power["by_finding"].values())
    found = f"{lowest:.2f}" if lowest == most else f"{lowest:.2f} to {most:.2f}"
    return (
        f"Power: with {seeds} {'seed' if seeds == 1 else 'seeds'}, an effect of "
        f"{power['effect_pct']:g}% is found with a probability of {found}, depending on the "
        f"finding, after Holm's correction; {power['required_seeds']} seeds give each finding at "
        f"least {power['wanted']:g}."
    )


def headline(name: str, corpus: Corpus) -> str:
    """The outcome on one corpus in plain words: verdicts, then the published figures."""
    seeds = len(corpus["protocol"]["seeds"])
    text = f"On {name}, over {seeds} {'seed' if seeds == 1 else 'seeds'}, {verdicts_text(corpus)}."
    rows = published_once(row for rows in corpus["tables"].values() for row in rows)
    if rows:
        inside = sum(abs(row["distance_in_std"]) <= OUTSIDE for row in rows)
        text += (
            f" Of {len(rows)} published PPL figures, {inside} {'lies' if inside == 1 else 'lie'} "
            f"within {OUTSIDE:g} standard deviations of the measured mean."
        )
    return text


def published_once(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows whose published PPL has a distance, each of the document's figures once.

    A figure that stands at two thresholds counts where it stands first.
    """
    found: dict[tuple[object, ...], Mapping[str, Any]] = {}
    for row in rows:
        if row["distance_in_std"] is not None:
            key = (value_text(row["loss_weights"]), row["epoch"], row["published"]["ppl"])
            found.setdefault(key, row)
    return list(found.values())


def outside_notes(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence for each published PPL outside mean ± 2 std, or one that there is none."""
    compared = [row for row in rows if row["distance_in_std"] is not None]
    far = [row for row in compared if abs(row["distance_in_std"]) > OUTSIDE]
    if not far:
        inside = f"Every published PPL lies inside the measured mean ± {OUTSIDE:g} std."
        return (inside,) if compared else ()
    return tuple(
        f"Outside mean ± {OUTSIDE:g} std: {row['label']}"
        + ("" if row["threshold"] is None else f" at threshold {row['threshold']:.2f}")
        + f", published PPL {row['published']['ppl']:.2f}, lies {abs(row['distance_in_std']):.2f} "
        f"std {'above' if row['published']['ppl'] > row['measured']['ppl']['mean'] else 'below'} "
        f"the measured {stat_text(row['measured']['ppl'], 2)}."
        for row in far
    )
