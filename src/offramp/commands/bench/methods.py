"""The ways to decode that ``offramp bench`` compares: offramp's own, and its peers'.

Every method decodes a batch of prompts to the same number of new tokens for each, and measures when
each row has its first token and when all are complete.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offramp.exits.gate import FittedExits
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate, generate_batch
from offramp.models.base import EarlyExitModel
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.work import Work

Batch = Sequence[Sequence[int]]
LOOKUP_TOKENS = 10
"""Drafted tokens of the prompt lookup of transformers, as in its documentation."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One batch decoded by one method."""

    tokens: list[list[int]]
    "New tokens, by row."
    seconds: float
    "Seconds from the moment when every row has its first token, to the end."
    first_seconds: float
    "Seconds before that, for the prompts."
    work: Work | None = None
    drafted: int = 0
    accepted: int = 0
    bandwidth: float | None = None
    "Bytes per second at which the machine read its memory in this round."
    prefill_seconds: float | None = None
    "Seconds until the first token of the longer prompt of this round, if it was timed."
    prefill_tokens: int = 0
    "Tokens of that prompt."

    @property
    def count(self) -> int:
        """Number of new tokens after the first one of each row."""
        return sum(len(row) - 1 for row in self.tokens)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all rows together, once every row has its first token."""
        return self.count / self.seconds

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Tokens a second of the longer prompt, until its first token; None without one."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to decode, and its name."""

    name: str
    run: Callable[[Batch], Sample]
    slow: bool = False
    "Whether it is a slow peer, which decodes two batches only."
    foreign: bool = False
    "Whether it is of another package, whose failure is reported and does not stop the run."
    weights: str = ""
    "The format of its weights."
    confidence: str | None = None
    "The confidence measure of its exits; None if it uses none."
    threshold: float | None = None
    "The threshold of its exits; None if it uses none."
    prefill: Callable[[Sequence[int]], float] | None = None
    "Returns the seconds until the first token of a prompt; None if it is as fast as full depth."
    ppl: Callable[[], float] | None = None
    "Returns its PPL on the text of the run; None if that is unknown."
    bytes_per_step: float | None = None
    """Bytes of weights that are read for the next token of every row; None if that is unknown, or
    follows from the work of the samples."""


def own(
    name: str,
    model: EarlyExitModel,
    config: GenerateConfig,
    *,
    fitted: FittedExits,
    **about: Any,
) -> Method:
    """One of offramp's own methods; ``about`` are more fields of ``Method``."""

    def run(batch: Batch) -> Sample:
        start = time.perf_counter()
        if len(batch) > 1:
            times: list[float] = []
            completions, work = generate_batch(
                model,
                batch,
                config,
                fitted=fitted,
                on_token=lambda *_: times.append(time.perf_counter()),
            )
            first = times[len(batch) - 1]
            tokens = [completion.ids for completion in completions]
            return _sample(tokens, start, first, time.perf_counter(), work=work)
        generation = generate(model, batch[0], config, fitted=fitted)
        next(generation)
        first = time.perf_counter()
        for _ in generation:
            pass
        return replace(
            _sample([generation.completion.ids], start, first, time.perf_counter()),
            work=generation.work,
            drafted=generation.drafted,
            accepted=generation.accepted,
        )

    return Method(name=name, run=run, **about)


def own_prefill(model: EarlyExitModel) -> Callable[[Sequence[int]], float]:
    """Return a function that times the first token of a prompt."""

    def prefill(prompt: Sequence[int]) -> float:
        start = time.perf_counter()
        next(generate(model, prompt, GenerateConfig(max_new_tokens=1)))
        return time.perf_counter() - start

    return prefill


def hugging_face(
    name: str, lm: Any, new_tokens: int, *, slow: bool = False, **options: Any
) -> Method:
    """``generate`` of transformers with these options; greedy, and no token ends a text."""

    def run(batch: Batch, new_tokens: int = new_tokens) -> Sample:
        ids, mask = _padded(batch, lm.device)
        watch = _Watch(ids.shape[1])
        start = time.perf_counter()
        with quiet(), _config_kept(lm):
            out = lm.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                stopping_criteria=[watch],
                **options,
            )
        end = time.perf_counter()
        return _sample(out[:, ids.shape[1] :].tolist(), start, watch.first, end, early=watch.tokens)

    def prefill(prompt: Sequence[int]) -> float:
        return run([prompt], 1).first_seconds

    return Method(name=name, run=run, slow=slow, foreign=True, prefill=prefill)


@contextmanager
def _config_kept(lm: Any) -> Iterator[None]:
    """Restore the model's config: where the early-exit assistant fails, it leaves fewer layers.

    offramp's own methods may run the same model.
    """
    configs = {id(each.config): each.config for each in lm.modules() if hasattr(each, "config")}
    before = [(config, dict(vars(config))) for config in configs.values()]
    try:
        yield
    finally:
        for config, content in before:
            vars(config).clear()
            vars(config).update(content)


def economize_installed() -> bool:
    """Whether the package ``economize`` is installed."""
    return importlib.util.find_spec("economize") is not None


def economize_methods(
    lm: Any, new_tokens: int, *, draft_exit: int, threshold: float
) -> list[Method]:
    """The methods of the package ``economize``: early-exit drafts and CALM."""
    import economize  # type: ignore[import-not-found]
    from economize.techniques.dynamic_depth import CalmConfig  # type: ignore[import-not-found]
    from economize.techniques.early_exit import EarlyExitConfig  # type: ignore[import-not-found]

    configs = {
        f"economize_early_exit@{draft_exit}": EarlyExitConfig(exit_layer=draft_exit, head="shared"),
        f"economize_calm@{threshold:g}": CalmConfig(threshold=threshold, min_layer=draft_exit),
    }
    return [
        _economize(name, partial(economize.apply, lm, config), new_tokens)
        for name, config in configs.items()
    ]


def _economize(name: str, attach: Callable[[], Any], new_tokens: int) -> Method:
    def run(batch: Batch) -> Sample:
        [prompt] = batch
        model = attach()
        try:
            ids = torch.tensor([list(prompt)])
            model.generate(ids, max_new_tokens=1, do_sample=False)
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=1, do_sample=False)
            first = time.perf_counter()
            out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
            end = time.perf_counter() - (first - start)  # without the second run of the prompt
        finally:
            detach = getattr(model, "detach", None)
            if detach is not None:
                detach()
        return _sample(out[:, len(prompt) :].tolist(), start, first, end)

    return Method(name=name, run=run, slow=True, foreign=True)


class _Watch:
    """A stopping criterion that stops nothing: it records when the first token was ready."""

    def __init__(self, prompt: int) -> None:
        self.prompt, self.first, self.tokens = prompt, 0.0, 0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self.first:
            self.first, self.tokens = time.perf_counter(), ids.shape[1] - self.prompt
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _padded(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, padded on the left."""
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, prompt in enumerate(batch):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def plain_generation(lm: Any) -> Any:
    """The model with a generation config in which no token ends a text."""
    lm.generation_config = transformers().GenerationConfig(pad_token_id=0, eos_token_id=None)
    return lm


def _sample(
    tokens: list[list[int]], start: float, first: float, end: float, **fields: Any
) -> Sample:
    early = fields.pop("early", 1)  # tokens that were ready together with the first
    new = len(tokens[0])
    seconds = end - start if early >= new else (end - first) * (new - 1) / (new - early)
    return Sample(tokens=tokens, seconds=seconds, first_seconds=first - start, **fields)
