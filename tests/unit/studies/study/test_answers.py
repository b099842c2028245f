"""What a study says in words is what its figures say."""

import math
from dataclasses import replace

import pytest

from offramp.report.study_result import Row, Spread, SpreadAt, StudyResult, TestedRatio
from offramp.studies.study.answers import answers
from offramp.studies.study.findings import seed_findings
from offramp.studies.study.plan import Recipe
from offramp.studies.study.studies import STUDIES


def ratio(values, *, p_value=None, p_holm=None):
    values = tuple(values)
    mean = values[len(values) // 2]
    return TestedRatio(mean=mean, values=values, interval=None, p_value=p_value, p_holm=p_holm)


def make_row(label, **fields):
    """A row whose other figures are not known."""
    none, spread = ratio([None] * 3), Spread(mean=None, std=None, values=(None,) * 3)
    given = {
        "confidence": "max_prob",
        "missing_kv": "recompute",
        "loss_weights": "",
        "exit_ppl": {},
        "final_ppl": spread,
        "ppl_at": {},
        "compute_pct_at": {},
        "ratio_to_static_at": {},
        "ratio_to_standard_at": {},
        "final_to_standard": none,
        "area": none,
        "to_static": none,
    }
    return Row(label=label, **{**given, **fields})


def row(label, against_baseline, *, final=1.0, standard=1.0, static=1.0):
    """Ratios of PPLs with alpha 0.7 as the baseline, three seeds with a little spread."""

    def spread(mean):
        return ratio(mean * factor for factor in (0.999, 1.0, 1.001))

    return make_row(
        label,
        to_baseline=spread(against_baseline),
        final_to_baseline=spread(final),
        ratio_to_standard_at={65: spread(standard)},
        ratio_to_static_at={65: spread(static)},
    )


def sentences(**changed):
    figures = {"alpha 0.3": 1.05, "alpha 0.5": 1.04, "alpha 0.7, middle 1": 1.4, **changed}
    rows = [row("alpha 0.7", 1.0, standard=0.66, static=0.9)]
    rows += [row(label, ratio, final=1.2) for label, ratio in figures.items()]
    return seed_findings(rows, 65)


def test_findings_that_are_true_hold():
    said = sentences()
    assert len(said) == 6
    assert all(": holds here at 65% of FLOPs" in sentence for sentence in said[:5])
    assert ": holds here (last layer" in said[5]  # it is not about routing
    assert "PPL -34.0% compared with the standard model" in said[1]
    assert "with that loss PPL +40.0%" in said[4]
    assert "+20.0% with that loss" in said[5]


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
    rows[0] = replace(rows[0], ratio_to_standard_at={65: ratio([missing] * 3)})
    assert ": undecided" in seed_findings(rows, 65)[1]


LEVELS = {"alpha 0.1": 0.1, "alpha 0.5": 0.5, "alpha 0.9": 0.9}


def study_row(label, final, at_65, *, exit=1.0, at_80=None, spread=0.001, base=None, seeds=3):
    """PPLs of a recipe; those of the standard model are 1, those of ``base`` its baseline's."""
    p = None if seeds == 1 else 0.01

    def values(value):
        return [value * (1 + spread * (seed - 1)) for seed in range(seeds)]

    def ratios(value):
        return replace(ratio(values(value), p_value=p, p_holm=p), mean=value)

    def ppl(value):
        if value is None:
            return SpreadAt(mean=None, std=None, values=(None,) * seeds, interval=None)
        return SpreadAt(mean=value, std=None, values=tuple(values(value)), interval=None)

    at_80 = at_65 if at_80 is None else at_80
    none = ratio([None] * seeds)
    at = {50.0: none, 65.0: none if at_65 is None else ratios(at_65), 80.0: ratios(at_80)}
    return make_row(
        label,
        confidence="gain",
        final_ppl=ppl(final),
        exit_ppl={2: ppl(exit), 6: ppl(final)},
        final_to_standard=ratios(final),
        final_to_baseline=ratios(final / (base or final)),
        to_baseline=at[65.0],
        ppl_at={50.0: ppl(None), 65.0: ppl(at_65), 80.0: ppl(at_80)},
        ratio_to_standard_at=at,
        ratio_to_static_at=at,
    )


def told(rows, **changed):
    recipes = tuple(
        Recipe(label=row.label, level=LEVELS.get(row.label), tested=row.label != "shown")
        for row in rows
    )
    study = replace(STUDIES["middle"], **{"recipes": recipes, "measures": ("gain",), **changed})
    result = StudyResult(
        study="",
        question="",
        text={},
        offramp_version="",
        train_tokens=4096,
        test_tokens=1,
        seeds=(0,),
        compared_at=65.0,
        area=(50.0, 100.0),
        static=(),
        runs=(),
        summary=tuple(rows),
    )
    return answers(study, result)


def test_a_study_says_what_is_lower_higher_and_undecided():
    rows = [
        study_row("alpha 0.1", 1.0, 0.9, base=1.1, exit=1.0),
        study_row("alpha 0.5", 1.1, 0.8, base=1.1, exit=0.97**4, spread=0.002),
        study_row("alpha 0.9", 1.2, 0.8004, base=1.1, exit=0.97**8, spread=0.02),
        study_row("shown", 9.0, 0.1, base=1.1),
    ]
    last, trend, final, routed, _, lowest, _ = told(rows, baseline="alpha 0.5", varies="alpha")
    assert "after the same 4,096 training tokens" in last
    assert "higher with alpha 0.1 (+0.0%, p = 0.010), alpha 0.5 (+10.0%, p = 0.010)" in last
    assert "raising alpha by 0.1 makes the last layer's PPL 2.3% higher" in trend
    assert "the exit's PPL 3.0% lower (p = 0.0" in trend
    assert "the routed PPL at 65% of FLOPs, with confidence gain, 1.5% lower" in trend
    assert "Compared with alpha 0.5, the last layer's PPL is lower with alpha 0.1 (-9.1%" in final
    assert "; higher with alpha 0.9 (+9.1%" in final
    assert "the routed PPL is higher with alpha 0.1 (+12.5%, p < 0.001)" in routed
    assert "undecided with alpha 0.9 (+0.0%" in routed
    assert "alpha 0.5 has the lowest PPL, 0.800: 20.0% lower than a static model" in lowest
    assert "(p = 0.030)" in lowest  # the least of three
    assert "higher with alpha 0.1 (+12.5%, p < 0.001); undecided with alpha 0.9" in lowest
    assert not any("shown" in sentence for sentence in (last, final, routed, lowest))


def test_where_exits_cost_too_much_the_baseline_is_met_at_a_higher_cost():
    rows = [
        study_row("low", 1.0, 0.9),
        study_row("high", 1.0, None, at_80=0.8, spread=0.002),
    ]
    said = told(rows, baseline="low", varies=None)
    against = [sentence for sentence in said if "Compared with low at" in sentence]
    assert len(against) == 1
    assert (
        "Compared with low at 80% of FLOPs, with confidence gain, the routed PPL is lower with high"
        in (against[0])
    )


def test_one_recipe_is_no_contest_and_one_seed_no_test():
    one = told([study_row("recipe", 0.98, 0.9)], baseline=None, varies=None)
    assert "the last layer's PPL is 2.0% lower (p = 0.010)" in one[0]
    assert "the PPL is 0.900: 10.0% lower than a static model" in one[1]
    assert "best of several" not in " ".join(one)
    rows = [study_row("alpha 0.1", 1.0, 0.9, seeds=1), study_row("alpha 0.5", 1.1, 0.8, seeds=1)]
    lonely = told(rows, baseline=None, varies="alpha")
    assert "undecided with alpha 0.1 (+0.0%, p not known)" in lonely[0]
    assert "the exit's PPL 0.0% lower (p not known)" in lonely[1]
