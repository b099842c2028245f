"""What one run of ``offramp bench`` decodes: a model and its prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.methods import Batch, Method, own
from offramp.data import encode, load_corpus
from offramp.errors import ConfigError, CorpusError
from offramp.exits.gate import FittedExits
from offramp.generation.config import GenerateConfig
from offramp.models.base import EarlyExitModel


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, what was fitted to its exits, and the prompts that every method decodes."""

    model: EarlyExitModel
    fitted: FittedExits
    config: BenchConfig
    prompts: Sequence[Batch]
    "The prompts in batches of ``config.batch_size``."

    @property
    def early_exits(self) -> tuple[int, ...]:
        """The exit layers before the last layer."""
        return tuple(self.model.exit_layers[:-1])

    def method(self, name: str, **options: Any) -> Method:
        """One of offramp's own ways to decode; ``options`` are fields of ``GenerateConfig``."""
        generate = GenerateConfig(max_new_tokens=self.config.max_new_tokens, **options)
        return own(name, self.model, generate, fitted=self.fitted)


def prompts_of(
    corpus_name: str,
    tokenizer: Tokenizer,
    config: BenchConfig,
    *,
    max_length: int,
    first_tokens: Sequence[int] = (),
) -> list[Batch]:
    """Prompts at equal distances in a corpus (its test split where it has one), in batches.

    Each begins with ``first_tokens``, which are among its ``prompt_tokens``.

    Raises CorpusError for a corpus shorter than one prompt, and ConfigError where a prompt and
    its new tokens are longer than ``max_length``.
    """
    corpus = load_corpus(corpus_name)
    ids = encode(tokenizer, corpus.whole if corpus.test is None else corpus.test).tolist()
    if len(ids) < config.prompt_tokens:
        raise CorpusError(
            f"{corpus_name}: expected at least {config.prompt_tokens} tokens for a prompt, got "
            f"{len(ids)}"
        )
    longest = config.prompt_tokens + config.max_new_tokens - 1
    if longest > max_length:
        raise ConfigError(
            f"max_new_tokens: expected at most {max_length} tokens with the prompt, "
            f"the model's longest sequence, got {longest}"
        )
    space = (len(ids) - config.prompt_tokens) / max(1, config.prompts)
    starts = [int(space * number) for number in range(config.prompts)]
    first = list(first_tokens)[: config.prompt_tokens - 1]
    taken = config.prompt_tokens - len(first)
    prompts = [first + ids[start : start + taken] for start in starts]
    size = config.batch_size
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
