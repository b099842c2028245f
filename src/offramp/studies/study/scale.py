"""``offramp study scale``: one recipe and static models of equal FLOPs, at several widths.

It asks whether the advantage over static models grows with size. The recipe is the one that the
search of ``offramp recipe`` found (docs/studies/recipe-exact); the runs of its width are shared
with that study.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.data import vocabulary_size
from offramp.environment import environment
from offramp.errors import ConfigError
from offramp.files import write_json
from offramp.report.scale import write_scale
from offramp.report.scale_result import ScaleResult
from offramp.report.study_json import write_study
from offramp.studies.study.budgets import Budgets
from offramp.studies.study.candidates import Candidate, freed_units
from offramp.studies.study.config import RecipeConfig, StudyConfig
from offramp.studies.study.grid import check_recipes, plan_runs
from offramp.studies.study.plan import Study
from offramp.studies.study.recipe import measured_study, model_of, recipe_study
from offramp.studies.study.run import StudyRun, StudyText
from offramp.studies.study.scale_summary import summarise_scale
from offramp.studies.study.sizes import Sized
from offramp.studies.study.study import RESULT, go_on_or_claim
from offramp.studies.study.texts import study_text
from offramp.studies.study.timing import TIMES, timings
from offramp.studies.study.workers import Watcher, Workers

NAME = "scale"
WIDTH = 128
"""The width of the study whose recipe and number of tokens this one has."""
BUDGET = 60.0


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the study trains."""

    study: Study
    "What all sizes have in common; its tokens are those of ``WIDTH``."
    recipe: Candidate
    "Its budget is in percent of the standard model's FLOPs; wider upper blocks follow."
    widths: tuple[int, ...]

    def of_width(self, width: int, vocab_size: int) -> Study:
        """Return the study of one width, for about as many tokens a parameter as the others.

        The parameters of the blocks grow with the square of the width. So do all numbers of
        steps: those of the training, and those that fit exits and gates after it.
        """
        share = (width / WIDTH) ** 2
        batch = self.study.training.batch_size * self.study.training.seq_len
        gates = self.study.gates
        model = model_of(width, self.study.model.num_hidden_layers)
        study = replace(
            self.study,
            model=model,
            tokens=math.ceil(self.study.tokens / batch * share) * batch,
            gates=replace(gates, steps=math.ceil(gates.steps * share)),
        )
        recipe = self.recipe.changed(
            upper=freed_units(model), specialise=_scaled(self.recipe.specialise, share)
        )
        budgets = Budgets(study=study, vocab_size=vocab_size)
        # models that share keys and values without exits are no better at this budget
        return replace(measured_study(study, budgets.own(recipe)), shared_static=())


def _scaled(config: SpecialiseConfig | None, share: float) -> SpecialiseConfig | None:
    """The config with a share of its steps; None stays None."""
    if config is None:
        return None
    steps = {name: math.ceil(getattr(config, name) * share) for name in ("steps", "first_steps")}
    return replace(config, **steps)


SCALE = Scale(
    study=replace(
        recipe_study(RecipeConfig(corpus="", dim=WIDTH, compute_budget=BUDGET)),
        name=NAME,
        question="Does the advantage of early exits over static models at 60% of FLOPs grow or "
        "shrink with the size of the model?",
        static_layers=(3, 4, 6),  # 51 and 67% of FLOPs, and the standard model
    ),
    recipe=Candidate(
        exits=(1,),
        source=1,
        add=(2,),
        specialise=SpecialiseConfig(compute_budget=BUDGET, missing_kv="propagate"),
    ),
    widths=(64, 96, 128, 160),
)


def run_scale(
    scale: Scale, config: StudyConfig, out: Path, *, watcher: Watcher, workers: Workers
) -> ScaleResult:
    """Do the runs that are missing, the smallest size first, and write the result.

    It is written after each size, of all sizes that are complete, so a study that is stopped
    shows what it has. The same call continues it. Raises ConfigError where ``tokens`` is set.
    """
    if config.tokens is not None:
        raise ConfigError(
            f"tokens: expected none with study {NAME}, where they follow from the size, got "
            f"{config.tokens}"
        )
    text = study_text(config)
    scale = replace(
        scale,
        study=replace(scale.study, seeds=config.seeds or scale.study.seeds),
        widths=config.sizes or scale.widths,
    )
    sizes = plan_sizes(scale, text)
    runs = [run for size in sizes for run in size.runs]
    settings = {"study": NAME, "seeds": scale.study.seeds, "sizes": list(scale.widths)}
    workers.check(runs)
    with go_on_or_claim(out, {**settings, "text": text.about}):
        watcher.on_plan(NAME, len(runs), sum(run.tokens for run in runs))
        for size in sizes:
            trained = bool(workers.missing(size.runs))
            workers.do(size.runs, watcher)
            if trained or size is sizes[-1]:
                result = _written(scale.study, sizes, out, workers)
    return result


def plan_sizes(scale: Scale, text: StudyText) -> list[Sized]:
    """Plan the runs of every size; raises what one of them would raise, before any work."""
    tokenizer, train_ids, *_ = _any_run(scale, text).tokenised()
    vocab_size = vocabulary_size(tokenizer)
    sizes = []
    for width in scale.widths:
        study = scale.of_width(width, vocab_size)
        runs = plan_runs(study, text)
        check_recipes(runs, vocab_size)
        sizes.append(
            Sized(
                width=width,
                study=study,
                runs=tuple(runs),
                vocab_size=vocab_size,
                text_tokens=len(train_ids),
            )
        )
    return sizes


def _any_run(scale: Scale, text: StudyText) -> StudyRun:
    """A run whose tokens are those of all runs."""
    return plan_runs(replace(scale.study, recipes=(), seeds=1), text)[0]


def _written(study: Study, sizes: Sequence[Sized], out: Path, workers: Workers) -> ScaleResult:
    """Write the result of the sizes that are complete, and the seconds of their runs."""
    complete = [size for size in sizes if not workers.missing(size.runs)]
    missing = [size.width for size in sizes if size not in complete]
    result = summarise_scale(study, complete, workers.folder, missing=missing)
    write_study(out / RESULT, result)
    runs = [run for size in complete for run in size.runs]
    write_study(out / TIMES, timings(runs, workers.folder, out))
    write_scale(result, out)
    made_with = {"jobs": workers.jobs, "threads": workers.threads, "ray": workers.ray}
    write_json(out / "environment.json", {**environment("cpu"), **made_with})
    return result
