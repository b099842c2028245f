"""The studies, as values: what ``offramp study NAME`` compares."""

from dataclasses import replace

from offramp.models.native.config import DecoderConfig
from offramp.studies.study.candidates import Candidate
from offramp.studies.study.findings import ASYMMETRIC
from offramp.studies.study.findings import MIDDLE as MIDDLE_LOSS
from offramp.studies.study.plan import Recipe, Study
from offramp.training.config import TrainConfig

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
"""The model of every study: six pre-norm layers and an exit with its own norm after layer 2."""

SUBWORDS = TrainConfig(
    loss_weights="standard",
    seq_len=128,
    batch_size=4,
    lr=2e-3,
    warmup_steps=50,
    schedule="cosine",
)

OBJECTIVES = Study(
    name="objectives",
    question="How does each published objective change the PPL of the exit, of the last layer, and "
    "of routing between them?",
    tokenizer="bpe:512",
    model=SMALL,
    training=SUBWORDS,
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

CHARACTERS = TrainConfig(
    loss_weights="standard",
    seq_len=128,
    batch_size=32,
    lr=2e-3,
    warmup_steps=50,
    schedule="cosine",
)

GRID = Study(
    name="grid",
    question="",
    tokenizer="characters",
    model=SMALL,
    training=CHARACTERS,
    tokens=300 * 32 * 128,
    test_tokens=131_072,
    recipes=(),
    static_layers=(1, 2, 3, 4, 5, 6),
    measures=("gain", "max_prob"),
)
"""What the studies on characters have in common: 300 steps, a third of the full number."""


def _weights(**of_layers: float) -> str:
    """Loss weights in their written form: ``e2=0.5, e6=0.5`` gives ``2=0.5,6=0.5``."""
    return ",".join(f"{layer[1:]}={weight:g}" for layer, weight in of_layers.items() if weight)


def _exits(label: str, **weights: float) -> Recipe:
    """A recipe with an exit at each layer that has a weight, below the last."""
    layers = tuple(int(layer[1:]) for layer in weights)
    return Recipe(
        label=label,
        training={"loss_weights": _weights(**weights)},
        model={"exit_layers": layers[:-1]},
    )


ALPHA = replace(
    GRID,
    name="alpha",
    question="Which alpha is best? The loss is alpha x loss at layer 2 + (1 - alpha) x loss at "
    "layer 6.",
    baseline=ASYMMETRIC,
    varies="alpha",
    seed_findings=True,
    recipes=(
        *(
            Recipe(
                label=f"alpha {alpha:.1f}",
                training={"loss_weights": _weights(e2=alpha, e6=round(1 - alpha, 1))},
                level=alpha if 0 < alpha < 1 else None,
                tested=0 < alpha < 1,  # at 0 and 1 one of the two has no loss
            )
            for alpha in (tenths / 10 for tenths in range(11))
        ),
        Recipe(
            label=MIDDLE_LOSS,
            training={"loss_weights": _weights(e2=0.7, e3=1, e4=1, e5=1, e6=0.3)},
        ),
    ),
)

MIDDLE = replace(
    GRID,
    name="middle",
    baseline="middle 0",
    varies="the weight of each layer in between",
    question="Does a loss at the layers in between hurt? Layers 2 and 6 have weight 0.5 each; "
    "layers 3, 4 and 5 have one weight, from 0 to 1.",
    recipes=tuple(
        Recipe(
            label=f"middle {middle:g}",
            training={"loss_weights": _weights(e2=0.5, e3=middle, e4=middle, e5=middle, e6=0.5)},
            level=middle,
        )
        for middle in (0.0, 0.1, 0.25, 0.5, 1.0)
    ),
)

EXITS = replace(
    GRID,
    name="exits",
    baseline="exit 2",
    question="Which layer is best for an exit, and is one exit better than several?",
    recipes=(
        _exits("exit 1", e1=0.5, e6=0.5),
        _exits("exit 2", e2=0.5, e6=0.5),
        _exits("exit 3", e3=0.5, e6=0.5),
        _exits("exit 4", e4=0.5, e6=0.5),
        _exits("exits 1, 3", e1=0.25, e3=0.25, e6=0.5),
        _exits("exits 2, 4", e2=0.25, e4=0.25, e6=0.5),
        _exits("exits 2, 3, 4", e2=0.2, e3=0.1, e4=0.1, e6=0.6),
        _exits("exits 1 to 5", e1=0.1, e2=0.1, e3=0.1, e4=0.1, e5=0.1, e6=0.5),
    ),
)

HEADS = replace(
    GRID,
    name="heads",
    baseline="norm",
    question="What should an exit have of its own: nothing, a norm, an adapter, or a norm and an "
    "LM head?",
    recipes=tuple(
        Recipe(
            label=kind,
            training={"loss_weights": _weights(e2=0.5, e6=0.5)},
            model={"exit_head": kind},
        )
        for kind in ("shared", "norm", "adapter", "full")
    ),
)

KV_BASELINE = "no source, exits 1, 2"


def _shared(source: int | None, *exits: int) -> Recipe:
    """What ``offramp recipe`` begins with, with that source of keys and values."""
    first = Candidate(exits=exits, source=source)
    name = "no source" if source is None else f"source {source}"
    layers = f"exit{'s' if len(exits) > 1 else ''} {', '.join(map(str, exits))}"
    return replace(first.recipe, label=f"{name}, {layers}")


KV = replace(
    GRID,
    name="kv",
    question="Every block above the source takes its keys and values from the state after it. "
    "Which source is best for decoding, and how much of that is the architecture's effect and how "
    "much that of exits whose cache is complete?",
    decoding=True,
    baseline=KV_BASELINE,
    recipes=(
        *(_shared(source, 1, 2) for source in (None, 1, 2, 3)),
        *(_shared(source, 2) for source in (None, 1, 2)),
        _shared(3, 3),  # the lowest complete exit
    ),
    shared_static=((6, 1), (6, 2), (6, 3)),
    compared_at=60.0,
    seeds=2,
)
"""It shares runs with the search of ``offramp recipe`` for six layers: those of seed 0 with the
two exits that the search begins with."""

STUDIES: dict[str, Study] = {
    study.name: study for study in (OBJECTIVES, ALPHA, MIDDLE, EXITS, HEADS, KV)
}
