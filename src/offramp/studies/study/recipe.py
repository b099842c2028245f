"""``offramp recipe``: search for the best recipe at a budget of FLOPs, then measure it.

The search changes one thing at a time, with a third of the training tokens and one seed. It
chooses by the PPL under the cache that decodes (exact, or ``propagate``), on held-out training
text, at the budget in percent of the standard model's FLOPs (``budgets``). The recipe that it
finds is trained with all tokens and several seeds, beside static models: plain ones and, if the
recipe's blocks share keys and values, models that share them in the same way. (The runs of the
search also record their PPL on the test text, as every study's do; the search does not read it.)
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp.models.missing_kv import EXACT, are_complete
from offramp.models.native.config import DecoderConfig
from offramp.report.study_result import Searched, StudyResult
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
from offramp.studies.study.format import record_of
from offramp.studies.study.grid import check_runs, plan_runs
from offramp.studies.study.plan import GateFit, Recipe, Study
from offramp.studies.study.run import StudyRun, StudyText
from offramp.studies.study.studies import CHARACTERS, SMALL
from offramp.studies.study.study import finish_study, go_on_or_claim
from offramp.studies.study.texts import study_text
from offramp.studies.study.workers import Watcher, Workers

RECIPE = "recipe"
"""Label of the recipe that was found; ``recipe-exact`` if all its exits are complete."""
CHOSEN_BY = "held-out PPL under the cache that decodes"
"""Stands in the settings, so that a search that chose by other figures is not continued."""
SEARCH_SHARE = 3
"""A run of the search trains on a full run's tokens divided by this."""
TEXTS = ("corpus", "test")
"""Fields of the config that settings.json replaces by the texts' hashes."""

GATES = GateFit(tokens=1_048_576, steps=10_000)
"""How gates are fitted in the runs of the recipe; the search uses the default."""


def find_recipe(
    config: RecipeConfig, out: Path, *, watcher: Watcher, workers: Workers
) -> tuple[StudyRun, StudyResult]:
    """The first run of the recipe that was found, and the content of ``study.json``.

    The result's ``search`` holds what was tried. The same call continues a search that was
    stopped or killed. Raises ConfigError where no exit can keep the budget.
    """
    text = study_text(config)
    study = recipe_study(config)
    full = plan_runs(study, text)
    budgets = Budgets(study=study, vocab_size=check_runs(full))
    planned = _rounds(study, config)
    budgets.check(config.compute_budget, planned)
    workers.check(full)
    settings = {name: value for name, value in record_of(config).items() if name not in TEXTS}
    settings |= {"chosen_by": CHOSEN_BY, "text": text.about}
    with go_on_or_claim(out, {"study": RECIPE, **settings}):
        short = plan_runs(_short(study, (first_candidate(config.layers),)), text)[0]
        # each round but the first repeats the best candidate, whose run is kept
        searched = sum(len(changes) for _, changes in planned) - len(planned) + 1
        watcher.on_plan("search", searched, searched * short.tokens)
        best, search = _search(budgets, config, text, watcher, workers)
        final = measured_study(study, best)
        runs = plan_runs(final, text)
        result = finish_study(
            final,
            runs,
            out,
            watcher=watcher,
            workers=workers,
            search=tuple(search),
            recipe=_about(final.recipes[0]),
        )
        return next(run for run in runs if run.label == final.recipes[0].label), result


def _rounds(study: Study, config: RecipeConfig) -> list[tuple[str, list[dict[str, Any]]]]:
    upper = freed_units(study.model)
    return list(rounds(config.layers, config.compute_budget, upper=upper))


def measured_study(study: Study, best: Candidate) -> Study:
    """The study of the recipe that was found, with static models that share keys and values too."""
    source, layers = best.source, study.model.num_hidden_layers
    complete = are_complete(best.all_exits, complete_from=source or layers, num_layers=layers)
    recipe = replace(best.recipe, label=f"{RECIPE}-{EXACT}" if complete else RECIPE)
    shared = () if source is None else tuple((at, source) for at in range(source + 2, layers + 1))
    upper = best.shared.get("upper_intermediate_size")
    return replace(study, recipes=(recipe,), shared_static=shared, shared_upper=upper)


def _about(recipe: Recipe) -> dict[str, Any]:
    specialise = None if recipe.specialise is None else record_of(recipe.specialise)
    return {"training": recipe.training, "model": recipe.model, "specialise": specialise}


def recipe_study(config: RecipeConfig) -> Study:
    """The study that measures the recipe, before the recipe is known."""
    return Study(
        name=RECIPE,
        question=f"Which recipe is best at {config.compute_budget:g}% of the FLOPs of "
        f"{config.layers} layers, and how good is it?",
        tokenizer=config.tokenizer,
        model=model_of(config.dim, config.layers),
        training=CHARACTERS,
        tokens=config.tokens,
        test_tokens=131_072,
        recipes=(),
        static_layers=tuple(range(1, config.layers + 1)),
        measures=("gain", "max_prob"),
        compared_at=config.compute_budget,
        decoding=True,
        gates=GATES,
        seeds=config.seeds,
    )


def model_of(width: int, layers: int) -> DecoderConfig:
    """The standard model of a width, a multiple of 32, and a depth."""
    return replace(
        SMALL,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=None,
        head_dim=None,
        intermediate_size=width * 21 // 8,
        exit_layers=(1,),
    )


def _search(
    budgets: Budgets,
    config: RecipeConfig,
    text: StudyText,
    watcher: Watcher,
    workers: Workers,
) -> tuple[Candidate, list[Searched]]:
    """The best candidate, its budget in percent of its own model, and all tried, in order."""
    best, search = first_candidate(config.layers), list[Searched]()
    counted: set[str] = set()
    for question, changes in _rounds(budgets.study, config):
        if question == UPPER and best.source in (None, config.layers - 1):
            continue
        if question == ADDED and best.specialise is None:
            continue
        changed = [best.changed(**change) for change in changes]
        candidates = [each for each in changed if budgets.possible(each)]
        short = _short(budgets.study, [budgets.own(each) for each in candidates])
        recipes = short.recipes
        runs = plan_runs(short, text)
        workers.do([run for run in runs if run.name not in counted], watcher)
        counted |= {run.name for run in runs}  # a run of an earlier round counts once
        losses = [budgets.held_out_loss(run, workers.folder, config.compute_budget) for run in runs]
        chosen = int(np.argmin(losses)) if np.isfinite(losses).any() else None
        search += [
            Searched(
                question=question,
                label=recipe.label,
                held_out_ppl=math.exp(loss) if math.isfinite(loss) else None,
                chosen=place == chosen,
            )
            for place, (recipe, loss) in enumerate(zip(recipes, losses, strict=True))
        ]
        best = best if chosen is None else candidates[chosen]
    return budgets.own(best), search


def _short(study: Study, candidates: Sequence[Candidate]) -> Study:
    """A round of the search: one seed, and no static models."""
    return replace(
        study,
        recipes=tuple(each.recipe for each in candidates),
        static_layers=(),
        seeds=1,
        tokens=max(1, study.tokens // SEARCH_SHARE),
        gates=GateFit(),
    )
