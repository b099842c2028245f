"""The Python front door: ``load``, and the model that it gives.

A method does what the command of the same name does, by the same functions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from offramp.calibration.certificate import Certificate
from offramp.calibration.promise import Promise
from offramp.commands import calibrate, confidence, generate, sweep
from offramp.commands.audit import AuditLog
from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.row import BenchRow
from offramp.commands.bench.run import run_bench
from offramp.commands.engine import TextEngine
from offramp.commands.evaluate.python import RunsTasks
from offramp.commands.on_generation.certify import certify_texts
from offramp.commands.push import Sweep, push_in_memory
from offramp.commands.push_config import PushConfig
from offramp.commands.upload import Pushed
from offramp.evaluation.sweep import SweepRow, Threshold
from offramp.generation.config import EngineConfig
from offramp.generation.generate import Generation
from offramp.models.base import EarlyExitModel
from offramp.models.bos import Bos
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.model_files import find_model
from offramp.models.native.schemes import Scheme
from offramp.models.open import OpenedModel, open_in_memory, open_model
from offramp.models.save import save_model
from offramp.options import config_of, exit_layers_of, refuse_given
from offramp.report.progress import call_bar
from offramp.report.result import ResultTable

Corpus = str | Path
"""A path of a text or a folder, or ``pangram``, ``python-docs`` or ``hf:DATASET``."""


class EarlyExitLM(RunsTasks):
    """A language model with exits. ``load``, ``train`` and ``tune`` make it.

    Figures are under ``missing_kv="recompute"``, except those of ``generate``, ``evaluate`` and
    ``bench``. Where all exits are complete, both are the same, and results state "exact".
    """

    def __init__(self, opened: OpenedModel, *, keep: object = None) -> None:
        self._opened = opened
        self._keep = keep  # a temporary folder lives as long as this

    def __repr__(self) -> str:
        return repr(self._opened).replace("OpenedModel", "EarlyExitLM")

    @property
    def model(self) -> EarlyExitModel:
        """The model itself, a ``torch.nn.Module``."""
        return self._opened.model

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, as the tokenizers library has it."""
        return self._opened.tokenizer

    @property
    def num_layers(self) -> int:
        """Number of blocks, L."""
        return self.model.num_layers

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers after which a token may exit, ascending; the last one is ``num_layers``."""
        return tuple(self.model.exit_layers)

    @property
    def exits_trained(self) -> bool:
        """Whether the exits were ever trained."""
        return self._opened.exits_trained

    @property
    def sha256(self) -> str:
        """Hash of weights, config, tokenizer and exits, which certificates name."""
        return self._opened.sha256

    def generate(
        self,
        prompt: str,
        *,
        threshold: Threshold | None = None,
        certificate: Certificate | str | Path | None = None,
        chat: bool = False,
        audit: AuditLog | None = None,
        **options: Any,
    ) -> Generation:
        """Continue a text. Iterate for tokens as they come, or take ``.text`` for all of it.

        Args:
            prompt: The text to continue.
            threshold: Confidence at which a token exits: a number for all exits, or one for
                each but the last. None runs every token through all layers. If no confidence is
                named and gain was fitted, gain decides: a threshold from 0 to 1 is the share of
                the last layer's probability that an exit must keep, below 0 it is in nats.
            certificate: Take the thresholds of this certificate, or of a file that
                ``offramp calibrate`` wrote.
            chat: Put the prompt into the model's chat template.
            audit: Also run a share of the exited tokens to the end; may keep a promise by it.
            **options: Fields of ``GenerateConfig``, such as ``max_new_tokens``, ``confidence``,
                ``missing_kv``, ``speculative``, ``temperature``, ``top_p`` or ``seed``.

        Raises:
            ConfigError: An option is unknown or out of range, or the prompt does not fit.
            CertificateError: The certificate is another model's.
        """
        config = generate.config_for(self._opened, threshold, certificate, **options)
        return generate.generate(self._opened, prompt, config, chat=chat, audit=audit)

    def engine(self, **options: Any) -> TextEngine:
        """Make an engine for many requests at once; ``options`` are fields of ``EngineConfig``."""
        return TextEngine(self._opened, config_of(EngineConfig, options))

    def sweep(
        self,
        text: Corpus,
        thresholds: Sequence[Threshold] | float | None = None,
        *,
        confidence: str | None = None,
        certificate: Certificate | str | Path | None = None,
        progress: bool = False,
    ) -> ResultTable[SweepRow]:
        """Measure PPL and cost of any number of thresholds, from one pass over a text."""
        if certificate is not None:
            refuse_given("with a certificate, which has its own", thresholds=thresholds)
            refuse_given("with a certificate, which names it", confidence=confidence)
        if thresholds is not None and not isinstance(thresholds, Sequence):
            thresholds = [thresholds]
        stored = None if certificate is None else generate.stored_for(self._opened, certificate)
        with call_bar("sweep", shown=progress) as on_tokens:
            content = sweep.sweep(
                self._opened,
                str(text),
                thresholds,
                confidence=confidence,
                stored=stored,
                on_tokens=on_tokens,
            )
        return ResultTable(rows=[SweepRow(**row) for row in content["rows"]], content=content)

    def fit(self, text: Corpus, *, progress: bool = False) -> "EarlyExitLM":
        """Fit gates (for ``confidence="gate"`` and ``"gain"``) and temperatures to a text.

        The model stays as it is. Returns the model with the gates; ``save`` keeps them.
        """
        with call_bar("fit", shown=progress) as on_gate:
            fitted = confidence.fit_to(self._opened, str(text), on_gate=on_gate)
        return EarlyExitLM(replace(self._opened, fitted=fitted), keep=self._keep)

    def certify(
        self,
        text: Corpus,
        *,
        confidence: str | None = None,
        progress: bool = False,
        **promise: Any,
    ) -> Certificate:
        """Find the boldest thresholds that keep a promise on texts like this one.

        Args:
            text: Text like that of later use, and not that of training.
            confidence: The measure whose thresholds are searched; by default gain if it was
                fitted, else max_prob.
            progress: Show a progress bar.
            **promise: Fields of the promise: ``epsilon`` (risk at most, default 0.02), ``delta``
                (how often it may fail, default 0.05), ``risk`` ("disagreement" or "nll-gap"),
                ``on`` ("generation" covers texts that the model writes, after prompts that are
                cut from the text, or the prompts of a .jsonl file; then also fields of
                ``WriteConfig``, such as ``max_new_tokens``, and ``risk`` is "divergence",
                "rouge-l" or "nll-gap"),
                ``method`` ("ltt" or "crc") and ``test`` ("auto", "betting",
                "empirical-bernstein" or "hoeffding-bentkus").
        """
        with call_bar("certify", shown=progress) as on_tokens:
            if promise.get("on") == "generation":
                return certify_texts(
                    self._opened, text, promise, confidence=confidence, on_prompt=on_tokens
                )
            kept = config_of(Promise, promise)
            certificate, _ = calibrate.certify(
                self._opened, str(text), kept, confidence=confidence, on_tokens=on_tokens
            )
        return certificate

    def bench(
        self, text: Corpus, *, progress: bool = False, **options: Any
    ) -> ResultTable[BenchRow]:
        """Time every way to decode on prompts from a text, in one interleaved run.

        ``options`` are fields of ``BenchConfig``, such as ``prompts``, ``max_new_tokens``,
        ``repeats``, ``weights`` or ``confidence``.
        """
        if isinstance(gguf := options.get("gguf"), Path):
            options["gguf"] = str(gguf)
        config = config_of(BenchConfig, options)
        with call_bar("bench", shown=progress) as on_run:
            content = run_bench(self._opened, str(text), config, on_run=on_run)
        return ResultTable(rows=[BenchRow(**row) for row in content["rows"]], content=content)

    def save(self, folder: str | Path) -> None:
        """Write the model into a new folder that ``load`` and every command read."""
        save_model(self._opened, folder)
        self._opened = replace(self._opened, name=str(folder), files=find_model(folder))

    def push_to_hub(
        self,
        name: str,
        *,
        sweep: Sweep | None = None,
        certificate: Certificate | str | Path | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Pushed:
        """Upload what ``save`` writes, and a model card, to the Hugging Face hub in one commit.

        Exits whose backbone is on the hub go without it. Names of local folders are left out.

        Args:
            name: OWNER/NAME, or OWNER/NAME@BRANCH. It is created if it is not there.
            sweep, certificate: Those of this model, or files of them, for the card.
            **options: Fields of ``PushConfig``, such as ``private``, ``token`` or ``license``.

        Raises:
            ConfigError: An option is unknown, or the hub allows no such name.
            CheckpointError: The backbone is only on this machine, or the hub refuses.
        """
        config = config_of(PushConfig, options)
        return push_in_memory(
            self._opened, name, config, sweep=sweep, certificate=certificate, bars=progress
        )


def load(
    model: Any,
    *,
    tokenizer: Any = None,
    exits: Iterable[int] | int | None = None,
    exit_head: ExitHeadKind | None = None,
    base: str | Path | None = None,
    bos: Bos = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: Scheme | None = None,
) -> EarlyExitLM:
    """Open a model with its exits.

    Args:
        model: A folder that ``offramp train``, ``tune`` or ``quantise`` wrote, the folder of a
            Hugging Face checkpoint, a name on the hub (NAME, or NAME@REVISION for a branch, a tag
            or a commit), ``smollm2-135m``, or a causal language model of ``transformers`` in
            memory, whose parameters are shared.
        tokenizer: The tokenizer of a model in memory.
        exits: Exit layers of a model that has none yet; by default each quarter of the depth.
        exit_head: What a new exit has of its own; by default nothing ("shared").
        base: The place of the backbone (a folder, or a name on the hub) of a folder of exits, if
            it was moved.
        bos: Whether the model's first token, such as BOS, begins every window and prompt: "yes",
            "no", or "auto", as the model was trained.
        device: Where to compute; by default the CPU, or where a model in memory is.
        dtype: Precision; by default that of the files, or of a model in memory.
        weights: "int8" or "int4" quantises the weights of attention, MLP and LM heads; ``dtype``,
            float32 or bfloat16, is then the precision of everything else. ``save`` keeps them.

    Raises:
        CheckpointError: Files are missing, damaged or changed.
        UnsupportedArchitectureError: The model is no decoder-only language model.
        ConfigError: An argument is out of range or does not fit the others.
    """
    layers = exit_layers_of(exits)
    if not isinstance(model, str | Path):
        held = "with a model in memory"
        refuse_given(f"{held}, which has them", base=base, device=device, dtype=dtype)
        refuse_given(f"{held}, which can be saved and loaded with them", weights=weights)
        opened = open_in_memory(model, tokenizer, exit_layers=layers, exit_head=exit_head)
        return EarlyExitLM(opened.with_bos(bos))
    refuse_given("with a name or folder, which has its own", tokenizer=tokenizer)
    files = find_model(model, base=base)
    if files.kind != "checkpoint":
        refuse_given(f"since {model} has exits", exits=layers, exit_head=exit_head)
    opened = open_model(
        files,
        exit_layers=layers,
        exit_head=exit_head,
        device=device or "cpu",
        dtype=dtype,
        weights=weights,
    ).with_bos(bos)
    opened.warn_of_bos()
    return EarlyExitLM(opened)
