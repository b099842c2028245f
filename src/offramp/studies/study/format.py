"""The stored format of a study's runs: which fields of which config are always in a record.

A run's folder is named by a hash of its config, and a study's settings are compared with those
that its folder holds. Both take their fields from ``stored_fields``: a field that these lists
lack, because it was added to a config after the format was fixed, counts only where it differs
from its default, so old records stay found. Whoever changes a default, removes a field or changes
what a figure means must raise FORMAT and list all fields anew.
"""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from offramp.files import stored_fields

FORMAT = 5

FORMAT_FIELDS: Mapping[str, tuple[str, ...]] = {
    "StudyRun": ("text", "tokenizer", "test_tokens", "measures", "gates", "model", "training"),
    "GateFit": ("tokens", "steps"),
    "DecoderConfig": (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "exit_layers",
        "exit_head",
        "norm",
        "tie_word_embeddings",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
    ),
    "TrainConfig": (
        "loss_weights",
        "alpha_end",
        "alpha_schedule",
        "alpha_steps",
        "weight_warmup",
        "weight_warmup_steps",
        "curriculum",
        "layer_dropout",
        "layer_dropout_schedule",
        "gradient_equilibrium",
        "detach_exits",
        "distill",
        "distill_temperature",
        "backbone_steps",
        "layer_lr",
        "steps",
        "epochs",
        "seq_len",
        "batch_size",
        "lr",
        "weight_decay",
        "warmup_steps",
        "schedule",
        "grad_clip",
        "eval_every",
        "patience",
        "select_at",
        "shuffle",
        "seed",
        "precision",
        "accumulate",
        "recompute_activations",
        "compile",
        "sharding",
        "checkpoint_every",
        "keep_checkpoints",
    ),
    "SpecialiseConfig": (
        "compute_budget",
        "tokens",
        "steps",
        "batch_size",
        "lr",
        "weight_decay",
        "others",
        "imitate",
        "seed",
    ),
    "RecipeConfig": ("layers", "compute_budget", "tokens", "seeds", "tokenizer", "dim"),
}
"""By the name of the config's class, the fields that a record of this format always holds.

``specialise`` of a run is not among them: a run without it has never held it.
"""


def record_of(config: Any) -> dict[str, Any]:
    """A config as a record holds it; configs within it likewise.

    The fields are those of the nearest class among its bases that the format knows.
    """
    known = next(cls.__name__ for cls in type(config).__mro__ if cls.__name__ in FORMAT_FIELDS)
    return nested_records(stored_fields(config, FORMAT_FIELDS[known]))


def nested_records(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the configs that are values in it replaced by records of theirs."""
    return {
        name: record_of(value) if is_dataclass(value) else value for name, value in record.items()
    }
