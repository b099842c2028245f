"""What a config asks of a model that not every model can do: refused before any work."""

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
"""Fields that change how the blocks are run, so they must be run one by one."""


def check_model(model: TrainableModel, config: TrainConfig) -> None:
    """Raise a ConfigError that names the field that the model cannot be trained with."""
    for name in NEED_BLOCKS:
        if is_set(config, name):
            require_blocks(model, name)
    if not model.block_modules:
        asked = {"compile": config.compile, "sharding fsdp": config.sharding == "fsdp"}
        for name in [name for name, wanted in asked.items() if wanted]:
            raise ConfigError(
                f"{name}: expected a model whose blocks are modules of their own, as those of the "
                "native decoder are, got one whose blocks are run by transformers"
            )
    if config.layer_lr:
        try:
            model.layers_of_parameters()
        except UnsupportedArchitectureError as error:
            raise ConfigError(
                f"layer_lr: expected a model whose parameters belong to known layers, got {error}"
            ) from None
