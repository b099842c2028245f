"""From a corpus to a model folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer
from torch import Tensor

from offramp.cache import cache_folder
from offramp.commands.train_run import (
    NOBODY,
    StoredRun,
    TrainRun,
    Watcher,
    check_tokenizer,
    resolve,
    stored_run_file,
)
from offramp.data import (
    StreamedCorpus,
    TokenShards,
    count_unknown,
    make_tokenizer,
    stream_corpus,
    tokenise,
    vocabulary_size,
)
from offramp.data.hub import one_line
from offramp.data.tokenizer import TOKENIZER_FILE, save_tokenizer
from offramp.environment import environment
from offramp.errors import CheckpointError, ConfigError, CorpusError
from offramp.files import file_sha256, remove, write_json, writing
from offramp.folders import locked, new_folder, remove_temporary, sync_tree
from offramp.models.model_files import FINISHED, UNFINISHED
from offramp.models.native.checkpoint import save_checkpoint
from offramp.models.native.decoder import Transformer
from offramp.reading import read_json
from offramp.training.checkpoint import Checkpoints
from offramp.training.distributed import Processes, check_processes, join, whole_model
from offramp.training.loop import Progress, TrainResult, new_model, train
from offramp.training.tracking import RunLog, check_tracker
from offramp.training.validation import Validation
from offramp.version import __version__

METRICS = "metrics.csv"
"""The file of a run's figures against the step."""


def start_run(
    run: TrainRun, out: Path, *, device: str = "cpu", watcher: Watcher = NOBODY
) -> TrainResult:
    """Train a native decoder on a corpus into a new folder.

    ``out`` gets the best parameters by validation as soon as they are known
    (``model.safetensors``, ``config.json``, ``tokenizer.json``), the last in ``last/``, and
    checkpoints to resume from in ``checkpoints/``. Until the run is finished it holds
    ``unfinished.json``, all that ``resume_run`` needs. A tracker writes into ``logs/``.

    Of several processes (see ``training.train``) rank 0 reads the corpus first and writes all
    files; every one of them calls the watcher.
    """
    run = resolve(run)
    check_tracker(run.tracker)
    processes = join(device)
    check_processes(run.training, processes)
    corpus = processes.main_first(lambda: stream_corpus(run.corpus))
    tokenizer = processes.on_main(lambda: make_tokenizer(run.tokenizer, corpus.train))
    shape = replace(
        run.model,
        vocab_size=vocabulary_size(tokenizer),
        max_position_embeddings=max(run.model.max_position_embeddings, run.training.seq_len),
    )
    run = replace(run, model=shape)
    tokens = processes.main_first(lambda: _tokens(run, corpus, tokenizer))
    model = _new_model(run)  # before a folder is claimed

    existed = out.exists()

    def claim() -> None:
        with new_folder(out) as folder:
            save_tokenizer(tokenizer, folder)
            written = file_sha256(folder / TOKENIZER_FILE)
            begun = StoredRun(run=run, corpus_sha256=corpus.sha256, tokenizer_sha256=written)
            write_json(folder / UNFINISHED, asdict(begun))

    processes.on_main(claim)
    try:
        with _held(out, processes):
            return _train(run, model, out, corpus, tokenizer, *tokens, processes, watcher)
    except BaseException:
        if processes.is_main and not worth_keeping(out):
            for path in out.iterdir() if existed else (out,):
                remove(path)
        raise


def _new_model(run: TrainRun) -> Transformer:
    """Make the model of a run. Raises ConfigError if it does not fit the memory."""
    try:
        with torch.device("meta"):  # takes no memory
            values = sum(each.numel() for each in Transformer(run.model).parameters())
        needed = 4 * values
        if needed > (there := psutil.virtual_memory().total + psutil.swap_memory().total):
            raise ConfigError(
                f"model: expected one that fits the memory of {there:,} bytes, got {values:,} "
                f"parameters of {needed:,} bytes"
            )
        return new_model(run.model, seed=run.training.seed)
    except (RuntimeError, TypeError, OverflowError) as error:  # of sizes beyond 64 bits, too
        raise ConfigError(
            f"model: expected one that fits the memory, got: {one_line(error)}"
        ) from None


def resume_run(
    out: Path, *, steps: int | None = None, device: str = "cpu", watcher: Watcher = NOBODY
) -> TrainResult:
    """Continue a run that was stopped or killed, from its newest whole checkpoint.

    ``steps`` gives the run another length in steps; a finished run continues with it, too.
    Raises CheckpointError if there is no such run, or if corpus or tokenizer have changed.
    """
    stored = stored_run_file(out, steps)
    run = stored.run
    if steps is not None:
        run = replace(run, training=replace(run.training, steps=steps, epochs=None))
    check_tracker(run.tracker)
    processes = join(device)
    check_processes(run.training, processes)
    corpus = processes.main_first(lambda: stream_corpus(run.corpus))
    if corpus.sha256 != stored.corpus_sha256:
        raise CheckpointError(
            f"{run.corpus}: expected the corpus that the run began with, sha256 "
            f"{stored.corpus_sha256}, got {corpus.sha256}"
        )
    check_tokenizer(out / TOKENIZER_FILE, stored)
    tokenizer = make_tokenizer(str(out / TOKENIZER_FILE), "")
    tokens = processes.main_first(lambda: _tokens(run, corpus, tokenizer))
    model = new_model(run.model, seed=run.training.seed)
    with _held(out, processes):
        stored_run_file(out, steps)  # another process may have finished it
        processes.on_main(lambda: remove_temporary(out, out / "checkpoints"))
        if steps is not None:
            content = asdict(replace(stored, run=run))
            processes.on_main(lambda: write_json(out / UNFINISHED, content))
        return _train(run, model, out, corpus, tokenizer, *tokens, processes, watcher)


@contextmanager
def _held(out: Path, processes: Processes) -> Iterator[None]:
    """Lock a run's folder; an error after which the run can continue says how."""
    with ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(locked(out)))
        try:
            yield
        except CheckpointError as error:
            if not worth_keeping(out):
                raise
            raise CheckpointError(
                f"{error}; resume with: offramp train --resume {quote(str(out))}"
            ) from None


def worth_keeping(out: Path) -> bool:
    """Whether a run's folder holds a model, or a checkpoint after the first step."""
    kept = Checkpoints(folder=out / "checkpoints").paths()
    return (out / "config.json").exists() or any(path.name > "step-00000000" for path in kept)


def _tokens(
    run: TrainRun, corpus: StreamedCorpus, tokenizer: Tokenizer
) -> tuple[TokenShards, Tensor]:
    """Training tokens, on disk, and validation ids; refused where there are too few."""
    shards, validation = (
        tokenise(text, tokenizer, cache_folder("tokens"))
        for text in (corpus.train, corpus.validation)
    )
    needed = run.training.seq_len * run.training.batch_size + 1
    if len(shards) < needed or len(validation) < 2:
        raise CorpusError(
            f"{run.corpus}: expected at least {needed} training tokens (one batch of "
            f"{run.training.batch_size} x {run.training.seq_len}) and 2 to validate, "
            f"got {len(shards)} and {len(validation)}"
        )
    return shards, validation.read(0, len(validation))


def _train(
    run: TrainRun,
    model: Transformer,
    out: Path,
    corpus: StreamedCorpus,
    tokenizer: Tokenizer,
    train_tokens: TokenShards,
    validation_ids: Tensor,
    processes: Processes,
    watcher: Watcher,
) -> TrainResult:
    if processes.size == 1:  # else training moves it, whole or in shards
        model = model.to(processes.device)
    about = _about(run, corpus, tokenizer, len(train_tokens), validation_ids, processes)
    log = RunLog(
        run.tracker if processes.is_main else "none",
        out / "logs",
        run.training,
        metrics=out / METRICS if processes.is_main else None,
    )

    def on_step(progress: Progress) -> None:
        log.on_step(progress)
        watcher.on_step(progress)

    def on_validation(validation: Validation) -> None:
        if validation.is_best:
            best = whole_model(model, processes, make=lambda: Transformer(model.config))
            processes.on_main(lambda: _save(best, out, about, validation))
        log.on_validation(validation)
        watcher.on_validation(validation)

    try:
        result = train(
            model,
            train_tokens,
            validation_ids,
            run.training,
            on_step=on_step,
            on_validation=on_validation,
            on_damaged=watcher.on_damaged,
            should_stop=watcher.should_stop,
            checkpoints=Checkpoints(folder=out / "checkpoints", keep=run.training.keep_checkpoints),
        )
    finally:
        log.close()
    if result.finished:
        last = whole_model(model, processes, make=lambda: Transformer(model.config))
        processes.on_main(lambda: _finish(last, out, tokenizer, about, result))
    return result


def _about(
    run: TrainRun,
    corpus: StreamedCorpus,
    tokenizer: Tokenizer,
    train_tokens: int,
    validation_ids: Tensor,
    processes: Processes,
) -> dict[str, Any]:
    """What config.json says of the run beside the model's own config."""
    return {
        "training": asdict(run.training),
        "tokenizer": run.tokenizer,
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "split": corpus.split,
            "train_tokens": train_tokens,
            "validation_tokens": len(validation_ids),
            "unknown_validation_tokens": count_unknown(tokenizer, validation_ids),
        },
        "environment": {**environment(str(processes.device)), "processes": processes.size},
        "offramp_version": __version__,
    }


def _finish(
    model: Transformer, out: Path, tokenizer: Tokenizer, about: dict[str, Any], result: TrainResult
) -> None:
    """Write ``last/``, and rename ``unfinished.json``; a run that is stopped here can resume."""
    aside = out / ".last.tmp"
    try:
        with writing(out):
            remove(aside)
            aside.mkdir()
            save_tokenizer(tokenizer, aside)
            _save(model, aside, about, result.validations[-1])
            sync_tree(aside)
            remove(out / "last")
            aside.rename(out / "last")
    finally:
        remove(aside)
    described = read_json(out / "config.json")
    if described["training"] != about["training"]:  # the run was extended
        write_json(out / "config.json", {**described, "training": about["training"]})
    with writing(out):
        (out / UNFINISHED).replace(out / FINISHED)


def _save(model: Transformer, folder: Path, about: dict[str, Any], validation: Validation) -> None:
    where = {"step": str(validation.step), "validation_score": repr(validation.score)}
    save_checkpoint(model, folder, about=about, weights_about=where)
