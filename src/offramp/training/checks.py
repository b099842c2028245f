"""Check before a run that the model supports the options of its config."""

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
