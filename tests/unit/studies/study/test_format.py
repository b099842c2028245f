"""Old records of runs stay found, and what changes a figure changes a run's name."""

import hashlib
import json
from dataclasses import asdict, fields, make_dataclass, replace
from pathlib import Path

import pytest

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.errors import CheckpointError
from offramp.models.native.config import DecoderConfig
from offramp.reading import read_json
from offramp.studies.reproduce import study as reproduction
from offramp.studies.study.budgets import Budgets
from offramp.studies.study.candidates import first_candidate, rounds
from offramp.studies.study.config import RecipeConfig
from offramp.studies.study.format import FORMAT_FIELDS, record_of
from offramp.studies.study.grid import plan_runs
from offramp.studies.study.plan import GateFit
from offramp.studies.study.recipe import _rounds, _short, measured_study, recipe_study
from offramp.studies.study.run import StudyRun, StudyText
from offramp.studies.study.scale import SCALE
from offramp.studies.study.studies import STUDIES
from offramp.studies.study.study import go_on_or_claim
from offramp.training.config import TrainConfig

RUNS = Path(__file__).parents[4] / "docs" / "studies" / "runs"


def with_field(config, default, **changed):
    """The config with a field that its class did not have when the format was fixed."""
    later = make_dataclass(
        "Later", [("later", int, default)], bases=(type(config),), frozen=True, kw_only=True
    )
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return later(**values, **changed)


@pytest.fixture
def run():
    return StudyRun(
        label="half",
        text=StudyText(train="a", held_out="b", test="c", about={"corpus": "text.txt"}),
        tokenizer="characters",
        test_tokens=100,
        measures=("max_prob",),
        gates=GateFit(),
        model=DecoderConfig(exit_layers=(2,)),
        training=TrainConfig(steps=5),
        specialise=SpecialiseConfig(compute_budget=60.0),
    )


def runs_of_the_recipe(text):
    """The names of the kept search's runs, and of those that measure the recipe it found.

    The latter were also done of the recipe without the exit that is added.
    """
    config = RecipeConfig(corpus="valid.txt", compute_budget=60.0)
    study = recipe_study(config)
    budgets, best, searched = Budgets(study=study, vocab_size=123), first_candidate(6), set()
    specialised = {"specialise": SpecialiseConfig(compute_budget=60.0, missing_kv="propagate")}
    chosen = ({"source": 1}, {"upper": 421}, {"exits": (1,)}, {}, {}, specialised, {"add": (2,)})
    for (_, changes), choice in zip(_rounds(study, config), chosen, strict=True):
        changed = [best.changed(**change) for change in changes]
        candidates = [budgets.own(each) for each in changed if budgets.possible(each)]
        searched |= {run.name for run in plan_runs(_short(study, candidates), text)}
        best = best.changed(**choice)
    measured = [best, best.changed(add=())]  # with the exit that is added, and before it is
    finals = [plan_runs(measured_study(study, budgets.own(each)), text) for each in measured]
    return searched, {run.name for runs in finals for run in runs}


def test_every_kept_record_is_found_by_the_studies_that_made_it():
    kept = {path.name: read_json(path / "run.json")["config"] for path in RUNS.glob("[0-9a-f]*")}
    text = StudyText(train="", held_out="", test="", about=next(iter(kept.values()))["text"])
    names = {
        run.name
        for study in ("alpha", "middle", "exits", "heads", "kv")
        for run in plan_runs(STUDIES[study], text)
    }
    searched, measured = runs_of_the_recipe(text)
    scaled = {
        run.name for width in SCALE.widths for run in plan_runs(SCALE.of_width(width, 123), text)
    }
    assert len(scaled & measured) == 12  # the size of the recipe's study
    assert names | searched <= kept.keys() <= names | searched | measured | scaled
    for name, config in kept.items():
        written = json.dumps(config, sort_keys=True)
        assert hashlib.sha256(written.encode()).hexdigest()[:16] == name


def test_what_is_measured_of_decoding_is_part_of_a_name_only_where_a_token_may_leave(run):
    assert replace(run, decoding=True).name != run.name
    assert replace(run, decoding=True).config["decoding"] is True
    static = replace(run, model=DecoderConfig(exit_layers=()), specialise=None)
    assert replace(static, decoding=True).name == static.name


@pytest.mark.parametrize("part", [None, "gates", "model", "training", "specialise"])
def test_a_field_added_later_changes_a_name_only_off_its_default(run, part):
    def extended(**changed):
        if part is None:
            return with_field(run, 3, **changed)
        return replace(run, **{part: with_field(getattr(run, part), 3, **changed)})

    assert extended().name == run.name
    assert extended().config == run.config
    assert extended(later=4).name != run.name
    assert extended(later=4).name != extended(later=5).name


def test_every_field_of_today_is_always_in_the_record(run):
    for config in (TrainConfig(), GateFit()):
        assert record_of(config) == asdict(config)
    specialise = asdict(SpecialiseConfig(compute_budget=60))
    later = {"missing_kv": "recompute", "add_exits": (), "first_steps": 2000}
    assert {name: specialise.pop(name) for name in later} == later
    assert record_of(SpecialiseConfig(compute_budget=60)) == specialise
    assert record_of(DecoderConfig()) == DecoderConfig().stored()  # scaled positions came later
    assert set(run.config) == {"format", *FORMAT_FIELDS["StudyRun"], "specialise"}
    assert "specialise" not in replace(run, specialise=None).config


def go_on(out, settings):
    with go_on_or_claim(out, settings):
        (out / "result").write_text("")


def test_a_study_goes_on_though_a_setting_was_added(tmp_path):
    config = RecipeConfig(corpus="pangram")
    go_on(tmp_path / "out", record_of(config))
    go_on(tmp_path / "out", record_of(with_field(config, 3)))
    with pytest.raises(CheckpointError, match=r"but later differ: stored \[None\], now \[4\]"):
        go_on(tmp_path / "out", record_of(with_field(config, 3, later=4)))
    go_on(tmp_path / "new", record_of(with_field(config, 3, later=4)))
    with pytest.raises(CheckpointError, match=r"but later differ: stored \[4\], now \[None\]"):
        go_on(tmp_path / "new", record_of(config))


def go_on_or_stop(out, config, corpora):
    with reproduction.go_on_or_claim(out, config, corpora):
        pass


def test_a_reproduction_goes_on_though_a_setting_was_added(tmp_path):
    config = reproduction.ReproduceConfig(quick=True)
    go_on_or_stop(tmp_path / "out", config, [])
    go_on_or_stop(tmp_path / "out", with_field(config, 3), [])
    with pytest.raises(CheckpointError, match="unfinished run with other settings"):
        go_on_or_stop(tmp_path / "out", with_field(config, 3, later=4), [])


def test_the_study_of_shared_keys_and_values_shares_runs_with_the_search_for_a_recipe():
    text = StudyText(train="", held_out="", test="", about={})
    study = recipe_study(RecipeConfig(corpus="pangram"))
    search = {
        run.name
        for _, changes in rounds(6, 60.0, upper=421)
        for change in changes
        for run in plan_runs(_short(study, [first_candidate(6).changed(**change)]), text)
    }
    runs = plan_runs(STUDIES["kv"], text)
    plain = {run.name for run in plan_runs(STUDIES["heads"], text)}
    assert len(runs) == len({run.name for run in runs}) == 34
    assert len({run.name for run in runs} - search - plain) <= 18
