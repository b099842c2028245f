"""The search for a recipe, and what it refuses."""

import math

import pytest

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.cli import main
from offramp.errors import ConfigError
from offramp.exits.schedules import loss_schedule
from offramp.reading import read_json
from offramp.studies.study import recipe
from offramp.studies.study.config import RecipeConfig
from offramp.studies.study.plan import GateFit
from offramp.studies.study.recipe import (
    Candidate,
    check_budget,
    find_recipe,
    first_candidate,
    possible,
    recipe_study,
    rounds,
)
from offramp.studies.study.workers import Workers
from offramp.training.config import TrainConfig

TEXT = "The exits of a model stand after its blocks. " * 120


class Watcher:
    def __init__(self):
        self.planned = {}

    def on_plan(self, name, total, tokens):
        self.planned[name] = total

    def on_timing(self, passes, tokens):
        pass

    def on_decoding(self, policies, prompt_tokens, new_tokens):
        self.decoded = (policies, prompt_tokens, new_tokens)

    def on_progress(self, progress):
        pass

    def on_done(self, name):
        pass


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("layers", [2, 3, 6, 12])
def test_every_candidate_is_a_recipe_of_its_depth(layers):
    for _, changes in rounds(layers, 60.0):
        for change in changes:
            candidate = first_candidate(layers).changed(**change)
            assert all(1 <= layer < layers for layer in candidate.exits)
            config = TrainConfig(**candidate.recipe(layers).training, steps=30)
            exits = (*candidate.exits, layers)
            weights = loss_schedule(
                config, total_steps=30, num_layers=layers, exit_layers=exits
            ).at(1)
            assert tuple(weights) == exits
            assert sum(weights.values()) == pytest.approx(1)


@pytest.mark.slow
def test_the_search_chooses_on_held_out_text_and_the_recipe_stands_beside_static_models(
    corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(recipe, "GATES", GateFit(tokens=1000, steps=20))
    out, again = tmp_path / "out", tmp_path / "again"
    config = RecipeConfig(
        corpus=str(corpus), layers=3, compute_budget=70.0, tokens=3 * 4096, seeds=2, dim=32
    )
    run, result = find_recipe(
        config,
        out,
        watcher=(watcher := Watcher()),
        workers=Workers(folder=tmp_path / "runs", jobs=2),
    )
    for question in ("alpha", "exits", "head", "schedule", "specialise"):
        asked = [tried for tried in result.search if tried.question == question]
        best = min(tried.held_out_ppl or math.inf for tried in asked)
        assert [tried.held_out_ppl for tried in asked if tried.chosen] == [best]
    assert result.rows[0].label == "recipe"
    assert result.rows[0].confidence == "gain"
    assert set(result.rows[0].ppl_at) == {50, 60, 65, 70, 80, 100}
    assert {model.layers for model in result.static} == {1, 2, 3}
    said = [answer for answer in result.answers if "than static models of equal cost" in answer]
    assert len(said) == len(result.rows)
    assert "The search" in (out / "report.html").read_text()
    run_names = [path.name for path in (tmp_path / "runs").glob("[0-9a-f]*")]
    assert len(run_names) == watcher.planned["search"] + watcher.planned["recipe"]
    code = main(
        f"recipe --corpus {corpus} --layers 3 --compute-budget 70 --tokens {3 * 4096} --seeds 2 "
        f"--dim 32 --out {again} --runs {tmp_path / 'runs'}".split()
    )
    assert not code
    printed = capsys.readouterr().out
    assert (again / "recipe.toml").read_text() in printed
    at_70 = result.rows[0].ppl_at[70]
    assert f"{at_70.mean:.3f} ± {at_70.std:.3f}" in printed
    assert "At 70% of FLOPs the recipe's PPL is" in printed
    assert (again / "study.json").read_bytes() == (out / "study.json").read_bytes()
    model = tmp_path / "model"
    assert not main(f"train --config {again / 'recipe.toml'} --steps 1 --out {model}".split())
    kept = read_json(model / "config.json")
    assert kept["model"]["exit_layers"] == list(run.model.exit_layers)


def test_exits_that_a_budget_cannot_specialise_are_left_as_they_are(corpus):
    study = recipe_study(RecipeConfig(corpus=str(corpus)))
    for budget, expected in ((36.0, False), (60.0, True)):
        specialised = SpecialiseConfig(compute_budget=budget)
        for specialise, may in ((specialised, expected), (None, True)):
            candidate = Candidate(exits=(2,), specialise=specialise)
            assert possible(study, candidate, vocab_size=123) == may


def test_what_is_no_budget_is_refused(corpus):
    with pytest.raises(ConfigError, match=r"compute_budget: expected .* in \(0, 100\], got 101"):
        RecipeConfig(corpus=str(corpus), compute_budget=101)
    config = RecipeConfig(corpus=str(corpus), compute_budget=5)
    with pytest.raises(ConfigError, match=r"at least 2\d\.\d, the cost of leaving at layer 1"):
        check_budget(recipe_study(config), 5, vocab_size=123)
    with pytest.raises(ConfigError, match="layers: expected at least 2"):
        RecipeConfig(corpus=str(corpus), layers=1)
