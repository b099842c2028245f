"""``offramp recipe``: search for the best recipe at a budget of FLOPs, then measure it.

The search changes one thing at a time, with a third of the training tokens and one seed, and
chooses by the PPL on held-out training text at the budget. The recipe that it finds is trained
with all tokens and several seeds, beside static models. (The runs of the search also record their
PPL on the test text, as every study's do; the search does not read it.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp.calibration.specialise import check_specialise, with_own_heads
from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.errors import ConfigError
from offramp.models.head_kinds import ExitHeadKind
from offramp.report.study_result import Searched, StudyResult
from offramp.studies.study.config import RecipeConfig
from offramp.studies.study.done import Done
from offramp.studies.study.format import record_of
from offramp.studies.study.frontier import FrontierKey, at
from offramp.studies.study.grid import check_runs, plan_runs
from offramp.studies.study.plan import GateFit, Recipe, Study
from offramp.studies.study.run import StudyRun, StudyText
from offramp.studies.study.studies import CHARACTERS, SMALL
from offramp.studies.study.study import finish_study, go_on_or_claim
from offramp.studies.study.texts import study_text
from offramp.studies.study.workers import Watcher, Workers
from offramp.training.loop import new_model

RECIPE = "recipe"
"""Label of the recipe that was found."""
SEARCH_SHARE = 3
"""A run of the search trains on a full run's tokens divided by this."""
TEXTS = ("corpus", "test")
"""Fields of the config that settings.json replaces by the texts' hashes."""

SCHEDULES: tuple[dict[str, Any], ...] = (
    {},
    *(
        {"loss_weights": "asymmetric_exits:0.9", "alpha_end": end, "alpha_schedule": "cosine"}
        for end in (0.3, 0.1)
    ),
)
"""Ways to change alpha during a run, as fields of TrainConfig."""
GATES = GateFit(tokens=1_048_576, steps=10_000)
"""How gates are fitted in the runs of the recipe; the search uses the default."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe of the search."""

    exits: tuple[int, ...]
    "Layers of the early exits."
    alpha: float = 0.5
    "Loss weight of the early exits together; each has an equal part."
    head: ExitHeadKind = "norm"
    training: Mapping[str, Any] = field(default_factory=dict)
    "Further fields of TrainConfig; loss weights among them replace those of alpha."
    specialise: SpecialiseConfig | None = None
    "How to specialise the exits after training; None: they stay as trained."

    def changed(self, *, training: Mapping[str, Any] | None = None, **others: Any) -> "Candidate":
        """The candidate with other values; those of ``training`` are added to its own."""
        return replace(self, training={**self.training, **(training or {})}, **others)

    def recipe(self, layers: int) -> Recipe:
        """The candidate as a recipe of a study, for a model of that depth."""
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
    """Where the search begins: half the weight on one exit after a third of the layers."""
    return Candidate(exits=(max(1, round(layers / 3)),))


def rounds(layers: int, budget: float) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rounds of the search: a name, and the changes to the best candidate so far to try."""
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
) -> tuple[StudyRun, StudyResult]:
    """The first run of the recipe that was found, and the content of ``study.json``.

    The result's ``search`` holds what was tried. The same call continues a search that was
    stopped or killed. Raises ConfigError where no exit can keep the budget.
    """
    text = study_text(config)
    study = recipe_study(config)
    full = plan_runs(study, text)
    vocab_size = check_runs(full)
    check_budget(study, config.compute_budget, vocab_size=vocab_size)
    workers.check(full)
    settings = {name: value for name, value in record_of(config).items() if name not in TEXTS}
    with go_on_or_claim(out, {"study": RECIPE, **settings, "text": text.about}):
        short = plan_runs(_short(study, (first_candidate(config.layers),)), text)[0]
        planned = list(rounds(config.layers, config.compute_budget))
        # each round but the first repeats the best candidate, whose run is kept
        searched = sum(len(changes) for _, changes in planned) - len(planned) + 1
        watcher.on_plan("search", searched, searched * short.tokens)
        best, search = _search(study, config, text, vocab_size, watcher, workers)
        recipe = replace(best.recipe(config.layers), label=RECIPE)
        final = replace(study, recipes=(recipe,))
        runs = plan_runs(final, text)
        result = finish_study(
            final,
            runs,
            out,
            watcher=watcher,
            workers=workers,
            search=tuple(search),
            recipe=_about(recipe),
        )
        return next(run for run in runs if run.label == RECIPE), result


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
    """Raise ConfigError where the budget is too low for every exit that the search tries.

    Tested is the earliest exit, with a gate and the most expensive head of the search.
    """
    earliest = min(
        exit
        for _, changes in rounds(study.model.num_hidden_layers, budget)
        for change in changes
        for exit in change.get("exits", ())
    )
    costliest = replace(
        study.model, vocab_size=vocab_size, exit_layers=(earliest,), exit_head="adapter"
    )
    check_specialise(
        new_model(costliest, seed=0),
        SpecialiseConfig(compute_budget=budget),
        context=(study.training.seq_len + 1) / 2,
    )


def possible(study: Study, candidate: Candidate, *, vocab_size: int) -> bool:
    """Whether the candidate's exits can be specialised at its budget, if they are to be."""
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
) -> tuple[Candidate, list[Searched]]:
    """The best candidate, and all that were tried, in order."""
    best, search = first_candidate(config.layers), list[Searched]()
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
            Searched(
                question=question,
                label=recipe.label,
                held_out_ppl=math.exp(loss) if math.isfinite(loss) else None,
                chosen=place == chosen,
            )
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
    """Nats a token at the budget, on held-out training text; inf where no policy keeps it."""
    done = Done(run=run, folder=folder / run.name)
    key = FrontierKey(text="held_out", confidence=run.measures[0], missing_kv="recompute")
    cost, nll = done.frontiers[key].curve()
    found = float(at(cost, nll, budget))
    return found if math.isfinite(found) else math.inf
