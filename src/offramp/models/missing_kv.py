"""What ``missing_kv`` is for a model: how later tokens get the keys and values above an exit.

Of an exit at or above the model's ``complete_from`` no key or value is missing. The choice between
``propagate`` and ``recompute`` then makes no difference, and figures say ``exact`` instead. Imports
no PyTorch.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from offramp.models.base import EarlyExitModel

MissingKV = Literal["propagate", "recompute"]
EXACT: Final = "exact"
"""``missing_kv`` of figures in which every exit that may be used is complete."""


def are_complete(exits: Iterable[int], *, complete_from: int, num_layers: int) -> bool:
    """Return whether tokens that leave at these layers leave all keys and values.

    The last layer does not count: a token there has run every block. In a model without complete
    exits (``complete_from`` is ``num_layers``) the result is False, also if no exit is given.
    """
    early = [layer for layer in exits if layer < num_layers]
    return complete_from < num_layers and all(layer >= complete_from for layer in early)


def complete(model: "EarlyExitModel", exits: Iterable[int] | None = None) -> bool:
    """Return whether a model's exits are complete; ``exits`` are those that may be used, or all."""
    used = model.exit_layers if exits is None else exits
    return are_complete(used, complete_from=model.complete_from, num_layers=model.num_layers)


def missing_kv_of(model: "EarlyExitModel", chosen: str, exits: Iterable[int] | None = None) -> str:
    """Return what figures state as ``missing_kv``: "exact" for complete exits, else ``chosen``.

    If some of the exits are below ``complete_from``, the choice matters for those, so it stays.
    """
    return EXACT if complete(model, exits) else chosen
