"""The layer of each parameter of a model, by the parameter's name."""

from collections.abc import Iterable

from torch import nn


def layers_by_name(
    model: nn.Module, *, below: Iterable[nn.Module], blocks: Iterable[nn.Module]
) -> dict[str, int]:
    """Implement ``layers_of_parameters`` for a model whose parts are modules.

    ``below`` are the modules before the first of ``blocks``. A parameter that several parts share
    belongs to the lowest of them.
    """
    blocks = list(blocks)
    layers: dict[int, int] = {}
    for layer, modules in enumerate((below, *([block] for block in blocks))):
        for module in modules:
            for parameter in module.parameters():
                layers.setdefault(id(parameter), layer)
    return {
        name: layers.get(id(parameter), len(blocks) + 1)
        for name, parameter in model.named_parameters()
    }
