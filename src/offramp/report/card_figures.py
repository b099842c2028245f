"""The sections of a model card with figures: training, exits, frontier, certificate."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from offramp.report.card_markdown import code, escaped, table
from offramp.report.text import ppl_text, threshold_text

Content = Mapping[str, Any]


def training_section(
    trained: Content | None, tuned: Content | None, specialised: Content | None
) -> str:
    """Say what the model and its exits were trained on, and how."""
    parts = []
    if trained is not None:
        training = _mapping(trained.get("training"))
        rows = {name: training.get(name) for name in ("steps", "epochs", "seq_len", "batch_size")}
        rows |= {"loss weights": training.get("loss_weights"), "learning rate": training.get("lr")}
        parts.append(
            "`offramp train` trained all weights, exits included.\n\n"
            + bullets({"text": _corpus(trained.get("corpus")), **_said(rows)})
        )
    if tuned is not None:
        parts.append(_tuned(tuned))
    if specialised is not None:
        parts.append(
            "`offramp specialise` then trained each exit on the tokens that exit there.\n\n"
            + bullets({"text": _corpus(specialised.get("corpus"))})
        )
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _tuned(tuned: Content) -> str:
    if tuned.get("kv_source") is not None:
        how = (
            "`offramp tune --kv-source` trained the exits, and the blocks that share keys and "
            "values."
        )
    elif tuned.get("unfreeze") is True:
        how = "`offramp tune --unfreeze` trained the exits and the backbone."
    else:
        how = "`offramp tune` trained the exits; the backbone is unchanged."
    names = ("objective", "tokens", "epochs", "lr", "seq_len", "seed")
    rows = {name.replace("_", " "): tuned.get(name) for name in names}
    return f"{how}\n\n" + bullets({"text": _corpus(tuned.get("corpus")), **_said(rows)})


def before_and_after(tuned: Content) -> str:
    """Return agreement with the last layer and PPL by exit, on the tokens that tune held out."""
    before, after = (_by_exit(tuned.get(name)) for name in ("before", "after"))
    if not after:
        return ""
    columns = ["exit after layer", "agreement before", "agreement", "PPL before", "PPL"]
    rows = [
        [
            str(layer),
            *(
                _number(figures.get(layer, {}).get(name), form)
                for name, form in (("agreement", "percent"), ("ppl", "ppl"))
                for figures in (before, after)
            ),
        ]
        for layer in after
    ]
    tokens = tuned.get("held_out_tokens")
    held = f" the {tokens:,} tokens" if type(tokens) is int else " tokens"
    return (
        "## Exits before and after training\n\nAgreement is the share of tokens for which an exit "
        f"predicts what the last layer predicts, on{held} at the end of the text that nothing was "
        f"trained on.\n\n{table(columns, rows)}"
    )


def _by_exit(figures: Any) -> dict[int, Content]:
    rows = figures if isinstance(figures, Sequence) and not isinstance(figures, str) else ()
    return {
        row["exit_layer"]: row
        for row in rows
        if isinstance(row, Mapping) and type(row.get("exit_layer")) is int
    }


def frontier(sweep: Content | None) -> str:
    """Return PPL and cost by threshold, from what ``offramp sweep`` writes."""
    if sweep is None:
        return ""
    columns = ["threshold", "PPL", "layers run", "FLOPs"]
    rows = [
        [
            threshold_text(row["threshold"]),
            _number(row["ppl"], "ppl"),
            f"{row['compute_pct']:.1f}%",
            "" if row.get("flops_pct") is None else f"{row['flops_pct']:.1f}%",
        ]
        for row in sweep["rows"]
    ]
    seen = " The model or its exits were trained on this text." if sweep["seen_in_training"] else ""
    return (
        f"## Frontier\n\nThresholds on {code(sweep['confidence'])}, "
        f"{sweep['n_tokens']:,} tokens of {_corpus(sweep['corpus'])}, "
        f"{code('missing_kv=' + sweep['missing_kv'])}. Layers and FLOPs (heads and gates counted) "
        f"are shares of the full model's.{seen}\n\n{table(columns, rows)}"
    )


def certificate_section(certificate: Content | None) -> str:
    """Say what a certificate guarantees, and with which thresholds."""
    if certificate is None:
        return ""
    said = _mapping(certificate["assumptions"])
    meaning = " ".join(
        _sentence(said[name])
        for name in ("promise", "text", "not_covered")
        if isinstance(said.get(name), str)
    )
    thresholds = threshold_text(certificate["thresholds"])
    rows = {
        "thresholds": f"{thresholds} on {escaped(certificate['confidence'])}",
        "missing keys and values": escaped(certificate["missing_kv"]),
        "risk": f"{escaped(certificate['risk'])}, at most {certificate['epsilon']:g}",
        "sequences": f"{certificate['n']:,}",
        "layers run": f"{certificate['expected_compute_pct']:.1f}%",
        "precision": escaped(certificate["dtype"]),
        "sha256 of the text": code(certificate["corpus_sha256"]),
        "sha256 of the certificate": code(certificate["sha256"]),
    }
    return f"## Certificate\n\n{meaning}\n\n{bullets(rows)}"


def _sentence(text: str) -> str:
    """Return a sentence of a certificate, whose parts may be longer than a name."""
    return " ".join(escaped(part) for part in re.findall(r".{1,180}(?:\s|$)", text)).strip()


def _corpus(corpus: Any) -> str:
    """Name a text that was trained or measured on, with its hash."""
    about = _mapping(corpus)
    name, sha256 = about.get("name"), about.get("sha256")
    known = [escaped(name) if isinstance(name, str) else "a text"]
    if about.get("read") in ("training split", "test split"):
        known.append(f"the {about['read']}")
    if isinstance(sha256, str):
        known.append(f"sha256 {code(sha256)}")
    return ", ".join(known)


def _said(rows: Content) -> dict[str, str]:
    """The rows whose value is known, as text."""
    return {
        name: escaped(value)
        for name, value in rows.items()
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    }


def bullets(rows: Mapping[str, str]) -> str:
    """Return a list of names with their values."""
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def _mapping(value: Any) -> Content:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any, form: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return ""
    return f"{100 * value:.1f}%" if form == "percent" else ppl_text(value)
