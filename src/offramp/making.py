"""New models and studies from Python: ``offramp.train``, ``offramp.tune`` and ``offramp.study``.

Each does what the command of the same name does, by the same functions.
"""

import shutil
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from offramp.commands.train import start_run
from offramp.commands.train_run import TrainRun, Watcher
from offramp.commands.tune import open_for_tuning
from offramp.commands.tune import tune as tune_exits
from offramp.commands.tune_config import TuneConfig
from offramp.console import safe_console
from offramp.errors import ConfigError
from offramp.lm import Corpus, EarlyExitLM
from offramp.models.bos import Bos
from offramp.models.native.config import DecoderConfig
from offramp.models.open import open_in_memory, open_model
from offramp.options import check_processes, config_of, exit_layers_of
from offramp.report.progress import StudyBars, bars, call_bar
from offramp.report.result import ResultTable
from offramp.report.scale_result import ScaleResult, Size
from offramp.report.study_json import to_json
from offramp.report.study_result import Row
from offramp.studies.runs import default_jobs
from offramp.studies.study.chosen import run_chosen
from offramp.studies.study.config import StudyConfig
from offramp.studies.study.workers import Workers
from offramp.training.config import TrainConfig

_SHAPE = {
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "intermediate_size",
    "exits": "exit_layers",
    "kv_source": "kv_source_layer",
    "upper_hidden": "upper_intermediate_size",
    "max_length": "max_position_embeddings",
}
"""Short names of the decoder's fields, as on the command line."""


def train(
    corpus: Corpus,
    *,
    exits: Iterable[int] | int = (),
    tokenizer: str = "characters",
    out: str | Path | None = None,
    device: str = "cpu",
    progress: bool = False,
    **options: Any,
) -> EarlyExitLM:
    """Train a native decoder with exits on a text. Returns the best model by validation.

    Args:
        corpus: The text: a path, or ``pangram``, ``python-docs`` or ``hf:DATASET``.
        exits: Exit layers; the last layer is always one.
        tokenizer: ``characters``, ``bytes``, ``bpe:N``, or a Hugging Face tokenizer.
        out: Folder of the run, which must be new or empty. None trains in a temporary folder;
            ``save`` keeps the model.
        device: Where to compute.
        progress: Show a progress bar.
        **options: Flags of ``offramp train`` with underscores: the shape (``layers``, ``dim``,
            ``heads``, ...) and the training (``loss_weights``, ``steps``, ``lr``, ...).
    """
    options["exits"] = exit_layers_of(exits)
    named = {_SHAPE.get(name, name): value for name, value in options.items()}
    if len(named) < len(options):
        raise ConfigError(f"options: expected each once, got two names of one: {sorted(options)}")
    shape = {field.name for field in fields(DecoderConfig)} - {"vocab_size", "weight_format"}
    training = {name: value for name, value in named.items() if name not in shape}
    run = TrainRun(
        corpus=str(corpus),
        tokenizer=tokenizer,
        model=config_of(
            DecoderConfig, {name: value for name, value in named.items() if name in shape}
        ),
        training=config_of(TrainConfig, training, also=_SHAPE),
    )
    folder, keep = _new_folder(out)
    with call_bar("train", shown=progress) as show:
        watcher = Watcher(
            on_step=lambda step: (
                show(step.step, step.total_steps, f"loss {float(step.loss):.3f}")
                if progress and step.step % 10 == 0
                else None
            )
        )
        start_run(run, folder, device=device, watcher=watcher)
    return EarlyExitLM(open_model(folder, device=device), keep=keep)


def tune(
    model: Any,
    corpus: Corpus,
    *,
    exits: Iterable[int] | int | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    bos: Bos = "auto",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    **options: Any,
) -> EarlyExitLM:
    """Give a pretrained model exits and train them; its backbone stays as it is.

    With ``kv_source`` the backbone changes: all blocks above that layer then share keys and values.

    Args:
        model: A Hugging Face checkpoint (a folder, or a name on the hub), ``smollm2-135m``, or a
            causal language model of ``transformers`` in memory; with ``kv_source`` a checkpoint
            that the native decoder runs, or a folder of ``offramp train``.
        corpus: The text to train on; its last tokens are held out.
        exits: Exit layers; by default each quarter of the depth.
        tokenizer: The tokenizer of a model in memory.
        out: Folder for the exits, which must be new or empty. None uses a temporary folder;
            ``save`` keeps the model.
        bos: Whether the model's first token, such as BOS, begins every window: see ``load``.
        device: Where to compute; by default the CPU, or where a model in memory is.
        dtype: Precision; by default float32, or that of a model in memory.
        progress: Show a progress bar.
        **options: Fields of ``TuneConfig``, such as ``tokens``, ``epochs``, ``exit_head``,
            ``unfreeze`` or ``kv_source``.
    """
    layers = exit_layers_of(exits)
    config = config_of(TuneConfig, {**options, "exit_layers": layers})
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ConfigError("tokenizer: expected none with a name or folder, which has its own")
        opened = open_for_tuning(
            model, config, device=device or "cpu", dtype=dtype or torch.float32
        )
    else:
        if device is not None or dtype is not None:
            raise ConfigError("device, dtype: expected none with a model in memory, which has them")
        opened = open_in_memory(model, tokenizer, exit_layers=layers, exit_head=config.exit_head)
    folder, keep = _new_folder(out)
    with call_bar("tune", shown=progress) as show:
        tune_exits(
            opened.with_bos(bos),
            str(corpus),
            folder,
            config,
            on_progress=lambda state: show(state.done, state.total, state.doing),
        )
    return EarlyExitLM(open_model(folder, device=opened.model.device), keep=keep)


def study(
    name: str | Path | Mapping[str, Any],
    corpus: Corpus,
    *,
    out: str | Path,
    test: Corpus | None = None,
    runs: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = False,
    **options: Any,
) -> ResultTable[Row] | ResultTable[Size]:
    """Train a grid of recipes on the same tokens with several seeds, and compare them.

    The same call continues a study that was stopped. It starts worker processes, so a script
    calls it below ``if __name__ == "__main__":``.

    Args:
        name: Which study: ``objectives``, ``alpha``, ``middle``, ``exits``, ``heads``, ``kv`` or
            ``scale``; or a grid of your own: the path of a TOML file, or its content as a
            dictionary.
        corpus: The text to train on.
        out: Folder for ``study.json``, the tables, the plots and the runs.
        test: The text to report on; by default the corpus's test split, or its last 10%.
        runs: Folder of the runs, which studies may share; by default ``out/runs``.
        jobs: Processes that train at a time; by default one for each core.
        progress: Show progress bars.
        **options: ``seeds``, ``tokens`` and, of ``scale``, ``sizes``.
    """
    out = Path(out)
    chosen = {**options, "corpus": str(corpus), "test": None if test is None else str(test)}
    config = config_of(StudyConfig, chosen)
    check_processes(jobs=jobs)
    workers = Workers(
        folder=out / "runs" if runs is None else Path(runs), jobs=jobs or default_jobs()
    )
    console = safe_console(stderr=True, quiet=not progress)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    with bars(console) as drawn:
        result = run_chosen(name, config, out, watcher=StudyBars(drawn, say), workers=workers)
    if isinstance(result, ScaleResult):
        return ResultTable(rows=list(result.rows), content=to_json(result))
    return ResultTable(rows=list(result.rows), content=to_json(result))


class _TemporaryFolder:
    """A folder that is removed when the last model that was opened from it is."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="offramp-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _new_folder(out: str | Path | None) -> tuple[Path, _TemporaryFolder | None]:
    """The folder for a new model: ``out``, or a temporary one that the model keeps."""
    if out is not None:
        return Path(out), None
    keep = _TemporaryFolder()
    return keep.path / "model", keep
