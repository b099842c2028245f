"""The native decoder.

Architecture: rotary positions (halves rotated, as Hugging Face does), RMSNorm, SwiGLU,
grouped-query attention, no biases, no dropout. ``norm="pre"`` is Llama's order (and its
parameter names); ``norm="post"`` normalises *after* each residual sum, with no final norm, as
the seed document's models do. The LM head may be tied to the embedding, and exits may have
norms and heads of their own (exit_heads.py).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.models.base import Step, states_at, whole_step
from offramp.models.exit_heads import (
    EXIT_HEAD_KINDS,
    ExitAdapter,
    ExitHead,
    ExitHeadKind,
    ExitHeads,
)
from offramp.models.fast_step import FastSteps
from offramp.models.kv_cache import KVCache

NormOrder = Literal["pre", "post"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a native decoder; the field names are Hugging Face's.

    ``exit_layers`` is where a policy may stop; the last layer always belongs to it and is added
    where it is missing. ``intermediate_size`` None means 8/3 of the width, in steps of 16;
    ``num_key_value_heads`` None means one for each attention head.
    """

    vocab_size: int = 256
    "Size of the vocabulary; training sets it from the tokenizer."
    hidden_size: int = 128
    "Width of the model."
    num_hidden_layers: int = 6
    "Number of blocks."
    num_attention_heads: int = 4
    "Attention heads; must divide the width."
    num_key_value_heads: int | None = None
    "Key and value heads; must divide the attention heads."
    head_dim: int | None = None
    "Width of one attention head; by default the width divided by the attention heads."
    intermediate_size: int | None = None
    "Hidden units of the SwiGLU."
    exit_layers: tuple[int, ...] = (1,)
    "Layers where a token may leave, counted from 1."
    exit_head: ExitHeadKind = "shared"
    "What an exit has of its own: shared (nothing), norm, adapter, or full (norm and LM head)."
    norm: NormOrder = "pre"
    "RMSNorm before each sublayer (pre) or after each residual sum (post)."
    tie_word_embeddings: bool = False
    "Use the embedding as the LM head."
    max_position_embeddings: int = 4096
    "Longest sequence."
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {value}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or 0
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise ConfigError(f"head_dim: expected an even number above 0, got {self.head_dim}")
        if self.head_dim is None and self.hidden_size % (2 * heads):
            raise ConfigError(
                f"hidden_size: expected a multiple of 2 x {heads} attention heads, "
                f"got {self.hidden_size}"
            )
        if self.num_key_value_heads is not None and (kv_heads < 1 or heads % kv_heads):
            raise ConfigError(
                f"num_key_value_heads: expected a divisor of {heads} attention heads, "
                f"got {kv_heads}"
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ConfigError(
                f"intermediate_size: expected at least 1, got {self.intermediate_size}"
            )
        if self.exit_head not in EXIT_HEAD_KINDS:
            raise ConfigError(
                f"exit_head: expected one of {', '.join(EXIT_HEAD_KINDS)}, got {self.exit_head!r}"
            )
        if self.norm not in get_args(NormOrder):
            raise ConfigError(f"norm: expected pre or post, got {self.norm!r}")
        last = self.num_hidden_layers
        for layer in self.exit_layers:
            if not 1 <= layer <= last:
                raise ConfigError(f"exit_layers: expected layers from 1 to {last}, got {layer}")
        object.__setattr__(self, "exit_layers", tuple(sorted({*self.exit_layers, last})))
        if self.intermediate_size is None:
            units = max(16, round(self.hidden_size * 8 / 3 / 16) * 16)
            object.__setattr__(self, "intermediate_size", units)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)


def rotate(
    x: Float[Tensor, "B H T Dh"], cos: Float[Tensor, "#B 1 T Dh"], sin: Float[Tensor, "#B 1 T Dh"]
) -> Float[Tensor, "B H T Dh"]:
    """Rotary positions (Su 2021), halves rotated; ``sin`` has its first half negated."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin


@dataclass(kw_only=True)
class _Context:
    """What every block shares for the tokens of one step (and does not hold the step itself)."""

    positions: Tensor
    real: Tensor | None
    cached: bool
    cos: Tensor  # (B or 1, 1, T, Dh)
    sin: Tensor
    end: int  # keys stand at positions 0 .. end - 1

    @cached_property
    def mask(self) -> Tensor | None:
        """(B or 1, 1, T, S), True where a query may look; None where causal attention does."""
        device = self.positions.device
        if self.cached:  # a key stands in the slot of its position: see kv_cache.py
            return (torch.arange(self.end, device=device) <= self.positions[..., None])[:, None]
        if self.real is None:
            return None
        causal = torch.ones(self.end, self.end, dtype=torch.bool, device=device).tril()
        own = torch.eye(self.end, dtype=torch.bool, device=device)  # padding sees itself
        return (causal & self.real[:, None] | own)[:, None]


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def keys_values(self, x: Tensor, context: _Context) -> tuple[Tensor, Tensor]:
        """Rotated keys and plain values, (B, H_kv, T, Dh) each."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        return rotate(k, context.cos, context.sin), v

    def forward(self, x: Tensor, layer: int, context: _Context, step: Step) -> Tensor:
        """(B, T, D) -> (B, T, D); ``layer`` is counted from 0."""
        q = rotate(self._heads(self.q_proj(x)), context.cos, context.sin)
        k, v = self.keys_values(x, context)
        if step.cache is not None:
            step.cache.write(layer, k, v, positions=step.positions, real=step.real, rows=step.rows)
            k, v = step.cache.read(layer, end=context.end, rows=step.rows)
        mask = context.mask
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class PreNormBlock(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)): Llama's block."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def attention_input(self, h: Tensor) -> Tensor:
        """What the attention projects its queries, keys and values from."""
        normalised: Tensor = self.input_layernorm(h)
        return normalised

    def forward(self, h: Tensor, layer: int, context: _Context, step: Step) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h = h + self.self_attn(self.attention_input(h), layer, context, step)
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out


class PostNormBlock(nn.Module):
    """norm(h + attention(h)), then norm(h + mlp(h)): the seed document's block."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def attention_input(self, h: Tensor) -> Tensor:
        """What the attention projects its queries, keys and values from."""
        return h

    def forward(self, h: Tensor, layer: int, context: _Context, step: Step) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h = self.post_attention_layernorm(h + self.self_attn(h, layer, context, step))
        out: Tensor = self.post_feedforward_layernorm(h + self.mlp(h))
        return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm, named as in Hugging Face's ``LlamaModel``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        block = PreNormBlock if config.norm == "pre" else PostNormBlock
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        self.norm: nn.Module = nn.Identity()
        if config.norm == "pre":
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Transformer(nn.Module):
    """The native early-exit decoder; implements the waist (base.py).

    Parameters are drawn as in the seed document: embedding normal with std 0.02, every linear
    weight normal with std 1/sqrt(hidden_size), both truncated to [-2, 2].
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.exits = ExitHeads(num_layers=config.num_hidden_layers)
        if config.exit_head != "shared":
            for layer in config.exit_layers[:-1]:
                self.exits[str(layer)] = _exit_head(config)
        assert config.head_dim is not None
        with torch.device("cpu"):  # real numbers, even where the parameters are on "meta"
            places = torch.arange(config.max_position_embeddings, dtype=torch.float64)
            exponents = (torch.arange(0, config.head_dim, 2) / config.head_dim).double()
        angles = torch.outer(places, config.rope_theta**-exponents)  # (P, Dh / 2)
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1).float(), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1).float(), persistent=False)
        self._fast = FastSteps(
            self.model.layers,
            eps=config.rms_norm_eps,
            head_dim=config.head_dim,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            post=config.norm == "post",
        )
        self.reset_parameters()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
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
        """Let the exits say what the final norm and head would, whatever they said."""
        for head in self.exits.values():
            head.to_empty(device=self.device)
            cast(ExitHead, head).start_from(self.model.norm, self.lm_head)

    # The waist.

    @property
    def num_layers(self) -> int:
        """Number of blocks, L."""
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Width of a state, D."""
        return self.config.hidden_size

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Where a policy may stop: ascending, the last one is ``num_layers``."""
        return self.config.exit_layers

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.lm_head.weight.device

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """The longest sequence."""
        return self.config.max_position_embeddings

    def embed(self, input_ids: Int[Tensor, "B T"], *, step: Step) -> Float[Tensor, "B T D"]:
        """Token embeddings (positions are rotary, so the step is not needed)."""
        return F.embedding(input_ids, self.model.embed_tokens.weight)

    def run_layers(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Blocks start+1 .. stop; tokens not ``active`` keep their state."""
        if active is None and self._is_fast(h, step):
            return self._fast.run(h, start, stop, step=step, **self._places(step))
        context = self._context(step, h.dtype)
        for layer in range(start, stop):
            out: Tensor = self._block(layer)(h, layer, context, step)
            h = out if active is None else torch.where(active[..., None], out, h)
        return h

    def project_kv(self, h: Float[Tensor, "B T D"], start: int, stop: int, *, step: Step) -> None:
        """Write only the keys and values of blocks start+1 .. stop into the step's cache."""
        assert step.cache is not None, "project_kv needs a cache"
        if self._is_fast(h, step):
            self._fast.project_kv(h, start, stop, step=step, **self._places(step))
            return
        context = self._context(step, h.dtype)
        for layer in range(start, stop):
            block = self._block(layer)
            k, v = block.self_attn.keys_values(block.attention_input(h), context)
            step.cache.write(layer, k, v, positions=step.positions, real=step.real, rows=step.rows)

    def unembed(
        self,
        h: Float[Tensor, "B T D"],
        exit_layer: int,
        *,
        vocab: Int[Tensor, " W"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits at any layer 1..L; one without a head of its own uses the final norm and head."""
        own = self.exits.at(exit_layer)
        head = self.lm_head if own is None or own.lm_head is None else own.lm_head
        norm = self.model.norm if own is None else own
        if self._fast.fit(h):
            return self._fast.logits(h, norm, head.weight, vocab)
        return F.linear(norm(h), head.weight if vocab is None else head.weight[vocab])

    def _is_fast(self, h: Tensor, step: Step) -> bool:
        return step.cache is not None and step.real is None and self._fast.fit(h)

    def _block(self, layer: int) -> "PreNormBlock | PostNormBlock":
        return cast("PreNormBlock | PostNormBlock", self.model.layers[layer])

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for this model, of its dtype and on its device."""
        weight = self.lm_head.weight
        assert self.config.num_key_value_heads is not None
        assert self.config.head_dim is not None
        return KVCache(
            num_layers=self.num_layers,
            batch_size=batch_size,
            num_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            capacity=capacity,
            dtype=weight.dtype,
            device=weight.device,
        )

    def compile_blocks(self) -> None:
        """Compile each block where it stands; parameter names stay what they are."""
        for block in self.model.layers:
            block.compile()

    # The seed document's names, as thin conveniences.

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the full model."""
        step = whole_step(input_ids)
        h = self.run_layers(self.embed(input_ids, step=step), 0, self.num_layers, step=step)
        return self.unembed(h, self.num_layers)

    def forward_all_layers(self, input_ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "B T V"]]:
        """Logits of every layer, first to last."""
        layers = range(1, self.num_layers + 1)
        states = states_at(self, input_ids, layers, step=whole_step(input_ids))
        return [self.unembed(h, layer) for layer, h in states]

    def forward_train(
        self, input_ids: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T V"]]:
        """Shallow and deep logits: those of the first exit and those of the last layer."""
        layers = {self.exit_layers[0], self.num_layers}
        states = states_at(self, input_ids, layers, step=whole_step(input_ids))
        logits = [self.unembed(h, layer) for layer, h in states]
        return logits[0], logits[-1]

    def _context(self, step: Step, dtype: torch.dtype) -> _Context:
        context: _Context | None = step.memo.get((self, dtype))
        if context is None:
            context = step.memo[self, dtype] = self._new_context(step, dtype)
        return context

    def _end(self, step: Step) -> int:
        """Keys stand at positions 0 .. end - 1."""
        end: int | None = step.memo.get(self)
        if end is None:
            end = step.memo[self] = self._checked_end(step)
        return end

    def _places(self, step: Step) -> dict[str, Any]:
        """What the fast path is told of the positions."""
        return {"end": self._end(step), "tables": (self._buffers["cos"], self._buffers["sin"])}

    def _checked_end(self, step: Step) -> int:
        if step.cache is None:
            end = step.positions.shape[1]
        else:
            first, last = map(int, step.positions.aminmax())
            end = last + 1
            if first < 0:
                raise ValueError(f"positions: expected at least 0, got {first}")
        if end > self.config.max_position_embeddings:
            raise ConfigError(
                f"sequence length: expected at most {self.config.max_position_embeddings} "
                f"(max_position_embeddings), got {end}"
            )
        if step.cache is not None:
            step.cache.require(end)
        return end

    def _new_context(self, step: Step, dtype: torch.dtype) -> _Context:
        end = self._end(step)
        cos = self.get_buffer("cos")[step.positions].to(dtype)[:, None]  # (B or 1, 1, T, Dh)
        sin = self.get_buffer("sin")[step.positions].to(dtype)[:, None]
        return _Context(
            positions=step.positions,
            real=step.real,
            cached=step.cache is not None,
            cos=cos,
            sin=sin,
            end=end,
        )


def _exit_head(config: DecoderConfig) -> ExitHead:
    def norm() -> nn.Module:
        return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    adapter = head = None
    if config.exit_head == "adapter":
        adapter = ExitAdapter(config.hidden_size)
    elif config.exit_head == "full":
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    return ExitHead(norm=norm(), adapter=adapter, lm_head=head)
