"""An engine for many requests on an opened model, which takes texts: ``EarlyExitLM.engine``."""

from typing import Any

from offramp.commands.generate import begin, config_for
from offramp.generation.config import EngineConfig
from offramp.generation.engine import Engine
from offramp.generation.requests import Request
from offramp.models.open import OpenedModel


class TextEngine(Engine):
    """An ``Engine`` of an opened model. ``EarlyExitLM.engine`` makes it."""

    def __init__(self, opened: OpenedModel, config: EngineConfig) -> None:
        super().__init__(opened.model, config, tokenizer=opened.tokenizer, fitted=opened.fitted)
        self._opened = opened

    def submit_text(
        self, prompt: str, *, id: str | None = None, chat: bool = False, **options: Any
    ) -> Request:
        """Take a request to continue a text; it runs in the following steps.

        Args:
            prompt: The text to continue. It begins with the model's first tokens, such as BOS.
            id: A name that no unfinished request has; by default the engine makes one.
            chat: Put the prompt into the model's chat template.
            **options: ``threshold``, ``certificate`` and fields of ``GenerateConfig``, as in
                ``EarlyExitLM.generate``.

        Raises:
            QueueFullError: As many requests wait as may.
            ConfigError: The request cannot run, or its ``id`` is in use.
            CertificateError: The certificate is another model's.
        """
        ids, config = begin(self._opened, prompt, config_for(self._opened, **options), chat=chat)
        return self.submit(ids, config, id=id)
