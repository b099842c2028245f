"""A conversation with an opened model: ``offramp chat``."""

from collections.abc import Sequence
from dataclasses import replace

from offramp.commands.chat_template import Message, chat_tokenizer, message_ids
from offramp.commands.generate import prompt_ids, with_end_tokens
from offramp.errors import ConfigError
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import Generation, generate
from offramp.generation.options import check_tokens, draft_exit, exit_rule, missing_kv_for
from offramp.models.base import require_blocks
from offramp.models.open import OpenedModel


class Conversation:
    """The messages so far, and the options of the next answer.

    With ``plain`` there is no chat template: the model continues one text, to which each message
    is added as it stands. Every answer reads the whole conversation again, at full depth, so it is
    the text that ``generate`` gives for the same messages.

    Raises ConfigError for a model without a chat template, and for options that it does not
    support.
    """

    def __init__(
        self,
        opened: OpenedModel,
        config: GenerateConfig,
        *,
        plain: bool = False,
        system: str | None = None,
    ) -> None:
        require_blocks(opened.model, "chat")
        if plain and system is not None:
            raise ConfigError("system: expected none with plain, which has no chat template")
        self.opened = opened
        self._template = None if plain else chat_tokenizer(opened)
        self._system = system
        self.messages: list[Message] = []
        self.reset()
        self.configure(config)

    def reset(self) -> None:
        """Begin a new conversation; the system message stays."""
        self.messages = [] if self._system is None else [_of("system", self._system)]

    def configure(self, config: GenerateConfig) -> None:
        """Use these options from the next answer on. Nothing changes if it raises ConfigError."""
        model, fitted = self.opened.model, self.opened.fitted
        rule = exit_rule(model, config, policy=None, fitted=fitted)
        missing_kv_for(model, config, rule)
        check_tokens("stop_tokens", config.stop_tokens, model.vocab_size)
        if config.speculative:
            draft_exit(model, config, fitted)
        self.config, self.rule = config, rule

    def choose(
        self, *, threshold: float | tuple[float, ...] | None = None, speculative: bool = False
    ) -> None:
        """Use exits with this threshold, or drafts, or neither, from the next answer on."""
        self.configure(
            replace(
                self.config,
                threshold=threshold,
                speculative=speculative,
                decay=None if threshold is None else self.config.decay,
            )
        )

    def answer(self, message: str) -> Generation:
        """Begin the answer to a message; ``keep`` adds both to the conversation.

        Raises ConfigError for a conversation that is longer than the model's longest sequence.
        """
        opened = self.opened
        ids, longest = self._ids([*self.messages, _of("user", message)]), opened.model.max_length
        if len(ids) > longest:
            raise ConfigError(
                f"conversation: expected at most {longest} tokens, the model's longest sequence, "
                f"got {len(ids)} with this message; /reset begins a new one"
            )
        config = with_end_tokens(opened, self.config)
        return generate(opened.model, ids, config, tokenizer=opened.tokenizer, fitted=opened.fitted)

    def keep(self, message: str, answer: str) -> None:
        """Add a message and its answer, which may have been stopped, to the conversation."""
        self.messages += [_of("user", message), _of("assistant", answer)]

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        if self._template is not None:
            return message_ids(self.opened, self._template, messages)
        return prompt_ids(self.opened, "".join(message["content"] for message in messages))


def _of(role: str, content: str) -> Message:
    return {"role": role, "content": content}
