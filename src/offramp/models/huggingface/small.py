"""A small copy of the config of a Hugging Face model.

A model of the small config runs the same code as the real one, but has a few narrow layers, and
windows, chunks and rotary boundaries of a few tokens. What a long sequence does in the real model,
a short one therefore does in the small model.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

VOCABULARY, HEADS, HEAD, LAYERS = 300, 4, 16, 4
HIDDEN = HEADS * HEAD
WINDOW, BOUNDARY, LONGEST = 8, 24, 128
"""Tokens in a window, before the rotary factors change, and in the longest sequence."""

DEPTH = re.compile(r"(n|num|decoder|encoder|num_decoder|num_encoder)_(hidden_)?layers?|num_blocks")
"""Names of the number of layers."""
_DROPPED = re.compile(
    "quantization_config|dtype|torch_dtype|architectures|auto_map|id2label|label2id|_name_or_path|"
    "return_dict|output_attentions|output_hidden_states|chunk_size_feed_forward|problem_type"
)
_NUMBERS_OF_LAYERS = re.compile(
    r"cross_attention_layers|full_attn_idxs|hybrid_layer_ids|mlp_only_layers|moe_layers|"
    r"ple_layer_ids|.*_layer_(ids|indices|idxs)"
)

Rule = int | Callable[[int, Mapping[str, Any]], int]
_RULES: tuple[tuple[str, Rule], ...] = (  # the first whose pattern is the whole name of a field
    (r"max_window_layers", 2),
    (r"first_k_dense_replace|num_dense_layers|.*_layer_offset", lambda v, _: min(v, 1)),
    (
        r"num_kv_shared_layers",
        lambda v, f: LAYERS if v == f.get("num_hidden_layers") else min(v, 2),
    ),
    (r".*_layer_period|layer_group_size|.*every_n_layers|_?sliding_window_pattern", 2),
    (r"no_rope_layer_interval|num_layers_per_stack|n_recurrent_layers", 2),
    (r"n_(input|output)_layers", 1),
    (r"moe_layer_end_index|loop_layer_index_end", lambda v, _: min(v, 3)),
    (r"loop_layer_index_start|n_layers_per_attn_res_block", lambda v, _: min(v, 1)),
    (DEPTH.pattern, LAYERS),
    (
        r".*window.*|.*chunk_?(size|len).*|.*chunk_length|local_attention",
        lambda v, _: min(v, WINDOW),
    ),
    (r"original_max_position_embeddings|floor_scale|log_scaling_n_floor", BOUNDARY),
    (r"max_(position_embeddings|seq_len|target_positions|source_positions)", LONGEST),
    (r"n_positions|n_ctx|context_length|model_max_length|rel_extent|mem_len", LONGEST),
    (r"(index_)?topk_blocks|index_topk|indexer_budget", WINDOW),
    (r"index_block_size", 4),
    (r"ngram_vocab_size_base", VOCABULARY),
    (r".*vocab(ulary)?(_size.*)?", VOCABULARY),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts", lambda v, _: min(v, 2)),
    (r"n_group|num_expert_group", lambda v, _: min(v, 2)),
    (r"topk_group", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", lambda v, _: min(v, 1)),
    (r".*num_experts|num_local_experts|n_routed_experts|zero_expert_num", lambda v, _: min(v, 4)),
    (r"linear_num_value_heads|linear_num_key_heads|linear_num_heads", HEADS),
    (r".*(key_value_heads|kv_heads|kv_groups|query_groups)", lambda v, f: _kv_heads(v, f)),
    (r"mamba_n_heads|mamba_num_heads|num_heads|n_mamba_heads", lambda v, f: _heads_of_states(v, f)),
    (r"n_heads?|.*attention_heads", HEADS),
    (r"index(er)?_n_heads", 16),  # with few heads, scores of exactly 0 make ties
    (r"attention_head_dim", lambda v, f: HEAD * v // (_head(f) or v)),
    (r"qk_head_dim", 2 * HEAD),
    (r"head_dim", lambda v, f: 2 * HEAD if v > f.get("qk_rope_head_dim", v) else HEAD),
    (r".*_head_dim|.*head_size|.*headdim|kv_channels|d_head|d_kv|.*d_head|dim_head", HEAD),
    (r"rotary_dim", HEAD // 2),
    (r".*lora_rank|.*_rank|.*lowrank", HEAD),
    (r"mamba_d_ssm", lambda v, f: HEAD * _heads_of_states(v, f)),
    (
        r"adapter_in(put_size|_dim)|lru_width|attention_hidden_size",
        lambda v, f: HIDDEN * v // _hidden(f),
    ),
    (r".*state_size|.*d_state", HEAD),
    (r"n_groups|mamba_n_groups|o_groups", lambda v, _: min(v, 2)),
    (r"hidden_size_per_layer_input", lambda v, _: min(v, HEAD)),
    (r"hidden_size|n_embd|d_model|.*_hidden_size|hidden_dim|emb_dim|embedding_dim", HIDDEN),
    (
        r".*embedding_size|word_embed_proj_dim",
        lambda v, f: HIDDEN if v == _hidden(f) else HIDDEN // 2,
    ),
    (r".*(intermediate|ffn|feed_forward|d_inner|dim_ff|dff|d_ff|n_inner).*", HIDDEN),
)
_RULES_COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in _RULES)


def small_config(config: Any) -> Any:
    """Return a small copy of a config; any error of the library if it is not accepted."""
    return type(config).from_dict(_small(_fields(config)))


def _fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config as its model reads them, which a file may write otherwise."""
    fields: dict[str, Any] = config.to_dict()
    for name in fields:
        try:
            now = getattr(config, name)
        except Exception:  # it differs between layers
            continue
        if not isinstance(fields[name], dict):
            fields[name] = now
        elif hasattr(now, "model_type"):
            fields[name] = _fields(now)
    return fields


def _small(fields: Mapping[str, Any]) -> dict[str, Any]:
    depth = next((v for k, v in fields.items() if DEPTH.fullmatch(k) and type(v) is int), 0)
    layers = _chosen_layers(fields, depth)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if _DROPPED.fullmatch(str(name)) or (name == "is_encoder_decoder" and not value):
            continue
        if isinstance(value, dict):
            small[name] = _small_dict(name, value, layers, fields)
        elif isinstance(value, list | tuple) and name not in ("time_step_limit",):
            small[name] = _small_list(name, list(value), depth, layers, fields)
        elif type(value) is int and value > 0:
            small[name] = _size(name, value, fields, len(layers))
        else:
            small[name] = value
    return small


def _small_dict(
    name: str, value: Mapping[Any, Any], layers: list[int], fields: Mapping[str, Any]
) -> dict[Any, Any]:
    if name == "per_layer_config":  # what differs in some layers
        at = {int(layer): differing for layer, differing in value.items()}
        return {
            new: {each: _other_size(each, v, fields, at[layer]) for each, v in at[layer].items()}
            for new, layer in enumerate(layers)
            if layer in at
        }
    return _small(value) if name.endswith("_config") else _rope(value, fields)


def _other_size(
    name: str, value: int, fields: Mapping[str, Any], of_layer: Mapping[str, Any]
) -> int:
    """Return the size of a layer that differs in it from the others, in the small model, too."""
    small = _size(name, value, {**fields, **of_layer}, 0)
    usual = fields.get(name)
    if name != "head_dim" or type(usual) is not int or usual == value:
        return small
    if small != _size(name, usual, fields, 0):
        return small
    return 2 * small if value > usual else max(1, small // 2)


def _size(name: str, value: int, fields: Mapping[str, Any], depth: int) -> int:
    if name.endswith(("token_id", "_index", "_idx")) or name in ("eod_id",):
        return value % VOCABULARY
    for pattern, rule in _RULES_COMPILED:
        if pattern.fullmatch(name):
            if pattern.pattern == DEPTH.pattern and depth:
                return depth
            return rule(value, fields) if callable(rule) else rule
    return value


def _small_list(
    name: str, value: list[Any], depth: int, layers: list[int], fields: Mapping[str, Any]
) -> list[Any]:
    if name == "attention_types":  # GPT-Neo: [[["global", "local"], 12]]
        return [[kinds, len(layers) // len(kinds)] for kinds, _ in value[:1]]
    if _NUMBERS_OF_LAYERS.fullmatch(name):
        new = [layers.index(each) for each in value if each in layers]
        return sorted(new) if new or not value else [len(layers) - 1]
    if depth > 1 and len(value) == depth:
        value = [value[layer] for layer in layers]
    if name.endswith("token_id"):
        return [each % VOCABULARY if type(each) is int else each for each in value]
    return [
        _size(re.sub("_per_layer$", "", name), each, fields, len(layers))
        if type(each) is int and each > 1
        else each
        for each in value
    ]


def _rope(rope: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            new[name] = _rope(value, fields)
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            factors = max(1, len(value) * HEAD // _head(fields))
            new[name] = (value + value[-1:] * factors)[:factors]
        elif name == "mrope_section" and isinstance(value, list):
            half = sum(value) * HEAD // _head(fields)
            rest = [each * half // sum(value) for each in value[1:]]
            new[name] = [half - sum(rest), *rest]
        elif name == "original_max_position_embeddings" and type(value) is int:
            new[name] = BOUNDARY
        else:
            new[name] = value
    return new


def _chosen_layers(fields: Mapping[str, Any], depth: int) -> list[int]:
    """Return the layers that the small model keeps: those of every kind, in turn."""
    if not depth:
        return []
    lists = [
        value
        for name, value in fields.items()
        if isinstance(value, list | tuple)
        and len(value) == depth
        and not _NUMBERS_OF_LAYERS.fullmatch(name)
    ]
    kinds: dict[str, list[int]] = {}
    for layer in range(depth):
        kinds.setdefault(repr([value[layer] for value in lists]), []).append(layer)
    wanted = min(depth, max(LAYERS, min(2 * len(kinds), 8)))
    turns = [ours[turn] for turn in range(depth) for ours in kinds.values() if turn < len(ours)]
    return turns[:wanted]


def _kv_heads(value: int, fields: Mapping[str, Any]) -> int:
    heads = next(
        (v for k, v in fields.items() if re.fullmatch("num_attention_heads|n_heads?", k)), 0
    )
    return HEADS if value == heads else min(value, 2)


def _heads_of_states(value: int, fields: Mapping[str, Any]) -> int:
    """Return the number of heads of a state-space layer, whose width is a multiple of D."""
    expand = fields.get("mamba_expand") or fields.get("expand")
    if "mamba_dt_rank" in fields:  # Mamba 1, whose heads share the width
        return min(value, 2)
    return HEADS * expand if isinstance(expand, int) else HEADS


def _hidden(fields: Mapping[str, Any]) -> int:
    return next((fields[k] for k in ("hidden_size", "n_embd", "d_model") if k in fields), 0)


def _head(fields: Mapping[str, Any]) -> int:
    for name in ("qk_rope_head_dim", "head_dim"):
        if isinstance(fields.get(name), int) and fields[name]:
            return int(fields[name])
    heads = next(
        (v for k, v in fields.items() if re.fullmatch("num_attention_heads|n_heads?", k)), 1
    )
    return int(_hidden(fields) // (heads or 1)) or HEAD
