"""``offramp study``: do what is missing of a study's runs, then summarise all of them."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from offramp.data import load_corpus
from offramp.environment import environment
from offramp.errors import CheckpointError, ConfigError, CorpusError
from offramp.exits.schedules import loss_schedule
from offramp.files import claim_marked, read_json, write_json
from offramp.report import study as report
from offramp.studies.cluster import check_cluster, run_on_ray
from offramp.studies.runs import RunProgress, run_all
from offramp.studies.study.answers import answers
from offramp.studies.study.config import StudyConfig, TextChoice
from offramp.studies.study.format import FORMAT
from offramp.studies.study.plan import STANDARD, Recipe, Study
from offramp.studies.study.run import HELD_OUT, StudyRun, StudyText
from offramp.studies.study.studies import STUDIES
from offramp.studies.study.summary import summarise
from offramp.studies.study.timing import timings
from offramp.version import __version__

SETTINGS = "settings.json"


class Watcher(Protocol):
    """What is told as a study goes on."""

    def on_plan(self, name: str, total: int, tokens: int) -> None:
        """So many runs begin, of so many training tokens in all."""

    def on_progress(self, progress: RunProgress) -> None:
        """A run goes on."""

    def on_done(self, name: str) -> None:
        """A run is finished."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who trains, and where the runs are kept."""

    folder: Path
    "Gets a folder for each run; studies may share it."
    jobs: int = 1
    "Processes at a time, of this machine."
    threads: int = 1
    "Of each run."
    ray: str | None = None
    "Address of a Ray cluster that does the runs instead."

    def check(self, runs: Sequence[StudyRun]) -> None:
        """Refuse what could not do the runs that are missing, or not keep them."""
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not there.is_dir():
            raise CheckpointError(f"{there}: expected a folder for the runs, got a file")
        if not os.access(there, os.W_OK):
            raise CheckpointError(f"{there}: expected a folder that can be written to")
        if self.ray is not None and any(not (self.folder / run.name).exists() for run in runs):
            check_cluster(self.ray, threads=self.threads)

    def do(self, runs: Sequence[StudyRun], watcher: Watcher) -> None:
        """Do what is missing of them.

        Figures do not depend on where, as far as processors and numbers of threads round alike.
        """
        if self.ray is not None:
            run_on_ray(
                runs,
                self.folder,
                address=self.ray,
                threads=self.threads,
                on_done=watcher.on_done,
            )
            return
        run_all(
            runs,
            self.folder,
            jobs=self.jobs,
            threads=self.threads,
            on_progress=watcher.on_progress,
            on_done=watcher.on_done,
        )


def run_study(
    study: Study, config: StudyConfig, out: Path, *, watcher: Watcher, workers: Workers
) -> dict[str, Any]:
    """Train what is missing, summarise; returns the content of ``study.json`` in ``out``.

    The same call goes on with a study that was stopped or killed.
    """
    text = study_text(config)
    study = replace(study, seeds=config.seeds or study.seeds, tokens=config.tokens or study.tokens)
    runs = plan_runs(study, text)
    check_runs(runs)
    settings = {
        "study": study.name,
        "seeds": study.seeds,
        "tokens": study.tokens,
        "text": text.about,
    }
    workers.check(runs)
    go_on_or_claim(out, settings)
    return finish_study(study, runs, out, watcher=watcher, workers=workers)


def finish_study(
    study: Study,
    runs: Sequence[StudyRun],
    out: Path,
    *,
    watcher: Watcher,
    workers: Workers,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train what is missing of the runs, and write what they say; ``about`` goes in beside it."""
    watcher.on_plan(study.name, len(runs), sum(run.tokens for run in runs))
    workers.do(runs, watcher)
    content: dict[str, Any] = {
        "study": study.name,
        "question": study.question,
        "text": runs[0].text.about,
        "offramp_version": __version__,
        **(about or {}),
        **summarise(study, runs, workers.folder),
    }
    content["answers"] = answers(study, content)
    write_json(out / "study.json", content)
    times = timings(runs, workers.folder, threads=workers.threads)
    write_json(out / "timing.json", times)
    report.write(content, times, out)
    made_with = {"jobs": workers.jobs, "threads": workers.threads, "ray": workers.ray}
    write_json(out / "environment.json", {**environment("cpu"), **made_with})
    return content


def study_named(name: str) -> Study:
    """The study of that name; a ConfigError names those there are."""
    if name not in STUDIES:
        raise ConfigError(f"study: expected one of {', '.join(STUDIES)}, got {name!r}")
    return STUDIES[name]


def study_text(config: TextChoice) -> StudyText:
    """Part the corpus into what trains, what is held out of it, and what is reported on."""
    corpus = load_corpus(config.corpus)
    if config.test is not None:
        other = load_corpus(config.test)
        whole = corpus.whole if corpus.test is None else corpus.train + corpus.validation
        test, where = other.whole, f"all of {Path(other.name).name}"
        sha256 = other.sha256
        if test and whole and (test in whole or whole in test):
            raise CorpusError(
                f"test: expected text that is not trained on, got {config.test}, which is part of "
                f"{config.corpus} or holds it"
            )
    elif corpus.test is not None:
        whole, test, where = corpus.train + corpus.validation, corpus.test, "the test split"
        sha256 = corpus.sha256
    else:
        whole, test, where = corpus.train, corpus.validation, "the last 10% of the corpus"
        sha256 = corpus.sha256
    cut = int(len(whole) * (1 - HELD_OUT))
    if not whole[:cut] or not test:
        raise CorpusError(f"{config.corpus}: expected text to train and to report on, got too few")
    return StudyText(
        train=whole[:cut],
        held_out=whole[cut:],
        test=test,
        about={
            "corpus": Path(corpus.name).name,
            "sha256": corpus.sha256,
            "test_sha256": sha256,
            "split": f"trained on the first {100 * (1 - HELD_OUT):g}% of the training text, "
            f"chosen on the rest of it, reported on {where}",
        },
    )


def check_runs(runs: Sequence[StudyRun]) -> int:
    """Refuse before any work what a run would refuse; returns their vocabulary's size."""
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
    return tokenizer.get_vocab_size()


def plan_runs(study: Study, text: StudyText) -> list[StudyRun]:
    """Every recipe and every static model with every seed, seed by seed."""
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
    """The models without exits, deepest first."""
    return [
        Recipe(
            label=STANDARD if layers == study.model.num_hidden_layers else f"static {layers}",
            model={"num_hidden_layers": layers, "exit_layers": ()},
        )
        for layers in sorted(study.static_layers, reverse=True)
    ]


def go_on_or_claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Make ``out``, or go on with what the same settings left there."""
    marker = out / SETTINGS
    mine = {"format": FORMAT, **settings}
    if not marker.exists():
        claim_marked(marker, mine)
        return
    stored = read_json(marker)
    if stored.get("format") != FORMAT:
        raise CheckpointError(
            f"{out}: expected a study of format {FORMAT}, got one of another offramp version, "
            f"of format {stored.get('format')}; choose another --out"
        )
    if stored != mine:
        keys = dict.fromkeys((*mine, *stored))
        different = [key for key in keys if stored.get(key) != mine.get(key)]
        raise CheckpointError(
            f"{out}: expected the same study to go on with, but {', '.join(different)} differ: "
            f"stored {[stored.get(key) for key in different]}, now "
            f"{[mine.get(key) for key in different]}; choose another --out"
        )
