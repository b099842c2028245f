"""The native decoder.

Architecture: rotary positions (rotated halves, as in Hugging Face), RMSNorm, SwiGLU,
grouped-query attention, no biases, no dropout. ``norm="pre"`` is Llama's order, with Llama's
parameter names. ``norm="post"`` normalises *after* each residual sum and has no final norm, like
the models of the seed document. The LM head may be tied to the embedding, and exits may have
their own norms and heads (exit_heads.py).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.models import checks
from offramp.models.base import Step, walk, whole_step
from offramp.models.exit_heads import ExitAdapter, ExitHead
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.kv_cache import KVCache
from offramp.models.layer_names import layers_by_name
from offramp.models.native.blocks import (
    BlockContext,
    Decoder,
    DecoderBlock,
    exit_heads_of,
    lm_head_of,
    shared_keys_values,
)
from offramp.models.native.config import DecoderConfig
from offramp.models.native.fast.router import router_of
from offramp.models.native.few_tokens import FewTokens
from offramp.models.native.quantised import linear
from offramp.models.native.rope import rotation_tables
from offramp.models.router import Router, RouterSpec


class Transformer(nn.Module):
    """The native early-exit decoder; a ``TrainableModel`` (base.py).

    Parameters are drawn as in the seed document: embedding normal with std 0.02, every linear
    weight normal with std 1/sqrt(hidden_size), both truncated to [-2, 2].
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.num_layers, self.exit_layers = config.num_hidden_layers, config.exit_layers
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.max_length, self.exit_head = config.max_position_embeddings, config.exit_head
        self.complete_from, self.cache_layers = config.complete_from, config.cache_layers
        self.model = Decoder(config)
        self.lm_head = lm_head_of(config)
        self.exits = exit_heads_of(config)
        for name, table in zip(("cos", "sin"), rotation_tables(config), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.few_tokens = FewTokens(self.model.layers, config)
        self.reset_parameters()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Draw all parameters at random."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.config.hidden_size**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        for head in self.exits.values():
            if isinstance(adapter := getattr(head, "adapter", None), ExitAdapter):
                adapter.add_nothing()

    def start_exits(self) -> None:
        """Initialise the exits so that they give the same logits as the final norm and head."""
        for head in self.exits.values():
            head.to_empty(device=self.device)
            cast(ExitHead, head).start_from(self.model.norm, self.lm_head)

    # EarlyExitModel.

    why_no_blocks = ""
    "Empty: the blocks run one by one."

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the states and the parameters; quantised weights have types of their own."""
        return self.model.embed_tokens.weight.dtype

    @property
    def exits_trained(self) -> bool:
        """Whether the exits were trained."""
        return self.exits.trained

    def silence_untrained(self) -> None:
        """Do not warn about untrained exits."""
        self.exits.warned = True

    def embed(self, input_ids: Int[Tensor, "B T"], *, step: Step) -> Float[Tensor, "B T D"]:
        """Return token embeddings; positions are rotary, so the step is not needed."""
        try:
            return F.embedding(input_ids, self.model.embed_tokens.weight)
        except (IndexError, RuntimeError):
            checks.check_ids(input_ids, self.vocab_size)
            raise

    def run_layers(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run blocks start+1 .. stop; tokens not ``active`` keep their state."""
        checks.check_call(self, h, start, stop, active)
        if (few := self.few_tokens.of(h, step, some=active is not None)) is not None:
            return few.run(h, start, stop, step=step, active=active, **self._places(h, step))
        context = self._context(h, step)
        shared = shared_keys_values(self, start, step)
        cached = None if step.cache is None else step  # FSDP2 copies an argument with gradients
        for layer in range(start, stop):
            h, given = self._block(layer)(h, context, cached, active, shared)
            if given is not None:
                shared = step.memo[self, "shared"] = given
        return h

    def fills_beside(self, tokens: int) -> bool:
        """Return whether ``run_layers`` projects keys and values of inactive tokens at no cost.

        This is true for calls with a cache and without gradients.
        """
        return self.few_tokens.fills_beside(tokens, self.device)

    def rounds_alike(self) -> bool:
        """Return whether the compiled kernels run the blocks: they sum each token in one order."""
        return self.few_tokens.compiled(self.device)

    def router(self, cache: KVCache, spec: RouterSpec) -> Router | None:
        """Return a router of the compiled kernels for new tokens of a cache, if they fit it."""
        cache.require_form(self._buffers["cos"], **self._form)
        if not self.few_tokens.compiled(self.device):
            return None
        return router_of(self, self.few_tokens.fast, cache, spec)

    def project_kv(self, h: Float[Tensor, "B T D"], start: int, stop: int, *, step: Step) -> None:
        """Write only the keys and values of blocks start+1 .. stop into the step's cache."""
        cache = checks.require_cache(step)
        checks.check_call(self, h, start, stop)
        if (few := self.few_tokens.of(h, step)) is not None:
            few.project_kv(h, start, stop, step=step, **self._places(h, step))
            return
        context = self._context(h, step)
        for layer in range(start, min(stop, self.config.cache_layers)):
            block = self._block(layer)
            k, v = block.self_attn.keys_values(block.attention_input(h), context)
            cache.write(layer, k, v, positions=step.positions, real=step.real, rows=step.rows)

    def unembed(
        self,
        h: Float[Tensor, "B T D"],
        exit_layer: int,
        *,
        vocab: Int[Tensor, " W"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return logits at any layer 1..L, by its own norm and head or else by the final ones."""
        checks.check_states(h, self.hidden_size)
        checks.check_exit_layer(exit_layer, self.num_layers)
        norm, head = self.exits.head_at(exit_layer, self.model.norm, self.lm_head)
        if (few := self.few_tokens.of(h)) is not None:
            return few.logits(h, norm, head, vocab)
        return linear(norm(h), head if vocab is None else head[vocab])

    def _block(self, layer: int) -> DecoderBlock:
        return cast(DecoderBlock, self.model.layers[layer])

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for this model, in its precision and on its device."""
        return self.few_tokens.new_cache(batch_size, capacity, self._form)

    def states_at(
        self, input_ids: Int[Tensor, "B T"], layers: Iterable[int], *, step: Step
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (layer, state) at each of ``layers``, ascending, (B, T, D) each."""
        return walk(self, input_ids, layers, step=step)

    def to_transformers(self) -> Any:
        """Return a ``LlamaForCausalLM`` with the same parameters, if the model is pre-norm."""
        from offramp.models.native.llama import to_transformers

        return to_transformers(self)

    # TrainableModel.

    @property
    def block_modules(self) -> tuple[nn.Module, ...]:
        """The blocks, which are called as modules in training."""
        return tuple(self.model.layers)

    def with_exits(self, layers: Iterable[int], kind: ExitHeadKind) -> "Transformer":
        """Return a copy with exits at these layers and heads of this kind."""
        if self.exit_head == "shared" and self.config.norm == "post":
            raise ConfigError(
                "exit_head: expected norm, adapter, full or specialist in a post-norm model, which "
                "has no final norm that exits could share, got shared"
            )
        config = replace(self.config, exit_layers=tuple(layers), exit_head=kind)
        own = Transformer(config).to(self.device, self.dtype)
        own.load_state_dict(self.state_dict(), strict=False)
        own.exits.start_from(self.exits, self.model.norm, self.lm_head)
        return own.train(self.training)

    def normalised(self, h: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Return last-layer states after the final norm; a post-norm model has none."""
        return cast(Tensor, self.model.norm(h))

    def freeze_backbone(self) -> None:
        """Make only the exits' own heads require a gradient."""
        self.model.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def layers_of_parameters(self) -> dict[str, int]:
        """Return the layer of each parameter by name."""
        return layers_by_name(self, below=[self.model.embed_tokens], blocks=self.model.layers)

    # Methods with the names of the seed document.

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of the full model."""
        step = whole_step(input_ids)
        h = self.run_layers(self.embed(input_ids, step=step), 0, self.num_layers, step=step)
        return self.unembed(h, self.num_layers)

    def forward_all_layers(self, input_ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "B T V"]]:
        """Return the logits of every layer, from the first to the last."""
        every = range(1, self.num_layers + 1)
        states = self.states_at(input_ids, every, step=whole_step(input_ids))
        return [self.unembed(h, layer) for layer, h in states]

    def forward_train(
        self, input_ids: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T V"]]:
        """Return the logits of the first exit (shallow) and of the last layer (deep)."""
        layers = {self.exit_layers[0], self.num_layers}
        states = self.states_at(input_ids, layers, step=whole_step(input_ids))
        logits = [self.unembed(h, layer) for layer, h in states]
        return logits[0], logits[-1]

    @property
    def _form(self) -> dict[str, Any]:
        """What a cache of this model is like."""
        return {
            "num_layers": self.config.cache_layers,
            "num_heads": self.config.num_key_value_heads,
            "head_dim": self.config.head_dim,
            "dtype": self.dtype,
            "device": self.device,
        }

    def _context(self, h: Tensor, step: Step) -> BlockContext:
        context: BlockContext | None = step.memo.get((self, h.dtype))
        end = self._end(h, step)
        if context is None:
            tables = self.get_buffer("cos"), self.get_buffer("sin")
            context = step.memo[self, h.dtype] = BlockContext.of(step, h.dtype, end, tables)
        return context

    def _end(self, h: Tensor, step: Step) -> int:
        """Return the largest position of a key, plus 1, for a call on states ``h``."""
        key = self, h.shape[:2]
        end: int | None = step.memo.get(key)
        if end is None:
            owner = self._buffers["cos"]  # replaced when the model gets another type or device
            if step.cache is not None and not step.cache.known_to(owner):
                step.cache.require_form(owner, **self._form)
            end = step.memo[key] = checks.checked_end(step, h, longest=self.max_length)
        return end

    def _places(self, h: Tensor, step: Step) -> dict[str, Any]:
        """Return the arguments of calls of a few tokens that depend on the positions."""
        return {"end": self._end(h, step), "tables": (self._buffers["cos"], self._buffers["sin"])}
