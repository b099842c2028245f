"""What a study says in words is what its figures say."""

import math

import pytest

from offramp.experiments.study.findings import seed_findings


def row(label, against_half_percent, *, final=1.0, standard=1.0, static=1.0):
    """PPL in percent of alpha 0.7's, three seeds with a little spread."""

    def ratio(mean):
        return {"values": [mean * factor for factor in (0.999, 1.0, 1.001)]}

    return {
        "label": label,
        "to_baseline": ratio(against_half_percent),
        "final_to_baseline": ratio(final),
        "ratio_to_standard_at": {"65": ratio(standard)},
        "ratio_to_static_at": {"65": ratio(static)},
    }


def sentences(**changed):
    figures = {"alpha 0.3": 1.05, "alpha 0.5": 1.04, "alpha 0.7, middle 1": 1.4, **changed}
    rows = [row("alpha 0.7", 1.0, standard=0.66, static=0.9)]
    rows += [row(label, ratio, final=1.2) for label, ratio in figures.items()]
    return seed_findings(rows, 65)


def test_findings_that_are_true_hold():
    said = sentences()
    assert len(said) == 6
    assert all(": holds here at 65% of FLOPs" in sentence for sentence in said)
    assert "PPL -34.0% against the standard model" in said[1]
    assert "with it PPL +40.0%" in said[4]
    assert "+20.0% with it" in said[5]


def test_findings_that_are_false_do_not_hold():
    said = sentences(**{"alpha 0.5": 0.9, "alpha 0.7, middle 1": 0.95})
    assert [": does not hold" in sentence for sentence in said] == [1, 0, 1, 1, 1, 0]
    assert "strongest rival, alpha 0.5" in said[0]


def test_what_spread_hides_is_undecided():
    rows = [row("alpha 0.7", 1.0), *(row(label, 1.0) for label in ("alpha 0.3", "alpha 0.5"))]
    rows.append(row("alpha 0.7, middle 1", 1.0))
    assert all(": undecided here" in sentence for sentence in seed_findings(rows, 65))


@pytest.mark.parametrize("missing", [None, math.nan])
def test_what_could_not_be_measured_is_not_a_verdict(missing):
    rows = [row("alpha 0.7", 1.0), *(row(label, 1.1) for label in ("alpha 0.3", "alpha 0.5"))]
    rows.append(row("alpha 0.7, middle 1", 1.1))
    rows[0]["ratio_to_standard_at"]["65"]["values"] = [missing] * 3
    assert ": undecided" in seed_findings(rows, 65)[1]
