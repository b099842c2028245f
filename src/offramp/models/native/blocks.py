"""The native decoder's blocks, for whole sequences; ``decoder`` combines them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.models.base import EarlyExitModel, Step
from offramp.models.exit_heads import ExitHead, ExitHeads, adapter_of, has_lm_head
from offramp.models.native.config import DecoderConfig
from offramp.models.native.quantised import QuantisedLinear


def rotate(
    x: Float[Tensor, "B H T Dh"], cos: Float[Tensor, "#B 1 T Dh"], sin: Float[Tensor, "#B 1 T Dh"]
) -> Float[Tensor, "B H T Dh"]:
    """Apply rotary positions (Su 2021) to rotated halves; ``sin`` has its first half negated."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin


KeysValues = tuple[Float[Tensor, "B H T Dh"], Float[Tensor, "B H T Dh"]]
"""Rotated keys, and values."""


@dataclass(kw_only=True)
class BlockContext:
    """The data that all blocks share for the tokens of one step; it does not contain the step."""

    positions: Tensor
    real: Tensor | None
    cached: bool
    cos: Tensor  # (B or 1, 1, T, Dh)
    sin: Tensor
    end: int  # keys are at positions 0 .. end - 1

    @classmethod
    def of(
        cls, step: Step, dtype: torch.dtype, end: int, tables: tuple[Tensor, Tensor]
    ) -> "BlockContext":
        """Make the context of a step; ``tables`` are those of ``rotation_tables``."""
        cos, sin = (table[step.positions].to(dtype)[:, None] for table in tables)
        cached = step.cache is not None
        return cls(
            positions=step.positions, real=step.real, cached=cached, cos=cos, sin=sin, end=end
        )

    @cached_property
    def mask(self) -> Tensor | None:
        """The mask (B or 1, 1, T, S), True where a query attends; None for causal attention."""
        device = self.positions.device
        if self.cached:  # a key is in the slot of its position: see kv_cache.py
            return (torch.arange(self.end, device=device) <= self.positions[..., None])[:, None]
        if self.real is None:
            return None
        causal = torch.ones(self.end, self.end, dtype=torch.bool, device=device).tril()
        own = torch.eye(self.end, dtype=torch.bool, device=device)  # padding attends to itself
        return (causal & self.real[:, None] | own)[:, None]


def linear_of(config: DecoderConfig, inputs: int, outputs: int) -> Any:
    """Return a linear map without bias whose weight has the config's format.

    It is an ``nn.Linear`` or a ``QuantisedLinear``.
    """
    if config.weight_format is None:
        return nn.Linear(inputs, outputs, bias=False)
    return QuantisedLinear(inputs, outputs, config.weight_format)


def lm_head_of(config: DecoderConfig) -> Any:
    """Return an LM head; beside weights of 4 bits it has 8 bits, because PPL depends on it most."""
    if config.weight_format is None:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    return QuantisedLinear(config.hidden_size, config.vocab_size, "int8")


class Attention(nn.Module):
    """Causal grouped-query attention.

    A block above the source of keys and values (``DecoderConfig.kv_source_layer``) has no
    projections of its own for them, unless it is the first one above it.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.q_proj = linear_of(config, config.hidden_size, size)
        self.projects_kv = layer < config.cache_layers
        self.shares_kv = layer == config.kv_source_layer
        self.cache_layer = min(layer, config.cache_layers - 1)
        if self.projects_kv:
            self.k_proj = linear_of(config, config.hidden_size, kv_size)
            self.v_proj = linear_of(config, config.hidden_size, kv_size)
        self.o_proj = linear_of(config, size, config.hidden_size)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def keys_values(self, x: Tensor, context: BlockContext) -> KeysValues:
        """Return rotated keys and values, (B, H_kv, T, Dh) each."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        return rotate(k, context.cos, context.sin), v

    def forward(
        self, x: Tensor, context: BlockContext, step: Step | None, shared: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues | None]:
        """Return the input of ``o_proj``, (B, T, H * Dh), for x (B, T, D), and keys and values.

        The latter are those that the blocks above are to take as ``shared``, if they take this
        block's and there is no cache in which they find them; else None. ``step`` is None if it has
        no cache.
        """
        q = rotate(self._heads(self.q_proj(x)), context.cos, context.sin)
        own = self.keys_values(x, context) if self.projects_kv else shared
        if step is None or step.cache is None:
            assert own is not None
            k, v = own
            given = (k, v.contiguous()) if self.shares_kv else None  # FSDP2 warns of views
        else:
            cache, layer, given = step.cache, self.cache_layer, None
            if self.projects_kv and own is not None:
                k, v = own
                cache.write(layer, k, v, positions=step.positions, real=step.real, rows=step.rows)
            k, v = cache.read(layer, end=context.end, rows=step.rows)
        mask = context.mask
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return attended.transpose(1, 2).flatten(2), given


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        units = config.units(layer)
        self.gate_proj = linear_of(config, config.hidden_size, units)
        self.up_proj = linear_of(config, config.hidden_size, units)
        self.down_proj = linear_of(config, units, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the SwiGLU to x (..., D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderBlock(nn.Module, ABC):
    """A block: attention, then the part that is computed for each token separately.

    A block is made with its number, counted from 0.
    """

    self_attn: Attention

    @abstractmethod
    def attention_input(self, h: Tensor) -> Tensor:
        """Return the states from which queries, keys and values are projected."""

    @abstractmethod
    def after_attention(self, h: Tensor, attended: Tensor) -> Tensor:
        """Run the rest of the block on states (..., D) and attended values (..., H * Dh)."""

    def forward(
        self,
        h: Float[Tensor, "B T D"],
        context: BlockContext,
        step: Step | None,
        active: Bool[Tensor, "B T"] | None = None,
        shared: KeysValues | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeysValues | None]:
        """Return the next states, and the keys and values for the blocks above: see ``Attention``.

        Tokens that are not ``active`` keep their state. Their keys and values are projected from
        it, and the other tokens attend to them.
        """
        attended, given = self.self_attn(self.attention_input(h), context, step, shared)
        if active is None:
            return self.after_attention(h, attended), given
        after = self.after_attention(h[active], attended[active])
        return h.masked_scatter(active[..., None], after), given


class PreNormBlock(DecoderBlock):
    """h + attention(norm(h)), then h + mlp(norm(h)): Llama's block."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, layer)

    def attention_input(self, h: Tensor) -> Tensor:
        """Return the normalised state."""
        normalised: Tensor = self.input_layernorm(h)
        return normalised

    def after_attention(self, h: Tensor, attended: Tensor) -> Tensor:
        """Add attention and MLP to the state; the MLP reads the normalised state."""
        h = h + self.self_attn.o_proj(attended)
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out


class PostNormBlock(DecoderBlock):
    """norm(h + attention(h)), then norm(h + mlp(h)): the seed document's block."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, layer)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def attention_input(self, h: Tensor) -> Tensor:
        """Return the state itself."""
        return h

    def after_attention(self, h: Tensor, attended: Tensor) -> Tensor:
        """Add attention and MLP to the state; each sum is normalised."""
        h = self.post_attention_layernorm(h + self.self_attn.o_proj(attended))
        out: Tensor = self.post_feedforward_layernorm(h + self.mlp(h))
        return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm, named as in Hugging Face's ``LlamaModel``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        block = PreNormBlock if config.norm == "pre" else PostNormBlock
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(block(config, layer) for layer in layers)
        self.norm: nn.Module = nn.Identity()
        if config.norm == "pre":
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def shared_keys_values(model: EarlyExitModel, start: int, step: Step) -> KeysValues | None:
    """Return the keys and values that blocks share, if the step and not a cache holds them.

    Raises a ConfigError for a call above their source on a step that does not hold them.
    """
    if step.cache is not None or start <= model.complete_from:
        return None
    shared: KeysValues | None = step.memo.get((model, "shared"))
    if shared is None:
        raise ConfigError(
            f"step: expected that of the call below layer {start}, which keeps the keys and "
            f"values after layer {model.complete_from}, got one without them"
        )
    return shared


def exit_heads_of(config: DecoderConfig) -> ExitHeads:
    """Return the exits' own heads; none if they share the final one."""
    heads = ExitHeads(num_layers=config.num_hidden_layers)
    if config.exit_head != "shared":
        for layer in config.exit_layers[:-1]:
            heads[str(layer)] = exit_head_of(config)
    return heads


def exit_head_of(config: DecoderConfig) -> ExitHead:
    """Return a new head for one exit, of the config's kind."""
    norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    head = None
    if has_lm_head(config.exit_head):
        head = lm_head_of(config)
    adapter = adapter_of(config.exit_head, config.hidden_size)
    return ExitHead(norm=norm, adapter=adapter, lm_head=head)
