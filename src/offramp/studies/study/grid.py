"""Which runs a study needs: every recipe and every static model with every seed."""

import math
from collections.abc import Sequence
from dataclasses import replace

from offramp.data import vocabulary_size
from offramp.errors import ConfigError
from offramp.exits.schedules import loss_schedule
from offramp.studies.study.plan import STANDARD, Recipe, Study
from offramp.studies.study.run import StudyRun, StudyText


def plan_runs(study: Study, text: StudyText) -> list[StudyRun]:
    """The runs of a study, seed by seed."""
    tokens_a_step = study.training.batch_size * study.training.seq_len
    steps = math.ceil(study.tokens / tokens_a_step)
    warmup = min(study.training.warmup_steps, steps // 4)
    recipes = (*static_recipes(study), *study.recipes)
    return [
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
            training=replace(
                study.training,
                **{"warmup_steps": warmup, **recipe.training, "steps": steps, "seed": seed},
            ),
        )
        for seed in range(study.seeds)
        for recipe in recipes
    ]


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
    for run in runs:
        try:
            loss_schedule(
                run.training,
                total_steps=run.training.steps or 0,
                num_layers=run.model.num_hidden_layers,
                exit_layers=run.model.exit_layers,
            )
        except ConfigError as error:  # of a field that the user may never have set
            raise ConfigError(
                f"tokens: expected enough for the recipe {run.label!r}, got {run.tokens:,} a run: "
                f"{error}"
            ) from None
    return vocabulary_size(tokenizer)
