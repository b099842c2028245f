"""``offramp recipe``: search for the best recipe at a budget of FLOPs, then show what it is worth.

The search changes one thing at a time, with a third of the training tokens and one seed, and
chooses by the PPL on held-out training text at the budget. The recipe found is trained with all
tokens and several seeds, beside static models. (Runs of the search are those of any study, so
each knows its PPL on the test text, too; nothing reads that.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp.calibration.specialise import check_specialise, with_own_heads
from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.errors import ConfigError
from offramp.models.head_kinds import ExitHeadKind
from offramp.studies.study.comparison import Done
from offramp.studies.study.config import RecipeConfig
from offramp.studies.study.format import record_of
from offramp.studies.study.frontier import at
from offramp.studies.study.plan import GateFit, Recipe, Study
from offramp.studies.study.run import StudyRun, StudyText
from offramp.studies.study.studies import CHARACTERS, SMALL
from offramp.studies.study.study import (
    Watcher,
    Workers,
    check_runs,
    finish_study,
    go_on_or_claim,
    plan_runs,
    study_text,
)
from offramp.training.loop import new_model

RECIPE = "recipe"
"""Label of the row that says what the recipe is worth."""
SEARCH_SHARE = 3
"""A run of the search has the tokens of a full one divided by this."""
TEXTS = ("corpus", "test")
"""Fields that the texts' hashes stand for."""

SCHEDULES: tuple[dict[str, Any], ...] = (
    {},
    *(
        {"loss_weights": "asymmetric_exits:0.9", "alpha_end": end, "alpha_schedule": "cosine"}
        for end in (0.3, 0.1)
    ),
)
"""Alpha over the run, as fields of TrainConfig."""
GATES = GateFit(tokens=1_048_576, steps=10_000)
"""Of the recipe's own runs; the search makes do with the default."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe of the search."""

    exits: tuple[int, ...]
    "Early exits; they share alpha equally."
    alpha: float = 0.5
    head: ExitHeadKind = "norm"
    training: Mapping[str, Any] = field(default_factory=dict)
    "Further fields of TrainConfig; with loss weights of their own, alpha does not apply."
    specialise: SpecialiseConfig | None = None

    def changed(self, *, training: Mapping[str, Any] | None = None, **others: Any) -> "Candidate":
        """With other values; ways to train are added to those that there are."""
        return replace(self, training={**self.training, **(training or {})}, **others)

    def recipe(self, layers: int) -> Recipe:
        """As the engine knows it."""
        share = self.alpha / len(self.exits)
        weights = {**dict.fromkeys(self.exits, share), layers: 1 - self.alpha}
        written = ",".join(f"{layer}={weight:g}" for layer, weight in weights.items())
        training = {"loss_weights": written, **self.training}
        exits = ",".join(map(str, self.exits))
        return Recipe(
            label=", ".join(
                [f"exit {exits}", f"head {self.head}"]
                + [f"{name} {value}" for name, value in training.items()]
                + (["specialised"] if self.specialise else [])
            ),
            training=training,
            model={"exit_layers": self.exits, "exit_head": self.head},
            specialise=self.specialise,
        )


def first_candidate(layers: int) -> Candidate:
    """Half the weight on an exit after a third of the layers."""
    return Candidate(exits=(max(1, round(layers / 3)),))


def rounds(layers: int, budget: float) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What is changed of the best so far, one question after the other."""
    third, half = max(1, round(layers / 3)), max(1, round(layers / 2))
    placed = [(third,), (half,), (max(1, third // 2), third), (third, min(layers - 1, 2 * third))]
    distinct = dict.fromkeys(tuple(sorted({*exits})) for exits in placed)
    yield "alpha", [{"alpha": alpha} for alpha in (0.3, 0.5, 0.7)]
    yield "schedule", [{"training": extra} for extra in SCHEDULES]
    yield "exits", [{"exits": exits} for exits in distinct]
    yield "head", [{"head": head} for head in ("norm", "adapter")]
    specialised = SpecialiseConfig(compute_budget=budget)
    yield "specialise", [{"specialise": each} for each in (None, specialised)]


def find_recipe(
    config: RecipeConfig, out: Path, *, watcher: Watcher, workers: Workers
) -> tuple[StudyRun, dict[str, Any]]:
    """The recipe's first run, for its configuration, and the content of ``study.json``.

    What was asked, and answered, on the way is the content's ``search``. The same call goes on
    where it was stopped or killed.
    """
    text = study_text(config)
    study = recipe_study(config)
    full = plan_runs(study, text)
    vocab_size = check_runs(full)
    check_budget(study, config.compute_budget, vocab_size=vocab_size)
    workers.check(full)
    settings = {name: value for name, value in record_of(config).items() if name not in TEXTS}
    go_on_or_claim(out, {"study": RECIPE, **settings, "text": text.about})
    short = plan_runs(_short(study, (first_candidate(config.layers),)), text)[0]
    asked = list(rounds(config.layers, config.compute_budget))
    searched = sum(len(changes) for _, changes in asked) - len(asked) + 1  # the best so far is done
    watcher.on_plan("search", searched, searched * short.tokens)
    best, search = _search(study, config, text, vocab_size, watcher, workers)
    recipe = replace(best.recipe(config.layers), label=RECIPE)
    final = replace(study, recipes=(recipe,))
    runs = plan_runs(final, text)
    about = {"search": search, "recipe": _about(recipe)}
    content = finish_study(final, runs, out, watcher=watcher, workers=workers, about=about)
    return next(run for run in runs if run.label == RECIPE), content


def _about(recipe: Recipe) -> dict[str, Any]:
    specialise = None if recipe.specialise is None else asdict(recipe.specialise)
    return {"training": recipe.training, "model": recipe.model, "specialise": specialise}


def recipe_study(config: RecipeConfig) -> Study:
    """The last part, before it is known which recipe it is about."""
    return Study(
        name=RECIPE,
        question=f"Which recipe is best at {config.compute_budget:g}% of the FLOPs of "
        f"{config.layers} layers, and what is it worth?",
        tokenizer=config.tokenizer,
        model=replace(
            SMALL,
            hidden_size=config.dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.dim // 32,
            num_key_value_heads=None,
            head_dim=None,
            intermediate_size=config.dim * 21 // 8,
            exit_layers=(1,),
        ),
        training=CHARACTERS,
        tokens=config.tokens,
        test_tokens=131_072,
        recipes=(),
        static_layers=tuple(range(1, config.layers + 1)),
        measures=("gain", "max_prob"),
        compared_at=config.compute_budget,
        gates=GATES,
        seeds=config.seeds,
    )


def check_budget(study: Study, budget: float, *, vocab_size: int) -> None:
    """ConfigError where the budget is under the cost of the earliest exit of the search, with a
    gate and the dearest head that it may get.
    """
    earliest = min(
        exit
        for _, changes in rounds(study.model.num_hidden_layers, budget)
        for change in changes
        for exit in change.get("exits", ())
    )
    dearest = replace(
        study.model, vocab_size=vocab_size, exit_layers=(earliest,), exit_head="adapter"
    )
    check_specialise(
        new_model(dearest, seed=0),
        SpecialiseConfig(compute_budget=budget),
        context=(study.training.seq_len + 1) / 2,
    )


def possible(study: Study, candidate: Candidate, *, vocab_size: int) -> bool:
    """Whether the exits may be specialised at the budget, if they are to be."""
    if candidate.specialise is None:
        return True
    shape = candidate.recipe(study.model.num_hidden_layers).model
    model = new_model(replace(study.model, vocab_size=vocab_size, **shape), seed=0)
    context = (study.training.seq_len + 1) / 2
    try:
        check_specialise(with_own_heads(model, seed=0), candidate.specialise, context=context)
    except ConfigError:
        return False
    return True


def _search(
    study: Study,
    config: RecipeConfig,
    text: StudyText,
    vocab_size: int,
    watcher: Watcher,
    workers: Workers,
) -> tuple[Candidate, list[dict[str, Any]]]:
    best, search = first_candidate(config.layers), []
    for question, changes in rounds(config.layers, config.compute_budget):
        changed = [best.changed(**change) for change in changes]
        candidates = [each for each in changed if possible(study, each, vocab_size=vocab_size)]
        short = _short(study, candidates)
        recipes = short.recipes
        runs = plan_runs(short, text)
        workers.do(runs, watcher)
        losses = [held_out_loss(run, workers.folder, config.compute_budget) for run in runs]
        chosen = int(np.argmin(losses)) if np.isfinite(losses).any() else None
        search += [
            {
                "question": question,
                "label": recipe.label,
                "held_out_ppl": math.exp(loss) if math.isfinite(loss) else None,
                "chosen": place == chosen,
            }
            for place, (recipe, loss) in enumerate(zip(recipes, losses, strict=True))
        ]
        best = best if chosen is None else candidates[chosen]
    return best, search


def _short(study: Study, candidates: Sequence[Candidate]) -> Study:
    """A round of the search: one seed, and no static models."""
    return replace(
        study,
        recipes=tuple(each.recipe(study.model.num_hidden_layers) for each in candidates),
        static_layers=(),
        seeds=1,
        tokens=max(1, study.tokens // SEARCH_SHARE),
        gates=GateFit(),
    )


def held_out_loss(run: StudyRun, folder: Path, budget: float) -> float:
    """Nats a token at the budget, on held-out training text; infinite where it can't be kept."""
    done = Done(run=run, folder=folder / run.name)
    cost, nll = done.frontiers[f"held_out/{run.measures[0]}/recompute"].curve()
    found = float(at(cost, nll, budget))
    return found if math.isfinite(found) else math.inf
