"""The first layers of a model and their exit, as a model of their own with the same parameters."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.models.base import EarlyExitModel, Step
from offramp.models.kv_cache import KVCache
from offramp.models.router import Router, RouterSpec


class FirstLayers:
    """An ``EarlyExitModel`` of the layers up to an exit, which is its last layer.

    It predicts what ``offramp export`` writes for this exit, and needs no copy of the weights.
    Raises ConfigError for a layer that is no exit of the model.
    """

    exits_trained = True
    "Its only exit is its last layer."

    def __init__(self, model: EarlyExitModel, layer: int) -> None:
        if layer not in model.exit_layers:
            exits = ", ".join(map(str, model.exit_layers))
            raise ConfigError(f"exit: expected one of the exits {exits}, got {layer}")
        self._model, self.num_layers = model, layer
        self.exit_layers = (layer,)
        self.complete_from = min(model.complete_from, layer)
        self.cache_layers = min(model.cache_layers, layer)

    @property
    def hidden_size(self) -> int:
        """Width of a state, D."""
        return self._model.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self._model.vocab_size

    @property
    def max_length(self) -> int:
        """Number of positions."""
        return self._model.max_length

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the LM head's weights."""
        return self._model.dtype

    @property
    def why_no_blocks(self) -> str:
        """Why the blocks cannot be run one by one; empty if they can."""
        return self._model.why_no_blocks

    def silence_untrained(self) -> None:
        """Do not warn of untrained exits."""
        self._model.silence_untrained()

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache."""
        return self._model.make_cache(batch_size, capacity)

    def embed(self, input_ids: Int[Tensor, "B T"], *, step: Step) -> Float[Tensor, "B T D"]:
        """Return the state before the first block."""
        return self._model.embed(input_ids, step=step)

    def run_layers(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run blocks start+1 .. stop."""
        return self._model.run_layers(h, start, stop, step=step, active=active)

    def project_kv(self, h: Float[Tensor, "B T D"], start: int, stop: int, *, step: Step) -> None:
        """Write only the keys and values of blocks start+1 .. stop into the step's cache."""
        self._model.project_kv(h, start, stop, step=step)

    def fills_beside(self, tokens: int) -> bool:
        """Return whether ``run_layers`` projects keys and values of inactive tokens at no cost."""
        return self._model.fills_beside(tokens)

    def rounds_alike(self) -> bool:
        """Return whether a token has the same numbers alone and with other tokens."""
        return self._model.rounds_alike()

    def router(self, cache: KVCache, spec: RouterSpec) -> Router | None:
        """Return None: a router runs all layers of the model that it was made for."""
        return None

    def states_at(
        self, input_ids: Int[Tensor, "B T"], layers: Iterable[int], *, step: Step
    ) -> Iterator[tuple[int, Float[Tensor, "B T D"]]]:
        """Yield (layer, state) at each of ``layers``, ascending."""
        return self._model.states_at(input_ids, layers, step=step)

    def unembed(
        self,
        h: Float[Tensor, "B T D"],
        exit_layer: int,
        *,
        vocab: Int[Tensor, " W"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return the logits at the exit, by its own norm and head or else by the final ones."""
        return self._model.unembed(h, exit_layer, vocab=vocab)

    def to_transformers(self) -> Any:
        """Raise UnsupportedArchitectureError: ``offramp export`` writes such a model."""
        raise UnsupportedArchitectureError("first layers: expected offramp export for these")
