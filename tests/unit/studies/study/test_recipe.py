"""The search for a recipe, and what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pytest

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.cli import main
from offramp.errors import ConfigError
from offramp.evaluation.cost import model_cost
from offramp.exits.schedules import loss_schedule
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.reading import read_json
from offramp.studies.study import recipe
from offramp.studies.study.budgets import Budgets
from offramp.studies.study.candidates import (
    ADDED,
    UPPER,
    Candidate,
    first_candidate,
    freed_units,
    rounds,
)
from offramp.studies.study.config import RecipeConfig
from offramp.studies.study.frontier import Frontier, FrontierKey, save_frontiers
from offramp.studies.study.grid import plan_runs
from offramp.studies.study.plan import GateFit
from offramp.studies.study.recipe import find_recipe, measured_study, recipe_study
from offramp.studies.study.record import RunRecord
from offramp.studies.study.run import StudyText
from offramp.studies.study.studies import SMALL
from offramp.studies.study.workers import Workers
from offramp.training.config import TrainConfig
from offramp.training.loop import new_model

TEXT = "The exits of a model stand after its blocks. " * 120


class Watcher:
    def __init__(self):
        self.planned, self.done = {}, []

    def on_plan(self, name, total, tokens):
        self.planned[name] = total

    def on_timing(self, passes, tokens):
        pass

    def on_decoding(self, policies, prompt_tokens, new_tokens):
        self.decoded = (policies, prompt_tokens, new_tokens)

    def on_progress(self, progress):
        pass

    def on_done(self, name):
        self.done.append(name)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("layers", [2, 3, 6, 12])
def test_every_candidate_is_a_recipe_of_its_depth(layers):
    found = list(rounds(layers, 60.0, upper=421))
    first = first_candidate(layers).changed(source=1)
    for question, changes in found:
        if question == UPPER and layers == 2:
            continue  # the search leaves it out: every block projects keys
        if question == ADDED:  # the search leaves it out without specialised exits
            first = first.changed(specialise=SpecialiseConfig())
        candidates = [first.changed(**change) for change in changes]
        if question == ADDED:
            candidates = [each for each in candidates if not {*each.add} & {*each.exits}]
        assert first in candidates  # so that no round makes things worse
        assert len({candidate.recipe.label for candidate in candidates}) == len(candidates)
        for candidate in candidates:
            assert all(1 <= layer < layers for layer in candidate.all_exits)
            exits = (*candidate.exits, layers)
            DecoderConfig(num_hidden_layers=layers, **candidate.model)
            config = TrainConfig(**candidate.recipe.training, steps=30)
            weights = loss_schedule(
                config, total_steps=30, num_layers=layers, exit_layers=exits
            ).at(1)
            assert tuple(weights) == exits
            assert sum(weights.values()) == pytest.approx(1)
    sources = [change["source"] for change in found[0][1]]
    assert (
        sources
        == {2: [None, 1], 3: [None, 1, 2], 6: [None, 1, 2, 3], 12: [None, 1, 2, 4, 6]}[layers]
    )


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
    for question in (
        "source of keys and values",
        "exits",
        "schedule",
        "head",
        "specialise",
        UPPER,
        ADDED,
    ):
        asked = [tried for tried in result.search if tried.question == question]
        if question == ADDED and not asked:
            assert run.specialise is None  # there is nothing to add an exit to
            continue
        if question == UPPER and not asked:
            assert run.model.kv_source_layer in (None, 2)  # every block projects keys
            continue
        best = min(tried.held_out_ppl or math.inf for tried in asked)
        assert [tried.held_out_ppl for tried in asked if tried.chosen] == [best]
    exact = run.conventions == ("exact",)
    assert result.rows[0].label == ("recipe-exact" if exact else "recipe")
    assert result.rows[0].missing_kv == ("exact" if exact else "propagate")
    assert result.rows[0].confidence == "gain"
    assert set(result.rows[0].ppl_at) == {50, 60, 65, 70, 80, 100}
    assert {model.layers for model in result.static} == {1, 2, 3}
    shared = {model.layers for model in result.static if model.source is not None}
    assert shared == ({3} if run.model.kv_source_layer == 1 else set())
    said = [answer for answer in result.answers if "than static models of equal cost" in answer]
    assert len(said) == len(result.rows)
    assert "The search" in (out / "report.html").read_text()
    run_names = [path.name for path in (tmp_path / "runs").glob("[0-9a-f]*")]
    questions = {tried.question for tried in result.search}
    searched = len(result.search) - len(questions) + 1  # the best candidate's run is kept
    assert searched <= watcher.planned["search"]
    assert len(run_names) == searched + watcher.planned["recipe"]
    assert sorted(watcher.done) == sorted(run_names)
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


@pytest.mark.parametrize("width", [64, 128, 160, 256])
def test_hidden_units_take_at_most_the_flops_and_parameters_of_keys_and_values(width):
    plain = replace(SMALL, hidden_size=width, head_dim=width // 4, num_key_value_heads=2)
    units = freed_units(plain)
    wide = replace(plain, kv_source_layer=1, upper_intermediate_size=units)

    def size(config):
        return sum(p.numel() for p in Transformer(config).model.layers[-1].parameters())

    assert size(plain) - 3 * width < size(wide) <= size(plain)


@pytest.fixture
def budgets(corpus):
    return Budgets(study=recipe_study(RecipeConfig(corpus=str(corpus))), vocab_size=123)


def specialised(budget):
    return SpecialiseConfig(compute_budget=budget, missing_kv="propagate")


def test_exits_that_a_budget_cannot_specialise_are_left_as_they_are(budgets):
    for budget, source, expected in (
        (36.0, None, False),
        (60.0, None, True),
        (50.0, None, False),  # under recompute it would be possible
        (50.0, 2, True),
    ):
        candidate = Candidate(exits=(2,), source=source, specialise=specialised(budget))
        assert budgets.possible(candidate) == expected
        assert budgets.possible(candidate.changed(specialise=None))


def test_a_budget_is_a_share_of_the_standard_models_flops(budgets):
    plain = Candidate(exits=(1, 2), specialise=specialised(60.0))
    assert budgets.own(plain) == plain
    shared = plain.changed(source=1)
    share = 60.0 / budgets.own(shared).specialise.compute_budget
    model = budgets.study.model

    def full(**shape):
        shape = replace(model, vocab_size=123, exit_layers=(), **shape)
        return model_cost(new_model(shape, seed=0), context=64.5).full

    assert 0.8 < share < 0.95
    assert share == pytest.approx(full(kv_source_layer=1) / full(), abs=1e-4)
    assert budgets.own(shared.changed(specialise=None)).specialise is None
    dear = shared.changed(specialise=specialised(99.0))
    assert budgets.own(dear).specialise.compute_budget == 100.0


@pytest.mark.parametrize(
    ("exits", "source", "kv"),
    [((1, 2), 1, "exact"), ((1, 2), 2, "propagate"), ((1, 2), None, "propagate")],
)
def test_what_decoding_does_at_the_budget_is_what_counts(budgets, tmp_path, exits, source, kv):
    study = budgets.study
    candidate = Candidate(exits=exits, source=source)
    text = StudyText(train="", held_out="", test="", about={})
    (run,) = plan_runs(replace(study, recipes=(candidate.recipe,), static_layers=(), seeds=1), text)
    assert run.conventions[0] == kv

    def one(nll):
        sums = {"nll": nll, "compute_pct": [50.0, 100.0], "flops_pct": [50.0, 100.0]}
        return Frontier(
            thresholds=np.zeros(2),
            tokens=np.ones(1),
            **{name: np.asarray(value, dtype=float)[:, None] for name, value in sums.items()},
        )

    folder = tmp_path / run.name
    folder.mkdir()
    save_frontiers(
        folder / "frontiers.npz",
        {
            FrontierKey(text="held_out", confidence="gain", missing_kv=each): one(nll)
            for each, nll in ((kv, [2.0, 1.0]), ("recompute", [0.1, 0.1]))
        },
    )
    standard = model_cost(
        new_model(replace(study.model, vocab_size=123, exit_layers=()), seed=0), context=64.5
    ).full
    RunRecord(
        label="",
        config={},
        train_tokens=1,
        test_tokens=1,
        exit_ppl={},
        flops={"full": 0.9 * standard},
        left_at_budget=None,
        validations=[],
    ).save(folder)
    found = [budgets.held_out_loss(run, tmp_path, budget) for budget in (40.0, 45.0, 67.5, 95.0)]
    assert found == pytest.approx([math.inf, 2.0, 1.5, 1.0], abs=1e-5)


def test_the_recipe_stands_beside_static_models_of_its_kind(budgets):
    def final(source, exits, add=()):
        special = SpecialiseConfig() if add else None
        candidate = Candidate(exits=exits, source=source, specialise=special, add=add)
        found = measured_study(budgets.study, candidate)
        text = StudyText(train="", held_out="", test="", about={})
        (label,) = {each.label for each in found.recipes}
        runs = plan_runs(replace(found, seeds=1), text)
        assert all(run.decoding for run in runs)
        return label, [run.label for run in runs]

    plain = ["standard", "static 5", "static 4", "static 3", "static 2", "static 1"]
    assert final(None, (1, 2)) == ("recipe", [*plain, "recipe"])
    shared = [f"static {layers}, source 2" for layers in (6, 5, 4)]
    assert final(2, (1, 2)) == ("recipe", [*plain, *shared, "recipe"])
    assert final(2, (2,)) == ("recipe-exact", [*plain, *shared, "recipe-exact"])
    assert final(2, (2,), (1,)) == ("recipe", [*plain, *shared, "recipe"])
    assert final(2, (2,), (3,)) == ("recipe-exact", [*plain, *shared, "recipe-exact"])


def test_what_is_no_budget_is_refused(corpus, budgets):
    with pytest.raises(ConfigError, match=r"compute_budget: expected .* in \(0, 100\], got 101"):
        RecipeConfig(corpus=str(corpus), compute_budget=101)
    with pytest.raises(ConfigError, match=r"at least 2\d\.\d, the cost of leaving at layer 1"):
        budgets.check(5, list(rounds(6, 5, upper=421)))
    budgets.check(30, list(rounds(6, 30, upper=421)))
    with pytest.raises(ConfigError, match="layers: expected at least 2"):
        RecipeConfig(corpus=str(corpus), layers=1)
