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
from offramp.calibration.thresholds import StoredThresholds, load_thresholds
from offramp.commands import calibrate, confidence, generate, sweep
from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.row import BenchRow
from offramp.commands.bench.run import run_bench
from offramp.commands.engine import TextEngine
from offramp.commands.on_generation.certify import certify_texts
from offramp.errors import ConfigError
from offramp.evaluation.sweep import SweepRow, Threshold
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.generate import Generation
from offramp.models.base import EarlyExitModel
from offramp.models.bos import Bos
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.model_files import find_model
from offramp.models.native.schemes import Scheme
from offramp.models.open import OpenedModel, open_in_memory, open_model
from offramp.models.save import save_model
from offramp.options import config_of
from offramp.report.progress import call_bar
from offramp.report.result import ResultTable

Corpus = str | Path
"""A path of a text or a folder, or ``pangram``, ``python-docs`` or ``hf:DATASET``."""


class EarlyExitLM:
    """A language model with exits. ``load``, ``train`` and ``tune`` make it.

    Figures are under ``missing_kv="recompute"``, except those of ``generate`` and ``bench``. Where
    all exits are complete, both are the same, and results state "exact".
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
            **options: Fields of ``GenerateConfig``, such as ``max_new_tokens``, ``confidence``,
                ``missing_kv``, ``speculative``, ``temperature``, ``top_p`` or ``seed``.

        Raises:
            ConfigError: An option is unknown or out of range, or the prompt does not fit.
            CertificateError: The certificate is another model's.
        """
        config = self._generate_config(threshold, certificate, **options)
        return generate.generate(self._opened, prompt, config, chat=chat)

    def engine(self, **options: Any) -> TextEngine:
        """Make an engine for many requests at once; ``options`` are fields of ``EngineConfig``."""
        config = config_of(EngineConfig, options)
        return TextEngine(self._opened, config, configured=self._generate_config)

    def _generate_config(
        self, threshold: Any = None, certificate: Any = None, **options: Any
    ) -> GenerateConfig:
        config = config_of(GenerateConfig, {**options, "threshold": threshold})
        if certificate is None:
            return config
        _refuse("with a certificate, which has its own", threshold=threshold)
        _refuse("with a certificate, which names it", confidence=options.get("confidence"))
        _refuse("with a certificate, whose thresholds hold", decay=options.get("decay"))
        stored, kv = self._stored(certificate), options.get("missing_kv")
        return generate.with_thresholds(config, stored, missing_kv=kv, model=self.model)

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
            _refuse("with a certificate, which has its own", thresholds=thresholds)
            _refuse("with a certificate, which names it", confidence=confidence)
        if thresholds is not None and not isinstance(thresholds, Sequence):
            thresholds = [thresholds]
        stored = None if certificate is None else self._stored(certificate)
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

    def _stored(self, certificate: Certificate | str | Path) -> StoredThresholds:
        stored = (
            StoredThresholds.of(certificate)
            if isinstance(certificate, Certificate)
            else load_thresholds(Path(certificate))
        )
        stored.require_model(self.sha256, weights=self._opened.weights)
        stored.require_bos(bool(self._opened.first_tokens))
        stored.warn_of_dtype(self._opened.precision)
        return stored


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
            Hugging Face checkpoint, a name on the hub, ``smollm2-135m``, or a causal language
            model of ``transformers`` in memory, whose parameters are shared.
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
        _refuse("with a model in memory, which has them", base=base, device=device, dtype=dtype)
        _refuse("with a model in memory, which can be saved and loaded with them", weights=weights)
        opened = open_in_memory(model, tokenizer, exit_layers=layers, exit_head=exit_head)
        return EarlyExitLM(opened.with_bos(bos))
    _refuse("with a name or folder, which has its own", tokenizer=tokenizer)
    files = find_model(model, base=base)
    if files.kind != "checkpoint":
        _refuse(f"since {model} has exits", exits=layers, exit_head=exit_head)
    opened = open_model(
        files,
        exit_layers=layers,
        exit_head=exit_head,
        device=device or "cpu",
        dtype=dtype,
        weights=weights,
    )
    opened = opened.with_bos(bos)
    opened.warn_of_bos()
    return EarlyExitLM(opened)


def exit_layers_of(exits: Iterable[int] | int | None) -> tuple[int, ...] | None:
    """Exit layers as a tuple; a single layer may be given as a number."""
    if exits is None:
        return None
    layers = (exits,) if isinstance(exits, int) else tuple(exits)
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ConfigError(f"exits: expected a list of whole numbers, got {exits!r}")
    return layers


def _refuse(why: str, **given: Any) -> None:
    """Raise a ConfigError for an argument that would be ignored."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name}: expected none {why}, got {value!r}"[:300])
