"""Which runs a study needs: every recipe and every static model with every seed."""

import math
from collections.abc import Sequence
from dataclasses import replace

from offramp.calibration.specialise import check_specialise, with_own_heads
from offramp.data import vocabulary_size
from offramp.errors import ConfigError
from offramp.exits.schedules import loss_schedule
from offramp.studies.study.plan import STANDARD, Recipe, Study
from offramp.studies.study.run import StudyRun, StudyText
from offramp.training.config import TrainConfig
from offramp.training.loop import new_model


def plan_runs(study: Study, text: StudyText) -> list[StudyRun]:
    """The runs of a study, seed by seed."""
    recipes = (*static_recipes(study), *study.recipes)
    runs = [
        StudyRun(
            label=recipe.label,
            text=text,
            tokenizer=study.tokenizer,
            test_tokens=study.test_tokens,
            measures=study.measures,
            gates=study.gates,
            decoding=study.decoding,
            model=replace(study.model, **recipe.model),
            specialise=None if recipe.specialise is None else replace(recipe.specialise, seed=seed),
            training=_training(study, recipe, seed),
        )
        for seed in range(study.seeds)
        for recipe in recipes
    ]
    if len(counts := sorted({run.tokens for run in runs})) > 1:
        raise ConfigError(
            f"tokens: expected a number that is a multiple of every recipe's batch_size x seq_len, "
            f"got {study.tokens:,}, which they round up to {counts[0]:,} or {counts[-1]:,}"
        )
    return runs


def _training(study: Study, recipe: Recipe, seed: int) -> TrainConfig:
    """The options of a run: the recipe's, for the study's tokens."""
    config = replace(study.training, **recipe.training)
    steps = math.ceil(study.tokens / (config.batch_size * config.seq_len))
    warmup = config.warmup_steps
    if "warmup_steps" not in recipe.training:
        warmup = min(warmup, steps // 4)
    return replace(config, warmup_steps=warmup, steps=steps, seed=seed)


def static_recipes(study: Study) -> list[Recipe]:
    """The models without exits: plain ones, then those that share keys and values.

    The deepest are the first. A model with a source of s needs more than s + 1 layers: with s + 1
    it is a plain one.
    """
    plain = [
        Recipe(
            label=STANDARD if layers == study.model.num_hidden_layers else f"static {layers}",
            model={"num_hidden_layers": layers, "exit_layers": ()},
        )
        for layers in sorted(study.static_layers, reverse=True)
    ]
    shared = [
        Recipe(
            label=f"static {layers}, source {source}",
            model={
                "num_hidden_layers": layers,
                "exit_layers": (),
                "kv_source_layer": source,
                "upper_intermediate_size": study.shared_upper,
            },
        )
        for layers, source in sorted(study.shared_static, reverse=True)
    ]
    return [*plain, *shared]


def check_runs(runs: Sequence[StudyRun]) -> int:
    """Raise before any work what a run would raise; returns the size of the vocabulary."""
    tokenizer, *_ = runs[0].tokenised()
    vocab_size = vocabulary_size(tokenizer)
    check_recipes(runs, vocab_size)
    return vocab_size


def check_recipes(runs: Sequence[StudyRun], vocab_size: int) -> None:
    """Raise a ConfigError, before any work, where a run's recipe would raise one."""
    for run in {run.label: run for run in runs}.values():  # seeds differ in nothing else
        try:
            loss_schedule(
                run.training,
                total_steps=run.training.steps or 0,
                num_layers=run.model.num_hidden_layers,
                exit_layers=run.model.exit_layers,
            )
            _check_specialised(run, vocab_size)
        except ConfigError as error:  # of a field that the user may never have set
            raise ConfigError(
                f"recipe {run.label!r}, {run.tokens:,} training tokens a run: {error}"
            ) from None


def _check_specialised(run: StudyRun, vocab_size: int) -> None:
    """Raise what specialising the exits of a run would raise after its training."""
    if run.specialise is None:
        return
    model = new_model(replace(run.model, vocab_size=vocab_size), seed=0)
    model = with_own_heads(model, seed=0, add=run.specialise.add_exits)
    check_specialise(model, run.specialise, context=(run.training.seq_len + 1) / 2)
