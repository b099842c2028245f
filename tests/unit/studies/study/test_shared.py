"""What a study says of shared keys and values is what its figures say."""

from dataclasses import replace
from pathlib import Path

import pytest

from offramp.report.study_json import read_study
from offramp.studies.study.shared import shared_answers

HEADS = Path(__file__).parents[4] / "docs" / "studies" / "heads" / "study.json"


@pytest.fixture
def result():
    """The study of heads as if the first of its recipes had a source, with static models of it."""
    heads = read_study(HEADS)
    label = heads.rows[0].label
    shared = {"model": {"kv_source_layer": 2}}
    runs = [replace(run, config=shared) if run.label == label else run for run in heads.runs]
    static = [
        replace(model, source=2, ppl=1.02 * model.ppl, flops_pct=92.0)
        for model in heads.static
        if model.layers == 6
    ]
    return replace(heads, runs=tuple(runs), static=(*heads.static, *static[::-1]))


def test_the_architectures_effect_is_told_apart_from_that_of_exits(result):
    rows = result.family("gain", "recompute")
    alone, exits = shared_answers(result, rows)
    assert "a model of 6 layers is 2.0% higher (p" in alone
    assert "with source 2, at 92.0% of the FLOPs." in alone
    ratio = rows[0].final_to_standard.mean / 1.02
    change = f"{abs(100 * (ratio - 1)):.1f}% {'higher' if ratio > 1 else 'lower'}"
    assert f"the last layer's PPL is {change} with {rows[0].label} (p = " in exits
    assert exits.count("(p") == 1  # the others have no source


def test_without_shared_keys_and_values_nothing_is_said(result):
    plain = replace(result, static=tuple(m for m in result.static if m.source is None))
    assert not list(shared_answers(plain, result.rows))
