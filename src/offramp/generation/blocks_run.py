"""How many blocks decoding runs for each token of a text."""

from collections.abc import Sequence

from offramp.models.missing_kv import MissingKV


def layers_run(
    exit_layers: Sequence[int], missing_kv: MissingKV, *, cache_layers: int
) -> list[int]:
    """Return how many blocks decoding runs for each token of one text, from where they exit.

    Under "recompute", the blocks above an exit run later, as far as a later token of the text needs
    their keys and values; blocks above ``cache_layers`` write none.
    """
    if missing_kv == "propagate":
        return list(exit_layers)
    deepest, found = 0, []
    for layer in reversed(exit_layers):
        deepest = max(deepest, layer)
        found.append(max(layer, min(deepest, cache_layers)))
    return found[::-1]
