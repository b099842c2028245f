"""The model interface: all features use models only through the protocols of this file.

``EarlyExitModel`` is what evaluation, calibration and decoding need. ``TrainableModel`` adds what
training, tuning and specialising need. An adapter for a new kind of model implements them; no
feature depends on a model class.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.models.exit_heads import ExitHeads
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.kv_cache import KVCache
from offramp.models.router import Router, RouterSpec

FEW_TOKENS = 16
"""Largest number of tokens of a call whose time is mostly fixed cost, such as reading weights."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The positions of the tokens of one call, and the cache that they use.

    ``positions`` (B or 1, T) are the positions of the tokens in their rows, from 0, without
    padding. ``real`` (B, T) is False on padding; None if there is none. ``cache`` holds the keys
    and values of earlier tokens; None in training. ``rows`` (B,) are the rows of the cache that
    the tokens belong to, so that a batch can continue without the rows that left; None for all
    rows in order. A row may occur several times, with tokens at different positions. ``end`` is the
    largest position plus 1, if the caller knows it, so that nothing has to be read from a GPU.
    """

    positions: Int[Tensor, "#B T"]
    real: Bool[Tensor, "B T"] | None = None
    cache: KVCache | None = None
    rows: Int[Tensor, " B"] | None = None
    end: int | None = None
    memo: dict[Any, Any] = field(init=False, default_factory=dict, compare=False, repr=False)
    "Values that a model derived from this step, for its next call with the step, by model."


@runtime_checkable
class EarlyExitModel(Protocol):
    """A decoder-only Transformer with exits. ``exit_layer = n`` means after n blocks, 1..L."""

    @property
    def num_layers(self) -> int:
        """Number of blocks, L."""

    @property
    def hidden_size(self) -> int:
        """Width of a state, D."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""

    @property
    def max_length(self) -> int:
        """Number of positions of the model: its longest sequence."""

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers where a policy may stop, ascending; the last one is ``num_layers``."""

    @property
    def complete_from(self) -> int:
        """The lowest exit layer at which a token leaves all keys and values that later tokens read.

        No block above it writes keys or values, except that the first one may project them from
        the state at this very layer. ``recompute`` and ``propagate`` are then the same for exits
        from this layer on. It is ``num_layers`` in a model whose blocks all write their own.
        """

    @property
    def cache_layers(self) -> int:
        """Number of blocks that write keys and values, which are the lowest ones.

        It is ``complete_from`` + 1 if the block above ``complete_from`` projects them from the
        state below it, else ``complete_from``.
        """

    @property
    def device(self) -> torch.device:
        """Device of the parameters; inputs must be on it."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the LM head's weights."""

    @property
    def why_no_blocks(self) -> str:
        """Why the blocks cannot be run one by one, as a clause after "since"; empty if they can.

        A model that can only run as a whole still has ``states_at`` and ``unembed``, so it can be
        traced, swept and trained. ``embed``, ``run_layers``, ``project_kv`` and ``make_cache``
        raise UnsupportedArchitectureError.
        """

    @property
    def exits_trained(self) -> bool:
        """Whether the exits below the last layer were trained.

        If not, the first use of such an exit in eval mode gives an ``UntrainedExitsWarning``.
        """

    def silence_untrained(self) -> None:
        """Do not warn of untrained exits: the caller reports them, or is about to train them."""

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for this many rows and positions."""

    def embed(self, input_ids: Int[Tensor, "B T"], *, step: Step) -> Float[Tensor, "B T D"]:
        """Return the state before the first block: token (and learned position) embeddings."""

    def run_layers(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run blocks start+1 .. stop.

        Tokens that are not ``active`` keep their state, from which their keys and values are
        projected. Where a call begins above ``complete_from`` and there is no cache, the step must
        be that of the call below it, which keeps the keys and values that blocks share.
        """

    def project_kv(self, h: Float[Tensor, "B T D"], start: int, stop: int, *, step: Step) -> None:
        """Write only the keys and values of blocks start+1 .. stop into the step's cache.

        Blocks that project none write nothing.
        """

    def fills_beside(self, tokens: int) -> bool:
        """Return whether ``run_layers`` projects keys and values of inactive tokens at no cost.

        ``tokens`` is the number of tokens of the call, active or not. If it returns False,
        ``project_kv`` is called first.
        """

    def rounds_alike(self) -> bool:
        """Return whether a token has the same numbers, bit for bit, alone and with other tokens.

        This is about calls of up to FEW_TOKENS tokens. If not, the sums of products have another
        order where several tokens are computed at once.
        """

    def router(self, cache: KVCache, spec: RouterSpec) -> Router | None:
        """Return a router of new tokens of this cache, which runs a token in one call; or None.

        None where the model's blocks, or the gates of ``spec``, have no compiled kernels. A cache
        that a router uses is used by nothing else.
        """

    def states_at(
        self, input_ids: Int[Tensor, "B T"], layers: Iterable[int], *, step: Step
    ) -> Iterator[tuple[int, Float[Tensor, "B T D"]]]:
        """Yield (layer, state) at each of ``layers`` (0 is the embedding), ascending.

        ``walk`` implements it for a model whose blocks run one by one; blocks above the last of
        ``layers`` are then not run.
        """

    def unembed(
        self,
        h: Float[Tensor, "B T D"],
        exit_layer: int,
        *,
        vocab: Int[Tensor, " W"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return the logits at an exit, by its own norm and head or else by the final ones.

        With ``vocab`` only the logits of these tokens are computed, (B, T, W).
        """

    def to_transformers(self) -> Any:
        """Return the causal language model of ``transformers`` with the same parameters.

        Raises UnsupportedArchitectureError if ``transformers`` has no such architecture.
        """


class TrainableModel(EarlyExitModel, Protocol):
    """An early-exit model that is a ``torch.nn.Module`` and can be trained, tuned and specialised.

    It also has the members of ``nn.Module``; those that are used are listed at the end.
    """

    @property
    def exits(self) -> ExitHeads:
        """The exits' own heads by layer, a submodule with the name ``exits``."""

    @property
    def exit_head(self) -> ExitHeadKind:
        """The kind of the exits' heads."""

    def with_exits(self, layers: Iterable[int], kind: ExitHeadKind) -> "TrainableModel":
        """Return a model of the same backbone with exits at ``layers`` and heads of this kind.

        Exits that had such heads keep them. New heads begin with the exit's norm, or else the final
        one, and the final LM head. Raises ConfigError if exits share a norm that is not there.
        """

    def normalised(self, h: Float[Tensor, "*B S"]) -> Float[Tensor, "*B D"]:
        """Return last-layer states after the final norm; unchanged in a model without one.

        D is S, the width of a state, unless the norm first merges several states of a token.
        """

    def freeze_backbone(self) -> None:
        """Make only the exits' own heads require a gradient."""

    def layers_of_parameters(self) -> Mapping[str, int]:
        """Return the layer of each parameter, by its name in ``named_parameters``.

        It is 0 before the first block (the embedding), n in block n, and L + 1 for all others: the
        final norm, the LM head, the exits' heads. A tied embedding belongs to layer 0. Raises
        UnsupportedArchitectureError if the layer of a parameter is unknown.
        """

    @property
    def block_modules(self) -> tuple[nn.Module, ...]:
        """The blocks as modules, if they can be compiled and sharded one by one; else empty."""

    # Members of nn.Module.

    training: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters, each once."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return (name, parameter), each parameter once."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copy the parameters of ``state_dict``, or use its tensors if ``assign``."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Make all parameters require a gradient, or none."""

    def train(self, mode: bool = True) -> Any:
        """Set training mode."""

    def eval(self) -> Any:
        """Set eval mode."""


def whole_step(input_ids: Int[Tensor, "B T"], *, real: Bool[Tensor, "B T"] | None = None) -> Step:
    """Return the step of whole sequences without a cache, as in training and in traces."""
    if input_ids.dim() != 2:
        shape = tuple(input_ids.shape)
        raise ConfigError(f"input_ids: expected the shape (rows, tokens), got {shape}")
    if real is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    else:
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    return Step(positions=positions, real=real)


def walk(
    model: EarlyExitModel, input_ids: Int[Tensor, "B T"], layers: Iterable[int], *, step: Step
) -> Iterator[tuple[int, Float[Tensor, "B T D"]]]:
    """Implement ``states_at`` by ``embed`` and ``run_layers``."""
    h = model.embed(input_ids, step=step)
    done = 0
    for layer in sorted(layers):
        h = model.run_layers(h, done, layer, step=step)
        done = layer
        yield layer, h


def require_blocks(model: EarlyExitModel, field: str) -> None:
    """Raise a ConfigError for ``field`` if the blocks cannot be run one by one."""
    if model.why_no_blocks:
        raise ConfigError(
            f"{field}: expected a model whose blocks can be run one by one, got one that can only "
            f"run as a whole, since {model.why_no_blocks}"
        )
