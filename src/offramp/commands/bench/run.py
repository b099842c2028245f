"""One interleaved run of every method on the same prompts, and what the cost model says of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.methods import (
    LOOKUP_TOKENS,
    Batch,
    Method,
    Sample,
    economize_methods,
    hugging_face,
    own,
    plain_generation,
)
from offramp.data import batches, encode, load_corpus
from offramp.environment import environment
from offramp.errors import ConfigError, CorpusError, UnsupportedArchitectureError
from offramp.evaluation.clock import Clock, measure_bandwidth, measure_clock
from offramp.evaluation.trace import collect_trace
from offramp.generation.config import MISSING_KV, GenerateConfig
from offramp.generation.options import draft_exit
from offramp.models.huggingface.model import HuggingFaceModel
from offramp.models.native.decoder import Transformer
from offramp.models.native.llama import to_transformers
from offramp.models.open import OpenedModel

SLOW_BATCHES = 2
"""Prompts that a slow peer runs on, once each."""
_SEARCH = 7
"""Halvings of the range of thresholds; each takes a text."""
_QUANTILES = np.linspace(0.0, 1.0, 2**_SEARCH + 1)
_TRACED = 2048  # tokens


@dataclass
class _Timed:
    """A method and its samples, by batch."""

    method: Method
    samples: dict[int, list[Sample]] = field(default_factory=dict)

    @property
    def every(self) -> list[Sample]:
        return [sample for samples in self.samples.values() for sample in samples]


def run_bench(
    loaded: OpenedModel,
    corpus_name: str,
    config: BenchConfig,
    *,
    on_run: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> dict[str, Any]:
    """What ``offramp bench`` writes: a row for each method, and what the machine allows.

    ``on_run`` is told (runs done, runs in all, the method that is next).
    """
    prompts = _prompts(loaded, corpus_name, config)
    if config.thresholds and len(loaded.model.exit_layers) == 1:
        raise ConfigError("thresholds: expected a model with exits before its last layer, got none")
    if config.draft_exit is not None:
        asked = GenerateConfig(speculative=True, draft_exit=config.draft_exit)
        draft_exit(loaded.model, asked, loaded.fitted)
    device = loaded.model.device
    bandwidth = measure_bandwidth(device)
    measured = partial(
        measure_clock,
        loaded.model,
        context=config.prompt_tokens + config.max_new_tokens // 2,
        bandwidth=bandwidth,
        confidence=config.confidence,
        fitted=loaded.fitted,
        rows=config.batch_size > 1,
    )
    clock = measured()
    timed = [_Timed(method) for method in _methods(loaded, config, prompts)]
    plan = [
        (each, number)
        for repeat in range(config.repeats)
        for number in range(len(prompts))
        for each in timed
        if not each.method.slow or (repeat == 0 and number < SLOW_BATCHES)
    ]
    for each in timed:  # what is made at the first call is not timed
        if not each.method.slow:
            each.method.run(prompts[0])
    failed: dict[str, str] = {}
    for done, (each, number) in enumerate(plan):
        on_run(done, len(plan), each.method.name)
        if each.method.name in failed:
            continue
        try:
            sample = each.method.run(prompts[number])
        except Exception as error:  # another package may not fit the versions that are here
            if not each.method.foreign:
                raise
            failed[each.method.name] = str(error).partition("\n")[0]
        else:
            each.samples.setdefault(number, []).append(sample)
    timed = [each for each in timed if each.method.name not in failed]
    nobody = _nobody_leaves(loaded, config, prompts)
    full = next(each for each in timed if each.method.name == "full")
    clock = _pinned(_pinned(clock.faster(measured()), full.every), nobody)
    bandwidth = median((bandwidth, measure_bandwidth(device)))
    clock = replace(clock, bandwidth=bandwidth)
    return {
        "rows": [_row(each, timed, full, clock, loaded.model.num_layers) for each in timed],
        "bandwidth_gb_s": bandwidth / 1e9,
        "limit_tokens_per_s": bandwidth / clock.weights,
        "weights_gb": clock.weights / 1e9,
        "failed": failed,
        "parts": clock.about(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "untrained": not loaded.exits_trained,
        "config": asdict(config),
        "environment": environment(str(device)),
    }


def _prompts(loaded: OpenedModel, corpus_name: str, config: BenchConfig) -> list[Batch]:
    corpus = load_corpus(corpus_name)
    ids = encode(loaded.tokenizer, corpus.whole if corpus.test is None else corpus.test).tolist()
    if len(ids) < config.prompt_tokens:
        raise CorpusError(
            f"{corpus_name}: expected at least {config.prompt_tokens} tokens for a prompt, got "
            f"{len(ids)}"
        )
    longest = config.prompt_tokens + config.max_new_tokens - 1
    if longest > loaded.model.max_length:
        raise ConfigError(
            f"max_new_tokens: expected at most {loaded.model.max_length} tokens with the prompt, "
            f"the model's longest sequence, got {longest}"
        )
    space = (len(ids) - config.prompt_tokens) / max(1, config.prompts)
    starts = [int(space * number) for number in range(config.prompts)]
    prompts = [ids[start : start + config.prompt_tokens] for start in starts]
    size = config.batch_size
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def _methods(loaded: OpenedModel, config: BenchConfig, prompts: Sequence[Batch]) -> list[Method]:
    model, fitted, alone = loaded.model, loaded.fitted, config.batch_size == 1
    new = config.max_new_tokens
    early = model.exit_layers[:-1]
    draft = config.draft_exit if config.draft_exit is not None else (early[0] if early else 0)

    def ours(name: str, **options: Any) -> Method:
        return own(name, model, GenerateConfig(max_new_tokens=new, **options), fitted=fitted)

    methods = [ours("full")]
    thresholds = list(config.thresholds)
    if early and config.compute_pct is not None:
        thresholds.append(_threshold_for(config.compute_pct, loaded, config, prompts))
    for threshold in dict.fromkeys(thresholds):
        methods += [
            ours(
                f"exit@{threshold:g}:{kv}",
                threshold=threshold,
                missing_kv=kv,
                confidence=config.confidence,
            )
            for kv in MISSING_KV
        ]
    if early and alone:
        methods.append(ours(f"speculative@{draft}", speculative=True, draft_exit=draft))
    lm = _peer(loaded) if config.peers else None
    if lm is None:
        return methods
    methods.insert(0, hugging_face("hf", lm, new))
    if alone:
        lookup = hugging_face("hf_prompt_lookup", lm, new, prompt_lookup_num_tokens=LOOKUP_TOKENS)
        methods.insert(1, lookup)
    if alone and early:
        name = f"hf_early_exit@{draft}"
        methods.insert(2, hugging_face(name, lm, new, slow=True, assistant_early_exit=draft))
        methods += economize_methods(lm, new, draft_exit=draft, threshold=(thresholds or [0.9])[-1])
    return methods


def _peer(loaded: OpenedModel) -> Any:
    """The same model as transformers runs it; None where it has none of the kind."""
    if isinstance(loaded.model, HuggingFaceModel):
        return plain_generation(loaded.model.backbone)
    assert isinstance(loaded.model, Transformer)
    try:
        return plain_generation(to_transformers(loaded.model))
    except UnsupportedArchitectureError:
        return None


def _threshold_for(
    compute_pct: float, loaded: OpenedModel, config: BenchConfig, prompts: Sequence[Batch]
) -> float:
    """The threshold at which decoding runs about so much of the layers.

    Of the confidences at the exits on given text, as many as a binary search needs; each is tried
    on the first prompts, so that what counts is the text that the model writes.
    """
    model = loaded.model
    ids = torch.tensor([token for batch in prompts for prompt in batch for token in prompt])
    if len(ids) < 2:
        raise ConfigError("prompt_tokens: expected at least 2 with one prompt, got 1")
    length = min(config.prompt_tokens, len(ids) - 1)
    trace = collect_trace(
        model,
        batches(ids[: _TRACED + 1], seq_len=length, batch_size=4),
        measures=(config.confidence,),
        fitted=loaded.fitted,
    )
    ladder = np.quantile(trace.scores(config.confidence)[:-1], _QUANTILES)
    low, high = 0, len(ladder) - 1
    while high - low > 1:
        middle = (low + high) // 2
        method = own(
            "",
            model,
            GenerateConfig(
                max_new_tokens=config.max_new_tokens,
                threshold=float(ladder[middle]),
                confidence=config.confidence,
            ),
            fitted=loaded.fitted,
        )
        samples = [method.run(batch) for batch in prompts[:4]]
        run = sum(sample.work.layers_run for sample in samples if sample.work)
        share = 100.0 * run / model.num_layers / sum(sample.count for sample in samples)
        low, high = (low, middle) if share > compute_pct else (middle, high)
    return float(f"{ladder[low]:.4g}")


def _nobody_leaves(
    loaded: OpenedModel, config: BenchConfig, prompts: Sequence[Batch]
) -> list[Sample]:
    """Full depth with every exit asked: what asking takes."""
    if len(loaded.model.exit_layers) == 1:
        return []
    asked = GenerateConfig(
        max_new_tokens=config.max_new_tokens, threshold=math.inf, confidence=config.confidence
    )
    method = own("", loaded.model, asked, fitted=loaded.fitted)
    return [method.run(batch) for _ in range(2) for batch in prompts[:8]]


def _pinned(clock: Clock, samples: Sequence[Sample]) -> Clock:
    """The clock whose prediction of these runs at full depth is what was measured."""
    found = [
        clock.pinned(sample.work, sample.count, sample.seconds) for sample in samples if sample.work
    ]
    found.sort(key=lambda each: (each.token_seconds, each.question_seconds))
    return found[len(found) // 2] if found else clock


def _row(
    each: _Timed, timed: Sequence[_Timed], full: _Timed, clock: Clock, num_layers: int
) -> dict[str, Any]:
    rates = [sample.tokens_per_s for sample in each.every]
    worked = [(sample.work, sample.count) for sample in each.every if sample.work]
    count = sum(tokens for _, tokens in worked)
    drafted = sum(sample.drafted for sample in each.every)
    accepted = sum(sample.accepted for sample in each.every)
    predictions = [tokens / clock.seconds(work, tokens) for work, tokens in worked]
    identical = all(
        sample.tokens == full.samples[number][0].tokens
        for number, samples in each.samples.items()
        for sample in samples
    )
    peer = next((other for other in timed if other.method.name == "hf"), None)
    layers = sum(work.layers_run for work, _ in worked) / count if count else None
    return {
        "method": each.method.name,
        "tokens_per_s": {"median": median(rates), "min": min(rates), "max": max(rates)},
        "speedup_vs_hf": None if peer is None else _speedup(each, peer),
        "speedup_vs_full": _speedup(each, full),
        "speedup_vs_full_worst": min(_speedups(each, full)),
        "mean_layers": float(num_layers) if each is peer else layers,
        "acceptance_rate": accepted / drafted if drafted else None,
        "identical_to_greedy": identical,
        "predicted_tokens_per_s": median(predictions) if predictions else None,
        "first_token_s": median(sample.first_seconds for sample in each.every),
        "runs": len(rates),
    }


def _speedup(each: _Timed, other: _Timed) -> float:
    return median(_speedups(each, other))


def _speedups(each: _Timed, other: _Timed) -> list[float]:
    """Of each prompt: the median over its repeats of the ratio of two runs, side by side."""
    return [
        median(
            mine.tokens_per_s / theirs.tokens_per_s
            for mine, theirs in zip(samples, other.samples[number], strict=False)
        )
        for number, samples in each.samples.items()
    ]
