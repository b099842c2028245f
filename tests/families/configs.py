"""A config of each causal language model of ``transformers``, and of some variants.

A family's default config is made small by ``small_config``. ``CHANGES`` has the fields without
which a default config cannot be used, or has no window, no rotary scaling and so on.
"""

from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from offramp.models.huggingface.small import small_config

DECODER = {"is_decoder": True}
DECODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
)
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
MAMBA = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
CONVOLUTION = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
ROPE = {"rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 512,
    "indexer_compress_ratio": 4,
}
LONGROPE = {
    **ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(48)],
    "long_factor": [4.0 + 0.2 * i for i in range(48)],
    "original_max_position_embeddings": 2048,
}

CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(DECODERS, DECODER),
    "xmod": {**DECODER, "default_language": "en_XX"},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": MOE | {"num_experts_per_tok": 2},
    "dots1": MOE | {"sliding_window": 64, "max_window_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {**ROPE, "rope_type": "default"}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "qwen4_exp_text": INDEXER,
    "qwen4_exp": {"text_config": INDEXER},
    "xlstm": {"autocast_kernel_dtype": "float32"},
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
}
"""Fields that differ from a family's defaults."""

SMALL = {"xlstm": {"hidden_size": 256, "embedding_dim": 256}}  # which rounds widths up
"""Fields of the small config that differ."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, not a decoder": ("bert", {"is_decoder": False}),
    "roberta, not a decoder": ("roberta", {"is_decoder": False}),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ),
    "llama, llama3": (
        "llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ),
    "llama, dynamic": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama, longrope": (
        "llama",
        {"head_dim": 96, "max_position_embeddings": 8192, "rope_parameters": LONGROPE},
    ),
    "phi3, longrope": ("phi3", {"max_position_embeddings": 8192, "rope_parameters": LONGROPE}),
    "phimoe, longrope": (
        "phimoe",
        {
            "max_position_embeddings": 8192,
            "rope_parameters": {
                **LONGROPE,
                "short_factor": [1.0 + 0.1 * i for i in range(64)],
                "long_factor": [4.0 + 0.2 * i for i in range(64)],
                "short_mscale": 1.2,
                "long_mscale": 1.3,
            },
        },
    ),
    "phi3, window": ("phi3", {"sliding_window": 512}),
    "qwen2, windows above layer 2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2},
    ),
    "qwen3, windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},
    ),
    "starcoder2, window": ("starcoder2", {"sliding_window": 512}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8}),
    "falcon, sequential": ("falcon", {"parallel_attn": False, "bias": True}),
    "opt, post-norm and projected": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 512},
    ),
    "gpt2, layer scales": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "mixtral, window": ("mixtral", {"sliding_window": 512}),
    "bloom, post-norm residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "gemma4_text, shared keys and values": ("gemma4_text", {"num_kv_shared_layers": 12}),
    "gemma4_text, shared keys and values, wide": (
        "gemma4_text",
        {
            "num_kv_shared_layers": 12,
            "use_double_wide_mlp": True,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
        },
    ),
    "gemma3n_text, nothing shared": ("gemma3n_text", {"num_kv_shared_layers": 0}),
    "doge, mixture": ("doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}),
}
"""(family, fields) of what a family's default config does not show."""


def families() -> list[str]:
    """Return the causal language models of the installed version."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(name: str) -> Any:
    """Return the full config of a family or variant."""
    kind, fields = VARIANTS.get(name, (name, CHANGES.get(name, {})))
    config = transformers.CONFIG_MAPPING[kind](**fields)
    for part in (config, getattr(config, "text_config", config)):
        if not hasattr(part, "pad_token_id"):  # which 5.0 forgets in some families
            part.pad_token_id = None
    return config


def model_of(name: str) -> Any:
    """Return a small random model of a family or variant, norms and biases included."""
    if name.startswith("musicgen"):  # the language model is only the decoder of what it names
        kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
        config = small_config(kind.config_class())
    else:
        config = small_config(config_of(name))
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    for field, value in SMALL.get(name, {}).items():
        setattr(config, field, value)
    if kind.config_class is type(getattr(config, "text_config", None)):
        config = config.text_config
    torch.manual_seed(0)
    with torch.no_grad():
        lm = kind._from_config(config).eval().float()
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lm
