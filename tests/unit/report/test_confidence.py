"""Thresholds in tables and verdicts, and a certificate in a narrow terminal."""

import io

import pytest
from rich.console import Console

from offramp.report.confidence import certificate_table, certificate_verdict
from offramp.report.sweep import sweep_table, sweep_verdict
from offramp.report.text import threshold_text

CERTIFICATE = {
    "sha256": "0" * 64,
    "assumptions": {
        "promise": "With probability at least 95%, exits raise the loss by at most 0.02 nats.",
        "text": "Sequences of the same distribution as the calibration text.",
        "not_covered": "Another distribution of texts.",
        "sequence_tokens": 256,
    },
    "n": 1000,
    "confidence": "max_prob",
    "thresholds": [0.09999999999999998, "inf"],
    "expected_compute_pct": 90.0,
    "expected_flops_pct": 95.0,
    "missing_kv": "recompute",
}


def drawn(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.09999999999999998, "0.1"),
        ("inf", "inf"),
        (-0.05, "-0.05"),
        (0.999999, "0.999999"),
        (3, "3"),
        ((0.7000000000000001, 0.9), "0.7:0.9"),
    ],
)
def test_a_threshold_has_at_most_6_digits(value, text):
    assert threshold_text(value) == text


def test_no_table_or_verdict_prints_rounding_errors():
    assert "0.0999" not in drawn(certificate_table(CERTIFICATE), 80)
    assert "thresholds 0.1, inf on" in certificate_verdict(CERTIFICATE)
    row = {"threshold": 0.09999999999999998, "ppl": 2.0, "shallow_pct": 1.0, "compute_pct": 50.0}
    result = {
        "n_tokens": 9,
        "corpus": {"name": "text"},
        "missing_kv": "recompute",
        "exit_ppl": {1: 3.0, 2: 2.0},
        "rows": [{**row, "exit_share": {1: 1.0, 2: 0.0}}],
    }
    assert "0.0999" not in drawn(sweep_table(result), 120)
    assert sweep_verdict(result).startswith("Threshold 0.1 costs")


def test_a_certificate_does_not_break_words_at_40_columns():
    certificate = {**CERTIFICATE, "sha256": "short"}
    words = drawn(certificate_table(certificate), 40).split()
    whole = drawn(certificate_table(certificate), 200).split()
    assert {word for word in words if word.isascii()} <= set(whole)
