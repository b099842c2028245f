"""The model class of lm-evaluation-harness: the three kinds of requests, with exits on.

Texts become tokens as in the harness's ``hf`` model, so that at full depth the answers to all
requests are those of that model. Importing this module imports the harness.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

from offramp.commands.chat_template import Message, chat_tokenizer, messages_text
from offramp.commands.evaluate.counts import TaskCounts
from offramp.commands.evaluate.generating import MAX_NEW, generate_texts, text_request
from offramp.commands.evaluate.library import harness
from offramp.commands.evaluate.scoring import Scoring
from offramp.commands.generate import prompt_ids
from offramp.data.tokenizer import encode_prompt
from offramp.errors import ConfigError
from offramp.evaluation.continuations import (
    Continuation,
    ContinuationScore,
    score_continuations,
)

TemplateLM: Any = harness("api.model").TemplateLM
OnRequests = Callable[[str, int, int], None]
"""Called with (task, requests done, requests of this kind in all)."""
Pair = tuple[list[int], list[int]]
"""Token ids of a context and of a continuation."""


class ScoringModel(TemplateLM):  # type: ignore[misc]
    """A model of offramp that answers requests of the harness, and counts what they cost.

    ``counts`` holds the cost by the name of the task.
    """

    tokenizer: Any = None

    def __init__(
        self, scoring: Scoring, *, on_requests: OnRequests = lambda task, done, total: None
    ) -> None:
        super().__init__()
        self.scoring, self.opened = scoring, scoring.opened
        self.counts: dict[str, TaskCounts] = {}
        self.raised: BaseException | None = None
        "The error that ended a request, which is not the harness's."
        self._on_requests = on_requests

    # What the harness asks a model.

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text, or else of the one that begins one."""
        return self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without a context."""
        if self.scoring.prefix is None:
            raise ConfigError(
                "prefix_token: expected a token for texts without a context, since the model "
                "names neither a BOS nor an end-of-text token"
            )
        return self.scoring.prefix

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.scoring.max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a text for which the task gives no number."""
        return MAX_NEW

    @property
    def batch_size(self) -> int:
        """Number of texts that run together."""
        return self.scoring.batch_size

    @property
    def device(self) -> Any:
        """Where the model computes."""
        return self.scoring.model.device

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer without slashes."""
        return self.opened.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's chat template; a string chooses one of several by its name.

        Raises ConfigError for a model without a template.
        """
        self._chat_tokenizer()
        return super().chat_template(chat_template)  # type: ignore[no-any-return]

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """Return messages in the model's chat template, up to where an answer begins.

        Without ``add_generation_prompt`` the last message is the beginning of the answer. A
        template that fails is tried again without the system message, as in the ``hf`` model.
        Raises ConfigError for a model without a template, and for a template that fails.
        """
        tokenizer, begun = self._chat_tokenizer(), not add_generation_prompt
        others = [each for each in chat_history if each["role"] != "system"]
        try:
            return messages_text(tokenizer, chat_history, answer_begun=begun)
        except ConfigError:
            if len(others) == len(chat_history):
                raise
            return messages_text(tokenizer, others, answer_begun=begun)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the token ids of a text, which begins with the model's first tokens once."""
        if add_special_tokens is False:
            return encode_prompt(self.opened.tokenizer, string, special_tokens=False)
        return prompt_ids(self.opened, string)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, whether greedy decoding gives it) of continuations."""

        def answers(task: str, part: list[Any]) -> Iterator[tuple[float, bool]]:
            scores = self._scores(task, [self._pair(*each.args[:2]) for each in part])
            return ((sum(score.log_probs), score.greedy) for score in scores)

        return self._by_task("loglikelihood", requests, answers)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, which are read in windows."""
        utils = harness("utils")

        def windows(text: str) -> list[Pair]:
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            return list(map(utils.make_disjoint_window, found))

        def answers(task: str, part: list[Any]) -> Iterator[float]:
            cut_up = [windows(each.args[0]) for each in part]
            scores = iter(self._scores(task, [pair for pairs in cut_up for pair in pairs]))
            for pairs in cut_up:
                yield float(sum(sum(next(scores).log_probs) for _ in pairs))

        return self._by_task("loglikelihood_rolling", requests, answers)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the texts that decoding gives after contexts, up to the strings of ``until``."""

        def answers(task: str, part: list[Any]) -> list[str]:
            wanted = [
                text_request(self.opened, each.args[1], self.scoring.config, seed=number)
                for number, each in enumerate(part)
            ]
            prompts = [
                self._prompt(task, each.args[0], request.config.max_new_tokens)
                for each, request in zip(part, wanted, strict=True)
            ]
            return generate_texts(
                self.scoring,
                prompts,
                wanted,
                counts=self._counts(task),
                on_done=lambda done: self._on_requests(task, done, len(part)),
            )

        return self._by_task("generate_until", requests, answers)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its result file beside the model's arguments."""
        costs = {
            task: asdict(counts.figures(self.opened, self.scoring.rule))
            for task, counts in self.counts.items()
        }
        return {"offramp": {"missing_kv": self.scoring.meaning, "tasks": costs}}

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Score token ids, as the harness's class needs it; each is (texts, context, tokens)."""
        pairs = [(list(context), list(tokens)) for _, context, tokens in requests]
        return [(sum(each.log_probs), each.greedy) for each in self._scores("tokens", pairs)]

    # How it is done.

    def _chat_tokenizer(self) -> Any:
        if self.tokenizer is None:
            self.tokenizer = chat_tokenizer(self.opened)
        return self.tokenizer

    def _by_task(
        self, kind: str, requests: Sequence[Any], answers: Callable[[str, list[Any]], Any]
    ) -> list[Any]:
        """Return the answers in the order of the requests, which run task by task."""
        places: dict[str, list[int]] = {}
        for place, each in enumerate(requests):
            places.setdefault(str(each.task_name), []).append(place)
        found: list[Any] = [None] * len(requests)
        for task, mine in places.items():
            try:
                given = list(answers(task, [requests[place] for place in mine]))
            except BaseException as error:
                self.raised = error
                raise
            for place, answer in zip(mine, given, strict=True):
                found[place] = answer
                self.cache_hook.add_partial(kind, requests[place].args, answer)
        return found

    def _pair(self, context: str, continuation: str) -> Pair:
        """Return the token ids of a context, at least one, and of its continuation."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
        if not after and continuation and before:  # its first letters became part of the context
            after = self.tok_encode(continuation, add_special_tokens=False)
        if not before and after:
            first = self.prefix_token_id
            return (after[:1], after[1:]) if after[0] == first else ([first], after)
        return before, after

    def _scores(self, task: str, pairs: Sequence[Pair]) -> list[ContinuationScore]:
        """Score the continuations, those with the longest inputs first."""
        counts, done = self._counts(task), 0
        texts = [self._fitting(task, *pair) for pair in pairs]
        found = [ContinuationScore(log_probs=(), greedy=True, exit_layers=())] * len(pairs)
        order = [place for place, text in enumerate(texts) if text is not None]
        order.sort(key=lambda place: _longest_first(texts[place]))
        self._on_requests(task, 0, len(order))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = [text for place in places if (text := texts[place]) is not None]
            began = perf_counter()
            scores = score_continuations(
                self.scoring.model,
                batch,
                rule=self.scoring.rule,
                missing_kv=self.scoring.missing_kv,
            )
            counts.seconds += perf_counter() - began
            for place, text, score in zip(places, batch, scores, strict=True):
                found[place] = score
                counts.add(score.exit_layers, len(text.context), self.scoring.model)
            done += len(batch)
            self._on_requests(task, done, len(order))
        return found

    def _fitting(self, task: str, context: list[int], tokens: list[int]) -> Continuation | None:
        """Return a continuation that fits the model; None if it has no token."""
        if not tokens:
            return None
        longest = self.max_length
        if len(tokens) > longest:
            raise ConfigError(
                f"{task}: expected continuations of at most {longest} tokens, the longest text, "
                f"got one of {len(tokens)}"
            )
        room = longest + 1 - len(tokens)
        self._counts(task).truncated += len(context) > room
        return Continuation(context=tuple(context[-room:]), tokens=tuple(tokens))

    def _prompt(self, task: str, context: str, new_tokens: int) -> list[int]:
        """Return the token ids of a prompt, cut at its start to leave room for the new tokens."""
        room = self.max_length - new_tokens
        if room < 1:
            raise ConfigError(
                f"{task}: expected max_gen_toks below {self.max_length}, the longest text, got "
                f"{new_tokens}"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self._counts(task).truncated += len(ids) > room
        return ids[-room:]

    def _counts(self, task: str) -> TaskCounts:
        return self.counts.setdefault(task, TaskCounts(missing_kv=self.scoring.missing_kv))


def _longest_first(text: Continuation | None) -> tuple[int, tuple[int, ...]]:
    assert text is not None
    return -len(text.inputs), (*text.context, *text.tokens)
