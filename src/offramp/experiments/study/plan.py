"""The studies as values: which recipes are compared, on which model, for how long."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offramp.models.transformer import DecoderConfig
from offramp.training import TrainConfig

STANDARD = "standard"
"""Label of the static model of full depth."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way of training: what it changes of the study's model and training."""

    label: str
    training: Mapping[str, Any] = field(default_factory=dict)
    "Fields of TrainConfig."
    model: Mapping[str, Any] = field(default_factory=dict)
    "Fields of DecoderConfig."


@dataclass(frozen=True, kw_only=True)
class Study:
    """Recipes that are compared, and what they have in common."""

    name: str
    question: str
    tokenizer: str
    model: DecoderConfig
    "The vocabulary is set from the corpus."
    training: TrainConfig
    "But for the number of steps, which follows from ``tokens``, and the seed."
    tokens: int
    "Training tokens of each run, the last step's rest included."
    test_tokens: int
    "Tokens of the test text that are read, from its start."
    recipes: tuple[Recipe, ...]
    static_layers: tuple[int, ...]
    "Depths of the models without exits that stand beside them; the deepest is the standard."
    seeds: int = 3


SMALL = DecoderConfig(
    vocab_size=1,
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=336,
    exit_layers=(2,),
    exit_head="norm",
    max_position_embeddings=128,
)
"""The model of every study: six pre-norm layers, an exit after the second with its own norm."""

USUAL = TrainConfig(
    loss_weights="standard",
    seq_len=128,
    batch_size=4,
    lr=2e-3,
    warmup_steps=50,
    schedule="cosine",
)

OBJECTIVES = Study(
    name="objectives",
    question="What does each objective of the field do to the exit, the last layer and between?",
    tokenizer="bpe:512",
    model=SMALL,
    training=USUAL,
    tokens=524_288,
    test_tokens=32_768,
    recipes=(
        Recipe(label="asymmetric 0.5", training={"loss_weights": "asymmetric:0.5"}),
        Recipe(
            label="asymmetric 0.9 to 0.3, cosine",
            training={
                "loss_weights": "asymmetric:0.9",
                "alpha_end": 0.3,
                "alpha_schedule": "cosine",
            },
        ),
        Recipe(
            label="asymmetric deep supervision 0.5",
            training={"loss_weights": "asymmetric_deep_supervision:0.5"},
        ),
        Recipe(label="deep supervision", training={"loss_weights": "deep_supervision"}),
        Recipe(
            label="deep supervision, gradient equilibrium",
            training={"loss_weights": "deep_supervision", "gradient_equilibrium": True},
        ),
        Recipe(label="FREE", training={"loss_weights": "free"}),
        Recipe(
            label="EE-LLM 0.25, warm-up",
            training={
                "loss_weights": "ee_llm:0.25",
                "weight_warmup": "linear",
                "weight_warmup_steps": 256,
            },
        ),
        Recipe(
            label="linear over all layers",
            training={
                "loss_weights": ",".join(f"{layer}={layer / 21:.6f}" for layer in range(1, 7))
            },
        ),
        Recipe(
            label="LayerSkip, rotational, layer dropout",
            training={
                "loss_weights": "layerskip:0.2",
                "curriculum": "rotational:3",
                "layer_dropout": 0.1,
                "layer_dropout_schedule": "exponential",
            },
        ),
        Recipe(
            label="LayerSkip, gradual",
            training={"loss_weights": "layerskip:0.2", "curriculum": "gradual"},
        ),
        Recipe(
            label="asymmetric 0.5, detached exit",
            training={"loss_weights": "asymmetric:0.5", "detach_exits": True},
        ),
        Recipe(
            label="asymmetric 0.5, self-distillation 0.3",
            training={"loss_weights": "asymmetric:0.5", "distill": 0.3},
        ),
        Recipe(
            label="asymmetric 0.5 after 256 steps of standard",
            training={"loss_weights": "asymmetric:0.5", "backbone_steps": 256},
        ),
        Recipe(
            label="asymmetric 0.5, learning rate decay 0.9 a layer",
            training={"loss_weights": "asymmetric:0.5", "layer_lr": "decay:0.9"},
        ),
    ),
    static_layers=(2, 4, 6),
)

STUDIES: dict[str, Study] = {study.name: study for study in (OBJECTIVES,)}
