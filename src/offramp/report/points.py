"""The points of the plots, as flat records from the results of one corpus."""

from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import Any

from offramp.report.text import Corpus, Number, weights_text

Record = dict[str, Any]

MEASURED, PUBLISHED = "measured", "published in the document"


def curve_points(corpus: Corpus, epoch: str) -> list[Record]:
    """Every point of every curve of one epoch: `method`, `threshold`, `ppl`, its band, ..."""
    return [
        {
            "method": curve["label"],
            "weights": weights_text(curve["loss_weights"]),
            "epoch": epoch,
            "threshold": point["threshold"],
            "compute": point["compute_pct"]["mean"],
            "shallow": point["shallow_pct"]["mean"],
            **ppl_band(point["ppl"]),
        }
        for curve in corpus["curves"]
        if curve["epoch"] == epoch
        for point in curve["points"]
        if isfinite(point["threshold"]) and isfinite(point["ppl"]["mean"])
    ]


def measured_points(corpus: Corpus, epoch: str) -> list[Record]:
    """The tables' rows as measured, at the operating threshold or with no routing; each once."""
    found: dict[tuple[object, ...], Record] = {}
    for row in _rows(corpus, epoch):
        measured = row["measured"]
        if is_operating(corpus, row["threshold"]) and isfinite(measured["ppl"]["mean"]):
            record = {
                **_described(corpus, row),
                "kind": MEASURED,
                "compute": measured["compute_pct"]["mean"],
                "shallow": measured["shallow_pct"]["mean"],
                "values": measured["ppl"]["values"],
                **ppl_band(measured["ppl"]),
            }
            found.setdefault((record["method"], row["threshold"]), record)
    return list(found.values())


def published_points(corpus: Corpus, epoch: str) -> list[Record]:
    """The document's published figures of one epoch, each once; `std` is always None."""
    found: dict[tuple[object, ...], Record] = {}
    for row in _rows(corpus, epoch):
        published = row["published"] or {}
        if published.get("ppl") is not None:
            record = {
                **_described(corpus, row),
                "kind": PUBLISHED,
                "compute": published.get("compute_pct"),
                "shallow": published.get("shallow_pct"),
                "ppl": published["ppl"],
                "std": None,
            }
            found.setdefault((record["method"], row["threshold"], record["ppl"]), record)
    return list(found.values())


def exit_points(corpus: Corpus) -> list[Record]:
    """PPL of each method at each exit, best epoch: `method`, `exit`, `ppl` and its band."""
    return [
        {"method": entry["label"], "exit": int(layer), **ppl_band(stat)}
        for entry in corpus["exit_ppl"]
        if entry["epoch"] == "best"
        for layer, stat in entry["exits"].items()
        if isfinite(stat["mean"])
    ]


def ppl_band(stat: Mapping[str, Any]) -> Record:
    """A mean with its `low` and `high`, one standard deviation away; one seed has neither."""
    mean, std = stat["mean"], stat["std"]
    if std is None:
        return {"ppl": mean, "std": None}
    return {"ppl": mean, "std": std, "low": max(mean - std, 1.0), "high": mean + std}  # PPL >= 1


def is_operating(corpus: Corpus, threshold: Number | None) -> bool:
    """Whether a row is at the protocol's threshold, or has no routing."""
    return threshold is None or threshold == corpus["protocol"]["threshold"]


def method_names(corpus: Corpus) -> list[str]:
    """Every method of the corpus, in the order in which results name them."""
    entries = (*corpus["curves"], *corpus["exit_ppl"])
    rows = (row for rows in corpus["tables"].values() for row in rows)
    names = [entry["label"] for entry in entries] + [_name(corpus, row) for row in rows]
    return list(dict.fromkeys(names))


def present(corpus: Corpus, *groups: Iterable[Record]) -> list[str]:
    """The methods that occur in these records, in the corpus's order."""
    named = {record["method"] for records in groups for record in records}
    return [name for name in method_names(corpus) if name in named]


def wrap(name: str) -> str:
    """A name in lines of some 22 characters, for an axis."""
    lines = [""]
    for word in name.split():
        if lines[-1] and len(lines[-1]) + len(word) > 21:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _rows(corpus: Corpus, epoch: str) -> Iterator[Mapping[str, Any]]:
    for rows in corpus["tables"].values():
        yield from (row for row in rows if row["epoch"] == epoch)


def _described(corpus: Corpus, row: Mapping[str, Any]) -> Record:
    name = _name(corpus, row)
    return {
        "method": name,
        "row": wrap(name),
        "weights": weights_text(row["loss_weights"]),
        "epoch": row["epoch"],
        "threshold": row["threshold"],
    }


def _name(corpus: Corpus, row: Mapping[str, Any]) -> str:
    """The curve that a row belongs to: tables may name the same loss weights differently."""
    labels = {curve["label"]: curve["loss_weights"] for curve in corpus["curves"]}
    if row["label"] in labels:
        return str(row["label"])
    same = (label for label, weights in labels.items() if weights == row["loss_weights"])
    return str(next(same, row["label"]))
