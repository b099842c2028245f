"""Check before a run that the model supports the options of its config."""

from collections.abc import Iterable

from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.exits.objective import is_set
from offramp.models.base import TrainableModel, require_blocks
from offramp.training.config import TrainConfig

NEED_BLOCKS = (
    "layer_dropout",
    "gradient_equilibrium",
    "detach_exits",
    "recompute_activations",
)
"""Fields for which the blocks must be run one by one."""


def check_model(model: TrainableModel, config: TrainConfig) -> None:
    """Raise a ConfigError for a field of the config that the model does not support."""
    for name in NEED_BLOCKS:
        if is_set(config, name):
            require_blocks(model, name)
    if not model.block_modules:
        uses = {"compile": config.compile, "sharding fsdp": config.sharding == "fsdp"}
        for name in [name for name, wanted in uses.items() if wanted]:
            raise ConfigError(
                f"{name}: expected a model whose blocks are separate modules, such as the native "
                "decoder, got one whose blocks are run by transformers"
            )
    if config.layer_lr:
        try:
            model.layers_of_parameters()
        except UnsupportedArchitectureError as error:
            raise ConfigError(
                f"layer_lr: expected a model with a known layer for each parameter, got {error}"
            ) from None


def check_branches(model: TrainableModel, config: TrainConfig, layers: Iterable[int]) -> None:
    """Raise a ConfigError if gradients could pass by a branch whose gradients are to be scaled.

    ``layers`` are the layers with a weight. Above ``complete_from`` blocks share keys and values,
    whose gradients do not pass through the states between them.
    """
    passed = [layer for layer in layers if model.complete_from < layer < model.num_layers]
    if config.gradient_equilibrium and passed:
        raise ConfigError(
            f"gradient_equilibrium: expected no weights between layer {model.complete_from}, above "
            f"which blocks share keys and values, and layer {model.num_layers}, got one at layer "
            f"{passed[0]}"
        )
