"""Load Llama-family checkpoints into the native decoder, and convert native models back.

The parameters have the same names in both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offramp.data.hub import one_line
from offramp.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from offramp.models.base import EarlyExitModel
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.native.checkpoint import empty_model
from offramp.models.native.config import MOST_ANGLES, DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.models.sources import Source, find_checkpoint
from offramp.models.weights import load_state, refuse_tensors, stored_dtype
from offramp.options import config_of
from offramp.reading import parsing, read_json

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAMILIES = ("llama", "mistral")
_MISTRAL_WINDOW = 4096  # default of Mistral's config


def load_native(
    id_or_dir: str | Path | Source,
    *,
    exit_layers: Iterable[int] = (),
    exit_head: ExitHeadKind = "shared",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """Load a Llama-family checkpoint (Llama, SmolLM2, Mistral, ...) into the native decoder.

    ``dtype`` None keeps the precision that ``config.json`` states, or else that of the file; all
    weights have it. The exits start out equal to the final norm
    and head. Returns the model in eval mode.

    Raises UnsupportedArchitectureError for a config field that the native decoder does not
    support, CheckpointError for missing or damaged files, ConfigError for exits out of range.
    """
    source = find_checkpoint(id_or_dir)
    path = source.folder / "config.json"
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: expected the config of a model")
    with parsing(path, "the config of a model"):
        config = decoder_config(stored, exit_layers=exit_layers, exit_head=exit_head)
    kept = load_state(source, dtype or stored_dtype(source))
    state = {native_name(name): tensor for name, tensor in kept.items()}
    config = _tied(config, state)
    model = empty_model(config, state, path, device="meta")  # draws no random numbers
    try:
        fits = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{source.id}: the weights do not fit config.json: {one_line(error)}"
        ) from None
    missing = [name for name in fits.missing_keys if not name.startswith("exits.")]
    refuse_tensors(source, {"they lack": missing, "they have an unknown": fits.unexpected_keys})
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.start_exits()
    model.exits.to(model.lm_head.weight.dtype)
    model.exits.trained = False
    return model.to(device).eval()


def native_name(name: str) -> str:
    """Return a parameter's name in a causal language model; base models have no prefix."""
    return name if name.startswith(("model.", "lm_head.", "exits.")) else f"model.{name}"


def _tied(config: DecoderConfig, state: dict[str, torch.Tensor]) -> DecoderConfig:
    """Return the config of a model whose embedding and LM head are as in transformers.

    Tied ones that are both stored, and differ, are not tied. If one is missing in ``state``, it
    becomes the other.
    """
    if not config.tie_word_embeddings:
        return config
    embedding, head = state.get(EMBEDDING), state.get(HEAD)
    if embedding is not None and head is not None and not torch.equal(embedding, head):
        return replace(config, tie_word_embeddings=False)
    kept = head if embedding is None else embedding
    if kept is not None:
        state[EMBEDDING] = state[HEAD] = kept
    return config


def decoder_config(
    stored: Mapping[str, Any], *, exit_layers: Iterable[int], exit_head: ExitHeadKind
) -> DecoderConfig:
    """Convert the content of a Llama-family ``config.json`` to a native decoder's config."""
    family = stored.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedArchitectureError(
            f"model_type: the native decoder takes {' and '.join(FAMILIES)}, got {family!r}; "
            "offramp.from_pretrained takes any causal language model"
        )
    rope = stored.get("rope_scaling") or stored.get("rope_parameters") or {}
    longest = stored.get("max_position_embeddings", 2048 if family == "llama" else 131072)
    window = stored.get("sliding_window", _MISTRAL_WINDOW) if family == "mistral" else None
    plain = {
        "hidden_act": (stored.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(stored.get("attention_bias")), False),
        "mlp_bias": (bool(stored.get("mlp_bias")), False),
        "quantization_config": (stored.get("quantization_config"), None),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", stored.get("partial_rotary_factor", 1.0)),
            1.0,
        ),
        "sliding_window": (None if window is None or window >= longest else window, None),
    }
    for name, (got, expected) in plain.items():
        if got != expected:
            raise UnsupportedArchitectureError(
                f"{name}: the native decoder supports only {expected!r}, got {got!r}; "
                "offramp.from_pretrained takes any causal language model"
            )
    shape = {
        "vocab_size": stored["vocab_size"],
        "hidden_size": stored["hidden_size"],
        "num_hidden_layers": stored["num_hidden_layers"],
        "num_attention_heads": stored["num_attention_heads"],
        "num_key_value_heads": stored.get("num_key_value_heads"),
        "head_dim": stored.get("head_dim"),
        "intermediate_size": stored["intermediate_size"],
        "exit_layers": tuple(exit_layers),
        "exit_head": exit_head,
        "tie_word_embeddings": bool(stored.get("tie_word_embeddings")),
        "max_position_embeddings": longest,
        "rms_norm_eps": stored.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta", stored.get("rope_theta", 10_000.0))),
        **_rope_scaling(rope, stored, longest),
    }
    _check_positions(shape)
    return config_of(DecoderConfig, shape)


def _check_positions(shape: Mapping[str, Any]) -> None:
    """Refuse more positions than the native decoder has a table for; transformers has none."""
    names = ("hidden_size", "num_attention_heads", "max_position_embeddings")
    if any(type(shape[name]) is not int or shape[name] < 1 for name in names):
        return  # the decoder's config names it
    width = shape["head_dim"] or shape["hidden_size"] // shape["num_attention_heads"]
    if (longest := shape["max_position_embeddings"]) * width > MOST_ANGLES:
        raise UnsupportedArchitectureError(
            f"max_position_embeddings: the native decoder supports at most {MOST_ANGLES // width} "
            f"with heads of width {width}, got {longest}; offramp.from_pretrained takes any causal "
            "language model"
        )


_SCALINGS = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_length",
    },
}
"""By the type of a scaling, the names of its fields in ``config.json`` and in ``DecoderConfig``."""


def _rope_scaling(
    rope: Mapping[str, Any], stored: Mapping[str, Any], longest: Any
) -> dict[str, Any]:
    """Convert the scaling of the rotary positions in a ``config.json``.

    As in ``transformers``, the original length is the model's longest sequence if there is none.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _SCALINGS:
        raise UnsupportedArchitectureError(
            f"rope_type: the native decoder takes {', '.join(_SCALINGS)}, got {kind!r}; "
            "offramp.from_pretrained takes any causal language model"
        )
    length = "original_max_position_embeddings"
    given = {
        length: longest,
        **rope,
        **{name: stored[name] for name in (length,) if name in stored},
    }
    if missing := [name for name in _SCALINGS[kind] if name not in given]:
        raise ConfigError(f"rope_parameters: expected {missing[0]} with rope_type {kind}, got none")
    return {"rope_type": kind, **{mine: given[name] for name, mine in _SCALINGS[kind].items()}}


def to_transformers(model: Transformer) -> Any:
    """Return a ``LlamaForCausalLM`` that gives the same logits as the last layer of the model.

    It shares the parameters. Raises UnsupportedArchitectureError for a post-norm model and for one
    whose blocks share keys and values, which ``transformers`` does not have.
    """
    config = model.config
    if config.weight_format is not None:
        raise UnsupportedArchitectureError(
            "weights: expected numbers, which transformers reads, got "
            f"{config.weight_format} weights"
        )
    if config.norm != "pre":
        raise UnsupportedArchitectureError(
            "norm: expected a pre-norm model, like Llama, got a post-norm model, for which "
            "transformers has no architecture"
        )
    if config.cache_layers < config.num_hidden_layers:
        raise UnsupportedArchitectureError(
            "kv_source_layer: expected a model whose blocks all project keys and values, like "
            f"Llama, got one whose blocks above layer {config.kv_source_layer} share them, for "
            "which transformers has no architecture"
        )
    library = transformers()
    llama = library.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={
            "rope_type": config.rope_type,
            "rope_theta": config.rope_theta,
            **{name: getattr(config, mine) for name, mine in _SCALINGS[config.rope_type].items()},
        },
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        plain = library.AutoModelForCausalLM.from_config(
            llama, dtype=model.lm_head.weight.dtype, trust_remote_code=False
        )
    state = {name: value for name, value in model.state_dict().items() if name[:6] != "exits."}
    plain.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        plain.tie_weights()
    return plain.to(model.device).eval()


def native_of(model: EarlyExitModel) -> Transformer | None:
    """Return the model if the native decoder runs it, else None."""
    return model if isinstance(model, Transformer) else None


@torch.no_grad()
def first_layers(model: Transformer, exit_layer: int) -> Transformer:
    """Return the first layers as a model of their own, whose last layer gives the exit's logits.

    Every block up to ``cache_layers`` projects its own keys and values, so for an exit up to there
    it is an ordinary decoder. It shares the parameters. The head of the exit has no adapter.
    """
    own = model.exits.at(exit_layer)
    head = None if own is None else own.lm_head
    config = replace(
        model.config,
        num_hidden_layers=exit_layer,
        exit_layers=(),
        exit_head="shared",
        kv_source_layer=None,
        upper_intermediate_size=None,
        tie_word_embeddings=model.config.tie_word_embeddings and head is None,
    )
    state = model.state_dict()
    if own is not None:
        state["model.norm.weight"] = own.norm.weight
    if head is not None:
        state[HEAD] = head.weight
    with torch.device("meta"):
        short = Transformer(config)
    wanted = short.state_dict()
    short.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return short.eval()
