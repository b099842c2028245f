"""The measured time of decoding of a study's models, beside their PPL.

The models of the first seed decode the test text, all in turns in each round: the standard model,
the static ones, and each recipe at full depth and at a few policies of its frontier, under the
cache that decodes. The models know fewer positions than a prompt has, so they are timed with more
positions, which have no parameters, and tokens leave at the exits that the policy chose in windows
of the training length (``ReplayedExits``). Their PPL is that of the frontiers.
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from offramp.environment import environment
from offramp.evaluation.cost import model_cost
from offramp.evaluation.routed import collect_routed
from offramp.generation.decoding_time import (
    DecodingTime,
    ReplayedExits,
    decoding_time,
    representative_exits,
)
from offramp.generation.exit_rule import ExitRule
from offramp.models.fitted import FITTED_FILE, load_fitted
from offramp.models.native.checkpoint import load_checkpoint
from offramp.models.native.decoder import Transformer
from offramp.report.decoding_times import DecodedPolicy, DecodingTimes
from offramp.report.study_json import read_times
from offramp.studies.study.done import Done
from offramp.studies.study.evaluate import policy_at
from offramp.studies.study.frontier import FrontierKey
from offramp.studies.study.plan import STANDARD
from offramp.studies.study.run import StudyRun
from offramp.studies.study.timing import TIMES

PROMPT_TOKENS, NEW_TOKENS = 512, 32
BATCHES = (1, 8)
"""Texts in a batch."""
BUDGETS = (40.0, 50.0, 60.0, 70.0, 80.0)
"""The policies that are timed are those nearest to these flops_pct."""
ROUNDS, MOST_SECONDS, MOST_SHARE = 5, 100.0, 0.05
"""After the first round, a further one begins only before this many seconds, and before this share
of the seconds that the runs took."""
_WINDOWS = 16
"""Windows of the test text in which the exits of a policy are found."""

OnDecoding = Callable[[int, int, int], None]
"""Called with the number of policies, of prompt tokens and of new tokens."""


def decoding_times(
    runs: Sequence[StudyRun], folder: Path, out: Path, *, threads: int, on_decoding: OnDecoding
) -> DecodingTimes | None:
    """The times that ``timing.json`` in ``out`` keeps, or else those of now.

    None where the static models were not timed either, because every run was kept already, and
    where ``time_decoding`` has no weights.
    """
    if not (out / TIMES).exists() or not (kept := read_times(out / TIMES)).static:
        return None
    return kept.decoding or time_decoding(runs, folder, threads=threads, on_decoding=on_decoding)


def time_decoding(
    runs: Sequence[StudyRun], folder: Path, *, threads: int, on_decoding: OnDecoding
) -> DecodingTimes | None:
    """Time the models of the first seed; None where one has no weights or gates in ``folder``.

    Runs that were trained on another machine, or by an earlier version, have none.
    """
    done = [Done(run=run, folder=folder / run.name) for run in runs]
    mine = [entry for entry in done if entry.seed == runs[0].training.seed]
    if not all(_has_parameters(entry) for entry in mine):
        return None
    start = time.perf_counter()
    spent = sum(sum(entry.timing.seconds.values()) for entry in done)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        *_, test = runs[0].tokenised()
        text = TimedText.of(test, runs[0].training.seq_len)
        timed = [point for entry in mine for point in _timed(entry, done, text)]
        on_decoding(len(timed), text.prompt_tokens, text.new_tokens)
        for point in timed:
            point.decode(text, 1)  # a first call, which prepares what later calls reuse
        limit = start + min(MOST_SECONDS, MOST_SHARE * spent)
        rounds = 0
        while rounds == 0 or (rounds < ROUNDS and time.perf_counter() < limit):
            for batch in BATCHES:
                for point in timed:
                    point.samples[batch].append(point.decode(text, batch))
            rounds += 1
        about = {"cores": os.cpu_count(), **environment("cpu")}
    finally:
        torch.set_num_threads(before)
    standard = next(point for point in timed if point.label == STANDARD)
    return DecodingTimes(
        prompt_tokens=text.prompt_tokens,
        new_tokens=text.new_tokens,
        rounds=rounds,
        seconds=time.perf_counter() - start,
        environment=about,
        policies=tuple(point.figures(standard) for point in timed),
    )


def _has_parameters(entry: Done) -> bool:
    needed = ["model.safetensors"]
    if not entry.is_static and "gain" in entry.run.measures[:1]:
        needed.append(FITTED_FILE)
    return all((entry.folder / name).exists() for name in needed)


@dataclass(frozen=True, kw_only=True)
class TimedText:
    """The texts to decode, and windows of the training length."""

    texts: Int[Tensor, "B T"]
    "As many texts as the largest batch, at equal distances in the test text."
    windows: Int[Tensor, "W T"]
    prompt_tokens: int

    @property
    def new_tokens(self) -> int:
        """Tokens that are decoded after each prompt."""
        return self.texts.shape[1] - self.prompt_tokens

    @classmethod
    def of(cls, ids: Int[Tensor, " N"], seq_len: int) -> "TimedText":
        """Cut the test text; a short one gives shorter prompts."""
        new = min(NEW_TOKENS, seq_len, len(ids) // 2)
        prompt = min(PROMPT_TOKENS, len(ids) - new)
        return cls(
            texts=_spread(ids, max(BATCHES), prompt + new),
            windows=_spread(ids, _WINDOWS, min(seq_len, len(ids))),
            prompt_tokens=prompt,
        )


def _spread(ids: Int[Tensor, " N"], count: int, length: int) -> Int[Tensor, "B T"]:
    """Return ``count`` pieces at equal distances."""
    starts = np.linspace(0, len(ids) - length, count).astype(int).tolist()
    return torch.stack([ids[start : start + length] for start in starts])


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A model at full depth or with a policy, and the times so far."""

    label: str
    model: Transformer
    flops_pct: float
    ppl: float
    rule: ExitRule | None = None
    "None at full depth."
    exits: NDArray[np.intp] | None = None
    "(W, T) Index of the exit of each token of the windows."
    missing_kv: str | None = None
    threshold: float = math.inf
    samples: dict[int, list[DecodingTime]] = field(default_factory=lambda: defaultdict(list))
    "One a round, by batch."

    def decode(self, text: TimedText, batch: int) -> DecodingTime:
        """Decode the first ``batch`` texts."""
        rule = self.rule
        if rule is not None and self.exits is not None:
            exits = representative_exits(
                self.exits, self.model.exit_layers, rows=batch, tokens=text.new_tokens
            )
            rule = ReplayedExits(**vars(rule), exits=exits)
        texts = text.texts[:batch]
        return decoding_time(self.model, texts, prompt_tokens=text.prompt_tokens, rule=rule)

    def figures(self, standard: "Timed") -> DecodedPolicy:
        """The medians over the rounds."""

        def middle(of: Callable[[DecodingTime], float]) -> dict[int, float]:
            return {batch: median(map(of, found)) for batch, found in self.samples.items()}

        def ratio(of: Callable[[DecodingTime], float]) -> dict[int, float]:
            return {
                batch: median(
                    of(a) / of(b) for a, b in zip(found, standard.samples[batch], strict=True)
                )
                for batch, found in self.samples.items()
            }

        return DecodedPolicy(
            label=self.label,
            early_exits=len(self.model.exit_layers) > 1,
            confidence=None if self.rule is None else self.rule.confidence,
            missing_kv=self.missing_kv,
            threshold=self.threshold,
            flops_pct=self.flops_pct,
            ppl=self.ppl,
            mean_layers=middle(_layers),
            tokens_per_s=middle(_speed),
            to_standard=ratio(_speed),
            first_token_s=middle(_first),
            first_to_standard=ratio(_first),
        )


def _layers(sample: DecodingTime) -> float:
    return sample.mean_layers


def _speed(sample: DecodingTime) -> float:
    return sample.tokens_per_s


def _first(sample: DecodingTime) -> float:
    return sample.first_seconds


def _timed(entry: Done, done: Sequence[Done], text: TimedText) -> Iterator[Timed]:
    """A model at full depth, and at policies of its frontier if it has early exits."""
    peers = [other for other in done if other.run.label == entry.run.label]
    standard = next(other for other in done if other.run.label == STANDARD).record.full_flops
    scale = entry.record.full_flops / standard
    full = Timed(
        label=entry.run.label,
        model=_with_positions(entry.folder, text.texts.shape[1]),
        flops_pct=100.0 * scale,
        ppl=fmean(other.record.exit_ppl[other.layers] for other in peers),
    )
    yield full
    if not entry.is_static:
        yield from _policies(full, entry, peers, scale=scale, windows=text.windows)


def _policies(
    full: Timed, entry: Done, peers: Sequence[Done], *, scale: float, windows: Int[Tensor, "W T"]
) -> Iterator[Timed]:
    """The model at the policies whose costs are nearest to the budgets."""
    run, measure = entry.run, entry.run.measures[0]
    keys = [
        FrontierKey(text="test", confidence=measure, missing_kv=kv) for kv in ("exact", "propagate")
    ]
    key = next(key for key in keys if key in entry.frontiers)
    curves = [other.frontiers[key].curve() for other in peers]
    flops_pct = scale * np.mean([flops for flops, _ in curves], axis=0)
    ppl = np.mean([np.exp(nll) for _, nll in curves], axis=0)
    fitted = load_fitted(entry.folder)
    context = (run.training.seq_len + 1) / 2
    costs = model_cost(full.model, context=context, fitted=fitted).flops_pct_by_exit(
        measure, missing_kv="propagate" if run.decoding else "recompute"
    )
    nearest = {1 + int(np.abs(flops_pct[1:-1] - budget).argmin()) for budget in BUDGETS}
    for place in sorted(nearest):
        threshold = float(entry.frontiers[key].thresholds[place])
        policy = policy_at(threshold, measure, costs)
        trace = collect_routed(
            full.model, [(windows, windows)], policy, confidence=measure, fitted=fitted
        )
        yield replace(
            full,
            flops_pct=float(flops_pct[place]),
            ppl=float(ppl[place]),
            rule=ExitRule(policy=policy, confidence=measure, fitted=fitted),
            exits=trace.exits.reshape(windows.shape),
            missing_kv=key.missing_kv,
            threshold=threshold,
            samples=defaultdict(list),
        )


def _with_positions(folder: Path, length: int) -> Transformer:
    """Load a model for sequences of this length; positions have no parameters."""
    model, _ = load_checkpoint(folder)
    config = model.config
    positions = max(length, config.max_position_embeddings)
    longer = Transformer(replace(config, max_position_embeddings=positions))
    longer.load_state_dict(model.state_dict())
    return longer.eval()
