"""``offramp reproduce``: every figure of the seed document beside a measured one.

The seed document is "Experiment 5 & 6: Asymmetric Auxiliary Loss Training" (in Japanese), which
builds on Elbayad et al. (2020), "Depth-Adaptive Transformer". Each method is trained with each
seed under the protocol behind the published figures. The traces of the best and the last epoch's
parameters on the validation text are kept; the tables (``tables``), findings and explanations
(``claims``) are array work on them.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from offramp.data import Corpus, load_corpus
from offramp.environment import environment
from offramp.errors import CheckpointError, CorpusError
from offramp.files import replacing, stored_fields, write_json
from offramp.folders import working_in
from offramp.models.native.config import DecoderConfig
from offramp.reading import read_json
from offramp.report import html, plots, reproduction_tables
from offramp.report.drawing import save_png
from offramp.report.result import write_csv
from offramp.studies.reproduce import claims, tables
from offramp.studies.reproduce.config import ReproduceConfig
from offramp.studies.reproduce.explanations import explanations
from offramp.studies.reproduce.grid import grid, more_methods
from offramp.studies.reproduce.methods import METHODS, Method, Study, load_study
from offramp.studies.reproduce.power import power
from offramp.studies.reproduce.published import THRESHOLD
from offramp.studies.reproduce.run import SeedRun, check_kept
from offramp.studies.runs import RunProgress, run_all
from offramp.training.config import TrainConfig
from offramp.version import __version__

TRAIN_CHARACTERS = 100_000
VALIDATION_CHARACTERS = 10_000
TEXT_EPOCHS = 2
PANGRAM_EPOCHS = 50  # early stopping ends a run long before
MARKER = "unfinished.json"


def cut(corpus: Corpus) -> Corpus:
    """The first 100,000 characters of the training text and 10,000 of the validation text."""
    lengths = (
        f"of these the first {min(TRAIN_CHARACTERS, len(corpus.train)):,} and "
        f"{min(VALIDATION_CHARACTERS, len(corpus.validation)):,} characters"
    )
    return replace(
        corpus,
        train=corpus.train[:TRAIN_CHARACTERS],
        validation=corpus.validation[:VALIDATION_CHARACTERS],
        split=corpus.split if corpus.name == "pangram" else f"{corpus.split}; {lengths}",
    )


def seed_model(method: Method) -> DecoderConfig:
    """The seed document's model; the vocabulary is the corpus's."""
    return DecoderConfig(
        vocab_size=1,
        hidden_size=64,
        num_hidden_layers=method.num_layers,
        num_attention_heads=4,
        intermediate_size=256,
        exit_layers=(1,),
        norm="post",
        max_position_embeddings=64,
    )


def seed_training(method: Method, *, seed: int, epochs: int) -> TrainConfig:
    """The seed document's training: batches in order, stopped at the first worse epoch."""
    return TrainConfig(
        loss_weights=method.loss_weights,
        epochs=epochs,
        seq_len=64,
        batch_size=32,
        lr=1e-3,
        grad_clip=1.0,
        patience=0,
        select_at=THRESHOLD if method.routed else None,
        shuffle=False,
        seed=seed,
    )


def plan_runs(
    corpus: Corpus, seeds: int, *, device: str, more: Sequence[Method] = ()
) -> list[SeedRun]:
    """Every method with every seed, seed by seed, so that a stopped study has complete seeds."""
    epochs = PANGRAM_EPOCHS if corpus.name == "pangram" else TEXT_EPOCHS
    return [
        SeedRun(
            name=f"{method.key}-seed{seed}",
            corpus=corpus,
            model=seed_model(method),
            training=seed_training(method, seed=seed, epochs=epochs),
            device=device,
        )
        for seed in range(seeds)
        for method in (*METHODS.values(), *more)
    ]


@runtime_checkable
class Watcher(Protocol):
    """Functions that a reproduction calls, so that the caller can show its progress."""

    def on_plan(self, missing: int, jobs: int) -> None:
        """The work begins: that many runs are to be trained, in that many processes."""

    def on_corpus(self, name: str, total: int) -> None:
        """A corpus begins, with that many runs."""

    def on_progress(self, progress: RunProgress) -> None:
        """A run has done some steps."""

    def on_done(self, name: str) -> None:
        """A run is finished."""


def reproduce(
    config: ReproduceConfig,
    out: Path,
    *,
    command: str,
    watcher: Watcher,
    jobs: int,
    threads: int = 1,
    device: str = "cpu",
    kept: Path | None = None,
) -> dict[str, Any]:
    """Train, measure and report; returns the content of ``results.json``.

    ``out`` gets results.json, tables.md and report.html, which are written after each corpus; if
    the study is interrupted, they cover the seeds that are complete. The runs go into ``kept``
    (default: ``out``/runs); those that are there already are not trained again. Raises
    CheckpointError if one of them is another run.
    """
    start = time.monotonic()
    more = more_methods(config.alphas)
    corpora = [(cut(load_corpus(name)), seeds) for name, seeds in config.plan()]
    planned = [
        (corpus, plan_runs(corpus, seeds, device=device, more=more)) for corpus, seeds in corpora
    ]
    for corpus, runs in planned:
        check_lengths(corpus, runs[0].training)
    with go_on_or_claim(out, config, corpora):
        places = [(kept or out / "runs") / Path(corpus.name).name for corpus, _ in planned]
        missing = [
            len(runs) - check_kept(runs, place)
            for (_, runs), place in zip(planned, places, strict=True)
        ]
        watcher.on_plan(sum(missing), jobs)
        ran_on = {**environment(device), "processes": jobs, "threads": threads}
        results = _empty_results(command, ran_on)

        def report(corpus: Corpus, folder: Path, seeds: Sequence[int]) -> None:
            study = load_study(corpus, folder, seeds, more)
            results["corpora"][corpus.name] = summarise(study, config.thresholds)
            results["seconds"] = round(time.monotonic() - start, 1)
            write_results(results, out)

        for (corpus, runs), folder in zip(planned, places, strict=True):
            watcher.on_corpus(corpus.name, len(runs))
            try:
                run_all(
                    runs,
                    folder,
                    jobs=jobs,
                    threads=threads,
                    on_progress=watcher.on_progress,
                    on_done=watcher.on_done,
                )
            except KeyboardInterrupt:
                if whole := whole_seeds(runs, folder):
                    report(corpus, folder, whole)
                raise
            report(corpus, folder, sorted({run.training.seed for run in runs}))
        (out / MARKER).unlink()
    return results


def _empty_results(command: str, ran_on: dict[str, Any]) -> dict[str, Any]:
    about = {"offramp_version": __version__, "command": command}
    return {**about, "corpora": {}, "environment": ran_on}


def check_lengths(corpus: Corpus, training: TrainConfig) -> None:
    """Raise CorpusError unless there is a batch to train on and one to validate on."""
    needed = training.seq_len * training.batch_size + 1
    for part, text in (("training", corpus.train), ("validation", corpus.validation)):
        if len(text) < needed:
            raise CorpusError(
                f"{corpus.name}: expected at least {needed} {part} characters "
                f"(one batch of {training.batch_size} x {training.seq_len}), got {len(text)}"
            )


@contextmanager
def go_on_or_claim(
    out: Path, config: ReproduceConfig, corpora: Sequence[tuple[Corpus, int]]
) -> Iterator[None]:
    """Make ``out``, or check that it holds an interrupted run with the same settings; lock it."""
    marker = out / MARKER
    options = stored_fields(config, ("corpus", "seeds", "quick"))
    mine = {
        "unfinished": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in options.items()
        },
        "corpora": {corpus.name: [corpus.sha256, seeds] for corpus, seeds in corpora},
        "offramp_version": __version__,
    }
    if marker.exists() and read_json(marker) != mine:
        raise CheckpointError(
            f"{out}: holds an unfinished run with other settings; give that run's own flags to "
            "continue it, or choose another --out"
        )
    with working_in(marker, mine):
        yield


def whole_seeds(runs: Sequence[SeedRun], folder: Path) -> list[int]:
    """The seeds for which every method is done."""
    missing = {run.training.seed for run in runs if not (folder / run.name).exists()}
    return sorted({run.training.seed for run in runs} - missing)


def summarise(study: Study, thresholds: Sequence[float] = ()) -> dict[str, Any]:
    """The content of results.json for one corpus."""
    return {
        "sha256": study.corpus.sha256,
        "protocol": tables.protocol(study),
        "power": power(study.corpus.name, len(study.seeds)),
        "tables": tables.all_tables(study),
        "grid": grid(study, thresholds),
        "findings": claims.findings(study),
        "explanations": explanations(study),
        "curves": tables.curves(study),
        "exit_ppl": tables.exit_ppl(study),
        "passages": tables.passages(study),
        "notes": tables.notes(study),
    }


def _lines(results: dict[str, Any], part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part of the results of every corpus, for a table of one."""
    for name, corpus in results["corpora"].items():
        rows = corpus[part]
        by_table = rows if isinstance(rows, dict) else {part: rows}
        for table, mine in by_table.items():
            yield from ({"corpus": name, "table": table, **row} for row in mine)


def write_results(results: dict[str, Any], out: Path) -> None:
    """results.json, CSV files, tables.md, plots and report.html, each whole or not at all."""
    write_json(out / "results.json", results)
    for part in ("tables", "curves", "findings"):
        write_csv(out / f"{part}.csv", list(_lines(results, part)))
    with replacing(out / "tables.md") as aside:
        aside.write_text(reproduction_tables.markdown(results), encoding="utf-8")
    for name, corpus in results["corpora"].items():
        save_png(plots.frontier(corpus), out / f"frontier-{Path(name).name}.png")
    html.write_report(results, out / "report.html")
